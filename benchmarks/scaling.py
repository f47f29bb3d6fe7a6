"""How do time and memory of an iteration of "anderson" grow with the matrix and with the batch?

Square matrices of rank an eighth of their side, at most 512, and batches of 768 x 768 at rank 64, all with weights like
Fisher information and from a random pair. The seconds of an iteration are the difference between a long and a short
solve over that of their lengths; exponents are least-squares slopes between logarithms. On a CPU, set
OPENBLAS_NUM_THREADS=1: where LAPACK's threads and XLA's share the cores, batches take far longer to start.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import wlra
from benchmarks.tables import Row, arguments, at_most, markdown, number, row, write_page
from benchmarks.timing import environment, measure

SIZES, LARGEST_RANK = (256, 512, 1024, 2048, 4096, 8192), 512
BATCHES, CHUNKS, SIDE, RANK = (1, 8, 24, 72), (1, 8), 768, 64
WORK = 2e11  # operations that the iterations of a long solve may take, but for the three that it has at least


@partial(jax.jit, static_argnames=("shape", "rank"))
def problem(key: Array, shape: tuple[int, ...], rank: int) -> tuple[Array, Array, tuple[Array, Array]]:
    """A target of the rank and noise, weights exp(1.5 a_i + 1.5 b_j + 0.3 c_ij), and a random pair to start from."""
    *batch, m, n = shape
    shapes = [(m, rank), (rank, n), (m, n), (m, 1), (1, n), (m, n), (m, rank), (rank, n)]
    drawn = [jax.random.normal(key, (*batch, *s)) for key, s in zip(jax.random.split(key, 8), shapes, strict=True)]
    left, right, noise, a, b, c, *pair = drawn
    ones = jnp.ones(shape)
    weights = jnp.exp(1.5 * (a * ones) + 1.5 * (b * ones) + 0.3 * c)
    return left @ right / rank**0.5 + noise, weights, (pair[0] / rank**0.5, pair[1])


def per_iteration(solve: Any, arrays: tuple, operations: float, runs: int) -> Row:
    """What a long solve cost, and an iteration of it."""
    long = int(np.clip(WORK / operations, 2, 50)) + 1
    runs = runs if operations * long > WORK / 2 else 5 * runs
    costs = [
        measure(partial(solve, max_iters=length, tol=0, patience=10**6), *arrays, runs=runs) for length in (1, long)
    ]
    seconds = (costs[1].run_seconds - costs[0].run_seconds) / (long - 1)
    loss = float(np.mean(costs[1].value.loss))
    status = "/".join(sorted({wlra.Status(int(code)).name for code in np.ravel(costs[1].value.status)}))
    more = {"iterations": long, "seconds_per_iteration": seconds, "tflops": operations / seconds / 1e12}
    return row("", "anderson", loss, status, costs[1], **more)


def solve_pair(W: Array, weights: Array, pair: tuple[Array, Array], **options: Any) -> wlra.Result:
    return wlra.solve(W, weights, pair[0].shape[1], start=pair, **options)


def solve_pairs(W: Array, weights: Array, pair: tuple[Array, Array], **options: Any) -> wlra.Result:
    return wlra.solve_batch(W, weights, pair[0].shape[2], start=pair, **options)


def of_size(size: int, runs: int) -> Row:
    """The row of one square matrix."""
    rank = min(size // 8, LARGEST_RANK)
    arrays = problem(jax.random.key(size), (size, size), rank)
    cost = per_iteration(solve_pair, arrays, 6.0 * size * size * rank, runs)
    return cost | {"problem": f"{size} x {size}", "rank": rank, "batch": None, "chunk": None, "mnk": size * size * rank}


def of_batch(batch: int, chunk: int, side: int, rank: int, runs: int) -> Row:
    """The row of one batch."""
    arrays = problem(jax.random.key(0), (batch, side, side), rank)
    cost = per_iteration(partial(solve_pairs, chunk=chunk), arrays, 6.0 * batch * side * side * rank, runs)
    name = f"{batch} of {side} x {side}"
    return cost | {"problem": name, "rank": rank, "batch": batch, "chunk": chunk, "mnk": side * side * rank}


def exponent(x: list[float], y: list[float]) -> float | None:
    """The slope of log y against log x; None for less than two points."""
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0]) if len(set(x)) > 1 else None


def series(rows: list[Row]) -> dict[str, tuple[str, list[float], list[Row]]]:
    """By name, the rows that a line goes through: what grows along it, and how large that is."""
    sizes = [line for line in rows if line["batch"] is None]
    lines = {"one matrix": ("m n k", [line["mnk"] for line in sizes], sizes)}
    for chunk in CHUNKS:
        chosen = [line for line in rows if line["batch"] is not None and line["chunk"] == chunk]
        lines[f"batch, chunk={chunk}"] = "batch", [line["batch"] for line in chosen], chosen
    return lines


def apart(rows: list[Row]) -> float:
    """The largest relative difference between the losses of one batch in different chunks."""
    losses: dict[str, list[float]] = {}
    for line in rows:
        losses.setdefault(line["problem"], []).append(line["loss"])
    return max(max(values) / min(values) - 1 for values in losses.values())


def draw(rows: list[Row], path: Path) -> None:
    """Seconds and memory of an iteration, against the work of one matrix and against the batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for name, (unit, x, chosen) in series(rows).items():
        column = 0 if unit == "m n k" else 1
        for ax, key, label, scale in (
            (axes[0, column], "seconds_per_iteration", "seconds an iteration", 1),
            (axes[1, column], "peak_bytes", "peak memory, MiB", 2**-20),
        ):
            ax.loglog(x, [(line[key] or np.nan) * scale for line in chosen], "o-", label=name)
            ax.set(xlabel=unit, ylabel=label)
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(rows: list[Row]) -> str:
    """All rows, the exponents, and the verdicts, in Markdown."""
    head = ["problem", "rank", "chunk", "loss", "seconds an iteration", "TFLOP/s", "peak, MiB", "compile, s"]
    body = [
        [
            line["problem"],
            line["rank"],
            line["chunk"],
            f"{line['loss']:.6f}",
            number(line["seconds_per_iteration"]),
            number(line["tflops"]),
            number((line["peak_bytes"] or 0) / 2**20, ".0f"),
            number(line["compile_seconds"]),
        ]
        for line in rows
    ]
    slopes, verdicts = [], []
    for name, (unit, x, chosen) in series(rows).items():
        seconds = exponent(x, [line["seconds_per_iteration"] for line in chosen])
        memory = exponent(x, [line["peak_bytes"] or np.nan for line in chosen])
        slopes.append([name, unit, number(seconds, ".2f"), number(memory, ".2f")])
        if len(set(x)) > 1:
            verdicts.append(at_most(f"{name}: exponent of seconds in {unit}", seconds, 1.1))
            verdicts.append(at_most(f"{name}: exponent of peak memory in {unit}", memory, 1.1))
    verdicts.append(at_most("largest difference of a loss between chunks, relative,", apart(rows), 1e-5))
    exponents = markdown(["series", "against", "exponent of seconds", "exponent of memory"], slopes)
    return "\n\n".join([markdown(head, body), exponents, "\n".join(verdicts)])


