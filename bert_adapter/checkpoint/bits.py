"""How matrices are stored: as floats of 32 or 16 bits, or as integers of 8 bits beside their scales.

Norms and biases stay as they are. A scale is that of a row of a table, or of a column of a factor or kernel: the
largest absolute value there over 127. Numbers are rounded to the nearest.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int
from ml_dtypes import bfloat16

from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import is_table, kernel_names
from wlra.checks import check_name
from wlra.tall import BLOCK

FLOATS: dict[str, Any] = {"float32": np.float32, "bfloat16": bfloat16, "float16": np.float16}
INT8 = "int8"
DTYPES = (*FLOATS, INT8)
FEWER = ("bfloat16", "float16", INT8)  # what is read again as float32, where config.json names it
SCALE = "_scale"  # ends the name of what an array of integers is to be multiplied by
LARGEST = 127


def is_matrix(path: str, array: Any) -> bool:
    """Whether a parameter is a kernel, a table or a factor."""
    return np.ndim(array) >= 2 and path.rpartition("/")[2] in (*kernel_names(), "left", "right")


def layers_of(params: Mapping[str, Any]) -> list[str]:
    """The paths of the layers that hold matrices."""
    return list(dict.fromkeys(path.rpartition("/")[0] for path, array in params.items() if is_matrix(path, array)))


def factorised_tables(params: Any) -> set[str]:
    """The paths of the tables that are factors, in nested dicts of parameters."""
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    return {path.rpartition("/")[0] for path, leaf in flat.items() if isinstance(leaf, Factorised) and is_table(path)}


def has_row_scales(path: str, tables: Collection[str]) -> bool:
    """Whether a parameter has a scale for each row: a table, or the left factor of one."""
    layer, _, name = path.rpartition("/")
    return is_table(path) or (name == "left" and layer in tables)


def quantised(
    array: Float[np.ndarray, "*stack m n"], by_rows: bool
) -> tuple[Int[np.ndarray, "*stack m n"], Float[np.ndarray, "..."]]:
    """Integers of 8 bits and the scales that they are to be multiplied by, for each row, or for each column.

    What they multiply out to is stored as the same integers and scales again.

    Example:
      >>> import numpy as np
      >>> from bert_adapter.checkpoint.bits import quantised
      >>> numbers, scale = quantised(np.array([[127.0, 2.2], [-63.9, 0.0]], np.float32), by_rows=False)
      >>> numbers.tolist(), scale.shape
      ([[127, 127], [-64, 0]], (1, 2))
    """
    wide = np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    how: dict[str, Any] = {"axis": -1 if by_rows else -2, "keepdims": True}
    scale = np.maximum(np.max(wide, **how), -np.min(wide, **how)) / wide.dtype.type(LARGEST)  # no copy of the array
    for _ in range(2):  # until 127 times the scale, over 127, is the scale
        scale = (scale * LARGEST) / wide.dtype.type(LARGEST)
    numbers = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    np.clip(np.rint(numbers, out=numbers), -LARGEST, LARGEST, out=numbers)
    return numbers.astype(np.int8), scale


def dequantised(numbers: Int[np.ndarray, "..."], scale: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """What integers and their scales multiply out to."""
    found = numbers.astype(scale.dtype)
    found *= scale
    return found


def rounded(array: Any, dtype: str, by_rows: bool) -> np.ndarray:
    """What is left of a matrix once it was stored so, in its own dtype."""
    array = np.asarray(array)
    kept = np.empty_like(array)
    step = BLOCK if by_rows else max(1, len(array))  # of a table piece by piece: nothing else of its size is held
    for begin in range(0, len(array), step):
        part = array[begin : begin + step]
        less = dequantised(*quantised(part, by_rows)) if dtype == INT8 else part.astype(FLOATS[dtype])
        kept[begin : begin + step] = less
    return kept


def size(shape: tuple[int, int], dtype: str, by_rows: bool) -> int:
    """How many bytes such a matrix takes, with its scales."""
    m, n = shape
    return m * n + 4 * (m if by_rows else n) if dtype == INT8 else m * n * np.dtype(FLOATS[dtype]).itemsize


def chosen_dtypes(
    dtype: str | Mapping[str, str] | None, params: Mapping[str, Any], known: Mapping[str, str]
) -> dict[str, str]:
    """By layer, what its matrices are stored as; those without an entry as they are.

    Raises:
      ValueError: unknown dtypes or layers, or a number that 16 bits cannot hold.
    """
    layers = layers_of(params)
    if dtype is None:
        found = dict(known)
    elif isinstance(dtype, Mapping):
        found = {**known, **dtype}
    else:
        found = dict.fromkeys(layers, check_name("dtype", dtype, DTYPES))
    for path, name in found.items():
        check_name(f"dtype of {path}", name, DTYPES)
    if odd := sorted(found.keys() - set(layers)):
        raise ValueError(f"dtype: got {odd}, which hold no matrix, wanted paths of {sorted(layers)}")
    half = {path: array for path, array in params.items() if found.get(path.rpartition("/")[0]) == "float16"}
    most = float(np.finfo(np.float16).max)
    if large := [path for path, array in half.items() if is_matrix(path, array) and np.max(np.abs(array)) > most]:
        raise ValueError(f"dtype: got float16, which ends at {most:.0f}, and {large[0]} holds more: wanted bfloat16")
    return found


def encoded(
    params: Mapping[str, np.ndarray], dtypes: Mapping[str, str], tables: Collection[str]
) -> dict[str, np.ndarray]:
    """The parameters as they are stored, with scales under the names of their matrices and `SCALE`."""
    found: dict[str, np.ndarray] = {}
    for path, array in params.items():
        dtype = dtypes.get(path.rpartition("/")[0]) if is_matrix(path, array) else None
        if dtype == INT8:
            found[path], found[f"{path}{SCALE}"] = quantised(array, has_row_scales(path, tables))
        else:
            found[path] = array if dtype is None else array.astype(FLOATS[dtype])
    return found


def as_stored(params: Any, dtypes: Mapping[str, str]) -> Any:
    """Nested dicts of parameters as they are read again once they were stored so."""
    if not dtypes:
        return params
    tables = factorised_tables(params)
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for path, leaf in flat.items():
        dtype = dtypes.get(path.rpartition("/")[0])
        if dtype is not None and not isinstance(leaf, Factorised) and is_matrix(path, leaf):
            flat[path] = rounded(leaf, dtype, has_row_scales(path, tables))
    return unflatten_dict(flat, sep="/")


def base_of(name: str, arrays: Mapping[str, Any]) -> str | None:
    """The name of the integers whose scales have this name, or None."""
    base = name.removesuffix(SCALE)
    return base if base != name and base in arrays and arrays[base].dtype == np.int8 else None


def decoded(arrays: dict[str, np.ndarray], dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The parameters by path, with integers multiplied out, and what has 16 bits in float32.

    Nothing is left of `arrays`.

    dtypes: by layer, what config.json says.

    Raises:
      ValueError: lists integers without scales or that the config does not name, and scales that cannot be.
    """
    integers = [path for path, array in arrays.items() if array.dtype == np.int8]
    if not dtypes and not any(f"{path}{SCALE}" in arrays for path in integers):
        return arrays  # where integers are no parameters
    matrices = {path: path.rpartition("/")[0] for path, array in arrays.items() if is_matrix(path, array)}
    wanted = {path: dtypes[layer] for path, layer in matrices.items() if layer in dtypes}
    got = {path: str(arrays[path].dtype) for path in wanted}
    problems = [wrong for path in integers if (wrong := wrong_with(path, arrays, dtypes))]
    problems += [f"{path}: got {got[path]}, wanted {dtype}" for path, dtype in wanted.items() if got[path] != dtype]
    empty = sorted(dtypes.keys() - set(matrices.values()))
    problems += [f"{layer}: config.json says {dtypes[layer]}, and there is no matrix" for layer in empty]
    if problems:
        raise ValueError("what is stored does not fit config.json's low_rank dtypes\n  " + "\n  ".join(problems))
    for path in integers:
        arrays[path] = dequantised(arrays[path], arrays.pop(f"{path}{SCALE}"))
    return arrays | {path: arrays[path].astype(np.float32) for path, dtype in wanted.items() if dtype != INT8}


def wrong_with(path: str, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> str | None:
    """What is wrong with integers, if anything is."""
    numbers, scale = arrays[path], arrays.get(f"{path}{SCALE}")
    if dtypes.get(path.rpartition("/")[0]) != INT8:
        return f"{path}: got int8, which config.json's low_rank dtypes do not name"
    if scale is None:
        return f"{path}: got int8 without {path}{SCALE}, wanted its scales too"
    *stack, m, n = numbers.shape if numbers.ndim > 1 else (0, 0)
    if scale.dtype.kind != "f" or scale.shape not in ((*stack, m, 1), (*stack, 1, n)):
        wanted = f"floats of shape {(*stack, m, 1)} or {(*stack, 1, n)}"
        return f"{path}{SCALE}: got {scale.dtype} {scale.shape}, wanted {wanted}"
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        return f"{path}{SCALE}: got values that are NaN, infinite or negative, wanted none"
    return None
