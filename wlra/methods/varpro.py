"""Damped Gauss-Newton on the left factor alone, the right one being the best for it: for targets mostly unseen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg.decompose import balance, orthonormal
from wlra.linalg.gram import damped_solve, psd_inverse
from wlra.methods.method import Method, choose
from wlra.methods.newton import turn, turned
from wlra.problem import Factors, Problem, gradient, residual, total

UNKNOWNS = 4096  # of the shorter factor at most: the Hessian has their square


RIDGE, LEAST_RIDGE = 1e-3, 1e-6  # in mean weights: the first, and the last before none


SETTLED = 1e-3  # the share by which a step lowers the objective before the ridge is lowered


DAMPING = 1e-12  # the first, in losses of zero


class Accepted(NamedTuple):
    """The last `left` that lowered the objective, the damping that has proved right, and the ridge."""

    left: Float[Array, "m k"]
    objective: Float[Array, ""]
    damping: Float[Array, ""]
    ridge: Float[Array, ""]


def init(problem: Problem, factors: Factors) -> tuple[Factors, Accepted]:
    m, n = problem.target.shape
    rank = factors.left.shape[1]
    if min(m, n) * rank > UNKNOWNS:
        raise ValueError(
            f"method 'varpro' needs min(m, n) * rank <= {UNKNOWNS}, for its dense Hessian; got {min(m, n)} * {rank} = "
            f"{min(m, n) * rank}: use 'newton', which never forms it"
        )
    inner, around = turn(problem, balance(factors))
    factors, _ = eliminate(inner, around.left)
    infinite, damping = (jnp.array(value, problem.target.dtype) for value in (jnp.inf, DAMPING))
    return turned(factors, problem), Accepted(factors.left, infinite, damping, RIDGE * jnp.mean(problem.weight))


def step(problem: Problem, factors: Factors, last: Accepted) -> tuple[Factors, Accepted]:
    """The damped step from the best point so far, on the Grassmannian.

    Algorithm 2 of Ruhe & Wedin 1980 with the damping of Levenberg and Marquardt, ten times less after a step that
    lowered the objective and ten times more after one that did not (Okatani et al. 2011; Hong & Fitzgibbon 2015, RW2).
    The longer axis is eliminated. Differs from the papers: the damping is in units of the loss of zero, and not below
    the rounding errors of the Hessian; a step that overflows counts as one that did not lower the objective; and at
    first a ridge on `right` keeps columns with few observations from fitting them with huge coefficients, a valley
    that most failures end in. It falls tenfold where the objective settles, and at last to none.

    Steps are judged by the objective, whose rounding errors are those of a stationarity of sqrt(eps).
    """
    inner, trial = turn(problem, factors)
    now = objective(inner, trial, last.ridge)
    lower = now < last.objective
    settled = lower & (last.objective - now < SETTLED * now) & (last.ridge > 0)
    least = 2 * LEAST_RIDGE * jnp.mean(problem.weight)
    ridge = jnp.where(settled, jnp.where(last.ridge > least, last.ridge / 10, 0), last.ridge)
    around, inverses = eliminate(inner, jnp.where(lower, trial.left, last.left), ridge)
    best = jnp.where(lower, objective(inner, around, ridge), last.objective)

    curvature, slope = hessian(inner, around, inverses), (gradient(inner, around) @ around.right.T).ravel()
    unit = total(problem.weight * problem.target**2) / jnp.max(jnp.diagonal(curvature))
    damping = jnp.where(settled, DAMPING, jnp.where(lower, last.damping / 10, last.damping * 10))
    damping = jnp.clip(damping, jnp.finfo(now.dtype).eps / unit, 1e4)
    move = damped_solve(curvature, slope, damping * unit).reshape(around.left.shape)
    ahead, _ = eliminate(inner, around.left + move, ridge)
    finite = jnp.all(jnp.isfinite(ahead.left)) & jnp.all(jnp.isfinite(ahead.right))
    return turned(choose(finite, ahead, around), problem), Accepted(around.left, best, damping, ridge)


def objective(problem: Problem, factors: Factors, ridge: Float[Array, ""]) -> Float[Array, ""]:
    """The weighted error plus the ridge times the squares of `right`."""
    return total(problem.weight * residual(problem, factors) ** 2) + ridge * total(factors.right**2)


def eliminate(
    problem: Problem, left: Float[Array, "m k"], ridge: Float[Array, ""] | float = 0.0
) -> tuple[Factors, Float[Array, "n k k"]]:
    """The span of `left` with an orthonormal basis, and for it the best `right`, of minimum norm if there are several.

    And for each column the pseudo-inverse of basis' diag(weight_j) basis + ridge.
    """
    basis, _ = orthonormal(left)
    m, k = left.shape
    pairs = (basis[:, :, None] * basis[:, None, :]).reshape(m, k * k)
    grams = (problem.weight.T @ pairs).reshape(-1, k, k) + ridge * jnp.eye(k, dtype=left.dtype)[None]
    inverses = jax.vmap(psd_inverse)(grams)
    sides = (problem.weight * problem.target).T @ basis
    return Factors(basis, jnp.einsum("jkl,jl->kj", inverses, sides)), inverses


def hessian(problem: Problem, factors: Factors, inverses: Float[Array, "n k k"]) -> Float[Array, "d d"]:
    """sum_j (D_j - D_j left inverse_j left' D_j) kron (right_j right_j'), D_j = diag(weight_j).

    Plus a multiple of (left left') kron I. Steps within the span of the orthonormal `left` change nothing and the slope
    has none, so this only makes the Hessian regular there. Two products of 2 m^2 n k^2 operations.
    """
    left, right = factors
    (m, k), n = left.shape, right.shape[1]
    weight = problem.weight
    crossed = (left[:, None, :, None] * left[None, :, None, :]).reshape(m * m, k * k)
    spread = (crossed @ inverses.reshape(n, k * k).T).reshape(m, m, n) * weight[:, None] * weight[None]
    pairs = (right[:, None, :] * right[None, :, :]).reshape(k * k, n)
    lost = (spread.reshape(m * m, n) @ pairs.T).reshape(m, m, k, k)
    own = (weight @ pairs.T).reshape(m, k, k)
    eye = jnp.eye(m, dtype=left.dtype)
    within = (left @ left.T)[:, :, None, None] * jnp.eye(k, dtype=left.dtype)[None, None]
    full = eye[:, :, None, None] * own[:, None] - lost + jnp.max(jnp.abs(own)) * within
    return full.transpose(0, 2, 1, 3).reshape(m * k, m * k)


varpro = Method(init, step)
