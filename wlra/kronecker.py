"""Weights of rows and columns as wholes: a closed form from the smaller side's decompositions alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra.linalg import Factors, gram_inverse, leading, orthonormal, psd_roots
from wlra.problem import rounding, total


def nearest(
    target: Float[Array, "m n"],
    row: Float[Array, "m m"],
    col: Float[Array, "n n"],
    rank: int,
    own: Int[Array, ""] | None = None,
) -> tuple[Factors, Float[Array, ""], Float[Array, ""]]:
    """The factors of least trace(row E col E'), E = target - left @ right, with their relative loss and stationarity.

    With T = row^1/2 target, the leading eigenvectors U of T col T' give left = row^-1/2 U and right = U'T. The larger
    of the two weights is only multiplied with: of 768 x 3072, two decompositions of 768. Decomposing a square halves
    the digits of small singular values; a step of orthogonal iteration, without the square, returns them. Where the
    smaller side's weight is singular, `left` is the shortest of all that are as good.
    """
    m, n = target.shape
    if m > n:
        factors, loss, slope = nearest(target.T, col, row, rank, own)
        return Factors(factors.right.T, factors.left.T), loss, slope
    root, inverse = psd_roots(row)
    turned = root @ target
    product = turned @ col
    gram = product @ turned.T
    vectors = jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1][:, :rank]
    basis, _ = orthonormal(turned @ (col @ (turned.T @ vectors)))
    basis, right = leading(Factors(basis, basis.T @ turned), own)
    weighed = product - basis @ (right @ col)  # the error times col
    error, whole = total(weighed * (turned - basis @ right)), total(product * turned)
    loss = jnp.maximum(error, 0) / jnp.where(whole > 0, whole, 1)
    along = weighed @ right.T
    tangent = total(along * (along @ gram_inverse(right @ col @ right.T)))
    slope = jnp.sqrt(jnp.clip(tangent / jnp.where(error > 0, error, 1), 0, 1))
    factors = Factors(inverse @ basis, right)
    return factors, loss, jnp.where(loss > rounding(factors), slope, 0)
