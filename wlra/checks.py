"""What callers pass becomes arrays of the right shape and dtype, or a ValueError that says why not."""

import functools
import operator
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Bool, Float

from wlra.problem import Kronecker
from wlra.sparse import Matrix, Sparse, in_row_order, is_sparse, like, values

T = TypeVar("T")
POSITIVE = " where the weight is positive"


def check_target(W: Any, batched: bool) -> Array | Sparse:
    """`W` as a floating array with two axes, three if batched; a sparse one with its entries in order of row."""
    if isinstance(W, BCOO) and not batched:
        W = in_row_order(W, "W")
        return like(W, as_real(W.values, "W"))
    W = as_real(W, "W")
    wanted = "(batch, m, n)" if batched else "(m, n)"
    if W.ndim != 2 + batched or 0 in W.shape:
        raise ValueError(f"W must be a {wanted} array without empty axes; got shape {W.shape}")
    return W


def check_weights(weights: Any, shape: tuple[int, ...]) -> Array:
    """`weights` as a floating array of the given shape."""
    if weights is None:
        return jnp.ones(shape, jnp.float32)
    weights = as_real(weights, "weights")
    if weights.ndim == 1 and len(shape) == 2:
        raise ValueError(
            f"weights has one axis {weights.shape}, which could mean rows or columns: write weights[:, None] for one "
            f"weight per row of W {shape}, or weights[None, :] for one per column"
        )
    return check_broadcast(weights, shape, "weights")


def check_sparse_weights(weights: BCOO | None, W: Sparse) -> Matrix:
    """`weights` with the entries that `W` stores, in its order; 1 for each if None."""
    if weights is None:
        return like(W, jnp.ones_like(W.values))
    if weights.shape != W.shape:
        raise ValueError(f"weights must have the shape of W, {W.shape}; got {weights.shape}")
    ordered = in_row_order(weights, "weights")
    if len(ordered.values) != len(W.values):
        raise ValueError(f"weights must store the same {len(W.values)} entries as W; got {len(ordered.values)}")
    other = np.flatnonzero((np.asarray(ordered.rows) != W.rows) | (np.asarray(ordered.cols) != W.cols))
    if len(other):
        place, wanted = ((int(matrix.rows[other[0]]), int(matrix.cols[other[0]])) for matrix in (ordered, W))
        raise ValueError(f"weights must store the same entries as W; got one at {place} where W has {wanted}")
    return like(W, as_real(ordered.values, "weights"))


def check_kronecker(weights: Kronecker, shape: tuple[int, ...]) -> Kronecker:
    """Both factors as floating arrays (m, m) and (n, n), with the batch axis of the target if it has one."""
    *batch, m, n = shape
    row = check_broadcast(as_real(weights.row, "weights.row"), (*batch, m, m), "weights.row")
    return Kronecker(row, check_broadcast(as_real(weights.col, "weights.col"), (*batch, n, n), "weights.col"))


def check_rank(rank: Any, shape: tuple[int, ...]) -> int:
    """`rank` as an int in [1, min(m, n)]."""
    rank, limit = check_count("rank", rank, 1), min(shape[-2:])
    if rank > limit:
        raise ValueError(f"rank must be in [1, {limit}] for W of shape {shape}; got {rank}")
    return rank


def check_count(name: str, value: Any, least: int) -> int:
    """The value as an int that is at least `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer known before tracing; got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}; got {count}")
    return count


def check_name(name: str, value: Any, known: Collection[str]) -> str:
    """The value, if it is a known name."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return value


def eager(function: Callable[..., T]) -> Callable[..., T]:
    """The function computed while a caller traces: of arrays that are known, it may ask what they hold."""

    @functools.wraps(function)
    def known(*arguments: Any) -> T:
        with jax.ensure_compile_time_eval():
            return function(*arguments)

    return known


def check_tol(tol: Any) -> Any:
    """The tolerance, which bounds a ratio in [0, 1]."""
    if is_traced(tol):
        return tol
    if not (np.ndim(tol) == 0 and 0 <= float(tol) <= 1):
        raise ValueError(f"tol bounds the stationarity, a number in [0, 1]; got {tol!r}")
    return float(tol)


def check_penalty(ridge: Any, nuclear: Any) -> tuple[Any, str]:
    """The penalty and which of its two units it is in, "" if there is none."""
    if ridge is not None and nuclear is not None:
        raise ValueError(f"ridge and nuclear are one penalty in two units: give one; got {ridge!r} and {nuclear!r}")
    for name, value, limit, wanted in (("ridge", ridge, 1, "in [0, 1]"), ("nuclear", nuclear, np.inf, ">= 0")):
        if value is None or is_traced(value):
            continue
        if not (np.ndim(value) == 0 and 0 <= float(value) <= limit and np.isfinite(float(value))):
            raise ValueError(f"{name} must be a finite number {wanted}; got {value!r}")
    if ridge is not None:
        return ridge, "ridge"
    return (0.0, "") if nuclear is None else (nuclear, "nuclear")


def check_pair(start: Any, shape: tuple[int, ...], rank: int) -> tuple[Array, Array]:
    """A warm start as two finite floating arrays (m, rank) and (rank, n)."""
    *batch, m, n = shape
    if not isinstance(start, tuple | list) or len(start) != 2:
        raise ValueError(f"start must be the name of a closed form or a pair (left, right); got {type(start).__name__}")
    pair = []
    for name, value, wanted in (("left", start[0], (*batch, m, rank)), ("right", start[1], (*batch, rank, n))):
        value = as_real(value, f"start's {name}")
        if value.shape != wanted:
            raise ValueError(f"start's {name} must have shape {wanted}; got {value.shape}")
        if not is_traced(value):
            check_finite(f"start's {name}", value)
        pair.append(value)
    return pair[0], pair[1]


