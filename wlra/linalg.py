"""Every factorisation of a matrix that the package makes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra.sparse import Matrix, Sparse, grams, is_sparse


class Factors(NamedTuple):
    """A matrix of rank at most k, `left @ right`."""

    left: Float[Array, "m k"]
    right: Float[Array, "k n"]


def gram_inverse(gram: Float[Array, "k k"], ridge: Float[Array, ""] | float = 0.0) -> Float[Array, "k k"]:
    """The inverse of gram + ridge, whose unit-diagonal form is shifted by k * eps, the size of its rounding errors.

    Products alone: a Cholesky factor takes fewer operations and several times as long, within a loop of products; on a
    CPU its threads get in the way of theirs, and accelerators are slow at it. Callers multiply a residual by the
    result, so the shift biases no solution.
    """
    unit, scale = unit_diagonal(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype))
    return newton_schulz(unit, by_halves(unit, times=2)) * (scale[:, None] * scale[None, :])


def by_halves(matrix: Float[Array, "k k"], times: int) -> Float[Array, "k k"]:
    """The inverse of a symmetric positive definite matrix from those of half its size (Strassen 1969, sec. 2).

    A third of the operations of Newton-Schulz on the whole, but good for condition numbers below 1e3 in float32.
    """
    half = len(matrix) // 2
    if times == 0 or half < 16:
        return newton_schulz(matrix, jnp.zeros_like(matrix))
    corner, side = matrix[:half, :half], matrix[:half, half:]
    first = by_halves(corner, times - 1)
    across = first @ side
    schur = matrix[half:, half:] - side.T @ across
    rest = by_halves((schur + schur.T) / 2, times - 1)
    off = across @ rest
    return jnp.block([[first + off @ across.T, -off], [-off.T, rest]])


def newton_schulz(matrix: Float[Array, "k k"], guess: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The inverse of a positive definite matrix by X <- X (2 - A X), from the guess if that is any good.

    Schulz 1933; Ben-Israel & Cohen 1966. 4k^3 operations a step: one or two from a good guess; else log2(cond) + 4.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)

    def improving(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        """Whether the last step squared the defect, as all do until rounding errors are left; or it is still large."""
        _, defect, before, count = state
        size = jnp.sum(defect**2)
        return ((before > 0.1) | (size < before / 4)) & (count < 64)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        inverse, defect, _, count = state
        inverse = inverse + inverse @ defect
        return inverse, eye - matrix @ inverse, jnp.sum(defect**2), count + 1

    least = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    defect = eye - matrix @ guess
    good = jnp.sum(defect**2) < 0.25
    first, defect = jnp.where(good, guess, eye / least), jnp.where(good, defect, eye - matrix / least)
    start = first, defect, jnp.array(jnp.inf, matrix.dtype), jnp.array(0, jnp.int32)
    return jax.lax.while_loop(improving, step, start)[0]


def gram_solve(
    gram: Float[Array, "k k"], right_side: Float[Array, " k"], ridge: Float[Array, ""] | float = 0.0
) -> Float[Array, " k"]:
    """The solution with the inverse of `gram_inverse`, by Cholesky: for many small systems with one right side each."""
    unit, scale = unit_diagonal(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype))
    return scale * jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(unit), True), scale * right_side)


def eliminated(gram: Float[Array, "k k"], ridge: Float[Array, ""] | float = 0.0) -> Float[Array, "k k"]:
    """The inverse of `gram_inverse`, by Gauss-Jordan elimination in place: for many small matrices under vmap.

    On a CPU, triangular solves with many right sides, one small matrix after another, spend their time on threads.
    """
    unit, scale = unit_diagonal(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype))

    def sweep(i: Int[Array, ""], matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
        inverse = 1 / matrix[i, i]
        pivot, column = (matrix[i] * inverse).at[i].set(inverse), matrix[:, i]
        return (matrix.at[:, i].set(0) - column[:, None] * pivot[None, :]).at[i].set(pivot)

    return jax.lax.fori_loop(0, len(gram), sweep, unit) * (scale[:, None] * scale[None, :])


CHUNK = 2**26  # numbers that the Gram matrices and what they are made of may take: 256 MiB in float32


def over_grams(function: Callable, weight: Matrix, basis: Float[Array, "k n"], *rows: Array) -> Array:
    """function(basis diag(weight_i) basis', *rows_i) for each i, stacked.

    The Gram matrices are one product of the weights with all pairs of basis rows. Where those would take more than
    CHUNK numbers, (m + n) k^2, they are made in chunks of rows that do not.
    """
    if is_sparse(weight):
        # Of the rows, so that XLA makes them first: their terms and those of the Gram matrices are large.
        later = sum(0 * row[0, 0] for row in rows)
        return jax.vmap(function)(grams(weight, basis + later), *rows)
    k, n = basis.shape
    if (len(weight) + n) * k * k <= CHUNK:
        pairs = (basis[:, None, :] * basis[None, :, :]).reshape(k * k, n)
        return jax.vmap(function)((weight @ pairs.T).reshape(-1, k, k), *rows)

    def one(row: tuple[Array, ...]) -> Array:
        return function((basis * row[0][None, :]) @ basis.T, *row[1:])

    return in_chunks(one, (weight, *rows), max(1, CHUNK // (k * (n + k))))


def in_chunks(function: Callable, arrays: Any, size: int) -> Any:
    """The function of the i-th of each array for every i, stacked, computed for at most `size` of them at a time.

    The last is repeated until chunks of one size hold all. `jax.lax.map` has one of another size in the end, which a
    CPU may compute beside the others; if both call LAPACK for a batch, each can wait for the other's thread for ever.
    """
    count = len(jax.tree.leaves(arrays)[0])
    if size == 1:
        return jax.lax.map(function, arrays)
    steps = -(-count // size)
    size = -(-count // steps)

    def cut(array: Array) -> Array:
        padding = jnp.repeat(array[-1:], steps * size - count, axis=0)
        return jnp.concatenate([array, padding]).reshape(steps, size, *array.shape[1:])

    chunks = jax.lax.map(jax.vmap(function), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:count], chunks)


def tiny_solve(gram: Float[Array, "k k"], right_side: Float[Array, " k"]) -> Float[Array, " k"]:
    """The solution of `gram_solve` for a handful of unknowns, by elimination without a call to LAPACK.

    In a loop of products, LAPACK's threads and XLA's keep each other waiting.
    """
    unit, scale = unit_diagonal(gram)
    rows = jnp.concatenate([unit, (scale * right_side)[:, None]], axis=1)
    for i in range(len(gram)):
        pivot = rows[i] / rows[i, i]
        rows = (rows - rows[:, i, None] * pivot[None, :]).at[i].set(pivot)
    return scale * rows[:, -1]


def unit_diagonal(gram: Float[Array, "k k"]) -> tuple[Float[Array, "k k"], Float[Array, " k"]]:
    """diag(scale) gram diag(scale) with a diagonal of ones, plus the shift; and scale.

    Ones in place of zeros too: what is not there has no part in anything, and the condition number none of it.
    """
    k, diagonal = len(gram), jnp.diagonal(gram)
    scale = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    shift = k * jnp.finfo(gram.dtype).eps + jnp.where(diagonal > 0, 0, 1)
    return gram * (scale[:, None] * scale[None, :]) + jnp.diag(shift), scale


def subspace_step(gradient: Matrix, factors: Factors, penalty: Float[Array, ""] | float = 0.0) -> Factors:
    """The product is the projection of Y = left @ right + gradient onto the span of Y @ right.T.

    One step of orthogonal iteration (Golub & Van Loan 2013, sec. 8.2.4) that never forms Y and needs no QR: each factor
    moves by a least-squares correction, so factors that already are the best rank-k approximation of Y stay as they
    are, in any gauge. Two products of 2mnk operations; rows and columns keep their own relative accuracy. With a
    penalty on the squares of the factors, ridge regression for one, then the other (Hastie et al. 2015, alg. 2.1).
    """
    left, right = factors
    move = (gradient @ right.T - penalty * left) @ gram_inverse(right @ right.T, penalty)
    new_left = left + move
    inverse = gram_inverse(new_left.T @ new_left, penalty)
    solver = new_left @ inverse
    return Factors(new_left, right + solver.T @ gradient - (solver.T @ move + penalty * inverse) @ right)


def truncated_svd(matrix: Float[Array, "m n"], rank: int, penalty: Float[Array, ""] | float = 0.0) -> Factors:
    """The product is the best approximation of rank `rank` in the Frobenius norm (Eckart & Young 1936).

    With a penalty on the squares of the factors, singular values are less by it and not below zero (Cai, Candes & Shen
    2010, thm. 2.1). They are shared evenly, left = U sqrt(S), right = sqrt(S) V'. A subspace step follows: an SVD is
    accurate relative to the largest singular value only, and small rows and columns deserve relative accuracy too.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(jnp.maximum(s[:rank] - penalty, 0))
    factors = Factors(u[:, :rank] * root[None, :], root[:, None] * vt[:rank])
    return subspace_step(matrix - factors.left @ factors.right, factors, penalty)


def leading(factors: Factors, own: Int[Array, ""] | None) -> Factors:
    """The factors with zeros beyond a rank of their own, which the sweeps and gradients leave there."""
    if own is None:
        return factors
    kept = jnp.arange(factors.left.shape[1], dtype=own.dtype) < own
    return Factors(jnp.where(kept[None, :], factors.left, 0), jnp.where(kept[:, None], factors.right, 0))


def iterated_svd(matrix: Sparse, rank: int, sweeps: int = 3) -> Factors:
    """The product is about the best approximation of rank `rank`, from products of the matrix with a few vectors.

    Orthogonal iteration on eight vectors more than the rank, normal ones of a fixed seed (Halko, Martinsson & Tropp
    2011, alg. 4.4, with one orthonormal basis for two products). The last products are with the matrix alone, so rows
    and columns without entries are zero.
    """
    m, n = matrix.shape
    basis = jax.random.normal(jax.random.key(0), (n, min(rank + 8, m, n)), matrix.dtype)
    for _ in range(sweeps):
        basis, _ = jnp.linalg.qr(((matrix @ basis).T @ matrix).T)
    image = matrix @ basis
    values, vectors = jnp.linalg.eigh(image.T @ image)
    size = jnp.sqrt(jnp.sqrt(jnp.maximum(values, 0)))[::-1][:rank]
    left = (image @ vectors[:, ::-1][:, :rank]) / jnp.where(size > 0, size, 1)[None, :]
    return Factors(left, gram_inverse(left.T @ left) @ (left.T @ matrix))


def leading_components(matrix: Matrix, rank: int) -> Factors:
    """The product is that of `truncated_svd`, but for components below sqrt(eps) of the largest, which are noise.

    From one eigendecomposition of the smaller Gram matrix, which squares the singular values: several times as fast.
    Both factors have the same diagonal Gram matrix; components that are zero keep a tiny column of `left`.
    """
    if is_sparse(matrix):
        return iterated_svd(matrix, rank)
    m, n = matrix.shape
    if m > n:
        turned = leading_components(matrix.T, rank)
        return Factors(turned.right.T, turned.left.T)
    _, vectors = jnp.linalg.eigh(matrix @ matrix.T)
    basis = vectors[:, ::-1][:, :rank]
    right = basis.T @ matrix
    root = jnp.sqrt(jnp.sqrt(jnp.sum(right**2, axis=1)))
    root = jnp.maximum(root, jnp.finfo(root.dtype).eps * jnp.where(root[0] > 0, root[0], 1))
    return Factors(basis * root[None, :], right / root[:, None])


def spectral_norm(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """The largest singular value."""
    return jnp.linalg.svd(matrix, compute_uv=False)[0]


def balance(factors: Factors) -> Factors:
    """The same product with left.T @ left = right @ right.T diagonal, and `right` of full row rank.

    Both Gram matrices then have the condition number of the product, not its square. Components that are zero, which
    no alternating iteration could ever revive, become a zero column of `left` and a unit row of `right`. Factors whose
    product overflows stay as they are.
    """
    q_left, r_left = jnp.linalg.qr(factors.left)
    q_right, r_right = jnp.linalg.qr(once(q_left, factors.right.T))
    u, s, vt = jnp.linalg.svd(once(q_right, r_left @ r_right.T))
    floor = jnp.finfo(s.dtype).eps * jnp.where(s[0] > 0, s[0], 1)
    root = jnp.sqrt(jnp.maximum(s, floor))
    even = Factors(q_left @ (u * (s / root)[None, :]), (root[:, None] * vt) @ q_right.T)
    finite = jnp.all(jnp.isfinite(even.left)) & jnp.all(jnp.isfinite(even.right))
    return jax.tree.map(lambda balanced, given: jnp.where(finite, balanced, given), even, factors)


def once(known: Float[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array, not before the other is known.

    On a CPU, LAPACK on a batch waits in a thread for others to help: two at once can wait for each other for ever. XLA
    drops an `optimization_barrier` before it schedules, but not the sum with a zero that only the data can tell.
    """
    first = known.ravel()[0]
    return array + jnp.where(jnp.isfinite(first), 0, first)


def orthonormal(matrix: Float[Array, "m k"]) -> tuple[Float[Array, "m k"], Float[Array, "k k"]]:
    """Orthonormal columns and a square matrix whose product is the matrix."""
    basis, mix = jnp.linalg.qr(matrix)
    return basis, mix


def psd_inverse(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The pseudo-inverse of a positive semi-definite matrix: solutions have the least norm."""
    values, vectors = jnp.linalg.eigh(gram)
    large = values > len(gram) * 16 * jnp.finfo(gram.dtype).eps * values[-1]
    return (vectors * jnp.where(large, 1 / jnp.where(large, values, 1), 0)[None, :]) @ vectors.T


def damped_solve(
    matrix: Float[Array, "d d"], right_side: Float[Array, " d"], damping: Float[Array, ""]
) -> Float[Array, " d"]:
    """The solution for a positive semi-definite matrix plus the damping times its largest diagonal entry."""
    shift = damping * jnp.max(jnp.diagonal(matrix))
    lower = jnp.linalg.cholesky(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))
    return jax.scipy.linalg.cho_solve((lower, True), right_side)


def even_out(factors: Factors) -> Factors:
    """The same product, bit for bit, with each column of `left` as large as its row of `right` to a factor of two."""
    size_left, size_right = jnp.max(jnp.abs(factors.left), axis=0), jnp.max(jnp.abs(factors.right), axis=1)
    (mantissa_left, exponent_left), (mantissa_right, exponent_right) = jnp.frexp(size_left), jnp.frexp(size_right)
    both = (size_left > 0) & (size_right > 0)
    ratio = jnp.log2(jnp.where(both, mantissa_right / jnp.where(both, mantissa_left, 1), 1))
    exponent = jnp.where(both, exponent_right - exponent_left, 0)
    shift = jnp.round((ratio + exponent.astype(ratio.dtype)) / 2).astype(exponent.dtype)
    return Factors(jnp.ldexp(factors.left, shift[None, :]), jnp.ldexp(factors.right, -shift[:, None]))


def psd_roots(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """The square root of a positive semi-definite matrix, and the pseudo-inverse of that root."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    floor = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * values[-1]
    root = jnp.sqrt(jnp.where(values > floor, values, 0))
    inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, root, 1), 0)
    return (vectors * root[None, :]) @ vectors.T, (vectors * inverse[None, :]) @ vectors.T
