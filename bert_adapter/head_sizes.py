"""Heads of attention with fewer dimensions than the hidden size gives them, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int

from bert_adapter.checkpoint.names import dtypes_of, low_rank, section_of
from bert_adapter.families import family_of, label_count
from bert_adapter.families.parts import sizes_of_heads
from bert_adapter.kernels import Shapes
from bert_adapter.layers.integers import is_integers
from bert_adapter.layers.marker import Factorised
from bert_adapter.model import Model, check_family

Sizes = tuple[tuple[int, int], ...]  # of each layer's heads: of queries and keys, of values
Factors = Float[np.ndarray, "heads old new"]  # what each head's dimensions are multiplied by
STEP = 4  # dimensions of heads are multiples of it, where there are several times as many
SIDES = (("query", "key"), ("value", "output"))  # the kernels that meet in a head's dimensions


class Pair(NamedTuple):
    """Two kernels that meet in the dimensions of a layer's heads.

    layer, side: its number, and that in `SIDES`.
    kernels: their paths.
    identities: those of the identities between them, a head's each.
    size: the dimensions of a head.
    """

    layer: int
    side: int
    kernels: tuple[str, str]
    identities: tuple[str, ...]
    size: int


def sizes_of(model: Model) -> Sizes:
    """The dimensions of each layer's heads."""
    config: Any = getattr(model.module, "config")  # noqa: B009
    return tuple(sizes_of_heads(config, layer) for layer in range(config.num_hidden_layers))


def whole_sizes(model: Model) -> Sizes:
    """Those that the hidden size gives them."""
    config: Any = getattr(model.module, "config")  # noqa: B009
    size = config.hidden_size // config.num_attention_heads
    return ((size, size),) * config.num_hidden_layers


def paths_in(model: Model, layer: int) -> dict[str, str]:
    """By name, where the kernels of a layer's attention are; none where heads cannot have fewer dimensions."""
    family = family_of(model.config)
    prefix = "" if label_count(model.module) is None else family.prefix
    templates = {} if family.attention is None else family.attention._asdict()
    return {name: f"{prefix}{template.format(layer)}" for name, template in templates.items()}


def with_factors_between(model: Model, factors: Mapping[tuple[int, int], tuple[Factors, Factors]]) -> Model:
    """The model whose heads' dimensions are multiplied by factors, into the kernels on both sides of them.

    The scores of a head are divided by the root of its dimensions; queries are scaled so that they stay.

    Args:
      factors: by layer and number in `SIDES`: those of query or value, (heads, old, new), and, as they are for the
        columns of key or the rows of output, those of the other.
    """
    flat: dict[str, Any] = dict(flatten_dict(model.params, keep_empty_nodes=True, sep="/"))
    sizes, heads = [list(each) for each in sizes_of(model)], model.module.config.num_attention_heads  # pyright: ignore
    for (layer, side), (first, second) in factors.items():
        paths, old = paths_in(model, layer), sizes[layer][side]
        new = sizes[layer][side] = first.shape[-1]
        scaled = first * np.sqrt(new / old) if side == 0 else first
        for name, each in zip(SIDES[side], (scaled, second), strict=True):
            flat |= multiplied(flat, paths[name], each, rows=name == "output", heads=heads)
    changed = model._replace(params=unflatten_dict(flat, sep="/"))
    return with_sizes(changed, tuple((first, second) for first, second in sizes))


def multiplied(flat: Mapping[str, Any], path: str, factors: Factors, *, rows: bool, heads: int) -> dict[str, Any]:
    """By path, the parameters of a layer with the dimensions of heads, its columns or rows, multiplied by factors."""
    names = ("kernel", "left") if rows else ("kernel", "right", "bias")
    found = {}
    for place in (f"{path}/{name}" for name in names):
        leaf = flat.get(place)
        if leaf is None or isinstance(leaf, Factorised):
            continue
        leaf = leaf.whole() if is_integers(leaf) else leaf
        wide = np.asarray(leaf, np.float64)
        wide = wide.T if rows else wide
        split = wide.reshape(*wide.shape[:-1], heads, -1)
        made = np.einsum("...hs,hsr->...hr", split, factors).reshape(*wide.shape[:-1], -1)
        found[place] = np.ascontiguousarray(made.T if rows else made).astype(leaf.dtype)
    return found


