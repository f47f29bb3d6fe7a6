"""The one loop: it evaluates, stops, remembers the best, and names the outcome."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra.linalg import Factors
from wlra.problem import Problem, loss, stationarity


class Method(NamedTuple):
    """What the loop runs: two pure functions of arrays. `aux` is any pytree whose shapes do not change.

    init: (problem, factors) -> (factors, aux)
    step: (problem, factors, aux) -> (factors, aux)

    The loop evaluates `loss(problem, factors)` and `stationarity(problem, factors)` next to each step: a step that
    needs them, or the products in them, writes the same expression and gets it for free.
    """

    init: Callable[[Problem, Factors], tuple[Factors, Any]]
    step: Callable[[Problem, Factors, Any], tuple[Factors, Any]]


class Status(enum.IntEnum):
    """How a solve ended; `advice` says what to do about it."""

    CONVERGED = 0
    CLOSED_FORM = 1
    MAX_ITERS = 2
    STALLED = 3
    NONFINITE = 4
    INVALID_TARGET = 5
    INVALID_WEIGHTS = 6

    @property
    def advice(self) -> str:
        return ADVICE[self]


ADVICE = {
    Status.CONVERGED: "The stationarity fell to `tol`: nothing to do.",
    Status.CLOSED_FORM: "A closed form is exact for its own kind of weights only: for others, use an iterative method.",
    Status.MAX_ITERS: "Still improving: raise `max_iters`, or go on with start=(result.left, result.right).",
    Status.STALLED: "No lower loss in `patience` iterations: raise `tol` or `patience`, or solve in float64.",
    Status.NONFINITE: "An iterate overflowed and the best one before it was kept: solve in float64.",
    Status.INVALID_TARGET: "W has NaN or inf where the weight is positive: give those entries weight 0.",
    Status.INVALID_WEIGHTS: "The weights have NaN, inf or negative entries, or are all zero: clean them first.",
}
RUNNING = -1


class History(NamedTuple):
    """The course of a solve; entry 0 is the start, +inf stands where no iteration came."""

    loss: Float[Array, " iters"]
    stationarity: Float[Array, " iters"]


class Outcome(NamedTuple):
    """The best factors seen, and how the loop ended."""

    factors: Factors
    loss: Float[Array, ""]
    stationarity: Float[Array, ""]
    iterations: Int[Array, ""]
    status: Int[Array, ""]
    history: History


class State(NamedTuple):
    factors: Factors
    aux: Any
    best: Factors
    loss: Float[Array, ""]
    stationarity: Float[Array, ""]
    iteration: Int[Array, ""]
    idle: Int[Array, ""]
    status: Int[Array, ""]
    history: History


def run(
    problem: Problem,
    factors: Factors,
    method: Method,
    tol: Float[Array, ""],
    patience: Int[Array, ""],
    max_iters: int,
    status: Int[Array, ""],
) -> Outcome:
    """The factors returned have the lowest loss of all iterates, the start among them.

    Stops when the stationarity is at most `tol`, when the loss has not fallen for `patience` iterations, when an
    iterate is not finite, and after `max_iters` iterations. Does not begin unless `status` is RUNNING.
    """

    def body(state: State) -> State:
        state = assess(problem, state, tol, patience, max_iters)
        factors, aux = method.step(problem, state.factors, state.aux)
        return state._replace(factors=factors, aux=aux, iteration=state.iteration + 1)

    dtype = problem.target.dtype
    infinite = jnp.array(jnp.inf, dtype)
    never = jnp.full(max_iters + 1, jnp.inf, dtype)
    ready, aux = method.init(problem, factors)
    zero = jnp.array(0, jnp.int32)
    start = State(ready, aux, factors, infinite, infinite, zero, zero, status, History(never, never))
    end = jax.lax.while_loop(lambda state: state.status == RUNNING, body, start)
    iterations = jnp.maximum(end.iteration - 1, 0)
    return Outcome(end.best, end.loss, end.stationarity, iterations, end.status, end.history)


def assess(problem: Problem, state: State, tol: Float[Array, ""], patience: Int[Array, ""], max_iters: int) -> State:
    """The state with its factors evaluated, entered in the history, kept if they are the best, and a status named.

    A loss equal to the best but for rounding replaces it: the later iterate is the more stationary one.
    """
    now, slope = loss(problem, state.factors), stationarity(problem, state.factors)
    slack = 1 + 4 * jnp.finfo(now.dtype).eps
    better = now <= state.loss * slack
    idle = jnp.where(now < state.loss / slack, 0, state.idle + 1)
    outcomes = [
        (~(jnp.isfinite(now) & jnp.isfinite(slope)), Status.NONFINITE),
        (slope <= tol, Status.CONVERGED),
        (idle >= patience, Status.STALLED),
        (state.iteration >= max_iters, Status.MAX_ITERS if max_iters else Status.CLOSED_FORM),
    ]
    return state._replace(
        best=choose(better, state.factors, state.best),
        loss=jnp.where(better, jnp.minimum(now, state.loss), state.loss),
        stationarity=jnp.where(better, slope, state.stationarity),
        idle=idle,
        status=jnp.select([met for met, _ in outcomes], [jnp.int32(name) for _, name in outcomes], RUNNING),
        history=History(
            state.history.loss.at[state.iteration].set(now),
            state.history.stationarity.at[state.iteration].set(slope),
        ),
    )


def choose(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """The first tree where the condition holds, else the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
