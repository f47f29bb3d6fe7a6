"""Solutions for many ranks or penalties, each started from the one before; and the rank that predicts best."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wlra import checks
from wlra.api import solve
from wlra.linalg.decompose import balance
from wlra.problem import Factors
from wlra.result import Result
from wlra.scaling import equilibrate, scale_factors, unscale_factors


def solve_path(
    W: Any,
    weights: Any,
    ranks: Sequence[int] | None = None,
    *,
    rank: int | None = None,
    nuclear: Sequence[float] | None = None,
    ridge: Sequence[float] | None = None,
    **options: Any,
) -> Result:
    """The results of `solve` for each rank, or for each penalty at one rank, stacked in the order given.

    Each is started from the solution before it, from the largest rank or penalty to the smallest: a smaller rank from
    the larger one cut to its leading components, in scaled variables (Mazumder, Hastie & Tibshirani 2010, sec. 5, for
    penalties).

    Args:
      W, weights: dense, else as in `solve`.
      ranks: the ranks, as `solve_path(W, weights, [8, 16, 32])`. Factors are padded with zeros to the largest.
      rank: the bound of the rank, for a path of penalties.
      nuclear, ridge: the penalties, as `solve_path(W, weights, rank=32, nuclear=[100.0, 10.0, 1.0])`.
      options: of `solve`, but for start, restarts and key.

    Raises:
      ValueError: not exactly one of `ranks`, `nuclear` and `ridge` is given, or is empty; or `solve` does.

    Example:
      >>> import numpy as np, wlra
      >>> W = np.diag([3.0, 2.0, 1.0])
      >>> [round(float(loss), 3) for loss in wlra.solve_path(W, None, [1, 2], method="als").loss]
      [0.357, 0.071]
    """
    given = {"ranks": ranks, "nuclear": nuclear, "ridge": ridge}
    names = [name for name, values in given.items() if values is not None]
    if len(names) != 1:
        raise ValueError(f"give one of ranks, nuclear and ridge; got {' and '.join(names) or 'none of them'}")
    name = names[0]
    values = check_values(name, given[name])
    if (name == "ranks") != (rank is None):
        wanted = "no rank next to ranks" if name == "ranks" else f"rank=..., the bound of the rank, next to {name}"
        raise ValueError(f"wanted {wanted}; got rank={rank!r}")
    W = checks.check_target(checks.as_real(W, "W"), batched=False)
    for refused in ("start", "restarts", "key"):
        if refused in options:
            raise ValueError(f"a path starts each solve from the one before: {refused} cannot be given")
    order = sorted(range(len(values)), key=lambda i: -values[i])
    results: dict[int, Result] = {}
    start = None
    for i in order:
        now = values[i] if rank is None else rank
        warm = {} if start is None else {"start": truncate(W, weights, start, now)}
        results[i] = solve(W, weights, now, **({} if name == "ranks" else {name: values[i]}), **warm, **options)
        start = results[i]
    return stacked([results[i] for i in range(len(values))])


def truncate(W: Array, weights: Any, result: Result, rank: int) -> tuple[Array, Array]:
    """The leading components of a result, in variables that make the weights nearly equal."""
    weights = checks.check_weights(weights, W.shape)
    return truncate_arrays(weights, result.left, result.right, rank=checks.check_rank(rank, W.shape))


@functools.partial(jax.jit, static_argnames="rank")
def truncate_arrays(weights: Array, left: Array, right: Array, *, rank: int) -> tuple[Array, Array]:
    """The same for arrays, with a batch axis or without."""

    def one(weights: Array, left: Array, right: Array) -> tuple[Array, Array]:
        scaling = equilibrate(weights / jnp.max(weights))
        ordered = balance(scale_factors(Factors(left, right), scaling))
        cut = unscale_factors(Factors(ordered.left[:, :rank], ordered.right[:rank]), scaling)
        return cut.left, cut.right

    dtype = jnp.promote_types(jnp.promote_types(weights.dtype, left.dtype), jnp.float32)
    arrays = tuple(array.astype(dtype) for array in (weights, left, right))
    with jax.default_matmul_precision("highest"):
        return jax.vmap(one)(*arrays) if left.ndim == 3 else one(*arrays)


def check_values(name: str, values: Any) -> list:
    """The values as a list that is not empty."""
    values = list(values)
    if not values:
        raise ValueError(f"{name} is empty: wanted at least one")
    return values


def stacked(results: list[Result]) -> Result:
    """The results with a leading axis, their factors padded with zeros to the largest rank."""
    rank = max(result.left.shape[1] for result in results)

    def padded(result: Result) -> Result:
        extra = rank - result.left.shape[1]
        return result._replace(
            left=jnp.pad(result.left, ((0, 0), (0, extra))), right=jnp.pad(result.right, ((0, extra), (0, 0)))
        )

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[padded(result) for result in results])
