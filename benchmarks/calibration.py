"""How much does it matter which texts the importance is measured on: how many, how long, and of what domain?

all-MiniLM-L6-v2, or the embedder in the directory after `--model`, as it comes, compressed by default to a share of its
encoder kernels' parameters. Texts are sentences of the train rows of STS-B, which the scores are of, or phrases of
SST-2: short as they are; or joined until they are as long as 128 tokens take; or half of them so; or such long ones by
`calibration_batches`, which cuts every other one to a span of 8 to 32 tokens. Spearman's correlation on the whole of
STS-B's dev rows, once each, so that differences below 0.003 are noise; and the increase of the loss, half the squared
distance to the dense embeddings, of sentences of dev and of such joined to 128 tokens. Every score is a line of JSON
when it is there: a run that was killed goes on where it stopped.

DIR holds STS-B's and SST-2's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bert_adapter
from benchmarks.candidates import OWN, measured, name_of, separate
from benchmarks.healing import texts_of
from benchmarks.study import chosen, rows_of
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, read, row
from benchmarks.timing import Measured
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.text import LabelledTexts

SHORT, LONG, MIXED, CUT = "short", "long", "half of them long", "long, every other one cut"
SOURCES = {"STS-B": "the same domain", "SST-2": "another domain"}
COUNT, COUNTS = 512, (64, 256, 1024, 4096)  # texts; the others of the same domain
LENGTH, WORDS = 128, 100  # tokens at most, and the words that take about as many
HELD = 256  # texts of each length that the loss is of
MOST = 0.01  # of what another length may cost


class Calibration(NamedTuple):
    """What the importance is measured on."""

    source: str
    kind: str
    count: int

    @property
    def about(self) -> str:
        """In words."""
        return f"{self.count} texts of {SOURCES[self.source]}, {self.kind}"


def calibrations() -> Iterator[Calibration]:
    """All that are tried, the default's first."""
    for source in SOURCES:
        for kind in (SHORT, LONG, MIXED, CUT):
            yield Calibration(source, kind, COUNT)
    for count in COUNTS:
        yield Calibration("STS-B", SHORT, count)


def joined(sentences: list[str], count: int) -> list[str]:
    """So many texts of WORDS words or a little more, of sentences that follow each other, from the first again."""
    texts, place = [], 0
    for _ in range(count):
        words: list[str] = []
        while len(words) < WORDS:
            words += sentences[place % len(sentences)].split()
            place += 1
        texts.append(" ".join(words))
    return texts


def texts_for(how: Calibration, rows: LabelledTexts, quick: bool) -> list[str]:
    """The texts of a calibration."""
    count = how.count // (64 if quick else 1)
    sentences = texts_of(rows, len(rows.texts) * 2, 0)
    if how.kind == SHORT:
        return sentences[:count]
    long = joined(sentences, count)
    return [*sentences[: count // 2], *long[count // 2 :]] if how.kind == MIXED else long


class Judged(NamedTuple):
    """What every model is scored on."""

    dense: Model
    dev: LabelledTexts
    held: dict[str, list[Any]]

    def row(self, name: str, small: Model, seconds: float, **more: Any) -> Row:
        """The row of a model."""
        losses = {kind: bert_adapter.loss_increase(self.dense, small, batches) for kind, batches in self.held.items()}
        spearman = bert_adapter.score(small, self.dev)["spearman"]
        cost = Measured(None, None, seconds, None)
        return row("STS-B", name, losses[SHORT], "", cost, loss_of_long=losses[LONG], spearman=spearman, **more)


def judged(dense: Model, options: argparse.Namespace) -> Judged:
    """The rows of dev, and some of its sentences, as they are and joined."""
    dev = chosen(rows_of("STS-B", "dev", options.data), 64 if options.quick else None, 0)
    sentences = separate(dev)
    held = {
        SHORT: sentences[: HELD if not options.quick else 8],
        LONG: joined(sentences, 4 if options.quick else HELD // 2),
    }
    batches = {kind: list(bert_adapter.text_batches(dense, texts, max_length=LENGTH)) for kind, texts in held.items()}
    return Judged(dense, dev, batches)


def report(rows: list[Row]) -> str:
    """The tables of each model and budget, with the bars."""
    parts = []
    for model, budget in dict.fromkeys((line["model"], line["budget"]) for line in rows):
        of = [line for line in rows if (line["model"], line["budget"]) == (model, budget)]
        cells = [
            [line["method"], *(f"{line[name]:.4f}" for name in ("spearman", "loss", "loss_of_long"))] for line in of
        ]
        head = [f"{model}, {budget:.0%} kept, calibrated on", "Spearman", "loss", "loss of long texts"]
        parts += [markdown(head, cells), "\n".join(verdicts(of))]
    return "\n\n".join(parts)


def verdicts(rows: list[Row]) -> Iterator[str]:
    """What texts of another length cost; as `calibration_batches` takes them, it is held against a bar."""
    found = {line["method"]: line["spearman"] for line in rows}
    short = found.get(Calibration("STS-B", SHORT, COUNT).about, math.nan)
    cost = {kind: short - found.get(Calibration("STS-B", kind, COUNT).about, math.nan) for kind in (LONG, MIXED, CUT)}
    what = f"long texts by calibration_batches cost a test of short ones at most {MOST}"
    yield bar(what, cost[CUT], cost[CUT] <= MOST)
    yield f"* as they are they cost {cost[LONG]:.4f}; half long and half short, {cost[MIXED]:.4f}"


def main(argv: list[str] | None = None) -> None:
    from bert_adapter.demo import minilm

    parser = arguments("calibration", __doc__, data="GLUE: STS-B and SST-2, train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"the directory of an embedder ({OWN})")
    parser.add_argument("--budget", type=float, default=0.25, help="share of parameters kept (%(default)s)")
    options = parser.parse_args(argv)
    file, model = kept_in(options, "calibration"), name_of(options.model)
    dense = bert_adapter.load(options.model or minilm())
    rows = {source: rows_of(source, "train", options.data) for source in SOURCES}
    judge = judged(dense, options)
    about: dict[str, Any] = {"model": model, "budget": options.budget}
    done = {line["method"] for line in read(file) if all(line[name] == value for name, value in about.items())}
    for how in calibrations():
        if how.about in done:
            continue
        began = time.perf_counter()
        made = bert_adapter.calibration_batches if how.kind == CUT else bert_adapter.text_batches
        batches = made(dense, texts_for(how, rows[how.source], options.quick), max_length=LENGTH)
        importance = measured(dense, batches, DEFAULT)
        small, _ = bert_adapter.compress(dense, (), importance=importance, budget=options.budget, progress=False)
        line = judge.row(how.about, small, time.perf_counter() - began, **about)
        keep(file, line)
        print(f"  {how.about}: {line['spearman']:.4f}, {line['loss']:.4f}, {line['loss_of_long']:.4f}", flush=True)
    conclude(file, report, None, __doc__)


if __name__ == "__main__":
    main()
