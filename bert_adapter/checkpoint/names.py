"""Paths and shapes of the parameters that a config asks for."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bert_adapter.checkpoint.bits import FEWER, INTEGERS
from bert_adapter.layers.integers import is_integers
from bert_adapter.layers.marker import FACTORISED, Factorised
from bert_adapter.layers.places import kernel_path
from bert_adapter.layers.running import parameter_shapes

MOST_LISTED = 40
SCHEMA, WITH_DTYPES, WITH_HEADS = 1, 2, 3  # of the "low_rank" section: with ranks alone, dtypes, sizes of heads


def by_path(params: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, "encoder/layer/0/...". FACTORISED is no leaf, `Integers` are one."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_integers)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def low_rank(config: Mapping[str, Any]) -> dict[str, int]:
    """The rank of every module that the config says is factorised."""
    section = config.get("low_rank") or {"schema": SCHEMA}
    if not isinstance(section, dict):
        raise ValueError(f"config low_rank: got {section!r}, wanted an object with 'schema' and 'ranks'")
    schema, ranks = section.get("schema"), section.get("ranks", {})
    if schema not in (SCHEMA, WITH_DTYPES, WITH_HEADS):
        wanted = f"{SCHEMA} to {WITH_HEADS}"
        raise ValueError(f"config low_rank schema: got {schema}, wanted {wanted}; upgrade bert_adapter to read it")
    if not isinstance(ranks, dict) or [rank for rank in ranks.values() if type(rank) is not int or rank < 1]:
        raise ValueError(f"config low_rank ranks: got {ranks!r}, wanted a positive integer for each path")
    return ranks


def dtypes_of(config: Mapping[str, Any]) -> dict[str, str]:
    """By path, of the layers whose matrices the config says are stored in fewer bits than they have."""
    low_rank(config)
    found = (config.get("low_rank") or {}).get("dtypes", {})
    if not isinstance(found, dict) or any(dtype not in FEWER for dtype in found.values()):
        raise ValueError(f"config low_rank dtypes: got {found!r}, wanted one of {', '.join(FEWER)} for each path")
    return found


def heads_of(config: Mapping[str, Any]) -> list[Any] | None:
    """The sizes of each layer's heads, where the config says that they are fewer; a family's config checks them."""
    low_rank(config)
    return (config.get("low_rank") or {}).get("heads")


def section_of(kept: Mapping[str, Any], ranks: Mapping[str, int], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """The section with these ranks and dtypes, what else is kept of it, and the schema that says what it holds."""
    rest = {name: value for name, value in kept.items() if name not in ("schema", "ranks", "dtypes")}
    schema = WITH_HEADS if "heads" in rest else WITH_DTYPES if dtypes else SCHEMA
    return {"schema": schema, "ranks": dict(ranks)} | rest | ({"dtypes": dict(dtypes)} if dtypes else {})


def with_dtypes(config: dict[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """The config that says which layers are stored in fewer bits.

    Without a section for dense ones in floats, which all libraries read as they are.
    """
    ranks, fewer = low_rank(config), {path: dtype for path, dtype in dtypes.items() if dtype in FEWER}
    if not ranks and not heads_of(config) and not set(INTEGERS) & set(fewer.values()):
        return {name: value for name, value in config.items() if name != "low_rank"}
    return config | {"low_rank": section_of(config.get("low_rank") or {}, ranks, fewer)}


def is_apart(config: Mapping[str, Any]) -> bool:
    """Whether the config is of what only this package reads: factors, heads of fewer dimensions, integers."""
    return bool(low_rank(config) or heads_of(config) or dtypes_of(config))


APART = "low_rank_"  # before "model_type" on disk: transformers refuses it, and draws no random kernels


def stored(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The config as its file has it: where it is apart, of a model that transformers does not know."""
    return config | {"model_type": f"{APART}{model_type}"} if is_apart(config) else config


def restored(config: dict[str, Any]) -> dict[str, Any]:
    """The config whose file is this, as `stored` made it."""
    name = config.get("model_type")
    return config | {"model_type": name.removeprefix(APART)} if isinstance(name, str) else config


def shapes(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the module once the kernels named by `ranks` are factorised."""
    params, kernels = parameter_shapes(module)
    if unknown := [path for path in ranks if path not in kernels]:
        raise ValueError(f"config low_rank ranks: got {unknown}, wanted paths of layers that can be factorised")
    full = {path: leaf.shape for path, leaf in by_path(params).items()}
    gone = {kernel_path(full, path) for path in ranks}
    kept = {path: shape for path, shape in full.items() if path not in gone}
    left = {f"{path}/left": (*kernels[path][0], rank) for path, rank in ranks.items()}
    right = {f"{path}/right": (rank, *kernels[path][1]) for path, rank in ranks.items()}
    return kept | left | right


def markers(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, Factorised]:
    """By path, what stands in the place of the kernels and tables that are factorised."""
    if not ranks:
        return {}
    full = by_path(parameter_shapes(module)[0])
    return {kernel_path(full, path): FACTORISED for path in ranks}


def check(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> None:
    """One ValueError lists the parameters that are missing, left over, of another shape, not floating or not finite."""
    got = {path: described(array) for path, array in found.items()}
    problems = [
        f"{path}: got {got.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in {**wanted, **got}
        if got.get(path) != wanted.get(path)
    ]
    if problems:
        first, *others = {path.split("/")[0] for path in got} or {""}
        wrapped = first and not others and first not in {path.split("/")[0] for path in wanted}
        hint = (
            f": all names begin with {first!r}, as a wrapper's do; wanted those of the module inside" if wrapped else ""
        )
        more = [f"and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
        raise ValueError("\n  ".join([f"the parameters do not fit the model{hint}", *problems[:MOST_LISTED], *more]))


def described(array: Any) -> tuple[int, ...] | str:
    """An array's shape, and what else there is to say of numbers that no parameter can be."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"{array.dtype} {array.shape}"
    finite = np.isfinite(array)
    return array.shape if finite.all() else f"{array.shape} with {int(np.sum(~finite))} values NaN or infinite"
