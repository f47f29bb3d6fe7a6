"""What a compression did, for the terminal and for programs."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_adapter.compressing import Report
from bert_adapter.evaluate import Fidelity
from bert_adapter.factorisation import KernelReport
from bert_adapter.files import write_text
from bert_adapter.tables import Tokens


def summary(report: Report) -> str:
    """One paragraph: parameters before and after, what that is predicted to cost, and what stays dense."""
    before, after = report.parameters_before, report.parameters_after
    text = (
        f"{len(report.kernels)} kernels, {before:,} parameters, became {after:,} ({after / before:.1%}) "
        f"by method {report.method!r} with signal {report.signal!r} in {sum(report.seconds.values()):.0f} s."
    )
    if report.predicted is not None:
        text += f" The mean loss is predicted to rise by {report.predicted:.3g}, to second order."
    if report.dtypes:
        counts = Counter(report.dtypes.values())
        text += f" Stored in fewer bits: {', '.join(f'{count} as {name}' for name, count in sorted(counts.items()))}."
    for kernel in report.kernels:
        if kernel.path in report.tokens and kernel.status != "DENSE":
            text += f" {words_of(kernel, report.tokens[kernel.path])}"
    if report.dense:
        why = "since factors would not be smaller at the rank planned or given"
        text += f" {len(report.dense)} stay dense, {why}: {report.dense}."
    return text if report.healed is None else f"{text} {report.healed}"


def words_of(kernel: KernelReport, tokens: Tokens) -> str:
    """How much of a table was seen, and what is lost of the rest."""
    text = f"Of {kernel.path} the texts looked up {tokens.seen:,} of {tokens.rows:,} rows"
    if tokens.seen == tokens.rows:
        return f"{text}."
    seen, unseen = (float(lost[kernel.rank]) for lost in (tokens.lost_seen, tokens.lost_unseen))
    return f"{text}: they lose {seen:.1%} of their weighted square, the others {unseen:.1%} (prior {tokens.prior:.2g})."


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
    tokens = {path: {"seen": each.seen, "rows": each.rows, "prior": each.prior} for path, each in report.tokens.items()}
    healed = None if report.healed is None else report.healed._asdict()
    content: dict[str, Any] = report._asdict() | {"kernels": kernels, "tokens": tokens, "healed": healed}
    content |= {"fidelity": {name: value._asdict() for name, value in fidelities.items()}}
    write_text(path, json.dumps(content, indent=1))
