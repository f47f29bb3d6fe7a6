"""Whatever holds numbers, as an array of them in its own precision; or a ValueError that says what it holds instead."""

import decimal
import numbers
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import JAXSparse


def real(value: Any, name: str, masked: float | None = None) -> Any:
    """The value as a floating array, of JAX if it is one and else of NumPy, in native byte order.

    Booleans and integers of at most 16 bits become float32, which holds them; other integers float64, the nearest there
    is. None and `pandas.NA` become NaN.

    Args:
      masked: what stands for the masked entries of a `numpy.ma.MaskedArray`; None refuses such arrays.

    Raises:
      ValueError: it holds no numbers, or complex ones, or is sparse, or masked where nothing can be.
    """
    if value is None:
        raise ValueError(f"{name} must be an array of numbers; got None")
    value = joined(value, name)
    if is_sparse_matrix(value):
        raise ValueError(f"{name} must be dense here; got a {type(value).__name__} of shape {value.shape}")
    if isinstance(value, jax.Array):
        return of_jax(value, name)
    array = as_numpy(value, name)
    mask = np.ma.getmaskarray(array) if isinstance(array, np.ma.MaskedArray) else None
    if mask is not None and masked is None:
        raise ValueError(f"{name} must not be masked: fill it, or give W or weights as the masked array")
    if mask is not None:
        array = np.ma.getdata(array)
        if array.dtype == object:
            array = array.copy()
            array[mask] = None
    if array.dtype == object and array.ndim == 0:
        raise ValueError(f"{name} must be an array of numbers; got a {type(value).__name__}")
    array = of_objects(array, name) if array.dtype == object else array.astype(floating(array.dtype, name), copy=False)
    return array if mask is None else np.where(mask, array.dtype.type(masked), array)


def joined(value: Any, name: str) -> Any:
    """A list or tuple as one array: masked if one in it is, of JAX if a caller traces one or all are of JAX, alike.

    Arrays of JAX of several dtypes become floating ones first: JAX would round some of them to the dtype of others.
    """
    if not isinstance(value, list | tuple):
        return value
    if (sparse := next((part for part in value if is_sparse_matrix(part)), None)) is not None:
        raise ValueError(f"{name} must be dense here; got a {type(value).__name__} of {type(sparse).__name__}")
    leaves = jax.tree.leaves(value)
    try:
        if any(isinstance(leaf, np.ma.MaskedArray) for leaf in leaves):
            return np.ma.stack([joined(part, name) for part in value])
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        if traced or (leaves and all(isinstance(leaf, jax.Array) for leaf in leaves)):
            alike = len({getattr(leaf, "dtype", type(leaf)) for leaf in leaves}) == 1
            parts = value if alike else jax.tree.map(lambda leaf: floats(leaf, name), value)
            return jnp.asarray(parts) if alike or traced else np.asarray(parts)
    except (TypeError, ValueError) as error:
        raise unreadable(value, name, error) from None
    return value


def floats(leaf: Any, name: str) -> Any:
    """What a list holds, of an array of JAX a floating one."""
    return of_jax(leaf, name) if isinstance(leaf, jax.Array) else leaf


def as_numpy(value: Any, name: str) -> np.ndarray:
    """The value as an array of NumPy, of whatever it holds; masked if it was."""
    if isinstance(value, np.ma.MaskedArray):
        return value
    try:
        return np.asarray(value)
    except Exception as error:  # of the value's own `__array__`, which may raise anything
        raise unreadable(value, name, error) from None


def unreadable(value: Any, name: str, error: Exception) -> ValueError:
    """The error for what is no array at all."""
    reason = " ".join(str(error).split())
    return ValueError(f"{name} must be an array of numbers; got a {type(value).__name__}, and {reason}")


def of_jax(array: jax.Array, name: str) -> Any:
    """An array of JAX in a dtype that the solver takes; of NumPy where JAX would have to round."""
    wanted = floating(array.dtype, name)
    if isinstance(array, Tracer):
        return array.astype(in_jax(wanted))
    if array.dtype == wanted == in_jax(wanted):
        return array
    return np.asarray(array).astype(wanted)


