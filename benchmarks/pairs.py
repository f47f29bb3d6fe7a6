"""Do models whose heads may keep fewer dimensions beat those of factors alone, in the same time?

`compress(..., pairs=True)` chooses, for query and key of each layer and for value and output, between factors of each
kernel and heads of fewer dimensions, whichever is predicted to lose less at the same cost. Heads leave dense kernels
that are narrower, and attention's own products with them, in place of a second product for each kernel.

all-MiniLM-L6-v2, importance from 512 pairs of STS-B's train rows without their labels; ranks are multiples of 16,
heads' dimensions of 4, of 32. "of kernels": the budget is a share of the encoder kernels' parameters; "of time": of the
dense model's time for 8 texts of 128 tokens, as `measure_latency` finds it. Scores are Spearman's on the whole of dev
and the mean cosine to the dense embeddings. A speed is that beside the dense model in JAX, the median over rounds in
which all take turns, "of" what the operations allow. Scores in the same time are those of factors between two of their
budgets. Heads: by layer, the dimensions of queries and keys, and of values.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import bert_adapter
from benchmarks.candidates import Context, measured, prepared, separate
from benchmarks.speed import kept_of, operations
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, row
from bert_adapter.engines import batch_for
from bert_adapter.evaluate import embed
from bert_adapter.head_sizes import sizes_of
from bert_adapter.latency import STEP, compiled
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.speed import CELLS
from bert_adapter.timing import in_turns

BUDGETS = {"kernels": (0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15), "time": (0.8, 0.7, 0.6, 0.5, 0.4)}
AT, ROUNDS = (8, 128), 9  # texts and tokens
WAYS = ("factors", "pairs")
Key = tuple[str, str, float]  # a way, and what its budget is a share of, and which

DENSE: Key = ("dense", "kernels", 1.0)


def models_of(context: Context) -> dict[Key, tuple[Model, float | None]]:
    """Each with the loss that is predicted, the dense one first."""
    dense = context.dense
    times = bert_adapter.measure_latency(dense, *AT, pairs=True, progress=False)
    found: dict[Key, tuple[Model, float | None]] = {DENSE: (dense, None)}
    for way in WAYS:
        seen = bert_adapter.with_identities(dense) if way == "pairs" else dense
        importance = measured(seen, context.batches, DEFAULT)
        known = bert_adapter.decompose(seen.params, importance, progress=False)
        for of, budgets in BUDGETS.items():
            for budget in budgets:
                how: dict[str, Any] = {"of": times} if of == "time" else {"multiple_of": STEP}
                how |= {"importance": known, "pairs": way == "pairs", "progress": False}
                try:
                    small, report = bert_adapter.compress(dense, (), budget=budget, **how)
                except ValueError as error:  # less time than the smallest ranks take
                    print(f"  {budget:.0%} of {of}, {way}: {error}", flush=True)
                    continue
                found[way, of, budget] = small, report.predicted
    return found


def scored(context: Context, models: Mapping[Key, tuple[Model, float | None]]) -> list[Row]:
    """The rows of scores."""
    wanted, rows = embed(context.dense, separate(context.dev)), []
    dense = kernels_in(context.dense)
    for (way, of, budget), (model, predicted) in models.items():
        about: Row = {"of": of, "budget": budget, "kept": kernels_in(model) / dense, "heads": sizes_of(model)}
        scores = kept_of(embed(model, separate(context.dev)), wanted, context.dev.labels)
        rows.append(row("score", way, predicted, "") | about | scores)
        print(f"  {budget:.0%} of {of}, {way}: {scores['spearman']:.4f}, {scores['cosine']:.4f}", flush=True)
    return rows


def kernels_in(model: Model) -> int:
    """How many numbers the encoder's kernels and factors have."""
    return int(operations(model, 0))


def timed(options: argparse.Namespace, models: Mapping[Key, tuple[Model, float | None]]) -> list[Row]:
    """The rows of times."""
    rows, dense = [], models[DENSE][0]
    for batch, length in [(1, 16)] if options.quick else CELLS:
        inputs = batch_for(dense, batch, length)
        calls = {key: compiled(model, inputs) for key, (model, _) in models.items()}
        seconds = {key: median(found) for key, found in in_turns(calls, options.rounds).items()}
        for key, (model, _) in models.items():
            (way, of, budget), speed = key, seconds[DENSE] / seconds[key]
            limit = operations(dense, length) / operations(model, length)
            about: Row = {"of": of, "budget": budget, "batch": batch, "length": length, "run_seconds": seconds[key]}
            rows.append(row("speed", way, None, "") | about | {"speed": speed, "limit": limit})
    return rows


