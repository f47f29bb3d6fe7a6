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

    The leading eigenvectors U of row^1/2 target col target' row^1/2 give right = U' row^1/2 target, and that the best
    left. The larger of the two weights is only multiplied with: of 768 x 3072, two decompositions of 768. Decomposing
    a square halves the digits of small singular values; a step of orthogonal iteration, without it, returns them.
    What the smaller side's weight is too small to see is fitted as the rest is.
    """
    m, n = target.shape
    if m > n:
        factors, loss, slope = nearest(target.T, col, row, rank, own)
        return Factors(factors.right.T, factors.left.T), loss, slope
    root, product = psd_roots(row)[0], target @ col
    gram = root @ (product @ target.T) @ root
    vectors = jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1][:, :rank]
    basis, _ = orthonormal(root @ (product @ (target.T @ (root @ vectors))))
    basis, right = leading(Factors(basis, (root @ basis).T @ target), own)
    weighed = right @ col
    left = product @ right.T @ gram_inverse(weighed @ right.T)
    error = target - left @ right
    lost = total((row @ error) * (product - left @ weighed))
    whole = total((row @ target) * product)
    loss = jnp.maximum(lost, 0) / jnp.where(whole > 0, whole, 1)
    along = (root @ basis).T @ error
    slope = jnp.sqrt(jnp.clip(total(along * (along @ col)) / jnp.where(lost > 0, lost, 1), 0, 1))
    return Factors(left, right), loss, jnp.where(loss > rounding(Factors(left, right)), slope, 0)
