"""Matrices of which only some entries are stored: what the rest of the package asks of them, dense ones included.

Target, weight and residual of a problem store the same entries; what they do not store has weight 0. Nothing here has
the shape of the whole, nothing is a loop, and no more is in memory at once than a few numbers for each entry and each
component. An iteration reads as many numbers: a gather for either factor, and one and a sum for each product.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import BCOO, BCSR
from jaxtyping import Array, Float, Int, Num

from wlra.convert import is_scipy, real


class Runs(NamedTuple):
    """Entries dealt into runs, each of one row: its row, and where its entries are; an index beyond all fills it up."""

    owner: Int[Array, " r"]
    places: Int[Array, "r length"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """The matrix (m, n) with values (entries,) at rows and cols (entries,), each place once, and 0 elsewhere.

    Not JAX's `BCOO`: that cuts rows and columns out of one array of indices at each product, which hides from XLA that
    two products, or two gathers, are the same.
    """

    values: Any
    rows: Any
    cols: Any
    row_runs: Runs
    col_runs: Runs
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def T(self) -> "Sparse":
        return Sparse(
            self.values,
            rows=self.cols,
            cols=self.rows,
            row_runs=self.col_runs,
            col_runs=self.row_runs,
            shape=self.shape[::-1],
        )

    def __matmul__(self, other: Float[Array, "n p"]) -> Float[Array, "m p"]:
        terms = self.values[:, None] * pick(other, self.cols)
        return jnp.zeros((self.shape[0], other.shape[1]), terms.dtype).at[self.rows].add(terms, **KNOWN)

    def __rmatmul__(self, other: Float[Array, "p m"]) -> Float[Array, "p n"]:
        return (self.T @ other.T).T


if TYPE_CHECKING:
    Matrix = Any  # elementwise code runs on dense matrices only, and is not written twice
else:
    Matrix = Num[Array, "m n"] | Sparse


KNOWN: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}  # `in_row_order` has checked the indices


def pick(array: Num[Array, "m *k"], places: Any) -> Num[Array, "..."]:
    """The array's rows at the places."""
    return array.at[places].get(**KNOWN)


def is_sparse(matrix: Any) -> TypeGuard[Sparse]:
    """Whether the matrix stores some of its entries only."""
    return isinstance(matrix, Sparse)


def values(matrix: Any) -> Any:
    """All entries (m, n) of a dense matrix, the stored ones (entries,) of a sparse one."""
    return matrix.values if is_sparse(matrix) else matrix


def like(matrix: Any, values: Any) -> Any:
    """The matrix with other values."""
    return dataclasses.replace(matrix, values=values) if is_sparse(matrix) else values


def entries(matrix: Matrix, left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "..."]:
    """left @ right at each of the matrix's values."""
    if not is_sparse(matrix):
        return left @ right
    return jnp.sum(pick(left, matrix.rows) * pick(right.T, matrix.cols), axis=1)


