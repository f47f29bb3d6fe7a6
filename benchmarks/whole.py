"""How small does a whole checkpoint get, table of words, kernels and bits together, before its use suffers?

all-MiniLM-L6-v2, nothing fine-tuned afterwards, importance from 1,024 texts of train rows, without labels: as it comes,
an embedder of sentences, scored by Spearman's correlation on STS-B's dev rows; and with a head, fine-tuned on each of
three tasks as [study](study.md) does it. Every model is saved, and what is scored, on the whole of dev, is what was
loaded again. "bytes" are those of the weights' files beside the dense ones in float32; "operations" those of the
encoder's kernels for a token, beside dense ones; "half of the operations" is what that is limited to besides
(`flops=`). Differences of Spearman below 0.003 are noise. The cosine is the mean
over 500 of dev's texts of the embeddings to the dense ones. "Predicted" and "loss" are the rise of the mean loss on 128
of dev's texts, as the plan of bytes predicts it and as it is measured. ± is the standard error over seeds, which draw
the train rows and the directions of the importance. Every score is a line of JSON when it is there: a run that was
killed goes on where it stopped. What has not been run has no row.

DIR holds GLUE as `STS-B/train.tsv` and so on.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bert_adapter
from benchmarks import study
from benchmarks.candidates import separate
from benchmarks.study import TASKS, chosen, rows_of
from benchmarks.tables import (
    Row,
    arguments,
    at_most,
    bar,
    conclude,
    keep,
    kept_in,
    markdown,
    number,
    read,
    row,
    with_error,
)
from benchmarks.timing import Measured
from bert_adapter.compressing import Report
from bert_adapter.decompositions import Decompositions
from bert_adapter.demo import minilm
from bert_adapter.evaluate import compare, embed
from bert_adapter.families import predictive
from bert_adapter.importance.sums import Importance
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.rows import LabelledTexts
from bert_adapter.signals import DEFAULT

DENSE, FWSVD, KERNELS, ALL = "bits alone", "kernels, FWSVD", "kernels", "everything"
FASTER = "everything, half of the operations"
TABLE, BY_GRADIENTS = "table of words", "table of words, by squared gradients"
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.2, 0.16, 0.125, 0.1, 0.08, 0.065, 0.05, 0.04, 0.03)  # of the bytes
WANTED = (0.25, 0.125, 0.08)  # of them, those with bars
EIGHTH = "12.5%"
KERNEL_BUDGETS = (0.75, 0.5, 0.25)
RANKS = (288, 192, 128, 96)  # of 384
BITS = ("float32", "bfloat16", "float16", "int8", "int4")
EMBEDDER = "STS-B, as it comes"
SENTENCES, SEEN, UNSEEN = "SST-2's sentences", "all tokens seen", "some unseen"
METRICS = {EMBEDDER: "spearman"} | {task: about.metric for task, about in TASKS.items()}
LEAST = {EMBEDDER: 0.99, "STS-B": 0.99, "SST-2": 0.99, "CoLA": 0.95}  # of dense, at 12.5 % of the bytes


class Use(NamedTuple):
    """A dense model, where its files are, and the rows of what it is used for."""

    name: str
    dense: Model
    files: Path
    train: LabelledTexts
    dev: LabelledTexts

    def batches(self, rows: LabelledTexts) -> list[Batch]:
        """Of an embedder, each text on its own."""
        if self.name == EMBEDDER:
            return list(bert_adapter.text_batches(self.dense, separate(rows)))
        return list(bert_adapter.labelled_batches(self.dense, rows))


Made = tuple[Model, Report | None]
Models = Iterator[tuple[str, str, str | None, Callable[[], Made]]]


def use_of(name: str, options: argparse.Namespace) -> Use:
    """The model as it comes, or fine-tuned on a task, which is trained or read from where an earlier run left it."""
    if name != EMBEDDER:
        bench = study.prepared(name, options)
        return Use(name, bench.dense, bench.folder / "dense", bench.train, bench.dev)
    dev = chosen(rows_of("STS-B", "dev", options.data), 64 if options.quick else None, 0)
    files = getattr(options, "model", None) or minilm()
    return Use(name, bert_adapter.load(files), files, rows_of("STS-B", "train", options.data), dev)


def calibration(use: Use, seed: int, quick: bool) -> list[Batch]:
    """1,024 texts, of an embedder those of half as many pairs."""
    count = 1024 if use.name != EMBEDDER else 512
    return use.batches(chosen(use.train, 8 if quick else count, seed))


def models(use: Use, seed: int, importance: Callable[[], Importance], known: Callable[[], Decompositions]) -> Models:
    """By kind and setting: what it is stored as, None for as its config says, and a call that makes it.

    Of all kinds for the embedder and the first seed. What is measured is asked for when a model needs it.
    """
    dense, whole = use.dense, use.name == EMBEDDER

    def small(measured: Callable[[], Any], **options: Any) -> Made:
        return bert_adapter.compress(dense, (), importance=measured(), progress=False, **options)

    if seed == 0:
        for dtype in BITS if whole else ("float32", "int8", "int4"):
            yield DENSE, dtype, dtype, lambda: (dense, None)
    for budget in BUDGETS if whole else WANTED:
        yield ALL, f"{budget:.1%}", None, partial(small, known, budget=budget, of="bytes")
    yield FASTER, EIGHTH, None, partial(small, known, budget=0.125, of="bytes", flops=0.5)
    if seed > 0 or not whole:
        return
    for rank in RANKS:
        table: dict[str, Any] = {"rank": rank, "include": "word_embeddings"}
        yield TABLE, str(rank), None, partial(small, known, **table)
        yield BY_GRADIENTS, str(rank), None, partial(small, importance, **table, signal="shampoo")
    for budget in KERNEL_BUDGETS:
        yield KERNELS, f"{budget:.0%}", None, partial(small, known, budget=budget)
    for budget in KERNEL_BUDGETS:
        yield FWSVD, f"{budget:.0%}", None, partial(small, importance, signal="fwsvd", uniform=True, budget=budget)


def measuring(use: Use, seed: int, quick: bool) -> tuple[Callable[[], Importance], Callable[[], Decompositions]]:
    """Calls for what is measured of a model, and for its matrices decomposed for every budget; each works once."""
    dense = use.dense
    shapes = bert_adapter.select_kernels(dense, embeddings=True)
    statistics = {name for signal in (DEFAULT, "fwsvd") for name in bert_adapter.SIGNALS[signal].statistics}

    @cache
    def importance() -> Importance:
        how: dict[str, Any] = {"gradients": predictive(dense.module), "statistics": statistics, "seed": seed}
        run, batches = bert_adapter.forward(dense), calibration(use, seed, quick)
        return bert_adapter.measure_importance(run, dense.params, batches, shapes, **how, progress=False)

    @cache
    def known() -> Decompositions:
        return bert_adapter.decompose(dense.params, importance(), kernels=shapes, bits=True, progress=False)

    return importance, known


def bytes_of(directory: Path) -> int:
    """Of the weights."""
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def operations(report: Report | None) -> float:
    """Those of the encoder's kernels, beside dense ones: a lookup has none."""
    kernels = [] if report is None else [each for each in report.kernels if "embeddings" not in each.path]
    before = sum(kernel.parameters_before for kernel in kernels)
    return sum(kernel.parameters_after for kernel in kernels) / before if before else 1.0


