"""Newton's method on the left factor alone, the right one being the best for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wlra.linalg.batch import over_grams
from wlra.linalg.decompose import balance, orthonormal
from wlra.linalg.gram import eliminated
from wlra.methods.method import Stage, choose
from wlra.methods.sweeps import best_right
from wlra.problem import Factors, Problem, loss, total, weighted_residual

STEPS = 250  # of conjugate gradients an iteration, at most


class State(NamedTuple):
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
    weighted_residual: Float[Array, "m n"]
    columns: Float[Array, "n k k"]
    rows: Float[Array, "m k k"]


class Search(NamedTuple):
    """Conjugate gradients: step, residual, direction, and the products that keep the step within the radius."""

    step: Float[Array, "m k"]
    residual: Float[Array, "m k"]
    direction: Float[Array, "m k"]
    decrease: Float[Array, ""]
    lengths: Float[Array, " 3"]
    gain: Float[Array, ""]
    count: Float[Array, ""]
    bounded: Bool[Array, ""]


def init(problem: Problem, factors: Factors) -> tuple[Factors, State]:
    infinite, zero = jnp.array(jnp.inf, factors.left.dtype), jnp.zeros((), factors.left.dtype)
    factors = restore_axes(at_best(*shorter_first(problem, balance(factors))), problem)
    return factors, State(factors, infinite, infinite, promised=zero, bounded=jnp.array(False))


def step(problem: Problem, factors: Factors, last: State) -> tuple[Factors, State]:
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
    inner, around = shorter_first(problem, point)
    found, radius = minimise(model(inner, around), jnp.where(first, jnp.inf, growth * last.radius))
    ahead = at_best(inner, Factors(around.left + found.step, around.right))
    # A step that overflows is one that did not lower the objective: the radius was too large.
    trial = restore_axes(choose(jnp.isfinite(loss(inner, ahead)), ahead, around), problem)
    zero = total(problem.weight * problem.target**2)
    promised = 2 * found.gain / jnp.where(zero > 0, zero, 1)
    return trial, State(point, best, radius, promised=promised, bounded=found.bounded)


def shorter_first(problem: Problem, factors: Factors) -> tuple[Problem, Factors]:
    """The problem and factors with the shorter axis first."""
    m, n = problem.target.shape
    if m <= n:
        return problem, factors
    transposed = problem._replace(target=problem.target.T, weight=problem.weight.T)
    return transposed, Factors(factors.right.T, factors.left.T)


def restore_axes(factors: Factors, problem: Problem) -> Factors:
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
    return Model(
        problem=problem,
        factors=factors,
        weighted_residual=weighted_residual(problem, factors),
        columns=over_grams(eliminated, problem.weight.T, left.T),
        rows=over_grams(eliminated, problem.weight, right),
    )


def horizontal(model: Model, step: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The part of a step that changes the span of `left`."""
    left = model.factors.left
    return step - left @ (left.T @ step)


def curvature(model: Model, step: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The Hessian times the step: how the gradient changes as `left` moves and `right` stays the best for it."""
    left, right = model.factors
    weight, weighted_residual = model.problem.weight, model.weighted_residual
    moved = step @ right
    pull = step.T @ weighted_residual - left.T @ (weight * moved)
    follow = jnp.einsum("jkl,lj->kj", model.columns, pull)
    return horizontal(model, (weight * (moved + left @ follow)) @ right.T - weighted_residual @ follow.T)


def precondition(model: Model, residual: Float[Array, "m k"]) -> Float[Array, "m k"]:
    """The step of alternating least squares for the residual."""
    return horizontal(model, jnp.einsum("ikl,il->ik", model.rows, residual))


def minimise(model: Model, radius: Float[Array, ""]) -> tuple[Search, Float[Array, ""]]:
    """The step that conjugate gradients find before they leave the radius or meet negative curvature; and the radius.

    An infinite radius becomes four times the length of a step of alternating least squares.
    """
    residual = horizontal(model, -model.weighted_residual @ model.factors.right.T)
    ahead = precondition(model, residual)
    decrease = total(residual * ahead)
    error = total(model.problem.weight * (model.problem.target - model.factors.left @ model.factors.right) ** 2)
    forcing = jnp.minimum(0.01, decrease / jnp.where(error > 0, error, 1))
    radius = jnp.where(jnp.isinf(radius), 4 * jnp.sqrt(decrease), radius)

    def going(search: Search) -> Bool[Array, ""]:
        return ~search.bounded & (search.decrease > forcing * decrease) & (search.count < STEPS)

    zero = jnp.zeros_like(decrease)
    start = Search(
        step=jnp.zeros_like(residual),
        residual=residual,
        direction=-ahead,
        decrease=decrease,
        lengths=jnp.stack([zero, zero, decrease]),
        gain=zero,
        count=jnp.array(0, jnp.int32),
        bounded=jnp.array(False),
    )
    return jax.lax.while_loop(going, lambda search: searched(model, search, radius), start), radius


def searched(model: Model, search: Search, radius: Float[Array, ""]) -> Search:
    """One step of conjugate gradients, cut where it would leave the radius (Steihaug 1983)."""
    bent = curvature(model, search.direction)
    along = total(search.direction * bent)
    (zz, zd, dd), room = search.lengths, radius**2
    length = search.decrease / jnp.where(along > 0, along, 1)
    outside = (along <= 0) | (zz + 2 * length * zd + length**2 * dd >= room)
    edge = (jnp.sqrt(zd**2 + dd * jnp.maximum(room - zz, 0)) - zd) / jnp.where(dd > 0, dd, 1)
    length = jnp.where(outside, edge, length)
    residual = search.residual + length * bent
    ahead = precondition(model, residual)
    decrease = total(residual * ahead)
    beta = decrease / search.decrease
    return Search(
        step=search.step + length * search.direction,
        residual=residual,
        direction=beta * search.direction - ahead,
        decrease=decrease,
        lengths=jnp.stack([zz + 2 * length * zd + length**2 * dd, beta * (zd + length * dd), decrease + beta**2 * dd]),
        gain=search.gain + length * search.decrease - length**2 * along / 2,
        count=search.count + 1,
        bounded=outside,
    )


newton_stage = Stage(init, step)
