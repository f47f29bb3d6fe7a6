"""How soon is each method how near to the best known loss, for six kinds of weights?

A 256 x 256 target at rank 32 (half missing: 16). Times are medians of whole calls that stop at the gap, start and
scaling included; compiling is apart. float64, then float32 for what should need no more. Seconds, and in brackets the
same in SVDs of the target. Bars: the best method at least as fast as the best NumPy prototype known before this package
was written; `auto` at most 1.5 times as slow as the best fixed method. Weights without structure have many local
minima: gaps are given to the best of all methods and to each method's own. It takes a quarter of an hour.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wlra
from benchmarks import peers, seeded
from benchmarks.tables import Row, arguments, bar, markdown, number, row, with_gaps, write
from benchmarks.timing import Measured, compiled, median_of, svd_seconds, timed

GAPS = (1e-2, 1e-3, 1e-6, 1e-8)
ITERATIONS = {"nesterov": 1500, "anderson": 1500, "lbfgs": 1500, "als-anderson": 400, "newton": 150, "auto": 1500}
IN_FLOAT32 = ("anderson", "lbfgs", "newton")
PROTOTYPES = {  # seconds to 1e-3 (unstructured: 1e-2) and 1e-8 of the best NumPy prototype known, one thread
    "Fisher-like, 4 decades": (1e-3, 0.02, 0.19),
    "Fisher-like, 12 decades": (1e-3, 0.04, 0.41),
    "12 decades + lognormal noise": (1e-3, 0.76, 1.20),
    "unstructured, 6 decades": (1e-2, 2.3, 9.8),
    "half missing": (1e-3, 0.08, 0.31),
}


def course(W: Any, weights: Any, rank: int, method: str, iterations: int) -> tuple[Any, wlra.Result, float, int | None]:
    """The compiled solver as a function of the tolerance alone, its full run, compile seconds and peak memory."""
    solve = partial(wlra.solve, rank=rank, method=method, max_iters=iterations, patience=50)
    program, seconds, peak = compiled(
        lambda W, weights, tol: solve(W, weights, tol=tol), W, weights, jnp.zeros((), W.dtype)
    )
    call = partial(program, W, weights)
    return call, jax.block_until_ready(call(jnp.zeros((), W.dtype))), seconds, peak


def seconds_to(call: Any, full: wlra.Result, goal: float, runs: int) -> float | None:
    """The median seconds of a call that stops, by its tolerance, at a loss of at most the goal; None if none does.

    The tolerance is the least stationarity before the goal, so the call stops at the goal or later, never before.
    """
    losses, shares = np.asarray(full.history.loss, float), np.asarray(full.history.stationarity, float)
    reached = np.flatnonzero(losses <= goal)
    if not len(reached):
        return None
    first = reached[0]
    tol = shares[: first + 1].min()
    dtype = full.left.dtype
    for slack in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1):
        result = call(jnp.asarray(tol * slack, dtype))
        if float(result.loss) <= goal:
            return median_of(lambda slack=slack: call(jnp.asarray(tol * slack, dtype)), runs)
    return timed(lambda: call(jnp.zeros((), dtype)))[1]


def solve_family(
    name: str, W: np.ndarray, weights: np.ndarray, rank: int, runs: int, quick: bool, cap: float
) -> list[Row]:
    """Rows of all methods on one kind of weights."""
    svd = svd_seconds(W)
    runs_of: list[tuple[str, str, Any, wlra.Result, float, int | None]] = []
    for dtype, methods in (("float64", tuple(ITERATIONS)), ("float32", IN_FLOAT32)):
        for method in methods:
            iterations = min(ITERATIONS[method], 30) if quick else ITERATIONS[method]
            arrays = jnp.asarray(W, dtype), jnp.asarray(weights, dtype)
            runs_of.append((method, dtype, *course(*arrays, rank, method, iterations)))
    best = min(float(np.nanmin(full.history.loss)) for _, dtype, _, full, _, _ in runs_of if dtype == "float64")
    rows = []
    for method, dtype, call, full, compiling, peak in runs_of:
        own = float(np.min(full.history.loss))
        gaps = GAPS if dtype == "float64" else GAPS[:3]
        times = {f"{gap:.0e}": seconds_to(call, full, best * (1 + gap), runs) for gap in gaps}
        to_own = (
            {f"{gap:.0e}": seconds_to(call, full, own * (1 + gap), runs) for gap in gaps}
            if own > best * 1.0001
            else times
        )
        cost = Measured(None, compiling, timed(partial(call, jnp.zeros((), full.left.dtype)))[1], peak)
        label = method if dtype == "float64" else f"{method}, float32"
        status = wlra.Status(int(full.status)).name
        rows.append(row(name, label, own, status, cost, seconds_to=times, seconds_to_own=to_own, numpy_svd=svd))
        print(f"  {label:22s} loss {own:.9f}  " + "  ".join(f"{g} {number(t)} s" for g, t in times.items()), flush=True)
    for method, iterate in peers.PUBLISHED.items():
        run = peers.course(iterate(W, weights, rank), W, weights, 30 if quick else 10**6, cap)
        times = {f"{gap:.0e}": run.until(best * (1 + gap)) for gap in GAPS}
        lost = float(run.loss[np.isfinite(run.loss)].min())
        cost = Measured(None, None, float(run.seconds[-1]), None)
        rows.append(row(name, method, lost, f"{len(run.loss) - 1} iterations", cost, seconds_to=times, numpy_svd=svd))
        print(f"  {method:22s} loss {lost:.9f}", flush=True)
    return with_gaps(rows)


def table(rows: list[Row]) -> str:
    """One kind of weights: seconds to each gap, and in SVDs of the same matrix."""
    svd = rows[0]["numpy_svd"]
    lines = []
    for line in rows:
        cells = [line["seconds_to"].get(f"{gap:.0e}") for gap in GAPS]
        texts = [f"{t:.3f} ({t / svd:.1f})" if t is not None else "never" for t in cells]
        lines.append([line["method"], *texts, f"{line['loss']:.8f}", f"{max(line['gap'], 0):.0e}", line["status"]])
    head = ["method", *(f"{gap:.0e}" for gap in GAPS), "final loss", "its gap", "status"]
    return f"**{rows[0]['problem']}**, one `numpy.linalg.svd`: {svd * 1e3:.1f} ms\n\n" + markdown(head, lines)


def verdicts(rows: list[Row]) -> list[str]:
    """The bars of one kind of weights."""
    name, texts = rows[0]["problem"], []
    ours = [line for line in rows if "published" not in line["method"]]
    fixed = [line for line in ours if line["method"] != "auto" and "float32" not in line["method"]]
    auto = next(line for line in ours if line["method"] == "auto")

    def fastest(lines: list[Row], gap: float, key: str = "seconds_to") -> float | None:
        times = [line[key][f"{gap:.0e}"] for line in lines if line[key].get(f"{gap:.0e}") is not None]
        return min(times, default=None)

    if name in PROTOTYPES:
        gap, early, late = PROTOTYPES[name]
        for at, seconds in ((gap, early), (1e-8, late)):
            got = fastest(ours, at)
            ratio = None if got is None else got / seconds
            texts.append(
                bar(f"{name}: time to {at:.0e} over the best prototype's", ratio, ratio is not None and ratio <= 1)
            )
    for gap in (1e-3, 1e-6):
        best, took = fastest(fixed, gap), auto["seconds_to"].get(f"{gap:.0e}")
        if best is None and took is not None:
            texts.append(bar(f"{name}: auto gets to {gap:.0e} and no fixed method does, seconds", took, True))
            continue
        ratio = took / best if took is not None and best is not None else None
        texts.append(
            bar(f"{name}: auto over the best fixed method to {gap:.0e}, at most 1.5", ratio, (ratio or 9) <= 1.5)
        )
    single = [line["seconds_to"].get("1e-06") for line in rows if "float32" in line["method"]]
    reached = min((seconds for seconds in single if seconds is not None), default=None)
    texts.append(bar(f"{name}: float32 reaches 1e-6, seconds", reached, reached is not None))
    return texts


def report(rows: list[Row]) -> str:
    """A table and the bars for each kind of weights, in Markdown."""
    names = dict.fromkeys(line["problem"] for line in rows)
    groups = [[line for line in rows if line["problem"] == name] for name in names]
    return "\n\n".join(f"{table(group)}\n\n" + "\n".join(verdicts(group)) for group in groups)


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each kind of weights: gap against the seconds to it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(line["problem"] for line in rows))
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained", sharey=True)
    for ax, name in zip(axes.flat, names, strict=False):
        for line in rows:
            if line["problem"] != name or "float32" in line["method"]:
                continue
            points = [(t, float(gap)) for gap, t in line["seconds_to"].items() if t is not None]
            if points:
                style = "--" if "published" in line["method"] else "-"
                ax.plot(*zip(*points, strict=True), style, marker="o", label=line["method"])
        ax.set(title=name, xscale="log", yscale="log", xlabel="seconds", ylabel="gap to the best known loss")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("columns", __doc__)
    options = parser.parse_args(argv)
    n, runs, cap = (48, 1, 0.3) if options.quick else (256, 3, 10.0)
    rows: list[Row] = []
    with jax.enable_x64(True):
        W, kinds = seeded.families(n)
        for name, weights in kinds.items():
            rank = n // (16 if name == "half missing" else 8)
            print(f"{name}, rank {rank}", flush=True)
            rows += solve_family(name, W, weights, rank, runs, options.quick, cap)
    text = report(rows)
    print("\n" + text)
    write(options, "columns", rows, draw, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
