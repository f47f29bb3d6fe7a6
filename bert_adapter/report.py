"""What a compression did, for the terminal and for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_adapter.compressing import Report
from bert_adapter.evaluate import Fidelity
from bert_adapter.factorisation import KernelReport
from bert_adapter.files import write_text


def summary(report: Report) -> str:
    """One paragraph: parameters before and after, what that is predicted to cost, and what stays dense."""
    before, after = report.parameters_before, report.parameters_after
    text = (
        f"{len(report.kernels)} kernels, {before:,} parameters, became {after:,} ({after / before:.1%}) "
        f"by method {report.method!r} with signal {report.signal!r} in {sum(report.seconds.values()):.0f} s."
    )
    if report.predicted is not None:
        text += f" The mean loss is predicted to rise by {report.predicted:.3g}, to second order."
    if report.dense:
        why = "since factors would not be smaller at the rank planned or given"
        text += f" {len(report.dense)} stay dense, {why}: {report.dense}."
    return text if report.healed is None else f"{text} {report.healed}"


def kernel_table(report: Report) -> list[list[str]]:
    """A heading and a line of text cells for each kernel."""
    trusted = report.reliability
    methods = list(dict.fromkeys(name for kernel in report.kernels for name in kernel.loss))
    known = ["reliability"] if trusted else []
    heading = ["kernel", "shape", "rank", "before", "after", *known, *methods, "iterations", "status", "seconds"]

    def line(kernel: KernelReport) -> list[str]:
        return [
            kernel.path,
            " by ".join(map(str, kernel.shape)),
            str(kernel.rank),
            f"{kernel.parameters_before:,}",
            f"{kernel.parameters_after:,}",
            *([f"{trusted[kernel.path]:.2f}"] if trusted else []),
            *(f"{kernel.loss[name]:.4f}" if name in kernel.loss else "" for name in methods),
            str(kernel.iterations),
            kernel.status,
            f"{kernel.seconds:.2f}",
        ]

    return [heading, *map(line, report.kernels)]


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
    kernels = [kernel._asdict() for kernel in report.kernels]
    healed = None if report.healed is None else report.healed._asdict()
    content: dict[str, Any] = report._asdict() | {"kernels": kernels, "healed": healed}
    content |= {"fidelity": {name: value._asdict() for name, value in fidelities.items()}}
    write_text(path, json.dumps(content, indent=1))
