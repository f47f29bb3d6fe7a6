"""What would a user pick instead, and what does each keep at the same number of operations?

all-MiniLM-L6-v2 as it comes, an embedder scored by Spearman's correlation on STS-B's dev rows; and with a head,
fine-tuned on each of three tasks as [study](study.md) does it; and the embedder in the directory after `--model`, which
is fine-tuned at a rate of 3e-5, of SST-2 on 8,000 rows. Cells are scores on the whole of dev; nothing was trained
afterwards, but for "healed", on 10,000 texts of train rows, and "then an epoch", on the train rows with their labels.
Differences of 0.003 are noise for Spearman, of 0.01 for the other two. Columns are the share of the multiplications
with the encoder's kernels that may be left; no method exceeds it. All see the same 1,024 texts of train rows. "labels"
says who sees their labels too, of the tasks; the embedder has none.

"layers": the first that the share allows, or that many from the first to the last, without training. "pruned heads and
neurons": Kwon et al. 2022, masks tuned by least squares, written from the paper (benchmarks/pruning.py). "activation":
each layer's own outputs kept (DRONE; SVD-LLM's whitening), equal shares; "on its own inputs": layer after layer, with
what the compressed layers below make of the texts (SVD-LLM's update). "kfac": Kronecker factors, equal shares.
"corrected": one batch of 16 is not measured on, and corrects predicted losses instead (`correct=`); "heads": with
`pairs=True` besides. "int8": the default's factors, or all dense kernels, as integers of 8 bits beside scales; dense
int8 has all operations, so it stands apart. "no encoder": every kernel zero. "bytes" are those of the whole file beside
the dense one's in float32, at half of the operations; of layers and pruned units, those that would be left.

Milliseconds are those of the embedder in JAX, 8 texts of 128 tokens, beside dense ones by turns. Models with pruned
units are not timed: they run as masks here. Every score is a line of JSON when it is there: a run that was killed goes
on where it stopped.

DIR holds GLUE as `STS-B/train.tsv` and so on.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import bert_adapter
from benchmarks import study
from benchmarks.base import FIRST, SPREAD, with_layers, without_kernels
from benchmarks.candidates import OWN, name_of, separate, without_identities
from benchmarks.pruning import pruned
from benchmarks.study import chosen
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, number, read, row
from benchmarks.timing import Measured
from benchmarks.whole import EMBEDDER, METRICS, calibration, use_of
from bert_adapter.distributions.draw import Draw
from bert_adapter.distributions.gaussian import gaussian
from bert_adapter.engines import batch_for
from bert_adapter.families import predictive
from bert_adapter.latency import compiled
from bert_adapter.losses import task_loss
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.timing import in_turns

SIZES = (0.75, 0.5, 0.25, 0.125)
OURS, DENSE, FLOOR = "the default", "dense", "no encoder"
CORRECTED, HEADS = f"{OURS}, corrected", f"{OURS}, corrected, heads"
HEALED, TEXTS = f"{OURS}, healed", 10_000
LABELLED = ("fwsvd", "pruned heads and neurons")
NAMES = (
    FIRST,
    SPREAD,
    "pruned heads and neurons",
    "svd",
    "fwsvd",
    "activation",
    "activation, on its own inputs",
    "kfac",
    OURS,
    CORRECTED,
    HEADS,
    f"{OURS}, int8",
    HEALED,
)
TIMED = (FIRST, OURS)
TRAINED, AFTER = (FIRST, SPREAD, "svd", "fwsvd", "activation", "kfac", OURS, HEALED), "then an epoch"
BATCH, LENGTH, ROUNDS = 8, 128, 15
EVERY = 16  # of so many batches, one corrects what the others predict


class Small(NamedTuple):
    """A model that runs as it is, and the shares of operations with kernels and of bytes that it stands for."""

    model: Model
    operations: float
    bytes: float


class Bench:
    """What the ways to compress a use share, each measured once."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.use, self.quick, self.name = use_of(name, options), options.quick, name_of(options.model)
        self.rate = study.OTHER_RATE if options.model else study.RATE
        self.dense, self.batches = self.use.dense, calibration(self.use, 0, self.quick)
        self.size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.dense.params))
        shapes = bert_adapter.select_kernels(self.dense)
        self.kernels = sum(m * n for m, n in shapes.values())
        self.importance = cache(self.measured)
        self.known = cache(
            lambda signal: bert_adapter.decompose(self.dense.params, self.importance(signal), signal=signal)
        )
        self.healed, self.most = cache(self.heal), cache(self.of_most)

    def measured(self, signal: str) -> Any:
        """What the signal needs of the encoder's kernels; fwsvd's gradients are those of labels where there are any."""
        if signal == "svd":
            return None
        return self.importance_of(self.dense, self.batches, signal)

    def importance_of(self, dense: Model, batches: list[Any], signal: str) -> Any:
        """What the signal needs of a model's kernels."""
        labels = signal == "fwsvd" and self.use.name != EMBEDDER
        gradients: Any = task_loss(dense.module) if labels else predictive(dense.module)
        run, paths = bert_adapter.forward(dense), bert_adapter.select_kernels(dense)
        how: dict[str, Any] = {"gradients": gradients, "progress": False}
        return bert_adapter.measure_signal(run, dense.params, batches, paths, signal=signal, **how)

    def of_most(self) -> Any:
        """The model with identities, what most of the texts tell of its kernels, and one of 16 batches."""
        probe, rest = bert_adapter.with_identities(self.dense), self.batches[EVERY // 2 :: EVERY]
        most = [batch for place, batch in enumerate(self.batches) if place % EVERY != EVERY // 2]
        known = bert_adapter.decompose(probe.params, self.importance_of(probe, most, DEFAULT), progress=False)
        return probe, known, rest or self.use.batches(chosen(self.use.dev, 8, 0))  # a quick run has too few

    def by_corrected(self, size: float, heads: bool) -> Small:
        """By corrected predictions, with heads of fewer dimensions or without."""
        _, known, rest = self.most()
        how: dict[str, Any] = {"budget": size, "correct": rest, "progress": False}
        if not heads:
            known = without_identities(known, self.dense)
        small, report = bert_adapter.compress(self.dense, (), importance=known, pairs=heads, **how)
        return self.of(small, report.parameters_after)

    def factorised(self, signal: str, size: float, uniform: bool = True) -> Small:
        """By a signal's weights."""
        how: dict[str, Any] = {"signal": signal, "budget": size, "uniform": uniform, "progress": False}
        small, report = bert_adapter.compress(self.dense, (), importance=self.known(signal), **how)
        return self.of(small, report.parameters_after)

    def in_turn(self, size: float) -> Small:
        """Layer after layer, from the bottom, by what enters it when those below are compressed."""
        small, left = self.dense, 0
        for layer in range(self.dense.module.config.num_hidden_layers):
            how: dict[str, Any] = {"signal": "activation", "budget": size, "uniform": True, "progress": False}
            small, report = bert_adapter.compress(small, self.batches, include=f"encoder/layer/{layer}/", **how)
            left += report.parameters_after
        return self.of(small, left)

    def of(self, small: Model, left: int) -> Small:
        """The model with so many parameters of the encoder's kernels left."""
        return Small(small, left / self.kernels, 1 - 4 * (self.kernels - left) / self.size)

    def layers(self, size: float, spread: bool) -> Small | None:
        """A model of the layers that the share allows; None where that is none."""
        small = with_layers(self.dense, size, spread)
        if small is None:
            return None
        kept, count = (model.module.config.num_hidden_layers for model in (small, self.dense))
        left = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params)) / self.size
        return Small(small, kept / count, left)

    def masked(self, size: float) -> Small:
        """By masks of heads and neurons."""
        found = pruned(self.dense, self.batches, size, self.gradient)
        return self.of(found.model, round(found.operations * self.kernels))

    def gradient(self, output: Any, batch: Any, key: Any) -> Any:
        """Of the labels' loss, or, of an embedding, along a random direction."""
        if self.use.name == EMBEDDER:
            return gaussian(output, Draw(key, 0))[0]
        loss = task_loss(self.dense.module)
        return jax.grad(lambda output: loss(output, batch).sum())(output)

    def stored(self, model: Model, operations: float) -> Small:
        """As integers of 8 bits, read back."""
        with tempfile.TemporaryDirectory() as folder:
            bert_adapter.save(model, folder, dtype="int8")
            written = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
            return Small(bert_adapter.load(folder), operations, written / self.size)

    def heal(self, size: float) -> Small:
        """The default, trained to the dense model's outputs on train rows."""
        rows = chosen(self.use.train, 64 if self.quick else TEXTS, 0)
        texts = separate(rows)[:TEXTS] if self.use.name == EMBEDDER else rows.texts
        small = self.factorised(DEFAULT, size, uniform=False)
        model, gained = bert_adapter.heal(small.model, self.dense, bert_adapter.text_batches(self.dense, texts))
        print(f"  {gained}", flush=True)
        return small._replace(model=model)

    def make(self, name: str, size: float) -> Small | None:
        """What a name in NAMES stands for."""
        if name in (FIRST, SPREAD):
            return self.layers(size, name == SPREAD)
        if name == f"{OURS}, int8":
            small = self.factorised(DEFAULT, size, uniform=False)
            return self.stored(small.model, small.operations)
        calls: dict[str, Callable[[float], Small]] = {
            "pruned heads and neurons": self.masked,
            "activation, on its own inputs": self.in_turn,
            OURS: partial(self.factorised, DEFAULT, uniform=False),
            CORRECTED: partial(self.by_corrected, heads=False),
            HEADS: partial(self.by_corrected, heads=True),
            HEALED: self.healed,
        }
        return calls[name](size) if name in calls else self.factorised(name, size)


