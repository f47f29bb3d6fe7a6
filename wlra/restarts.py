"""Random starts, for problems with many local minima."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wlra import border

ROUND = 5  # starts solved at a time


class Restarts(NamedTuple):
    """The distinct losses that random starts ended with, lowest first, and how many starts ended with each."""

    loss: Float[np.ndarray, " r"]
    count: Int[np.ndarray, " r"]


def random_starts(W: Array, weights: Any, rank: Any, count: int, key: Any) -> list[tuple[Array, Array]]:
    """Pairs (left, right) of normal entries, stacked in rounds; their products are as large as the target."""
    if key is None:
        raise ValueError("restarts are random: give key=jax.random.key(seed)")
    rank, weights = border.check_rank(rank, W.shape), border.check_weights(weights, W.shape)
    if border.is_traced(W) or border.is_traced(weights):
        raise ValueError("restarts stop at a loss found twice, which needs values: call outside of jit and vmap")
    dtype = jnp.float64 if jnp.float64 in (W.dtype, weights.dtype) else jnp.float32
    seen = (weights > 0) & jnp.isfinite(W)
    size = jnp.max(jnp.abs(jnp.where(seen, W, 0))).astype(dtype)
    mean = jnp.sqrt(jnp.mean((jnp.where(seen, W, 0) / jnp.where(size > 0, size, 1)) ** 2, where=seen))
    root = jnp.sqrt(size) * jnp.sqrt(mean.astype(dtype) / jnp.sqrt(rank))
    keys = jax.random.split(key, 2 * count)
    left = jax.vmap(lambda key: root * jax.random.normal(key, (W.shape[0], rank), dtype))(keys[:count])
    right = jax.vmap(lambda key: root * jax.random.normal(key, (rank, W.shape[1]), dtype))(keys[count:])
    return [(left[i : i + ROUND], right[i : i + ROUND]) for i in range(0, count, ROUND)]


def tally(losses: Float[np.ndarray, " r"], resolution: float) -> Restarts:
    """The losses, those within the relative resolution of one another taken for one.

    And those below the resolution's cube, eps in `solve`: of exact fits, only rounding errors are left.
    """
    ordered = np.sort(losses)
    apart = resolution * np.maximum(ordered[:-1], resolution**3)
    new = np.append(True, ordered[1:] > ordered[:-1] + apart)
    places = np.flatnonzero(new)
    return Restarts(ordered[places], np.diff(np.append(places, len(ordered))))
