"""Inputs and output gradients, taken for independent."""

import numpy as np

import wlra
from bert_adapter.signals.definition import Evidence, Signal, TableWeights
from bert_adapter.signals.marginals import towards_identity


def kfac(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """E[xx'] and E[delta delta'] of inputs x and output gradients delta (Martens & Grosse 2015, sec. 3).

    Inputs are taken for independent of output gradients, and a time step of all others.
    """
    inputs, outputs = evidence.sums.inputs, evidence.sums.outputs
    assert inputs is not None
    assert outputs is not None
    return wlra.Kronecker(towards_identity(inputs, shrink or 0.0), towards_identity(outputs, shrink or 0.0))


def activation(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The error of the layer's output (Chen et al. 2021, DRONE)."""
    assert evidence.sums.inputs is not None
    eye = np.eye(evidence.shape[1], dtype=np.float32)
    return wlra.Kronecker(towards_identity(evidence.sums.inputs, shrink or 0.0), eye)


def kfac_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """How often each row is looked up, and E[delta delta']: E[xx'] of rows of the identity is diagonal."""
    counts, outputs = evidence.sums.token_counts, evidence.sums.outputs
    assert counts is not None
    assert outputs is not None
    return TableWeights(counts, towards_identity(outputs, shrink or 0.0))


def activation_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """How often each row is looked up: the error of what is found."""
    assert evidence.sums.token_counts is not None
    return TableWeights(evidence.sums.token_counts, np.ones(evidence.shape[1]))


KFAC = Signal(
    name="kfac",
    about="E[xx'] of inputs and E[dd'] of output gradients, taken for independent (Martens & Grosse 2015)",
    weights=kfac,
    method="kronecker",
    through=True,
    statistics=("inputs", "outputs"),
    tables=kfac_of_table,
    per_token=True,
    units="loss",
)
ACTIVATION = Signal(
    name="activation",
    about="E[xx'] of inputs alone: the error of each layer's output (Chen et al. 2021)",
    weights=activation,
    method="kronecker",
    through=True,
    statistics=("inputs",),
    tables=activation_of_table,
    per_token=True,
)
