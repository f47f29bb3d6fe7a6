"""Which kernels are factorised, as which matrices, and at which ranks."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict

from bert_adapter.checkpoint.names import by_path
from bert_adapter.families import family_of
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.finding import Kernels, find_kernels
from bert_adapter.layers.layer import matrix_shape
from bert_adapter.layers.places import in_brief, is_table, kernel_path, kind_of
from bert_adapter.layers.running import parameter_shapes
from bert_adapter.layers.stacks import check_whole_stacks, whole
from bert_adapter.model import Model, forward, is_own
from wlra.checks import check_count

Shapes = Mapping[str, tuple[int, int]]


def select_kernels(
    model: Model,
    include: str | None = None,
    exclude: str | None = None,
    *,
    embeddings: bool = False,
    batch: Batch | None = None,
) -> dict[str, tuple[int, int]]:
    """By path, the shapes (m, n), inputs by outputs, of the kernels that `include` finds and `exclude` does not.

    Kernels with several axes of inputs or outputs count as the matrices that they multiply by. A kernel with axes of
    `flax.linen.scan` in front holds a matrix at each index, "layers/dense[0]". The table of words (vocabulary, width)
    is one of them if it is asked for; those of positions and types stay dense.

    Args:
      model: a `Model`.
      include, exclude: regular expressions, searched in the paths of modules, such as
        "encoder/layer/0/attention/self/query". By default all of the encoder, or of a module of your own all kernels
        that can be factorised, and nothing is excluded. A table is selected by a pattern that finds it.
      embeddings: the table of words too; of a module of your own, all tables of `nn.Embed`.
      batch: for a module of your own, one that it is traced on: what it calls is not known before.

    Raises:
      ValueError: no regular expression, no kernel that is selected, one that is factorised already, one that
        `include` finds and that cannot be factorised, or some matrices of a kernel without the others.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = sample_model(hidden_size=8, intermediate_size=32)
      >>> bert_adapter.select_kernels(model, include="intermediate|output", exclude="attention")
      {'encoder/layer/0/intermediate/dense': (8, 32), 'encoder/layer/0/output/dense': (32, 8)}
    """
    check_pattern("include", include)
    check_pattern("exclude", exclude)
    found = kernels_of(model, batch) if is_own(model) else None
    shapes = shapes_of_family(model) if found is None else found.shapes()
    tables = tables_of(model, shapes)
    pattern = include if include is not None else "" if found is not None else family_of(model.config).encoder
    wanted = {path for path in shapes if path not in tables or include is not None}
    selected = {path: shape for path, shape in shapes.items() if path in wanted and finds(pattern, exclude, path)}
    if embeddings:
        selected |= {path: shapes[path] for path in tables if finds("", exclude, path)}
    refused = {} if found is None else found.refused
    if include is not None and (wrong := [path for path in refused if finds(pattern, exclude, path)]):
        raise ValueError(f"include={include!r} selects {wrong[0]!r}, which cannot be factorised: {refused[wrong[0]]}")
    if not selected:
        first = dict({kind_of(path): (path, why) for path, why in reversed(refused.items())}.values())
        others = f"; these cannot be factorised: {first}" if first else ""
        raise ValueError(f"include={pattern!r} and exclude={exclude!r} select none of {in_brief(shapes)}{others}")
    check_whole_stacks(selected, shapes, f"include={include!r}, exclude={exclude!r}")
    leaves = by_path(model.params)
    if done := [path for path in selected if f"{whole(path)}/left" in leaves]:
        advice = (
            "merge(model) is dense, and so is what `bert-adapter export DIR --to transformers-dense -o DENSE` writes"
        )
        raise ValueError(f"{len(done)} of the selected kernels are factorised already, {done[0]!r} first: {advice}")
    return selected


def shapes_of_family(model: Model) -> dict[str, tuple[int, int]]:
    """The kernels of a family's model, and its table of words."""
    params, axes = parameter_shapes(model.module)
    full, words = by_path(params), family_of(model.config).words
    kept = [path for path in axes if re.search(words, path) or not is_table(kernel_path(full, path))]
    return {path: matrix_shape(axes[path]) for path in kept}


