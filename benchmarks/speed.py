"""Is a compressed model faster, in which engine, and at what price? Does it take the time that its plan says?

all-MiniLM-L6-v2, or the embedder in the directory after `--model`, at 50 and 25 % of its encoder kernels' parameters,
planned by the default signal on 512 pairs of STS-B's train rows, with ranks that are multiples of 16, which is what
processors take at once; "heads": with `pairs=True`, so that heads may keep fewer dimensions, and `correct=`, 256 other
pairs. Beside them models of half of its layers, the first ones or as many from the first to the last, as they are.
Every engine that is installed takes its turn in every round: JAX, onnxruntime (float32 and int8) and PyTorch, on as
many threads. A speed is that beside the dense model in the same engine, the median over rounds. "Of" is followed by
what the operations allow: those of the dense model over those of the smaller one, attention's own products with them.
Scores are Spearman's on dev and the mean cosine to the dense embeddings in float32, of the models timed, of integers as
onnxruntime computes them.

Then ten plans of all-MiniLM-L6-v2 for a budget of time, at 8 texts of 128 tokens: the share of the dense model's time
that each was predicted to take, from times of the model with factors for one shape of kernels, and the share that it
takes; all of them, and the dense model, take their turns in every round.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

import bert_adapter
from benchmarks.base import FIRST, SPREAD, with_layers
from benchmarks.candidates import (
    OWN,
    Context,
    compressed,
    measured,
    name_of,
    others_of,
    prepared,
    separate,
    without_identities,
)
from benchmarks.tables import Row, arguments, at_most, bar, conclude, keep, kept_in, markdown, read, row
from bert_adapter.engines import ENGINES, batch_for, missing, threads_here
from bert_adapter.evaluate import compare, embed, spearman
from bert_adapter.head_sizes import sizes_of
from bert_adapter.latency import STEP
from bert_adapter.model import Model
from bert_adapter.outputs.sentences import unit_rows
from bert_adapter.signals import DEFAULT
from bert_adapter.speed import CELLS
from bert_adapter.timing import in_turns

BUDGETS = (0.5, 0.25)
WANTED = {0.5: (1.5, 1.3), 0.25: (2.4, 2.0)}  # speeds at 8 x 128, and at every other size
AGAINST = 1.1  # the most that the dense model may take in JAX, in times of the best other engine
PLANS, TURNS, NEAR = 10, 9, 0.1
ENGINES_32 = ("jax", "onnxruntime")  # that have bars of their own
ROUNDS = 5
DENSE, INT8, HEADS = "dense", "onnxruntime-int8", ", heads"


def operations(model: Model, length: int) -> float:
    """Multiplications for a token: those with kernels or factors, and attention's own products."""
    leaves = jax.tree_util.tree_leaves_with_path(bert_adapter.without_head(model).params["encoder"])
    heads = model.module.config.num_attention_heads
    return sum(leaf.size for _, leaf in leaves if leaf.ndim == 2) + length * heads * sum(map(sum, sizes_of(model)))


def models_of(context: Context, known: Any, others: list[Any]) -> dict[str, Model]:
    """The dense model and those that are smaller, by name.

    known: what was decomposed of the model with identities. others: texts that were not measured on.
    """
    dense, plain = context.dense, without_identities(known, context.dense)
    small = {f"{share:.0%}": compressed(context, plain, budget=share, multiple_of=STEP) for share in BUDGETS}
    how: dict[str, Any] = {"multiple_of": STEP, "pairs": True, "correct": others}
    small |= {f"{share:.0%}{HEADS}": compressed(context, known, budget=share, **how) for share in BUDGETS}
    halves = {name: with_layers(dense, 0.5, spread) for name, spread in ((FIRST, False), (SPREAD, True))}
    return {DENSE: dense} | small | {name: half for name, half in halves.items() if half is not None}


def timed(options: argparse.Namespace, name: str, models: dict[str, Model]) -> list[Row]:
    """The rows of all models, engines and cells."""
    cells = [(1, 16)] if options.quick else CELLS
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in models.items():
            bert_adapter.save(model, Path(folder) / kind)
        names = {str(Path(folder) / kind): kind for kind in models}
        found = bert_adapter.bench(list(names), cells=cells, rounds=2 if options.quick else options.rounds)
    rows = []
    for each in found.timings:
        kind, dense = names[each.model], models[DENSE]
        limit = operations(dense, each.length) / operations(models[kind], each.length)
        more = {"engine": each.engine, "batch": each.batch, "length": each.length, "speed": each.speed, "limit": limit}
        peak = found.peaks[each.model, each.engine]
        more |= {"run_seconds": each.seconds, "peak_bytes": peak, "threads": found.threads}
        rows.append(row("speed", kind, None, "", model=name, **more))
    return rows


