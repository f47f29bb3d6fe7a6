"""A change of variables that makes the weights of a problem as equal as rows and columns allow.

Weights p_i q_j w_ij on a target W are weights w_ij on sqrt(p_i q_j) W_ij: the same problem, of the same rank. An
iteration whose rate is set by the spread of the weights then sees only the spread of w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.problem import Factors, Problem
from wlra.sparse import Matrix, by_col, by_row, like, row_max, row_sum, values


class Scaling(NamedTuple):
    """Weights are divided by row_i col_j; targets and products are multiplied by its square root."""

    row: Float[Array, " m"]
    col: Float[Array, " n"]


def uniform(weight: Matrix, largest: float = 1.0) -> Scaling:
    """Weights keep their proportions: they are divided by their maximum, as EM needs them in [0, 1]."""
    m, n = weight.shape
    return Scaling(jnp.full(m, jnp.max(values(weight)) / largest), jnp.ones(n, weight.dtype))


LONGER = 1.6


def longer(weight: Matrix) -> Scaling:
    """Weights keep their proportions, and are at most LONGER: proximal gradient steps so much longer than EM's.

    Those on a convex objective lower it for all factors below 2 (Beck & Teboulle 2009, lemma 2.3).
    """
    return uniform(weight, LONGER)


def equilibrate(weight: Matrix, sweeps: int = 8) -> Scaling:
    """weight / (row col') lies in [0, 1], with the 4-norm of its positive entries about equal in all rows and columns.

    A Sinkhorn iteration (Sinkhorn & Knopp 1967) on the fourth powers: with the first, single entries far above 1 are
    left over, and it is the largest that sets the rate of EM. Exact after one sweep for weights of rank one; leaves
    0/1 masks alone. The first sweep takes means relative to the largest entry, so that nothing overflows; it leaves
    entries of at most the fourth root of the longer side, and the others are products of their powers with vectors.
    """
    row = power_mean(weight)
    col = power_mean(like(weight, divide(values(weight), by_row(weight, row))).T)
    shares = divide(divide(values(weight), by_row(weight, row)), by_col(weight, col))
    powers, seen = like(weight, shares**4), like(weight, (shares > 0).astype(shares.dtype))
    row_count, col_count = row_sum(seen), row_sum(seen.T)

    def sweep(_: Any, both: tuple[Array, Array]) -> tuple[Array, Array]:
        _, q = both
        p = divide(powers @ divide(jnp.ones_like(q), q)[:, None], row_count[:, None])[:, 0]
        return p, divide(powers.T @ divide(jnp.ones_like(p), p)[:, None], col_count[:, None])[:, 0]

    p, q = jax.lax.fori_loop(0, sweeps - 1, sweep, (jnp.ones_like(row), jnp.ones_like(col)))
    row, col = row * root(root(p)), col * root(root(q))
    row = row * jnp.max(divide(divide(values(weight), by_row(weight, row)), by_col(weight, col)))
    return Scaling(row, col)


def scale(problem: Problem, scaling: Scaling) -> Problem:
    """The same problem in variables sqrt(row col') * product."""
    target, weight = problem.target, problem.weight
    scaled = by_row(target, root(scaling.row)) * values(target) * by_col(target, root(scaling.col))
    shares = divide(divide(values(weight), by_row(weight, scaling.row)), by_col(weight, scaling.col))
    return problem._replace(target=like(target, scaled), weight=like(weight, shares))


def scale_factors(factors: Factors, scaling: Scaling) -> Factors:
    """The factors in the variables of the scaled problem."""
    return Factors(root(scaling.row)[:, None] * factors.left, factors.right * root(scaling.col)[None, :])


def unscale_factors(factors: Factors, scaling: Scaling) -> Factors:
    """The factors in the variables of the problem that was scaled; zero in rows and columns without weight."""
    left = divide(factors.left, root(scaling.row)[:, None])
    return Factors(left, divide(factors.right, root(scaling.col)[None, :]))


def rescale_factors(factors: Factors, before: Scaling, after: Scaling) -> Factors:
    """Factors in the variables of one scaling, in those of another."""
    return scale_factors(unscale_factors(factors, before), after)


def power_mean(rows: Matrix) -> Float[Array, " m"]:
    """The fourth root of the mean fourth power of each row's positive entries; 0 for a row of zeros."""
    largest = row_max(rows)
    count = jnp.maximum(row_sum(like(rows, (values(rows) > 0).astype(jnp.int32))), 1).astype(rows.dtype)
    mean = row_sum(like(rows, divide(values(rows), by_row(rows, largest)) ** 4)) / count
    return largest * root(root(mean))


def divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."]) -> Float[Array, "..."]:
    """The quotient; 0 where the denominator is."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def root(numbers: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, whose derivative at 0 counts as 0: nothing without weight changes anything."""
    zero = numbers == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, numbers)))


SCALINGS: dict[str, Callable[[Matrix], Scaling]] = {"separable": equilibrate, "none": uniform}
