"""The closed form for a tall matrix with a weight for each row, from Gram matrices of its columns.

Nothing larger than the matrix is made, and of that size nothing but the left factor.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from wlra.components import Decomposed, Side, balanced, before, square_root

BLOCK = 4096  # rows that are in float64 at a time


class Directions(NamedTuple):
    """Along which a weighted sum of squares is largest: column i of `basis` has the sum squares[i], the largest first.

    basis: root @ orthonormal vectors, with root @ root.T the weights of columns.
    """

    squares: Float[np.ndarray, " n"]
    basis: Float[np.ndarray, "n n"]


def gram(matrix: Any, weights: Float[np.ndarray, " m"] | None = None) -> Float[np.ndarray, "n n"]:
    """matrix.T @ diag(weights) @ matrix in float64, without the rows of weight 0.

    Example:
      >>> import numpy as np
      >>> from wlra.tall import gram
      >>> gram(np.eye(3, 2), np.array([4.0, 1.0, 0.0])).tolist()
      [[4.0, 0.0], [0.0, 1.0]]
    """
    rows = np.arange(len(matrix)) if weights is None else np.flatnonzero(weights)
    total = np.zeros((matrix.shape[1],) * 2)
    for begin in range(0, len(rows), BLOCK):
        some = rows[begin : begin + BLOCK]
        block = np.asarray(matrix[some], np.float64)
        if weights is not None:
            block *= np.sqrt(weights[some])[:, None]
        total += block.T @ block
    return total


def congruent(gram: Float[np.ndarray, "n n"], root: Side) -> Float[np.ndarray, "n n"]:
    """root.T @ gram @ root."""
    if root.ndim == 1:
        return root[:, None] * gram * root
    return root.T @ gram @ root


def directions(inner: Float[np.ndarray, "n n"], root: Side) -> Directions:
    """Those of a Gram matrix, of which `inner` is congruent(gram, root)."""
    values, vectors = np.linalg.eigh(inner)
    return Directions(np.maximum(values[::-1], 0), before(root, vectors[:, ::-1]))


def squares_along(found: Directions, gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """What another Gram matrix has along the directions: its rank-k error is what it has along those from k on."""
    return np.maximum(np.einsum("ij,ij->j", found.basis, gram @ found.basis), 0)


def components(matrix: Any, gram: Float[np.ndarray, "n n"], col: Side, rank: int) -> Decomposed:
    """The components of least trace(row E col E'), row the diagonal weights of `gram`, as `wlra.components.decompose`.

    Rows of weight 0 are fitted along the same directions. In float64 but for the left factor,
    which is multiplied in the matrix's own dtype, or in float32.

    Args:
      matrix: (m, n).
      gram: matrix.T @ row @ matrix.
      col: weights of columns: a vector, or a matrix.
      rank: how many are wanted; for 0, the squares alone.

    Example:
      >>> import numpy as np
      >>> from wlra.tall import components, gram
      >>> table = np.outer(np.arange(1.0, 7), [1, 2, 3]).astype("f4")
      >>> found = components(table, gram(table, np.ones(6)), np.ones(3), rank=1)
      >>> bool(np.allclose(found.left @ found.right, table, rtol=1e-5))
      True
    """
    root = square_root(np.asarray(col, np.float64))
    found = directions(congruent(gram, root), root)
    if rank == 0:
        return Decomposed(found.squares)
    told = found.squares > (8 * np.finfo(np.float32).eps) ** 2 * np.sum(found.squares)
    count = min(rank, int(np.sum(told)))
    basis = found.basis[:, :count] / np.sqrt(found.squares[:count])
    dtype = np.float64 if matrix.dtype == np.float64 else np.float32
    size = np.ldexp(1.0, np.frexp(np.max(np.abs(basis), axis=0))[1])  # whatever the weights' units
    left, right = np.asarray(matrix, dtype) @ (basis / size).astype(dtype), (basis * size).T @ gram
    _, shifted = balanced(np.stack([left.max(axis=0), left.min(axis=0)]), right)  # without a copy of the left factor
    shift = np.max(np.abs(right), axis=1) / np.maximum(np.max(np.abs(shifted), axis=1), np.finfo(np.float64).tiny)
    left *= shift.astype(dtype)
    return Decomposed(found.squares, left.astype(matrix.dtype, copy=False), shifted.astype(matrix.dtype))
