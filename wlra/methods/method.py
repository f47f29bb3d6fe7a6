"""What a solver method is: functions that the driver runs, and the conditions between its stages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra.problem import Factors, Problem
from wlra.result import History


class Method(NamedTuple):
    """What a loop runs: two pure functions of arrays. `aux` is any pytree whose shapes do not change.

    init: (problem, factors) -> (factors, aux)
    step: (problem, factors, aux) -> (factors, aux)

    The loop evaluates `loss(problem, factors)` and `stationarity(problem, factors)` next to each step: a step that
    needs them, or the products in them, writes the same expression and gets it for free.
    """

    init: Callable[[Problem, Factors], tuple[Factors, Any]]
    step: Callable[[Problem, Factors, Any], tuple[Factors, Any]]


class State(NamedTuple):
    factors: Factors
    aux: Any
    best: Factors
    loss: Float[Array, ""]
    iteration: Int[Array, ""]
    entered: Int[Array, ""]
    idle: Int[Array, ""]
    status: Int[Array, ""]
    history: History


def never(problem: Problem, state: State) -> Bool[Array, ""]:
    """The condition of a last stage."""
    return jnp.array(False)


def after(iterations: int) -> Callable[[Problem, State], Bool[Array, ""]]:
    """The condition that a solve has had so many iterations."""
    return lambda problem, state: state.iteration >= iterations


def crawling(pause: int) -> Callable[[Problem, State], Bool[Array, ""]]:
    """The condition that in the last `pause` iterations of a stage the stationarity has not halved."""

    def until(problem: Problem, state: State) -> Bool[Array, ""]:
        slope = state.history.stationarity
        age = state.iteration - jnp.arange(len(slope), dtype=jnp.int32)
        recent = jnp.min(jnp.where((age >= 0) & (age < pause), slope, jnp.inf))
        before = jnp.min(jnp.where((age >= pause) & (age <= state.iteration - state.entered), slope, jnp.inf))
        return recent > before / 2

    return until


class Stage(NamedTuple):
    """A method, and the condition on an evaluated state at which the next stage takes over."""

    method: Method
    until: Callable[[Problem, State], Bool[Array, ""]] = never


def choose(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """The first tree where the condition holds, else the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
