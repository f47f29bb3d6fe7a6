"""Rounding that gradients pass through, as if it were not there (Bengio, Léonard & Courville 2013, sec. 2).

So matrices that are stored in fewer bits are trained as what they will be. The numbers are those of
`checkpoint.bits`, computed by JAX. What has 16 bits itself is trained in 32, since small steps are lost in 16.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from bert_adapter.checkpoint.bits import FLOATS, INT8, LARGEST, Stored, as_stored
from bert_adapter.checkpoint.nibbles import HIGHEST
from bert_adapter.layers.integers import LOWEST, in_groups


def straight_through(params: Any, stored: tuple[Stored, ...]) -> Any:
    """The parameters as they are stored, to the last digit but one, with the gradients of those that are given.

    But for groups of 4 bits whose largest number is 6 steps or fewer, as errors that are made up for leave some: these
    are on the steps that `steps` would find for their numbers alone.
    """
    if not stored:
        return params
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for path, dtype, by_rows in stored:
        flat[path] = flat[path] + jax.lax.stop_gradient(nearest(flat[path], dtype, by_rows) - flat[path])
    return unflatten_dict(flat, sep="/")


def widened(tree: Any) -> Any:
    """The arrays, those of floats of 16 bits in float32."""

    def wide(leaf: Any) -> Any:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if floats else leaf

    return jax.tree.map(wide, tree)


def narrowed(tree: Any, like: Any) -> Any:
    """The arrays, each in the dtype that it has in `like`."""
    return jax.tree.map(lambda leaf, of: leaf.astype(of.dtype), tree, like)


def as_kept(trained: Any, like: Any, dtypes: Mapping[str, str]) -> Any:
    """What is kept of parameters that were trained: each in the dtype that it has in `like`, and as it is stored."""
    return as_stored(narrowed(trained, like), dtypes)


def nearest(array: Float[Array, "*stack m n"], dtype: str, by_rows: bool) -> Float[Array, "*stack m n"]:
    """What is stored of the matrix, each number rounded to the nearest.

    Example:
      >>> import jax.numpy as jnp
      >>> from bert_adapter.straight_through import nearest
      >>> nearest(jnp.array([[8.0], [-3.9], [0.4]]), "int4", by_rows=False).ravel().tolist()
      [8.0, -4.0, 0.0]
    """
    if dtype in FLOATS:
        return in_bits_of(array, FLOATS[dtype])
    if not by_rows:
        return jnp.swapaxes(nearest(jnp.swapaxes(array, -1, -2), dtype, True), -1, -2)
    if dtype == INT8:
        return on_steps(array, jnp.max(jnp.abs(array), axis=-1, keepdims=True) / LARGEST, -LARGEST, LARGEST)
    groups = in_groups(array, jnp)
    high, low = (reduce(groups, axis=-1, keepdims=True) for reduce in (jnp.max, jnp.min))
    end = jnp.where(high > -low, -high, -low)
    tried = [
        on_steps(groups, in_bits_of(scale, jnp.bfloat16), LOWEST, HIGHEST)
        for scale in (end / -LOWEST, jnp.abs(end) / HIGHEST)
    ]
    errors = [jnp.sum((groups - each) ** 2, axis=-1, keepdims=True) for each in tried]
    found = jnp.where(errors[0] <= errors[1], *tried)
    return found.reshape(*array.shape[:-1], -1)[..., : array.shape[-1]]


def in_bits_of(array: Array, dtype: Any) -> Array:
    """The nearest numbers of the dtype; but for XLA, which may leave out a cast there and back."""
    kind = jnp.finfo(dtype)
    if kind.bits >= jnp.finfo(array.dtype).bits:
        return array
    least = float(kind.smallest_subnormal)
    small = jnp.round(array / least) * least  # what has fewer digits, which XLA takes for 0
    rounded = jax.lax.reduce_precision(array, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    return jnp.where(jnp.abs(array) < float(kind.tiny), small, rounded) if dtype == jnp.float16 else rounded


def on_steps(numbers: Array, scale: Array, least: int, most: int) -> Array:
    """The nearest of the steps from the least to the most, 0 where the scale is."""
    steps = jnp.round(numbers / jnp.where(scale == 0, 1, scale))
    return jnp.clip(steps, least, most) * scale
