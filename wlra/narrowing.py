"""Results that were computed in float64 and go back in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wlra.certificate import WITHIN
from wlra.result import Result, Status
from wlra.sparse import entries_on_host, is_sparse, values

EXACT = 1e-10  # a loss that counts for nothing in float32
SOUND = (Status.CONVERGED, Status.CLOSED_FORM)


def narrowed(found: Any, target: Any, weights: Any, dtype: Any) -> Any:
    """What was found in float32, factors in the dtype. The loss of a result is that of the factors as returned.

    Where rounding them has raised it, nothing is said to have converged or is certified; where it is above that of zero
    then, and was not before, zero is returned.
    """
    rounded = jax.tree.map(narrow, found)
    if not isinstance(found, Result):
        return rounded
    rounded = rounded._replace(left=rounded.left.astype(dtype), right=rounded.right.astype(dtype))
    lost = loss_of(rounded, target, weights) - loss_of(found, target, weights)
    before, loss = np.asarray(found.loss), np.maximum(np.asarray(found.loss) + lost, 0)
    nothing = (loss > 1) & (before <= 1)
    raised = (loss > (1 + WITHIN) * before + EXACT) & np.isin(np.asarray(found.status), SOUND)
    left, right = (jnp.where(nothing[..., None, None], 0, factor) for factor in rounded[:2])
    return rounded._replace(
        left=left,
        right=right,
        loss=jnp.asarray(np.where(nothing, 1, loss), np.float32),
        gap=jnp.where(raised | nothing, jnp.inf, rounded.gap),
        status=jnp.where(raised, jnp.int32(Status.STALLED.value), rounded.status),
    )


def narrow(leaf: Any) -> Any:
    """A float64 array of JAX in float32."""
    double = isinstance(leaf, jax.Array) and leaf.dtype == jnp.float64
    return leaf.astype(jnp.float32) if double else leaf


def loss_of(result: Result, target: Any, weights: Any) -> Float[np.ndarray, "*b"]:
    """The weighted squared error over that of zero, in float64, in units in which no square overflows."""
    entries, weight = (np.asarray(values(matrix)).astype(np.float64) for matrix in (target, weights))
    left, right = (np.asarray(factor).astype(np.float64) for factor in result[:2])
    entries = np.where(weight > 0, entries, 0)
    axes = (-1,) if is_sparse(target) else (-2, -1)
    heaviest, size = (np.max(each, axis=axes, keepdims=True) for each in (weight, np.abs(entries)))
    shares, size = weight / heaviest, np.where(size > 0, size, 1)
    root = np.sqrt(size)[..., None] if is_sparse(target) else np.sqrt(size)
    left, right, entries = left / root, right / root, entries / size
    fit = entries_on_host(target, left, right)
    error, zero = (np.sum(shares * square, axis=axes) for square in ((entries - fit) ** 2, entries**2))
    return np.asarray(error / np.where(zero > 0, zero, 1))
