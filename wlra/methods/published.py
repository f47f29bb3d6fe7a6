"""The iterations as their authors published them: an exact SVD each, extrapolating the completed matrix."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg.decompose import balance, truncated_svd
from wlra.methods.accelerate import Extrapolation, not_above
from wlra.methods.method import Stage, choose
from wlra.problem import Factors, Problem, loss, weighted_residual


class State(NamedTuple):
    """The last completed matrix that was projected, and the last factors that were accepted with their loss."""

    memory: Any
    point: Float[Array, "m n"]
    safe: Factors
    loss: Float[Array, ""]


def complete(problem: Problem, factors: Factors) -> Float[Array, "m n"]:
    """The target where its weight is 1, the product of the factors where it is 0, and their mean between."""
    return factors.left @ factors.right + weighted_residual(problem, factors)


def as_published(extrapolation: Extrapolation) -> Stage:
    """The stage Y <- complete(X), extrapolated; X <- the best rank-k approximation of Y, shrunk by the penalty if any.

    Plain, it is EM (Srebro & Jaakkola 2003, sec. 3); with momentum and with Anderson's combination the accelerations
    of Tuzhilina & Hastie 2021 (sec. 3), whose Anderson iteration combines completed matrices as here. Completing is
    affine, so combining before or after it is the same; Anderson's first residual is the difference from a matrix of
    zeros, as in their code. Added to the papers: if the loss rose, the iteration restarts from the last factors that
    did not raise it (an option in theirs).
    """

    def init(problem: Problem, factors: Factors) -> tuple[Factors, State]:
        point, factors = jnp.zeros_like(problem.target), balance(factors)
        infinite = jnp.array(jnp.inf, point.dtype)
        return factors, State(extrapolation.init(point), point, factors, infinite)

    def step(problem: Problem, factors: Factors, aux: State) -> tuple[Factors, State]:
        now = loss(problem, factors)
        ahead, memory = extrapolation.step(aux.memory, aux.point, complete(problem, factors))
        accepted = not_above(now, aux.loss)
        back = complete(problem, aux.safe)
        rejected = aux._replace(memory=extrapolation.init(back), point=back)
        aux = choose(accepted, State(memory, ahead, factors, now), rejected)
        return truncated_svd(aux.point, factors.left.shape[1], problem.penalty), aux

    return Stage(init, step)
