"""Solutions for many ranks or penalties, each started from the one before; and the rank that predicts best."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wlra import border
from wlra.linalg import Factors, balance
from wlra.scaling import scale_factors, separable, unscale_factors
from wlra.solve import Result, solve, solve_batch


class Selection(NamedTuple):
    """The rank whose solutions predict hidden entries best, and the errors that say so.

    `error` is sum weights (W - left @ right)**2 / sum weights W**2 over the entries hidden in each fold.
    """

    rank: int
    ranks: Int[np.ndarray, " r"]
    error: Float[np.ndarray, "r folds"]


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
      W, weights: as in `solve`.
      ranks: the ranks, as `solve_path(W, weights, [8, 16, 32])`. Factors are padded with zeros to the largest.
      rank: the bound of the rank, for a path of penalties.
      nuclear, ridge: the penalties, as `solve_path(W, weights, rank=32, nuclear=[100.0, 10.0, 1.0])`.
      options: of `solve`, but for start and restarts.

    Raises:
      ValueError: not exactly one of `ranks`, `nuclear` and `ridge` is given, or is empty; or `solve` does.
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
    W = border.check_target(W, batched=False)
    for refused in ("start", "restarts", "key"):
        if refused in options:
            raise ValueError(f"a path starts each solve from the one before: {refused} cannot be given")
    order = sorted(range(len(values)), key=lambda i: -values[i])
    results: dict[int, Result] = {}
    start = None
    for i in order:
        now = values[i] if rank is None else rank
        warm = {} if start is None else {"start": leading(W, weights, start, now)}
        results[i] = solve(W, weights, now, **({} if name == "ranks" else {name: values[i]}), **warm, **options)
        start = results[i]
    return stacked([results[i] for i in range(len(values))])


def select_rank(
    W: Any,
    weights: Any,
    ranks: Sequence[int],
    *,
    key: Array,
    folds: int = 5,
    chunk: int | None = None,
    **options: Any,
) -> Selection:
    """The rank with the least mean error on entries that the solver did not see.

    The entries of positive weight are dealt at random to the folds (Owen & Perry 2009, who hold out blocks; Wold 1978,
    entries); each fold is hidden once, as weights of zero, from solves of all ranks, all folds at a time.

    Args:
      W, weights: as in `solve`.
      ranks: the ranks to compare.
      key: of `jax.random`: deals the entries.
      folds: how many parts the entries are dealt to, at least 2.
      chunk: how many folds are solved at a time, all if None.
      options: of `solve_batch`, but for start.

    Raises:
      ValueError: an option cannot be used, or fewer entries have positive weight than there are folds.
    """
    W, folds = border.check_target(W, batched=False), border.check_count("folds", folds, 2)
    weights = border.check_weights(weights, W.shape)
    border.check_values(W, weights)
    candidates = sorted({border.check_rank(rank, W.shape) for rank in check_values("ranks", ranks)})
    seen = np.flatnonzero(np.asarray(weights > 0))
    if len(seen) < folds:
        raise ValueError(f"{folds} folds need as many entries of positive weight; got {len(seen)}")
    fold = np.full(W.size, -1)
    fold[np.asarray(jax.random.permutation(key, seen))] = np.arange(len(seen)) % folds
    hidden = jnp.asarray(fold.reshape(W.shape)[None] == np.arange(folds)[:, None, None])
    shown = jnp.where(hidden, 0, weights[None])
    targets = jnp.broadcast_to(W[None], hidden.shape)
    errors, start = {}, None
    for rank in reversed(candidates):
        warm = {} if start is None else {"start": leading(targets, shown, start, rank)}
        start = solve_batch(targets, shown, rank, chunk=chunk, **warm, **options)
        errors[rank] = np.asarray(hidden_error(W, weights, hidden, start.left, start.right))
    table = np.stack([errors[rank] for rank in candidates])
    return Selection(candidates[int(np.argmin(table.mean(axis=1)))], np.array(candidates), table)


@jax.jit
def hidden_error(W: Array, weights: Array, hidden: Array, left: Array, right: Array) -> Float[Array, " folds"]:
    """The weighted error on the hidden entries, relative to their size."""
    dtype = jnp.promote_types(left.dtype, jnp.float32)
    seen = jnp.where(hidden, weights[None], 0).astype(dtype)
    target = jnp.where(weights > 0, W, 0).astype(dtype)[None]
    product = jnp.matmul(left.astype(dtype), right.astype(dtype), precision="highest")
    return jnp.sum(seen * (target - product) ** 2, (1, 2)) / jnp.sum(seen * target**2, (1, 2))


def leading(W: Array, weights: Any, result: Result, rank: int) -> tuple[Array, Array]:
    """The leading components of a result, in variables that make the weights nearly equal."""
    weights = border.check_weights(weights, W.shape)
    return leading_arrays(weights, result.left, result.right, rank=border.check_rank(rank, W.shape))


@functools.partial(jax.jit, static_argnames="rank")
def leading_arrays(weights: Array, left: Array, right: Array, *, rank: int) -> tuple[Array, Array]:
    """The same for arrays, with a batch axis or without."""

    def one(weights: Array, left: Array, right: Array) -> tuple[Array, Array]:
        scales = separable(weights / jnp.max(weights))
        ordered = balance(scale_factors(Factors(left, right), scales))
        cut = unscale_factors(Factors(ordered.left[:, :rank], ordered.right[:rank]), scales)
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
