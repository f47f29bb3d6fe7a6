"""`flax.linen.Embed`, whose table (vocabulary, width) is looked up: a product with rows of the identity."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from bert_adapter.layers.integers import is_integers
from bert_adapter.layers.layer import Layer


def promoted(module: Any, *arrays: Any) -> Any:
    """The arrays in the dtype that the module computes in."""
    return getattr(module, "promote_dtype", promote_dtype)(*arrays, dtype=module.dtype)


def look_up(
    module: Any, ids: Any, factors: tuple[Any, Any], bias: Any, promoted: Callable[..., Any] = promoted
) -> Array:
    """Rows of left @ right, or of `left` alone: those of `left`, multiplied by `right`. No table is made."""
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(f"ids: got {jnp.result_type(ids)}, wanted integers, the numbers of rows of a table")
    left, right = factors
    rows = left.rows(ids) if is_integers(left) else jnp.take(left, ids, axis=0)
    if right is None:
        return promoted(module, rows)[0]
    rows, right = promoted(module, rows, right)
    return rows @ right


def attend(module: Any, query: Any, factors: tuple[Any, Any], promoted: Callable[..., Any] = promoted) -> Array:
    """query @ (left @ right).T, without a table."""
    left, right = (factor.whole() if is_integers(factor) else factor for factor in factors)
    if right is None:
        query, left = promoted(module, query, left)
        return query @ left.T
    query, left, right = promoted(module, query, left, right)
    return query @ right.T @ left.T


EMBED = Layer(
    nn.Embed,
    input_axes=lambda module: 1,
    run=look_up,
    kernel="embedding",
    looked_up=True,
    methods={"attend": attend},
)
