"""The one loop: it evaluates, stops, remembers the best, and names the outcome."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra.certificate import bends, look_around
from wlra.linalg.decompose import balance, mask_rank
from wlra.methods.method import Evaluated, Stage, State, choose
from wlra.problem import Factors, Problem, loss, rounding, stationarity, stationarity_bound
from wlra.result import History, Status

RUNNING, LEAVING = -1, -2
MOVED = 3  # iterations, of which none is at a point that is stationary by its symmetry


class Outcome(NamedTuple):
    """The best factors seen, and how the loop ended."""

    factors: Factors
    loss: Float[Array, ""]
    stationarity: Float[Array, ""]
    iterations: Int[Array, ""]
    status: Int[Array, ""]
    history: History


class Limits(NamedTuple):
    """Where a solve stops: at this stationarity, after so many iterations without a lower loss, after so many.

    settled, trusted: whether the start is within `certificate.WITHIN` of the lowest loss of all, and whether the
    weights let a small stationarity bound what is left, once the iterates have moved. ranks: a rank beyond which
    factors stay zero, or None.
    """

    tol: Float[Array, ""]
    patience: Int[Array, ""]
    max_iters: int
    settled: Bool[Array, ""]
    trusted: Bool[Array, ""]
    ranks: Int[Array, ""] | None


def run(
    problem: Problem, factors: Factors, stages: Sequence[Stage], *, limits: Limits, status: Int[Array, ""]
) -> Outcome:
    """The factors returned have the lowest loss of all iterates, the start among them.

    Stops when the stationarity is at most `tol`, when an iterate is not finite or the loss has not fallen for
    `patience` iterations in the last stage, and after `max_iters` iterations. Does not begin unless `status` is
    RUNNING. Each stage goes on from the best factors of the one before.
    """

    def go(state: State) -> State:
        return confirm(problem, through(problem, state, stages, limits), limits)

    state = jax.lax.while_loop(lambda state: state.status == RUNNING, go, initial(problem, factors, limits, status))
    infinite = jnp.array(jnp.inf, problem.target.dtype)
    return Outcome(
        factors=state.best,
        loss=state.loss,
        stationarity=jnp.where(state.iteration > 0, stationarity(problem, state.best), infinite),
        iterations=jnp.maximum(state.iteration - 1, 0),
        status=state.status,
        history=state.history,
    )


def through(problem: Problem, state: State, stages: Sequence[Stage], limits: Limits) -> State:
    """The state at the end of the last stage."""
    for place, stage in enumerate(stages, 1):
        started, aux = begin(stage, problem, state)
        state = state._replace(factors=started, aux=aux, entered=state.iteration, idle=jnp.zeros_like(state.idle))
        state = loop(problem, state, stage, limits)
        if place < len(stages):
            given_up = (state.status == Status.STALLED) | (state.status == Status.NONFINITE) | (state.status == LEAVING)
            given_up &= state.iteration <= limits.max_iters
            state = state._replace(status=jnp.where(given_up, RUNNING, state.status))
    return state._replace(aux=())


def confirm(problem: Problem, state: State, limits: Limits) -> State:
    """The state with its convergence confirmed, or on its way again: from a lower point nearby, or to a smaller `tol`.

    Where the weights leave no doubt and no component bends, or the fit is exact up to rounding, it stands. The look
    around is a loop of one pass, which a batch enters only if one of its problems is in doubt.
    """
    converged = state.status == Status.CONVERGED
    trusted = converged & limits.trusted & (state.iteration - 1 >= MOVED) & ~state.looked
    trusted &= ~jax.lax.cond(trusted, lambda: bends(problem, state.best, limits.ranks), lambda: jnp.array(True))
    sure = trusted | limits.settled | (state.loss <= rounding(state.best))

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        _, state = carry
        look = look_around(problem, mask_rank(balance(state.best), limits.ranks))
        lower = ~look.certified & (look.loss < state.loss)
        tol = jnp.where(look.certified | lower, state.tol, state.tol / 4)
        again = jnp.where(state.iteration > limits.max_iters, Status.MAX_ITERS, RUNNING)
        return jnp.array(False), state._replace(
            best=choose(lower, look.factors, state.best),
            loss=jnp.where(lower, look.loss, state.loss),
            tol=tol,
            looked=jnp.array(True),
            status=jnp.where(look.certified, Status.CONVERGED, again).astype(jnp.int32),
        )

    return jax.lax.while_loop(lambda carry: carry[0], body, (converged & ~sure, state))[1]


def initial(problem: Problem, factors: Factors, limits: Limits, status: Int[Array, ""]) -> State:
    """The state before the first evaluation."""
    dtype = problem.target.dtype
    zero, unknown = jnp.array(0, jnp.int32), jnp.full(limits.max_iters + 1, jnp.inf, dtype)
    return State(
        factors=factors,
        aux=(),
        best=factors,
        loss=jnp.array(jnp.inf, dtype),
        iteration=zero,
        entered=zero,
        idle=zero,
        status=status,
        history=History(unknown, unknown),
        tol=limits.tol,
        looked=jnp.array(False),
    )


def closed(evaluated: Evaluated, tol: Float[Array, ""], status: Int[Array, ""]) -> Outcome:
    """The outcome of a closed form; with zeros if it is not finite, or the problem was refused before."""
    factors, loss, stationarity, lowest = evaluated
    finite = jnp.isfinite(loss) & jnp.isfinite(stationarity)
    known = (stationarity <= tol) & (lowest | (loss <= rounding(factors)))
    named = jnp.where(known, Status.CONVERGED, Status.CLOSED_FORM)
    status = jnp.where(status == RUNNING, jnp.where(finite, named, Status.NONFINITE), status).astype(jnp.int32)
    usable = finite & (status != Status.INVALID_TARGET) & (status != Status.INVALID_WEIGHTS)
    loss, stationarity = (jnp.where(usable, value, jnp.inf) for value in (loss, stationarity))
    return Outcome(
        factors=jax.tree.map(lambda array: jnp.where(usable, array, 0), factors),
        loss=loss,
        stationarity=stationarity,
        iterations=jnp.array(0, jnp.int32),
        status=status,
        history=History(loss[None], stationarity[None]),
    )


def begin(stage: Stage, problem: Problem, state: State) -> tuple[Factors, Any]:
    """What the stage's `init` makes of the best factors; if the solve has ended, zeros at no cost."""
    shapes = jax.eval_shape(stage.init, problem, state.best)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.cond(state.status == RUNNING, lambda: stage.init(problem, state.best), lambda: zeros)


