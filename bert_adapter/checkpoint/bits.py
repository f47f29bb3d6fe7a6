"""How matrices are stored: as floats of 32 or 16 bits, or as integers of 8 or 4 bits beside their scales.

Norms and biases stay as they are. A scale of 8 bits is that of a row of a table, or of a column of a factor or kernel:
the largest absolute value there over 127. `nibbles` has those of 4 bits. Numbers are rounded to the nearest, but for
errors of 4 bits that are made up for.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int
from ml_dtypes import bfloat16

from bert_adapter.checkpoint.nibbles import compensated, packed, steps
from bert_adapter.layers.integers import GROUP, Integers, multiplied, unpacked
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import in_brief, is_table, kernel_names
from bert_adapter.layers.stacks import indexed
from wlra.checks import check_name
from wlra.tall import BLOCK

FLOATS: dict[str, Any] = {"float32": np.float32, "bfloat16": bfloat16, "float16": np.float16}
INT8, INT4 = "int8", "int4"
INTEGERS: dict[str, Any] = {INT8: np.int8, INT4: np.uint8}  # and what they lie in
DTYPES = (*FLOATS, *INTEGERS)
FEWER = ("bfloat16", "float16", *INTEGERS)  # what is read again as float32, where config.json names it
SCALE = "_scale"  # ends the name of what an array of integers is to be multiplied by
SHAPE = "_shape"  # ends that of the shape of a matrix of which two integers lie in a byte
LARGEST = 127
BEHIND = re.compile(r"[0-9]+_")  # begins the paths of what follows an encoder, which other libraries write too


def is_matrix(path: str, array: Any) -> bool:
    """Whether a parameter is a kernel, a table or a factor, but none behind an encoder."""
    return (
        not BEHIND.match(path) and np.ndim(array) >= 2 and path.rpartition("/")[2] in (*kernel_names(), "left", "right")
    )


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


def rounded(array: Any, dtype: str, by_rows: bool, given: Any | None = None) -> np.ndarray:
    """What is left of a matrix once it was stored so, in its own dtype; of integers, in 32 bits at least.

    given: what `feedback` makes of a Gram matrix of the inputs, by which errors of 4 bits are made up for.
    """
    array = np.asarray(array)
    wide = array.dtype if dtype in FLOATS or array.dtype == np.float64 else np.dtype(np.float32)
    if dtype == INT4 and given is not None:
        return compensated(array, given).astype(wide)
    kept = np.empty(array.shape, wide)
    step = BLOCK if by_rows else max(1, len(array))  # of a table piece by piece: nothing else of its size is held
    for begin in range(0, len(array), step):
        part = array[begin : begin + step]
        integers = dtype in INTEGERS
        kept[begin : begin + step] = joined(parts_of(part, dtype, by_rows)) if integers else part.astype(FLOATS[dtype])
    return kept


def parts_of(array: Float[np.ndarray, "*stack m n"], dtype: str, by_rows: bool) -> dict[str, np.ndarray]:
    """The arrays that a matrix is stored as, by the ends of their names."""
    if dtype == INT8:
        numbers, scale = quantised(array, by_rows)
        return {"": numbers, SCALE: scale}
    if dtype == INT4:
        found, scale = steps(array, by_rows)
        return {"": packed(found, by_rows), SCALE: np.ascontiguousarray(scale), SHAPE: np.array(array.shape, np.int32)}
    return {"": array.astype(FLOATS[dtype])}


def joined(parts: Mapping[str, np.ndarray]) -> Float[np.ndarray, "*stack m n"]:
    """The matrix of integers that is stored so."""
    if SHAPE not in parts:
        return dequantised(parts[""], parts[SCALE])
    by_rows = lies_by_rows(parts)
    assert by_rows is not None  # `wrong_with` says so before
    count = int(parts[SHAPE][-1 if by_rows else -2])
    return np.ascontiguousarray(multiplied(unpacked(parts[""], count, by_rows), parts[SCALE], by_rows))


def kept(parts: Mapping[str, np.ndarray]) -> Integers:
    """The matrix that is stored so, still as integers."""
    if SHAPE not in parts:
        return Integers(parts[""], parts[SCALE], parts[""].shape, None)
    return Integers(parts[""], parts[SCALE], tuple(parts[SHAPE].tolist()), lies_by_rows(parts))


def lies_by_rows(parts: Mapping[str, np.ndarray]) -> bool | None:
    """Whether two integers in a byte are of one row, or of one column; None if the three arrays fit neither."""
    if (shape := parts[SHAPE]).ndim != 1 or len(shape) < 2 or shape.dtype.kind not in "iu" or np.min(shape) < 0:
        return None
    *stack, m, n = shape.tolist()
    for by_rows in (True, False):
        shapes = [(*stack, m, -(-n // each)) if by_rows else (*stack, -(-m // each), n) for each in (2, GROUP)]
        if shapes == [parts[""].shape, parts[SCALE].shape]:
            return by_rows
    return None


def size(shape: tuple[int, ...], dtype: str, by_rows: bool, scale: int = 4) -> int:
    """How many bytes such a matrix takes, with its scales; of 8 bits, of so many each."""
    *stack, m, n = shape
    each, along = (m, n) if by_rows else (n, m)
    many = math.prod(stack) * each
    if dtype == INT8:
        return many * (along + scale)
    if dtype == INT4:
        return many * (-(-along // 2) + 2 * -(-along // GROUP)) + 4 * len(shape)
    return many * along * np.dtype(FLOATS[dtype]).itemsize


def holds(dtype: str, array: Any) -> bool:
    """Whether the largest number is one of the dtype, or of its scales; an integer's scale of 8 bits may be any."""
    kind = np.finfo(np.float64 if dtype == INT8 else np.float16 if dtype == "float16" else np.float32)
    least = 0.0 if dtype == INT8 else float(kind.tiny) * (8 if dtype == INT4 else 1)
    most = largest(array)
    return most == 0 or least <= most <= float(kind.max)


