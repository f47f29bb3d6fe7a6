"""Which compression keeps what a fine-tuned model can do, at which size? The study of 2022, repeated.

all-MiniLM-L6-v2 with a head is fine-tuned on each task (AdamW, 3 epochs, rate 1e-4, batches of 32 of about equal
length; SST-2 on a fixed subset of 16,000 rows), compressed with importance from 1,024 *train* rows, and scored on the
whole of *dev*, as it is and after fine-tuning. DIR holds GLUE as `STS-B/train.tsv` and so on; without it, `uv run
--extra online` reads Hugging Face's copy. Published iterations as the study ran them: 30 of each from the SVD, weights
the squared gradients of batches over their maximum. "wlra" is the converged minimiser for the diagonal Fisher
information of the labels; "default" is the signal "shampoo", which was the default then and needs no labels, nor did
"eigenbasis", a signal that was deleted for its scores here. Planned ranks of "svd" and "fwsvd" are those of their
weighted squares as they are, which compare no kernel with another. Sizes are shares of the kernels' parameters, or the
study's ranks 150, 300 and 450 of 768 as 75, 150 and 225 of 384. ± is the standard error over seeds: of the train rows,
the random directions and the order of training; one dense model is compressed in all of them.

The loss predicted is a sum over kernels, each to second order; with three quarters of the parameters gone, errors are
not small, and those of one layer meet those of the others: what is measured is several times as much, and tens of times
for a classifier that is sure of the rows that it was trained on, whose Fisher information there is next to nothing. The
order of plans is right all the same.

Every score is a line of JSON when it is there: a run that was killed goes on where it stopped. `--report` prints what
has been run; the rest of the cells are empty.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from functools import cache, partial, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bert_adapter
from benchmarks.tables import arguments, bar, conclude, keep, kept_in, markdown, number, read
from bert_adapter.checkpoint.names import by_path
from bert_adapter.families import predictive
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.losses import task_loss
from bert_adapter.reading import labels_in, read_lines
from bert_adapter.rows import LabelledTexts, Source


class Task(NamedTuple):
    """labels: outputs of the head. metric: in the tables. online: the name in GLUE. rows: of train, if not all."""

    labels: int
    metric: str
    online: str
    rows: int | None = None


TASKS = {
    "STS-B": Task(1, "spearman", "stsb"),
    "CoLA": Task(2, "matthews", "cola"),
    "SST-2": Task(2, "accuracy", "sst2", rows=16_000),
}
KERNELS = {"all": r"^(bert/)?encoder/", "ffn": r"^(bert/)?encoder/layer/\d+/(intermediate|output)/"}
RANKS = (75, 150, 225)  # the study's 150, 300 and 450 of 768
BUDGETS = (0.25, 0.5, 0.75)
EPOCHS, RATE = 3, 1e-4
OTHER_RATE, OTHER_ROWS = 3e-5, 8_000  # for models in the place of all-MiniLM-L6-v2: rows of SST-2
FORGET = 32  # models, after which what was compiled for them is let go: a process can map only so many programs


class Method(NamedTuple):
    """How a model is compressed: with what measured, and which options of `compress`."""

    measured: str | None
    options: dict[str, Any]


def published(method: str) -> Method:
    """As the study ran it: 30 iterations from the SVD, weights the squared gradients of batches over their maximum."""
    iteration = {"start": "svd", "projection": "svd", "scaling": "none", "tol": 0, "max_iters": 30}
    return Method("batches", {"signal": "fisher", "shrink": 0.0, "method": method, "solver": iteration})


def as_loss(signal: str) -> Any:
    """The signal, planned for as if its units were the loss's."""
    return bert_adapter.SIGNALS[signal]._replace(units="loss")


METHODS = {
    "svd": Method(None, {"signal": as_loss("svd")}),
    "fwsvd": Method("labels", {"signal": as_loss("fwsvd")}),
    "em, published": published("em"),
    "nesterov, published": published("nesterov"),
    "anderson, published": published("anderson"),
    "wlra": Method("labels", {"signal": "fisher", "shrink": 0.0}),
    "default": Method("shampoo", {"signal": "shampoo"}),
}
SHOWN = (*METHODS, "eigenbasis")  # which was deleted for these scores
OURS = "default"
NAMES = {"all": "all encoder kernels", "ffn": "feed-forward kernels"}


