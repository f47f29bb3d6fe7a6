"""Limited-memory BFGS on both factors at once."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from wlra.linalg.decompose import balance
from wlra.linalg.gram import gram_inverse
from wlra.methods.accelerate import not_above
from wlra.methods.method import Stage, choose
from wlra.problem import Factors, Problem, gradient_left, gradient_right, loss

PAIRS = 8


class Pairs(NamedTuple):
    """The last changes of point and of gradient, in rows that are reused in turn, and all products of the two."""

    moves: Float[Array, "pairs d"]
    bends: Float[Array, "pairs d"]
    products: Float[Array, "pairs pairs"]
    count: Int[Array, ""]


class State(NamedTuple):
    """The last point that lowered the loss, and the way ahead of it."""

    point: Float[Array, " d"]
    gradient: Float[Array, " d"]
    loss: Float[Array, ""]
    direction: Float[Array, " d"]
    length: Float[Array, ""]
    pairs: Pairs


def init(problem: Problem, factors: Factors) -> tuple[Factors, State]:
    factors = balance(factors)
    flat, _ = ravel_pytree(factors)
    empty, products = jnp.zeros((PAIRS, flat.size), flat.dtype), jnp.zeros((PAIRS, PAIRS), flat.dtype)
    infinite, zero = jnp.array(jnp.inf, flat.dtype), jnp.zeros_like(flat)
    pairs = Pairs(empty, empty, products, jnp.array(0, jnp.int32))
    return factors, State(flat, zero, infinite, direction=zero, length=infinite, pairs=pairs)


def step(problem: Problem, factors: Factors, last: State) -> tuple[Factors, State]:
    """The next point to evaluate: a full quasi-Newton step from one that lowered the loss, else a shorter last one.

    Liu & Nocedal 1989, on minus half the derivative of the objective. Differs from the paper: the Hessian that the
    pairs update is that of equal weights with one factor fixed, whose inverse is two k x k matrices; any lower loss
    will do, so that most steps are evaluated once; a pair without positive curvature is not kept.
    """
    point, unravel = ravel_pytree(factors)
    now = loss(problem, factors)
    gradient, _ = ravel_pytree(Factors(gradient_left(problem, factors), gradient_right(problem, factors)))
    accepted = not_above(now, last.loss)
    pairs = learn(last.pairs, point - last.point, last.gradient - gradient, accepted & jnp.isfinite(last.loss))
    direction = quasi_newton(pairs, gradient, factors, problem.penalty)
    length = jnp.where(pairs.count > 0, 1.0, 0.5).astype(now.dtype)  # alone, both factors' steps add up to two
    fresh = State(point, gradient, now, direction=direction, length=length, pairs=pairs)
    retry = last._replace(length=last.length / 4, pairs=pairs)
    state = choose(accepted, fresh, retry)._replace(pairs=pairs)
    return unravel(state.point + state.length * state.direction), state


def learn(pairs: Pairs, move: Float[Array, " d"], bend: Float[Array, " d"], usable: Bool[Array, ""]) -> Pairs:
    """The pairs with this one in place of the oldest, if it is usable and has positive curvature."""
    curvature, slot = move @ bend, pairs.count % PAIRS
    keep = usable & (curvature > jnp.finfo(move.dtype).eps * jnp.linalg.norm(move) * jnp.linalg.norm(bend))
    moves = pairs.moves.at[slot].set(jnp.where(keep, move, pairs.moves[slot]))
    bends = pairs.bends.at[slot].set(jnp.where(keep, bend, pairs.bends[slot]))
    products = pairs.products.at[slot, :].set(bends @ moves[slot]).at[:, slot].set(moves @ bends[slot])
    return Pairs(moves, bends, products, pairs.count + keep.astype(jnp.int32))


def quasi_newton(
    pairs: Pairs, gradient: Float[Array, " d"], factors: Factors, penalty: Float[Array, ""] | float
) -> Float[Array, " d"]:
    """The gradient times the inverse Hessian.

    The two loops of Nocedal 1980: in order of age they are triangular systems in the products of the pairs, so that
    every row of the buffers is read in one pass each.
    """
    place = jnp.arange(PAIRS, dtype=jnp.int32)
    order, known = (pairs.count - 1 - place) % PAIRS, place < pairs.count  # newest first
    both = known[:, None] & known[None, :]
    lower = jnp.tril(jnp.where(both, pairs.products[order][:, order], jnp.eye(PAIRS, dtype=gradient.dtype)))
    first = substitute(lower, jnp.where(known, (pairs.moves @ gradient)[order], 0))
    direction = precondition(factors, gradient - jnp.zeros_like(first).at[order].set(first) @ pairs.bends, penalty)
    rest = jnp.diagonal(lower) * first - jnp.where(known, (pairs.bends @ direction)[order], 0)
    second = substitute(lower[::-1, ::-1].T, rest[::-1])[::-1]
    return direction + jnp.zeros_like(second).at[order].set(second) @ pairs.moves


def precondition(
    factors: Factors, gradient: Float[Array, " d"], penalty: Float[Array, ""] | float
) -> Float[Array, " d"]:
    """The least-squares step of each factor for equal weights, the other fixed."""
    _, unravel = ravel_pytree(factors)
    left, right = unravel(gradient)
    step = Factors(
        left @ gram_inverse(factors.right @ factors.right.T, penalty),
        gram_inverse(factors.left.T @ factors.left, penalty) @ right,
    )
    return ravel_pytree(step)[0]


def substitute(lower: Float[Array, "k k"], right_side: Float[Array, " k"]) -> Float[Array, " k"]:
    """The solution of a tiny lower triangular system, without a call to LAPACK."""
    solution = right_side
    for i in range(len(lower)):
        known = jnp.arange(len(lower)) < i
        value = (right_side[i] - jnp.where(known, lower[i], 0) @ solution) / lower[i, i]
        solution = solution.at[i].set(value)
    return solution


quasi_newton_stage = Stage(init, step)
