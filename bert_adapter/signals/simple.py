"""The weights that others use: one for each input, or none."""

from jaxtyping import Array, Float

from bert_adapter.signals.definition import Evidence, Signal


def row(evidence: Evidence, shrink: float | None) -> Float[Array, "in 1"]:
    """The Fisher information of an input's entries together (Hsu et al. 2022, sec. 3.2)."""
    assert evidence.sums.rows is not None
    return evidence.sums.rows[:, None]


def equal(evidence: Evidence, shrink: float | None) -> None:
    """All entries matter the same."""


FWSVD = Signal(
    name="fwsvd",
    about="a weight for each input, the Fisher information of its entries together (Hsu et al. 2022)",
    weights=row,
    method="fwsvd",
    statistics=("rows",),
)
SVD = Signal(
    name="svd",
    about="no weights: nothing is measured",
    weights=equal,
    method="svd",
)
