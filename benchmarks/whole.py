"""How small does a whole checkpoint get, table of words, kernels and bits together, before its use suffers?

all-MiniLM-L6-v2 as it comes, importance from 512 pairs of STS-B's train rows, without labels, nothing fine-tuned. Every
model is saved, and what is scored is what was loaded again: the size is that of the weights' file beside that of the
dense one in float32. Spearman's correlation is on the whole of dev, once each, so that differences below 0.003 are
noise; the cosine is the mean over dev's first 500 texts of the embeddings to the dense ones. "Predicted" and "loss" are
half the squared distance of embeddings of 64 of dev's pairs, as the plan of bytes predicts it and as it is measured.
Every score is a line of JSON when it is there: a run that was killed goes on where it stopped.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bert_adapter
from benchmarks.candidates import separate
from benchmarks.study import chosen, rows_of
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, read, row
from benchmarks.timing import Measured
from bert_adapter.demo import minilm
from bert_adapter.evaluate import compare, embed
from bert_adapter.model import Model
from bert_adapter.rows import LabelledTexts
from bert_adapter.signals import DEFAULT

DENSE, FWSVD, KERNELS, TABLE, ALL = "bits alone", "kernels, FWSVD", "kernels", "table of words", "everything"
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.2, 0.16, 0.125, 0.1, 0.08, 0.065, 0.05, 0.04)  # of the bytes
KERNEL_BUDGETS = (0.75, 0.5, 0.25)
RANKS = (288, 192, 128, 96)  # of 384
BITS = ("float32", "bfloat16", "float16", "int8")
Made = tuple[Model, float | None]  # and the loss that is predicted


class Context(NamedTuple):
    """The model, the rows that it is scored on, the batches of its loss, and texts with their dense embeddings."""

    dense: Model
    importance: Any
    dev: LabelledTexts
    held: list[Any]
    texts: list[str]
    rows: np.ndarray  # the dense embeddings of the texts


def prepared(options: argparse.Namespace) -> Context:
    """The model and what is measured of it, which is kept in a file."""
    dense = bert_adapter.load(minilm())
    pairs = chosen(rows_of("STS-B", "train", options.data), 8 if options.quick else 512, 0)
    dev = chosen(rows_of("STS-B", "dev", options.data), 64 if options.quick else None, 0)
    batches = list(bert_adapter.text_batches(dense, separate(pairs)))
    shapes = bert_adapter.select_kernels(dense, embeddings=True)
    statistics = {name for signal in (DEFAULT, "fwsvd") for name in bert_adapter.SIGNALS[signal].statistics}
    how: dict[str, Any] = {"statistics": statistics, "file": options.file, "progress": False}
    importance = bert_adapter.measure_importance(bert_adapter.forward(dense), dense.params, batches, shapes, **how)
    held = bert_adapter.text_batches(dense, separate(chosen(dev, 64, 0)))
    texts = separate(chosen(dev, 250, 0))
    return Context(dense, importance, dev, list(held), texts, embed(dense, texts, progress=False))


def models(context: Context) -> Iterator[tuple[str, str, str | None, Callable[[], Made]]]:
    """By kind and setting: what it is stored as, None for as its config says, and a call that makes it."""
    dense = context.dense
    for dtype in BITS:
        yield DENSE, dtype, dtype, lambda: (dense, None)
    shapes = bert_adapter.select_kernels(dense, embeddings=True)
    known = bert_adapter.decompose(dense.params, context.importance, kernels=shapes, bits=True, progress=False)

    def small(**options: Any) -> Made:
        model, report = bert_adapter.compress(dense, (), progress=False, **options)
        return model, report.predicted

    for budget in BUDGETS:
        yield ALL, f"{budget:.1%}", None, partial(small, importance=known, budget=budget, of="bytes")
    for rank in RANKS:
        yield TABLE, str(rank), None, partial(small, importance=known, rank=rank, include="word_embeddings")
    for budget in KERNEL_BUDGETS:
        yield KERNELS, f"{budget:.0%}", None, partial(small, importance=known, budget=budget)
    fwsvd = {"signal": "fwsvd", "importance": context.importance, "uniform": True}
    for budget in KERNEL_BUDGETS:
        yield FWSVD, f"{budget:.0%}", None, partial(small, **fwsvd, budget=budget)


def bytes_of(directory: Path) -> int:
    """Of the weights."""
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def scored(context: Context, kind: str, setting: str, dtype: str | None, made: Callable[[], Made]) -> Row:
    """The row of a model, saved and loaded."""
    began, whole = time.perf_counter(), bytes_of(minilm())
    model, predicted = made()
    cost = Measured(None, None, time.perf_counter() - began, None)
    with tempfile.TemporaryDirectory() as folder:
        bert_adapter.save(model, folder, dtype=dtype)
        share, model = bytes_of(Path(folder)) / whole, bert_adapter.load(folder)
    model = model._replace(params=bert_adapter.merge(model.params))  # all run by one program
    cosine = compare(context.rows, embed(model, context.texts, progress=False)).cosine
    score = bert_adapter.score(model, context.dev)["spearman"]
    loss = bert_adapter.loss_increase(context.dense, model, context.held)
    more = {"setting": setting, "share": share, "spearman": score, "cosine": cosine, "predicted": predicted}
    return row("STS-B", kind, loss, "", cost, **more)


def draw(rows: list[Row], path: Path) -> None:
    """A line for each kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in (ALL, DENSE, TABLE, KERNELS, FWSVD):
        lines = sorted((line["share"], line["spearman"]) for line in rows if line["method"] == kind)
        ax.plot(*np.reshape(lines, (-1, 2)).T, marker="o", linewidth=2.5 if kind == ALL else 1.2, label=kind)
    ax.set(xlabel="share of the bytes", ylabel="Spearman on STS-B's dev rows", xscale="log")
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def report(rows: list[Row]) -> str:
    """The table, the bars, and how well losses were predicted."""

    def text(line: Row) -> list[str]:
        predicted = "" if line["predicted"] is None or line["method"] == FWSVD else f"{line['predicted']:.4g}"
        numbers = [f"{line['share']:.1%}", f"{line['spearman']:.4f}", f"{line['cosine']:.4f}"]
        return [line["method"], line["setting"], *numbers, predicted, f"{line['loss']:.4g}"]

    heading = ["what is smaller", "budget, rank or bits", "bytes", "Spearman", "cosine", "predicted", "loss"]
    dense = next((line["spearman"] for line in rows if (line["method"], line["setting"]) == (DENSE, "float32")), 1.0)
    found = {line["setting"]: line for line in rows if line["method"] == ALL}
    bars = [(name, share, found[name]["spearman"] / dense) for name, share in WANTED.items() if name in found]
    verdicts = [
        bar(f"{name} of the bytes keep {share:.1%} of Spearman", got, got >= share) for name, share, got in bars
    ]
    return "\n".join([markdown(heading, map(text, rows)), "", *verdicts, correlated(rows)])


