"""Damped Gauss-Newton on the left factor alone, the right one being the best for it: for targets mostly unseen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.linalg.decompose import balance, orthonormal
from wlra.linalg.gram import damped_solve, psd_inverse
from wlra.methods.method import Stage, choose
from wlra.methods.newton import restore_axes, shorter_first
from wlra.problem import Factors, Problem, residual, total, weighted_residual

UNKNOWNS = 4096  # of the shorter factor at most: the Hessian has their square
NUMBERS = 2**24  # of what is summed to the Hessian at a time


PENALTY, LEAST_PENALTY = 1e-3, 1e-6  # in mean weights: the first, and the last before none


SETTLED = 1e-3  # the share by which a step lowers the objective before the penalty is lowered


DAMPING = 1e-12  # the first, in losses of zero


class State(NamedTuple):
    """The last `left` that lowered the objective, the damping that has proved right, and the penalty."""

    left: Float[Array, "m k"]
    objective: Float[Array, ""]
    damping: Float[Array, ""]
    penalty: Float[Array, ""]


def init(problem: Problem, factors: Factors) -> tuple[Factors, State]:
    m, n = problem.target.shape
    rank = factors.left.shape[1]
    if min(m, n) * rank > UNKNOWNS:
        raise ValueError(
            f"method 'varpro' needs min(m, n) * rank <= {UNKNOWNS}, for its dense Hessian; got {min(m, n)} * {rank} = "
            f"{min(m, n) * rank}: use 'newton', which never forms it"
        )
    inner, around = shorter_first(problem, balance(factors))
    factors = no_worse(inner, eliminate(inner, around.left)[0], around)
    infinite, damping = (jnp.array(value, problem.target.dtype) for value in (jnp.inf, DAMPING))
    return restore_axes(factors, problem), State(factors.left, infinite, damping, PENALTY * jnp.mean(problem.weight))


def no_worse(problem: Problem, factors: Factors, given: Factors) -> Factors:
    """The factors, of the same span, with the columns of `right` that were given where those fit better.

    As they can where a column is seen in few rows, and what those tell apart is below what a pseudo-inverse keeps.
    """
    theirs = Factors(factors.left, factors.left.T @ given.left @ given.right)
    lost, other = (jnp.sum(problem.weight * residual(problem, each) ** 2, axis=0) for each in (factors, theirs))
    return factors._replace(right=jnp.where(lost <= other, factors.right, theirs.right))


def step(problem: Problem, factors: Factors, last: State) -> tuple[Factors, State]:
    """The damped step from the best point so far, on the Grassmannian.

    Algorithm 2 of Ruhe & Wedin 1980 with the damping of Levenberg and Marquardt, ten times less after a step that
    lowered the objective and ten times more after one that did not (Okatani et al. 2011; Hong & Fitzgibbon 2015, RW2).
    The longer axis is eliminated. Differs from the papers: the damping is in units of the loss of zero, and not below
    the rounding errors of the Hessian; a step that overflows counts as one that did not lower the objective; and at
    first a penalty on `right` keeps columns with few observations from fitting them with huge coefficients, a valley
    that most failures end in. It falls tenfold where the objective settles, and at last to none.

    Steps are judged by the objective, whose rounding errors are those of a stationarity of sqrt(eps).
    """
    inner, trial = shorter_first(problem, factors)
    now = objective(inner, trial, last.penalty)
    lower = now < last.objective
    settled = lower & (last.objective - now < SETTLED * now) & (last.penalty > 0)
    least = 2 * LEAST_PENALTY * jnp.mean(problem.weight)
    penalty = jnp.where(settled, jnp.where(last.penalty > least, last.penalty / 10, 0), last.penalty)
    around, inverses = eliminate(inner, jnp.where(lower, trial.left, last.left), penalty)
    best = jnp.where(lower, objective(inner, around, penalty), last.objective)

    curvature, gradient = hessian(inner, around, inverses), (weighted_residual(inner, around) @ around.right.T).ravel()
    unit = total(problem.weight * problem.target**2) / jnp.max(jnp.diagonal(curvature))
    damping = jnp.where(settled, DAMPING, jnp.where(lower, last.damping / 10, last.damping * 10))
    damping = jnp.clip(damping, jnp.finfo(now.dtype).eps / unit, 1e4)
    move = damped_solve(curvature, gradient, damping * unit).reshape(around.left.shape)
    ahead, _ = eliminate(inner, around.left + move, penalty)
    finite = jnp.all(jnp.isfinite(ahead.left)) & jnp.all(jnp.isfinite(ahead.right))
    return restore_axes(choose(finite, ahead, around), problem), State(around.left, best, damping, penalty)


def objective(problem: Problem, factors: Factors, penalty: Float[Array, ""]) -> Float[Array, ""]:
    """The weighted error plus the penalty times the squares of `right`."""
    return total(problem.weight * residual(problem, factors) ** 2) + penalty * total(factors.right**2)


def eliminate(
    problem: Problem, left: Float[Array, "m k"], penalty: Float[Array, ""] | float = 0.0
) -> tuple[Factors, Float[Array, "n k k"]]:
    """The span of `left` with an orthonormal basis, and for it the best `right`, of minimum norm if there are several.

    And for each column the pseudo-inverse of basis' diag(weight_j) basis + penalty.
    """
    basis, _ = orthonormal(left)
    m, k = left.shape
    pairs = (basis[:, :, None] * basis[:, None, :]).reshape(m, k * k)
    grams = (problem.weight.T @ pairs).reshape(-1, k, k) + penalty * jnp.eye(k, dtype=left.dtype)[None]
    inverses = jax.vmap(psd_inverse)(grams)
    sides = (problem.weight * problem.target).T @ basis
    return Factors(basis, jnp.einsum("jkl,jl->kj", inverses, sides)), inverses


def hessian(problem: Problem, factors: Factors, inverses: Float[Array, "n k k"]) -> Float[Array, "d d"]:
    """sum_j (D_j - D_j left inverse_j left' D_j) kron (right_j right_j'), D_j = diag(weight_j).

    Plus a multiple of (left left') kron I. Steps within the span of the orthonormal `left` change nothing and the
    gradient has none, so this only makes the Hessian regular there. Two products of 2 m^2 n k^2 operations.
    """
    left, right = factors
    (m, k), n = left.shape, right.shape[1]
    weight = problem.weight
    pairs = (right[:, None, :] * right[None, :, :]).reshape(k * k, n)
    lost = crossed(left, weight, inverses.reshape(n, k * k), pairs.T).reshape(m, m, k, k)
    within_rows = (weight @ pairs.T).reshape(m, k, k)
    eye = jnp.eye(m, dtype=left.dtype)
    within = (left @ left.T)[:, :, None, None] * jnp.eye(k, dtype=left.dtype)[None, None]
    full = eye[:, :, None, None] * within_rows[:, None] - lost + jnp.max(jnp.abs(within_rows)) * within
    return full.transpose(0, 2, 1, 3).reshape(m * k, m * k)


def crossed(
    left: Float[Array, "m k"], weight: Float[Array, "m n"], inverses: Float[Array, "n kk"], pairs: Float[Array, "n kk"]
) -> Float[Array, "mm kk"]:
    """sum_j (D_j left inverse_j left' D_j) kron (right_j right_j'), a few j at a time: each takes m^2 numbers."""
    (m, k), n = left.shape, weight.shape[1]
    squares = (left[:, None, :, None] * left[None, :, None, :]).reshape(m * m, k * k)
    size = max(1, min(n, NUMBERS // (m * m)))

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        columns, inverse, pair = part
        spread = (squares @ inverse.T).reshape(m, m, -1) * columns.T[:, None] * columns.T[None]
        return total + spread.reshape(m * m, -1) @ pair, None

    parts, zeros = (weight.T, inverses, pairs), jnp.zeros((m * m, k * k), left.dtype)
    if size == n:
        return add(zeros, parts)[0]
    count = -(-n // size)
    columns, inverse, pair = (jnp.pad(part, ((0, count * size - n), (0, 0))).reshape(count, size, -1) for part in parts)
    return jax.lax.scan(add, zeros, (columns, inverse, pair))[0]


varpro_stage = Stage(init, step)
