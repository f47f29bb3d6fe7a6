"""What is minimised, and how far from a minimum a pair of factors is."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg import Factors, gram_inverses


class Problem(NamedTuple):
    """Minimise sum_ij weight_ij (target_ij - (left @ right)_ij)**2 over `Factors` of a given rank."""

    target: Float[Array, "m n"]
    weight: Float[Array, "m n"]


def gradient(problem: Problem, factors: Factors) -> Float[Array, "m n"]:
    """The weighted residual: minus half the derivative of the objective with respect to `left @ right`."""
    return problem.weight * (problem.target - factors.left @ factors.right)


def loss(problem: Problem, factors: Factors) -> Float[Array, ""]:
    """The weighted squared error relative to that of zero: 0 is exact, 1 no better than nothing."""
    residual = problem.target - factors.left @ factors.right
    error = jnp.sum(problem.weight * residual**2)
    total = jnp.sum(problem.weight * problem.target**2)
    return jnp.where(total > 0, error / jnp.where(total > 0, total, 1), error)


def stationarity(problem: Problem, factors: Factors) -> Float[Array, ""]:
    """The share of the gradient that rank-k matrices can follow: ||P_T(G)|| / ||G||, in [0, 1].

    G is the weighted residual and P_T(G) = P_U G + G P_V - P_U G P_V its projection onto the tangent space of the
    matrices of rank k at left @ right (Vandereycken 2013, sec. 2.1). It does not change with the gauge of the factors,
    nor with the units of target and weight. A fit that is exact up to rounding, whose gradient is noise, counts as 0.
    """
    left, right = factors
    grad = gradient(problem, factors)
    along_right, along_left = grad @ right.T, left.T @ grad
    inverse_left, inverse_right = gram_inverses(factors)
    both = along_left @ right.T
    tangent = (
        jnp.sum(along_right * (along_right @ inverse_right))
        + jnp.sum(along_left * (inverse_left @ along_left))
        - jnp.sum(both * (inverse_left @ both @ inverse_right))
    )
    total = jnp.sum(grad**2)
    ratio = jnp.sqrt(jnp.clip(tangent / jnp.where(total > 0, total, 1), 0, 1))
    return jnp.where(loss(problem, factors) > rounding(factors), ratio, 0)


def rounding(factors: Factors) -> float:
    """The loss at which only rounding errors are left of the residual."""
    return factors.left.shape[1] * (8 * float(jnp.finfo(factors.left.dtype).eps)) ** 2