def scored(use: Use, seed: int, kind: str, setting: str, *, dtype: str | None, made: Callable[[], Made]) -> Row:
    """The row of a model, saved and loaded."""
    began = time.perf_counter()
    model, report = made()
    cost = Measured(None, None, time.perf_counter() - began, None)
    with tempfile.TemporaryDirectory() as folder:
        bert_adapter.save(model, folder, dtype=dtype)
        share, model = bytes_of(Path(folder)) / bytes_of(use.files), bert_adapter.load(folder)
    model = model._replace(params=bert_adapter.merge(model.params))  # all run by one program
    more: dict[str, Any] = {"setting": setting, "seed": seed, "share": share, "operations": operations(report)}
    more["predicted"] = None if report is None or kind == FWSVD else report.predicted
    more["score"] = bert_adapter.score(model, use.dev, progress=False)[METRICS[use.name]]
    if use.name == EMBEDDER:
        texts = separate(chosen(use.dev, 250, 0))
        more["cosine"] = compare(*(embed(one, texts, progress=False) for one in (use.dense, model))).cosine
    held = use.batches(chosen(use.dev, 64 if use.name == EMBEDDER else 128, 0))
    loss = bert_adapter.loss_increase(use.dense, model, held, progress=False)
    return row(use.name, kind, loss, "", cost, **more)