def scored(name: str, models: dict[str, Model], dev: Any) -> list[Row]:
    """Spearman and the mean cosine of each, in float32, and in integers where onnxruntime is installed."""
    texts, rows, wanted = separate(dev), [], None
    for kind, model in models.items():
        found = {"float32": embed(model, texts)}
        wanted = found["float32"] if wanted is None else wanted
        if not missing(INT8):
            found["int8"] = in_integers(model, texts)
        for dtype, rows_of in found.items():
            kept = kept_of(rows_of, wanted, dev.labels)
            rows.append(row("score", kind, None, "") | {"model": name, "dtype": dtype} | kept)
            print(f"  {kind}, {dtype}: {kept['spearman']:.4f}", flush=True)
    return rows


def kept_of(rows: np.ndarray, wanted: np.ndarray, labels: Any) -> dict[str, float]:
    """Spearman's correlation of pairs, one text after the other, and the mean cosine to what is wanted."""
    units = unit_rows(rows)
    score = spearman(np.sum(units[::2] * units[1::2], axis=1), labels)
    return {"spearman": score, "cosine": compare(wanted[:2000], rows[:2000]).cosine}


def in_integers(model: Model, texts: list[str]) -> np.ndarray:
    """The embeddings as onnxruntime computes them in 8 bits."""
    encode = bert_adapter.tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        step = ENGINES[INT8].start(model, Path(folder), threads_here())
    taken = batch_for(model, 1, 1).keys()
    batches = (encode(texts[i : i + 32]) for i in range(0, len(texts), 32))
    return np.concatenate([step({name: batch[name] for name in taken})[-1] for batch in batches])


def planned(options: argparse.Namespace, dense: Model, known: Any) -> list[Row]:
    """The rows of plans: what each was predicted to take, and takes."""
    batch, length = (1, 16) if options.quick else (8, 128)
    latency = bert_adapter.measure_latency(dense, batch, length)
    small, predicted = {}, {}
    for number in range(2 if options.quick else PLANS):
        budget = 0.95 - 0.065 * number
        try:
            predicted[budget] = bert_adapter.plan(dense.params, known, budget, of=latency).share
        except ValueError as error:
            print(f"  {budget:.0%}: {error}", flush=True)
            continue
        how: dict[str, Any] = {"importance": known, "budget": budget, "of": latency, "progress": False}
        small[budget], _ = bert_adapter.compress(dense, (), **how)
    rows = []
    for budget, found in shares_of_time(dense, small, batch_for(dense, batch, length)).items():
        share = predicted[budget]
        rows.append(row("plan", f"{budget:.0%}", None, "", model=OWN, budget=budget, predicted=share, measured=found))
        print(f"  predicted {share:.3f} of the dense model's time, measured {found:.3f}", flush=True)
    return rows


def shares_of_time(dense: Model, small: dict[float, Model], inputs: Any) -> dict[float, float]:
    """What each of the models takes of the dense one's time, the median over rounds in which all take their turns."""
    run, whole = jax.jit(bert_adapter.forward(dense)), jax.device_put(dense.params)
    calls = {0.0: whole} | {budget: jax.device_put(model.params) for budget, model in small.items()}
    seconds = in_turns({name: lambda params=params: run(params, inputs) for name, params in calls.items()}, TURNS)
    return {
        budget: median(one / other for one, other in zip(seconds[budget], seconds[0.0], strict=True))
        for budget in small
    }


def report(rows: list[Row]) -> str:
    """The tables of each model, its bars, and those of plans."""
    parts = []
    for name in dict.fromkeys(line["model"] for line in rows):
        of = [line for line in rows if line["model"] == name]
        plans = [line for line in of if line["problem"] == "plan"]
        parts += [f"**{name}**", table(of)]
        if plans:
            shares = [[line["method"], f"{line['predicted']:.3f}", f"{line['measured']:.3f}"] for line in plans]
            parts.append(markdown(["budget of time", "predicted", "measured"], shares))
        parts.append("\n".join(verdicts(by_engine(of), plans)))
    return "\n\n".join(parts)


def table(rows: list[Row]) -> str:
    """A line for each way and engine."""
    cells = sorted({(line["batch"], line["length"]) for line in rows if line["problem"] == "speed"})
    head = ["model", "engine", "Spearman", "cosine", *(f"{batch} x {length}" for batch, length in cells), "peak MB"]
    lines = []
    for (kind, engine), found in by_engine(rows).items():
        score = score_of(rows, kind, engine)
        texts = [
            f"{1e3 * found[cell]['run_seconds']:.1f} ms, {found[cell]['speed']:.2f} of {found[cell]['limit']:.2f}"
            for cell in cells
        ]
        peak = f"{found[cells[0]]['peak_bytes'] / 1e6:.0f}"
        lines.append([kind, engine, f"{score['spearman']:.4f}", f"{score['cosine']:.3f}", *texts, peak])
    return markdown(head, lines)


