"""Tables of embeddings decomposed: a weight for each row, and a prior for the rows that no text has looked up."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bert_adapter.signals.definition import TableWeights
from wlra import tall
from wlra.components import Decomposed, Side, square_root, usable

PRIORS = (0.0, *np.geomspace(1e-4, 1, 13).tolist())  # among which held-out texts choose
SHORTEST = 1e-3  # of a squared length: rows are not sized up further
UNKNOWN = 0.5  # where no texts can be held out


class Tokens(NamedTuple):
    """What is known of a table's rows.

    seen, rows: how many were looked up by the texts that were measured on, of how many.
    prior: the share of all weight that every row gets the same of, seen or not.
    lost_seen, lost_unseen: by rank 0, 1, ..., the share of the weighted square that is lost of the rows that were seen,
      and of the others, which all weigh the same.
    """

    seen: int
    rows: int
    prior: float
    lost_seen: Float[np.ndarray, " ranks"]
    lost_unseen: Float[np.ndarray, " ranks"]


def decompose_table(
    table: Float[np.ndarray, "vocabulary width"], weights: TableWeights, rank: int, prior: float | None = None
) -> tuple[Decomposed, Tokens]:
    """The components of a table, up to `rank` of them, and what is known of its rows.

    A row's weight is what was measured of it, and its share of the prior: the one for which factors that half of the
    texts lead to lose least on the other half, over all ranks, unless it is given. So much for the directions; the
    squares are those of what ranks are planned by, as it was measured. Memory: the table twice, and a few matrices
    (width, width).

    Raises:
      ValueError: values that are not finite, or weights that cannot be.
    """
    halves, planned, col = (np.asarray(each, np.float64) for each in (weights.rows, weights.planned, weights.columns))
    check(table, halves, planned, col)
    root, total = square_root(col), halves.sum(axis=0)
    every, by_half = tall.gram(table), [tall.gram(table, half) for half in halves]
    if prior is None:
        prior = chosen_prior(halves, by_half, every, root=root)
    measured = by_half[0] + by_half[1]
    gram = (1 - prior) * measured + prior * total.sum() / len(table) * every
    found = tall.components(table, gram, col, rank)
    along = tall.directions(tall.congruent(gram, root), root)
    seen = total > 0
    few = 2 * np.sum(seen) <= len(table)
    part = tall.gram(table, np.asarray(seen if few else ~seen, np.float64))
    unseen = every - part if few else part
    told = measured if weights.ranks is None else tall.gram(table, planned.sum(axis=0))
    squares, others = (tall.squares_along(along, each) for each in (told, unseen))
    known = Tokens(
        seen=int(np.sum(seen)),
        rows=len(table),
        prior=float(prior),
        lost_seen=lost_by_rank(squares),
        lost_unseen=lost_by_rank(others),
    )
    if weights.normed:
        squares = sized_up(squares, along, gram, told)
    return found._replace(squares=squares), known


def sized_up(
    squares: Float[np.ndarray, " n"], along: tall.Directions, gram: Any, told: Float[np.ndarray, "n n"]
) -> Float[np.ndarray, " n"]:
    """The squares of which more is lost at each rank, by how much shorter rows are left.

    At rank 0, where none is left, as much more as at rank 1. Rows are measured together, by the weighted mean of their
    squared lengths.

    gram, told: of the table, weighted by what factors are made by, and by what `squares` are of.
    """
    basis = along.basis / np.sqrt(np.where(along.squares > 0, along.squares, np.inf))
    right = basis.T @ gram
    lengths = np.cumsum(np.cumsum((basis.T @ told @ basis) * (right @ right.T), axis=0), axis=1).diagonal()
    beyond = np.append(np.cumsum(squares[::-1])[::-1], 0)
    whole = max(float(np.trace(told)), np.finfo(np.float64).tiny)
    longer = np.maximum(whole / np.maximum(lengths, SHORTEST * whole), 1)
    return -np.diff(np.minimum.accumulate(beyond * np.append(longer[0], longer)))


def chosen_prior(
    halves: Float[np.ndarray, "2 vocabulary"],
    by_half: list[Float[np.ndarray, "width width"]],
    every: Float[np.ndarray, "width width"],
    *,
    root: Side,
) -> float:
    """The prior of least held-out loss: the mean logarithm over ranks, and over both halves as what is held out.

    by_half, every: the Gram matrices of the table, weighted by each half, and by nothing.
    """
    sums = halves.sum(axis=1)
    if np.ptp(halves.sum(axis=0)) == 0:
        return 0.0
    if min(sums) <= 0:
        return UNKNOWN
    grams = [tall.congruent(gram / whole, root) for gram, whole in zip(by_half, sums, strict=True)]
    even, same = tall.congruent(every / halves.shape[1], root), np.ones(len(every))
    losses = []
    for prior in PRIORS:
        loss = 0.0
        for fitted, held in (grams, grams[::-1]):
            along = tall.directions((1 - prior) * fitted + prior * even, same)
            lost = lost_by_rank(tall.squares_along(along, held))[1:-1]
            loss += float(np.sum(np.log(np.maximum(lost, 1e-12))))
        losses.append(loss)
    return PRIORS[int(np.argmin(losses))]


def lost_by_rank(squares: Float[np.ndarray, " n"]) -> Float[np.ndarray, " ranks"]:
    """The share of the sum that is beyond rank 0, 1, ..., n; zeros if there is nothing to lose."""
    beyond = np.append(np.cumsum(squares[::-1])[::-1], 0)
    return beyond / beyond[0] if beyond[0] > 0 else beyond


def check(table: Any, halves: Any, planned: Any, col: Any) -> None:
    """A ValueError for what cannot be a table's values and weights."""
    if not np.isfinite(table).all():
        raise ValueError("the table has values that are NaN or infinite, wanted finite ones")
    if not all(np.isfinite(rows).all() and (rows >= 0).all() and rows.any() for rows in (halves, planned)):
        raise ValueError("the weights of the table's rows must be finite, not negative, and not all 0")
    if not usable(col) or not col.any():
        raise ValueError("the weights of the table's columns must be finite, symmetric if a matrix, and not all 0")
