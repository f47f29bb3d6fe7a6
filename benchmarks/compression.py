"""What does a compression cost in time and memory, from the files of a model to the new ones, and beside its floors?

Every part runs in a process of its own, which says what memory it held at most; its rows are kept when it ends, and a
run that was killed goes on with the parts that are missing. *all-MiniLM-L6-v2*: 512 texts, all kernels, half kept, from
`load` to `save`, compiling included; and the same again with what was compiled the first time kept on the disk.
*BERT-base's shape*: the same with 12 layers of width 768, random and seeded, or a directory given by
`--model`; texts are cut at 64 tokens. Seconds of CPU count all threads: where other work shares the machine they tell
more than those of the clock, though threads that wait spin, and count.

The floor of the importance. In units of a forward pass through the kernels, a plain training gradient is 3: forward,
backward to the activations, backward to the kernels. Importance needs the first two, and in place of the third the
sums. A matrix of 768 x 768 is a twelfth of a layer's kernels, 0.08 units; symmetry saves half of it, and halving stops
at blocks of 192 rows: 0.05. Each of six kernels has two of them for the gradients, and all inputs have four: 0.83
units. Of the side of 3072 these are of what the kernel passes on, which the model makes itself. Products between an
example's time steps add 0.08 at 64 tokens. Together 2.91 units, 0.97 gradients. The importance and the plain gradients
are measured by turns over the same batches, compiled before. Beside plan and solve: NumPy's `eigh` of a symmetric
matrix of every kernel's smaller side, one after the other, and one on each processor with one thread of LAPACK each.

The ten operations that take longest in each stage: of XLA as JAX's profiler has them, added up over threads and over
operations whose names differ in numbers alone; and of the host, the innermost function that is not the standard
library's, of each thread that does not wait, looked at 100 times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.seeded import random_encoder
from benchmarks.tables import Row, arguments, at_most, conclude, keep, kept_in, markdown, number, read, row

PARTS = ("MiniLM", "MiniLM again", "base", "base again", "gradients", "eigh", "operations")
STAGES = ("load", "importance", "plan", "solve", "save")
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
LENGTH, BUDGET, MOST = 64, 0.5, 10
MINILM, RANDOM = "all-MiniLM-L6-v2", "random numbers"


class Clock(NamedTuple):
    """Seconds of the clock, of CPU in all threads, and of compiling."""

    wall: float
    cpu: float
    compiling: float


COMPILING = [0.0]


def now() -> Clock:
    """Since the process began."""
    return Clock(time.perf_counter(), time.process_time(), COMPILING[0])


def since(began: Clock) -> dict[str, Any]:
    """What has passed, under the names of the rows."""
    wall, cpu, compiling = (end - begin for end, begin in zip(now(), began, strict=True))
    return {"run_seconds": wall, "cpu_seconds": cpu, "compile_seconds": compiling}


def count_compiling() -> None:
    """From now on `COMPILING` adds up the seconds of XLA's compiler, and of reading what it left on the disk."""
    import jax

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            COMPILING[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(note)


def model_of(part: str, options: argparse.Namespace) -> Any:
    """The model of a part: read from its files, or random with those of all-MiniLM-L6-v2 beside it."""
    import bert_adapter
    from bert_adapter.demo import minilm

    if part.startswith("MiniLM") or options.model is not None:
        return bert_adapter.load(minilm() if part.startswith("MiniLM") else options.model)
    return random_encoder(**(SMALL if options.quick else BASE))


def batches_of(model: Any, options: argparse.Namespace) -> Any:
    """The texts that come with the package, the first ones again until there are enough."""
    import numpy as np

    import bert_adapter
    from bert_adapter.demo import sentences

    count = 16 if options.quick else 512
    texts = np.resize(np.array(sentences("calibration") + sentences("heldout"), object), count).tolist()
    return bert_adapter.text_batches(model, texts, max_length=LENGTH)


def stages(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The stages of a compression by name, each with a call that runs it on what those before have left."""
    import bert_adapter

    left: dict[str, Any] = {}

    def load() -> None:
        left["model"] = model_of(part, options)
        left["batches"] = batches_of(left["model"], options)

    def importance() -> None:
        model, shapes = left["model"], bert_adapter.select_kernels(left["model"])
        left["importance"] = bert_adapter.measure_signal(
            bert_adapter.forward(model), model.params, left["batches"], shapes, progress=False
        )

    def plan_and_solve() -> None:
        left["small"], _ = bert_adapter.compress(
            left["model"], (), budget=BUDGET, importance=left["importance"], progress=False
        )

    def save() -> None:
        with tempfile.TemporaryDirectory() as folder:
            bert_adapter.save(left["small"], Path(folder) / "small")

    return {"load": load, "importance": importance, "plan and solve": plan_and_solve, "save": save}


def whole(part: str, options: argparse.Namespace) -> list[Row]:
    """A compression as users run it: `load`, `compress` and `save`, with the stages that its report tells apart."""
    import jax

    import bert_adapter

    began = now()
    jax.block_until_ready(jax.numpy.zeros(1))
    rows = [row(part, "imports", None, "", **since(began), peak_bytes=peak_bytes())]
    started = began = now()
    model = model_of(part, options)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    batches = batches_of(model, options)
    rows.append(row(part, "load", None, "", **since(began), peak_bytes=peak_bytes(), weight_bytes=weights))
    began = now()
    small, report = bert_adapter.compress(model, batches, budget=BUDGET, progress=False)
    whole_of_it = since(began)
    for name in ("importance", "plan", "solve"):
        rows.append(row(part, name, None, "", run_seconds=report.seconds[name]))
    rows.append(row(part, "compress", None, "", **whole_of_it, peak_bytes=peak_bytes()))
    began = now()
    with tempfile.TemporaryDirectory() as folder:
        bert_adapter.save(small, Path(folder) / "small")
    rows.append(row(part, "save", None, "", **since(began), peak_bytes=peak_bytes()))
    rows.append(row(part, "load to save", None, "", **since(started), peak_bytes=peak_bytes()))
    return rows


def gradients(part: str, options: argparse.Namespace) -> list[Row]:
    """The importance beside plain gradients over the same batches, by turns, and the file of the sums."""
    import jax
    import jax.numpy as jnp

    import bert_adapter

    model = model_of(part, options)
    batches, forward = batches_of(model, options), bert_adapter.forward(model)
    paths, params = bert_adapter.select_kernels(model), jax.device_put(model.params)

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jax.grad(lambda params: 0.5 * jnp.sum(forward(params, batch) ** 2))(params)

    def plain() -> None:
        for batch in batches:
            jax.block_until_ready(gradient(params, batch))

    def measured() -> Any:
        return bert_adapter.measure_signal(forward, params, batches, paths, progress=False)

    rows: list[Row] = []
    found: Any = None
    for turn in range(2 if options.quick else 3):
        for name, call in {"plain gradients": plain, "importance": measured}.items():
            began = now()
            found = call() or found
            rows.append(row(part, name, None, "compiling" if turn == 0 else "", **since(began), turn=turn))
    began = now()
    with tempfile.TemporaryDirectory() as folder:
        bert_adapter.save_importance(found, Path(folder) / "sums")
        size = (Path(folder) / "sums").stat().st_size
    whole_size = 4 * sum(m * m + n * n for m, n in paths.values())
    return [*rows, row(part, "file of the sums", None, "", **since(began), file_bytes=size, whole_bytes=whole_size)]


def eigh(part: str, options: argparse.Namespace) -> list[Row]:
    """NumPy's eigh for every kernel's smaller side, and plan and solve on the same machine in the same process."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from threadpoolctl import threadpool_limits

    import bert_adapter

    calls = stages(part, options)
    calls["load"]()
    sides = [min(shape) for shape in bert_adapter.select_kernels(model_of(part, options)).values()]
    square = {side: np.cov(np.random.default_rng(side).normal(size=(side, 2 * side))) for side in set(sides)}

    def in_turn() -> None:
        for side in sides:
            np.linalg.eigh(square[side].astype(np.float32))

    def side_by_side() -> None:
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda side: np.linalg.eigh(square[side].astype(np.float32)), sides))

    calls["importance"]()
    timed = {"eigh, in turn": in_turn, "eigh, side by side": side_by_side, "plan and solve": calls["plan and solve"]}
    rows = []
    for name, call in timed.items():
        began = now()
        call()
        rows.append(row(part, name, None, "", **since(began)))
    return rows


