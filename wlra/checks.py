"""What callers pass becomes arrays of the right shape and dtype, or a ValueError that says why not."""

import decimal
import functools
import numbers
import operator
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from wlra.convert import as_numpy, is_sparse_matrix, joined, real
from wlra.problem import Kronecker
from wlra.sparse import Sparse, as_sparse, is_sparse, like, values

T = TypeVar("T")
POSITIVE = " where the weight is positive"


def check_target(W: Any, batched: bool) -> Any:
    """`W` as a floating array with two axes, three if batched, masked entries NaN; or as `Sparse`, in order of row."""
    if is_sparse_matrix(W) and not batched:
        return as_sparse(W, "W")
    W = real(W, "W", masked=np.nan)
    wanted = "(batch, m, n)" if batched else "(m, n)"
    if W.ndim != 2 + batched or 0 in W.shape:
        raise ValueError(f"W must be a {wanted} array without empty axes; got shape {W.shape}")
    return W


def check_weights(weights: Any, shape: tuple[int, ...]) -> Any:
    """`weights` as a floating array of the given shape, masked entries 0."""
    if weights is None:
        return np.broadcast_to(np.float32(1), shape)
    if isinstance(weights, Kronecker):
        raise ValueError("weights must be of entries here; got Kronecker")
    weights = real(weights, "weights", masked=0.0)
    if weights.ndim == 1 and len(shape) == 2:
        raise ValueError(
            f"weights has one axis {weights.shape}, which could mean rows or columns: write weights[:, None] for one "
            f"weight per row of W {shape}, or weights[None, :] for one per column"
        )
    return check_broadcast(weights, shape, "weights")


def hide(W: Any, weights: Any) -> Any:
    """The weights, 0 where a `numpy.ma.MaskedArray` masks the target."""
    W = joined(W, "W")
    if not isinstance(W, np.ma.MaskedArray) or not np.ma.getmaskarray(W).any():
        return weights
    if isinstance(weights, Kronecker):
        raise ValueError("W must not be masked: Kronecker weights skip no entry")
    mask = np.ma.getmaskarray(W)
    if isinstance(weights, jax.Array):
        return jnp.where(mask, 0, weights)
    return np.where(mask, weights.dtype.type(0), weights)


def check_sparse_weights(weights: Any, W: Sparse) -> Any:
    """`weights` with the entries that `W` stores, in its order; 1 for each if None."""
    if weights is None:
        return like(W, np.broadcast_to(np.float32(1), W.values.shape))
    if not is_sparse_matrix(weights):
        raise ValueError(f"weights of a sparse W must be None or sparse like it; got {type(weights).__name__}")
    if weights.shape != W.shape:
        raise ValueError(f"weights must have the shape of W, {W.shape}; got {weights.shape}")
    ordered = as_sparse(weights, "weights")
    if len(ordered.values) != len(W.values):
        raise ValueError(f"weights must store the same {len(W.values)} entries as W; got {len(ordered.values)}")
    other = np.flatnonzero((np.asarray(ordered.rows) != W.rows) | (np.asarray(ordered.cols) != W.cols))
    if len(other):
        place, wanted = ((int(matrix.rows[other[0]]), int(matrix.cols[other[0]])) for matrix in (ordered, W))
        raise ValueError(f"weights must store the same entries as W; got one at {place} where W has {wanted}")
    return like(W, ordered.values)


def check_kronecker(weights: Kronecker, shape: tuple[int, ...]) -> Kronecker:
    """Both factors as floating arrays (m, m) and (n, n), with the batch axis of the target if it has one."""
    *batch, m, n = shape
    sizes = {"row": m, "col": n}
    return Kronecker(*(check_square(matrix, name, sizes[name], batch) for name, matrix in weights._asdict().items()))


def check_square(matrix: Any, name: str, size: int, batch: list[int]) -> Any:
    """A floating array (size, size), with the batch axis if there is one; a single number is no matrix."""
    name = f"weights.{name}"
    array = real(matrix, name)
    if array.shape[-2:] != (size, size):
        raise ValueError(f"{name} must be {(*batch, size, size)}; got shape {array.shape}")
    return check_broadcast(array, (*batch, size, size), name)


