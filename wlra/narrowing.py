"""Results in the dtype of the target: rounded to it, and zero where it does not hold their factors."""

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
UNUSABLE = (Status.INVALID_TARGET, Status.INVALID_WEIGHTS)


def as_dtype(result: Result, dtype: Any) -> Result:
    """The result with factors in the dtype. Where they are beyond it they are zero, whose loss is 1, and NONFINITE."""
    left, right = result.left.astype(dtype), result.right.astype(dtype)
    finite = jnp.isfinite(left).all(axis=(-2, -1)) & jnp.isfinite(right).all(axis=(-2, -1))
    for status in UNUSABLE:  # whose factors mean nothing
        finite |= result.status == status.value
    return result._replace(
        left=jnp.where(finite[..., None, None], left, 0),
        right=jnp.where(finite[..., None, None], right, 0),
        loss=jnp.where(finite, result.loss, 1),
        gap=jnp.where(finite, result.gap, jnp.inf),
        status=jnp.where(finite, result.status, jnp.int32(Status.NONFINITE.value)),
    )


def narrowed(found: Any, target: Any, weights: Any, dtype: Any) -> Any:
    """What was found in float32, factors in the dtype. The loss of a result is that of the factors as returned.

    Where rounding them has raised it, nothing is said to have converged or is certified; where it is above that of zero
    then, and was not before, zero is returned.
    """
    rounded = jax.tree.map(narrow, found)
    if not isinstance(found, Result):
        return rounded
    rounded = as_dtype(rounded, dtype)
    beyond = np.asarray(rounded.status) != np.asarray(found.status)
    lost = loss_of(rounded, target, weights) - loss_of(found, target, weights)
    before, loss = np.asarray(found.loss), np.maximum(np.asarray(found.loss) + lost, 0)
    nothing = beyond | ((loss > 1) & (before <= 1))
    raised = (loss > (1 + WITHIN) * before + EXACT) & np.isin(np.asarray(rounded.status), SOUND)
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
