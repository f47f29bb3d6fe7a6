"""Weights of single entries: the diagonal of the Fisher information."""

from jaxtyping import Array, Float

from bert_adapter.signals.definition import Evidence, Signal
from bert_adapter.signals.reliability import reliability, separable_fit


def diagonal(evidence: Evidence, shrink: float | None) -> Float[Array, "in out"]:
    """The diagonal of the Fisher information, shrunk towards its separable fit."""
    halves = evidence.sums.fisher
    assert halves is not None
    fisher = halves[0] + halves[1]
    share = 1 - reliability(halves) if shrink is None else shrink
    return fisher + share * (separable_fit(fisher) - fisher)


def diagonal_reliability(evidence: Evidence) -> float:
    """That of the diagonal, from its halves."""
    assert evidence.sums.fisher is not None
    return reliability(evidence.sums.fisher)


EXACT = Signal(
    name="exact",
    about="a weight for each entry: the Fisher information of the model's own predictions",
    weights=diagonal,
    method="anderson",
    statistics=("fisher",),
    units="loss",
    refuses_labels=True,
    reliability=diagonal_reliability,
)
FISHER = EXACT._replace(
    name="fisher",
    about="the same of labels, from the gradients of a loss",
    needs_labels=True,
    refuses_labels=False,
)
