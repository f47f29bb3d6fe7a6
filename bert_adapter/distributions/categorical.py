"""Classes, by a softmax: one for each example, or one for each of its places."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from bert_adapter.distributions.definition import Batch, Distribution
from bert_adapter.distributions.draw import Draw

IGNORED = -100  # the label of a place that does not count, as in PyTorch


def gradients(logits: Array, batch: Batch, draw: Draw) -> Float[Array, "gradients ..."]:
    """Exact for a class for each example; one random direction for a class for each place."""
    if logits.shape[-1] < 2:
        raise ValueError(f"gradients='categorical': got logits of shape {logits.shape}, wanted two classes or more")
    return categorical(logits) if logits.ndim == 2 else directions(logits, counted(logits, batch), draw)


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


def directions(
    logits: Float[Array, "batch places classes"], counts: Bool[Array, "batch places"], draw: Draw
) -> Float[Array, "1 batch places classes"]:
    """One gradient: at each place that counts, the sum of sqrt(p_c) (e_c - p) over the classes c with random signs.

    The outer product is, in expectation, diag(p) - p p' at each place, and zero between two places, whose labels are
    independent: what a backward pass for each class of each place would sum to. A label drawn from p would do as well,
    with more noise where p is nearly sure.
    """
    return combined(logits, draw.rows(jax.random.rademacher, logits), counts)[None]


def combined(
    logits: Float[Array, "batch places classes"], signs: Array, counts: Bool[Array, "batch places"]
) -> Float[Array, "batch places classes"]:
    """The gradients of all classes at each place that counts, added up with the signs."""
    p = jax.nn.softmax(logits)
    signed = jnp.sqrt(p) * signs
    return jnp.where(counts[:, :, None], signed - p * jnp.sum(signed, axis=2, keepdims=True), 0)


def counted(logits: Float[Array, "batch places classes"], batch: Batch) -> Bool[Array, "batch places"]:
    """The places that count: those that are visible, and, if the batch has labels, have one."""
    counts = jnp.ones(logits.shape[:2], bool)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is not None and jnp.shape(mask) == counts.shape:
        counts = counts & (jnp.asarray(mask) > 0)
    if labels is not None and jnp.shape(labels) == counts.shape:
        counts = counts & (jnp.asarray(labels) != IGNORED)
    return counts


def loss(logits: Array, labels: Array, batch: Batch) -> Float[Array, " batch"]:
    """Minus the logarithm of the softmax at each label, summed over the places of an example; -100 does not count."""
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        hint = '; "problem_type": "multi_label_classification" in config.json declares labels at once'
        raise ValueError(
            f"labels: got {labels.dtype} of shape {labels.shape}, wanted integers of shape {logits.shape[:-1]}, the "
            f"classes{hint if logits.ndim == 2 else f', and {IGNORED} where there is none'}"
        )
    counts = labels != IGNORED
    safe = jnp.where(counts, labels, 0).astype(jnp.int32)
    each = jnp.where(counts, optax.softmax_cross_entropy_with_integer_labels(logits, safe), 0)
    return each.reshape(len(logits), -1).sum(axis=1)


def apart(logits: Array, wanted: Array, batch: Batch) -> Float[Array, " batch"]:
    """The divergence of the softmax from the one wanted, summed over the places of an example that count."""
    shares = jax.nn.softmax(wanted)
    logs = jnp.where(shares > 0, jax.nn.log_softmax(logits), 0)  # a class that cannot be may be -inf in both
    each = optax.losses.kl_divergence(logs, shares)
    return each if logits.ndim == 2 else jnp.sum(jnp.where(counted(logits, batch), each, 0), axis=1)


CATEGORICAL = Distribution("(batch, classes) or (batch, time, classes)", (2, 3), gradients, loss=loss, apart=apart)
