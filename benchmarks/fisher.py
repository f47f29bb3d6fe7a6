"""How fast is each method on a kernel of BERT-base's shape with weights like Fisher information?

768 x 3072, rank 150, float32, seeded (benchmarks/seeded.py). A time to a gap is that of a whole call with the fewest
iterations that reach it, start and scaling included, compiling apart. Best known: the lowest loss of all runs, among
them a long one in float64. Bars: within 0.5 % of the best known loss in less time than one SVD, within 0.1 % in less
than two; past the loss of the published Nesterov's 30 iterations in a tenth of their time; an iteration at most 1.5
times its three matrix products. What one iteration of anderson is made of is timed operation by operation, each a
program of its own, with operands in memory as in a solve; what is left of the whole iteration is copies, comparisons
and the loop. Peers in the same process: the published EM, Nesterov and Anderson in NumPy, FWSVD in
NumPy, scikit-learn's randomized SVD in separable scales, wv's alternating least squares.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wlra
from benchmarks import peers, seeded
from benchmarks.tables import Row, arguments, at_most, markdown, not_installed, number, row, with_gaps, write
from benchmarks.timing import Measured, compiled, measure, measure_host, median_of, svd_seconds
from wlra.linalg.gram import gram_inverse
from wlra.methods.accelerate import SLOTS
from wlra.problem import total

GAPS = (5e-3, 1e-3)
ITERATIONS = {"anderson": 60, "nesterov": 60, "em": 60, "lbfgs": 60, "auto": 60, "als": 3, "newton": 7}
TIMED = ("anderson", "nesterov", "lbfgs", "auto")  # to the gaps, each length a program of its own
CLOSED = ("svd", "fwsvd", "separable")
PIECE = "part of an iteration"
FULL = {"tol": 0.0, "patience": 10**6}


def products(m: int, n: int, rank: int) -> float:
    """The seconds of the three products of an iteration alone, the median of many runs."""
    rng = np.random.default_rng(1)
    left, right, G = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((m, rank), (rank, n), (m, n)))

    def three(left: Any, right: Any, G: Any) -> Any:
        return left @ right, G @ right.T, left.T @ G

    with jax.default_matmul_precision("highest"):
        return measure(three, left, right, G, runs=25).run_seconds


def pieces(W: Any, weights: Any, rank: int, runs: int) -> dict[str, float]:
    """The seconds of what an iteration of anderson computes, by name."""
    (m, n), rng = W.shape, np.random.default_rng(1)
    left, right, G = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((m, rank), (rank, n), (m, n)))
    change, window = (jnp.asarray(rng.normal(size=(*slots, rank * (m + n))), jnp.float32) for slots in ((), (SLOTS,)))
    square = jnp.eye(rank, dtype=jnp.float32)

    def residual(product: Any, W: Any, weights: Any) -> Any:
        weighted = weights * (W - product)
        return weighted, *(total(each) for each in (weighted * (W - product), weighted**2, weights * W**2))

    def correction(left: Any, right: Any) -> Any:
        return (left.T @ left) @ right, left @ square

    timed = {
        "left @ right": (jnp.matmul, left, right),
        "residual @ right'": (lambda G, right: G @ right.T, G, right),
        "left' @ residual": (lambda left, G: left.T @ G, left, G),
        "weighted residual, loss and norm": (residual, G, W, weights),
        "right @ right' and its inverse": (lambda right: gram_inverse(right @ right.T), right),
        "left' @ left and its inverse": (lambda left: gram_inverse(left.T @ left), left),
        "products with k x k": (correction, left, right),
        "window: a change put in, twice": (lambda a, b: (a.at[1].set(b), (2 * a).at[1].set(b)), window, change),
        "window: its products with two vectors": (lambda a, b: (a @ b, a @ (2 * b)), window, change),
        "window: combined": (lambda a, b: b - jnp.ones(SLOTS, a.dtype) @ a, window, change),
    }
    with jax.default_matmul_precision("highest"):
        return {name: measure(call, *arrays, runs=5 * runs).run_seconds for name, (call, *arrays) in timed.items()}


def per_iteration(W: Any, weights: Any, rank: int, method: str, start: Any, runs: int) -> float:
    """The seconds of one iteration: the difference between runs of 41 and of 1, the median of several pairs."""
    calls = []
    for iterations in (1, 41):
        solve = partial(wlra.solve, rank=rank, method=method, start=start, max_iters=iterations, **FULL)
        program, _, _ = compiled(solve, W, weights)
        jax.block_until_ready(program(W, weights))
        calls.append(partial(program, W, weights))
    return float(np.median([(median_of(calls[1], 1) - median_of(calls[0], 1)) / 40 for _ in range(runs)]))


def ours(W: np.ndarray, weights: np.ndarray, rank: int, runs: int, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """A row for each method with a full run, and the histories of those that are timed to the gaps."""
    rows, courses = [], {}
    arrays = jnp.asarray(W), jnp.asarray(weights)
    for method in (*CLOSED, *ITERATIONS):
        iterations = min(ITERATIONS.get(method, 1), 6 if quick else 10**6)
        solve = partial(wlra.solve, rank=rank, method=method, max_iters=iterations, **FULL)
        cost = measure(solve, *arrays, runs=1 if method in ("als", "newton") else runs)
        result = cost.value
        courses[method] = np.asarray(result.history.loss, float)
        label = method if method in CLOSED else f"{method}, {int(result.iterations)} iterations"
        rows.append(row("fisher", label, float(result.loss), wlra.Status(int(result.status)).name, cost))
        print(f"  {label:28s} loss {float(result.loss):.6f}  {cost.run_seconds:.3f} s", flush=True)
    return rows, courses


def others(W: np.ndarray, weights: np.ndarray, rank: int, quick: bool) -> tuple[list[Row], dict[str, peers.Course]]:
    """A row for each peer, and the courses of the published iterations."""
    rows, courses = [], {}
    steps = 3 if quick else 30
    for name, iterate in peers.PUBLISHED.items():
        run = peers.course(iterate(W, weights, rank), W, weights, steps, cap=600)
        courses[name] = run
        cost = Measured(None, None, float(run.seconds[-1]), None)
        rows.append(row("fisher", f"{name}, {steps} iterations", float(run.loss[-1]), "", cost))
        print(f"  {name:28s} loss {run.loss[-1]:.6f}  {run.seconds[-1]:.1f} s", flush=True)
    calls = {
        "fwsvd, NumPy": partial(peers.fwsvd, W, weights, rank),
        "randomized SVD, scikit-learn": partial(peers.randomized_svd, W, weights, rank),
        "wv.lower_rank, 1 sweep": partial(peers.wv, W, weights, rank, 1),
    }
    for name, call in calls.items():
        if quick and "wv" in name:
            continue
        try:
            cost = measure_host(call, runs=1)
        except ImportError as fault:
            rows.append(not_installed("fisher", name, fault))
            continue
        left, right = cost.value
        rows.append(row("fisher", name, peers.relative_loss(W, weights, left @ right), "", cost))
        print(f"  {name:28s} loss {rows[-1]['loss']:.6f}  {cost.run_seconds:.2f} s", flush=True)
    return rows, courses


def seconds_to(W: np.ndarray, weights: np.ndarray, rank: int, method: str, course: Any, goal: float, runs: int) -> Any:
    """The seconds of a whole call that reaches the goal, and its iterations; None if the course never does."""
    reached = np.flatnonzero(course <= goal)
    if not len(reached):
        return None
    iterations = max(int(reached[0]), 1)
    solve = partial(wlra.solve, rank=rank, method=method, max_iters=iterations, **FULL)
    return measure(solve, jnp.asarray(W), jnp.asarray(weights), runs=runs).run_seconds, iterations


def seconds_at(course: Any, total: float, early: tuple[float, int]) -> np.ndarray:
    """The seconds of a call that ends at each iterate of the course, from those of a long call and of a short one."""
    seconds, iterations = early
    each = (total - seconds) / (len(course) - 1 - iterations)
    return seconds + each * (np.arange(len(course)) - iterations)


def best_known(W: np.ndarray, weights: np.ndarray, rank: int, iterations: int) -> float:
    """The lowest loss of a long run in float64."""
    with jax.enable_x64(True):
        run = wlra.solve(W, weights, rank, tol=1e-8, max_iters=iterations, patience=100)
        return float(run.loss)


def draw(rows: list[Row], path: Path, lines: dict[str, tuple[Any, Any]], best: float, svd: float) -> None:
    """Gap to the best known loss against time, in SVDs of the same matrix."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (seconds, losses) in lines.items():
        style = "--" if "published" in name else "-"
        ax.plot(np.asarray(seconds) / svd, np.maximum(np.asarray(losses) / best - 1, 1e-6), style, label=name)
    for line in rows:
        if line["loss"] is not None and "iterations" not in line["method"]:
            ax.plot(line["run_seconds"] / svd, max(line["loss"] / best - 1, 1e-6), "x", label=line["method"])
    ax.set(
        xscale="log", yscale="log", xlabel="time, in numpy.linalg.svd of the same matrix", ylabel="gap to best known"
    )
    ax.axvline(1, color="gray", lw=0.8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def report(rows: list[Row]) -> str:
    """The runs, the times to the goals, the iterations in products, and the bars, in Markdown."""
    svd, best = rows[0]["numpy_svd"], rows[0]["best_known"]
    runs = [line for line in rows if line["loss"] is not None or line["status"] == "not installed"]
    whole = "one iteration of "
    each = {
        line["method"].removeprefix(whole): line["in_its_three_products"]
        for line in rows
        if line["method"].startswith(whole)
    }
    to = {
        method: {
            line["method"].partition(" to ")[2]: line for line in rows if line["method"].startswith(f"{method} to")
        }
        for method in TIMED
    }
    goals = [*(f"{gap:.1%}" for gap in GAPS), "Nesterov's 30"]
    head = ["method", "loss", "gap", "seconds", "in SVDs", "compile s", "peak MiB", "status"]
    cells = [[method, *(reached(found.get(goal), svd) for goal in goals)] for method, found in to.items()]
    parts = [
        f"One `numpy.linalg.svd`: {svd:.3f} s; best known loss {best:.6f}",
        markdown(head, [run_cells(line, svd) for line in runs]),
        markdown(["to", *goals], cells),
        markdown(["an iteration, in its three products"], [[f"{k}: {v:.2f}"] for k, v in each.items()]),
        of_pieces(rows, each["anderson"]),
        "\n".join(bars(rows, to, goals, each["anderson"])),
    ]
    return "\n\n".join(parts)


def in_products(seconds: dict[str, float], three: float, status: str) -> list[Row]:
    """A row for each, in times of an iteration's three products."""
    return [row("fisher", name, None, status, in_its_three_products=each / three) for name, each in seconds.items()]


def of_pieces(rows: list[Row], iteration: float) -> str:
    """What an iteration is made of, and what is left of it."""
    parts = {line["method"]: line["in_its_three_products"] for line in rows if line["status"] == PIECE}
    cells = [[name, f"{share:.2f}"] for name, share in parts.items()]
    together = sum(parts.values())
    cells += [["together", f"{together:.2f}"], ["left of an iteration", f"{iteration - together:.2f}"]]
    return markdown(["of one anderson iteration", "in its three products"], cells)


def run_cells(line: Row, svd: float) -> list[Any]:
    """One run, as the cells of its table."""
    peak, took = line["peak_bytes"], line["run_seconds"]
    cells = [number(line["loss"], ".6f"), number(line["gap"], ".1e"), number(took), number(took and took / svd)]
    mib = number(peak and peak / 2**20, ".0f")
    return [line["method"], *cells, number(line["compile_seconds"]), mib, line["status"]]


def reached(line: Row | None, svd: float) -> str:
    """The time to a goal, as a cell."""
    if line is None:
        return "never"
    return f"{line['run_seconds']:.3f} s = {line['run_seconds'] / svd:.2f} SVDs, {line['iterations']} iterations"


def bars(rows: list[Row], to: dict[str, dict[str, Row]], goals: list[str], products: float) -> list[str]:
    """What the solver is held against, and whether it got there."""

    def least(goal: str) -> float | None:
        return min((found[goal]["run_seconds"] for found in to.values() if goal in found), default=None)

    svd = rows[0]["numpy_svd"]
    half, tenth, passed = map(least, goals)
    nesterov = next(line["run_seconds"] for line in rows if line["method"].startswith("nesterov, NumPy, published"))
    return [
        at_most("time to 0.5 %, in SVDs,", half and half / svd, 1),
        at_most("time to 0.1 %, in SVDs,", tenth and tenth / svd, 2),
        at_most("time to pass the published Nesterov's 30 iterations, over theirs,", passed and passed / nesterov, 0.1),
        at_most("one anderson iteration over its three products", products, 1.5),
    ]


def main(argv: list[str] | None = None) -> None:
    options = arguments("fisher", __doc__).parse_args(argv)
    m, n, rank, runs = (48, 96, 8, 1) if options.quick else (768, 3072, 150, 5)
    W64, weights64 = seeded.fisher_like(m, n)
    W, weights = W64.astype(np.float32), weights64.astype(np.float32)
    svd = svd_seconds(W, runs)
    rows, courses = ours(W, weights, rank, runs, options.quick)
    best = min([best_known(W64, weights64, rank, 20 if options.quick else 400), *(float(r["loss"]) for r in rows)])
    theirs, published = others(W, weights, rank, options.quick)
    rows = with_gaps([line | {"best_known": best, "numpy_svd": svd} for line in rows + theirs])
    goals = {f"{gap:.1%}": best * (1 + gap) for gap in GAPS} | {
        "Nesterov's 30": published["nesterov, NumPy, published"].loss[-1]
    }
    to = {
        method: {
            name: seconds_to(W, weights, rank, method, courses[method], goal, runs) for name, goal in goals.items()
        }
        for method in TIMED
    }
    three = products(m, n, rank)
    pair = wlra.solve(W, weights, rank, method="separable")[:2]
    each = {method: per_iteration(W, weights, rank, method, pair, runs) for method in ("anderson", "em", "lbfgs")}
    rows += [
        row("fisher", f"{method} to {goal}", None, "", Measured(None, None, t[0], None), iterations=t[1], numpy_svd=svd)
        for method, found in to.items()
        for goal, t in found.items()
        if t
    ]
    rows += in_products({f"one iteration of {method}": seconds for method, seconds in each.items()}, three, "")
    rows += in_products(pieces(jnp.asarray(W), jnp.asarray(weights), rank, runs), three, PIECE)
    text = report(rows)
    print("\n" + text)
    totals = {method: next(r["run_seconds"] for r in rows if r["method"].startswith(method)) for method in TIMED}
    curves = {
        method: (seconds_at(courses[method], totals[method], to[method]["Nesterov's 30"]), courses[method])
        for method in TIMED
    } | {name: (run.seconds, run.loss) for name, run in published.items()}
    write(options, "fisher", rows, lambda rows, path: draw(rows, path, curves, best, svd), doc=__doc__, text=text)


if __name__ == "__main__":
    main()
