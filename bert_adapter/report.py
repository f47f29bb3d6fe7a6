"""What a compression did, for the terminal and for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_adapter.compression import Report
from bert_adapter.evaluate import Fidelity
from bert_adapter.files import write_text


def summary(report: Report) -> str:
    """One paragraph: parameters before and after, what that is predicted to cost, and what stays dense."""
    before, after = report.parameters_before, report.parameters_after
    text = (
        f"{len(report.rows)} kernels, {before:,} parameters, became {after:,} ({after / before:.1%}) "
        f"by {report.method} with importance {report.importance!r} in {sum(report.seconds.values()):.0f} s."
    )
    if report.predicted is not None and report.importance not in ("activation", "row", "none"):
        text += f" The mean loss is predicted to rise by {report.predicted:.3g}, to second order."
    if report.dense:
        text += f" {len(report.dense)} stay dense, since factors of their rank would not be smaller: {report.dense}."
    return text


def kernel_table(report: Report) -> list[list[str]]:
    """A heading and a line of text cells for each kernel."""
    rows, trusted = report.rows, report.reliability
    methods = list(dict.fromkeys(name for row in rows for name in row.loss))
    known = ["reliability"] if trusted else []
    heading = ["kernel", "shape", "rank", "before", "after", *known, *methods, "iterations", "status", "seconds"]
    return [heading] + [
        [
            row.path,
            " by ".join(map(str, row.shape)),
            str(row.rank),
            f"{row.parameters_before:,}",
            f"{row.parameters_after:,}",
            *([f"{trusted[row.path]:.2f}"] if trusted else []),
            *(f"{row.loss[name]:.4f}" if name in row.loss else "" for name in methods),
            str(row.iterations),
            row.status,
            f"{row.seconds:.2f}",
        ]
        for row in rows
    ]


def fidelity_table(fidelities: Mapping[str, Fidelity]) -> list[list[str]]:
    """A heading and a line of text cells for each method."""
    rows = [[name, f"{value.cosine:.3f}", f"{value.spearman:.3f}"] for name, value in fidelities.items()]
    return [["held-out texts", "mean cosine to dense", "Spearman of similarities"], *rows]


def as_text(table: list[list[str]]) -> str:
    """The table in columns, for a terminal or a file."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_json(path: Path, report: Report, fidelities: Mapping[str, Fidelity]) -> None:
    """`path` holds the same numbers for programs."""
    rows = [row._asdict() for row in report.rows]
    content: dict[str, Any] = report._asdict() | {"rows": rows}
    content |= {"fidelity": {name: value._asdict() for name, value in fidelities.items()}}
    write_text(path, json.dumps(content, indent=1))
