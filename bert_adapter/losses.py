"""Losses of examples with labels, and distances from a teacher's outputs, for what a module's output stands for."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bert_adapter.families import predictive
from bert_adapter.layers.capture import Batch


class TaskLoss(NamedTuple):
    """The loss of each example with its labels, (output, batch) -> (batch,): minus the likelihood's logarithm.

    kind: the distribution that the output stands for, a name in `LOSSES`.
    """

    kind: str

    def __call__(self, output: Any, batch: Batch) -> Float[Array, " batch"]:
        """Of the batch's "labels"."""
        if "labels" not in batch:
            raise ValueError(f"batch: got {sorted(batch)}, wanted 'labels' too: labelled_batches(model, rows) has them")
        return LOSSES[self.kind](jnp.asarray(output), jnp.asarray(batch["labels"]))


def task_loss(module: nn.Module) -> TaskLoss:
    """The function (output, batch) -> (batch,): how unlikely the module's head finds each example's labels.

    The config's "problem_type" says what these are: classes (batch,), whose loss is the cross-entropy of a softmax;
    labels (batch, labels) of 0 and 1 at once, the sum of the cross-entropies of sigmoids; or values, (batch,) or
    (batch, labels), half the squared error. Without one, a single output is a value, and several are those of classes.

    Raises:
      ValueError: for a head that has no loss; while tracing, for labels that are missing or of another shape or dtype.

    Example:
      >>> import jax.numpy as jnp, bert_adapter
      >>> from bert_adapter.losses import task_loss
      >>> from bert_adapter.sample import sample_model
      >>> head = bert_adapter.with_head(sample_model(), 3, problem_type="multi_label_classification")
      >>> task_loss(head.module)(jnp.zeros((2, 3)), {"labels": jnp.ones((2, 3))}).shape
      (2,)
    """
    return TaskLoss(predictive(module))


def cross_entropy(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, " batch"]:
    """Minus the logarithm of the softmax at each label."""
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: got {labels.dtype} of shape {labels.shape}, wanted integers of shape {logits.shape[:1]}, the "
            f'classes; "problem_type": "multi_label_classification" in config.json declares labels at once'
        )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def sigmoid_cross_entropy(logits: Float[Array, "batch labels"], labels: Array) -> Float[Array, " batch"]:
    """Minus the logarithm of the likelihood of all labels, each independent of the others."""
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, like(logits, labels)), axis=1)


def squared_error(values: Float[Array, "batch labels"], labels: Array) -> Float[Array, " batch"]:
    """Half of it."""
    return 0.5 * jnp.sum((values - like(values, labels)) ** 2, axis=1)


def like(output: Float[Array, "batch labels"], labels: Array) -> Float[Array, "batch labels"]:
    """A label for each number of the output."""
    if output.shape[1:] == (1,) and labels.ndim == 1:
        labels = labels[:, None]
    if labels.shape != output.shape:
        raise ValueError(f"labels: got shape {labels.shape}, wanted that of the output, {output.shape}")
    return labels.astype(output.dtype)


LOSSES: dict[str, Callable[[Any, Array], Float[Array, " batch"]]] = {
    "categorical": cross_entropy,
    "bernoulli": sigmoid_cross_entropy,
    "gaussian": squared_error,
}


@lru_cache(maxsize=32)
def distillation(module: Any, temperature: float) -> Callable[[Any, Any], Float[Array, " batch"]]:
    """How far each output of the module is from what is wanted (Hinton, Vinyals & Dean 2015, sec. 2).

    Between classes, or labels at once, the divergence of the softened distributions times the square of the
    temperature; else half the squared distance. The same function for the same arguments, so that what is compiled with
    it serves again.
    """
    apart = DIVERGENCES[predictive(module)]

    def softened(output: Any, wanted: Any) -> Float[Array, " batch"]:
        return temperature**2 * apart(output / temperature, wanted / temperature)

    return softened


def between_classes(logits: Any, wanted: Any) -> Float[Array, " batch"]:
    """The divergence of the softmax from the one wanted."""
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(wanted))


def between_labels(logits: Any, wanted: Any) -> Float[Array, " batch"]:
    """The divergence of the sigmoids from those wanted, summed over the labels."""
    there, away = (
        jax.nn.sigmoid(sign * wanted) * (jax.nn.log_sigmoid(sign * wanted) - jax.nn.log_sigmoid(sign * logits))
        for sign in (1, -1)
    )
    return jnp.sum(there + away, axis=1)


def distance(output: Any, wanted: Any) -> Float[Array, " batch"]:
    """Half its square."""
    return 0.5 * jnp.sum((output - wanted) ** 2, axis=tuple(range(1, output.ndim)))


DIVERGENCES: dict[str, Callable[[Any, Any], Float[Array, " batch"]]] = {
    "categorical": between_classes,
    "bernoulli": between_labels,
    "gaussian": distance,
}
