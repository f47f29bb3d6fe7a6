"""What a solver method is: functions that the driver runs, conditions between them, and what they can do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra.problem import Factors, Problem
from wlra.result import History
from wlra.scaling import Scaling
from wlra.sparse import Matrix


class State(NamedTuple):
    """Where the driver is: this iterate, the best one, and the course so far."""

    factors: Factors
    aux: Any
    best: Factors
    loss: Float[Array, ""]
    iteration: Int[Array, ""]
    entered: Int[Array, ""]
    idle: Int[Array, ""]
    status: Int[Array, ""]
    history: History
    tol: Float[Array, ""]
    looked: Bool[Array, ""]


Condition = Callable[[Problem, State], Bool[Array, ""]]


def never(problem: Problem, state: State) -> Bool[Array, ""]:
    """The condition of a last stage."""
    return jnp.array(False)


def after(iterations: int) -> Condition:
    """The condition that a solve has had so many iterations."""
    return lambda problem, state: state.iteration >= iterations


def crawling(pause: int) -> Condition:
    """The condition that in the last `pause` iterations of a stage the stationarity has not halved."""

    def until(problem: Problem, state: State) -> Bool[Array, ""]:
        stationarity = state.history.stationarity
        age = state.iteration - jnp.arange(len(stationarity), dtype=jnp.int32)
        recent = jnp.min(jnp.where((age >= 0) & (age < pause), stationarity, jnp.inf))
        entered = (age >= pause) & (age <= state.iteration - state.entered)
        before = jnp.min(jnp.where(entered, stationarity, jnp.inf))
        return recent > before / 2

    return until


class Stage(NamedTuple):
    """What the driver's loop runs: two pure functions of arrays, and the condition on which the next stage takes over.

    init: (problem, factors) -> (factors, aux)
    step: (problem, factors, aux) -> (factors, aux); `aux` is any pytree whose shapes do not change.
    until: (problem, state) -> whether the stage ends, asked of every evaluated `State`; by default it never does.

    The loop evaluates `loss(problem, factors)` and `stationarity(problem, factors)` next to each step: a step that
    needs them, or the products in them, writes the same expression and gets it for free.

    Example:
      >>> import wlra
      >>> from wlra.problem import gradient_left
      >>> def step(problem, factors, aux):  # steepest descent on `left` alone
      ...     return factors._replace(left=factors.left + 0.1 * gradient_left(problem, factors)), aux
      >>> stage = wlra.Stage(init=lambda problem, factors: (factors, ()), step=step)
    """

    init: Callable[[Problem, Factors], tuple[Factors, Any]]
    step: Callable[[Problem, Factors, Any], tuple[Factors, Any]]
    until: Condition = never


class Evaluated(NamedTuple):
    """Factors, their relative loss and stationarity, and whether that loss is known to be about the lowest of all."""

    factors: Factors
    loss: Float[Array, ""]
    stationarity: Float[Array, ""]
    lowest: Bool[Array, ""] | bool = False


class Method(NamedTuple):
    """An algorithm of `wlra.solve`, and what it can do.

    It has either stages, which the driver runs one after the other, each from the best factors of the one before; or a
    closed form. Programs are compiled for the value of a method, not for its name.

    stages: for an iteration, in variables in which the weights are nearly equal (see `wlra.scaling`).
    svd_stages: those of projection="svd", if there are any.
    closed_form: (problem, rank, ranks) -> `Evaluated`, in the problem's own variables, `rank` static; `ranks` is None,
      or a traced rank beyond which factors are zero.
    on_host: the same in NumPy, of target, weights and rank, for what is known on a CPU in float32; see
      `wlra.methods.host`.
    equalise: weight -> the `Scaling` that a closed form takes for the weights, if iterations can start from it.
    sees_hidden: whether a closed form looks at what the target holds where the weight is 0.
    kronecker: whether the weights are `wlra.Kronecker`.
    penalty, sparse: whether it takes `ridge` and `nuclear`, and sparse targets.
    keeps_zeros: whether components that are zero stay zero, so that problems of several ranks can share a batch.

    Example:
      >>> import numpy as np, wlra
      >>> from wlra.methods.sweeps import als
      >>> plain = wlra.Stage(lambda problem, factors: (factors, ()), lambda problem, factors, aux: (als(problem, factors), aux))
      >>> mine = wlra.Method("plain als", stages=(plain,))
      >>> result = wlra.solve(np.outer([1, 2, 3], [1, 2]), [[1, 0], [1, 1], [1, 1]], rank=1, method=mine)
      >>> bool(result.loss < 1e-6)
      True
    """  # noqa: E501

    name: str
    stages: tuple[Stage, ...] = ()
    svd_stages: tuple[Stage, ...] = ()
    closed_form: Callable[[Problem, int, Any], Evaluated] | None = None
    on_host: Callable[[Any, Any, int], Any] | None = None
    equalise: Callable[[Matrix], Scaling] | None = None
    sees_hidden: bool = False
    kronecker: bool = False
    penalty: bool = False
    sparse: bool = False
    keeps_zeros: bool = False


def choose(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """The first tree where the condition holds, else the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
