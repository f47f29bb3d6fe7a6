"""Singular value, eigenvalue and QR decompositions, and the factors made of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra.linalg.batch import after
from wlra.linalg.gram import gram_inverse
from wlra.problem import Factors
from wlra.sparse import Matrix, Sparse, is_sparse


def subspace_step(weighted_residual: Matrix, factors: Factors, penalty: Float[Array, ""] | float = 0.0) -> Factors:
    """The product is the projection of Y = left @ right + weighted_residual onto the span of Y @ right.T.

    One step of orthogonal iteration (Golub & Van Loan 2013, sec. 8.2.4) that never forms Y and needs no QR: each factor
    moves by a least-squares correction, so factors that already are the best rank-k approximation of Y stay as they
    are, in any gauge. Two products of 2mnk operations; rows and columns keep their own relative accuracy. With a
    penalty on the squares of the factors, ridge regression for one, then the other (Hastie et al. 2015, alg. 2.1).
    """
    left, right = factors
    move = (weighted_residual @ right.T - penalty * left) @ gram_inverse(right @ right.T, penalty)
    new_left = left + move
    inverse = gram_inverse(new_left.T @ new_left, penalty)
    solver = new_left @ inverse
    return Factors(new_left, right + solver.T @ weighted_residual - (solver.T @ move + penalty * inverse) @ right)


def truncated_svd(matrix: Float[Array, "m n"], rank: int, penalty: Float[Array, ""] | float = 0.0) -> Factors:
    """The product is the best approximation of rank `rank` in the Frobenius norm (Eckart & Young 1936).

    With a penalty on the squares of the factors, singular values are less by it and not below zero (Cai, Candes & Shen
    2010, thm. 2.1). They are shared evenly, left = U sqrt(S), right = sqrt(S) V'. A subspace step follows: an SVD is
    accurate relative to the largest singular value only, and small rows and columns deserve relative accuracy too. It
    is that of `subspace_step`, whose Gram matrices are both S to rounding here.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    size = jnp.maximum(s[:rank] - penalty, 0)
    root, whole = jnp.sqrt(size), size + penalty
    told = whole > jnp.finfo(s.dtype).eps * s[0]  # from rounding errors, which the step would take for the matrix
    inverse = jnp.where(told, 1 / jnp.where(told, whole, 1), 0)
    left, right = u[:, :rank] * root[None, :], root[:, None] * vt[:rank]
    residual = matrix - left @ right
    move = (residual @ right.T - penalty * left) * inverse[None, :]
    new_left = left + move
    solver = new_left * inverse[None, :]
    shrunk = penalty * inverse[:, None] * right
    return Factors(new_left, right + solver.T @ residual - (solver.T @ move) @ right - shrunk)


def mask_rank(factors: Factors, rank: Int[Array, ""] | None) -> Factors:
    """The factors with zeros beyond a traced rank, which sweeps leave there; as they are if that is None."""
    if rank is None:
        return factors
    kept = jnp.arange(factors.left.shape[1], dtype=rank.dtype) < rank
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
        transposed = leading_components(matrix.T, rank)
        return Factors(transposed.right.T, transposed.left.T)
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
    q_right, r_right = jnp.linalg.qr(after(q_left, then=factors.right.T))
    u, s, vt = jnp.linalg.svd(after(q_right, then=r_left @ r_right.T))
    floor = jnp.finfo(s.dtype).eps * jnp.where(s[0] > 0, s[0], 1)
    root = jnp.sqrt(jnp.maximum(s, floor))
    even = Factors(q_left @ (u * (s / root)[None, :]), (root[:, None] * vt) @ q_right.T)
    finite = jnp.all(jnp.isfinite(even.left)) & jnp.all(jnp.isfinite(even.right))
    return jax.tree.map(lambda balanced, given: jnp.where(finite, balanced, given), even, factors)


def orthonormal(matrix: Float[Array, "m k"]) -> tuple[Float[Array, "m k"], Float[Array, "k k"]]:
    """Orthonormal columns and a square matrix whose product is the matrix."""
    basis, mix = jnp.linalg.qr(matrix)
    return basis, mix


def square_root(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A matrix whose product with its transpose is the positive semi-definite one.

    Decomposed with a unit diagonal, so that no row is lost beside larger ones; negative eigenvalues, which are those of
    rounding errors, count as 0.
    """
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    values, vectors = jnp.linalg.eigh((gram + gram.T) / 2 * inverse[:, None] * inverse[None, :])
    return size[:, None] * vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
