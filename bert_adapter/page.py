"""What a compression did, as a page with figures."""

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_adapter.compression import Report
from bert_adapter.evaluate import Fidelity
from bert_adapter.factorisation import Row
from bert_adapter.files import write_text
from bert_adapter.report import fidelity_table, kernel_table, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .15rem .7rem; }
th { text-align: left; border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
td + td { text-align: right; } svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; font-size: 80%; }
"""


def loss_figure(rows: list[Row]) -> "Figure":
    """Every kernel's loss by method."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.loss]
    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(name for row in rows for name in row.loss):
        ax.plot([row.loss.get(name, np.nan) for row in rows], marker="o", markersize=3, linewidth=1, label=name)
    short = [row.path.replace("encoder/layer/", "").replace("attention/", "att/") for row in rows]
    ax.set_xticks(range(len(rows)), short, rotation=90, fontsize=7)
    ax.set_ylabel("relative weighted squared error")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def convergence_figure(rows: list[Row], method: str) -> "Figure":
    """How much of the start's loss each kernel's iterations removed, against the iteration."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    for row in rows:
        if row.history:
            ax.plot(np.array(row.history) / row.history[0] - 1, linewidth=0.8, alpha=0.7)
    ax.set(xlabel=f"iteration of {method}", ylabel="change of the loss since the start")
    ax.grid(alpha=0.3)
    return figure


def fidelity_figure(fidelities: Mapping[str, Fidelity]) -> "Figure":
    """Both measures of fidelity by method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for ax, title, values in zip(axes, fidelity_table({})[0][1:], zip(*fidelities.values(), strict=True), strict=True):
        bars = ax.barh(list(fidelities), values, color="C0")
        ax.bar_label(bars, fmt="%.3f", padding=3)
        ax.set(title=title, xlim=(0, 1.12))
        ax.invert_yaxis()
    return figure


def write_page(path: Path, title: str, report: Report, fidelities: Mapping[str, Fidelity], note: str = "") -> None:
    """`path` is a page with tables and figures that needs no other file; it is written whole or not at all."""
    import matplotlib

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(summary(report))}</p>", note]
    with matplotlib.rc_context({"backend": "agg", "svg.fonttype": "none"}):
        if fidelities:
            parts += ["<h2>Fidelity</h2>", as_html(fidelity_table(fidelities)), as_svg(fidelity_figure(fidelities))]
        parts += ["<h2>Loss by kernel</h2>", as_svg(loss_figure(report.rows))]
        if any(len(row.history) > 1 for row in report.rows):
            parts += ["<h2>Convergence</h2>", as_svg(convergence_figure(report.rows, report.method))]
    seconds = [["stage", "seconds"], *([name, f"{value:.1f}"] for name, value in report.seconds.items())]
    parts += ["<h2>Kernels</h2>", f"<div class=wide>{as_html(kernel_table(report))}</div>", as_html(seconds)]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text(path, head + "\n".join(parts))


def as_html(table: list[list[str]]) -> str:
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table]
    heading = cells[0].replace("<td>", "<th>").replace("</td>", "</th>")
    return "<table><tr>" + "</tr><tr>".join([heading, *cells[1:]]) + "</tr></table>"


def as_svg(figure: "Figure") -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
