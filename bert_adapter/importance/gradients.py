"""Whose gradients are measured: of labels, or of the model's own predictive distribution."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.distributions import DISTRIBUTIONS
from bert_adapter.distributions.draw import Draw
from bert_adapter.layers.capture import Batch, examples

Loss = Callable[[Any, Batch], Float[Array, " batch"]]
Gradients = Loss | str  # a loss of examples with labels, or one of DISTRIBUTIONS


def check_gradients(gradients: Any) -> Gradients:
    """The function, or the name of a distribution."""
    known: Any = gradients
    if not (callable(gradients) or (isinstance(gradients, str) and gradients in DISTRIBUTIONS)):
        names = ", ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(
            f"gradients must be a function (output, batch) -> (batch,), the loss of each example with its label, or "
            f"one of {names}, the distribution that the model predicts; got {gradients!r}"
        )
    return known


def each_loss(loss: Loss, output: Any, batch: Batch) -> Float[Array, " batch"]:
    """The loss of each example.

    Raises:
      ValueError: the function returns something else, such as a mean, whose gradients are those of no example.
    """
    found, count = loss(output, batch), examples(batch)
    if jnp.shape(found) != (count,):
        raise ValueError(
            f"loss: got an array {jnp.shape(found)} for {count} examples, wanted ({count},), the loss of each: "
            f"sum over the axes of an example alone, as jnp.sum((output - batch['labels']) ** 2, axis=1)"
        )
    return found


def output_gradients(gradients: Gradients, output: Any, batch: Batch, draw: Draw) -> Any:
    """Gradients with respect to the output, stacked: the squares of what they reach are summed over the stack."""
    if callable(gradients):
        loss = gradients
        found = jax.grad(lambda output: jnp.sum(each_loss(loss, output, batch)))(output)
        return jax.tree.map(lambda leaf: leaf[None], found)
    distribution = DISTRIBUTIONS[gradients]
    if getattr(output, "ndim", None) not in distribution.axes:
        raise ValueError(
            f"gradients={gradients!r} wants a model whose output is one array {distribution.shape}; got "
            f"{jax.tree.map(jnp.shape, output)}: pass a function (output, batch) -> (batch,) instead"
        )
    return distribution.gradients(output, batch, draw)