def main(argv: list[str] | None = None) -> None:
    parser = arguments("scaling", __doc__)
    parser.add_argument("--largest", type=int, default=max(SIZES), metavar="N", help="largest side (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="timed runs, of which the median counts (%(default)s)")
    options = parser.parse_args(argv)
    largest = min(options.largest, 256) if options.quick else options.largest
    sizes, batches = [size for size in SIZES if size <= largest], BATCHES[: 2 if options.quick else None]
    if not sizes:
        parser.error(f"--largest must be at least {min(SIZES)}; got {largest}")
    side, rank = min(SIDE, largest), min(RANK, largest // 8)
    tasks = [partial(of_size, size, options.runs) for size in sizes]
    tasks += [partial(of_batch, b, c, side, rank, options.runs) for b in batches for c in CHUNKS if c <= b]
    name = "scaling-quick" if options.quick or largest < max(SIZES) else "scaling"
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (options.output / f"{name}.jsonl").open("w") as file:
        for task in tasks:
            rows.append(line := task())
            threads = {"openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS")}
            file.write(json.dumps(line | threads | environment()) + "\n")
            file.flush()
            print(f"  {line['problem']}: {line['seconds_per_iteration']:.3g} s an iteration", flush=True)
    draw(rows, options.output / f"{name}.png")
    print("\n" + report(rows))
    write_page(options.output / f"{name}.md", __doc__, report(rows))


if __name__ == "__main__":
    main()
