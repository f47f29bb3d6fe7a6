"""Newton's method on the left factor alone, the right one being the best for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wlra.linalg.batch import over_grams
from wlra.linalg.decompose import balance, orthonormal
from wlra.linalg.gram import eliminated
from wlra.methods.method import Method, choose
from wlra.methods.sweeps import best_right
from wlra.problem import Factors, Problem, gradient, loss, total

STEPS = 250  # of conjugate gradients an iteration, at most


class Accepted(NamedTuple):
    """The last point that lowered the loss, and the step that was tried from it."""

    factors: Factors
    loss: Float[Array, ""]
    radius: Float[Array, ""]
    promised: Float[Array, ""]
    bounded: Bool[Array, ""]


class Model(NamedTuple):
    """Half the objective, to second order around a point whose `right` is the best for its orthonormal `left`."""

    problem: Problem
    factors: Factors
    gradient: Float[Array, "m n"]
    columns: Float[Array, "n k k"]
    rows: Float[Array, "m k k"]


class Search(NamedTuple):
    """Conjugate gradients: step, residual, direction, and the products that keep the step within the radius."""

    step: Float[Array, "m k"]
    residual: Float[Array, "m k"]
    direction: Float[Array, "m k"]
    slope: Float[Array, ""]
    lengths: Float[Array, " 3"]
    gain: Float[Array, ""]
    count: Float[Array, ""]
    bounded: Bool[Array, ""]


def init(problem: Problem, factors: Factors) -> tuple[Factors, Accepted]:
    infinite, zero = jnp.array(jnp.inf, factors.left.dtype), jnp.zeros((), factors.left.dtype)
    factors = turned(at_best(*turn(problem, balance(factors))), problem)
    return factors, Accepted(factors, infinite, infinite, zero, jnp.array(False))


def step(problem: Problem, factors: Factors, last: Accepted) -> tuple[Factors, Accepted]:
    """The minimum, within a radius, of the model around the best point so far, along a geodesic's first order.

    Variable projection (Golub & Pereyra 1973) with the exact Hessian of what is left, a function on the Grassmannian;
    the trust region is that of Steihaug 1983, its norm and preconditioner the Gram matrices of alternating least
    squares. The longer axis is eliminated. An iteration costs one product of 2mnk^2 operations for each side, and six
    of 2mnk for each step of conjugate gradients.
    """
    now = loss(problem, factors)
    ratio = (last.loss - now) / jnp.where(last.promised > 0, last.promised, 1)
    first = jnp.isinf(last.loss)
    accepted = jnp.isfinite(now) & ((ratio > 1e-3) | first)
    growth = jnp.where(ratio > 0.75, jnp.where(last.bounded, 3, 1), jnp.where(ratio > 0.25, 1, 0.25)).astype(now.dtype)
    point, best = choose(accepted, (factors, now), (last.factors, last.loss))
    inner, around = turn(problem, point)
    found, radius = minimise(model(inner, around), jnp.where(first, jnp.inf, growth * last.radius))
    trial = turned(at_best(inner, Factors(around.left + found.step, around.right)), problem)
    zero = total(problem.weight * problem.target**2)
    return trial, Accepted(point, best, radius, 2 * found.gain / jnp.where(zero > 0, zero, 1), found.bounded)


def turn(problem: Problem, factors: Factors) -> tuple[Problem, Factors]:
    """The problem and factors with the shorter axis first."""
    m, n = problem.target.shape
    if m <= n:
        return problem, factors
    turned = problem._replace(target=problem.target.T, weight=problem.weight.T)
    return turned, Factors(factors.right.T, factors.left.T)


def turned(factors: Factors, problem: Problem) -> Factors:
    """Factors with the shorter axis first, as the problem has its axes."""
    m, n = problem.target.shape
    return factors if m <= n else Factors(factors.right.T, factors.left.T)


def at_best(problem: Problem, factors: Factors) -> Factors:
    """The same span with an orthonormal `left`, and the best `right` for it."""
    basis, mix = orthonormal(factors.left)
    factors = Factors(basis, mix @ factors.right)
    return factors._replace(right=best_right(problem, factors))


def model(problem: Problem, factors: Factors) -> Model:
    left, right = factors
    columns = over_grams(eliminated, problem.weight.T, left.T)
    return Model(problem, factors, gradient(problem, factors), columns, over_grams(eliminated, problem.weight, right))


def horizontal(model: Model, step: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The part of a step that changes the span of `left`."""
    left = model.factors.left
    return step - left @ (left.T @ step)


def curvature(model: Model, step: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The Hessian times the step: how the slope turns as `left` moves and `right` stays the best for it."""
    left, right = model.factors
    weight, gradient = model.problem.weight, model.gradient
    moved = step @ right
    pull = step.T @ gradient - left.T @ (weight * moved)
    follow = jnp.einsum("jkl,lj->kj", model.columns, pull)
    return horizontal(model, (weight * (moved + left @ follow)) @ right.T - gradient @ follow.T)


def precondition(model: Model, residual: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The step of alternating least squares for the residual."""
    return horizontal(model, jnp.einsum("ikl,il->ik", model.rows, residual))


def minimise(model: Model, radius: Float[Array, ""]) -> tuple[Search, Float[Array, ""]]:
    """The step that conjugate gradients find before they leave the radius or meet negative curvature; and the radius.

    An infinite radius becomes four times the length of a step of alternating least squares.
    """
    residual = horizontal(model, -model.gradient @ model.factors.right.T)
    ahead = precondition(model, residual)
    slope = total(residual * ahead)
    error = total(model.problem.weight * (model.problem.target - model.factors.left @ model.factors.right) ** 2)
    forcing = jnp.minimum(0.01, slope / jnp.where(error > 0, error, 1))
    radius = jnp.where(jnp.isinf(radius), 4 * jnp.sqrt(slope), radius)

    def body(search: Search) -> Search:
        bent = curvature(model, search.direction)
        along = total(search.direction * bent)
        (zz, zd, dd), room = search.lengths, radius**2
        length = search.slope / jnp.where(along > 0, along, 1)
        outside = (along <= 0) | (zz + 2 * length * zd + length**2 * dd >= room)
        edge = (jnp.sqrt(zd**2 + dd * jnp.maximum(room - zz, 0)) - zd) / jnp.where(dd > 0, dd, 1)
        length = jnp.where(outside, edge, length)
        residual = search.residual + length * bent
        ahead = precondition(model, residual)
        slope = total(residual * ahead)
        beta = slope / search.slope
        lengths = jnp.stack([zz + 2 * length * zd + length**2 * dd, beta * (zd + length * dd), slope + beta**2 * dd])
        return Search(
            search.step + length * search.direction,
            residual,
            beta * search.direction - ahead,
            slope,
            lengths,
            search.gain + length * search.slope - length**2 * along / 2,
            search.count + 1,
            outside,
        )

    def going(search: Search) -> Bool[Array, ""]:
        return ~search.bounded & (search.slope > forcing * slope) & (search.count < STEPS)

    zero = jnp.zeros_like(slope)
    start = Search(
        jnp.zeros_like(residual), residual, -ahead, slope, jnp.stack([zero, zero, slope]), zero,
        jnp.array(0, jnp.int32), jnp.array(False),
    )  # fmt: skip
    return jax.lax.while_loop(going, body, start), radius


newton = Method(init, step)
