"""What is minimised, and how far from a minimum a pair of factors is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg.gram import gram_inverse
from wlra.sparse import Matrix, entries, like, values


class Kronecker(NamedTuple):
    """Weights that act on whole rows and columns: the error E costs trace(row @ E @ col @ E.T).

    Both are symmetric positive semi-definite, `row` (m, m) and `col` (n, n); diagonal ones are weights row_i col_j.

    Example:
      >>> import numpy as np, wlra
      >>> weights = wlra.Kronecker(row=np.diag([1.0, 2.0, 3.0]), col=np.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> result = wlra.solve(np.outer([1, 2, 3], [1, 2]), weights, rank=1, method="kronecker")
      >>> bool(result.loss < 1e-6)
      True
    """

    row: Any
    col: Any


class Factors(NamedTuple):
    """A matrix of rank at most k, `left @ right`.

    Example:
      >>> import jax.numpy as jnp, wlra
      >>> (lambda left, right: left @ right)(*wlra.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))).shape
      (3, 2)
    """

    left: Float[Array, "m k"]
    right: Float[Array, "k n"]


class Problem(NamedTuple):
    """Minimise sum_ij weight_ij (target_ij - (left @ right)_ij)**2 + penalty (||left||**2 + ||right||**2).

    Over `Factors` of a given rank. The penalty is twice that of the nuclear norm of left @ right, which is the least
    (||left||**2 + ||right||**2) / 2 of all its factorisations (Srebro, Rennie & Jaakkola 2005, lemma 1).

    Example:
      >>> import jax.numpy as jnp, wlra
      >>> from wlra.problem import loss
      >>> problem = wlra.Problem(target=jnp.ones((3, 2)), weight=jnp.ones((3, 2)))
      >>> float(loss(problem, wlra.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))))
      0.0
    """

    target: Matrix
    weight: Matrix  # or Kronecker, for the closed form of that kind
    penalty: Float[Array, ""] | float = 0.0


def residual(problem: Problem, factors: Factors) -> Float[Array, "..."]:
    """What the factors leave of the target's values."""
    return values(problem.target) - entries(problem.target, *factors)


def weighted_residual(problem: Problem, factors: Factors) -> Matrix:
    """Minus half the derivative of the weighted error with respect to `left @ right`."""
    return like(problem.target, values(problem.weight) * residual(problem, factors))


def gradient_left(problem: Problem, factors: Factors) -> Float[Array, "m k"]:
    """Minus half the derivative of the objective with respect to `left`."""
    return weighted_residual(problem, factors) @ factors.right.T - problem.penalty * factors.left


def gradient_right(problem: Problem, factors: Factors) -> Float[Array, "k n"]:
    """Minus half the derivative of the objective with respect to `right`."""
    return factors.left.T @ weighted_residual(problem, factors) - problem.penalty * factors.right


def loss(problem: Problem, factors: Factors) -> Float[Array, ""]:
    """The objective relative to that of zero: 0 is exact, 1 no better than nothing."""
    weight = values(problem.weight)
    error = total(weight * residual(problem, factors) ** 2)
    size = problem.penalty * (total(factors.left**2) + total(factors.right**2))
    zero = total(weight * values(problem.target) ** 2)
    return jnp.where(zero > 0, (error + size) / jnp.where(zero > 0, zero, 1), error + size)


def stationarity(problem: Problem, factors: Factors, inverse: Callable = gram_inverse) -> Float[Array, ""]:
    """The share of the weighted residual that rank-k matrices can follow: ||P_T(G)|| / ||G||, in [0, 1].

    G is the weighted residual and P_T(G) = P_U G + G P_V - P_U G P_V its projection onto the tangent space of the
    matrices of rank k at left @ right (Vandereycken 2013, sec. 2.1). With a penalty, its derivative is subtracted, and
    added to the Gram matrices in P_U and P_V.
    It does not change with the gauge of the factors, nor with the units of target and weight. A fit that is exact up
    to rounding, whose residual is noise, counts as 0. `inverse` is that of a Gram matrix plus a shift: by default the
    one that is fast within a loop of products.
    """
    left, right = factors
    along_right, along_left = gradient_left(problem, factors), gradient_right(problem, factors)
    inverse_left = inverse(left.T @ left, problem.penalty)
    inverse_right = inverse(right @ right.T, problem.penalty)
    both = along_left @ right.T
    tangent = (
        total(along_right * (along_right @ inverse_right))
        + total(along_left * (inverse_left @ along_left))
        - total(both * (inverse_left @ both @ inverse_right))
    )
    return share(problem, factors, tangent)


def stationarity_bound(problem: Problem, factors: Factors) -> Float[Array, ""]:
    """A lower bound of the stationarity, from the half of the tangent space in which `right` stays: ||G P_V|| / ||G||.

    An iteration has its products anyway.
    """
    along_right = gradient_left(problem, factors)
    inverse_right = gram_inverse(factors.right @ factors.right.T, problem.penalty)
    return share(problem, factors, total(along_right * (along_right @ inverse_right)))


def share(problem: Problem, factors: Factors, tangent: Float[Array, ""]) -> Float[Array, ""]:
    """The root of a part of the residual's squared norm over all of it; 0 for a fit that is exact up to rounding."""
    whole = total(values(weighted_residual(problem, factors)) ** 2)
    ratio = jnp.sqrt(jnp.clip(tangent / jnp.where(whole > 0, whole, 1), 0, 1))
    return jnp.where(loss(problem, factors) > rounding(factors), ratio, 0)


def total(array: Float[Array, "*m n"]) -> Float[Array, ""]:
    """The sum of all entries, rows first: XLA runs these in parallel on a CPU."""
    return jnp.sum(jnp.sum(array, axis=-1))


def rounding(factors: Factors) -> float:
    """The loss at which only rounding errors are left of the residual."""
    return factors.left.shape[1] * (8 * float(jnp.finfo(factors.left.dtype).eps)) ** 2