class Cell(NamedTuple):
    """One score, and what it is known by: of a model compressed to a size, after a number of epochs of fine-tuning.

    size: a rank, the same for all kernels or what that takes of their parameters; or, up to 1, a share of them to keep.
    """

    task: str
    kernels: str
    size: float
    method: str
    ranks: str
    seed: int
    epochs: int


def grid(tasks: list[str], seeds: int, epochs: list[int]) -> list[Cell]:
    """All scores to be had, the ones that most depends on first.

    Several seeds, and fine-tuning, are for FWSVD with equal ranks and the default with planned ones, at a quarter and a
    half of all kernels; fine-tuning has them for the first number of epochs at a quarter, and SST-2 has no half.
    """
    ends = (("fwsvd", "uniform"), (OURS, "planned"))
    headline = [
        Cell(task, "all", size, *end, seed, 0)
        for seed, size, end, task in itertools.product(range(seeds), (0.25, 0.5), ends, tasks)
    ]
    every = itertools.product(KERNELS, (*BUDGETS, *RANKS), METHODS, ("uniform", "planned"), tasks)
    others = [
        Cell(task, kernels, size, method, ranks, 0, 0)
        for kernels, size, method, ranks, task in every
        if not (kernels == "ffn" and size < 1) and not ("published" in method and ranks == "planned")
    ]
    tuned = [
        Cell(task, "all", size, *end, seed, count)
        for count, size, seed, end, task in itertools.product(epochs, (0.25, 0.5), range(seeds), ends, tasks)
        if (size == 0.25 or task != "SST-2") and (not seed or (count, size) == (epochs[0], 0.25))
    ]
    first = [cell for cell in tuned if (cell.epochs, cell.size) == (epochs[0], 0.25)]
    return list(dict.fromkeys([*headline, *first, *others, *tuned]))


class Layout(NamedTuple):
    """Of a file as GLUE has it: whether there is a heading, how many columns, and which are texts and the label."""

    heading: bool
    columns: int
    texts: tuple[int, ...]
    label: int


LAYOUTS = {"STS-B": Layout(True, 10, (7, 8), 9), "CoLA": Layout(False, 4, (3,), 1)}  # SST-2's is that of `read_rows`


def rows_in(file: Path, layout: Layout | None) -> LabelledTexts:
    """The rows of a file in GLUE's layout, or, if its first line is not that, in the one of `read_rows`."""
    lines = read_lines(file)
    if layout is None or len(lines[0].split("\t")) != layout.columns:
        return bert_adapter.read_rows(file)
    rows = [(place, line.split("\t")) for place, line in enumerate(lines, 1) if line][layout.heading :]
    for place, row in rows:
        if len(row) != layout.columns:
            raise ValueError(f"{file}, line {place}: wanted {layout.columns} columns; got {len(row)}")
    source = Source(str(file), np.array([place for place, _ in rows]))
    texts: Any = [tuple(row[column] for column in layout.texts) for _, row in rows]
    labels = labels_in([row[layout.label] for _, row in rows], source)
    return LabelledTexts(texts if len(layout.texts) == 2 else [text for (text,) in texts], labels, source)


@cache
def rows_of(task: str, split: str, folder: Path | None) -> LabelledTexts:
    """The rows of GLUE's task: of the folder's {task}/{split}.tsv, as GLUE has it or as `read_rows` reads it; without a
    folder, of Hugging Face's copy."""
    if folder is not None:
        return rows_in(folder / task / f"{split}.tsv", LAYOUTS.get(task))
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    found = load_dataset("nyu-mll/glue", TASKS[task].online, split={"dev": "validation"}.get(split, split))
    columns = [found[name] for name in ("sentence", "sentence1", "sentence2") if name in found.column_names]
    texts: Any = list(columns[0]) if len(columns) == 1 else [(str(a), str(b)) for a, b in zip(*columns, strict=True)]
    return LabelledTexts(texts, np.array(found["label"]))


def chosen(rows: LabelledTexts, count: int | None, seed: int) -> LabelledTexts:
    """`count` rows, drawn once for a seed."""
    if count is None or count >= len(rows.labels):
        return rows
    texts: Any = rows.texts
    picked = np.random.default_rng(seed).permutation(len(rows.labels))[:count]
    return LabelledTexts([texts[i] for i in picked], rows.labels[picked])


