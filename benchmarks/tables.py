"""The rows of a benchmark as JSON lines and as Markdown, and the verdicts on its bars."""

import argparse
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Measured, environment
from bert_adapter.files import writing

Row = dict[str, Any]


def row(problem: str, method: str, loss: float | None, status: str, cost: Measured | None = None, **more: Any) -> Row:
    """One line of the machine-readable file; what is not known is None."""
    costs = cost._asdict() if cost else dict.fromkeys(Measured._fields)
    costs.pop("value")
    return {"problem": problem, "method": method, "loss": loss, "status": status} | costs | more


def not_installed(problem: str, method: str, fault: ImportError) -> Row:
    """The row of a peer that cannot be imported here."""
    print(f"  {method}: not installed ({fault})", flush=True)
    return row(problem, method, None, "not installed")


def with_gaps(rows: list[Row]) -> list[Row]:
    """The rows with the relative distance of each loss from the lowest of its problem."""
    best: dict[str, float] = {}
    for line in rows:
        if line["loss"] is not None:
            best[line["problem"]] = min(line["loss"], best.get(line["problem"], line["loss"]))
    lows = [min(best[line["problem"]], line.get("best_known") or float("inf")) for line in rows]
    return [
        line | {"best_known": low, "gap": None if line["loss"] is None else line["loss"] / low - 1}
        for line, low in zip(rows, lows, strict=True)
    ]


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table; None is an empty cell."""
    cells = ["| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *cells])


def number(value: float | None, form: str = ".3g") -> str:
    """The value with a few digits; nothing for None."""
    return "" if value is None else format(value, form)


def with_error(found: list[float], digits: int = 4) -> str:
    """The mean, and its standard error if there are several."""
    if not found:
        return ""
    error = f" ± {np.std(found, ddof=1) / math.sqrt(len(found)):.{digits}f}" if len(found) > 1 else ""
    return f"{np.mean(found):.{digits}f}{error}"


def bar(text: str, value: float | None, met: bool) -> str:
    """The verdict on one bar, with the number it rests on."""
    return f"bar: {text}: {'met' if met else 'NOT met'} ({number(value) or 'none'})"


def at_most(text: str, value: float | None, limit: float) -> str:
    """The verdict on a value that may not exceed a limit; None, a value never reached, exceeds all."""
    return bar(f"{text} at most {number(limit)}", value, value is not None and value <= limit)


def arguments(name: str, doc: str | None, data: str | None = None) -> argparse.ArgumentParser:
    """The parser of a script: --quick, --output, and --data where it reads any."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=doc, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="a tiny run that takes seconds and proves nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    if data:
        parser.add_argument("--data", type=Path, required=True, metavar="DIR", help=data)
    return parser


def write(
    options: argparse.Namespace,
    name: str,
    rows: list[Row],
    draw: Callable[[list[Row], Path], None] | None,
    doc: str | None = None,
    text: str = "",
) -> None:
    """The rows as JSON lines, each with device and versions, their figure, and a page with what the script printed.

    A quick run leaves results alone.
    """
    name = f"{name}-quick" if options.quick else name
    options.output.mkdir(parents=True, exist_ok=True)
    where = environment()
    lines = [json.dumps(line | where) + "\n" for line in rows]
    (options.output / f"{name}.jsonl").write_text("".join(lines))
    if draw is not None:
        draw(rows, options.output / f"{name}.png")
    write_page(options.output / f"{name}.md", doc, text)


def kept_in(options: argparse.Namespace, name: str) -> Path:
    """The file of a script that keeps every row when it is there, so that a run which was killed goes on."""
    options.output.mkdir(parents=True, exist_ok=True)
    return options.output / f"{name}{'-quick' * options.quick}.jsonl"


def read(file: Path) -> list[Row]:
    """The rows so far; half a line, from a run that was killed, counts for nothing."""
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return [json.loads(line) for line in whole]


def keep(file: Path, *rows: Row) -> None:
    """The file has these rows too, after whole ones."""
    lines = [*read(file), *(line | environment() for line in rows)]
    with writing(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def conclude(
    file: Path,
    report: Callable[[list[Row]], str],
    draw: Callable[[list[Row], Path], None] | None,
    doc: str | None,
) -> None:
    """What the rows that were kept say is printed, drawn and written to a page."""
    rows = read(file)
    text = report(rows)
    print("\n" + text)
    if draw is not None:
        draw(rows, file.with_suffix(".png"))
    write_page(file.with_suffix(".md"), doc, text)


def write_page(path: Path, doc: str | None, text: str) -> None:
    """A page of results: the script's question, its command, its notes, what it printed, and its figure.

    path: NAME.md, beside NAME.jsonl and, if there is one, NAME.png. doc: of the script.
    """
    question, _, notes = (doc or "").strip().partition("\n")
    name = path.stem
    lines = [re.sub("^bar: ", "* ", line) for line in text.strip().splitlines()]
    spaced = [
        f"\n{line}" if line.startswith("* ") and before and not before.startswith("* ") else line
        for before, line in zip(["", *lines], lines, strict=False)
    ]
    rows = f"Rows: [{name}.jsonl]({name}.jsonl)"
    figure = f"![{question}]({name}.png)" if path.with_suffix(".png").exists() else ""
    taken = {"MODEL": " --model MODEL", "DIR": " --data DIR"}
    command = f"    python -m benchmarks.{name}" + "".join(taken[what] for what in taken if f"{what} holds" in notes)
    parts = [f"# {name}", f"*{question}*", command, notes.strip(), "\n".join(spaced)]
    path.write_text("\n\n".join(part for part in [*parts, figure, rows] if part) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes every page of results again, from the rows that its script left and with the script's present notes."""
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    for file in sorted(parser.parse_args(argv).folder.glob("*.jsonl")):
        script = importlib.import_module(f"benchmarks.{file.stem}")
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if len(row) > len(environment())]
        write_page(file.with_suffix(".md"), script.__doc__, script.report(rows))


if __name__ == "__main__":
    main()