def largest(array: Any) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(np.maximum(np.max(array), -np.min(array))) if np.size(array) else 0.0


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
    check_layers(found, params)
    asked = found if isinstance(dtype, str) else dtype or {}  # what is stored so already fits
    for path, array in params.items():
        layer = path.rpartition("/")[0]
        if layer in asked and is_matrix(path, array) and not holds(asked[layer], array):
            wanted = "bfloat16" if holds("bfloat16", array) else str(array.dtype)
            wanted = wanted if np.isfinite(largest(array)) else "finite numbers"
            raise ValueError(
                f"dtype: got {asked[layer]}, which cannot hold {largest(array):.4g} in {path}: wanted {wanted}"
            )
    return found


def check_layers(dtypes: Mapping[str, str], params: Mapping[str, Any]) -> None:
    """A ValueError for paths of no layer that holds a matrix."""
    layers = layers_of(params)
    if odd := sorted(dtypes.keys() - set(layers)):
        raise ValueError(f"dtype: got {in_brief(odd)}, which hold no matrix, wanted paths of {in_brief(layers)}")


def encoded(
    params: Mapping[str, np.ndarray], dtypes: Mapping[str, str], tables: Collection[str]
) -> dict[str, np.ndarray]:
    """The parameters as they are stored, with scales under the names of their matrices and `SCALE`."""
    found: dict[str, np.ndarray] = {}
    for path, array in params.items():
        dtype = dtypes.get(path.rpartition("/")[0]) if is_matrix(path, array) else None
        parts = {"": array} if dtype is None else parts_of(array, dtype, has_row_scales(path, tables))
        found |= {f"{path}{end}": part for end, part in parts.items()}
    return found


class Stored(NamedTuple):
    """How one matrix is stored: its path, the dtype, and whether scales are those of rows."""

    path: str
    dtype: str
    by_rows: bool


def stored_as(params: Any, dtypes: Mapping[str, str]) -> tuple[Stored, ...]:
    """How the matrices among the parameters, nested dicts, are stored; of those without a dtype nothing is said."""
    tables, found = factorised_tables(params), []
    for path, leaf in flatten_dict(params, keep_empty_nodes=True, sep="/").items():
        dtype = dtypes.get(path.rpartition("/")[0])
        if dtype is not None and not isinstance(leaf, Factorised) and is_matrix(path, leaf):
            found.append(Stored(path, dtype, has_row_scales(path, tables)))
    return tuple(found)


def as_stored(params: Any, dtypes: Mapping[str, str], given: Mapping[str, Any] | None = None) -> Any:
    """Nested dicts of parameters as they are read again once they were stored so.

    given: by path, what `feedback` made of Gram matrices, where errors of 4 bits can be made up for.
    """
    if not dtypes:
        return params
    given = given or {}
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for path, dtype, by_rows in stored_as(params, dtypes):
        (layer, _, name), leaf = path.rpartition("/"), np.asarray(flat[path])
        names = () if by_rows or name == "right" else indexed(layer, leaf.shape[:-2])
        known = [given[each] for each in names if each in given]
        if dtype == INT4 and known:
            each = zip(leaf.reshape(-1, *leaf.shape[-2:]), known, strict=True)
            less = [rounded(one, dtype, False, its) for one, its in each]
            flat[path] = np.stack(less).reshape(leaf.shape)
        else:
            flat[path] = rounded(leaf, dtype, by_rows)
    return unflatten_dict(flat, sep="/")


