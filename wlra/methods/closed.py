"""Closed forms: one decomposition each, exact for weights of a special shape."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from wlra.certificate import nearly_equal
from wlra.linalg.decompose import mask_rank, orthonormal, psd_roots, truncated_svd
from wlra.linalg.gram import eliminated
from wlra.methods.method import Evaluated, Method
from wlra.problem import Factors, Kronecker, Problem, loss, rounding, stationarity, total
from wlra.scaling import Scaling, equilibrate, scale, scale_factors, unscale_factors
from wlra.sparse import Matrix, row_sum


def equal(weight: Matrix) -> Scaling:
    """All weights are taken for equal."""
    m, n = weight.shape
    return Scaling(jnp.ones(m, weight.dtype), jnp.ones(n, weight.dtype))


def row_sums(weight: Matrix) -> Scaling:
    """The weights of a row are taken for equal, and replaced by their sum (Hsu et al. 2022, eq. 7).

    The row of a kernel (in, out) is an input, as in the paper.
    """
    return Scaling(row_sum(weight), jnp.ones(weight.shape[1], weight.dtype))


def equalised(name: str, equalise: Callable[[Matrix], Scaling], *, sees_hidden: bool = False) -> Method:
    """The method that is exact for weights row_i col_j, and takes those of `equalise` for all others.

    Its factors are the truncated SVD in the variables in which such weights are equal; loss and stationarity are those
    of the weights as given.
    """

    def closed_form(problem: Problem, rank: int, ranks: Any) -> Evaluated:
        scaling = equalise(problem.weight)
        scaled = scale(problem, scaling)
        best = mask_rank(truncated_svd(scaled.target, rank), ranks)
        factors, lowest = unscale_factors(best, scaling), nearly_equal(scaled.weight)
        if equalise is not equilibrate:
            scaling = equilibrate(problem.weight)
            scaled, best = scale(problem, scaling), scale_factors(factors, scaling)
        return Evaluated(factors, loss(scaled, best), stationarity(scaled, best, eliminated), lowest)

    return Method(name, closed_form=closed_form, equalise=equalise, sees_hidden=sees_hidden, keeps_zeros=True)


svd = equalised("svd", equal, sees_hidden=True)  # Eckart & Young 1936
fwsvd = equalised("fwsvd", row_sums, sees_hidden=True)  # Hsu et al. 2022, eq. 7
separable = equalised("separable", equilibrate)  # Irani & Anandan 2000, sec. 3


def nearest(problem: Problem, rank: int, ranks: Int[Array, ""] | None = None) -> Evaluated:
    """The factors of least trace(row E col E'), E = target - left @ right, with their relative loss and stationarity.

    The leading eigenvectors U of row^1/2 target col target' row^1/2 give right = U' row^1/2 target, and that the best
    left. The larger of the two weights is only multiplied with: of 768 x 3072, two decompositions of 768. Decomposing
    a square halves the digits of small singular values; a step of orthogonal iteration, without it, returns them.
    What the smaller side's weight is too small to see is fitted as the rest is.
    """
    target, weight = problem.target, problem.weight
    m, n = target.shape
    if m > n:
        flipped = Problem(target.T, Kronecker(weight.col, weight.row))
        factors, *figures = nearest(flipped, rank, ranks)
        return Evaluated(Factors(factors.right.T, factors.left.T), *figures)
    root, product = psd_roots(weight.row)[0], target @ weight.col
    gram = root @ (product @ target.T) @ root
    vectors = jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1][:, :rank]
    basis, _ = orthonormal(root @ (product @ (target.T @ (root @ vectors))))
    basis, right = mask_rank(Factors(basis, (root @ basis).T @ target), ranks)
    weighted_right = right @ weight.col
    left = product @ right.T @ eliminated(weighted_right @ right.T)
    error = target - left @ right
    lost = total((weight.row @ error) * (product - left @ weighted_right))
    whole = total((weight.row @ target) * product)
    relative = jnp.maximum(lost, 0) / jnp.where(whole > 0, whole, 1)
    along = (root @ basis).T @ error
    share = jnp.sqrt(jnp.clip(total(along * (along @ weight.col)) / jnp.where(lost > 0, lost, 1), 0, 1))
    factors = Factors(left, right)
    return Evaluated(factors, relative, jnp.where(relative > rounding(factors), share, 0), lowest=True)


kronecker = Method("kronecker", closed_form=nearest, kronecker=True, keeps_zeros=True)
