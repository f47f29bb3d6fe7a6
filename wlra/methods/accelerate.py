"""Extrapolations of a fixed-point iteration, and the guard that makes a stage of a sweep and one of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from wlra.linalg.gram import tiny_solve
from wlra.methods.method import Stage, choose
from wlra.methods.sweeps import Sweep
from wlra.problem import Factors, Problem, loss


class Extrapolation(NamedTuple):
    """Where to evaluate a map x -> g(x) next, in search of its fixed point; x is any pytree of arrays.

    init: (x) -> memory
    step: (memory, x, g(x)) -> (next x, memory)
    keep: (memory, condition) -> the memory, as good as new unless the condition holds
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    keep: Callable[[Any, Bool[Array, ""]], Any]


plain = Extrapolation(lambda point: (), lambda memory, point, image: (image, memory), lambda memory, condition: memory)


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


nesterov = Extrapolation(
    lambda point: Momentum(point, jnp.array(0, jnp.int32)),
    nesterov_step,
    lambda memory, condition: memory._replace(count=jnp.where(condition, memory.count, 0)),
)


class Window(NamedTuple):
    """The last image and residual g(x) - x, and how both changed in the last few steps."""

    image: Float[Array, " d"]
    residual: Float[Array, " d"]
    image_changes: Float[Array, "slots d"]
    residual_changes: Float[Array, "slots d"]
    gram: Float[Array, "slots slots"]
    count: Int[Array, ""]


SLOTS = 5  # more gain little on Fisher weights, and each costs 2 k (m + n) numbers


def anderson_init(point: Any) -> Window:
    flat, _ = ravel_pytree(point)
    empty = jnp.zeros((SLOTS, flat.size), flat.dtype)
    return Window(
        image=flat,
        residual=flat,
        image_changes=empty,
        residual_changes=empty,
        gram=jnp.zeros((SLOTS, SLOTS), flat.dtype),
        count=jnp.array(0, jnp.int32),
    )


def anderson_step(memory: Window, point: Any, image: Any) -> tuple[Any, Window]:
    """The next point is the combination sum_i a_i g(x_i), sum_i a_i = 1, whose residuals combine to the shortest.

    Type II of Anderson 1965 (Walker & Ni 2011, eq. 2.2; Tuzhilina & Hastie 2021, sec. 3.2), over this pair and the last
    SLOTS before it. Solved for the coefficients of the changes from step to step, with the relative shift of
    `tiny_solve`; one pass over each of the two windows.
    """
    now, unravel = ravel_pytree(image)
    residual = now - ravel_pytree(point)[0]
    change, slot = residual - memory.residual, (memory.count - 1) % SLOTS
    image_changes = memory.image_changes.at[slot].set(now - memory.image)
    residual_changes = memory.residual_changes.at[slot].set(change)
    products, overlaps = residual_changes @ change, residual_changes @ residual
    gram = memory.gram.at[slot, :].set(products).at[:, slot].set(products)
    known = jnp.arange(SLOTS, dtype=jnp.int32) < memory.count
    seen = jnp.where(known[:, None] & known[None, :], gram, 0)
    coefficients = tiny_solve(seen, jnp.where(known, overlaps, 0))
    ahead = unravel(now - coefficients @ image_changes)
    window = Window(
        image=now,
        residual=residual,
        image_changes=image_changes,
        residual_changes=residual_changes,
        gram=gram,
        count=memory.count + 1,
    )
    return ahead, window


anderson = Extrapolation(
    anderson_init,
    anderson_step,
    lambda memory, condition: memory._replace(count=jnp.where(condition, memory.count, 0)),
)


class State(NamedTuple):
    """What to fall back on: the plain image of the last point that was accepted, and that point's loss."""

    memory: Any
    safe: Factors
    loss: Float[Array, ""]


def accelerated(sweep: Sweep, extrapolation: Extrapolation, waits: bool = False) -> Stage:
    """The stage that extrapolates the factors themselves and never goes on from a loss above the last accepted one.

    A point with a higher loss is given up for the plain image of the last accepted point, which the sweep guarantees
    to be no worse than that, and the memory starts afresh. The sweep does not depend on the gauge of the factors, so
    successive factors can be combined; extrapolating k (m + n) numbers costs far less than the m n of their product. A
    sweep with loops of its own waits for the evaluation, and gives up the products that the two share.
    """

    def init(problem: Problem, factors: Factors) -> tuple[Factors, State]:
        return factors, State(extrapolation.init(factors), factors, jnp.array(jnp.inf, factors.left.dtype))

    def step(problem: Problem, factors: Factors, state: State) -> tuple[Factors, State]:
        now = loss(problem, factors)
        accepted = not_above(now, state.loss)
        point = choose(accepted, factors, state.safe)
        image = choose(accepted, sweep(problem, point if waits else factors), state.safe)
        ahead, memory = extrapolation.step(state.memory, point, image)
        memory = extrapolation.keep(memory, accepted)
        return choose(accepted, ahead, image), State(memory, image, jnp.where(accepted, now, state.loss))

    return Stage(init, step)


def not_above(loss: Float[Array, ""], bound: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the loss is at most the bound, but for rounding; false for NaN."""
    return loss <= bound * (1 + 8 * jnp.finfo(loss.dtype).eps)
