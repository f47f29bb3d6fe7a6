"""Extrapolations of a fixed-point iteration, and the guard that makes a method of a sweep and one of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from wlra.driver import Method, choose
from wlra.linalg import Factors, balance, gram_solve
from wlra.problem import Problem, loss
from wlra.sweeps import Sweep


class Extrapolation(NamedTuple):
    """Where to evaluate a map x -> g(x) next, in search of its fixed point; x is any pytree of arrays.

    init: (x) -> memory
    step: (memory, x, g(x)) -> (next x, memory)
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


plain = Extrapolation(lambda point: (), lambda memory, point, image: (image, memory))


class Momentum(NamedTuple):
    previous: Any
    count: Int[Array, ""]


def nesterov_step(memory: Momentum, point: Any, image: Any) -> tuple[Any, Momentum]:
    """The next point is g + (t - 1) / (t + 2) (g - previous g) (Nesterov 1983; Tuzhilina & Hastie 2021, sec. 3.1)."""
    del point
    now, unravel = ravel_pytree(image)
    before, _ = ravel_pytree(memory.previous)
    count = memory.count + 1
    weight = (count - 1).astype(now.dtype) / (count + 2).astype(now.dtype)
    return unravel(now + weight * (now - before)), Momentum(image, count)


nesterov = Extrapolation(lambda point: Momentum(point, jnp.array(0, jnp.int32)), nesterov_step)


class Window(NamedTuple):
    """The last few images and residuals g(x) - x; a slot that is not valid counts for nothing."""

    images: Float[Array, "slots d"]
    residuals: Float[Array, "slots d"]
    valid: Bool[Array, " slots"]
    oldest: Int[Array, ""]


SLOTS = 5  # more gain little on Fisher weights, and each costs 2 k (m + n) numbers


def anderson_init(point: Any) -> Window:
    flat, _ = ravel_pytree(point)
    empty = jnp.zeros((SLOTS, flat.size), flat.dtype)
    return Window(empty, empty, jnp.zeros(SLOTS, bool), jnp.array(0, jnp.int32))


def anderson_step(memory: Window, point: Any, image: Any) -> tuple[Any, Window]:
    """The next point is the combination sum_i a_i g(x_i), sum_i a_i = 1, whose residuals combine to the shortest.

    Type II of Anderson 1965 (Walker & Ni 2011, eq. 2.1; Tuzhilina & Hastie 2021, sec. 3.2), over this pair and the last
    SLOTS before it. Solved for the coefficients of the differences from this pair, with the relative shift of
    `gram_solve`.
    """
    flat, unravel = ravel_pytree(image)
    residual = flat - ravel_pytree(point)[0]
    changes = jnp.where(memory.valid[:, None], residual[None, :] - memory.residuals, 0)
    gram, slopes = changes @ changes.T, changes @ residual
    coefficients = gram_solve(gram, slopes)
    moves = jnp.where(memory.valid[:, None], flat[None, :] - memory.images, 0)
    slot = memory.oldest
    memory = Window(
        memory.images.at[slot].set(flat),
        memory.residuals.at[slot].set(residual),
        memory.valid.at[slot].set(True),
        (slot + 1) % SLOTS,
    )
    return unravel(flat - coefficients @ moves), memory


anderson = Extrapolation(anderson_init, anderson_step)


class Guard(NamedTuple):
    """What to fall back on: the plain image of the last point that was accepted, and that point's loss."""

    memory: Any
    safe: Factors
    loss: Float[Array, ""]


def accelerated(sweep: Sweep, extrapolation: Extrapolation) -> Method:
    """The method that extrapolates the factors themselves and never goes on from a loss above the last accepted one.

    A point with a higher loss is given up for the plain image of the last accepted point, which the sweep guarantees
    to be no worse than that, and the memory starts afresh. The sweep does not depend on the gauge of the factors, so
    successive factors can be combined; extrapolating k (m + n) numbers costs far less than the m n of their product.
    """

    def init(problem: Problem, factors: Factors) -> tuple[Factors, Guard]:
        factors = balance(factors)
        return factors, Guard(extrapolation.init(factors), factors, jnp.array(jnp.inf, factors.left.dtype))

    def step(problem: Problem, factors: Factors, guard: Guard) -> tuple[Factors, Guard]:
        now = loss(problem, factors)
        image = sweep(problem, factors)
        ahead, memory = extrapolation.step(guard.memory, factors, image)
        back = guard._replace(memory=extrapolation.init(guard.safe))
        return choose(not_above(now, guard.loss), (ahead, Guard(memory, image, now)), (guard.safe, back))

    return Method(init, step)


def not_above(loss: Float[Array, ""], bound: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the loss is at most the bound, but for rounding; false for NaN."""
    return loss <= bound * (1 + 8 * jnp.finfo(loss.dtype).eps)
