"""How many iterations does the simulation of Tuzhilina & Hastie (2021) take, and is the optimum theirs?

Their matrices (1000 x 100, planted rank 75, weights uniform on [0, 1]), float64, from zero, until the objective changes
by less than 1e-8 of itself, at most 300 iterations. Hard: rank k. Soft: half the squared error plus lambda times the
nuclear norm. The numbers beside ours are those that their R code takes. DIR holds `th_simulation.npz`: `M`, the target,
and `W`, the weights, as their `simulation.R` draws them with seed 123, saved from R: NumPy's generator gives other
numbers. Bars: fewer iterations than the Anderson of their code on all eight problems, the known optimum to 1e-6, and
for the penalised ones a certificate of that. The NumPy twins run on the problems of given rank; they need as many
iterations as the R code does.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wlra
from benchmarks import peers
from benchmarks.tables import Row, arguments, at_most, bar, markdown, row, write
from benchmarks.timing import Measured, measure, svd_seconds

HARD = {10: 11.6526069417, 25: 5.1671083173, 50: 0.878133788049, 75: 0.0367071485763}
SOFT = {150: 17.0718870237, 100: 13.9353332423, 30: 5.6187060956, 5: 1.0658846549}
THEIRS = {  # EM, Nesterov and Anderson of their code; 300 is its limit
    "hard 10": (152, 26, 30),
    "hard 25": (300, 89, 36),
    "hard 50": (300, 126, 138),
    "hard 75": (209, 134, 50),
    "soft 150": (14, 14, 8),
    "soft 100": (18, 15, 10),
    "soft 30": (38, 31, 16),
    "soft 5": (131, 87, 36),
}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "hard": {
        "em, published": {"method": "em", "projection": "svd", "scaling": "none"},
        "nesterov, published": {"method": "nesterov", "projection": "svd", "scaling": "none"},
        "anderson, published": {"method": "anderson", "projection": "svd", "scaling": "none"},
        "als-anderson": {"method": "als-anderson"},
        "lbfgs": {"method": "lbfgs"},
        "newton": {"method": "newton"},
    },
    "soft": {
        "em, published": {"method": "em", "projection": "svd", "scaling": "none"},
        "nesterov, published": {"method": "nesterov", "projection": "svd", "scaling": "none"},
        "anderson, published": {"method": "anderson", "projection": "svd", "scaling": "none"},
        "anderson, longer steps": {"method": "anderson", "projection": "svd"},
    },
}
OURS = {"hard": "newton", "soft": "anderson, longer steps"}
RULE, LIMIT = 1e-8, 300


def iterations(losses: np.ndarray) -> int:
    """The first iteration that changed the objective by less than the rule's share; the limit if none did."""
    losses = losses[np.isfinite(losses)]
    small = np.flatnonzero(np.abs(np.diff(losses)) < RULE * losses[1:])
    return int(small[0]) + 1 if len(small) else LIMIT


def solve(W: np.ndarray, weights: np.ndarray, kind: str, size: int, options: dict[str, Any]) -> Measured:
    """The result for a rank or a lambda, from zero, and its cost."""
    rank = size if kind == "hard" else min(W.shape)
    zero = np.zeros((len(W), rank)), np.zeros((rank, W.shape[1]))
    penalty = {} if kind == "hard" else {"nuclear": float(size)}
    full = {"start": zero, "tol": 1e-9, "max_iters": LIMIT, "patience": 50}
    return measure(partial(wlra.solve, rank=rank, **full, **penalty, **options), W, weights, runs=1)


def twins(W: np.ndarray, weights: np.ndarray, size: int, cap: float) -> dict[str, tuple[Measured, np.ndarray]]:
    """The cost and the losses of the published iterations in NumPy for a rank, from zero."""
    runs = {}
    for name, iterate in peers.PUBLISHED.items():
        course = peers.course(iterate(W, weights, size, zero=True), W, weights, LIMIT, cap)
        last = min(iterations(course.loss), len(course.loss) - 1)
        runs[name] = Measured(None, None, float(course.seconds[last]), None), course.loss
    return runs


