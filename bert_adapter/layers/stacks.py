"""Kernels with leading axes, as `flax.linen.scan` makes them: a matrix for each index, and one rank for all.

What is measured, planned and solved for the matrix at an index has the path "layers/dense[0]".
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.layers.marker import Factorised

INDEXED = re.compile(r"(.*)\[([0-9,]+)\]")


def indexed(path: str, stack: tuple[int, ...]) -> list[str]:
    """The path of each matrix in a kernel with these leading axes; without any, that of the kernel."""
    return [f"{path}[{','.join(map(str, index))}]" for index in np.ndindex(*stack)] if stack else [path]


def whole(path: str) -> str:
    """The path of the kernel that a matrix lies in."""
    found = INDEXED.fullmatch(path)
    return path if found is None else found[1]


def index_in(path: str) -> tuple[int, ...]:
    """Where in its kernel a matrix lies."""
    found = INDEXED.fullmatch(path)
    return () if found is None else tuple(map(int, found[2].split(",")))


def unstacked(params: Any, paths: Iterable[str]) -> Any:
    """The parameters with a kernel for each of the paths that has an index, in place of the one it lies in."""
    if not (places := {path: whole(path) for path in paths if index_in(path)}):
        return params
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    kernels = {path: flat[f"{place}/kernel"] for path, place in places.items() if f"{place}/kernel" in flat}
    kept = {name: leaf for name, leaf in flat.items() if name.removesuffix("/kernel") not in places.values()}
    return unflatten_dict(kept | {f"{path}/kernel": kernels[path][index_in(path)] for path in kernels}, sep="/")


def restacked(params: Any) -> Any:
    """The parameters with the kernels, or factors, at all indices in place of each of them; what `unstacked` undoes."""
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    stacks: dict[str, dict[tuple[int, ...], Any]] = {}
    for name in [name for name in flat if INDEXED.fullmatch(name.rpartition("/")[0])]:
        path, _, leaf = name.rpartition("/")
        stacks.setdefault(f"{whole(path)}/{leaf}", {})[index_in(path)] = flat.pop(name)
    for name, found in stacks.items():
        shape = tuple(max(axis) + 1 for axis in zip(*found, strict=True))
        leaves = [found[index] for index in np.ndindex(*shape)]
        if isinstance(leaves[0], Factorised):
            flat[name] = Factorised(len(shape))
        else:
            flat[name] = np.stack([np.asarray(leaf) for leaf in leaves]).reshape(*shape, *leaves[0].shape)
    return unflatten_dict(flat, sep="/") if stacks else params