def widened(model: Model, sizes: Sequence[tuple[int, int]]) -> Model:
    """The same outputs from heads of these dimensions, no fewer than they have: the rest are zeros."""
    heads, factors = getattr(model.module, "config").num_attention_heads, {}  # noqa: B009
    for layer, (has, wanted) in enumerate(zip(sizes_of(model), sizes, strict=True)):
        for side, (old, new) in enumerate(zip(has, wanted, strict=True)):
            if old != new:
                eye = np.broadcast_to(np.eye(old, new), (heads, old, new))
                factors[layer, side] = eye, eye
    return with_factors_between(model, factors) if factors else model


def with_sizes(model: Model, sizes: Sizes) -> Model:
    """The model whose module and config say that its heads have these dimensions."""
    module: Any = model.module
    fewer = sizes != whole_sizes(model)
    module = module.clone(config=replace(module.config, head_sizes=sizes if fewer else (), identities=False))
    kept = {name: value for name, value in (model.config.get("low_rank") or {}).items() if name != "heads"}
    config = {name: value for name, value in model.config.items() if name != "low_rank"}
    if kept or fewer:
        heads = {"heads": [list(each) for each in sizes]} if fewer else {}
        config["low_rank"] = section_of(kept | heads, low_rank(model.config), dtypes_of(model.config))
    return model._replace(module=module, config=config)


def check_heads(model: Model) -> None:
    """A ValueError for a model whose heads cannot have fewer dimensions."""
    check_family(model, "has no heads that are known: leave pairs out")
    check_plain(model)
    if model.forward is not None:
        raise ValueError("pairs: got a model that is called by forward= or output=, wanted it without: leave pairs out")
    if family_of(model.config).attention is None:
        kind = model.config.get("model_type")
        raise ValueError(f"pairs: got a model of {kind!r}, whose heads keep all their dimensions: leave pairs out")


def pairs_of(model: Model, shapes: Shapes | None = None) -> list[Pair]:
    """Those of a model, or of the kernels that are selected."""
    heads, found = getattr(model.module, "config").num_attention_heads, []  # noqa: B009
    for layer, sizes in enumerate(sizes_of(model)):
        paths = paths_in(model, layer)
        for side, (names, size) in enumerate(zip(SIDES, sizes, strict=True)):
            first, second = (paths[name] for name in names)
            ones = tuple(f"{first}_{head}" for head in range(heads))
            if size > 1 and (shapes is None or (first in shapes and second in shapes)):
                found.append(Pair(layer, side, (first, second), ones, size=size))
    return found


def check_plain(model: Model) -> None:
    """A ValueError for a model with identities, which is for measuring."""
    if getattr(getattr(model.module, "config", None), "identities", False):
        raise ValueError("got what with_identities(model) returned, wanted the model itself")


def selected_pairs(model: Model, shapes: Shapes) -> list[Pair]:
    """Those of the kernels that are selected, or a ValueError if there are none."""
    check_heads(model)
    found = pairs_of(model, shapes)
    if not found:
        wanted = "query and key, or value and output, of a layer"
        raise ValueError(f"pairs: got {len(shapes)} selected kernels, {next(iter(shapes))!r} first, wanted {wanted}")
    return found


def identities_in(pairs: Iterable[Pair]) -> dict[str, tuple[int, int]]:
    """The shapes of the identities by their paths."""
    return {path: (pair.size, pair.size) for pair in pairs for path in pair.identities}


def smaller_sizes(size: int) -> Int[np.ndarray, " sizes"]:
    """The numbers of dimensions that heads of this size may keep instead."""
    step = STEP if size > 2 * STEP else 1
    return np.arange(step, size, step)