def loop(problem: Problem, state: State, stage: Stage, limits: Limits) -> State:
    """The state at the end of a stage."""

    def body(state: State) -> State:
        state = assess(problem, state, limits)
        leaving = (state.status == RUNNING) & stage.until(problem, state)
        state = state._replace(status=jnp.where(leaving, LEAVING, state.status))
        factors, aux = stage.step(problem, state.factors, state.aux)
        return state._replace(factors=factors, aux=aux, iteration=state.iteration + 1)

    return jax.lax.while_loop(lambda state: state.status == RUNNING, body, state)


def assess(problem: Problem, state: State, limits: Limits) -> State:
    """The state with its factors evaluated, entered in the history, kept if they are the best, and a status named.

    A loss equal to the best but for rounding replaces it: the later iterate is the more stationary one.
    """
    now, remaining = loss(problem, state.factors), stationarity_above(problem, state.factors, state.tol)
    eps, stationary = jnp.finfo(now.dtype).eps, remaining <= state.tol
    slack = 1 + 4 * eps
    better = now <= state.loss * jnp.where(stationary, 1 + 64 * eps, slack)
    idle = jnp.where(now < state.loss / slack, 0, state.idle + 1)
    overflowed = ~(jnp.isfinite(now) & jnp.isfinite(remaining))
    exact = state.loss <= 64 * rounding(state.best)  # steps are of rounding errors by then
    outcomes = [
        (overflowed & exact, Status.STALLED),
        (overflowed, Status.NONFINITE),
        (stationary & better, Status.CONVERGED),
        (idle >= limits.patience, Status.STALLED),
        (state.iteration >= limits.max_iters, Status.MAX_ITERS),
    ]
    return state._replace(
        best=choose(better, state.factors, state.best),
        loss=jnp.where(better, jnp.minimum(now, state.loss), state.loss),
        idle=idle,
        status=jnp.select([met for met, _ in outcomes], [jnp.int32(name) for _, name in outcomes], RUNNING),
        history=History(
            state.history.loss.at[state.iteration].set(now),
            state.history.stationarity.at[state.iteration].set(remaining),
        ),
    )


def stationarity_above(problem: Problem, factors: Factors, tol: Float[Array, ""]) -> Float[Array, ""]:
    """The stationarity where it is at most `tol`, else a lower bound above `tol` or the same.

    The bound takes products that the step makes anyway, the stationarity one more.
    """
    bound = stationarity_bound(problem, factors)
    return jax.lax.cond(bound <= tol, lambda: stationarity(problem, factors), lambda: bound)