def unseen(use: Use, options: argparse.Namespace, known: Callable[[], Decompositions], budget: float) -> list[Row]:
    """The loss on SST-2's sentences, of those with tokens that the calibration did not have, and of the others."""
    seen = np.unique(np.concatenate([batch["input_ids"].ravel() for batch in calibration(use, 0, options.quick)]))
    sentences = chosen(rows_of("SST-2", "train", options.data), 64 if options.quick else 2000, 0).texts
    batches = list(bert_adapter.text_batches(use.dense, sentences))
    small, _ = bert_adapter.compress(use.dense, (), importance=known(), budget=budget, of="bytes", progress=False)
    small = small._replace(params=bert_adapter.merge(small.params))
    strange = [(~np.isin(batch["input_ids"], seen) & (batch["attention_mask"] > 0)).any(axis=1) for batch in batches]
    rows = []
    for name, flip in ((SEEN, True), (UNSEEN, False)):
        weights = [(one ^ flip).astype(np.float32) for one in strange]
        weighted = [{**batch, "weights": weight} for batch, weight in zip(batches, weights, strict=True)]
        loss = bert_adapter.loss_increase(use.dense, small, weighted, progress=False)
        texts = int(sum(weight.sum() for weight in weights))
        rows.append(row(SENTENCES, name, loss, "", setting=f"{budget:.1%}", seed=0, texts=texts))
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """A line for each kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in (ALL, FASTER, DENSE, TABLE, KERNELS, FWSVD):
        groups = grouped([line for line in rows if (line["problem"], line["method"]) == (EMBEDDER, kind)]).values()
        lines = sorted((mean(group, "share"), mean(group, "score")) for group in groups)
        ax.plot(*np.reshape(lines, (-1, 2)).T, marker="o", linewidth=2.5 if kind == ALL else 1.2, label=kind)
    ax.set(xlabel="share of the bytes", ylabel="Spearman on STS-B's dev rows", xscale="log")
    ax.set_xticks(shares := [0.04, 0.08, 0.125, 0.25, 0.5, 1], [f"{share:.3g}".lstrip("0") or "1" for share in shares])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def grouped(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """By use, kind and setting, the rows of all seeds."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for line in rows:
        found.setdefault((line["problem"], line["method"], line["setting"]), []).append(line)
    return found


def values(group: list[Row], what: str) -> list[float]:
    """One for each seed, of what is known."""
    return [line[what] for line in group if line.get(what) is not None]


def mean(group: list[Row], what: str) -> float:
    """Over seeds; NaN where nothing is known."""
    found = values(group, what)
    return float(np.mean(found)) if found else math.nan


def report(rows: list[Row]) -> str:
    """The table of the embedder, those of the tasks, that of unseen tokens, and the bars."""
    groups = grouped(rows)
    parts = [table(groups, use) for use in METRICS if any(key[0] == use for key in groups)]
    strange = {budget: both for budget in BUDGETS if (both := losses(groups, budget))}
    cells = [
        [f"{budget:.1%}", *(f"{one['loss']:.4g} ({one['texts']})" for one in both)] for budget, both in strange.items()
    ]
    parts += [markdown(["loss on SST-2's sentences (their number), bytes", SEEN, UNSEEN], cells)] * bool(cells)
    bars = [
        *verdicts(groups, strange),
        *(correlated(rows, use) for use in METRICS if any(key[:2] == (use, ALL) for key in groups)),
    ]
    return "\n\n".join([*parts, "\n".join(bars)])


def table(groups: dict[Any, list[Row]], use: str) -> str:
    """What has been run of a use, kind by kind."""
    embedder = use == EMBEDDER
    scores = {"score": METRICS[use]} | ({"cosine": "cosine"} if embedder else {})
    heading = ["what is smaller", "budget, rank or bits", "bytes", "operations", *scores.values(), "predicted", "loss"]
    cells = []
    for kind in (DENSE, ALL, FASTER, TABLE, BY_GRADIENTS, KERNELS, FWSVD):
        for key, group in groups.items():
            if key[:2] == (use, kind):
                shares = [f"{mean(group, what):.1%}" for what in ("share", "operations")]
                losses = [number(mean(group, what), ".4g").replace("nan", "") for what in ("predicted", "loss")]
                cells.append(
                    [*key[1:], *shares, *(with_error(values(group, what)) for what in scores), *losses, len(group)]
                )
    title = "" if embedder else f"**{use}**, fine-tuned before\n\n"
    return title + markdown([*heading, "seeds"], cells)


