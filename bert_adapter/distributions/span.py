"""A span of tokens: where it starts and where it ends, each by a softmax over the visible tokens.

Devlin et al. 2019, sec. 4.2. Differs from transformers: padding is no place, so that nothing depends on how far a row
is padded; and the losses of start and end are added, as the logarithms of likelihoods are, and not averaged.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.distributions import categorical
from bert_adapter.distributions.definition import Batch, Distribution
from bert_adapter.distributions.draw import Draw


def ends(logits: Float[Array, "batch time 2"], batch: Batch) -> Float[Array, "batch 2 time"]:
    """For start and end, logits of the tokens as classes, which are out of the question for padding."""
    if logits.shape[2] != 2:
        raise ValueError(f"gradients='span': got logits of shape {logits.shape}, wanted two for each token")
    moved, mask = jnp.swapaxes(logits, 1, 2), batch.get("attention_mask")
    if mask is None:
        return moved
    return jnp.where((jnp.asarray(mask) > 0)[:, None, :], moved, jnp.finfo(logits.dtype).min)


def gradients(logits: Float[Array, "batch time 2"], batch: Batch, draw: Draw) -> Float[Array, "1 batch time 2"]:
    """A random direction for each example: see `categorical.directions`."""
    both = ends(logits, batch)
    return jnp.swapaxes(categorical.directions(both, jnp.ones(both.shape[:2], bool), draw), 2, 3)


def loss(logits: Float[Array, "batch time 2"], labels: Array, batch: Batch) -> Float[Array, " batch"]:
    """Of the numbers (batch, 2) of the first and the last token; -100 does not count."""
    if labels.shape != (len(logits), 2) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: got {labels.dtype} of shape {labels.shape}, wanted integers of shape {(len(logits), 2)}, the "
            f"first and the last token of each answer"
        )
    return categorical.loss(ends(logits, batch), labels, batch)


def apart(logits: Array, wanted: Array, batch: Batch) -> Float[Array, " batch"]:
    """The divergences of start and of end, added up."""
    return categorical.apart(ends(logits, batch), ends(wanted, batch), {})


SPAN = Distribution("(batch, time, 2)", (3,), gradients, loss=loss, apart=apart)