def entries_on_host(matrix: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The same in NumPy, of factors that may have leading axes."""
    if not is_sparse(matrix):
        return left @ right
    rows, cols = np.asarray(matrix.rows), np.asarray(matrix.cols)
    return np.sum(left[..., rows, :] * np.swapaxes(right, -1, -2)[..., cols, :], axis=-1)


def by_row(matrix: Matrix, vector: Num[Array, " m"]) -> Num[Array, "..."]:
    """The vector's number for the row of each of the matrix's values, or what broadcasts to it."""
    return pick(vector, matrix.rows) if is_sparse(matrix) else vector[:, None]


def by_col(matrix: Matrix, vector: Num[Array, " n"]) -> Num[Array, "..."]:
    """The vector's number for the column of each of the matrix's values, or what broadcasts to it."""
    return pick(vector, matrix.cols) if is_sparse(matrix) else vector[None, :]


def row_sum(matrix: Matrix) -> Num[Array, " m"]:
    """The sum of each row."""
    if not is_sparse(matrix):
        return jnp.sum(matrix, axis=1)
    return jnp.zeros(matrix.shape[0], matrix.dtype).at[matrix.rows].add(matrix.values, **KNOWN)


def row_max(matrix: Matrix) -> Num[Array, " m"]:
    """The largest entry of each row of a matrix without negative ones."""
    if not is_sparse(matrix):
        return jnp.max(matrix, axis=1)
    return jnp.zeros(matrix.shape[0], matrix.dtype).at[matrix.rows].max(matrix.values, **KNOWN)


def grams(weight: Sparse, basis: Float[Array, "k n"]) -> Float[Array, "m k k"]:
    """basis diag(weight_i) basis' for each row i: a product for each run of entries, and the sum of each row's."""
    owner, places = weight.row_runs
    size = (weight.shape[0], len(basis), len(basis))
    roots = jnp.sqrt(weight.values).at[places].get(mode="fill", fill_value=0)
    vectors = roots[:, :, None] * pick(basis.T, weight.cols.at[places].get(mode="clip"))
    products = jnp.einsum("rek,rel->rkl", vectors, vectors)
    return jnp.zeros(size, basis.dtype).at[owner].add(products, **KNOWN)


def runs(axis: Int[np.ndarray, " e"], size: int) -> Runs:
    """The entries by their row, or by their column, in runs of a length that fills most of them.

    Their number follows from the shape and the number of entries alone, and so does what is compiled.
    """
    length = 2 ** int(np.clip(np.log2(len(axis) / (2 * size)), 0, 5))
    order, count = np.argsort(axis, kind="stable"), np.bincount(axis, minlength=size)
    pieces = -(-count // length)
    offset = (np.cumsum(pieces) - pieces) * length - (np.cumsum(count) - count)
    owner = np.full(len(axis) // length + size, size - 1, np.int32)
    owner[: pieces.sum()] = np.repeat(np.arange(size, dtype=np.int32), pieces)
    places = np.full(len(owner) * length, len(axis), np.int32)
    places[offset[axis[order]] + np.arange(len(axis))] = order
    return Runs(jnp.asarray(owner), jnp.asarray(places.reshape(-1, length)))


def as_sparse(matrix: Any, name: str) -> Sparse:
    """A sparse matrix of JAX or SciPy with real values: what it stores, zeros too, is known, and all else is not.

    SciPy's duplicates are summed, as SciPy does; those of JAX are refused.
    """
    if is_scipy(matrix):
        check_shape(matrix.shape, name)
        matrix = of_diagonals(matrix) if matrix.format == "dia" else matrix.tocoo()
        indices = np.stack([matrix.row, matrix.col], axis=1).astype(np.int64)
        indices, data = summed(indices, matrix.data, matrix.shape[1], name)
        return in_row_order(data, indices, matrix.shape, name)
    matrix = matrix.to_bcoo() if isinstance(matrix, BCSR) else matrix
    if not isinstance(matrix, BCOO):
        raise ValueError(f"{name} must be a BCOO or BCSR if it is a sparse array of JAX; got {type(matrix).__name__}")
    if matrix.n_batch or matrix.n_dense or matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name} must be a BCOO matrix (m, n) without empty axes, n_batch=0 and n_dense=0; got shape "
            f"{matrix.shape}, n_batch={matrix.n_batch}, n_dense={matrix.n_dense}"
        )
    if isinstance(matrix.indices, Tracer):
        raise ValueError(f"{name} is sparse, and its indices must be known: call outside of jit and vmap; got a tracer")
    return in_row_order(real(matrix.data, name), np.asarray(matrix.indices), matrix.shape, name)


def of_diagonals(matrix: Any) -> Any:
    """A matrix of SciPy that stores diagonals, by its entries: SciPy's own way leaves out those that are zero."""
    cols = np.broadcast_to(np.arange(matrix.data.shape[1]), matrix.data.shape)
    rows = cols - matrix.offsets[:, None]
    inside = (rows >= 0) & (rows < matrix.shape[0]) & (cols < matrix.shape[1])
    return type(matrix.tocoo())((matrix.data[inside], (rows[inside], cols[inside])), shape=matrix.shape)


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Two axes, not empty, of lengths that indices of 32 bits can count."""
    if len(shape) != 2 or 0 in shape or max(shape) > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must be a matrix (m, n) with axes from 1 to 2**31 - 1; got shape {shape}")


def summed(indices: np.ndarray, data: np.ndarray, columns: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Each place once, with the sum of its values; of booleans, whether one is true."""
    add, numbers = np.maximum if data.dtype == bool else np.add, real(data, name)
    places, first = np.unique(indices[:, 0] * columns + indices[:, 1], return_inverse=True)
    if len(places) == len(indices):
        return indices, numbers
    total = np.zeros(len(places), np.promote_types(numbers.dtype, np.float64))
    add.at(total, first, numbers)
    return np.stack(np.divmod(places, columns), axis=1), total.astype(numbers.dtype)


def in_row_order(data: Any, indices: np.ndarray, shape: tuple[int, ...], name: str) -> Sparse:
    """The matrix with its entries in order of row, then column, once it is known that no two are in one place.

    Indices at or beyond the shape are JAX's own padding, and dropped.
    """
    check_shape(shape, name)
    if (indices < 0).any():
        raise ValueError(f"{name} must have indices >= 0; got {tuple(map(int, indices[(indices < 0).any(axis=1)][0]))}")
    order = np.lexsort((indices[:, 1], indices[:, 0]))
    order = order[(indices < np.array(shape))[order].all(axis=1)]
    indices = indices[order].astype(np.int32)
    again = np.flatnonzero((indices[1:] == indices[:-1]).all(axis=1))
    if len(again):
        place = tuple(map(int, indices[again[0]]))
        raise ValueError(
            f"{name} stores {len(again)} entries again, the first at {place}; wanted each entry once: "
            f"{name}.sum_duplicates(remove_zeros=False) adds them up"
        )
    if not len(indices):
        raise ValueError(f"{name} stores no entry; wanted at least one")
    rows, cols = indices.T
    return Sparse(
        values=data[order],
        rows=jnp.asarray(rows),
        cols=jnp.asarray(cols),
        row_runs=runs(rows, shape[0]),
        col_runs=runs(cols, shape[1]),
        shape=tuple(shape),
    )
