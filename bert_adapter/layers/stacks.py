"""Kernels with leading axes, as `flax.linen.scan` makes them: a matrix for each index, and one rank for all.

What is measured, planned and solved for the matrix at an index has the path "layers/dense[0]".
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import kernel_names

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


def check_whole_stacks(paths: Iterable[str], every: Iterable[str], name: str) -> None:
    """A ValueError if some matrices in a kernel are among the paths, and others of all that there are are not."""
    given = set(paths)
    stacks = {whole(path): path for path in given if index_in(path)}
    if missing := [path for path in every if whole(path) in stacks and path not in given]:
        place = whole(missing[0])
        raise ValueError(
            f"{name}: got {stacks[place]!r} without {missing[0]!r}, wanted all matrices of {place!r} or none, "
            f"for they have one rank: include={place!r} or exclude={place!r} finds all"
        )


def unstacked(params: Any, paths: Iterable[str]) -> Any:
    """The parameters with a kernel for each index in place of those in which paths with an index lie."""
    if not (places := {whole(path): len(index_in(path)) for path in paths if index_in(path)}):
        return params
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for place, depth in places.items():
        for name in [f"{place}/{kernel}" for kernel in kernel_names() if f"{place}/{kernel}" in flat]:
            kernel = flat.pop(name)
            for path in indexed(place, np.shape(kernel)[:depth]):
                flat[f"{path}/{name.rpartition('/')[2]}"] = kernel[index_in(path)]
    return unflatten_dict(flat, sep="/")


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
