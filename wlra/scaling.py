"""A change of variables that makes the weights of a problem as equal as rows and columns allow.

Weights p_i q_j w_ij on a target W are weights w_ij on sqrt(p_i q_j) W_ij: the same problem, of the same rank. An
iteration whose rate is set by the spread of the weights then sees only the spread of w.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg import Factors
from wlra.problem import Problem


class Scaling(NamedTuple):
    """Weights are divided by row_i col_j; targets and products are multiplied by its square root."""

    row: Float[Array, " m"]
    col: Float[Array, " n"]


def none(weight: Float[Array, "m n"], largest: float = 1.0) -> Scaling:
    """Weights keep their proportions: they are divided by their maximum, as EM needs them in [0, 1]."""
    m, n = weight.shape
    return Scaling(jnp.full(m, jnp.max(weight) / largest), jnp.ones(n, weight.dtype))


LONGER = 1.6


def longer(weight: Float[Array, "m n"]) -> Scaling:
    """Weights keep their proportions, and are at most LONGER: proximal gradient steps so much longer than EM's.

    Those on a convex objective lower it for all factors below 2 (Beck & Teboulle 2009, lemma 2.3).
    """
    return none(weight, LONGER)


def separable(weight: Float[Array, "m n"], sweeps: int = 8) -> Scaling:
    """weight / (row col') lies in [0, 1], with the 4-norm of its positive entries about equal in all rows and columns.

    A Sinkhorn iteration (Sinkhorn & Knopp 1967) on the fourth powers: with the first, single entries far above 1 are
    left over, and it is the largest that sets the rate of EM. Exact after one sweep for weights of rank one; leaves
    0/1 masks alone. Means are taken relative to the largest entry, so that nothing overflows.
    """
    m, n = weight.shape
    row, col = jnp.ones(m, weight.dtype), jnp.ones(n, weight.dtype)
    for _ in range(sweeps):
        row = power_mean(divide(weight, col[None, :]))
        col = power_mean(divide(weight, row[:, None]).T)
    row = row * jnp.max(divide(divide(weight, row[:, None]), col[None, :]))
    return Scaling(row, col)


def scale(problem: Problem, scaling: Scaling) -> Problem:
    """The same problem in variables sqrt(row col') * product."""
    weight = divide(divide(problem.weight, scaling.row[:, None]), scaling.col[None, :])
    target = jnp.sqrt(scaling.row)[:, None] * problem.target * jnp.sqrt(scaling.col)[None, :]
    return problem._replace(target=target, weight=weight)


def scale_factors(factors: Factors, scaling: Scaling) -> Factors:
    """The factors in the variables of the scaled problem."""
    return Factors(jnp.sqrt(scaling.row)[:, None] * factors.left, factors.right * jnp.sqrt(scaling.col)[None, :])


def unscale_factors(factors: Factors, scaling: Scaling) -> Factors:
    """The factors in the variables of the problem that was scaled; zero in rows and columns without weight."""
    left = divide(factors.left, jnp.sqrt(scaling.row)[:, None])
    return Factors(left, divide(factors.right, jnp.sqrt(scaling.col)[None, :]))


def power_mean(rows: Float[Array, "m n"]) -> Float[Array, " m"]:
    """The fourth root of the mean fourth power of each row's positive entries; 0 for a row of zeros."""
    largest = jnp.max(rows, axis=1)
    count = jnp.maximum(jnp.sum(rows > 0, axis=1), 1).astype(rows.dtype)
    mean = jnp.sum(divide(rows, largest[:, None]) ** 4, axis=1) / count
    return largest * jnp.sqrt(jnp.sqrt(mean))


def divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."]) -> Float[Array, "..."]:
    """The quotient; 0 where the denominator is."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


SCALINGS: dict[str, Callable[[Float[Array, "m n"]], Scaling]] = {"separable": separable, "none": none}
