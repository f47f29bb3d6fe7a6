"""Which kernels are factorised, and at which ranks."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bert_adapter.checkpoint.names import by_path
from wlra.checks import check_count

Shapes = dict[str, tuple[int, int]]


def select_kernels(params: Any, include: str = r"^(bert/)?encoder/", exclude: str | None = None) -> Shapes:
    """The shapes (in, out) of the dense kernels whose module's path `include` finds and `exclude` does not.

    Both are regular expressions, searched in paths such as "encoder/layer/0/attention/self/query".

    Raises:
      ValueError: no kernel is selected, or some are factorised already.
    """
    found = {
        path.removesuffix("/kernel"): np.shape(leaf)
        for path, leaf in by_path(params).items()
        if path.endswith("/kernel")
    }
    done = [path.removesuffix("/left") for path in by_path(params) if path.endswith("/left")]

    def selected(path: str) -> bool:
        return bool(re.search(include, path)) and not (exclude and re.search(exclude, path))

    if again := [path for path in done if selected(path)]:
        raise ValueError(
            f"{len(again)} of the selected kernels are factorised already, {again[0]!r} first: merge() them"
        )
    shapes = {path: shape for path, shape in found.items() if len(shape) == 2 and selected(path)}
    if not shapes:
        raise ValueError(f"include={include!r} and exclude={exclude!r} select none of {sorted(found)}")
    return shapes


def break_even(shape: tuple[int, int]) -> float:
    """The rank mn / (m + n) at which two factors hold as many numbers as the kernel."""
    m, n = shape
    return m * n / (m + n)


def choose_ranks(shapes: Shapes, rank: int | Mapping[str, int]) -> dict[str, int]:
    """The rank of every kernel: the same for all, or given by path.

    A rank at or above break-even, or above the kernel's own, stays in the plan: it means that the kernel stays dense.

    Raises:
      ValueError: a rank is out of range, or the paths are not those of the kernels.
    """
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    if ranks.keys() != shapes.keys():
        odd = sorted(ranks.keys() ^ shapes.keys())
        raise ValueError(f"rank must name exactly the selected kernels; these are missing or left over: {odd}")
    return {path: check_count(f"rank of {path}", value, 1) for path, value in ranks.items()}


def parameter_count(params: Any) -> int:
    """How many numbers the parameters hold."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