def check_rank(rank: Any, shape: tuple[int, ...]) -> int:
    """`rank` as an int in [1, min(m, n)]."""
    rank, limit = check_count("rank", rank, 1), min(shape[-2:])
    if rank > limit:
        raise ValueError(f"rank must be in [1, {limit}] for W of shape {shape}; got {rank}")
    return rank


MOST = 2**31 - 2  # of what is counted in 32 bits, and one more


def check_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int that is at least `least`, and at most `most` if there is such a bound."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer known before tracing; got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}; got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}; got {count}")
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


def check_number(value: Any, limit: float, wanted: str) -> Any:
    """The value, which is a caller's tracer or a finite number from 0 to the limit."""
    if is_traced(value):
        return value
    scalar = isinstance(value, numbers.Real | decimal.Decimal) and not isinstance(value, bool)
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not isinstance(value, np.ma.MaskedArray):
        scalar = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number) and not np.iscomplexobj(value)
        scalar &= getattr(value.dtype, "kind", "") != "m"  # NumPy counts spans of time as integers
    try:
        found = float(value) if scalar else np.nan
    except (OverflowError, ValueError):  # of numbers that float64 does not hold, and of signalling NaN
        found = np.nan
    if not (0 <= found <= limit and np.isfinite(found)):
        raise ValueError(f"{wanted}; got {value!r:.80}")
    return found


def check_tol(tol: Any) -> Any:
    """The tolerance, which bounds a ratio in [0, 1]."""
    return check_number(tol, 1.0, "tol bounds the stationarity, a number in [0, 1]")


def check_penalty(ridge: Any, nuclear: Any) -> tuple[Any, str]:
    """The penalty and which of its two units it is in, "" if there is none."""
    if ridge is not None and nuclear is not None:
        raise ValueError(f"ridge and nuclear are one penalty in two units: give one; got {ridge!r} and {nuclear!r}")
    if ridge is not None:
        return check_number(ridge, 1.0, "ridge must be a finite number in [0, 1]"), "ridge"
    if nuclear is not None:
        return check_number(nuclear, np.inf, "nuclear must be a finite number >= 0"), "nuclear"
    return 0.0, ""


def check_key(key: Any) -> Any:
    """The key, which is one of `jax.random`."""
    raw = isinstance(key, np.ndarray | jax.Array) and key.dtype == np.uint32
    shape = jax.eval_shape(jax.random.key_data, jax.random.key(0)).shape if raw else ()
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (raw or typed) or key.shape != shape:
        raise ValueError(f"key must be one of jax.random, such as jax.random.key(0); got {key!r}")
    return key


def check_list(name: str, values: Any) -> list:
    """The values as a list that is not empty."""
    try:
        if isinstance(values, str | bytes):
            raise TypeError
        values = list(values)
    except TypeError:
        raise ValueError(f"{name} must be a list; got {values!r}") from None
    if not values:
        raise ValueError(f"{name} is empty: wanted at least one")
    return values


def check_start(start: Any, shape: tuple[int, ...], rank: int) -> tuple[Any, Any]:
    """A warm start as two finite floating arrays (m, rank) and (rank, n)."""
    *batch, m, n = shape
    if not isinstance(start, tuple | list) or len(start) != 2:
        raise ValueError(f"start must be the name of a closed form or a pair (left, right); got {type(start).__name__}")
    pair = []
    for name, value, wanted in (("left", start[0], (*batch, m, rank)), ("right", start[1], (*batch, rank, n))):
        value = real(value, f"start's {name}")
        if value.shape != wanted:
            raise ValueError(f"start's {name} must have shape {wanted}; got {value.shape}")
        if not is_traced(value):
            check_finite(f"start's {name}", value)
        pair.append(value)
    return pair[0], pair[1]


@eager
def check_finite(name: str, array: Any) -> None:
    """No entry is NaN or infinite."""
    namespace = np if isinstance(array, np.ndarray) else jnp
    report(name, array, ~namespace.isfinite(array), "NaN or infinite", wanted="finite values")


class Survey(NamedTuple):
    """Of each problem: the largest target where the weight is positive, the extremes of positive weights, and faults.

    target_bad, weights_bad: whether values cannot be used. empty: whether no weight is positive.
    """

    largest: Any
    heaviest: Any
    lightest: Any
    target_bad: Any
    weights_bad: Any
    empty: Any