class Bench(NamedTuple):
    """A task with its dense model, and where to keep what takes long."""

    task: str
    dense: bert_adapter.Model
    train: LabelledTexts
    dev: LabelledTexts
    calibration: int
    folder: Path


def prepared(task: str, options: argparse.Namespace) -> Bench:
    """The task with the model that is fine-tuned on it, trained or read from where an earlier run left it.

    options: with a `model`, the directory of another than all-MiniLM-L6-v2, where there is one.
    """
    from bert_adapter.demo import minilm

    wanted, other = TASKS[task], getattr(options, "model", None)
    rows = OTHER_ROWS if other and wanted.rows else wanted.rows
    count = None if getattr(options, "full", False) else rows
    train = chosen(rows_of(task, "train", options.data), 64 if options.quick else count, 0)
    dev = chosen(rows_of(task, "dev", options.data), 64 if options.quick else None, 0)
    folder = options.cache / ("study-quick" if options.quick else "study")
    folder = (folder / other.resolve().name if other else folder) / task
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dense").exists():
        model = bert_adapter.with_head(bert_adapter.load(other or minilm()), wanted.labels)
        batches = bert_adapter.labelled_batches(model, train)
        model, losses = bert_adapter.finetune(
            model, batches, epochs=EPOCHS, learning_rate=OTHER_RATE if other else RATE, file=folder / "dense.state"
        )
        print(f"{task}: mean loss of the epochs {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)
        bert_adapter.save(model, folder / "dense")
    dense = bert_adapter.load(folder / "dense")
    return Bench(task, dense, train, dev, 64 if options.quick else 1024, folder)


def calibration(bench: Bench, seed: int) -> list[Any]:
    """Batches of train rows."""
    return list(bert_adapter.labelled_batches(bench.dense, chosen(bench.train, bench.calibration, 1000 + seed)))


def measured(bench: Bench, name: str | None, seed: int) -> Importance | None:
    """What a method needs of all kernels: "labels", the Fisher information of labels by example; "batches", the
    study's; or a signal of `measure_signal`."""
    if name is None:
        return None
    forward, paths = bert_adapter.forward(bench.dense), bert_adapter.select_kernels(bench.dense)
    batches, file = calibration(bench, seed), bench.folder / f"{name}-{seed}.safetensors"
    params = jax.device_put(bench.dense.params)
    if name == "batches":
        if not file.exists():
            loss = task_loss(bench.dense.module)
            save_importance(squared_batch_gradients(forward, loss, params, batches, paths=list(paths)), file)
        return load_importance(file)
    if name == "labels":
        loss = task_loss(bench.dense.module)
        return measure_importance(
            forward, params, batches, paths, gradients=loss, statistics=("fisher", "rows"), file=file
        )
    distribution = predictive(bench.dense.module)
    return bert_adapter.measure_signal(
        forward, params, batches, paths, signal=name, gradients=distribution, seed=seed, file=file
    )


def squared_batch_gradients(
    forward: Any, loss: Any, params: Any, batches: list[Any], *, paths: list[str]
) -> Importance:
    """The study's weights: squared gradients of the mean loss of batches, summed, over the maximum of each kernel."""

    @jax.jit
    def squares(params: Any, batch: Any) -> dict[str, Any]:
        gradient = by_path(jax.grad(lambda params: jnp.mean(loss(forward(params, batch), batch)))(params))
        return {path: gradient[f"{path}/kernel"] ** 2 for path in paths}

    sums = summed(squares(params, batch) for batch in batches)
    fisher = {path: jnp.stack([total, jnp.zeros_like(total)]) / jnp.max(total) for path, total in sums.items()}
    sums = {path: Sums(fisher=both) for path, both in fisher.items()}
    return Importance(sums, examples=1, tokens=1, batches=len(batches), gradients="labels", seed=0)


def summed(trees: Iterable[Any]) -> Any:
    """The sum of trees of one structure, of which two are held at a time."""
    return reduce(partial(jax.tree.map, jnp.add), trees)


def compressed(bench: Bench, cell: Cell, importance: Importance | None) -> tuple[bert_adapter.Model, Any]:
    """The model of the cell, and the report on it."""
    include = KERNELS[cell.kernels]
    if cell.ranks == "uniform" and cell.size >= 1:
        size: dict[str, Any] = {"rank": int(cell.size)}
    else:
        shapes = bert_adapter.select_kernels(bench.dense, include)
        size = {"budget": share(shapes, cell.size), "uniform": cell.ranks == "uniform"}
    options = size | METHODS[cell.method].options
    options |= {"importance": importance, "include": include, "progress": False}
    return bert_adapter.compress(bench.dense, (), **options)


def share(shapes: Mapping[str, tuple[int, int]], size: float) -> float:
    """What a rank in every kernel takes of their parameters; a share takes itself."""
    if size <= 1:
        return size
    return sum(min(size * (m + n), m * n) for m, n in shapes.values()) / sum(m * n for m, n in shapes.values())


def scored(bench: Bench, cell: Cell, importance: Importance | None) -> dict[str, Any]:
    """The cell's line of results."""
    small, report = compressed(bench, cell, importance)
    shapes = bert_adapter.select_kernels(bench.dense, KERNELS[cell.kernels])
    about: dict[str, Any] = {
        "share": report.parameters_after / report.parameters_before,
        "wanted_share": share(shapes, cell.size),
        "compress_seconds": sum(report.seconds.values()),
    }
    if cell.epochs:
        batches = bert_adapter.labelled_batches(bench.dense, bench.train)
        state = bench.folder / f"{'-'.join(map(str, cell))}.state"
        small, _ = bert_adapter.finetune(
            small, batches, epochs=cell.epochs, learning_rate=RATE, seed=cell.seed, file=state
        )
    # Factors multiplied out give the same outputs, but for rounding, by a program that is compiled once for all models.
    whole = small._replace(params=bert_adapter.merge(small.params))
    if cell.method == OURS and not cell.epochs:
        held = bert_adapter.labelled_batches(bench.dense, chosen(bench.dev, 512, 0))
        about |= {"predicted": report.predicted, "actual": bert_adapter.loss_increase(bench.dense, whole, held)}
    return cell._asdict() | about | bert_adapter.score(whole, bench.dev)


def dense_cell(task: str) -> Cell:
    """What the model that is compressed is known by."""
    return Cell(task, "all", 1.0, "dense", "uniform", 0, 0)


class Scores:
    """What the lines say: means over seeds, with their standard errors."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.found: dict[Any, list[float]] = {}
        for line in lines:
            key = tuple(line[name] for name in Cell._fields if name != "seed")
            self.found.setdefault(key, []).append(line[TASKS[line["task"]].metric])

    def mean(self, *key: Any) -> float | None:
        """None for what was not run."""
        return float(np.mean(self.found[key])) if key in self.found else None

    def error(self, *key: Any) -> float | None:
        """The standard error of the mean; nothing is known from one run."""
        values = self.found.get(key, [])
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None

    def text(self, *key: Any) -> str:
        """The mean, with its error where there are several runs; nothing for what was not run."""
        error = self.error(*key)
        return number(self.mean(*key), ".3f") + ("" if error is None else f" ± {error:.3f}")

    def dense(self, task: str) -> float | None:
        """Of the model that is compressed."""
        cell = dense_cell(task)
        return self.mean(*cell[:5], cell.epochs)


def recovered(scores: Scores, task: str, size: float) -> float | None:
    """What the default regains of that which FWSVD with equal ranks loses of the dense model's score."""
    ours, base = (
        scores.mean(task, "all", size, method, ranks, 0) for method, ranks in ((OURS, "planned"), ("fwsvd", "uniform"))
    )
    dense = scores.dense(task)
    return None if ours is None or base is None or dense is None else (ours - base) / (dense - base)


HEADLINE = {
    "svd": (("svd", "uniform"),),
    "fwsvd": (("fwsvd", "uniform"),),
    "published iterations, the best of three": tuple((name, "uniform") for name in METHODS if "published" in name),
    "wlra, weights of the entries": (("wlra", "uniform"),),
    "default, equal ranks": ((OURS, "uniform"),),
    "default": ((OURS, "planned"),),
}


def headline(scores: Scores) -> str:
    """All tasks and budgets in one table, of all encoder kernels, as compressed."""
    columns = list(itertools.product(TASKS, BUDGETS))

    def best(methods: tuple[tuple[str, str], ...], task: str, size: float) -> str:
        keys = [(task, "all", size, *method, 0) for method in methods]
        return scores.text(*max(keys, key=lambda key: scores.mean(*key) or -math.inf))

    cells = [[name, *(best(methods, *column) for column in columns)] for name, methods in HEADLINE.items()]
    cells.append(["dense", *(number(scores.dense(task), ".3f") for task, _ in columns)])
    return markdown(["all encoder kernels", *(f"{task} {size:.0%}" for task, size in columns)], cells)


def tables(scores: Scores) -> str:
    """A table of all sizes for each task, kernels and ranks."""
    parts = []
    for task, kernels, epochs in itertools.product(TASKS, KERNELS, sorted({key[-1] for key in scores.found})):
        sizes = [
            size
            for size in (*BUDGETS, *RANKS)
            if any((task, kernels, size, epochs) == (*k[:3], k[5]) for k in scores.found)
        ]
        if not sizes:
            continue
        head = ["method", "ranks", *(f"{size:.0%}" if size <= 1 else f"rank {size}" for size in sizes)]
        cells = [
            [method, ranks, *(scores.text(task, kernels, size, method, ranks, epochs) for size in sizes)]
            for method, ranks in itertools.product(SHOWN, ("uniform", "planned"))
        ]
        tuned = f"epochs of fine-tuning: {epochs}" if epochs else "as compressed"
        rows = TASKS[task].rows
        dense = number(scores.dense(task), ".3f") + (f", trained on {rows:,} rows" if rows else "")
        title = f"**{task}**, {TASKS[task].metric}, {NAMES[kernels]}, {tuned}; dense {dense}"
        parts.append(f"{title}\n\n{markdown(head, [line for line in cells if any(line[2:])])}")
    return "\n\n".join(parts)


def verdicts(scores: Scores) -> list[str]:
    """The bars, on all encoder kernels."""
    found = []
    for task, size in itertools.product(TASKS, (0.25, 0.5)):
        least = {0.25: 0.5, 0.5: 0.8}[size]
        value = recovered(scores, task, size)
        if value is not None:
            found.append(bar(f"{task}, {size:.0%}: recovered at least {least}", value, value >= least))
        ours, dense = scores.mean(task, "all", size, OURS, "planned", 0), scores.dense(task)
        if size == 0.5 and task != "CoLA" and ours is not None and dense is not None:
            found.append(bar(f"{task}, {size:.0%}: at least 0.99 of dense", ours / dense, ours >= 0.99 * dense))
    for task, kernels, size in itertools.product(TASKS, KERNELS, (*BUDGETS, *RANKS)):
        ours = scores.mean(task, kernels, size, OURS, "planned", 0)
        others = [scores.mean(task, kernels, size, name, "uniform", 0) for name in METHODS if "published" in name]
        known = [value for value in others if value is not None]
        if ours is not None and known:
            text = f"{task}, {kernels}, {size:g}: above every published iteration, by"
            found.append(bar(text, ours - max(known), ours > max(known)))
    for task, epochs in itertools.product(TASKS, (1, 3)):
        ours, base = (task, "all", 0.25, OURS, "planned", epochs), (task, "all", 0.25, "fwsvd", "uniform", epochs)
        (a, b), (x, y) = ((scores.mean(*key), scores.error(*key)) for key in (ours, base))
        dense = scores.dense(task)
        if a is None or x is None or dense is None:
            continue
        text = f"{task}, 25 %, fine-tuned for {epochs}:"
        if b is not None and y is not None:
            gap = (a - x) / (math.hypot(b, y) or math.inf)
            found.append(bar(f"{text} above fwsvd by more than 2 standard errors", gap, gap > 2))
        if task != "CoLA":
            found.append(bar(f"{text} at least 0.97 of dense", a / dense, a >= 0.97 * dense))
    return found


def predictions(lines: list[dict[str, Any]]) -> str:
    """The loss that the plans of the default predict, and the one measured on dev rows."""
    rows, parts = [], []
    for task in TASKS:
        chosen = [line for line in lines if line["task"] == task and line["method"] == OURS and line["epochs"] == 0]
        pairs = [(line["predicted"], line["actual"], line) for line in chosen if line.get("predicted") is not None]
        rows += [
            [task, line["kernels"], f"{line['share']:.2f}", line["ranks"], line["seed"], f"{a:.4g}", f"{b:.4g}"]
            for a, b, line in pairs
        ]
        if len(pairs) > 2:
            both = np.log([[a, b] for a, b, _ in pairs]).T
            parts.append(f"{task}: correlation of the logarithms over {len(pairs)} plans {np.corrcoef(both)[0, 1]:.3f}")
    head = ["task", "kernels", "share", "ranks", "seed", "predicted loss", "measured"]
    return f"{markdown(head, rows)}\n\n" + "\n".join(parts)


def report(lines: list[dict[str, Any]]) -> str:
    """All tables and bars, in Markdown."""
    scores = Scores(lines)
    return "\n".join([headline(scores), "", tables(scores), "", predictions(lines), "", *verdicts(scores)])


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The study's figure: the score against what is kept, a panel for each task, without and with fine-tuning."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scores, tasks = Scores(lines), [task for task in TASKS if any(line["task"] == task for line in lines)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        metric = TASKS[task].metric
        of_task = [line for line in lines if line["task"] == task and line["kernels"] == "all"]
        shares = {line["size"]: line["wanted_share"] for line in of_task if line["method"] != "dense"}
        sizes, most = sorted(shares, key=lambda size: shares[size]), max(line["epochs"] for line in of_task)
        for place, method in enumerate(reversed(METHODS)):
            style = {"color": f"C{place}", "marker": "o", "markersize": 3, "linewidth": 2.5 if method == OURS else 1.2}
            for epochs, dashes in {most: "--", 0: "-"}.items():
                ranks = "planned" if method == OURS else "uniform"
                means = {shares[size]: scores.mean(task, "all", size, method, ranks, epochs) for size in sizes}
                known = {share: mean for share, mean in means.items() if mean is not None}
                if known:
                    label = method + (", fine-tuned" if epochs else "")
                    ax.plot(list(known), list(known.values()), dashes, label=label, **style)
        if (dense := scores.dense(task)) is not None:
            ax.axhline(dense, color="black", linewidth=0.8, label="dense")
        ax.set(title=f"{task}, {metric}", xlabel="share of the encoder kernels' parameters")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = arguments("study", __doc__)
    result.add_argument("--data", type=Path, metavar="DIR", help="GLUE, as TASK/train.tsv; else from Hugging Face")
    result.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(all)")
    result.add_argument("--seeds", type=int, default=3, help="of the headline cells (%(default)s)")
    result.add_argument("--epochs", type=int, nargs="*", default=[1, 3], help="of fine-tuning afterwards (1 3)")
    add_cache(result)
    result.add_argument("--minutes", type=float, default=math.inf, help="begin no model after that many")
    result.add_argument("--report", action="store_true", help="only print the results so far")
    return result


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The option that says where models are that were fine-tuned."""
    cache = Path.home() / ".cache" / "wlra-study"
    parser.add_argument("--cache", type=Path, default=cache, help="for models and measurements (%(default)s)")


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if not (options.report or options.data or find_spec("datasets")):
        parser().error(
            "wanted --data DIR, or Hugging Face's datasets: uv run --extra online python -m benchmarks.study"
        )
    file, began = kept_in(options, "study"), time.monotonic()
    cells = [] if options.report else grid(options.tasks, options.seeds, options.epochs)
    if options.quick:
        cells = [
            cell for cell in cells if cell[1:3] == ("all", 0.5) and cell.method in ("svd", OURS) and not sum(cell[5:])
        ]
    benches: dict[str, Bench] = {}
    for cell in cells:
        done = {Cell(*(line[name] for name in Cell._fields)) for line in read(file)}
        if cell in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        if cell.task not in benches:
            benches[cell.task] = bench = prepared(cell.task, options)
            if (dense := dense_cell(cell.task)) not in done:
                append(file, dense._asdict() | bert_adapter.score(bench.dense, bench.dev))
        bench = benches[cell.task]
        append(file, scored(bench, cell, measured(bench, METHODS[cell.method].measured, cell.seed)))
        if (len(done) + 1) % FORGET == 0:
            jax.clear_caches()
    conclude(file, report, draw, __doc__)


def append(file: Path, line: dict[str, Any]) -> None:
    """The line is kept, and its score printed."""
    keep(file, line)
    what = ", ".join(str(line[name]) for name in Cell._fields)
    print(f"{what}: {TASKS[line['task']].metric} {line[TASKS[line['task']].metric]:.4f}", flush=True)


if __name__ == "__main__":
    main()
