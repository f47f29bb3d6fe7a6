"""Losses of examples with labels, and distances from a teacher's outputs."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bert_adapter.families import predictive
from bert_adapter.layers.capture import Batch


def task_loss(logits: Float[Array, "batch labels"], batch: Batch) -> Float[Array, " batch"]:
    """The loss of each example with its label: cross-entropy, or half the squared error of a regression."""
    labels = jnp.asarray(batch["labels"])
    if logits.shape[1] == 1:
        return 0.5 * (logits[:, 0] - labels.astype(logits.dtype)) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


@lru_cache(maxsize=32)
def distillation(module: nn.Module, temperature: float) -> Callable[[Any, Any], Float[Array, " batch"]]:
    """How far each output of the module is from what is wanted (Hinton, Vinyals & Dean 2015, sec. 2).

    Between classes, the divergence of the softened distributions times the square of the temperature; else half the
    squared distance. The same function for the same arguments, so that what is compiled with it serves again.
    """

    def divergence(logits: Any, wanted: Any) -> Float[Array, " batch"]:
        soft, target = jax.nn.log_softmax(logits / temperature), jax.nn.softmax(wanted / temperature)
        return temperature**2 * optax.losses.kl_divergence(soft, target)

    def distance(output: Any, wanted: Any) -> Float[Array, " batch"]:
        return 0.5 * jnp.sum((output - wanted) ** 2, axis=tuple(range(1, output.ndim)))

    return divergence if predictive(module) == "categorical" else distance