def survey(W: Any, weights: Any) -> Survey | None:
    """What is known of the values; None if a caller traces them.

    On the host, unless both are on an accelerator: with nothing to compile, and in their own precision.
    """
    target, weight = values(W), values(weights)
    if is_traced(target) or is_traced(weight):
        return None
    if on_accelerator(target) and on_accelerator(weight):
        return Survey(*map(np.asarray, eager(jax.jit(surveyed))(target, weight)))
    arrays = (np.asarray(array) for array in (target, weight))
    return on_host(*(array.astype(np.float32) if array.dtype.itemsize < 4 else array for array in arrays))


def on_accelerator(array: Any) -> bool:
    """Whether the array is one of JAX that is not in the memory of this process alone."""
    if not isinstance(array, jax.Array):
        return False
    return not array.is_fully_addressable or any(device.platform != "cpu" for device in array.devices())


def on_host(target: np.ndarray, weight: np.ndarray) -> Survey:
    """The survey by NumPy: of finite targets and positive weights, without any array as large as they are."""
    axes = (-2, -1)[-target.ndim :]  # the entries of a sparse matrix have one
    low, high, lightest, heaviest = (
        function(array, axis=axes) for array in (target, weight) for function in (np.min, np.max)
    )
    if not (np.isfinite(low) & np.isfinite(high) & (lightest > 0) & np.isfinite(heaviest)).all():
        return surveyed(target, weight, np)
    none = np.zeros(low.shape, bool)
    largest = np.maximum(np.abs(low), np.abs(high))
    return Survey(largest, heaviest, lightest, target_bad=none, weights_bad=none, empty=none)


def surveyed(W: Any, weights: Any, namespace: Any = jnp) -> Survey:
    """The survey, by the functions of NumPy or JAX."""
    axes = (-2, -1)[-W.ndim :]
    known, usable, positive = namespace.isfinite(W), namespace.isfinite(weights) & (weights >= 0), weights > 0
    return Survey(
        largest=namespace.max(namespace.where(known & positive, namespace.abs(W), 0), axis=axes),
        heaviest=namespace.max(namespace.where(usable, weights, 0), axis=axes),
        lightest=namespace.min(namespace.where(usable & positive, weights, namespace.inf), axis=axes),
        target_bad=namespace.any(~known & positive, axis=axes),
        weights_bad=namespace.any(~usable, axis=axes),
        empty=~namespace.any(positive, axis=axes),
    )


@eager
def check_values(W: Any, weights: Any) -> Survey | None:
    """What is known of values that are fit to be solved: finite where they count, weights >= 0 and not all zero.

    Under a caller's own jit the values of what it traces are not known, and the solver's status says the same.

    Raises:
      ValueError: they are known and are not fit.
    """
    found = survey(W, weights)
    if found is None:
        return None
    namespace = np if isinstance(values(W), np.ndarray) and isinstance(values(weights), np.ndarray) else jnp
    target, weight = values(W), values(weights)
    if found.weights_bad.any():
        bad = ~(namespace.isfinite(weight) & (weight >= 0))
        report("weights", weights, bad, "NaN, infinite or negative", wanted="weights >= 0")
    if found.empty.any():
        where = f" in problem {int(np.argmax(found.empty))} of the batch" if target.ndim == 3 else ""
        raise ValueError(f"weights are all zero{where}; wanted at least one positive weight")
    if found.target_bad.any():
        bad = ~namespace.isfinite(target) & (weight > 0)
        report("W", W, bad, "NaN or infinite", wanted="finite values, or weight 0 there", where=POSITIVE)
    return found


def check_ranks(ranks: Any, batch: int, rank: int) -> Array:
    """Whole numbers (batch,), from 1 to `rank`."""
    if is_traced(ranks):
        raise ValueError("ranks must be known before a caller traces: got a tracer, wanted an array of whole numbers")
    given = as_numpy(ranks, "ranks")
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError("ranks must not be masked")
    if given.shape != (batch,) or given.dtype.kind not in "iu":
        raise ValueError(f"ranks must be ({batch},) whole numbers; got {given.dtype} of shape {given.shape}")
    if given.min() < 1 or given.max() > rank:
        raise ValueError(f"ranks must be from 1 to rank, {rank}; got {given.min()} to {given.max()}")
    return jnp.asarray(given, jnp.int32)