def by_engine(rows: list[Row]) -> dict[tuple[str, str], dict[tuple[int, int], Row]]:
    """The times by way and engine, and by cell."""
    found: dict[tuple[str, str], dict[tuple[int, int], Row]] = {}
    for line in rows:
        if line["problem"] == "speed":
            found.setdefault((line["method"], line["engine"]), {})[line["batch"], line["length"]] = line
    return found


def score_of(rows: list[Row], kind: str, engine: str) -> Row:
    """What the model scores in the numbers that the engine computes with."""
    dtype = "int8" if engine == INT8 else "float32"
    return next(line for line in rows if (line["problem"], line["method"], line.get("dtype")) == ("score", kind, dtype))


def verdicts(by_key: dict[tuple[str, str], dict[tuple[int, int], Row]], plans: list[Row]) -> list[str]:
    """The lines of the bars."""
    found = []
    for (budget, (large, every)), end, engine in itertools.product(WANTED.items(), ("", HEADS), ENGINES_32):
        kind = f"{budget:.0%}{end}"
        speeds = {cell: line["speed"] for cell, line in by_key.get((kind, engine), {}).items()}
        if (8, 128) in speeds:
            text = f"{kind}, in {engine}, at least {large} times as fast at 8 x 128"
            found.append(bar(text, speeds[8, 128], speeds[8, 128] >= large))
        if speeds:
            least = min(speeds.values())
            found.append(bar(f"{kind}, in {engine}, at least {every} everywhere", least, least >= every))
    for kind in ("25%", f"25%{HEADS}"):
        small, theirs = (by_key.get(key, {}).get((1, 32)) for key in ((kind, INT8), (DENSE, "pytorch")))
        if small and theirs:
            speed = theirs["run_seconds"] / small["run_seconds"]
            found.append(
                bar(f"{kind}, in int8 at 1 x 32, at least 5 times as fast as dense PyTorch", speed, speed >= 5)
            )
    others = [by_key[key] for key in ((DENSE, "onnxruntime"), (DENSE, "pytorch")) if key in by_key]
    if others:
        ours = by_key[DENSE, "jax"]
        worst = max(
            line["run_seconds"] / min(other[cell]["run_seconds"] for other in others) for cell, line in ours.items()
        )
        found.append(at_most("the dense model in JAX, in times of the fastest other engine,", worst, AGAINST))
    if plans:
        apart = max(abs(line["predicted"] / line["measured"] - 1) for line in plans)
        found.append(at_most(f"{len(plans)} plans of time: predicted apart from measured, by", apart, NEAR))
    return found


def draw(rows: list[Row], path: Path) -> None:
    """For each model, Spearman against the time of a text in onnxruntime, 8 of 128 tokens at once."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(line["model"] for line in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False, layout="constrained")
    ways = {
        "low rank": [DENSE, *(f"{share:.0%}" for share in BUDGETS)],
        "low rank, heads": [DENSE, *(f"{share:.0%}{HEADS}" for share in BUDGETS)],
        FIRST: [DENSE, FIRST],
        SPREAD: [DENSE, SPREAD],
    }
    for ax, name in zip(axes[0], names, strict=True):
        of = [line for line in rows if line["model"] == name]
        found = by_engine(of)
        for color, (way, kinds) in enumerate(ways.items()):
            for engine, style in (("onnxruntime", "-o"), (INT8, "--s")):
                points = [
                    (1e3 * found[kind, engine][8, 128]["run_seconds"] / 8, score_of(of, kind, engine)["spearman"])
                    for kind in kinds
                    if (8, 128) in found.get((kind, engine), {})
                ]
                label = way if engine != INT8 else f"{way}, int8"
                ax.plot(*np.reshape(points, (-1, 2)).T, style, color=f"C{color}", markersize=4, label=label)
        ax.set(title=name, xlabel="milliseconds for a text of 128 tokens", ylabel="Spearman on STS-B's dev rows")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("speed", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"the directory of an embedder ({OWN})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is timed (%(default)s)")
    options = parser.parse_args(argv)
    options.budget = max(BUDGETS)
    file, name = kept_in(options, "speed"), name_of(options.model)
    if any(line["model"] == name for line in read(file)):
        raise SystemExit(f"{file} has {name} already: delete its lines to time it again")
    context = prepared(options, options.model)
    dense, probe = context.dense, bert_adapter.with_identities(context.dense)
    known = bert_adapter.decompose(probe.params, measured(probe, context.batches, DEFAULT), progress=False)
    models = models_of(context, known, others_of(context, options))
    rows = [*scored(name, models, context.dev), *timed(options, name, models)]
    if options.model is None:
        rows += planned(options, dense, without_identities(known, dense))
    keep(file, *rows)
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
