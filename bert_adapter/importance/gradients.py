"""Whose gradients are measured: of labels, or of the model's own predictive distribution."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.layers.capture import Batch

DISTRIBUTIONS = ("categorical", "gaussian", "bernoulli")
Loss = Callable[[Any, Batch], Float[Array, " batch"]]
Gradients = Loss | str  # a loss of examples with labels, or one of DISTRIBUTIONS


def check_gradients(gradients: Any) -> Gradients:
    """The function, or the name of a distribution."""
    known: Any = gradients
    if not (callable(gradients) or gradients in DISTRIBUTIONS):
        names = ", ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(
            f"gradients must be a function (output, batch) -> (batch,), the loss of each example with its label, or "
            f"one of {names}, the distribution that the model predicts; got {gradients!r}"
        )
    return known


@partial(jax.tree_util.register_dataclass, data_fields=["key", "begin"], meta_fields=["rows"])
@dataclass(frozen=True)
class Draw:
    """Which random directions: those of the rows from `begin` on, of `rows` that the key gives directions."""

    key: Any
    begin: Any
    rows: int


def output_gradients(gradients: Gradients, output: Any, batch: Batch, draw: Draw) -> Any:
    """Gradients with respect to the output, stacked: the squares of what they reach are summed over the stack."""
    if callable(gradients):
        loss = gradients
        return jax.tree.map(lambda leaf: leaf[None], jax.grad(lambda output: jnp.sum(loss(output, batch)))(output))
    if getattr(output, "ndim", None) != 2:
        raise ValueError(
            f"gradients={gradients!r} wants a model whose output is one array (batch, width); got "
            f"{jax.tree.map(jnp.shape, output)}: pass a function (output, batch) -> (batch,) instead"
        )
    if gradients == "gaussian":
        return gaussian(output, draw)
    return categorical(output) if gradients == "categorical" else bernoulli(output)


def categorical(logits: Float[Array, "batch classes"]) -> Float[Array, "gradients batch classes"]:
    """Their outer products sum to diag(p) - p p', the expectation over labels that the model would draw.

    So do those of the gradients sqrt(p_c) (e_c - p) for all C classes c. As sqrt(p) combines them to 0, a reflection
    that takes the last axis to sqrt(p) leaves C - 1 of them: two classes take one backward pass.
    """
    p = jax.nn.softmax(logits)
    half, eye = jnp.sqrt(p), jnp.eye(logits.shape[1], dtype=p.dtype)
    each = half[:, :, None] * (eye[None] - p[:, None, :])
    axis = half + eye[-1][None]
    reflected = each - axis[:, :, None] * (jnp.einsum("bc,bcd->bd", axis, each) / (1 + half[:, -1:]))[:, None, :]
    return jnp.swapaxes(reflected[:, :-1], 0, 1)


def bernoulli(logits: Float[Array, "batch labels"]) -> Float[Array, "gradients batch labels"]:
    """Their outer products sum to diag(p (1 - p)), the expectation over labels drawn from the sigmoids p."""
    deviation = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits))
    return jnp.eye(logits.shape[1], dtype=logits.dtype)[:, None, :] * deviation[None]


def gaussian(output: Float[Array, "batch width"], draw: Draw) -> Float[Array, "1 batch width"]:
    """Each row v is drawn evenly from the sphere of radius sqrt(width): v v' is the identity in expectation."""
    every = jax.random.normal(draw.key, (draw.rows, output.shape[1]), output.dtype)
    directions = jax.lax.dynamic_slice_in_dim(every, draw.begin, len(output))
    radius = jnp.sqrt(jnp.array(output.shape[1], output.dtype))
    return (radius * directions / jnp.linalg.norm(directions, axis=1, keepdims=True))[None]
