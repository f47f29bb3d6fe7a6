"""How much of what compression loses do ten thousand sentences without labels bring back, at 50, 25 and 10 %?

all-MiniLM-L6-v2 as it comes, compressed by default with importance from 512 pairs of STS-B's train rows, to shares of
its encoder kernels' parameters, and to a share of the bytes of all, where most matrices have 4 bits; then healed by
default on 10,000 sentences of train rows, half of them STS-B's and half SST-2's. No label is used. Scores are
Spearman's correlation on the whole of STS-B's dev rows, and the mean cosine to the dense embedding over 2,000 sentences
of the dev rows of STS-B and of SST-2. Retrieval is what an index of dense embeddings is worth to queries that the
smaller model embeds: all sentences of STS-B's dev rows are indexed; the first of each pair with a label of 4 or more
asks, and what it is paired with so is to be found among the 10 nearest, itself left out. A seed draws the rows, their
order and the directions of the importance. Seconds are those of healing alone. Every score is a line of JSON when it is
there: a run that was killed goes on where it stopped.

Classifiers: MiniLM fine-tuned on CoLA and on SST-2 as [study](study.md) does it, a quarter of its kernels kept by
default with importance from 512 train rows, and healed on 10,000 sentences of train rows, without their labels (CoLA
has 8,551); the score on the whole of dev. These rows, and those of the bytes, are of a default that saw 30,000 texts;
the others, and today's, see 40,000.

DIR holds STS-B's, SST-2's and CoLA's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import bert_adapter
from benchmarks.candidates import measured, separate
from benchmarks.study import TASKS, add_cache, chosen, prepared, rows_of
from benchmarks.tables import Row, arguments, at_most, bar, conclude, keep, kept_in, markdown, read, row, with_error
from benchmarks.timing import Measured
from bert_adapter.evaluate import compare, embed
from bert_adapter.model import Model
from bert_adapter.outputs.sentences import unit_rows
from bert_adapter.signals import DEFAULT
from bert_adapter.text import LabelledTexts

BARS = {0.5: (0.866, 0.97), 0.25: (0.860, 0.93), 0.1: (0.835, 0.85)}  # the least Spearman and cosine, healed
FOUND = {0.5: 0.98, 0.25: 0.95}  # the least recall and nDCG, healed, of dense
LIKE, NEAREST = 4.0, 10  # the label of a pair whose sentences are to find each other, and among how many
SECONDS = 600.0
KERNELS, BYTES = "kernels", "bytes"
SMALLEST = (0.05,)  # of the bytes
WHOLE = (KERNELS, 1.0)
SOURCES = ("STS-B", "SST-2")
SCORES = {"spearman": "Spearman", "cosine": "mean cosine to dense", "recall": "recall", "ndcg": "nDCG"}
DENSE, BEFORE, HEALED = "dense", "compressed", "healed"
EMBEDDER = "STS-B"  # the problem of its rows; those of classifiers are their tasks
CLASSIFIERS = {"CoLA": 0.005, "SST-2": 0.003}  # and how much less than dense a quarter, healed, may score
QUARTER = 0.25


def texts_of(rows: LabelledTexts, count: int, seed: int) -> list[str]:
    """So many of the rows' texts, drawn once for a seed."""
    texts = rows.texts if isinstance(rows.texts[0], str) else separate(rows)
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:count]]


