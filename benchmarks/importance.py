"""What does it cost to measure what matters, beside a plain training gradient, and to compress a real model?

The upper table: one batch through a BERT of BERT-base's shape with seeded random parameters, for each signal, by turns
in one process. Bars: at most 1.5 plain gradients of all parameters over the same batch. In units of a forward pass
through the kernels, a plain gradient is 3: forward, backward to the activations, backward to the kernels. Importance
needs the first two, and in place of the third the sums: both Gram matrices of 768 x 3072 are (768² + 3072²) /
(768 x 3072) = 4.25 times as large as the kernel, half of which symmetry saves; of all kernels of a layer that is 1.75
units, so 1.25 gradients are the floor. The eigenbasis makes two passes and rotates every input and output gradient:
2 x 2/3 gradients are gone before any sum. Ranks for all budgets, once that is measured: at most 5 seconds. The lower
table: all-MiniLM-L6-v2 with 512 examples from the first call to the checkpoint on the disk, all kernels, half kept,
compiling included; at most 180 seconds.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bert_adapter
from benchmarks.tables import Row, arguments, at_most, markdown, number, row, write
from benchmarks.timing import Measured, compiled, median_of, timed
from bert_adapter.families import module_for
from bert_adapter.importance.batch import Position, Wanted
from bert_adapter.importance.measure import batch_functions
from bert_adapter.importance.sums import symmetrised
from bert_adapter.losses import task_loss
from bert_adapter.signals import SIGNALS

BASE = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_labels": 2}
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
PASSES = ("shampoo", "fisher", "fwsvd", "activation", "kfac")
LIMIT = 1.5


def sample(config: dict[str, Any], batch: int, length: int) -> tuple[bert_adapter.Model, dict[str, Any]]:
    """A seeded random model and a batch for it."""
    module, rng = module_for(config), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32), shapes)
    ids = rng.integers(0, module.config.vocab_size, (batch, length))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": rng.integers(0, 2, batch)}
    model = bert_adapter.Model(module, params, config, {})
    return model, {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def passes(model: bert_adapter.Model, batch: dict[str, Any]) -> dict[str, tuple[Any, int | None]]:
    """By name, a call without arguments that adds what one pass over the batch gives, and its peak memory in bytes."""
    forward = bert_adapter.forward(model)
    paths = frozenset(bert_adapter.select_kernels(model))
    key, loss = jax.random.key(0), task_loss(model.module)

    def gradient(params: Any, batch: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jax.grad(lambda params: jnp.sum(loss(forward(params, batch), batch)))(params)

    def added(statistics: tuple[str, ...]) -> tuple[Any, int | None]:
        sums, update = batch_functions(Wanted(forward, loss, paths, statistics))
        inputs = (model.params, batch, Position(key, 0))
        total = [jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(sums, *inputs))]
        program, _, peak = compiled(update, *total, *inputs)

        def call() -> Any:
            total[0], _ = program(*total, *inputs)
            return total[0]

        return call, peak

    plain, _, peak = compiled(gradient, model.params, batch)
    calls: dict[str, Any] = {"gradient of all parameters": (lambda: plain(model.params, batch), peak)}
    calls |= {name: added(SIGNALS[name].statistics) for name in PASSES}
    return calls


def importance_of(sums: Any, examples: int, tokens: int) -> bert_adapter.Importance:
    """The sums over a batch, as what was measured."""
    return bert_adapter.Importance(sums, examples=examples, tokens=tokens, batches=1, gradients="labels", seed=0)


def end_to_end(examples: int) -> dict[str, float]:
    """The seconds of each stage of a compression, from the model's files to the new ones."""
    from bert_adapter.demo import minilm, sentences

    began = time.perf_counter()
    model = bert_adapter.load(minilm())
    texts = np.resize(sentences("calibration") + sentences("heldout"), examples).tolist()  # the first ones again
    batches = bert_adapter.text_batches(model, texts)
    seconds = {"load": time.perf_counter() - began}
    small, report = bert_adapter.compress(model, batches, budget=0.5)
    seconds |= {name: report.seconds[name] for name in ("importance", "plan", "solve")}
    with tempfile.TemporaryDirectory() as folder:
        _, seconds["save"] = timed(lambda: bert_adapter.save(small, Path(folder) / "small"))
    return seconds


def draw(rows: list[Row], path: Path) -> None:
    """Bars of both tables."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for ax, name, label in zip(
        axes, ("pass", "compress"), ("one pass, in plain gradients", "seconds of a compression"), strict=True
    ):
        lines = [line for line in rows if line["problem"] == name]
        values = [line.get("in_gradients") or line["run_seconds"] for line in lines]
        bars = ax.barh([line["method"] for line in lines], values)
        ax.bar_label(bars, fmt="%.2f" if name == "pass" else "%.0f", padding=3)
        ax.set(xlabel=label, xlim=(0, 1.15 * max(values)))
        ax.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    options = arguments("importance", __doc__).parse_args(argv)
    config, batch, length, turns = (BASE | SMALL, 4, 16, 2) if options.quick else (BASE, 16, 32, 5)
    model, arrays = sample(config, batch, length)
    calls = passes(model, arrays)
    sums = calls["shampoo"][0]()
    measured = symmetrised(importance_of(sums, examples=batch, tokens=batch * length))
    planning = median_of(lambda: bert_adapter.plan(model.params, measured, 0.5), runs=1 if options.quick else 3)
    del sums, measured
    times = [{name: timed(call)[1] for name, (call, _) in calls.items()} for _ in range(turns)]
    median = {name: float(np.median([turn[name] for turn in times])) for name in calls}
    plain = median["gradient of all parameters"]
    rows = []
    for name, seconds in median.items():
        peak = calls[name][1] if name in calls else None
        cost = Measured(None, None, seconds, peak)
        rows.append(row("pass", name, None, "", cost, in_gradients=seconds / plain))
    rows.append(row("plan", "shampoo", None, "", Measured(None, None, planning, None)))
    seconds = end_to_end(32 if options.quick else 512)
    rows += [row("compress", name, None, "", Measured(None, None, value, None)) for name, value in seconds.items()]
    text = report(rows)
    print(f"{batch} rows of {length} tokens\n\n{text}")
    write(options, "importance", rows, draw, doc=__doc__, text=text)


def report(rows: list[Row]) -> str:
    """Both tables with their bars, in Markdown."""
    passes, stages = ([line for line in rows if line["problem"] == name] for name in ("pass", "compress"))
    planning = next(line["run_seconds"] for line in rows if line["problem"] == "plan")
    cells = [
        [line["method"], f"{line['in_gradients']:.2f}", number((line["peak_bytes"] or 0) / 2**20 or None, ".0f")]
        for line in passes
    ]
    verdicts = [
        at_most(f"{line['method'].removesuffix(', both passes')} over a plain gradient", line["in_gradients"], LIMIT)
        for line in passes[1:]
        if "second pass" not in line["method"]
    ]
    verdicts.append(at_most("ranks for all budgets, once that is measured, seconds,", planning, 5))
    spent = [[line["method"], f"{line['run_seconds']:.1f}"] for line in stages]
    whole = sum(line["run_seconds"] for line in stages)
    parts = [
        markdown(["one pass over a batch", "in plain gradients", "peak MiB"], cells),
        "\n".join(verdicts),
        markdown(["stage", "seconds"], spent),
        at_most("a compression of all-MiniLM-L6-v2, seconds,", whole, 180),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
