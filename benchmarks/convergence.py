"""How fast does each method converge on real Fisher weights, scaled and as published?

Four kernels of layer 0 of all-MiniLM-L6-v2 at rank 75, float32, each method for 60 iterations without an early stop.
Best known: the lowest loss that any method ever reached here, among them long runs in float64 from three starts.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wlra
import wlra.plot
from benchmarks.problems import Case, fisher_cases
from benchmarks.tables import write_page
from benchmarks.timing import environment, median_seconds

AT = (0, 1, 3, 5, 10, 20, 30, 60)
ITERS = max(AT)
PUBLISHED: dict[str, Any] = {"scaling": "none", "start": "svd", "projection": "svd"}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "fwsvd": {"method": "fwsvd"},
    "separable": {"method": "separable"},
    "em, published": {"method": "em"} | PUBLISHED,
    "nesterov, published": {"method": "nesterov"} | PUBLISHED,
    "anderson, published": {"method": "anderson"} | PUBLISHED,
    "em": {"method": "em"},
    "nesterov": {"method": "nesterov"},
    "anderson": {"method": "anderson"},
    "als": {"method": "als"},
}
FULL = {"tol": 0, "max_iters": ITERS, "patience": 10**6}


def best_known(case: Case, iters: int) -> float:
    """The lowest loss of long runs in float64."""
    with jax.enable_x64(True):
        solve = partial(
            wlra.solve,
            case.W.astype(float),
            case.weights.astype(float),
            case.rank,
            tol=1e-9,
            max_iters=iters,
            patience=200,
        )
        runs = [("anderson", "separable"), ("nesterov", "separable"), ("anderson", "fwsvd"), ("nesterov", "svd")]
        return min(float(solve(method=method, start=start).loss) for method, start in runs)


def run(case: Case, runs: int, long: int) -> list[dict[str, Any]]:
    """One row for each method, and one for a singular value decomposition by NumPy."""
    svd = median_seconds(lambda: np.linalg.svd(case.W, full_matrices=False), runs)
    rows = []
    for name, options in METHODS.items():
        solve: Callable[[], wlra.Result] = partial(wlra.solve, case.W, case.weights, case.rank, **options, **FULL)
        result = solve()
        seconds = median_seconds(solve, runs if options["method"] != "als" else 1)
        # What is not an iteration, mostly the SVD that starts it, is a closed form's whole time.
        iterations = int(result.iterations)
        rows.append(
            {
                "problem": case.name,
                "method": name,
                "loss": [float(value) for value in result.history.loss],
                "status": wlra.Status(int(result.status)).name,
                "seconds": seconds,
                "seconds_per_iteration": seconds / iterations if iterations else None,
                "numpy_svd_seconds": svd,
            }
        )
        print(f"  {name:20s} loss {float(result.loss):.5f}  {seconds:.2f} s", flush=True)
    best = min([best_known(case, long), *(min(row["loss"]) for row in rows)])
    return [row | {"best_known": best} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """A problem's rows in Markdown: losses by iteration, and times in SVDs of the same matrix by NumPy."""
    best, svd = rows[0]["best_known"], rows[0]["numpy_svd_seconds"]
    lines = [
        f"**{rows[0]['problem']}**, best known loss {best:.6f}; one `numpy.linalg.svd`: {svd * 1e3:.0f} ms",
        "",
        "| method | " + " | ".join(map(str, AT)) + " | an iteration, in SVDs | to 0.5 % | to 0.1 % |",
        "|---|" + "---|" * (len(AT) + 3),
    ]
    for row in rows:
        losses = [f"{row['loss'][i]:.5f}" if i < len(row["loss"]) else "" for i in AT]
        each = row["seconds_per_iteration"]
        cells = [row["method"], *losses, f"{each / svd:.2f}" if each else ""]
        lines.append(f"| {' | '.join([*cells, first(row, 5e-3), first(row, 1e-3)])} |")
    return "\n".join(lines)


def first(row: dict[str, Any], gap: float) -> str:
    """The first iteration whose loss is within the relative gap of the best known."""
    within = np.flatnonzero(np.array(row["loss"]) <= row["best_known"] * (1 + gap))
    return str(within[0]) if len(within) else "never"


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """What scaled Anderson is held against, and whether it got there."""
    anderson = next(row for row in rows if row["method"] == "anderson")
    published = min(row["loss"][-1] for row in rows if "published" in row["method"])
    near, nearer = first(anderson, 5e-3), first(anderson, 1e-3)
    after_one = anderson["loss"][1]
    verdicts = {
        f"within 0.5 % after {near} iterations (at most 10)": near != "never" and int(near) <= 10,
        f"within 0.1 % after {nearer} iterations (at most 30)": nearer != "never" and int(nearer) <= 30,
        f"{after_one:.5f} after one iteration, published methods {published:.5f} after {ITERS}": after_one < published,
    }
    return [f"{rows[0]['problem']}: {text}: {'met' if met else 'MISSED'}" for text, met in verdicts.items()]


def report(rows: list[dict[str, Any]]) -> str:
    """A table for each kernel, and the bars, in Markdown."""
    names = dict.fromkeys(row["problem"] for row in rows)
    groups = [[row for row in rows if row["problem"] == name] for name in names]
    verdicts = "\n".join(f"* {line}" for group in groups for line in bars(group))
    return "\n\n".join([*map(table, groups), verdicts])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Every problem's gaps to the best known loss by iteration."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex=True, sharey=True)
    for ax, name in zip(axes.flat, names, strict=True):
        chosen = [row for row in rows if row["problem"] == name]
        wlra.plot.convergence({row["method"]: row["loss"] for row in chosen}, chosen[0]["best_known"], ax)
        ax.set_title(name)
        ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.convergence", description=__doc__, formatter_class=formatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs, of which the median counts (%(default)s)")
    parser.add_argument("--long", type=int, default=600, help="iterations towards the best known loss (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in fisher_cases():
        print(f"{case.name} {case.W.shape}", flush=True)
        rows += run(case, options.runs, options.long)
        print(table(rows[-len(METHODS) :]), flush=True)
    lines = [json.dumps(environment()), *map(json.dumps, rows)]
    (options.output / "convergence.jsonl").write_text("\n".join(lines) + "\n")
    draw(rows, options.output / "convergence.png")
    write_page(options.output / "convergence.md", __doc__, report(rows))
    print(report(rows).rpartition("\n\n")[2])


if __name__ == "__main__":
    main()