def cells_of(bench: Bench) -> Iterator[tuple[str, float, Callable[[], Small | None]]]:
    """By name and size, a call that makes the model."""
    dense = bench.dense
    yield DENSE, 1.0, lambda: Small(dense, 1.0, 1.0)
    yield f"{DENSE}, int8", 1.0, lambda: bench.stored(dense, 1.0)
    yield FLOOR, 0.0, lambda: bench.of(without_kernels(dense), 0)
    for size in SIZES:
        for name in NAMES:
            yield name, size, partial(bench.make, name, size)


def scored(bench: Bench, name: str, size: float, make: Callable[[], Small | None]) -> Row:
    """The row of a model; without a score where there is none of that size."""
    began, use = time.perf_counter(), bench.use
    small = make()
    about = {"cost": Measured(None, None, time.perf_counter() - began, None), "model": bench.name, "size": size}
    if small is None:
        return row(use.name, name, None, "none of that size", **about, score=None)
    model = bert_adapter.merge(small.model)  # all run by one program
    score = bert_adapter.score(model, use.dev, progress=False)[METRICS[use.name]]
    return row(use.name, name, None, "", **about, score=score, operations=small.operations, bytes=small.bytes)


def timed(bench: Bench) -> list[Row]:
    """Milliseconds of the dense model and of those of TIMED, by turns."""
    models = {(DENSE, 1.0): bench.dense}
    for name in TIMED:
        models |= {(name, size): small.model for size in SIZES if (small := bench.make(name, size)) is not None}
    batch = batch_for(bench.dense, BATCH, LENGTH)
    calls = {key: compiled(model, batch) for key, model in models.items()}
    seconds = in_turns(calls, ROUNDS)
    return [
        row(
            "milliseconds", name, None, "", model=bench.name, size=size, score=None, run_seconds=float(np.median(found))
        )
        for (name, size), found in seconds.items()
    ]


