"""What storing matrices in fewer bits is predicted to lose, from their values as they are after rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bert_adapter.checkpoint.bits import INT4, INT8, holds, rounded
from bert_adapter.layers.layer import Axes
from wlra import tall
from wlra.components import Decomposed, Side, congruent

SHARES = (0.25, 0.5, 1.0)  # of the largest rank: where it is computed, and between which it is interpolated


class Rounding(NamedTuple):
    """Half the weighted squared error of rounding one matrix, in units of the weights.

    ranks: at which factors were rounded; before the first there is rank 0.
    factors: by dtype, what rounding the factors of those ranks adds to what is lost already.
    dense: by dtype, what rounding the matrix itself loses.
    """

    ranks: Int[np.ndarray, " few"]
    factors: dict[str, Float[np.ndarray, " few"]]
    dense: dict[str, float]

    def at(self, ranks: Int[np.ndarray, " ranks"], dtype: str) -> Float[np.ndarray, " ranks"]:
        """What rounding factors of each rank adds; it grows with the rank about linearly."""
        return np.interp(ranks, np.append(0, self.ranks), np.append(0, self.factors[dtype]))


def narrower(kernel: Any) -> list[str]:
    """The dtypes of fewer bits than the matrix has, one of 16 bits that holds its numbers."""
    half = [dtype for dtype in ("float16", "bfloat16") if kernel.dtype.itemsize > 2 and holds(dtype, kernel)]
    return [*half[:1], INT8, *([INT4] if holds(INT4, kernel) else [])]


def rounding(
    kernel: Float[np.ndarray, "m n"],
    found: Decomposed,
    sides: tuple[Side, Side],
    *,
    by_rows: bool,
    given: Any | None = None,
    axes: Axes | None = None,
) -> Rounding:
    """That of a matrix and of its components. A table's scales are of its rows, and so are those of its left factor.

    sides: what errors are weighted by.
    given: what `feedback` makes of a Gram matrix of the inputs, by which errors of 4 bits are made up for.
    axes: of the kernel's inputs, and of its outputs, if these are several: scales are for them, and 4 bits for none.
    """
    inputs, outputs = axes or ((kernel.shape[0],), (kernel.shape[1],))
    assert found.left is not None
    assert found.right is not None
    ranks = np.unique(np.ceil(len(found.right) * np.array(SHARES)).astype(int))
    how: dict[str, Any] = {"by_rows": by_rows, "given": given}
    factors, dense = {}, {}
    for dtype in narrower(kernel):
        if dtype == INT4 and len(inputs) + len(outputs) > 2:
            continue
        along = gram_of(kernel, dtype, sides[0], of=errors, axes=(*inputs, *outputs), **how)
        dense[dtype] = weighted_square(along, None, sides[1])
        pairs = [(found.left[:, :rank], found.right[:rank]) for rank in ranks]
        factors[dtype] = np.array(
            [of_factors(*pair, dtype, sides=sides, axes=(inputs, outputs), **how) for pair in pairs]
        )
    return Rounding(ranks, factors, dense)


def of_factors(
    left: Any, right: Any, dtype: str, *, by_rows: bool, sides: tuple[Side, Side], axes: Axes, given: Any | None = None
) -> float:
    """Half the weighted square of left @ right minus the product of what they are rounded to.

    That is [left - L, L] @ [right; right - R], of twice the rank.
    """
    if not (holds(dtype, left) and holds(dtype, right)):
        return np.inf
    inputs, outputs = axes
    both = np.concatenate([right, right - rounded(right.reshape(-1, *outputs), dtype, False).reshape(right.shape)])
    how: dict[str, Any] = {"by_rows": by_rows, "of": beside, "given": given}
    return weighted_square(gram_of(left, dtype, sides[0], axes=(*inputs, left.shape[1]), **how), both, sides[1])


def errors(part: Float[np.ndarray, "m n"], less: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """What rounding takes away."""
    return part - less


def beside(part: Float[np.ndarray, "m n"], less: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m 2*n"]:
    """That, and what it leaves."""
    return np.concatenate([part - less, less], axis=1)


def gram_of(
    left: Any,
    dtype: str,
    row: Side,
    *,
    by_rows: bool,
    of: Callable[[Any, Any], Any],
    axes: tuple[int, ...],
    given: Any | None = None,
) -> Any:
    """X' row X of X = of(left, what it is rounded to). A table is rounded piece by piece, as its scales are of rows.

    axes: those that the matrix has in memory.
    """

    def in_axes(piece: Any) -> Any:
        lying = piece if by_rows else piece.reshape(axes)  # a table has no others
        return rounded(lying, dtype, by_rows, given).reshape(piece.shape)

    if row.ndim == 2:
        return congruent(np.asarray(of(left, in_axes(left)).T, np.float64), row)
    step = tall.BLOCK if by_rows else len(left)
    pieces = ((left[i : i + step], row[i : i + step]) for i in range(0, len(left), step))
    return sum(tall.gram(of(piece, in_axes(piece)), weights) for piece, weights in pieces)


def weighted_square(along: Float[np.ndarray, "k k"], right: Any | None, col: Side) -> float:
    """Half of trace(row E col E') for E = left @ right, along = left' row left; without `right`, E = left."""
    if right is None:
        return float(np.sum(np.diag(along) * col if col.ndim == 1 else along * col)) / 2
    return float(np.sum(along * congruent(np.asarray(right, np.float64), col))) / 2
