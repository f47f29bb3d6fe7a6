"""Closed forms on the host: one decomposition of a matrix, cut at any rank afterwards."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from threadpoolctl import threadpool_limits

from wlra.checks import check_kronecker_values, check_values
from wlra.problem import Kronecker

T = TypeVar("T")
U = TypeVar("U")
BLOCK = 384  # columns that are read together


class Seen(NamedTuple):
    """What a target (m, n), m <= n, sees of a matrix of weights that is not at hand: gram = target @ side @ target.T.

    It stands for the weights of the larger side, or of the columns of a square target; for m > n it is that of the
    transpose.
    """

    gram: Float[np.ndarray, "m m"]


Side = Float[np.ndarray, "..."]  # the weights of rows or columns: a vector, or a positive semi-definite matrix


class Decomposed(NamedTuple):
    """left[:, :k] @ right[:k] is the best approximation of every rank k, of which `squares[k:]` is lost.

    left (m, r), right (r, n): components, the largest first. Each column of `left` is as large as its row of `right`,
      to a factor of two. r is at most the rank asked for; components of the size of rounding errors are left out.
      None where only the squares were asked for.
    squares: (min(m, n),), the weighted squares of all components, in units of weights and target.
    """

    squares: Float[np.ndarray, " ranks"]
    left: Float[np.ndarray, "m r"] | None = None
    right: Float[np.ndarray, "r n"] | None = None


def decompose(target: Any, row: Side | Seen, col: Side | Seen, rank: int) -> Decomposed:
    """The components of least trace(row E col E'), E what they leave of the target (m, n), up to `rank` of them.

    Weights of the larger side, or of the columns of a square target, may be `Seen`: that is enough of them.

    In float64, whose errors beside the largest component are below those of float32 in itself: so factors are the best
    of float32, and no better than that in float64. For rank 0, the squares alone. Weights are taken for positive
    semi-definite where what the target meets of them is, which is known without a decomposition of the larger side.

    Raises:
      ValueError: values are not finite, or weights not symmetric, not positive semi-definite, or zero.

    Example:
      >>> import numpy as np
      >>> from wlra.components import cut, decompose
      >>> found = decompose(np.diag([3.0, 2, 1]), np.ones(3), np.ones(3), rank=2)
      >>> left, right = cut(found, 1)
      >>> found.squares.tolist(), np.round(left @ right, 6).tolist()
      ([9.0, 4.0, 1.0], [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    """
    target = np.asarray(target)
    if target.shape[0] > target.shape[1]:
        found, fit = wide_components(target.T, col, row, rank)
        if found.left is not None and found.right is not None:
            found = Decomposed(found.squares, found.right.T, found.left.T)
    else:
        found, fit = wide_components(target, row, col, rank)
    if not fit:
        check_sides(target, row, col)
    return found


def wide_components(target: Float[np.ndarray, "m n"], row: Any, col: Any, rank: int) -> tuple[Decomposed, bool]:
    """The same for m <= n, and whether the values are seen to be fit.

    The eigenvectors U of root' target col target' root, root root' = row, give right = U' root' target; the best left
    for that is target col right' over the eigenvalues. The larger of the two weights is only multiplied with. What the
    smaller side's weight is too small to see is fitted as the rest is.
    """
    m, n = target.shape
    if not (usable(row) and usable(col) and np.isfinite(target).all()):
        return Decomposed(np.zeros(m)), False
    (wide, power), (row, row_power) = map(in_units, (target, row))
    seen, seen_power = seen_in_units(wide, power, col)
    root, told = root_of(row)
    gram = before(root.T, after(seen, root))
    values, vectors = np.linalg.eigh(gram) if rank else (np.linalg.eigvalsh(gram), gram[:0])
    squares = np.maximum(values[::-1], 0)
    least = -16 * n * float(np.finfo(np.float32).eps) * squares[0]
    fit, given = told and bool(values[0] >= least), np.ldexp(squares, row_power + seen_power)
    if rank == 0:
        return Decomposed(given), fit
    count = min(rank, int(np.sum(are_there(squares))))
    basis = before(root, vectors[:, ::-1][:, :count] / np.sqrt(squares[:count]))
    left, right = balanced(without(row, seen @ basis), without(col, (basis.T @ wide).T).T)
    half = np.ldexp(1.0, power // 2)
    left, right = ((half * factor).astype(target.dtype) for factor in (left, right))
    return Decomposed(given, left, right), fit and count > 0


def are_there(squares: Float[np.ndarray, " components"]) -> Bool[np.ndarray, " components"]:
    """Whether components of these squares are more than what rounding to float32 leaves."""
    return squares > (8 * np.finfo(np.float32).eps) ** 2 * np.sum(squares)


def in_units(array: Any) -> tuple[Float[np.ndarray, "..."], int]:
    """The array in float64 over 2**power, a multiple of four that brings the largest entry near 1, and the power."""
    power = int(np.frexp(np.float64(max(np.max(array), -np.min(array))))[1])
    power -= power % 4
    return np.multiply(array, np.ldexp(1.0, -power), dtype=np.float64), power


def seen_in_units(wide: Float[np.ndarray, "m n"], power: int, col: Side | Seen) -> tuple[Float[np.ndarray, "m m"], int]:
    """What the target, wide * 2**power, sees of the larger side, over 2 to the power that comes second."""
    if isinstance(col, Seen):
        return in_units(col.gram)
    col, col_power = in_units(col)
    return congruent(wide, col), 2 * power + col_power


def without(side: Side | Seen, rows: Float[np.ndarray, "m r"]) -> Float[np.ndarray, "m r"]:
    """The rows, zero where a vector of weights is."""
    if isinstance(side, Seen) or side.ndim == 2 or np.min(side) > 0:
        return rows
    return np.where(side[:, None] > 0, rows, 0)


def usable(side: Side | Seen) -> bool:
    """Whether a vector is not negative, or a matrix symmetric up to rounding errors; no NaN and not infinite."""
    side = side.gram if isinstance(side, Seen) else side
    least, most = np.min(side), np.max(side)
    if side.ndim == 1:
        return bool(least >= 0 and most < np.inf)
    slack = 16 * len(side) * float(np.finfo(np.float32).eps) * max(most, -least)
    blocks = ((side[i : i + BLOCK, i:], side[i:, i : i + BLOCK].T) for i in range(0, len(side), BLOCK))
    return bool(np.isfinite(slack)) and all(np.max(np.abs(upper - lower)) <= slack for upper, lower in blocks)


def check_sides(target: Any, row: Side | Seen, col: Side | Seen) -> None:
    """A ValueError that says what is wrong with values that the decomposition could not tell to be fit."""
    if not (isinstance(row, Seen) or isinstance(col, Seen)) and row.ndim == col.ndim == 1:
        check_values(target, row[:, None] * col[None, :])
    else:
        check_kronecker_values(target, Kronecker(*(as_matrix(side, target) for side in (row, col))))


def as_matrix(side: Side | Seen, target: Any) -> Float[np.ndarray, "n n"]:
    """Its matrix of weights, or what a target that is not zero sees of it."""
    if isinstance(side, Seen):
        return side.gram if np.any(target) else np.eye(len(side.gram))
    return np.diag(side) if side.ndim == 1 else side


def cut(decomposed: Decomposed, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best factors (m, rank) and (rank, n); zero beyond the components that there are."""
    assert decomposed.left is not None
    assert decomposed.right is not None
    left, right = decomposed.left[:, :rank], decomposed.right[:rank]
    missing = rank - len(right)
    if not missing:
        return left, right
    return np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))


def lost(decomposed: Decomposed, rank: int) -> float:
    """The loss of those factors, relative to that of zero; 0 if there is nothing to lose."""
    whole = float(np.sum(decomposed.squares))
    return float(np.sum(decomposed.squares[rank:])) / whole if whole > 0 else 0.0


def side_by_side(one: Callable[[T], U], items: Iterable[T], counted: Callable = lambda futures: futures) -> list[U]:
    """What the function makes of each, one on each core.

    Half the time goes to LAPACK, which is no faster on two cores than on one.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            return [future.result() for future in counted(futures)]
        finally:
            for future in futures:
                future.cancel()


def after(matrix: Float[np.ndarray, "m n"], side: Side) -> Float[np.ndarray, "m n"]:
    """The matrix times the side, or times the diagonal matrix of a vector."""
    return matrix @ side if side.ndim == 2 else matrix * side


def before(side: Side, matrix: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """The side, or the diagonal matrix of a vector, times the matrix."""
    return side @ matrix if side.ndim == 2 else side[:, None] * matrix


def congruent(target: Float[np.ndarray, "m n"], side: Side) -> Float[np.ndarray, "m m"]:
    """target @ side @ target.T; of a vector, by one product with itself, which is half the operations."""
    if side.ndim == 1:
        half = target * np.sqrt(side)
        return half @ half.T
    return target @ side @ target.T


def balanced(left: Float[np.ndarray, "m r"], right: Float[np.ndarray, "r n"]) -> tuple[np.ndarray, np.ndarray]:
    """The same product with columns of `left` as large as rows of `right`, to a factor of two."""
    sizes = [
        np.maximum(np.max(factor, axis=axis), -np.min(factor, axis=axis)) for axis, factor in enumerate((left, right))
    ]
    safe = [np.where(sizes[0] * sizes[1] > 0, size, 1) for size in sizes]
    shift = np.ldexp(1.0, np.round((np.log2(safe[1]) - np.log2(safe[0])) / 2).astype(np.int32))
    return left * shift, right / shift[:, None]


def square_root(side: Side) -> Side:
    """A vector or matrix whose product with its transpose is the side, to rounding of its diagonal.

    Negative eigenvalues, which are those of rounding errors, count as 0.
    """
    return root_of(side)[0]


def root_of(side: Side) -> tuple[Side, bool]:
    """The square root, and whether the side is seen to have no negative eigenvalue but by rounding errors.

    Decomposed with a unit diagonal, so that no row is lost beside larger ones. By Cholesky, seven times as fast, where
    that goes.
    """
    if side.ndim == 1:
        return np.sqrt(side), True
    size = np.sqrt(np.maximum(np.diag(side), 0))
    told = bool(np.min(np.diag(side)) >= 0) and not np.any(side[size == 0])
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    unit = side * inverse[:, None] * inverse[None, :]
    try:
        shift = len(side) * np.finfo(side.dtype).eps * np.eye(len(side))
        return size[:, None] * np.linalg.cholesky(unit + shift), told
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(unit)
        told = told and bool(values[0] >= -16 * len(side) * float(np.finfo(np.float32).eps))
        return size[:, None] * vectors * np.sqrt(np.maximum(values, 0)), told
