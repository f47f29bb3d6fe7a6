"""The weights that others use: one for each input, or none."""

import numpy as np
from jaxtyping import Array, Float

from bert_adapter.signals.definition import Evidence, Signal, TableWeights


def row(evidence: Evidence, shrink: float | None) -> Float[Array, "in 1"]:
    """The Fisher information of an input's entries together (Hsu et al. 2022, sec. 3.2)."""
    assert evidence.sums.rows is not None
    return evidence.sums.rows[:, None]


def row_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """The same of a table's rows."""
    assert evidence.sums.token_squares is not None
    return TableWeights(evidence.sums.token_squares, np.ones(evidence.shape[1]))


def equal_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """All entries matter the same."""
    return TableWeights(np.full((2, evidence.shape[0]), 0.5), np.ones(evidence.shape[1]))


def equal(evidence: Evidence, shrink: float | None) -> None:
    """All entries matter the same."""


FWSVD = Signal(
    name="fwsvd",
    about="a weight for each input, the Fisher information of its entries together (Hsu et al. 2022)",
    weights=row,
    method="fwsvd",
    statistics=("rows",),
    tables=row_of_table,
    shrinks=False,
)
SVD = Signal(
    name="svd",
    about="no weights: nothing is measured",
    weights=equal,
    method="svd",
    tables=equal_of_table,
    shrinks=False,
)