WANTED = {"25.0%": 1 - 0.002 / 0.867, "12.5%": 0.99, "8.0%": 0.96}


def correlated(rows: list[Row]) -> str:
    """How well the logarithms of the losses that plans of everything predict go with those that are measured."""
    pairs = [(line["predicted"], line["loss"]) for line in rows if line["method"] == ALL and line["loss"] > 0]
    value = float(np.corrcoef(np.log(np.array(pairs).T))[0, 1]) if len(pairs) > 2 else None
    return bar(
        f"logarithms of predicted and measured loss, {len(pairs)} plans, correlate at least 0.97",
        value,
        (value or 0) >= 0.97,
    )


def main(argv: list[str] | None = None) -> None:
    parser = arguments("whole", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--file", type=Path, metavar="FILE", help="keep what is measured, and go on from it")
    options = parser.parse_args(argv)
    file, context = kept_in(options, "whole"), prepared(options)
    done = {(line["method"], line["setting"]) for line in read(file)}
    for kind, setting, dtype, made in models(context):
        if (kind, setting) in done:
            continue
        line = scored(context, kind, setting, dtype, made)
        keep(file, line)
        print(f"  {kind}, {setting}: {line['share']:.1%}, {line['spearman']:.4f}, {line['cosine']:.4f}", flush=True)
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
