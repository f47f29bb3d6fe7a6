"""Do planned ranks pay for a signal whose units are not the loss's?

all-MiniLM-L6-v2 as it comes, all kernels of its encoder, importance from 512 pairs of STS-B's train rows without their
labels; Spearman's correlation on the whole of dev, so that differences below 0.003 are noise, and half the squared
distance to the dense embeddings of some of dev's texts. Such a signal compares ranks of one kernel, and not kernels.
"Own share": what each kernel loses of its own weighted square, times its parameters, is what a plan keeps low; that is
what `compress` does. "As loss": the weighted squares of all kernels are added up as they are.
DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import bert_adapter
from benchmarks.candidates import Context, measured, prepared, with_leaves
from benchmarks.tables import Row, arguments, markdown, row, write
from benchmarks.timing import Measured
from bert_adapter.checkpoint.names import by_path
from bert_adapter.kernels import break_even
from bert_adapter.model import Model

BUDGETS = (0.25, 0.5, 0.75)
OWN = [name for name, signal in bert_adapter.SIGNALS.items() if signal.units == "own"]


def plans(name: str) -> dict[str, dict[str, Any]]:
    """By name, the options of `bert_adapter.plan`."""
    signal = bert_adapter.SIGNALS[name]
    return {
        "equal ranks": {"signal": signal, "uniform": True},
        "own share": {"signal": signal},
        "as loss": {"signal": signal._replace(units="loss")},
    }


def cut(dense: Model, largest: Mapping[str, Any], ranks: Mapping[str, int]) -> Model:
    """The dense model with products of the first components of factors, where a kernel has that many.

    The components of the closed forms are in order: those of a rank are the first of those of a larger one.
    """
    kernels = {
        f"{path}/kernel": np.asarray(largest[f"{path}/left"])[:, :rank] @ np.asarray(largest[f"{path}/right"])[:rank]
        for path, rank in ranks.items()
        if rank <= largest[f"{path}/left"].shape[1]
    }
    return with_leaves(dense, kernels)


def of_signal(context: Context, name: str) -> list[Row]:
    """The rows of a signal: for each budget and each way to plan, its score and its loss."""
    dense, shapes = context.dense, bert_adapter.select_kernels(context.dense)
    importance = measured(dense, context.batches, name) if bert_adapter.SIGNALS[name].statistics else None
    most = {path: math.ceil(break_even(shape)) - 1 for path, shape in shapes.items()}
    options = {"signal": name, "importance": importance, "progress": False}
    factors = by_path(bert_adapter.compress(dense, (), rank=most, **options)[0].params)
    rows = []
    for budget in BUDGETS:
        for plan, chosen in plans(name).items():
            began = time.perf_counter()
            found = bert_adapter.plan(dense.params, importance, budget, kernels=shapes, **chosen)
            model = cut(dense, factors, found.ranks)
            score = bert_adapter.score(model, context.dev)["spearman"]
            loss = bert_adapter.loss_increase(dense, model, context.held)
            cost = Measured(None, None, time.perf_counter() - began, None)
            rows.append(row("STS-B", f"{name}, {plan}", loss, "", cost, spearman=score, budget=budget))
            print(f"  {name}, {budget:.0%}, {plan}: {score:.4f}, {loss:.4f}", flush=True)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """A line for each way to plan, a panel for each signal."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(OWN), figsize=(9, 3), layout="constrained", sharey=True)
    for ax, name in zip(axes, OWN, strict=True):
        for plan in plans(name):
            lines = [line for line in rows if line["method"] == f"{name}, {plan}"]
            ax.plot([line["budget"] for line in lines], [line["spearman"] for line in lines], marker="o", label=plan)
        ax.set(title=name, xlabel="share of parameters kept")
    axes[0].set(ylabel="Spearman on STS-B's dev rows")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def report(rows: list[Row]) -> str:
    """The rows as a table in Markdown, Spearman and the loss of each signal and plan for each budget."""
    found = {(line["method"], line["budget"]): f"{line['spearman']:.4f} ({line['loss']:.3f})" for line in rows}
    methods = list(dict.fromkeys(line["method"] for line in rows))
    cells = [[method, *(found[method, budget] for budget in BUDGETS)] for method in methods]
    return markdown(["Spearman (loss)", *(f"{budget:.0%} kept" for budget in BUDGETS)], cells)


def main(argv: list[str] | None = None) -> None:
    options = arguments("units", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv").parse_args(argv)
    options.budget = 0.5
    context = prepared(options)
    rows = [line for name in OWN for line in of_signal(context, name)]
    text = report(rows)
    print("\n" + text)
    write(options, "units", rows, draw, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
