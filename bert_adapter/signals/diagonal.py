"""Weights of single entries, and of rows."""

from jaxtyping import Array, Float

from bert_adapter.signals.reliability import reliability, separable_fit
from bert_adapter.signals.signal import Evidence, Rotated


def diagonal(evidence: Evidence, shrink: float | None) -> Float[Array, "in out"]:
    """The diagonal of the Fisher information, blended with its separable fit."""
    halves = evidence.sums.fisher
    assert halves is not None
    fisher = halves[0] + halves[1]
    share = 1 - reliability(halves) if shrink is None else shrink
    return fisher + share * (separable_fit(fisher) - fisher)


def in_eigenbasis(evidence: Evidence, shrink: float | None) -> Rotated:
    """The same in the coordinates of the basis (George et al. 2018, sec. 3)."""
    assert evidence.basis is not None
    return Rotated(diagonal(evidence, shrink), evidence.basis)


def row(evidence: Evidence, shrink: float | None) -> Float[Array, "in 1"]:
    """The Fisher information of an input's entries together (Hsu et al. 2022, sec. 3.2)."""
    assert evidence.sums.rows is not None
    return evidence.sums.rows[:, None]
