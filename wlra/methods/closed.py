"""Closed forms: one decomposition each, exact for weights of a special shape."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra import scaling
from wlra.linalg.decompose import leading, orthonormal, psd_roots
from wlra.linalg.gram import gram_inverse
from wlra.problem import Factors, Problem, rounding, total
from wlra.sparse import Matrix, like, row_sum, values


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


Decomposition = Callable[[Matrix, int], Factors]


Start = Callable[[Problem, int, Decomposition], Factors]


def svd(problem: Problem, rank: int, decompose: Decomposition) -> Factors:
    """Optimal if all weights are equal (Eckart & Young 1936)."""
    return decompose(problem.target, rank)


def fwsvd(problem: Problem, rank: int, decompose: Decomposition) -> Factors:
    """Optimal if each row has one weight; other weights are replaced by their row sums (Hsu et al. 2022, eq. 7).

    The row of a kernel (in, out) is an input, as in the paper.
    """
    col = jnp.ones(problem.target.shape[1], problem.target.dtype)
    return by_svd(problem, scaling.Scaling(row_sum(problem.weight), col), rank, decompose)


def separable(problem: Problem, rank: int, decompose: Decomposition) -> Factors:
    """Optimal if weight_ij = p_i q_j (Irani & Anandan 2000, sec. 3); other weights are replaced by such a fit.

    Where the weight is 0 the target counts as 0: what it holds there is nobody's business.
    """
    seen = jnp.where(values(problem.weight) > 0, values(problem.target), 0)
    problem = problem._replace(target=like(problem.target, seen))
    return by_svd(problem, scaling.separable(problem.weight), rank, decompose)


def by_svd(problem: Problem, scales: scaling.Scaling, rank: int, decompose: Decomposition) -> Factors:
    """The best approximation for the weights row col'."""
    target = scaling.scale(problem, scales).target
    return scaling.unscale_factors(decompose(target, rank), scales)


STARTS: dict[str, Start] = {"svd": svd, "fwsvd": fwsvd, "separable": separable}
