"""What a compression did, as a page with figures."""

import html
import importlib.util
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_adapter.compressing import Report
from bert_adapter.evaluate import Fidelity
from bert_adapter.factorisation import KernelReport
from bert_adapter.files import write_text
from bert_adapter.report import fidelity_table, kernel_table, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns keep their width and never wrap: a table that is too wide scrolls in its own box, and the page does not.
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .15rem .6rem; }
th { text-align: left; border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
td + td, th + th { text-align: right; } td, th { white-space: nowrap; }
.scroll { overflow-x: auto; margin: 1rem 0; } .kernels { font-size: 13px; }
.figure svg { width: 100%; min-width: 40rem; height: auto; }
"""


def check_drawing() -> None:
    """A ValueError if what draws the figures is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib, which is not installed: pip install matplotlib")


def loss_figure(kernels: list[KernelReport]) -> "Figure":
    """A panel for each kind of kernel: its loss by layer, a line for each method."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, dict[str, dict[int, float]]] = {}
    for kernel in kernels:
        layer, kind = place(kernel.path)
        for method, loss in kernel.loss.items():
            kinds.setdefault(kind, {}).setdefault(method, {})[layer] = loss
    columns = min(3, max(1, len(kinds)))
    lines = -(-max(1, len(kinds)) // columns)
    size = (10, 0.6 + 2.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, (kind, methods) in zip(axes.flat, kinds.items(), strict=False):
        for method, losses in methods.items():
            ax.plot(list(losses), list(losses.values()), marker="o", markersize=5, label=method)
        ax.set_title(kind, fontsize=12)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(kinds) :]:
        ax.set_axis_off()
    figure.supxlabel("layer", fontsize=12)
    figure.supylabel("relative weighted squared error", fontsize=12)
    if kinds:
        axes.flat[0].set_ylim(0, 1.08 * max(ax.dataLim.y1 for ax in axes.flat[: len(kinds)]))
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=11)
    return figure


def place(path: str) -> tuple[int, str]:
    """The number of a kernel's layer, 0 if it is in none, and what it is there: ".../layer/3/output/dense" is 3 and
    "output/dense"."""
    found = re.search(r"(?:^|[/_])(\d+)/(.+)$", path)
    return (int(found[1]), found[2]) if found else (0, path)


def convergence_figure(kernels: list[KernelReport], method: str) -> "Figure":
    """How much of the start's loss each kernel's iterations removed, against the iteration."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    for kernel in kernels:
        if kernel.history:
            ax.plot(np.array(kernel.history) / kernel.history[0] - 1, linewidth=0.8, alpha=0.7)
    ax.set_xlabel(f"iteration of {method}", fontsize=12)
    ax.set_ylabel("change of the loss since the start", fontsize=12)
    ax.grid(alpha=0.3)
    return figure


def fidelity_figure(fidelities: Mapping[str, Fidelity]) -> "Figure":
    """Both measures of fidelity by method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for ax, title, values in zip(axes, fidelity_table({})[0][1:], zip(*fidelities.values(), strict=True), strict=True):
        bars = ax.barh(list(fidelities), values, color="C0")
        ax.bar_label(bars, fmt="%.3f", padding=3)
        ax.set(title=title, xlim=(0, 1.2))
        ax.invert_yaxis()
    return figure


def write_page(
    path: Path, title: str, report: Report, *, fidelities: Mapping[str, Fidelity] | None = None, note: str = ""
) -> None:
    """`path` is a page with tables and figures that needs no other file; it is written whole or not at all."""
    import matplotlib

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(summary(report))}</p>", note]
    with matplotlib.rc_context({"backend": "agg", "svg.fonttype": "none", "font.size": 11}):
        if fidelities:
            parts += ["<h2>Fidelity</h2>", as_html(fidelity_table(fidelities)), as_svg(fidelity_figure(fidelities))]
        parts += ["<h2>Loss by kernel</h2>", as_svg(loss_figure(report.kernels))]
        if any(len(kernel.history) > 1 for kernel in report.kernels):
            parts += ["<h2>Convergence</h2>", as_svg(convergence_figure(report.kernels, report.method))]
    seconds = [["stage", "seconds"], *([name, f"{value:.1f}"] for name, value in report.seconds.items())]
    parts += ["<h2>Kernels</h2>", as_html(kernel_table(report), "scroll kernels")]
    parts += ["<h2>Seconds</h2>", as_html(seconds)]
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    write_text(path, head + "\n".join(parts))


def as_html(table: list[list[str]], kind: str = "scroll") -> str:
    """The table in a box of its own, which scrolls if the window is too narrow."""
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table]
    heading = cells[0].replace("<td>", "<th>").replace("</td>", "</th>")
    lines = "</tr><tr>".join([heading, *cells[1:]])
    return f'<div class="{kind}"><table><tr>{lines}</tr></table></div>'


def as_svg(figure: "Figure") -> str:
    """The figure in a box of its own, as text of the page."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return f'<div class="scroll figure">{buffer.getvalue()[buffer.getvalue().index("<svg") :]}</div>'