def base_of(name: str, arrays: Mapping[str, Any]) -> str | None:
    """The name of the integers whose scales, or shape, have this name, or None."""
    base = next((name.removesuffix(end) for end in (SCALE, SHAPE) if name.endswith(end)), name)
    return base if base != name and base in arrays and arrays[base].dtype in INTEGERS.values() else None


def decoded(
    arrays: dict[str, np.ndarray], dtypes: Mapping[str, str], made: Callable[[Any], Any] = joined
) -> dict[str, Any]:
    """The parameters by path, with what is `made` of integers, and what has 16 bits in float32.

    Nothing is left of `arrays`.

    dtypes: by layer, what config.json says.

    Raises:
      ValueError: lists integers without scales or that the config does not name, and scales that cannot be.
    """
    integers = [path for path, array in arrays.items() if array.dtype in INTEGERS.values()]
    if not dtypes and not any(f"{path}{SCALE}" in arrays for path in integers):
        return arrays  # where integers are no parameters
    matrices = {path: path.rpartition("/")[0] for path, array in arrays.items() if is_matrix(path, array)}
    wanted = {path: dtypes[layer] for path, layer in matrices.items() if layer in dtypes}
    got = {path: kind_of(arrays[path]) for path in wanted}
    problems = [wrong for path in integers if (wrong := wrong_with(path, arrays, dtypes))]
    problems += [f"{path}: got {got[path]}, wanted {dtype}" for path, dtype in wanted.items() if got[path] != dtype]
    empty = sorted(dtypes.keys() - set(matrices.values()))
    problems += [f"{layer}: config.json says {dtypes[layer]}, and there is no matrix" for layer in empty]
    if problems:
        raise ValueError("what is stored does not fit config.json's low_rank dtypes\n  " + "\n  ".join(problems))
    for path in integers:
        parts = {end: arrays.pop(f"{path}{end}") for end in ("", SCALE, SHAPE) if f"{path}{end}" in arrays}
        arrays[path] = made(parts)
    return arrays | {path: arrays[path].astype(np.float32) for path, dtype in wanted.items() if dtype not in INTEGERS}


def kind_of(array: np.ndarray) -> str:
    """What a matrix that is stored is one of."""
    return next((name for name, kind in INTEGERS.items() if array.dtype == kind), str(array.dtype))


def wrong_with(path: str, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> str | None:
    """What is wrong with integers, if anything is."""
    kind, ends = kind_of(arrays[path]), {SCALE: "scales", SHAPE: "shape"}
    if dtypes.get(path.rpartition("/")[0]) != kind:
        return f"{path}: got {kind}, which config.json's low_rank dtypes do not name"
    wanted = ends if kind == INT4 else [SCALE]
    if missing := [end for end in wanted if f"{path}{end}" not in arrays]:
        return f"{path}: got {kind} without {path}{missing[0]}, wanted its {ends[missing[0]]} too"
    parts = {end: arrays[f"{path}{end}"] for end in ("", *wanted)}
    scale, bits = parts[SCALE], (8 if kind == INT8 else 4)
    if wrong := misfit(parts):
        return f"{path}{SCALE}: got {scale.dtype} {scale.shape}, wanted {wrong}"
    numbers = np.asarray(scale, np.float64)
    if not (np.isfinite(numbers).all() and (bits == 4 or (numbers >= 0).all())):
        what = "NaN, infinite or negative" if bits == 8 else "NaN or infinite"
        return f"{path}{SCALE}: got values that are {what}, wanted none"
    return None


def misfit(parts: Mapping[str, np.ndarray]) -> str | None:
    """What scales are wanted in place of those that the integers, and the shape, do not go with."""
    numbers, scale = parts[""], parts[SCALE]
    if SHAPE in parts:
        fit = scale.dtype == bfloat16 and lies_by_rows(parts) is not None
        shape = f"{parts[SHAPE].dtype} {parts[SHAPE].tolist()}"
        return None if fit else f"bfloat16 that go with bytes {numbers.shape} and {SHAPE} {shape}"
    *stack, m, n = numbers.shape if numbers.ndim > 1 else (0, 0)
    fit = scale.dtype.kind == "f" and scale.shape in ((*stack, m, 1), (*stack, 1, n))
    return None if fit else f"floats of shape {(*stack, m, 1)} or {(*stack, 1, n)}"
