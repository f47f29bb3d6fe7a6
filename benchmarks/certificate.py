"""What does it cost to make sure that a solve has converged?

Four kernels of all-MiniLM-L6-v2, weighted by Fisher information, at rank 75, and two problems of structure from motion
at rank 4, each solved with default options, with and without the look around the point where the solve would end. In
float32, compiled, medians of five runs. Where the status is MAX_ITERS, or where nearly all weights count and no
component bends, nothing is looked at. DIR holds lrmf, the problems of structure from motion.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax

import wlra
from benchmarks.problems import Case, fisher_cases, motion
from benchmarks.tables import Row, arguments, at_most, markdown, number, row, write
from benchmarks.timing import Measured, measure
from wlra import driver

METHODS = ("anderson", "als", "auto")
PRICE = 1.05  # the most that the look may take, in times without it


def without_look(problem: Any, state: Any, limits: Any) -> Any:
    """The state as it is, in place of `driver.confirm`."""
    return state


def solved(case: Case, method: str) -> Measured:
    """A solve that is compiled anew, and measured."""
    jax.clear_caches()
    solve = partial(wlra.solve, rank=case.rank, method=method)
    return measure(solve, case.W.astype("f4"), case.weights.astype("f4"))


def run(case: Case, method: str) -> list[Row]:
    """The rows of a problem and a method, with the look and without."""
    looked = solved(case, method)
    with mock.patch.object(driver, "confirm", without_look):
        trusted = solved(case, method)
    rows = []
    for name, cost in (("with", looked), ("without", trusted)):
        result = cost.value
        more = {"look": name, "iterations": int(result.iterations)}
        rows.append(row(case.name, method, float(result.loss), wlra.Status(int(result.status)).name, cost, **more))
    print(f"  {case.name}, {method}: {looked.run_seconds / trusted.run_seconds:.2f} times", flush=True)
    return rows


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """The rows with the look beside those without."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def report(rows: list[Row]) -> str:
    """A line for each problem and method in Markdown, and the bar."""
    lines = [
        [
            one["problem"],
            one["method"],
            one["status"],
            one["iterations"],
            number(one["loss"], ".6f"),
            number(1e3 * two["run_seconds"], ".0f"),
            number(one["run_seconds"] / two["run_seconds"], ".2f"),
            number(one["compile_seconds"] / two["compile_seconds"], ".2f"),
        ]
        for one, two in pairs(rows)
    ]
    head = ["problem", "method", "status", "iterations", "loss", "ms without", "time, in times without", "compiling"]
    times = [one["run_seconds"] / two["run_seconds"] for one, two in pairs(rows)]
    worst, middle = at_most("largest time", max(times), PRICE), at_most("median time", median(times), PRICE)
    return "\n\n".join([markdown(head, lines), f"{worst}\n{middle}"])


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each problem and method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    names = [f"{one['problem']}, {one['method']}" for one, _ in pairs(rows)]
    ax.barh(names, [one["run_seconds"] / two["run_seconds"] for one, two in pairs(rows)])
    ax.axvline(PRICE, color="black", linewidth=1)
    ax.invert_yaxis()
    ax.set(xlabel="time of a solve, in times without the look around")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = arguments("certificate", __doc__, data="the folder with lrmf").parse_args(argv)
    cases = motion(options.data) if options.quick else [*fisher_cases(), *motion(options.data)]
    methods = METHODS[:1] if options.quick else METHODS
    rows = [line for case in cases for method in methods for line in run(case, method)]
    text = report(rows)
    print("\n" + text)
    write(options, "certificate", rows, draw, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
