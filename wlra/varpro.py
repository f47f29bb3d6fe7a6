"""Damped Gauss-Newton on the left factor alone, the right one being the best for it: for targets mostly unseen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.driver import Method, choose
from wlra.linalg import Factors, balance, damped_solve, orthonormal, psd_inverse
from wlra.newton import turn, turned
from wlra.problem import Problem, gradient, loss, total

UNKNOWNS = 4096  # of the shorter factor at most: the Hessian has their square


class Accepted(NamedTuple):
    """The last point that lowered the loss, and the damping that has proved right."""

    factors: Factors
    loss: Float[Array, ""]
    damping: Float[Array, ""]


def init(problem: Problem, factors: Factors) -> tuple[Factors, Accepted]:
    m, n = problem.target.shape
    rank = factors.left.shape[1]
    if min(m, n) * rank > UNKNOWNS:
        raise ValueError(
            f"method 'varpro' needs min(m, n) * rank <= {UNKNOWNS}, for its dense Hessian; got {min(m, n)} * {rank} = "
            f"{min(m, n) * rank}: use 'newton', which never forms it"
        )
    inner, around = turn(problem, balance(factors))
    factors = turned(eliminate(inner, around.left), problem)
    infinite = jnp.array(jnp.inf, problem.target.dtype)
    return factors, Accepted(factors, infinite, jnp.array(1e-12, problem.target.dtype))


def step(problem: Problem, factors: Factors, last: Accepted) -> tuple[Factors, Accepted]:
    """The damped step from the best point so far, on the Grassmannian.

    Algorithm 2 of Ruhe & Wedin 1980 with the damping of Levenberg and Marquardt, ten times less after a step that
    lowered the loss and ten times more after one that did not (Okatani et al. 2011; Hong & Fitzgibbon 2015, RW2). The
    longer axis is eliminated. Differs from the papers: the damping is in units of the loss of zero, and not below the
    rounding errors of the Hessian; a step that overflows counts as one that did not lower the loss.

    A unit that follows the Hessian, its trace or its diagonal blocks, finds the best known minimum of a structure from
    motion in half as many of the starts; so does a first damping that is not small.
    """
    now = loss(problem, factors)
    lower = now < last.loss
    point, best = choose(lower, (factors, now), (last.factors, last.loss))
    inner, around = turn(problem, point)
    curvature, slope = hessian(inner, around), (gradient(inner, around) @ around.right.T).ravel()
    unit = total(problem.weight * problem.target**2) / jnp.max(jnp.diagonal(curvature))
    least = jnp.finfo(now.dtype).eps / unit
    damping = jnp.clip(jnp.where(lower, last.damping / 10, last.damping * 10), least, 1e4)
    move = damped_solve(curvature, slope, damping * unit).reshape(around.left.shape)
    trial = eliminate(inner, around.left + move)
    finite = jnp.all(jnp.isfinite(trial.left)) & jnp.all(jnp.isfinite(trial.right))
    return choose(finite, turned(trial, problem), point), Accepted(point, best, damping)


def eliminate(problem: Problem, left: Float[Array, "m k"]) -> Factors:
    """The span of `left` with an orthonormal basis, and for it the best `right` of minimum norm."""
    basis, _ = orthonormal(left)
    grams, sides = normal_equations(problem, basis)
    return Factors(basis, jax.vmap(lambda gram, side: psd_inverse(gram) @ side)(grams, sides).T)


def normal_equations(problem: Problem, left: Float[Array, "m k"]) -> tuple[Float[Array, "n k k"], Float[Array, "n k"]]:
    """left' diag(weight_j) left and left' diag(weight_j) target_j, for each column."""
    m, k = left.shape
    pairs = (left[:, :, None] * left[:, None, :]).reshape(m, k * k)
    return (problem.weight.T @ pairs).reshape(-1, k, k), (problem.weight * problem.target).T @ left


def hessian(problem: Problem, factors: Factors) -> Float[Array, "d d"]:
    """sum_j (D_j - D_j left (left' D_j left)^+ left' D_j) kron (right_j right_j'), D_j = diag(weight_j).

    Plus a multiple of (left left') kron I. Steps within the span of the orthonormal `left` change nothing and the slope
    has none, so this only makes the Hessian regular there.
    """
    left, right = factors
    (m, k), n = left.shape, right.shape[1]
    grams, _ = normal_equations(problem, left)
    halves = jnp.einsum("ij,ik,jkl->jil", problem.weight, left, jax.vmap(psd_inverse)(grams))
    spread = jnp.einsum("jil,hj,hl->ihj", halves, problem.weight, left).reshape(m * m, n)
    pairs = (right[:, None, :] * right[None, :, :]).reshape(k * k, n)
    lost = (spread @ pairs.T).reshape(m, m, k, k)
    own = (problem.weight @ pairs.T).reshape(m, k, k)
    eye = jnp.eye(m, dtype=left.dtype)
    within = (left @ left.T)[:, :, None, None] * jnp.eye(k, dtype=left.dtype)[None, None]
    full = eye[:, :, None, None] * own[:, None] - lost + jnp.max(jnp.abs(own)) * within
    return full.transpose(0, 2, 1, 3).reshape(m * k, m * k)


varpro = Method(init, step)