def tables_of(model: Model, shapes: Shapes) -> list[str]:
    """Those of the paths that are of tables."""
    flat = flatten_dict(model.params, keep_empty_nodes=True, sep="/")
    return [path for path in shapes if is_table(kernel_path(flat, whole(path)))]


def finds(include: str, exclude: str | None, path: str) -> bool:
    """Whether a path is selected."""
    return bool(re.search(include, path)) and not (exclude and re.search(exclude, path))


def kernels_of(model: Model, batch: Batch | None) -> Kernels:
    """What a module of the caller's own calls for the batch."""
    kind = type(model.module).__name__
    names = {name for path in flatten_dict(model.params, keep_empty_nodes=True) for name in path}
    if odd := sorted(name for name in names if "/" in name):
        raise ValueError(
            f"params of {kind}: got the name {odd[0]!r}, as nn.WeightNorm makes it, wanted names without '/', which "
            f"stands between those of a path: bring the model without what makes them"
        )
    if batch is None:
        raise ValueError(f"batch: got none, wanted one to find the kernels of {kind} with, by tracing it")
    try:
        return find_kernels(forward(model), model.params, batch)
    except (FlaxError, TypeError, KeyError) as error:
        raise ValueError(
            f"forward: {kind} cannot be called with the batch {shapes_in(batch)}: {type(error).__name__}: {error}. "
            f"forward=, a function (params, batch) -> output, says how it is called"
        ) from error


def shapes_in(batch: Batch) -> dict[str, tuple[int, ...]]:
    """By name, those of the arrays."""
    return {name: np.shape(array) for name, array in batch.items()}


def check_pattern(name: str, pattern: str | None) -> None:
    """A ValueError if it is given and no regular expression."""
    try:
        re.compile(pattern or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: got {pattern!r}, which is no regular expression: {error}") from None


def shape_of_kernel(path: str, kernel: Any, shapes: Shapes | None) -> tuple[int, int]:
    """The shape (m, n), inputs by outputs, of the matrix that the kernel is.

    Raises:
      ValueError: it is not known how many of its axes are inputs, or `shapes` says what cannot be.
    """
    if shapes is None:
        if np.ndim(kernel) != 2:
            raise ValueError(
                f"{path}: wanted the shape (m, n) of a kernel with axes {np.shape(kernel)}: select_kernels(model) "
                f"returns it"
            )
        return np.shape(kernel)
    split_axes(path, np.shape(kernel), shapes[path])
    return shapes[path]


def split_axes(path: str, axes: tuple[int, ...], shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a kernel's inputs and of its outputs, which hold m and n numbers."""
    for i in range(1, len(axes)):
        if (math.prod(axes[:i]), math.prod(axes[i:])) == tuple(shape):
            return axes[:i], axes[i:]
    raise ValueError(f"{path}: a kernel with axes {axes} is no matrix of shape {shape}")


def break_even(shape: tuple[int, int]) -> float:
    """The rank mn / (m + n) at which two factors hold as many numbers as the kernel."""
    m, n = shape
    return m * n / (m + n)


def choose_ranks(shapes: Shapes, rank: int | Mapping[str, int]) -> dict[str, int]:
    """The rank of every kernel: the same for all, or given by path.

    A rank at or above break-even, or above the kernel's own, stays in the plan: it means that the kernel stays dense.

    Raises:
      ValueError: a rank is out of range, or the paths are not those of the kernels.

    Example:
      >>> import bert_adapter
      >>> bert_adapter.choose_ranks({"query": (8, 8), "output": (32, 8)}, rank=3)
      {'query': 3, 'output': 3}
    """
    given = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    ranks = {path: given.get(path, given.get(whole(path))) for path in shapes}
    odd = {path for path in given if path not in shapes and path not in map(whole, shapes)}
    if odd := sorted(odd | {path for path, value in ranks.items() if value is None}):
        raise ValueError(f"rank must name exactly the selected kernels; these are missing or left over: {odd}")
    for path, value in ranks.items():
        first = next(each for each in shapes if whole(each) == whole(path))
        if value != ranks[first]:
            raise ValueError(
                f"rank: got {value} for {path} and {ranks[first]} for {first}, wanted one for all of a stack"
            )
    return {path: check_count(f"rank of {path}", value, 1) for path, value in ranks.items()}


def parameter_count(params: Any) -> int:
    """How many numbers the parameters hold."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
