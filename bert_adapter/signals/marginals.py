"""The marginals of the Fisher information."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import wlra
from bert_adapter.signals.reliability import gram_reliability
from bert_adapter.signals.signal import Evidence


def shampoo(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The product with the marginals of the Fisher information: what it sums to over inputs, and over outputs.

    With G a gradient, E[GG'] and E[G'G], as in Gupta et al. 2018; the step from the identity towards the nearest
    Kronecker product (Morwani et al. 2024, sec. 3). Unlike E[xx'] and E[delta delta'], they know which steps of time go
    together. Both drawn towards the identity.
    """
    sums = evidence.sums
    grams = [gram for gram in (sums.row_gram, sums.col_gram) if gram is not None]
    shares = [1 - one for one in gram_reliability(evidence)] if shrink is None else [shrink, shrink]
    return wlra.Kronecker(*marginals(grams, shares))


@jax.jit
def marginals(grams: list[Float[Array, "_ _"]], shares: list[Any]) -> list[Float[Array, "_ _"]]:
    """Both drawn towards the identity; of the trace that they have in common, the second is relieved."""
    row, col = (towards_identity(gram, share) for gram, share in zip(grams, shares, strict=True))
    trace = jnp.sum(jnp.diagonal(row))
    return [row, col / jnp.where(trace > 0, trace, 1)]


def towards_identity(gram: Float[Array, "n n"], share: Any) -> Float[Array, "n n"]:
    """Blended with the multiple of the identity that has the same trace (Ledoit & Wolf 2004, sec. 2)."""
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return (1 - share) * gram + share * jnp.mean(jnp.diagonal(gram)) * eye
