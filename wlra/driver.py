"""The one loop: it evaluates, stops, remembers the best, and names the outcome."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra.methods.method import Method, Stage, State, choose
from wlra.problem import Factors, Problem, loss, row_stationarity, stationarity
from wlra.result import History, Status

RUNNING, LEAVING = -1, -2


class Outcome(NamedTuple):
    """The best factors seen, and how the loop ended."""

    factors: Factors
    loss: Float[Array, ""]
    stationarity: Float[Array, ""]
    iterations: Int[Array, ""]
    status: Int[Array, ""]
    history: History


def run(
    problem: Problem,
    factors: Factors,
    stages: Sequence[Stage],
    tol: Float[Array, ""],
    patience: Int[Array, ""],
    max_iters: int,
    status: Int[Array, ""],
) -> Outcome:
    """The factors returned have the lowest loss of all iterates, the start among them.

    Stops when the stationarity is at most `tol`, when an iterate is not finite or the loss has not fallen for
    `patience` iterations in the last stage, and after `max_iters` iterations. Does not begin unless `status` is
    RUNNING. Each stage goes on from the best factors of the one before.
    """
    dtype = problem.target.dtype
    infinite, zero = jnp.array(jnp.inf, dtype), jnp.array(0, jnp.int32)
    never = jnp.full(max_iters + 1, jnp.inf, dtype)
    state = State(factors, (), factors, infinite, zero, zero, zero, status, History(never, never))
    for place, stage in enumerate(stages, 1):
        ready, aux = begin(stage.method, problem, state)
        state = state._replace(factors=ready, aux=aux, entered=state.iteration, idle=zero)
        state = loop(problem, state, stage, tol, patience, max_iters)
        if place < len(stages):
            given_up = (state.status == Status.STALLED) | (state.status == Status.NONFINITE) | (state.status == LEAVING)
            state = state._replace(status=jnp.where(given_up, RUNNING, state.status))
    slope = jnp.where(state.iteration > 0, stationarity(problem, state.best), infinite)
    iterations = jnp.maximum(state.iteration - 1, 0)
    return Outcome(state.best, state.loss, slope, iterations, state.status, state.history)


def closed(
    factors: Factors,
    loss: Float[Array, ""],
    slope: Float[Array, ""],
    tol: Float[Array, ""],
    status: Int[Array, ""],
) -> Outcome:
    """The outcome of a closed form that has been evaluated already; with zeros if the problem was refused before."""
    finite = jnp.isfinite(loss) & jnp.isfinite(slope)
    named = jnp.where(slope <= tol, Status.CONVERGED, Status.CLOSED_FORM)
    status = jnp.where(status == RUNNING, jnp.where(finite, named, Status.NONFINITE), status).astype(jnp.int32)
    usable = finite & (status != Status.INVALID_TARGET) & (status != Status.INVALID_WEIGHTS)
    factors = jax.tree.map(lambda array: jnp.where(usable, array, 0), factors)
    loss, slope = (jnp.where(usable, value, jnp.inf) for value in (loss, slope))
    return Outcome(factors, loss, slope, jnp.array(0, jnp.int32), status, History(loss[None], slope[None]))


def begin(method: Method, problem: Problem, state: State) -> tuple[Factors, Any]:
    """What the method's `init` makes of the best factors; if the solve has ended, zeros at no cost."""
    shapes = jax.eval_shape(method.init, problem, state.best)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.cond(state.status == RUNNING, lambda: method.init(problem, state.best), lambda: zeros)


def loop(
    problem: Problem, state: State, stage: Stage, tol: Float[Array, ""], patience: Int[Array, ""], max_iters: int
) -> State:
    """The state at the end of a stage."""

    def body(state: State) -> State:
        state = assess(problem, state, tol, patience, max_iters)
        leaving = (state.status == RUNNING) & stage.until(problem, state)
        state = state._replace(status=jnp.where(leaving, LEAVING, state.status))
        factors, aux = stage.method.step(problem, state.factors, state.aux)
        return state._replace(factors=factors, aux=aux, iteration=state.iteration + 1)

    return jax.lax.while_loop(lambda state: state.status == RUNNING, body, state)


def assess(problem: Problem, state: State, tol: Float[Array, ""], patience: Int[Array, ""], max_iters: int) -> State:
    """The state with its factors evaluated, entered in the history, kept if they are the best, and a status named.

    A loss equal to the best but for rounding replaces it: the later iterate is the more stationary one.
    """
    now, slope = loss(problem, state.factors), slope_above(problem, state.factors, tol)
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
        idle=idle,
        status=jnp.select([met for met, _ in outcomes], [jnp.int32(name) for _, name in outcomes], RUNNING),
        history=History(
            state.history.loss.at[state.iteration].set(now),
            state.history.stationarity.at[state.iteration].set(slope),
        ),
    )


def slope_above(problem: Problem, factors: Factors, tol: Float[Array, ""]) -> Float[Array, ""]:
    """The stationarity where it is at most `tol`, else a lower bound above `tol` or the same.

    The bound takes products that the step makes anyway, the stationarity one more.
    """
    bound = row_stationarity(problem, factors)
    return jax.lax.cond(bound <= tol, lambda: stationarity(problem, factors), lambda: bound)