def trained(bench: Bench, name: str, size: float) -> Small | None:
    """The model after an epoch on the train rows with their labels."""
    small = bench.make(name, size)
    if small is None:
        return None
    batches = bert_adapter.labelled_batches(bench.dense, bench.use.train)
    model, _ = bert_adapter.finetune(small.model, batches, epochs=1, learning_rate=bench.rate, progress=False)
    return small._replace(model=model)


def table(rows: list[Row], use: str) -> str:
    """Scores by name and size, with the labels that each has seen and the bytes at half of the operations."""
    found = {(line["method"], line["size"]): line for line in rows if line["problem"] == use}
    ends = {DENSE: 1.0, f"{DENSE}, int8": 1.0, FLOOR: 0.0}
    order = [*NAMES, *(f"{name}, {AFTER}" for name in TRAINED)]
    names = [name for name in order if any((name, size) in found for size in SIZES)]
    cells = []
    for name in [*ends, *names]:
        lines = [found.get((name, ends.get(name, size))) for size in SIZES]
        half = lines[SIZES.index(0.5)]
        labels = "yes" if use != EMBEDDER and (AFTER in name or name in LABELLED) else "no"
        kept = "" if half is None or half["score"] is None else f"{half['bytes']:.1%}"
        cells.append([name, labels, kept, *("" if line is None else number(line["score"], ".4f") for line in lines)])
    heading = [f"{use}: {METRICS[use]}", "labels", "bytes at 50 %", *(f"{size:.1%}" for size in SIZES)]
    return markdown(heading, cells)