class Texts:
    """The rows of GLUE, read once."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.rows = {(task, split): rows_of(task, split, folder) for task in SOURCES for split in ("train", "dev")}
        self.share = 100 if quick else 1  # a quick run has one row of so many

    def train(self, seed: int) -> list[str]:
        """What is healed on."""
        return [text for task in SOURCES for text in texts_of(self.rows[task, "train"], 5000 // self.share, seed)]

    def held(self) -> list[str]:
        """What cosines are of: all of SST-2's dev rows, and as many of STS-B's as make 2,000."""
        sst = texts_of(self.rows["SST-2", "dev"], 872 // self.share, 0)
        return sst + texts_of(self.rows["STS-B", "dev"], 2000 // self.share - len(sst), 0)

    def pairs(self, seed: int) -> LabelledTexts:
        """What the importance is measured on."""
        return chosen(self.rows["STS-B", "train"], 512 // self.share, seed)

    def dev(self) -> LabelledTexts:
        """What is scored."""
        return chosen(self.rows["STS-B", "dev"], None if self.share == 1 else 64, 0)


def retrieved(pairs: LabelledTexts, dense: Model, model: Model) -> dict[str, float]:
    """Recall and nDCG (Järvelin & Kekäläinen 2002) among the nearest in the dense index, of the model's queries."""
    index = sorted({text for pair in pairs.texts for text in pair})
    place = {text: number for number, text in enumerate(index)}
    wanted: dict[str, set[int]] = {}
    for (one, other), label in zip(pairs.texts, pairs.labels, strict=True):
        if label >= LIKE and one != other:
            wanted.setdefault(one, set()).add(place[other])
    units = [unit_rows(embed(each, texts)) for each, texts in ((model, list(wanted)), (dense, index))]
    nearness = units[0] @ units[1].T
    nearness[np.arange(len(wanted)), [place[text] for text in wanted]] = -np.inf
    gains, found = 1 / np.log2(np.arange(NEAREST) + 2), []
    for near, these in zip(np.argsort(-nearness, axis=1)[:, :NEAREST], wanted.values(), strict=True):
        hits = np.isin(near, list(these))
        found.append((hits.sum() / min(len(these), NEAREST), hits @ gains / gains[: len(these)].sum()))
    recall, ndcg = np.mean(found, axis=0)
    return {"recall": float(recall), "ndcg": float(ndcg)}


def scored(texts: Texts, dense: Model, model: Model, name: str, **more: Any) -> Row:
    """The row of a model; `more` are its seed and budget, and what healing cost."""
    cost = Measured(None, None, more.pop("seconds", None), None)
    spearman = bert_adapter.score(model, texts.dev())["spearman"]
    cosine = compare(embed(dense, texts.held()), embed(model, texts.held())).cosine
    found = retrieved(texts.dev(), dense, model)
    return row(EMBEDDER, name, None, "", cost, spearman=spearman, cosine=cosine, **found, **more)


def lines(texts: Texts, seeds: Iterable[int], sizes: list[tuple[str, float]], done: set[tuple]) -> Iterator[Row]:
    """The rows that are not done yet; a size is what a share is kept of, and the share."""
    from bert_adapter.demo import minilm

    dense = bert_adapter.load(minilm())
    if (EMBEDDER, DENSE, KERNELS, 1.0, 0) not in done:
        yield scored(texts, dense, dense, DENSE, budget=1.0, seed=0)
    for seed in seeds:
        left = [size for size in sizes if (EMBEDDER, HEALED, *size, seed) not in done]
        if not left:
            continue
        batches = bert_adapter.text_batches(dense, separate(texts.pairs(seed)))
        importance = None
        if any(of == KERNELS for of, _ in left):
            importance = bert_adapter.decompose(dense.params, measured(dense, batches, DEFAULT, seed))
        for of, budget in left:
            how: dict[str, Any] = {"importance": importance} if of == KERNELS else {"seed": seed}
            given = () if of == KERNELS else batches  # what a plan of bytes needs is measured for itself
            small, _ = bert_adapter.compress(dense, given, budget=budget, of=of, progress=False, **how)
            size: dict[str, Any] = {"budget": budget, "seed": seed} | ({} if of == KERNELS else {"of": of})
            if (EMBEDDER, BEFORE, of, budget, seed) not in done:
                yield scored(texts, dense, small, BEFORE, **size)
            small, gained = bert_adapter.heal(
                small, dense, bert_adapter.text_batches(dense, texts.train(seed)), seed=seed
            )
            print(f"  {gained}", flush=True)
            about = {"before": gained.before, "after": gained.after, "steps": gained.steps, "kept": gained.kept}
            yield scored(texts, dense, small, HEALED, seconds=gained.seconds, **size, **about)