def floating(dtype: Any, name: str) -> np.dtype:
    """The floating dtype that holds numbers of the dtype, in native byte order."""
    if isinstance(dtype, np.dtype):
        if jnp.issubdtype(dtype, jnp.floating):
            return np.dtype(np.float32) if dtype.itemsize == 1 else dtype.newbyteorder("=")
        if dtype.kind in "iub" or (dtype.kind != "m" and jnp.issubdtype(dtype, jnp.integer)):
            return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"{name} must be real; got dtype {dtype}")
    kind = {"U": "text, ", "S": "text, ", "T": "text, ", "M": "dates, ", "m": "spans of time, "}
    raise ValueError(f"{name} must hold numbers; got {kind.get(getattr(dtype, 'kind', ''), '')}dtype {dtype}")


def of_objects(array: np.ndarray, name: str) -> np.ndarray:
    """Python's numbers, one by one, as float64."""
    result = np.empty(array.shape, np.float64)
    for place, entry in np.ndenumerate(array):
        result[place] = number(entry, name, place)
    return result


def number(entry: Any, name: str, place: tuple[int, ...]) -> float:
    """The entry of an array of objects as a float; NaN for a missing one."""
    pandas = sys.modules.get("pandas")
    if entry is None or entry is np.ma.masked or (pandas is not None and entry is pandas.NA):
        return np.nan
    scalar = isinstance(entry, numbers.Real | decimal.Decimal | np.bool_) and not isinstance(entry, np.timedelta64)
    if not scalar and isinstance(entry, np.ndarray | np.generic | jax.Array) and np.ndim(entry) == 0:
        scalar = any(jnp.issubdtype(entry.dtype, kind) for kind in (jnp.floating, jnp.integer))
        scalar &= getattr(entry.dtype, "kind", "") != "m"  # NumPy counts spans of time as integers
    try:
        if scalar and ((found := float(entry)) or not entry):  # what is not zero does not become it
            return found
    except (OverflowError, ValueError):
        pass
    shown = repr(entry)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    raise ValueError(f"{name} must hold numbers that float64 holds; got the {type(entry).__name__} {shown} at {place}")


def in_jax(dtype: Any) -> Any:
    """The dtype of JAX for arrays of a floating dtype: float64 is one where it is enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64 if np.dtype(dtype).itemsize > 8 else dtype)


def is_sparse_matrix(value: Any) -> bool:
    """Whether the value is a sparse matrix of JAX or SciPy."""
    return isinstance(value, JAXSparse) or is_scipy(value)


def is_scipy(value: Any) -> bool:
    """Whether the value is a sparse matrix or array of SciPy."""
    scipy = sys.modules.get("scipy.sparse")
    return scipy is not None and scipy.issparse(value)


def check_aligned(W: Any, weights: Any) -> None:
    """Two data frames do not have the same labels in different places, nor any of two lists of them."""
    if isinstance(W, list | tuple) and isinstance(weights, list | tuple):
        for one, its in zip(W, weights, strict=False):
            check_aligned(one, its)
    if not (is_frame(W) and is_frame(weights)):
        return
    for axis in ("index", "columns"):
        if in_another_order(getattr(W, axis), getattr(weights, axis)):
            raise ValueError(f"weights must have the {axis} of W in its order: write weights.reindex_like(W)")


def check_sides_aligned(W: Any, sides: dict[str, Any]) -> None:
    """The same for weights of rows and columns as wholes, each of whose sides has the labels twice."""
    for (name, side), of in zip(sides.items(), ("index", "columns"), strict=True):
        if not is_frame(side):
            continue
        wanted = getattr(W, of) if is_frame(W) else side.index
        if in_another_order(wanted, side.index) or in_another_order(wanted, side.columns):
            place = f"the {of} of W" if is_frame(W) else "its index"
            raise ValueError(
                f"weights.{name} must have {place} along both axes, in that order: write .loc[labels, labels]"
            )


def is_frame(value: Any) -> bool:
    """Whether the value is a data frame, whose axes have labels."""
    return hasattr(value, "iloc") and hasattr(value, "columns")


def in_another_order(wanted: Any, labels: Any) -> bool:
    """Whether some of the labels are there, and not all of them in their places."""
    return len(wanted) == len(labels) and not wanted.equals(labels) and len(wanted.intersection(labels)) > 0
