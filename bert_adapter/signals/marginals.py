"""The marginals of the Fisher information, E[GG'] along inputs, E[G'G] along outputs (Gupta et al. 2018, Shampoo).

The default gives ranks by them, and makes factors by them and by what enters a layer.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

import wlra
from bert_adapter.importance.through import Through, diagonal_mean
from bert_adapter.signals.definition import Evidence, Signal, TableWeights
from bert_adapter.signals.reliability import gram_reliability


def shampoo(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The Kronecker product of the marginals of the Fisher information: its sums over outputs, and over inputs.

    With G a gradient, E[GG'] and E[G'G], as in Gupta et al. 2018; one power step from the identity to the nearest
    Kronecker product (Morwani et al. 2024, sec. 3). Unlike E[xx'] and E[delta delta'], they know which time steps go
    together. Both are shrunk towards the identity, as far as they are noise. A kernel magnifies what is real more than
    noise; so of what it passes on the square of the share that is real is kept, which is near that of the whole matrix.
    """
    sums = evidence.sums
    grams = [gram for gram in (sums.row_gram, sums.col_gram) if gram is not None]
    real = zip(gram_reliability(evidence), grams, strict=True)
    noise = [1 - (share**2 if isinstance(gram, Through) else share) for share, gram in real]
    shares = noise if shrink is None else [shrink, shrink]
    return wlra.Kronecker(*marginals(grams, shares))


def shampoo_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """The squared gradient of each row, and E[G'G], which is shrunk towards the identity, over its trace."""
    sums = evidence.sums
    assert sums.token_squares is not None
    share = 1 - gram_reliability(evidence)[-1] if shrink is None else shrink
    return TableWeights(sums.token_squares, marginals([sums.col_gram, sums.col_gram], [share, share])[1])


def combined(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """Those of Shampoo, with half of the matrix along inputs replaced by E[xx'], scaled to the same trace.

    A gradient does not see what the loss is flat in, such as what a later norm takes out, and an error there is no
    longer free once other errors are large. E[xx'] counts every input that occurs.
    """
    weights, inputs = shampoo(evidence, shrink), evidence.sums.inputs
    assert inputs is not None
    return weights._replace(row=halfway(weights.row, inputs))


def combined_of_table(evidence: Evidence, shrink: float | None) -> TableWeights:
    """Factors by how often each row is looked up, E[xx'] of rows of the identity; ranks by the squared gradients.

    Errors of the words of one text add up, which squares of single rows do not see: factors by these lose nearly twice
    as much (benchmarks/whole.py). What the squares do not see either is that factors of low rank leave shorter rows,
    which the norm behind the table sizes up again, with their errors.
    """
    weights = shampoo_of_table(evidence, shrink)
    assert evidence.sums.token_counts is not None
    return weights._replace(rows=evidence.sums.token_counts, ranks=weights.rows, normed=True)


Gram = Float[np.ndarray, "n n"] | Through


def halfway(gram: Gram, other: Any) -> Gram:
    """The mean of a matrix and another one, scaled to the same trace."""
    mean, its = map(diagonal_mean, (gram, other))
    scale = mean / its if its > 0 else 0.0
    if isinstance(gram, Through):
        return gram._replace(matrix=(gram.matrix + scale * other.matrix) / 2)
    found = np.multiply(np.asarray(other), scale)
    found += gram
    found *= 0.5
    return found


def marginals(grams: list[Any], shares: list[float]) -> list[Any]:
    """Both shrunk towards the identity; the second is divided by the trace, which they have in common."""
    row, col = (towards_identity(gram, share) for gram, share in zip(grams, shares, strict=True))
    trace = next(float(np.trace(gram)) for gram in (row, col) if not isinstance(gram, Through))
    return [row, divided(col, trace if trace > 0 else 1.0)]


def divided(gram: Gram, number: float) -> Gram:
    """The matrix over a number, in place."""
    if isinstance(gram, Through):
        return gram._replace(matrix=gram.matrix / number, mean=gram.mean / number)
    gram /= number
    return gram


def towards_identity(gram: Any, share: float) -> Any:
    """Shrunk towards the multiple of the identity that has the same trace (Ledoit & Wolf 2004, sec. 2).

    On the host, where symmetric matrices are put together: a few passes over memory, and no program for every shape.
    """
    if isinstance(gram, Through):
        return gram._replace(matrix=(1 - share) * gram.matrix + share * diagonal_mean(gram) * gram.of_identity)
    gram = np.asarray(gram)
    found = np.multiply(gram, 1 - share)
    found.reshape(-1)[:: len(gram) + 1] += share * diagonal_mean(gram)
    return found


SHAMPOO = Signal(
    name="shampoo",
    about="E[GG'] along inputs and E[G'G] along outputs, G an example's gradient (Gupta et al. 2018)",
    weights=shampoo,
    method="kronecker",
    statistics=("row_gram", "col_gram", "gram_squares"),
    units="loss",
    through=True,
    tables=shampoo_of_table,
    reliability=lambda evidence: min(gram_reliability(evidence)),
)
COMBINED = SHAMPOO._replace(
    name="combined",
    about="ranks by E[GG'] and E[G'G]; factors by the same, with half of E[GG'] replaced by E[xx'] of inputs",
    weights=combined,
    statistics=("inputs", *SHAMPOO.statistics),
    tables=combined_of_table,
    ranks=shampoo,
)