def of_classifiers(options: argparse.Namespace, done: set[tuple]) -> Iterator[Row]:
    """The rows of fine-tuned classifiers that are not done yet."""
    for task, seed in ((task, seed) for task in CLASSIFIERS for seed in options.seeds):
        if (task, HEALED, KERNELS, QUARTER, seed) in done:
            continue
        bench = prepared(task, options)
        train = [chosen(bench.train, 64 if options.quick else count, seed).texts for count in (512, 10_000)]
        calibration, texts = (bert_adapter.text_batches(bench.dense, each) for each in train)

        def of(model: Model, name: str, about: dict[str, Any], bench: Any = bench) -> Row:
            cost = Measured(None, None, about.pop("seconds", None), None)
            score = bert_adapter.score(model, bench.dev, progress=False)[TASKS[bench.task].metric]
            return row(bench.task, name, None, "", cost, score=score, **about)

        small, _ = bert_adapter.compress(bench.dense, calibration, budget=QUARTER, seed=seed, progress=False)
        if (task, DENSE, KERNELS, 1.0, 0) not in done:
            done.add((task, DENSE, KERNELS, 1.0, 0))
            yield of(bench.dense, DENSE, {"budget": 1.0, "seed": 0})
        size = {"budget": QUARTER, "seed": seed}
        if (task, BEFORE, KERNELS, QUARTER, seed) not in done:
            yield of(small, BEFORE, dict(size))
        small, gained = bert_adapter.heal(small, bench.dense, texts, seed=seed)
        print(f"  {gained}", flush=True)
        yield of(small, HEALED, size | {"seconds": gained.seconds, "steps": gained.steps, "kept": gained.kept})


def size_of(line: Row) -> tuple[str, float]:
    """What a share was kept of, and the share."""
    return line.get("of", KERNELS), line["budget"]


def named(size: tuple[str, float]) -> str:
    """The size in words."""
    return f"{size[1]:.0%}" + (" of the bytes" if size[0] == BYTES else "")


def values(rows: list[Row], name: str, size: tuple[str, float], what: str) -> list[float]:
    """One for each seed."""
    return [line[what] for line in rows if (line["method"], size_of(line)) == (name, size)]


def sizes_of(rows: list[Row], of: str | None = None) -> list[tuple[str, float]]:
    """Those of the rows, the largest first, parameters before bytes."""
    found = {size_of(line) for line in rows if line["method"] != DENSE}
    return [size for size in sorted(found)[::-1] if of in (None, size[0])]


def report(rows: list[Row]) -> str:
    """The tables, and the bars."""
    every, rows = rows, [line for line in rows if line["problem"] == EMBEDDER]

    def cells_of(name: str, size: tuple[str, float]) -> list[Any]:
        scores = [values(rows, name, size, what) for what in SCORES]
        costs = [values(rows, name, size, what) if name == HEALED else [] for what in ("steps", "run_seconds")]
        return [named(size), name, *map(with_error, scores), *(with_error(each, 0) for each in costs), len(scores[0])]

    sizes = sizes_of(rows)
    cells = [cells_of(DENSE, WHOLE), *(cells_of(name, size) for size in sizes for name in (BEFORE, HEALED))]
    table = markdown(["kept", "", *SCORES.values(), "steps", "seconds", "seeds"], cells)
    found = [table, "", *(verdict for size in sizes for verdict in verdicts(rows, size))]
    return "\n".join([*found, *classified(every)])


