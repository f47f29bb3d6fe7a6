"""Is a general L-BFGS as good as the package's own, from the same start in the same scaled variables?

optax.lbfgs, with its zoom line search and as many pairs, beside method "lbfgs": two kinds of weights on a 256 x 256
target, float32. Seconds are medians of whole compiled runs, start included.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wlra
from benchmarks import seeded
from benchmarks.tables import Row, arguments, markdown, not_installed, row, with_gaps, write
from benchmarks.timing import measure
from wlra.linalg.decompose import balance, leading_components
from wlra.methods.lbfgs import PAIRS
from wlra.problem import Problem, loss
from wlra.scaling import equilibrate, scale

KINDS = {"Fisher-like, 4 decades": 8, "half missing": 16}  # the size over the rank


def by_optax(W: Any, weights: Any, rank: int, iterations: int) -> Any:
    """The losses of optax.lbfgs on both factors, in the variables and from the start of the package's own."""
    import optax

    with jax.default_matmul_precision("highest"):
        problem = scale(Problem(W, weights / jnp.max(weights)), equilibrate(weights / jnp.max(weights)))
        objective = partial(loss, problem)
        factors = balance(leading_components(problem.target, rank))
        optimiser = optax.lbfgs(memory_size=PAIRS)
        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
            factors, state = carry
            value, grad = value_and_grad(factors, state=state)
            updates, state = optimiser.update(grad, state, factors, value=value, grad=grad, value_fn=objective)
            return (optax.apply_updates(factors, updates), state), value

        _, losses = jax.lax.scan(step, (factors, optimiser.init(factors)), length=iterations)
    return losses


def ours(W: Any, weights: Any, rank: int, iterations: int) -> Any:
    """The losses of method "lbfgs"."""
    return wlra.solve(W, weights, rank, method="lbfgs", max_iters=iterations, tol=0.0, patience=10**6).history.loss


def draw(rows: list[Row], path: Path) -> None:
    """Gap against seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, name in zip(axes, KINDS, strict=True):
        mine = [line for line in rows if line["problem"] == name and line["loss"] is not None]
        best = min(line["best_known"] for line in mine)
        for line in mine:
            course = np.array(line["course"])
            seconds = np.linspace(0, line["run_seconds"], len(course))
            ax.plot(seconds, np.maximum(course / best - 1, 1e-7), label=line["method"])
        ax.set(title=name, yscale="log", xlabel="seconds", ylabel="gap")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    options = arguments("quasi_newton", __doc__).parse_args(argv)
    n, lengths = (48, (5, 10)) if options.quick else (256, (20, 50, 100, 200))
    W, kinds = seeded.families(n)
    rows: list[Row] = []
    for name, share in KINDS.items():
        arrays = jnp.asarray(W, jnp.float32), jnp.asarray(kinds[name], jnp.float32)
        for method, run in (("lbfgs", ours), ("optax.lbfgs", by_optax)):
            for length in lengths:
                try:
                    cost = measure(partial(run, rank=n // share, iterations=length), *arrays, runs=3)
                except ImportError as fault:
                    rows.append(not_installed(name, method, fault))
                    break
                course = np.asarray(cost.value, float)
                rows.append(row(name, method, float(course.min()), "", cost, iterations=length, course=course.tolist()))
                print(
                    f"  {name}: {method}, {length} iterations: {course.min():.7f}, {cost.run_seconds:.3f} s", flush=True
                )
    rows = with_gaps(rows)
    text = report(rows)
    print("\n" + text)
    write(options, "quasi_newton", rows, draw, doc=__doc__, text=text)


def report(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    cells = [
        [
            r["problem"],
            r["method"],
            r["iterations"],
            f"{r['gap']:.1e}",
            f"{r['run_seconds']:.3f}",
            f"{r['compile_seconds']:.1f}",
        ]
        for r in rows
        if r["loss"] is not None
    ]
    return markdown(["weights", "method", "iterations", "gap", "seconds", "compile s"], cells)


if __name__ == "__main__":
    main()