def operations(part: str, options: argparse.Namespace) -> list[Row]:
    """What takes longest in each stage."""
    from benchmarks.operations import profiled

    rows = []
    for name, call in stages(part, options).items():
        for kind, found in profiled(call).items():
            total = sum(found.values()) or 1
            for what, seconds in found.most_common(MOST):
                spent: dict[str, Any] = {"run_seconds": seconds, "stage": name, "kind": kind, "share": seconds / total}
                rows.append(row(part, what, None, "", **spent))
    return rows


def peak_bytes() -> int:
    """The most memory that the process has held."""
    from benchmarks.timing import process_peak_bytes

    return process_peak_bytes()


RUNS = {"gradients": gradients, "eigh": eigh, "operations": operations}


def run_part(options: argparse.Namespace) -> None:
    """A part, in this process; its rows go to standard output."""
    count_compiling()
    name = RANDOM if options.model is None else Path(options.model).resolve().name
    about = {"model": MINILM if options.part.startswith("MiniLM") else name}
    for line in RUNS.get(options.part, whole)(options.part, options):
        print("ROW " + json.dumps(line | about), flush=True)


@contextmanager
def compiled_programs() -> Iterator[dict[str, dict[str, str]]]:
    """By model, the environment that has what is compiled for it in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield {
            name: os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/{name}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            }
            for name in ("MiniLM", "base")
        }


def main(argv: list[str] | None = None) -> None:
    parser = arguments("compression", __doc__)
    parser.add_argument("--model", metavar="DIR", help="of 12 layers of width 768, in place of random parameters")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        return run_part(options)
    file = kept_in(options, "compression")
    done = {line["problem"] for line in read(file)}
    with compiled_programs() as environments:
        for part in PARTS:
            if done.issuperset({part, f"{part} again"} & set(PARTS)):  # what is compiled for the one serves the other
                continue
            command = [sys.executable, "-m", "benchmarks.compression", "--part", part]
            command += ["--quick"] * options.quick + (["--model", options.model] if options.model else [])
            environment = environments["MiniLM" if part.startswith("MiniLM") else "base"]
            ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            keep(file, *(json.loads(line[4:]) for line in ran.stdout.splitlines() if line.startswith("ROW ")))
            print(f"  {part}: done", flush=True)
    return conclude(file, report, draw, __doc__)


def of_part(rows: list[Row], part: str) -> dict[str, Row]:
    """The rows of a part by what they are of."""
    return {line["method"]: line for line in rows if line["problem"] == part}


def costs(rows: list[Row]) -> str:
    """Seconds and memory of the whole compressions."""
    cells = []
    for part in PARTS[:4]:
        for name, line in of_part(rows, part).items():
            seconds = [number(line.get(key), ".1f") for key in ("run_seconds", "cpu_seconds", "compile_seconds")]
            peak = line.get("peak_bytes")
            cells.append([part, name, *seconds, number(peak and peak / 2**20, ".0f")])
    return markdown(["", "stage", "seconds", "of CPU", "of them compiling", "peak MiB so far"], cells)


def ratios(rows: list[Row]) -> dict[str, float]:
    """The median over the turns of importance over plain gradients, in seconds of the clock and of CPU."""
    import numpy as np

    turns = [line for line in rows if line["problem"] == "gradients" and line.get("turn")]
    found = {}
    for key in ("run_seconds", "cpu_seconds"):
        ours, plain = (
            np.array([line[key] for line in turns if line["method"] == name])
            for name in ("importance", "plain gradients")
        )
        found[key] = float(np.median(ours / plain))
    return found


def verdicts(rows: list[Row]) -> list[str]:
    """What was to be reached."""
    minilm, base = of_part(rows, "MiniLM"), of_part(rows, "base")
    beside, sums = of_part(rows, "eigh"), of_part(rows, "gradients")["file of the sums"]
    peak = base["load to save"]["peak_bytes"]
    above = peak - base["imports"]["peak_bytes"] - base["load"]["weight_bytes"]
    floor = min(beside[name]["run_seconds"] for name in ("eigh, in turn", "eigh, side by side"))
    ratio = ratios(rows)
    return [
        at_most("all-MiniLM-L6-v2 from load to save, seconds,", minilm["load to save"]["run_seconds"], 25),
        at_most("its plan and solve, seconds,", sum(minilm[name]["run_seconds"] for name in ("plan", "solve")), 4),
        at_most("importance over plain gradients, seconds of the clock,", ratio["run_seconds"], 1.4),
        at_most("importance over plain gradients, seconds of CPU,", ratio["cpu_seconds"], 1.4),
        at_most("plan and solve over the faster eigh", beside["plan and solve"]["run_seconds"] / floor, 2),
        at_most("peak memory of BERT-base's shape, GB,", peak / 1e9, 3.5),
        at_most("of it above the imports and the weights, GB,", above / 1e9, 1.5),
        at_most("the file of the sums over whole matrices", sums["file_bytes"] / sums["whole_bytes"], 0.51),
    ]


def report(rows: list[Row]) -> str:
    """All tables with their bars, in Markdown."""
    timed = [line for line in rows if line["problem"] in ("gradients", "eigh")]
    cells = [
        [line["method"], line["status"], *(number(line[key], ".2f") for key in ("run_seconds", "cpu_seconds"))]
        for line in timed
    ]
    names = dict.fromkeys(line["model"] for line in rows if line["model"] != MINILM)
    parts = [f"*base* is {', '.join(names)}.", costs(rows)]
    parts += [markdown(["beside each other", "", "seconds", "of CPU"], cells), "\n".join(verdicts(rows))]
    listed = [line for line in rows if line["problem"] == "operations"]
    for stage in dict.fromkeys(line["stage"] for line in listed):
        cells = [
            [line["kind"], line["method"], f"{line['run_seconds']:.2f}", f"{line['share']:.0%}"]
            for line in listed
            if line["stage"] == stage
        ]
        parts.append(markdown([stage, "operation", "seconds", "share"], cells))
    return "\n\n".join(parts)


def draw(rows: list[Row], path: Path) -> None:
    """Bars of the stages of both models."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for ax, model in zip(axes, ("MiniLM", "base"), strict=True):
        for place, part in enumerate((model, f"{model} again")):
            found, begin = of_part(rows, part), 0.0
            for color, name in enumerate(STAGES):
                seconds = found[name]["run_seconds"]
                ax.barh(place, seconds, left=begin, color=f"C{color}", label=name if place == 0 else None)
                begin += seconds
        ax.set(title=model, xlabel="seconds", yticks=[0, 1], yticklabels=["first", "again"])
        ax.invert_yaxis()
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
