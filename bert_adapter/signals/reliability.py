"""How much of what was measured is no noise."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.importance.sums import BLOCK
from bert_adapter.importance.through import Through, diagonal_mean
from bert_adapter.signals.definition import Evidence


def reliability(halves: Float[Array, "2 in out"]) -> float:
    """The share of the weights' deviation from their separable fit that is no noise, in [0, 1].

    In units of the fit, the halves of an estimate differ by its noise alone: (a - b)**2 is in expectation the noise of
    a + b, squared. With more examples it tends to 1, unless the weights are separable.

    Args:
      halves: the weights measured on every other example, and on the rest; see `Sums.fisher`.

    Example:
      >>> import jax.numpy as jnp, bert_adapter
      >>> weights = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> bert_adapter.reliability(jnp.stack([weights, weights]))  # both halves agree
      1.0
    """
    fisher = halves[0] + halves[1]
    fit = separable_fit(fisher)
    unit = jnp.where(fit > 0, 1 / jnp.where(fit > 0, fit, 1), 0)
    noise = jnp.sum(((halves[0] - halves[1]) * unit) ** 2)
    deviation = jnp.sum(((fisher - fit) * unit) ** 2)
    return float(jnp.where(deviation > 0, jnp.clip(1 - noise / jnp.where(deviation > 0, deviation, 1), 0, 1), 0))


def gram_reliability(evidence: Evidence) -> tuple[float, ...]:
    """Of E[GG'] and E[G'G], the share of the deviation from a multiple of the identity that is no noise, in [0, 1].

    Of a table there is E[G'G] alone.

    Squared Frobenius norms of deviations, as Ledoit & Wolf 2004, sec. 3: the variance of a sum of A_b = G_b G_b' is
    N/(N - 1) (sum ||A_b||**2 - ||sum A_b||**2 / N), nothing where examples agree. So is that of G_b' G_b where an
    example has one gradient, whose norm is the same. Of what is `Through` the kernel the norms are of that. Where
    examples have weights N is how many of equal weights tell as much, (sum w)**2 / sum w**2.
    """
    sums = evidence.sums
    examples = evidence.examples if evidence.effective is None else evidence.effective
    found = []
    for gram in [gram for gram in (sums.row_gram, sums.col_gram) if gram is not None]:
        squares = gram.squares if isinstance(gram, Through) else sums.gram_squares
        assert squares is not None
        whole, deviation = squared_norms(gram)
        noise = max(float(squares) - whole / examples, 0) * examples / max(examples - 1, 1)
        real = examples > 1 and deviation > 0
        found.append(min(max(1 - noise / deviation, 0.0), 1.0) if real else 0.0)
    return tuple(found)


def squared_norms(gram: Any) -> tuple[float, float]:
    """Of the matrix, and of its deviation from the multiple of the identity with its trace."""
    if isinstance(gram, Through):
        return squared_norm(gram.matrix), squared_norm(gram.matrix - diagonal_mean(gram) * gram.of_identity)
    gram = np.asarray(gram)
    whole = sum(squared_norm(rows) for rows in np.array_split(gram, -(-len(gram) // BLOCK)))
    return whole, whole - float(np.trace(gram, dtype=np.float64)) ** 2 / len(gram)


def squared_norm(matrix: Any) -> float:
    """The sum of its squares."""
    return float(np.sum(np.square(matrix, dtype=np.float64)))


def separable_fit(fisher: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The product of the sums of its rows and of its columns over the sum of all: equal where rows are proportional."""
    whole = jnp.sum(fisher)
    return jnp.sum(fisher, axis=1)[:, None] * (jnp.sum(fisher, axis=0) / jnp.where(whole > 0, whole, 1))[None, :]
