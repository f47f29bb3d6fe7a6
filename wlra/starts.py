"""Closed forms: one SVD each, exact for weights of a special shape and a start for all others."""

from collections.abc import Callable

import jax.numpy as jnp

from wlra import scaling
from wlra.linalg import Factors, truncated_svd
from wlra.problem import Problem

Start = Callable[[Problem, int], Factors]


def svd(problem: Problem, rank: int) -> Factors:
    """Optimal if all weights are equal (Eckart & Young 1936)."""
    return truncated_svd(problem.target, rank)


def fwsvd(problem: Problem, rank: int) -> Factors:
    """Optimal if each row has one weight; other weights are replaced by their row sums (Hsu et al. 2022, eq. 7).

    The row of a kernel (in, out) is an input, as in the paper.
    """
    row = jnp.sum(problem.weight, axis=1)
    return by_svd(problem, scaling.Scaling(row, jnp.ones_like(problem.target[0])), rank)


def separable(problem: Problem, rank: int) -> Factors:
    """Optimal if weight_ij = p_i q_j (Irani & Anandan 2000, sec. 3); other weights are replaced by such a fit.

    Where the weight is 0 the target counts as 0: what it holds there is nobody's business.
    """
    seen = problem._replace(target=jnp.where(problem.weight > 0, problem.target, 0))
    return by_svd(seen, scaling.separable(problem.weight), rank)


def by_svd(problem: Problem, scales: scaling.Scaling, rank: int) -> Factors:
    """The best approximation for the weights row col'."""
    target = scaling.scale(problem, scales).target
    return scaling.unscale_factors(truncated_svd(target, rank), scales)


STARTS: dict[str, Start] = {"svd": svd, "fwsvd": fwsvd, "separable": separable}
