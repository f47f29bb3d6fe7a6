"""Names and shapes of parameters, in PyTorch's files and in Flax's trees."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SCHEMA = 1  # of the "low_rank" section


BUFFERS = ("embeddings/position_ids", "embeddings/token_type_ids")  # constants that old checkpoints store


def by_path(params: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, "encoder/layer/0/...". FACTORISED is no leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def from_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """A PyTorch parameter's Flax path and value. In the oldest, LayerNorm has gamma and beta."""
    *parents, leaf = name.split(".")
    parent = ["", *parents][-1]
    weight = "scale" if parent == "LayerNorm" else "embedding" if parent.endswith("_embeddings") else "kernel"
    leaf = {"weight": weight, "gamma": "scale", "beta": "bias"}.get(leaf, leaf)
    return "/".join([*parents, leaf]), tensor.T if leaf == "kernel" else tensor


def to_torch(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A Flax parameter's PyTorch name and value; contiguous, for safetensors writes the memory as it lies."""
    *parents, leaf = path.split("/")
    name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*parents, name]), np.ascontiguousarray(array.T if leaf == "kernel" else array)


def encoder_only(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's parameters: without the pretraining heads, and without the prefix it has beside heads."""
    encoder = {path: array for path, array in found.items() if not path.startswith("cls/")}
    prefix = "bert/" if all(path.startswith("bert/") for path in encoder) else ""
    return {path.removeprefix(prefix): array for path, array in encoder.items()}


def low_rank(config: Mapping[str, Any]) -> dict[str, int]:
    """The rank of every module that the config says is factorised."""
    section = config.get("low_rank", {"schema": SCHEMA})
    schema = section.get("schema")
    if schema != SCHEMA:
        raise ValueError(f"config low_rank schema: got {schema}, wanted {SCHEMA}; upgrade bert_adapter to read it")
    return section.get("ranks", {})


def shapes(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the module once the kernels named by `ranks` are factorised."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    full = {path: leaf.shape for path, leaf in by_path(params).items()}
    if unknown := [path for path in ranks if f"{path}/kernel" not in full]:
        raise ValueError(f"config low_rank ranks: got {unknown}, wanted paths of dense modules")
    kept = {path: shape for path, shape in full.items() if path.removesuffix("/kernel") not in ranks}
    left = {f"{path}/left": (full[f"{path}/kernel"][0], rank) for path, rank in ranks.items()}
    right = {f"{path}/right": (rank, full[f"{path}/kernel"][1]) for path, rank in ranks.items()}
    return kept | left | right


def check(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> None:
    """One ValueError lists every parameter that is missing, left over, of another shape, or not floating."""
    got = {
        path: array.shape if jnp.issubdtype(array.dtype, jnp.floating) else f"{array.dtype} {array.shape}"
        for path, array in found.items()
    }
    problems = [
        f"{path}: got {got.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in {**wanted, **got}
        if got.get(path) != wanted.get(path)
    ]
    if problems:
        raise ValueError("the parameters do not fit the model\n  " + "\n  ".join(problems))