@eager
def check_finite(name: str, array: Array) -> None:
    """No entry is NaN or infinite."""
    report(name, array, ~jnp.isfinite(array), "NaN or infinite", wanted="finite values")


@eager
def check_values(W: Matrix | Array, weights: Matrix | Array) -> bool:
    """Whether the values are known to be fit to be solved: finite where they count, weights >= 0 and not all zero.

    Under a caller's own jit the values of what it traces are not known, and the solver's status says the same.

    Raises:
      ValueError: they are known and are not fit.
    """
    target, weight = values(W), values(weights)
    if is_traced(target) or is_traced(weight):
        return False
    target_bad, weights_bad, empty = faults(target, weight)
    if weights_bad.any():
        bad = ~(jnp.isfinite(weight) & (weight >= 0))
        report("weights", weights, bad, "NaN, infinite or negative", wanted="weights >= 0")
    if empty.any():
        where = f" in problem {int(jnp.argmax(empty))} of the batch" if target.ndim == 3 else ""
        raise ValueError(f"weights are all zero{where}; wanted at least one positive weight")
    if target_bad.any():
        bad = ~jnp.isfinite(target) & (weight > 0)
        report("W", W, bad, "NaN or infinite", wanted="finite values, or weight 0 there", where=POSITIVE)
    return True


def check_ranks(ranks: Any, batch: int, rank: int) -> Array:
    """Whole numbers (batch,), from 1 to `rank`."""
    numbers = np.asarray(ranks)
    if numbers.shape != (batch,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"ranks must be ({batch},) whole numbers; got {numbers.dtype} of shape {numbers.shape}")
    if numbers.min() < 1 or numbers.max() > rank:
        raise ValueError(f"ranks must be from 1 to rank, {rank}; got {numbers.min()} to {numbers.max()}")
    return jnp.asarray(numbers, jnp.int32)


@eager
def check_kronecker_values(W: Array, weights: Kronecker) -> bool:
    """Whether values are known to be finite, and both factors symmetric positive semi-definite up to rounding.

    Raises:
      ValueError: they are known and are not.
    """
    if any(map(is_traced, (W, *weights))):
        return False
    wanted = "finite values: Kronecker weights skip no entry"
    report("W", W, ~jnp.isfinite(W), "NaN or infinite", wanted=wanted)
    for name, matrix in weights._asdict().items():
        check_finite(f"weights.{name}", matrix)
        if not semidefinite(matrix).all():
            raise ValueError(f"weights.{name} must be symmetric positive semi-definite and not zero, and is not")
    return True


@jax.jit
def faults(W: Array, weights: Array) -> tuple[Bool[Array, "..."], Bool[Array, "..."], Bool[Array, "..."]]:
    """Whether the target, then the weights, of each problem have values that cannot be used; and all weights zero."""
    axes = (-2, -1)[-W.ndim :]  # the entries of a sparse matrix have one
    positive = weights > 0
    return (
        jnp.any(~jnp.isfinite(W) & positive, axes),
        jnp.any(~(jnp.isfinite(weights) & (weights >= 0)), axes),
        ~jnp.any(positive, axes),
    )


@jax.jit
def semidefinite(matrix: Float[Array, "*b n n"]) -> Bool[Array, "*b"]:
    """Whether the matrix is symmetric, positive semi-definite and not zero, up to the rounding errors of its dtype."""
    transposed = jnp.swapaxes(matrix, -1, -2)
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1))
    slack = 16 * matrix.shape[-1] * jnp.finfo(matrix.dtype).eps * size
    symmetric = jnp.max(jnp.abs(matrix - transposed), axis=(-2, -1)) <= slack
    shift = slack[..., None, None] * jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    lower = jnp.linalg.cholesky((matrix + transposed) / 2 + shift)
    return symmetric & jnp.all(jnp.isfinite(lower), axis=(-2, -1)) & (size > 0)


def report(
    name: str, array: Matrix | Array, bad: Bool[Array, "..."], fault: str, *, wanted: str, where: str = ""
) -> None:
    """Raises a ValueError that names the first of the bad entries, if there are any."""
    count = int(jnp.sum(bad))
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(jnp.argmax(bad)), bad.shape))
        value, place = float(values(array)[first]), first
        if is_sparse(array):
            place = int(array.rows[first]), int(array.cols[first])
        raise ValueError(f"{name} has {count} {fault} entries{where}, the first {value} at {place}; wanted {wanted}")


def as_real(value: Any, name: str) -> Array:
    """The value as a floating array: integers and booleans are cast, complex numbers and sparse matrices refused."""
    if isinstance(value, BCOO):
        raise ValueError(f"{name} must be dense here; got a BCOO of shape {value.shape}: wlra.solve takes it as W")
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real; got dtype {array.dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return array


def check_broadcast(array: Array, shape: tuple[int, ...], name: str) -> Array:
    """The array broadcast to the shape."""
    fits = array.ndim in (0, len(shape)) and all(a in (1, s) for a, s in zip(array.shape, shape, strict=False))
    if not fits:
        axes = (
            "" if array.ndim in (0, len(shape)) else f": write all {len(shape)} axes, of length 1 where it is the same"
        )
        raise ValueError(f"{name} must broadcast to {shape}; got shape {array.shape}{axes}")
    return jnp.broadcast_to(array, shape)


def is_traced(value: Any) -> bool:
    """Whether the value is unknown because a caller traces it."""
    return isinstance(value, Tracer)