def by_problem(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each problem by method."""
    problems: dict[str, dict[str, Row]] = {}
    for line in rows:
        problems.setdefault(line["problem"], {})[line["method"]] = line
    return problems


def table(rows: list[Row]) -> str:
    """Iterations of all, and the optimum that ours ends in."""
    trios = {"NumPy": "{}, NumPy, published", "published, here": "{}, published"}
    single = ["als-anderson", "lbfgs", "newton", "anderson, longer steps"]
    lines = []
    for problem, mine in by_problem(rows).items():
        counts = {method: str(line["iterations"]) for method, line in mine.items()}
        three = [
            " / ".join(counts.get(name.format(base), "") for base in ("em", "nesterov", "anderson"))
            for name in trios.values()
        ]
        best = mine[OURS[problem.split()[0]]]
        certified = "" if best["gap"] is None else f"{best['gap']:.0e}"
        ours = [f"**{counts[name]}**" if name == best["method"] else counts.get(name) for name in single]
        end = [f"{best['loss']:.10f}", f"{abs(best['optimum_error']):.0e}", certified]
        lines.append([problem, " / ".join(map(str, THEIRS[problem])), *(t.strip(" /") for t in three), *ours, *end])
    head = ["problem", "R: EM / Nesterov / Anderson", *trios, *single]
    return markdown([*head, "objective / (np)", "from the optimum", "certified gap"], lines)


def verdicts(rows: list[Row]) -> list[str]:
    """What the best method of each kind is held against."""
    texts = []
    for problem, mine in by_problem(rows).items():
        best = mine[OURS[problem.split()[0]]]
        texts.append(at_most(f"{problem}: relative distance from the optimum", abs(best["optimum_error"]), 1e-6))
        if best["gap"] is not None:
            texts.append(at_most(f"{problem}: certified gap", best["gap"], 1e-6))
        fewer = best["iterations"] < THEIRS[problem][2]
        texts.append(bar(f"{problem}: fewer than their Anderson's {THEIRS[problem][2]}", best["iterations"], fewer))
    return texts


def report(rows: list[Row]) -> str:
    """The table and the bars, in Markdown."""
    return table(rows) + "\n\n" + "\n".join(verdicts(rows))


def draw(rows: list[Row], path: Path) -> None:
    """Iterations of each method on each problem."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(by_problem(rows))
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for method in dict.fromkeys(line["method"] for line in rows):
        points = [(problems.index(r["problem"]), r["iterations"]) for r in rows if r["method"] == method]
        best = method in OURS.values()
        marker = "*" if best else "x" if "NumPy" in method else "o"
        ax.plot(*zip(*points, strict=True), marker, ms=13 if best else 6, alpha=0.8, label=method)
    ax.plot(
        range(len(problems)), [THEIRS[problem][2] for problem in problems], "k_", ms=30, label="their Anderson in R"
    )
    ax.set(xticks=range(len(problems)), xticklabels=problems, yscale="log", ylabel="iterations")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("simulation", __doc__, data="folder of th_simulation.npz: M, the target, and W, the weights")
    options = parser.parse_args(argv)
    file = options.data / "th_simulation.npz"
    if not file.is_file():
        parser.error(f"--data must be a folder with th_simulation.npz; {file} is no file")
    with np.load(file) as arrays:
        W, weights = arrays["M"], arrays["W"]
    rows: list[Row] = []
    svd = svd_seconds(W)
    with jax.enable_x64(True):
        to_their_unit = float(np.sum(weights * W**2)) / 2 / W.size
        cases = [("hard", size, best) for size, best in HARD.items()] + [("soft", s, best) for s, best in SOFT.items()]
        for kind, size, optimum in cases[:: 7 if options.quick else 1]:
            for method, how in METHODS[kind].items():
                cost = solve(W, weights, kind, size, how)
                result = cost.value
                objective = float(result.loss) * to_their_unit
                taken = iterations(np.asarray(result.history.loss))
                gap = float(result.gap) if kind == "soft" else None
                status = wlra.Status(int(result.status)).name
                more = {"iterations": taken, "optimum_error": objective / optimum - 1, "gap": gap, "numpy_svd": svd}
                rows.append(row(f"{kind} {size}", method, objective, status, cost, **more))
                print(f"  {kind} {size}: {method}: {taken} iterations, {cost.run_seconds:.2f} s", flush=True)
            published = twins(W, weights, size, 1 if options.quick else 60) if kind == "hard" else {}
            for name, (cost, losses) in published.items():
                objective, taken = float(losses.min()) * to_their_unit, iterations(losses)
                more = {"iterations": taken, "optimum_error": objective / optimum - 1, "gap": None, "numpy_svd": svd}
                rows.append(row(f"{kind} {size}", name, objective, f"{len(losses) - 1} iterations", cost, **more))
    text = report(rows)
    print("\n" + text)
    write(options, "simulation", rows, draw, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