def verdicts(rows: list[Row], use: str) -> Iterator[str]:
    """Whether the default keeps most of all that were not trained, at each size."""
    for size in SIZES:
        lines = [line for line in rows if (line["problem"], line["size"]) == (use, size) and line["score"] is not None]
        scores = {line["method"]: line["score"] for line in lines if AFTER not in line["method"]}
        others = {name: score for name, score in scores.items() if OURS not in name}
        if OURS in scores and others:
            best = max(others, key=lambda name: others[name])
            gap = scores[OURS] - others[best]
            yield bar(f"{use}, {size:.1%}: the default above the best other, {best}, by", gap, gap > 0)


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each model, in the order in which they came."""
    found: dict[str, list[Row]] = {}
    for line in rows:
        found.setdefault(line.get("model", OWN), []).append(line)
    return found


def report(rows: list[Row]) -> str:
    """What there is of each model."""
    return "\n\n".join(f"**{model}**\n\n{of_model(found)}" for model, found in by_model(rows).items())


def of_model(rows: list[Row]) -> str:
    """A table for each use, the times, and who keeps most."""
    uses = [use for use in METRICS if any(line["problem"] == use for line in rows)]
    parts = [table(rows, use) for use in uses]
    times = {(line["method"], line["size"]): line["run_seconds"] for line in rows if line["problem"] == "milliseconds"}
    if times:
        dense = times[DENSE, 1.0]
        cells = [
            [name, f"{size:.1%}", f"{1000 * seconds:.1f}", f"{dense / seconds:.2f}"]
            for (name, size), seconds in times.items()
        ]
        parts.append(
            markdown([f"{BATCH} texts of {LENGTH} tokens", "operations", "milliseconds", "times as fast"], cells)
        )
    return "\n\n".join([*parts, "\n".join(verdict for use in uses for verdict in verdicts(rows, use))])


def draw(rows: list[Row], path: Path) -> None:
    """A line of panels for each model: scores against operations, and the embedder's against milliseconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    every = {model: panels(found) for model, found in by_model(rows).items()}
    count = max(map(len, every.values()))
    size = (4 * count + 4, 4 * len(every))
    figure, axes = plt.subplots(len(every), count, figsize=size, squeeze=False, layout="constrained")
    for line, (model, found) in zip(axes, every.items(), strict=True):
        for ax in line[len(found) :]:
            ax.axis("off")
        for ax, panel in zip(line, found, strict=False):
            show(ax, panel)
            ax.set(title=f"{model}\n{panel.use}", xlabel=panel.label, ylabel=METRICS[panel.use])
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Panel(NamedTuple):
    """Scores of a use against something.

    lines: by name, the points (what, score) in the order of what. ends: by what is left, scores of dense and of none.
    """

    use: str
    label: str
    lines: dict[str, list[tuple[float, float]]]
    ends: dict[float, float]


