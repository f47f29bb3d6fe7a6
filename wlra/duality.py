"""How far from the global optimum a nuclear-norm solution can be at most."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg.decompose import spectral_norm
from wlra.problem import Factors, Problem, total, weighted_residual


def duality_gap(problem: Problem, factors: Factors) -> Float[Array, ""]:
    """No matrix of any rank has an objective lower than this one's by a larger share than the gap.

    The objective is sum weight (target - X)**2 / 2 + penalty ||X||_*, and its dual, over Y of spectral norm at most
    the penalty, <Y, target> - sum Y**2 / weight / 2 (Fenchel). The dual point is the weighted residual, shrunk until it
    is one. The nuclear norm is bounded by (||left||**2 + ||right||**2) / 2, which balanced factors attain.
    """
    residual = weighted_residual(problem, factors)
    size = spectral_norm(residual)
    point = residual * jnp.minimum(1, problem.penalty / jnp.where(size > 0, size, 1))
    seen = problem.weight > 0
    squares = jnp.where(seen, point**2 / jnp.where(seen, problem.weight, 1), 0)
    norm = (total(factors.left**2) + total(factors.right**2)) / 2
    error = total(problem.weight * (problem.target - factors.left @ factors.right) ** 2)
    primal = error / 2 + problem.penalty * norm
    dual = total(point * problem.target) - total(squares) / 2
    return jnp.clip((primal - dual) / jnp.where(primal > 0, primal, 1), 0, 1)
