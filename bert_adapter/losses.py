"""Losses of examples with labels, and distances from a teacher's outputs, for what a module's output stands for."""

from collections.abc import Callable
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.distributions import DISTRIBUTIONS
from bert_adapter.families import predictive
from bert_adapter.layers.capture import Batch

NOTHING: Batch = MappingProxyType({})


class TaskLoss(NamedTuple):
    """The loss of each example with its labels, (output, batch) -> (batch,): minus the likelihood's logarithm.

    kind: the distribution that the output stands for, a name in `DISTRIBUTIONS`.
    """

    kind: str

    def __call__(self, output: Any, batch: Batch) -> Float[Array, " batch"]:
        """Of the batch's "labels"."""
        if "labels" not in batch:
            raise ValueError(f"batch: got {sorted(batch)}, wanted 'labels' too: labelled_batches(model, rows) has them")
        return DISTRIBUTIONS[self.kind].loss(jnp.asarray(output), jnp.asarray(batch["labels"]), batch)


def task_loss(module: nn.Module) -> TaskLoss:
    """The function (output, batch) -> (batch,): how unlikely the module's head finds each example's labels.

    Of texts, the config's "problem_type" says what these are: classes (batch,), whose loss is the cross-entropy of a
    softmax; labels (batch, labels) of 0 and 1 at once, the sum of the cross-entropies of sigmoids; or values, (batch,)
    or (batch, labels), half the squared error. Without one, a single output is a value, and several are those of
    classes. Of tokens they are classes (batch, time), of answers the numbers (batch, 2) of the first and the last
    token, of choices (batch,). The losses of all places of an example are added up; a label of -100 does not count.

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


def distillation(module: Any, temperature: float) -> Callable[..., Float[Array, " batch"]]:
    """(output, wanted, batch) -> (batch,): how far each output of the module is from what is wanted.

    Hinton, Vinyals & Dean 2015, sec. 2: where the outputs stand for labels, the divergence of the softened
    distributions times the square of the temperature; else half the squared distance. The same function for the same
    arguments, so that what is compiled with it serves again.
    """
    return distance(predictive(module), temperature)


@lru_cache(maxsize=32)
def distance(kind: str, temperature: float) -> Callable[..., Float[Array, " batch"]]:
    """The same for a distribution that outputs stand for, a name in `DISTRIBUTIONS`."""
    apart = DISTRIBUTIONS[kind].apart

    def softened(output: Any, wanted: Any, batch: Batch = NOTHING) -> Float[Array, " batch"]:
        return temperature**2 * apart(output / temperature, wanted / temperature, batch)

    return softened
