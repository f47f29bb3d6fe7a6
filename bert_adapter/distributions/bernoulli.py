"""Labels that may be there at once, each by a sigmoid."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bert_adapter.distributions.definition import Batch, Distribution
from bert_adapter.distributions.draw import Draw


def bernoulli(logits: Float[Array, "batch labels"]) -> Float[Array, "gradients batch labels"]:
    """Their outer products sum to diag(p (1 - p)), the expectation over labels drawn from the sigmoids p."""
    deviation = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits))
    return jnp.eye(logits.shape[1], dtype=logits.dtype)[:, None, :] * deviation[None]


def gradients(logits: Float[Array, "batch labels"], batch: Batch, draw: Draw) -> Float[Array, "gradients batch labels"]:
    """One for each label."""
    return bernoulli(logits)


def loss(logits: Float[Array, "batch labels"], labels: Array, batch: Batch) -> Float[Array, " batch"]:
    """Minus the logarithm of the likelihood of all labels, each independent of the others."""
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, like(logits, labels)), axis=1)


def like(output: Float[Array, "batch labels"], labels: Array) -> Float[Array, "batch labels"]:
    """A label for each number of the output."""
    if output.shape[1:] == (1,) and labels.ndim == 1:
        labels = labels[:, None]
    if labels.shape != output.shape:
        raise ValueError(f"labels: got shape {labels.shape}, wanted that of the output, {output.shape}")
    return labels.astype(output.dtype)


def apart(logits: Array, wanted: Array, batch: Batch) -> Float[Array, " batch"]:
    """The divergence of the sigmoids from those wanted, summed over the labels."""
    there, away = (
        jax.nn.sigmoid(sign * wanted) * (jax.nn.log_sigmoid(sign * wanted) - jax.nn.log_sigmoid(sign * logits))
        for sign in (1, -1)
    )
    return jnp.sum(there + away, axis=1)


BERNOULLI = Distribution("(batch, labels)", (2,), gradients, loss=loss, apart=apart)