@eager
def check_kronecker_values(W: Any, weights: Kronecker) -> bool:
    """Whether values are known to be finite, and both factors symmetric positive semi-definite up to rounding.

    Raises:
      ValueError: they are known and are not.
    """
    if any(map(is_traced, (W, *weights))):
        return False
    wanted = "finite values: Kronecker weights skip no entry"
    report("W", W, ~(np if isinstance(W, np.ndarray) else jnp).isfinite(W), "NaN or infinite", wanted=wanted)
    for name, matrix in weights._asdict().items():
        check_finite(f"weights.{name}", matrix)
        if not semidefinite(matrix).all():
            raise ValueError(f"weights.{name} must be symmetric positive semi-definite and not zero, and is not")
    return True


def faults(W: Array, weights: Array) -> tuple[Bool[Array, "..."], Bool[Array, "..."], Bool[Array, "..."]]:
    """Whether the target, then the weights, of each problem have values that cannot be used; and all weights zero.

    Among these are numbers that the processor may take for zero, and that are none.
    """
    target_bad, weights_bad, empty = surveyed(W, weights)[3:]
    axes, lost = (-2, -1)[-W.ndim :], is_flushed(weights)
    target_bad |= jnp.any(is_flushed(W) & ((weights > 0) | lost), axis=axes)
    return target_bad, weights_bad | jnp.any(lost, axis=axes), empty


def is_flushed(array: Array) -> Bool[Array, "..."]:
    """Whether each number is subnormal, which XLA takes for zero on most processors: told by its bits."""
    kind = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[array.dtype.itemsize]
    bits, least = (
        jax.lax.bitcast_convert_type(each, kind) << 1
        for each in (array, jnp.asarray(jnp.finfo(array.dtype).tiny, array.dtype))
    )
    return (bits > 0) & (bits < least)


@jax.jit
def semidefinite(matrix: Any) -> Bool[Array, "*b"]:
    """Whether the matrix is symmetric, positive semi-definite and not zero, up to the rounding errors of its dtype."""
    eps = float(jnp.finfo(matrix.dtype).eps)
    matrix = matrix.astype(jnp.float32) if matrix.dtype.itemsize < 4 else matrix  # 16 bits are not decomposed
    transposed = jnp.swapaxes(matrix, -1, -2)
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1))
    slack = 16 * matrix.shape[-1] * eps * size
    symmetric = jnp.max(jnp.abs(matrix - transposed), axis=(-2, -1)) <= slack
    shift = slack[..., None, None] * jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    lower = jnp.linalg.cholesky((matrix + transposed) / 2 + shift)
    return symmetric & jnp.all(jnp.isfinite(lower), axis=(-2, -1)) & (size > 0)


def report(name: str, array: Any, bad: Any, fault: str, *, wanted: str, where: str = "") -> None:
    """Raises a ValueError that names the first of the bad entries, if there are any."""
    bad = np.asarray(bad)
    count = int(np.sum(bad))
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        value, place = float(values(array)[first]), first
        if is_sparse(array):
            place = int(array.rows[first]), int(array.cols[first])
        raise ValueError(f"{name} has {count} {fault} entries{where}, the first {value} at {place}; wanted {wanted}")


def check_broadcast(array: Any, shape: tuple[int, ...], name: str) -> Any:
    """The array broadcast to the shape."""
    fits = array.ndim in (0, len(shape)) and all(a in (1, s) for a, s in zip(array.shape, shape, strict=False))
    if not fits:
        axes = (
            "" if array.ndim in (0, len(shape)) else f": write all {len(shape)} axes, of length 1 where it is the same"
        )
        raise ValueError(f"{name} must broadcast to {shape}; got shape {array.shape}{axes}")
    return (jnp if isinstance(array, jax.Array) else np).broadcast_to(array, shape)


def is_traced(value: Any) -> bool:
    """Whether the value is unknown because a caller traces it."""
    return isinstance(value, Tracer)
