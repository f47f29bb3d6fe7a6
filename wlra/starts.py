"""Closed forms: one SVD each, exact for weights of a special shape and a start for all others.

A start takes the decomposition to use: an exact one for its own sake, a quick one where iterations follow.
"""

from collections.abc import Callable

import jax.numpy as jnp

from wlra import scaling
from wlra.linalg import Factors
from wlra.problem import Problem
from wlra.sparse import Matrix, like, row_sum, values

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
