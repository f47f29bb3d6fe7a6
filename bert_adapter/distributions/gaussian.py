"""Values, or an embedding, with the same unit variance around each number."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.distributions.bernoulli import like
from bert_adapter.distributions.definition import Batch, Distribution
from bert_adapter.distributions.draw import Draw


def gaussian(output: Float[Array, "batch width"], draw: Draw) -> Float[Array, "1 batch width"]:
    """Each row v is drawn evenly from the sphere of radius sqrt(width): v v' is the identity in expectation."""
    directions = draw.rows(jax.random.normal, output)
    radius = jnp.sqrt(jnp.array(output.shape[1], output.dtype))
    return (radius * directions / jnp.linalg.norm(directions, axis=1, keepdims=True))[None]


def gradients(output: Float[Array, "batch width"], batch: Batch, draw: Draw) -> Float[Array, "1 batch width"]:
    """A random direction for each example."""
    return gaussian(output, draw)


def loss(values: Float[Array, "batch labels"], labels: Array, batch: Batch) -> Float[Array, " batch"]:
    """Half the squared error."""
    return 0.5 * jnp.sum((values - like(values, labels)) ** 2, axis=1)


def apart(output: Array, wanted: Array, batch: Batch) -> Float[Array, " batch"]:
    """Half the squared distance."""
    return 0.5 * jnp.sum((output - wanted) ** 2, axis=tuple(range(1, output.ndim)))


GAUSSIAN = Distribution("(batch, width)", (2,), gradients, loss=loss, apart=apart)
