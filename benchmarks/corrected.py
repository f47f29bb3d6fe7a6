"""Do predicted losses that are corrected by measurement make better plans?

`corrected` cuts all kernels of a kind together as the budget's plan does, measures by how much the loss rises on 256
pairs of other train rows, and multiplies what is predicted for each of them by that over what was predicted; and once
more for the plan that this leads to.

all-MiniLM-L6-v2, or the embedder in the directory after `--model`, importance from 512 pairs of STS-B's train rows
without their labels. Shares are of the encoder kernels' parameters. "heads": with `pairs=True`, so that heads of
attention may keep fewer dimensions. Spearman is on the whole of dev, where .003 is noise; the cosine is the mean to the
dense embeddings; "measured" is how much the loss rises on 256 pairs of dev, half a squared distance to what the dense
model makes of a text.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

import bert_adapter
from benchmarks.candidates import OWN, Context, measured, name_of, others_of, prepared, separate, without_identities
from benchmarks.speed import kept_of
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, read, row
from bert_adapter.evaluate import embed
from bert_adapter.signals import DEFAULT

BUDGETS = (0.75, 0.5, 0.25, 0.15, 0.1)
PLAIN, CORRECTED = "as predicted", "corrected"
WAYS = (PLAIN, CORRECTED, f"{PLAIN}, heads", f"{CORRECTED}, heads")


def ratios(name: str, budget: float, plain: Any, fixed: Any) -> list[Row]:
    """By kind, what is measured over what is predicted."""
    kinds = {re.sub(r"\d+", "*", path): plain.examples[path] / fixed.examples[path] for path in plain.examples}
    return [row("ratio", kind, None, "", model=name, budget=budget, ratio=ratio) for kind, ratio in kinds.items()]


def scored(name: str, context: Context, probe: Any, known: Any, others: list[Any]) -> list[Row]:
    """The rows of all budgets and ways."""
    dense, rows = context.dense, []
    wanted = embed(dense, separate(context.dev))
    for budget, way in itertools.product(BUDGETS, WAYS):
        heads = way.endswith("heads")
        of = known if heads else without_identities(known, dense)
        if way.startswith(CORRECTED):
            plain, of = of, bert_adapter.corrected(probe if heads else dense, of, others, budget, progress=False)
            rows += ratios(name, budget, plain, of) if heads else []
        how: dict[str, Any] = {"importance": of, "budget": budget, "pairs": heads, "progress": False}
        small, report = bert_adapter.compress(dense, (), **how)
        model = bert_adapter.merge(small)
        risen = bert_adapter.loss_increase(dense, model, context.held, progress=False)
        scores = kept_of(embed(model, separate(context.dev)), wanted, context.dev.labels)
        about: Row = {"model": name, "budget": budget, "predicted": report.predicted}
        rows.append(row("score", way, risen, "") | about | scores)
        print(f"  {budget:.0%}, {way}: {scores['spearman']:.4f}, {scores['cosine']:.4f}", flush=True)
    return rows


def report(rows: list[Row]) -> str:
    """For each model, the scores, the ratios, and whether correcting wins."""
    parts = []
    for name in dict.fromkeys(line["model"] for line in rows):
        of = [line for line in rows if line["model"] == name]
        cells = [
            [
                f"{line['budget']:.0%}",
                line["method"],
                f"{line['predicted']:.3g}",
                f"{line['loss']:.3g}",
                f"{line['spearman']:.4f}",
                f"{line['cosine']:.4f}",
            ]
            for line in of
            if line["problem"] == "score"
        ]
        found = {(line["method"], line["budget"]): line["ratio"] for line in of if line["problem"] == "ratio"}
        kinds = [
            [kind, *(f"{found[kind, each]:.2f}" for each in BUDGETS)] for kind in dict.fromkeys(k for k, _ in found)
        ]
        head = ["kept", "plan", "predicted", "measured", "Spearman", "cosine"]
        parts += [
            f"**{name}**",
            markdown(head, cells),
            markdown(["measured over predicted", *(f"{budget:.0%}" for budget in BUDGETS)], kinds),
        ]
        parts.append("\n".join(verdicts(of)))
    return "\n\n".join(parts)


def verdicts(rows: list[Row]) -> list[str]:
    """What correcting gains."""
    found = {(line["budget"], line["method"]): line for line in rows if line["problem"] == "score"}
    lines = []
    for budget, end in itertools.product(BUDGETS, ("", ", heads")):
        if (budget, PLAIN + end) in found:
            plain, fixed = (found[budget, way + end] for way in (PLAIN, CORRECTED))
            for name in ("spearman", "cosine"):
                gap = fixed[name] - plain[name]
                lines.append(bar(f"{budget:.0%}{end}, {name} gained by correcting", gap, gap > 0))
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Spearman and the cosine against what is kept, a line for each way and model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(line["model"] for line in rows))
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 4 * len(names)), squeeze=False, layout="constrained")
    for line, name in zip(axes, names, strict=True):
        for ax, score in zip(line, ("spearman", "cosine"), strict=True):
            for way in WAYS:
                points = [each for each in rows if (each["model"], each["method"]) == (name, way)]
                x, y = ([each[key] for each in points] for key in ("budget", score))
                ax.plot(x, y, "o--" if way.endswith("heads") else "o-", label=way, markersize=4)
            ax.set(title=name, xlabel="share of the kernels' parameters", ylabel=score)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("corrected", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"the directory of an embedder ({OWN})")
    options: argparse.Namespace = parser.parse_args(argv)
    options.budget = max(BUDGETS)
    file, name = kept_in(options, "corrected"), name_of(options.model)
    if any(line["model"] == name for line in read(file)):
        raise SystemExit(f"{file} has {name} already: delete its lines to print it again")
    context = prepared(options, options.model)
    probe = bert_adapter.with_identities(context.dense)
    importance = measured(probe, context.batches, DEFAULT)
    plain = bert_adapter.decompose(probe.params, importance, progress=False)
    keep(file, *scored(name, context, probe, plain, others_of(context, options)))
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