def panels(rows: list[Row]) -> list[Panel]:
    """Those of a model."""
    times = {
        (line["method"], line["size"]): 1000 * line["run_seconds"] for line in rows if line["problem"] == "milliseconds"
    }
    found = []
    for use in METRICS:
        scores = [line for line in rows if line["problem"] == use and line["score"] is not None]
        ends = {line["size"]: line["score"] for line in scores if line["method"] in (DENSE, FLOOR)}
        axes: dict[str, Callable[[Row], float | None]] = {
            "share of the encoder kernels' operations": lambda line: line["operations"],
            "milliseconds": lambda line: times.get((line["method"], line["size"])),
        }
        for label, place in axes.items():
            lines = {name: placed(scores, name, place) for name in NAMES}
            if any(lines.values()) and (label != "milliseconds" or use == EMBEDDER):
                found.append(Panel(use, label, lines, ends))
    return found


def placed(rows: list[Row], name: str, place: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """Where the points of a method are."""
    lines = [line for line in rows if line["method"] == name]
    return sorted((x, line["score"]) for line in lines if (x := place(line)) is not None)


def show(ax: Any, panel: Panel) -> None:
    """The lines of a panel."""
    for name, points in panel.lines.items():
        color = f"C{NAMES.index(OURS if OURS in name else name)}"
        style = {"marker": "o", "markersize": 3, "linewidth": 2.5 if name == OURS else 1.2, "color": color}
        style["linestyle"] = {f"{OURS}, int8": ":", HEALED: "--", CORRECTED: "-.", HEADS: (0, (1, 4))}.get(name, "-")
        if points:
            ax.plot(*np.array(points).T, label=name, **style)
    for left, score in panel.ends.items():
        ax.axhline(score, color="black", linewidth=0.8, linestyle="-" if left else ":")


def main(argv: list[str] | None = None) -> None:
    parser = arguments("alternatives", __doc__, data="GLUE, as TASK/train.tsv and dev.tsv")
    parser.add_argument("--uses", nargs="+", choices=METRICS, default=list(METRICS), help="(all)")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="shares of the operations")
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"the directory of an embedder ({OWN})")
    parser.add_argument("--healed", type=float, nargs="*", default=[], help="sizes at which to heal the default too")
    parser.add_argument("--trained", type=float, nargs="*", default=[], help="sizes at which to train an epoch too")
    parser.add_argument(
        "--full", action="store_true", help="fine-tune on all rows of SST-2 (16,000; 8,000 with --model)"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="rows of these methods alone (all)")
    parser.add_argument("--times", action="store_true", help="time the embedder too, on a machine that is quiet")
    study.add_cache(parser)
    options = parser.parse_args(argv)
    file = kept_in(options, "alternatives")
    for name in options.uses:
        run(Bench(name, options), options, file)
    rows = by_model(read(file)).get(name_of(options.model), [])
    if options.times and not any(line["problem"] == "milliseconds" for line in rows):
        keep(file, *timed(Bench(EMBEDDER, options)))
    conclude(file, report, draw, __doc__)


def run(bench: Bench, options: argparse.Namespace, file: Path) -> None:
    """The rows of a use that are not there yet."""
    rows, use = by_model(read(file)).get(bench.name, []), bench.use
    done = {(line["problem"], line["method"], line["size"]) for line in rows}
    cells = [cell for cell in cells_of(bench) if cell[1] in (0.0, 1.0, *options.sizes)]
    cells = [cell for cell in cells if cell[0] != HEALED or cell[1] in options.healed]
    cells = [cell for cell in cells if options.only is None or cell[0] in options.only]
    if use.name != EMBEDDER:
        after = [(name, size) for size in options.trained for name in TRAINED]
        after = [(name, size) for name, size in after if options.only is None or f"{name}, {AFTER}" in options.only]
        cells += [(f"{name}, {AFTER}", size, partial(trained, bench, name, size)) for name, size in after]
    for name, size, make in cells:
        if (use.name, name, size) not in done:
            line = scored(bench, name, size, make)
            keep(file, line)
            print(f"  {use.name}, {name}, {size:.1%}: {number(line['score'], '.4f')}", flush=True)


if __name__ == "__main__":
    main()