def losses(groups: dict[Any, list[Row]], budget: float) -> list[Row]:
    """The row of sentences whose tokens were all seen, and that of the others, if both are there."""
    found = [groups.get((SENTENCES, name, f"{budget:.1%}")) for name in (SEEN, UNSEEN)]
    return [group[0] for group in found if group] if all(found) else []


def verdicts(groups: dict[Any, list[Row]], strange: dict[float, list[Row]]) -> Iterator[str]:
    """The bars, for what has been run."""
    dense = {use: mean(groups.get((use, DENSE, "float32"), []), "score") for use in METRICS}
    quarter, _, least = (groups.get((EMBEDDER, ALL, f"{share:.1%}"), []) for share in WANTED)
    drop, cosine = dense[EMBEDDER] - mean(quarter, "score"), mean(quarter, "cosine")
    yield at_most(f"{EMBEDDER}, 25 % of the bytes: Spearman below dense by", drop, 0.002)
    yield bar("the same: cosine at least 0.999", cosine, cosine >= 0.999)
    for use, wanted in LEAST.items():
        group = groups.get((use, FASTER, EIGHTH), [])
        if group:
            found, spent = mean(group, "score") / dense[use], mean(group, "operations")
            yield at_most(f"{use}, 12.5 % of the bytes, half of the operations: of the encoder's", spent, 0.5)
            yield bar(f"the same: at least {wanted:.0%} of dense", found, found >= wanted)
    kept = mean(least, "score") / dense[EMBEDDER]
    yield bar(f"{EMBEDDER}, 8 % of the bytes: at least 96% of dense", kept, kept >= 0.96)
    for budget, (seen, others) in strange.items():
        ratio = others["loss"] / seen["loss"]
        yield at_most(f"{budget:.1%} of the bytes: loss of sentences with unseen tokens over that of others,", ratio, 2)


def correlated(rows: list[Row], use: str) -> str:
    """How well the logarithms of the losses that plans of everything predict go with those that are measured."""
    lines = [line for line in rows if (line["problem"], line["method"]) == (use, ALL)]
    pairs = [(line["predicted"], line["loss"]) for line in lines if line["loss"] > 0]
    value = float(np.corrcoef(np.log(np.array(pairs).T))[0, 1]) if len(pairs) > 2 else math.nan
    text = f"{use}: logarithms of predicted and measured loss, {len(pairs)} plans, correlate at least 0.97"
    return bar(text, value, value >= 0.97)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("whole", __doc__, data="GLUE, as TASK/train.tsv and dev.tsv")
    parser.add_argument("--uses", nargs="+", choices=METRICS, default=list(METRICS), help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="(0 1 2)")
    study.add_cache(parser)
    options = parser.parse_args(argv)
    file = kept_in(options, "whole")
    for name in options.uses:
        use = use_of(name, options)
        for seed in options.seeds:
            run(use, seed, options, file)
    conclude(file, report, draw, __doc__)


def run(use: Use, seed: int, options: argparse.Namespace, file: Path) -> None:
    """The rows of a use and a seed that are not there yet."""
    importance, known = measuring(use, seed, options.quick)
    done = {(line["problem"], line["method"], line["setting"], line["seed"]) for line in read(file)}
    for kind, setting, dtype, made in models(use, seed, importance, known):
        if (use.name, kind, setting, seed) not in done:
            line = scored(use, seed, kind, setting, dtype=dtype, made=made)
            keep(file, line)
            print(f"  {use.name}, {kind}, {setting}: {line['share']:.1%}, {line['score']:.4f}", flush=True)
    for budget in WANTED if (use.name, seed) == (EMBEDDER, 0) else ():
        if (SENTENCES, UNSEEN, f"{budget:.1%}", seed) not in done:
            keep(file, *unseen(use, options, known, budget))


if __name__ == "__main__":
    main()