def classified(rows: list[Row]) -> Iterator[str]:
    """The table of classifiers, and whether healing reaches what it is held to."""
    kept: dict[tuple[str, str], list[Row]] = {}
    for line in (line for line in rows if line["problem"] in CLASSIFIERS):
        kept.setdefault((line["problem"], line["method"]), []).append(line)
    if not kept:
        return
    cells = []
    for (task, name), found in kept.items():
        seconds = [line["run_seconds"] for line in found if name == HEALED]
        cells.append([task, name, with_error([line["score"] for line in found]), with_error(seconds, 0), len(found)])
    yield "\n" + markdown(["a quarter of the kernels", "", "score", "seconds", "seeds"], cells) + "\n"
    for task, less in CLASSIFIERS.items():
        dense, healed = ([line["score"] for line in kept.get((task, name), [])] for name in (DENSE, HEALED))
        if dense and healed:
            change = float(np.mean(healed) - np.mean(dense))
            yield bar(f"{task}, healed: score less dense, at least -{less}", change, change >= -less)


def verdicts(rows: list[Row], size: tuple[str, float]) -> Iterator[str]:
    """Whether healing reaches what it is held to."""
    of, budget = size
    for what, least in zip(("spearman", "cosine"), BARS.get(budget, ()) if of == KERNELS else (), strict=False):
        found = values(rows, HEALED, size, what)
        mean = float(np.mean(found)) if found else math.nan
        yield bar(f"{budget:.0%}, healed: {what} at least {least}", mean, mean >= least)
    for what in ("recall", "ndcg") if of == KERNELS and budget in FOUND else ():
        share = float(np.mean(values(rows, HEALED, size, what)) / np.mean(values(rows, DENSE, WHOLE, what)))
        yield bar(f"{budget:.0%}, healed: {what} at least {FOUND[budget]} of dense", share, share >= FOUND[budget])
    seconds = values(rows, HEALED, size, "run_seconds")
    yield at_most(f"{named(size)}: seconds of healing", max(seconds, default=None), SECONDS)


def draw(rows: list[Row], path: Path) -> None:
    """Both figures against what is kept, before and after."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [line for line in rows if line["problem"] == EMBEDDER]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, what in zip(axes, ("spearman", "cosine"), strict=True):
        for name in (BEFORE, HEALED):
            found = [(size[1], values(rows, name, size, what)) for size in sizes_of(rows, KERNELS)]
            means = [(budget, np.mean(each)) for budget, each in found if each]
            ax.plot(*np.array(means).reshape(-1, 2).T, marker="o", label=name)
        ax.axhline(np.mean(values(rows, DENSE, WHOLE, what)), color="black", linewidth=0.8, label=DENSE)
        ax.set(xlabel="share of the encoder kernels' parameters", ylabel=what)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("healing", __doc__, data="GLUE: STS-B and SST-2, train.tsv and dev.tsv")
    parser.add_argument("--budgets", type=float, nargs="+", default=tuple(BARS), help="shares kept (0.5 0.25 0.1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="(0 1 2)")
    parser.add_argument("--bytes", type=float, nargs="*", default=SMALLEST, help="shares of the bytes kept (0.05)")
    parser.add_argument("--only", choices=("embedder", "classifiers"), help="one of both (both)")
    add_cache(parser)
    options: argparse.Namespace = parser.parse_args(argv)
    file = kept_in(options, "healing")
    done = {(line["problem"], line["method"], *size_of(line), line["seed"]) for line in read(file)}
    sizes = [(KERNELS, each) for each in options.budgets] + [(BYTES, each) for each in options.bytes]
    embedder = lines(Texts(options.data, options.quick), options.seeds, sizes, done)
    parts = {"embedder": embedder, "classifiers": of_classifiers(options, done)}
    for line in itertools.chain(*(part for name, part in parts.items() if options.only in (None, name))):
        keep(file, line)
        scores = ", ".join(f"{line[what]:.4f}" for what in ("spearman", "cosine", "score") if what in line)
        print(f"  {line['problem']}, {line['method']}, {named(size_of(line))}: {scores}", flush=True)
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
