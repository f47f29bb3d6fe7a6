"""How far what leaves the layers of a model is from what leaves those of another."""

import math
from collections import Counter
from typing import Any

import jax.numpy as jnp
from flax.core.tracers import current_trace
from jaxtyping import Array, Float

from bert_adapter.layers.capture import Batch, Forward, Place
from bert_adapter.layers.layer import real_steps
from bert_adapter.layers.observing import Site, observing


def leaving(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> tuple[Any, dict[Place, Array]]:
    """The model's output, and what leaves each call of the layers at the paths, while a program of it is traced.

    Not of those that are called inside a transformation of the model's own, such as `nn.scan`: no array leaves that.
    """
    found: dict[Place, Array] = {}
    calls, outside = Counter[str](), current_trace()

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        if site.path in paths and current_trace() == outside:
            found[site.path, calls[site.path]] = outputs
            calls[site.path] += 1
        return outputs

    with observing(note, factors=True):
        return forward(params, batch), found


def mean_apart(ours: dict[Place, Array], theirs: dict[Place, Array], batch: Batch) -> Float[Array, " batch"]:
    """For each example, the squared distances of what leaves the layers over the squares of theirs: the mean of all.

    Padding counts for nothing, where an attention mask tells which steps are padding.
    """
    count, mask = len(next(iter(batch.values()))), batch.get("attention_mask")
    same = [place for place, array in ours.items() if place in theirs and array.shape == theirs[place].shape]
    each = [relative(ours[place], theirs[place], mask, count) for place in same if len(ours[place]) % count == 0]
    return sum(each, jnp.zeros(count, jnp.float32)) / max(len(each), 1)


def relative(ours: Array, theirs: Array, mask: Any, count: int) -> Float[Array, " batch"]:
    """Of one call."""
    steps, seen = 1, jnp.ones((count, 1, 1), jnp.float32)
    if mask is not None and ours.ndim > 2 and math.prod(ours.shape[:2]) == mask.size:
        steps = mask.size // count
        seen = real_steps(mask, count, steps, 1).astype(jnp.float32)
    one, other = (array.astype(jnp.float32).reshape(count, steps, -1) for array in (ours, theirs))
    squares = jnp.sum(seen * other**2, axis=(1, 2))
    return jnp.sum(seen * (one - other) ** 2, axis=(1, 2)) / jnp.where(squares > 0, squares, 1)
