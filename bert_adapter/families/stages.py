"""What sentence-transformers puts behind an encoder: pooling, dense layers, scaling to length one.

Reimers & Gurevych 2019, sec. 3; names and numbers as in sentence-transformers 5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bert_adapter.families.activations import gelu

Hidden = Float[Array, "batch time hidden"]
Visible = Float[Array, "batch time"]  # 1 for tokens, 0 for padding
Rows = Float[Array, "batch hidden"]


class Pooling(NamedTuple):
    """One vector from the states of a text's tokens: those of all modes side by side.

    width: of the states, if that is declared.
    name: of the folder that declares it.
    """

    modes: tuple[str, ...] = ("mean",)
    width: int | None = None
    name: str = "1_Pooling"


class Projection(NamedTuple):
    """A dense layer (inputs, features) with an activation of `PROJECTED`; its parameters lie below `name`/linear."""

    name: str
    inputs: int
    features: int
    use_bias: bool
    activation: str


class Normalise(NamedTuple):
    """Vectors are scaled to length one."""

    name: str


Stage = Pooling | Projection | Normalise
UNDECLARED: tuple[Stage, ...] = (Pooling(),)  # sentence-transformers' own, where a directory says nothing


PROJECTED: dict[str, Callable[[Array], Array]] = {  # by the last part of PyTorch's name
    "Identity": lambda x: x,
    "Tanh": nn.tanh,
    "ReLU": nn.relu,
    "GELU": gelu,
    "Sigmoid": nn.sigmoid,
    "SiLU": nn.silu,
}


def weighted_sum(hidden: Hidden, weights: Visible) -> Rows:
    return (hidden * weights[:, :, None]).sum(axis=1)


def state_at(hidden: Hidden, place: Int[Array, " batch"]) -> Rows:
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


def first(hidden: Hidden, visible: Visible) -> Rows:
    """The first visible token's state."""
    return state_at(hidden, jnp.argmax(visible, axis=1))


def largest(hidden: Hidden, visible: Visible) -> Rows:
    """The largest value of each number over the visible tokens."""
    lowest = jnp.finfo(hidden.dtype).min
    seen = jnp.where(visible[:, :, None] > 0, hidden, lowest).max(axis=1)
    return jnp.where(visible.max(axis=1, keepdims=True) > 0, seen, 0)


def mean(hidden: Hidden, visible: Visible) -> Rows:
    """The mean over the visible tokens."""
    return weighted_sum(hidden, visible) / jnp.maximum(visible.sum(axis=1), 1)[:, None]


def mean_by_root(hidden: Hidden, visible: Visible) -> Rows:
    """The sum over the visible tokens, divided by the square root of their number."""
    return weighted_sum(hidden, visible) / jnp.sqrt(jnp.maximum(visible.sum(axis=1), 1))[:, None]


def mean_by_position(hidden: Hidden, visible: Visible) -> Rows:
    """The mean over the visible tokens, the first counted once, the second twice (Muennighoff 2022, sec. 4.1)."""
    counted = visible * jnp.arange(1, hidden.shape[1] + 1, dtype=visible.dtype)[None, :]
    return weighted_sum(hidden, counted) / jnp.maximum(counted.sum(axis=1), 1)[:, None]


def last(hidden: Hidden, visible: Visible) -> Rows:
    """The last visible token's state."""
    return state_at(hidden * visible[:, :, None], hidden.shape[1] - 1 - jnp.argmax(visible[:, ::-1], axis=1))


MODES: dict[str, Callable[[Hidden, Visible], Rows]] = {
    "cls": first,
    "max": largest,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_by_root,
    "weightedmean": mean_by_position,
    "lasttoken": last,
}


def pooled(stage: Pooling, hidden: Hidden, mask: Any) -> Float[Array, "batch width"]:
    """A row for each text. One without visible tokens is zeros, with zero gradients, unless its first token counts.

    Sums of states in 16 bits are made in 32.
    """
    if stage.width not in (None, hidden.shape[-1]):
        raise ValueError(f"{stage.name}/config.json: got states of {stage.width} numbers, wanted {hidden.shape[-1]}")
    states = wide(hidden)
    visible = jnp.ones(states.shape[:2], states.dtype) if mask is None else jnp.asarray(mask, states.dtype)
    return jnp.concatenate([MODES[mode](states, visible) for mode in stage.modes], axis=1).astype(hidden.dtype)


def normalised(rows: Rows) -> Rows:
    """The rows scaled to length one; zeros stay zeros, with zero gradients."""
    squared = (wide(rows) ** 2).sum(axis=1, keepdims=True)
    return (wide(rows) / jnp.sqrt(jnp.where(squared > 0, squared, 1))).astype(rows.dtype)


def wide(array: Array) -> Array:
    """In 32 bits at least."""
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array
