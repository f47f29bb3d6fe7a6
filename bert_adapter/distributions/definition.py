"""What a distribution says of itself: all that the rest of the package knows of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bert_adapter.distributions.draw import Draw

Batch = Mapping[str, Any]


class Distribution(NamedTuple):
    """What a model's output says of the labels that an example may have.

    shape: of an output, in words.
    axes: how many axes an output may have.
    gradients: (output, batch, draw) -> gradients of the output, stacked. Their outer products sum, for each example, to
      the Fisher information of its output, in expectation over the draw if they are random.
    loss: (output, labels, batch) -> (batch,), minus the logarithm of the labels' likelihood. A ValueError for labels of
      another shape or dtype.
    apart: (output, wanted, batch) -> (batch,), what the loss is expected to be higher if labels are drawn from what the
      output `wanted` says.
    """

    shape: str
    axes: tuple[int, ...]
    gradients: Callable[[Any, Batch, Draw], Any]
    loss: Callable[[Any, Any, Batch], Any]
    apart: Callable[[Any, Any, Batch], Any]
