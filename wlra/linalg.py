"""Every factorisation of a matrix that the package makes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Factors(NamedTuple):
    """A matrix of rank at most k, `left @ right`."""

    left: Float[Array, "m k"]
    right: Float[Array, "k n"]


def gram_inverse(gram: Float[Array, "*b k k"]) -> Float[Array, "*b k k"]:
    """The inverse of a Gram matrix whose unit-diagonal form is shifted by k * eps, the size of its rounding errors.

    Newton-Schulz, X <- X (2 - A X) (Schulz 1933; Ben-Israel & Cohen 1966): products alone, about log2(cond) + 4 steps
    of 4k^3 operations, and the Gram matrices of balanced factors are nearly diagonal. A Cholesky factor takes fewer
    operations and several times as long, within a loop of products: on a CPU its threads get in the way of theirs, and
    accelerators are slow at it. Callers multiply a residual by the result, so the shift biases no solution.
    """
    unit, scale = unit_diagonal(gram)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)

    def improving(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        """Whether the last step squared the defect, as all do until rounding errors are left; or it is still large."""
        _, defect, before, count = state
        size = jnp.sum(defect**2)
        return ((before > 0.1) | (size < before / 4)) & (count < 64)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        inverse, defect, _, count = state
        inverse = inverse + inverse @ defect
        return inverse, eye - unit @ inverse, jnp.sum(defect**2), count + 1

    largest = jnp.max(jnp.sum(jnp.abs(unit), axis=-1), axis=-1)[..., None, None]
    first = eye / largest
    start = first, eye - unit @ first, jnp.array(jnp.inf, gram.dtype), jnp.array(0, jnp.int32)
    inverse, *_ = jax.lax.while_loop(improving, step, start)
    return inverse * (scale[..., :, None] * scale[..., None, :])


def gram_solve(gram: Float[Array, "k k"], right_side: Float[Array, " k"]) -> Float[Array, " k"]:
    """The solution with the inverse of `gram_inverse`, by Cholesky: for many small systems with one right side each."""
    unit, scale = unit_diagonal(gram)
    return scale * jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(unit), True), scale * right_side)


def unit_diagonal(gram: Float[Array, "*b k k"]) -> tuple[Float[Array, "*b k k"], Float[Array, "*b k"]]:
    """diag(scale) gram diag(scale) with a diagonal of ones (zeros stay), plus the shift; and scale."""
    k, eps = gram.shape[-1], jnp.finfo(gram.dtype).eps
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    scale = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    shift = jnp.broadcast_to(k * eps * jnp.eye(k, dtype=gram.dtype), gram.shape)
    return gram * (scale[..., :, None] * scale[..., None, :]) + shift, scale


def gram_inverses(factors: Factors) -> tuple[Float[Array, "k k"], Float[Array, "k k"]]:
    """The inverses of left.T @ left and of right @ right.T."""
    inverses = gram_inverse(jnp.stack([factors.left.T @ factors.left, factors.right @ factors.right.T]))
    return inverses[0], inverses[1]


def subspace_step(gradient: Float[Array, "m n"], factors: Factors) -> Factors:
    """The product is the projection of Y = left @ right + gradient onto the span of Y @ right.T.

    One step of orthogonal iteration (Golub & Van Loan 2013, sec. 8.2.4) that never forms Y and needs no QR: each factor
    moves by a least-squares correction, so factors that already are the best rank-k approximation of Y stay as they
    are, in any gauge. Two products of 2mnk operations; rows and columns keep their own relative accuracy.
    """
    left, right = factors
    move = (gradient @ right.T) @ gram_inverses(factors)[1]
    new_left = left + move
    correction = new_left.T @ gradient - (new_left.T @ move) @ right
    return Factors(new_left, right + gram_inverse(new_left.T @ new_left) @ correction)


def truncated_svd(matrix: Float[Array, "m n"], rank: int) -> Factors:
    """The product is the best approximation of rank `rank` in the Frobenius norm (Eckart & Young 1936).

    The singular values are shared evenly, left = U sqrt(S), right = sqrt(S) V'. A subspace step follows: an SVD is
    accurate relative to the largest singular value only, and small rows and columns deserve relative accuracy too.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    factors = Factors(u[:, :rank] * root[None, :], root[:, None] * vt[:rank])
    return subspace_step(matrix - factors.left @ factors.right, factors)


def balance(factors: Factors) -> Factors:
    """The same product with left.T @ left = right @ right.T diagonal, and `right` of full row rank.

    Both Gram matrices then have the condition number of the product, not its square. Components that are zero, which
    no alternating iteration could ever revive, become a zero column of `left` and a unit row of `right`.
    """
    q_left, r_left = jnp.linalg.qr(factors.left)
    q_right, r_right = jnp.linalg.qr(factors.right.T)
    u, s, vt = jnp.linalg.svd(r_left @ r_right.T)
    floor = jnp.finfo(s.dtype).eps * jnp.where(s[0] > 0, s[0], 1)
    root = jnp.sqrt(jnp.maximum(s, floor))
    return Factors(q_left @ (u * (s / root)[None, :]), (root[:, None] * vt) @ q_right.T)


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
