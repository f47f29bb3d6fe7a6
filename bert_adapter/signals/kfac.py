"""Inputs and output gradients, taken for independent."""

import jax.numpy as jnp

import wlra
from bert_adapter.signals.marginals import towards_identity
from bert_adapter.signals.signal import Evidence


def kronecker(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """Inputs and output gradients, taken for independent of each other and of other steps of time (Martens & Grosse
    2015, sec. 3)."""
    inputs, outputs = evidence.sums.inputs, evidence.sums.outputs
    assert inputs is not None
    assert outputs is not None
    return wlra.Kronecker(towards_identity(inputs, shrink or 0.0), towards_identity(outputs, shrink or 0.0))


def activation(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The error of the layer's output (Chen et al. 2021, DRONE)."""
    assert evidence.sums.inputs is not None
    eye = jnp.eye(evidence.shape[1], dtype=jnp.float32)
    return wlra.Kronecker(towards_identity(evidence.sums.inputs, shrink or 0.0), eye)