def key_of(line: Row) -> Key:
    """Of which model a row is."""
    return line["method"], line["of"], line["budget"]


def report(rows: list[Row]) -> str:
    """The table, and whether pairs win."""
    cells = sorted({(line["batch"], line["length"]) for line in rows if line["problem"] == "speed"})
    times = {(*key_of(line), line["batch"], line["length"]): line for line in rows if "batch" in line}
    lines = []
    for line in rows:
        if line["problem"] != "score":
            continue
        found = [times[(*key_of(line), *cell)] for cell in cells]
        speed = [f"{each['speed']:.2f} of {each['limit']:.2f}" for each in found]
        predicted = "" if line["loss"] is None else f"{line['loss']:.4g}"
        about = [f"{line['budget']:.0%} of {line['of']}", line["method"], f"{line['kept']:.1%}", predicted]
        heads = "; ".join("{}, {}".format(*each) for each in line["heads"])
        lines.append([*about, f"{line['spearman']:.4f}", f"{line['cosine']:.4f}", *speed, heads])
    names = ["budget", "by", "kept", "predicted loss", "Spearman", "cosine"]
    head = [*names, *(f"{batch} x {length}" for batch, length in cells), "heads"]
    return "\n\n".join([markdown(head, lines), "\n".join(verdicts(rows))])


def verdicts(rows: list[Row]) -> list[str]:
    """What pairs keep beside factors of any budget at the time that they take."""
    points, found = {way: curve(rows, way) for way in WAYS}, []
    for (of, budget), (seconds, *scores) in points["pairs"].items():
        for place, (name, score) in enumerate(zip(("Spearman", "cosine"), scores, strict=True), 1):
            theirs = sorted((each[0], each[place]) for (what, _), each in points["factors"].items() if what == of)
            if theirs and theirs[0][0] <= seconds <= theirs[-1][0]:
                gap = score - float(np.interp(seconds, *np.array(theirs).T))
                what = f"{budget:.0%} of {of} with pairs, {name} above that of factors in its time, by"
                found.append(bar(what, gap, gap > 0))
    return found


def curve(rows: list[Row], way: str) -> dict[tuple[str, float], tuple[float, float, float]]:
    """By budget, the seconds for a batch of AT, Spearman and the mean cosine."""
    of_way = [line for line in rows if line["method"] == way]
    scores = {key_of(line)[1:]: line for line in of_way if line["problem"] == "score"}
    times = {key_of(line)[1:]: line for line in of_way if (line.get("batch"), line.get("length")) == AT}
    return {
        key: (times[key]["run_seconds"], line["spearman"], line["cosine"])
        for key, line in scores.items()
        if key in times
    }


def draw(rows: list[Row], path: Path) -> None:
    """Scores against the time for a batch, a line for each way and what its budget is of."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = ("Spearman on STS-B's dev rows", "mean cosine to dense")
    for place, (ax, name) in enumerate(zip(axes, titles, strict=True), 1):
        for way, of in itertools.product(WAYS, BUDGETS):
            found = {key: each for key, each in curve(rows, way).items() if key[0] == of}
            points = sorted((1e3 * each[0], each[place]) for each in found.values())
            style = ("o-" if of == "kernels" else "s--", f"C{WAYS.index(way)}")
            x, y = np.reshape(points, (-1, 2)).T
            ax.plot(x, y, style[0], color=style[1], label=f"{way}, budgets of {of}", markersize=4)
        ax.set(xlabel="milliseconds for {} texts of {} tokens".format(*AT), ylabel=name)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("pairs", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is timed (%(default)s)")
    options = parser.parse_args(argv)
    options.budget = 0.5
    file, context = kept_in(options, "pairs"), prepared(options)
    models = models_of(context)
    keep(file, *scored(context, models), *timed(options, models))
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
