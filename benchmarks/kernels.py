"""How long do the 72 encoder kernels of a BERT-base take on this device, to within 0.1 % of the best known loss?

48 of 768 x 768, 12 of 768 x 3072 and 12 of 3072 x 768 at rank 256, seeded with weights like Fisher information
(benchmarks/seeded.py), float32 with products at full precision, a batch for each shape. Beside them: 72 times
jnp.linalg.svd on the same device, and the rate of a large product alone. Everything goes into one JSON file.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import wlra
from benchmarks import seeded
from benchmarks.tables import at_most, markdown, number
from benchmarks.timing import compiled, environment, median_of

GAP, LIMIT = 1e-3, 1.0  # converged to; seconds for all kernels
FULL = {"tol": 0.0, "patience": 10**6}


class Group(NamedTuple):
    """Kernels of one shape, and their weights."""

    count: int
    shape: tuple[int, int]
    W: Array
    weights: Array


def kernels(hidden: int, wide: int, layers: int) -> list[Group]:
    """The kernels of an encoder: four attention kernels and two of the feed-forward network in each layer."""
    shapes = [(4 * layers, (hidden, hidden)), (layers, (hidden, wide)), (layers, (wide, hidden))]
    groups, seed = [], 0
    for count, shape in shapes:
        pairs = [seeded.fisher_like(*shape, seed=seed + i) for i in range(count)]
        W, weights = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*pairs, strict=True))
        groups.append(Group(count, shape, W, weights))
        seed += count
    return groups


def iterations_to(history: Array, best: np.ndarray) -> int | None:
    """The first iteration at which every problem of a batch is within the gap; None if there is none."""
    lowest = np.minimum.accumulate(np.asarray(history), axis=1)
    within = np.flatnonzero((lowest <= best[:, None] * (1 + GAP)).all(axis=0))
    return max(int(within[0]), 1) if len(within) else None


def ceiling(size: int, runs: int) -> float:
    """The operations a second of a large float32 product at full precision."""
    square = jax.random.normal(jax.random.key(0), (size, size))
    with jax.default_matmul_precision("highest"):
        program, _, _ = compiled(lambda a: a @ a, square)
    jax.block_until_ready(program(square))
    return 2.0 * size**3 / median_of(lambda: program(square), runs)


def all_svds(groups: list[Group]) -> float:
    """The seconds of jnp.linalg.svd of every kernel, one after another, compiling apart."""

    def svd(W: Array) -> Any:
        return jnp.linalg.svd(W, full_matrices=False)

    programs = [compiled(svd, group.W[0])[0] for group in groups]
    for program, group in zip(programs, groups, strict=True):
        jax.block_until_ready(program(group.W[0]))
    return median_of(lambda: [program(W) for program, group in zip(programs, groups, strict=True) for W in group.W], 1)


def measured(group: Group, rank: int, method: str, *, longest: int, runs: int) -> tuple[Callable[[], Any], dict]:
    """A call that solves the kernels of one shape to within GAP of the longest run, and what it takes."""
    m, n = group.shape
    solve = partial(wlra.solve_batch, rank=rank, method=method, **FULL)
    course = jax.jit(partial(solve, max_iters=longest))(group.W, group.weights)
    best = np.asarray(course.loss, float)
    steps = iterations_to(course.history.loss, best)
    if steps is None:
        raise RuntimeError(f"the longest run of {longest} iterations has no iteration within {GAP} of its own end")
    program, compiling, peak = compiled(partial(solve, max_iters=steps), group.W, group.weights)
    result = jax.block_until_ready(program(group.W, group.weights))
    call = partial(program, group.W, group.weights)
    seconds = median_of(call, runs)
    print(f"  {group.count} of {m} x {n}: {steps} iterations, {seconds:.4f} s", flush=True)
    return call, {
        "kernels": group.count,
        "shape": [m, n],
        "iterations": steps,
        "worst_gap": float(np.max(np.asarray(result.loss, float) / best - 1)),
        "mean_loss": float(np.mean(result.loss)),
        "best_known": float(np.mean(best)),
        "status": sorted({wlra.Status(int(code)).name for code in np.ravel(result.status)}),
        "seconds": seconds,
        "compile_seconds": compiling,
        "peak_bytes": peak,
        "tflops": operations(group, rank, steps) / seconds / 1e12,
    }


def operations(group: Group, rank: int, steps: int) -> float:
    """Those of three products an iteration, for all kernels of the shape."""
    return 6.0 * group.count * group.shape[0] * group.shape[1] * rank * steps


def measure(hidden: int, wide: int, layers: int, *, rank: int, method: str, longest: int, runs: int) -> dict[str, Any]:
    """The one row."""
    groups = kernels(hidden, wide, layers)
    calls, shapes = zip(*(measured(group, rank, method, longest=longest, runs=runs) for group in groups), strict=True)
    total = median_of(lambda: [call() for call in calls], runs)
    work = sum(operations(group, rank, line["iterations"]) for group, line in zip(groups, shapes, strict=True))
    svds = all_svds(groups)
    highest = ceiling(max(wide, 256) if hidden < 768 else 8192, runs)
    return {
        "problem": f"{6 * layers} kernels of {hidden} x {hidden} and {hidden} x {wide}",
        "rank": rank,
        "method": method,
        "gap": GAP,
        "seconds": total,
        "svd_seconds": svds,
        "svds_over_seconds": svds / total,
        "tflops": work / total / 1e12,
        "ceiling_tflops": highest / 1e12,
        "share_of_ceiling": work / total / highest,
        "shapes": list(shapes),
    } | environment()


def report(line: dict[str, Any]) -> str:
    """The row in Markdown, and the verdict."""
    head = ["kernels", "shape", "iterations", "worst gap", "seconds", "TFLOP/s", "peak MiB", "compile s"]
    body = [
        [
            part["kernels"],
            "{} x {}".format(*part["shape"]),
            part["iterations"],
            number(part["worst_gap"], ".1e"),
            number(part["seconds"]),
            number(part["tflops"]),
            number((part["peak_bytes"] or 0) / 2**20, ".0f"),
            number(part["compile_seconds"]),
        ]
        for part in line["shapes"]
    ]
    summary = (
        f"{line['device']}: all in {number(line['seconds'])} s; the same number of `jnp.linalg.svd` in "
        f"{number(line['svd_seconds'])} s, {number(line['svds_over_seconds'])} times as long; "
        f"{number(line['tflops'])} of {number(line['ceiling_tflops'])} TFLOP/s"
    )
    verdict = at_most("seconds for all kernels", line["seconds"], LIMIT)
    return "\n\n".join([markdown(head, body), summary, verdict])


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="two layers of 24 and 48 at rank 8: proves nothing")
    parser.add_argument("--method", default="anderson", help="(%(default)s)")
    parser.add_argument("--longest", type=int, default=200, help="iterations to the best known loss (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs, of which the median counts (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("kernels.json"), help="file (%(default)s)")
    options = parser.parse_args(argv)
    hidden, wide, layers, rank = (24, 48, 2, 8) if options.quick else (768, 3072, 12, 256)
    how = {"rank": rank, "method": options.method, "longest": options.longest, "runs": options.runs}
    line = measure(hidden, wide, layers, **how)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(line, indent=1) + "\n")
    print("\n" + report(line))


if __name__ == "__main__":
    main()
