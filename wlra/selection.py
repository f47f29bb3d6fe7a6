"""The rank that predicts hidden entries best."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wlra import checks
from wlra.api import solve_batch
from wlra.path import check_values, truncate
from wlra.problem import Factors


class Selection(NamedTuple):
    """The rank whose solutions predict hidden entries best, and the errors that say so.

    `error` is sum weights (W - left @ right)**2 / sum weights W**2 over the entries hidden in each fold.

    Example:
      >>> import numpy as np, wlra
      >>> selection = wlra.Selection(2, np.array([1, 2]), error=np.array([[0.5, 0.7], [0.1, 0.3]]))
      >>> selection.error.mean(axis=1)
      array([0.6, 0.2])
    """

    rank: int
    ranks: Int[np.ndarray, " r"]
    error: Float[np.ndarray, "r folds"]


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
      W, weights: dense, else as in `solve`.
      ranks: the ranks to compare.
      key: of `jax.random`: deals the entries.
      folds: how many parts the entries are dealt to, at least 2.
      chunk: how many folds are solved at a time, all if None.
      options: of `solve_batch`, but for start.

    Raises:
      ValueError: an option cannot be used, or fewer entries have positive weight than there are folds.

    Example:
      >>> import jax, numpy as np, wlra
      >>> rng = np.random.default_rng(0)
      >>> W = np.outer(rng.normal(size=12), rng.normal(size=10)) + 0.1 * rng.normal(size=(12, 10))
      >>> wlra.select_rank(W, None, [1, 2], key=jax.random.key(0)).rank
      1
    """
    W, folds = checks.check_target(checks.as_real(W, "W"), batched=False), checks.check_count("folds", folds, 2)
    weights = checks.check_weights(weights, W.shape)
    checks.check_values(W, weights)
    candidates = sorted({checks.check_rank(rank, W.shape) for rank in check_values("ranks", ranks)})
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
        warm = {} if start is None else {"start": truncate(targets, shown, start, rank)}
        start = solve_batch(targets, shown, rank, chunk=chunk, **warm, **options)
        errors[rank] = np.asarray(hidden_error(W, weights, hidden, Factors(start.left, start.right)))
    table = np.stack([errors[rank] for rank in candidates])
    return Selection(candidates[int(np.argmin(table.mean(axis=1)))], np.array(candidates), table)


@jax.jit
def hidden_error(W: Array, weights: Array, hidden: Array, factors: Factors) -> Float[Array, " folds"]:
    """The weighted error on the hidden entries, relative to their size."""
    left, right = factors
    dtype = jnp.promote_types(left.dtype, jnp.float32)
    seen = jnp.where(hidden, weights[None], 0).astype(dtype)
    target = jnp.where(weights > 0, W, 0).astype(dtype)[None]
    product = jnp.matmul(left.astype(dtype), right.astype(dtype), precision="highest")
    return jnp.sum(seen * (target - product) ** 2, (1, 2)) / jnp.sum(seen * target**2, (1, 2))
