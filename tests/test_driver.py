"""The loop compiles once, keeps the best, stops for a reason, and says which."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from contract import cases

import wlra
from wlra.methods import METHODS
from wlra.methods.method import Method, Stage, State, after, crawling, never
from wlra.problem import Factors, Problem
from wlra.result import History

M, N, K, STEPS = 24, 20, 3, 12
EPS = float(np.finfo(np.float32).eps)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, WEIGHTS = normal(0, M, N), np.exp(normal(1, M, N) / 2)
U, S, VT = np.linalg.svd(W, full_matrices=False)
LEFT, RIGHT = U[:, :K] * S[:K], VT[:K]  # the best for equal weights
ARGUMENTS = {
    "W": W,
    "weights": WEIGHTS,
    "left": LEFT,
    "right": RIGHT,
    "tol": np.float32(1e-2),
    "patience": np.int32(1000),
}
HOLED, NEGATIVE = W.copy(), WEIGHTS.copy()
HOLED[2, 3], NEGATIVE[2, 3] = np.nan, -1


@functools.cache
def program():
    """Anderson's iteration, compiled."""

    def solve(W, weights, left, right, tol, patience):
        return wlra.solve(W, weights, K, start=(left, right), tol=tol, patience=patience, max_iters=STEPS)

    return jax.jit(solve).lower(**ARGUMENTS).compile()


def run(**changes):
    return jax.tree.map(np.asarray, program()(**ARGUMENTS | changes))


OUTCOMES = {
    wlra.Status.CONVERGED: {},
    wlra.Status.MAX_ITERS: {"tol": np.float32(0)},
    wlra.Status.STALLED: {"tol": np.float32(0), "patience": np.int32(2), "weights": np.ones_like(W)},
    wlra.Status.NONFINITE: {"left": np.float32(1e30) * LEFT, "right": np.float32(1e30) * RIGHT},
    wlra.Status.INVALID_TARGET: {"W": HOLED},
    wlra.Status.INVALID_WEIGHTS: {"weights": NEGATIVE},
}


def assert_same_loss(got, wanted):
    """The root of the loss is a relative distance: rounding in sums of a few terms moves it by some eps."""
    np.testing.assert_allclose(np.sqrt(np.float64(got)), np.sqrt(np.float64(wanted)), rtol=0, atol=32 * EPS)


LENGTH = 9  # of a script, whose last factor is repeated


def scripted(script, until=never, traces=None):
    """A stage whose iterate i is the start times factor i, and which notes how often it is traced."""

    def init(problem, start):
        if traces is not None:
            traces.append(script)
        return Factors(start.left * script[0], start.right), (start, jnp.array(1, jnp.int32))

    def step(problem, now, aux):
        start, i = aux
        factor = jnp.asarray(script, start.left.dtype)[jnp.minimum(i, len(script) - 1)]
        return Factors(start.left * factor, start.right), (start, i + 1)

    return Stage(init, step, until)


@contextlib.contextmanager
def registered(*stages):
    """A name for a method of these stages."""
    name = f"scripted {len(METHODS)} {next(counter)}"
    METHODS[name] = Method(name, stages)
    try:
        yield name
    finally:
        del METHODS[name]


counter = itertools.count()


def solve_stages(patience, *stages):
    with registered(*stages) as name:
        return wlra.solve(
            W, np.ones_like(W), K, method=name, start=(LEFT, RIGHT), tol=0.0, max_iters=8, patience=patience
        )


# Scripts are arguments, so that one program serves them all.
solve_script = jax.jit(lambda script, patience: solve_stages(patience, scripted(script)))
solve_two = jax.jit(
    lambda scripts, patience, until: solve_stages(patience, scripted(scripts[0], until), scripted(scripts[1])),
    static_argnames="until",
)


def padded(script):
    return np.array([*script, *script[-1:] * (LENGTH - len(script))], np.float32)


def solve(script, patience=20):
    return jax.tree.map(np.asarray, solve_script(padded(script), np.int32(patience)))


def error(factor):
    """The loss of the best approximation times a factor, for equal weights."""
    return reference.loss(W, np.ones_like(W), factor * reference.eckart_young(W, K))


def test_other_values_and_tolerances_compile_nothing_new_and_another_length_of_the_history_does():
    traces = []
    with registered(scripted(padded([1, 2]), traces=traces)) as name:
        wlra.solve(W, WEIGHTS, K, method=name, max_iters=3, tol=1e-4, patience=20)
        first = len(traces)
        assert first > 0
        wlra.solve(2 * W, 1 / WEIGHTS, K, method=name, max_iters=3, tol=0.5, patience=3)
        wlra.solve(W[::-1], WEIGHTS, K, method=name, max_iters=3, tol=0.0, patience=7)
        assert len(traces) == first
        jax.eval_shape(lambda: wlra.solve(W, WEIGHTS, K, method=name, max_iters=4))
        assert len(traces) > first


def test_the_history_begins_with_the_start():
    assert_same_loss(run().history.loss[0], reference.loss(W, WEIGHTS, LEFT @ RIGHT))


def test_the_history_ends_with_infinities_where_no_iteration_came():
    result = run()
    assert result.iterations < STEPS
    for entries in result.history:
        assert len(entries) == STEPS + 1
        np.testing.assert_array_equal(np.isfinite(entries), np.arange(STEPS + 1) <= result.iterations)
        assert (entries[result.iterations + 1 :] == np.inf).all()


WANDERING = [3, 2, 0.5, 1.5, 0.9, 1.2, 4, 0, 7]


def test_the_history_holds_the_loss_of_every_iterate():
    assert_same_loss(solve(WANDERING).history.loss, [error(factor) for factor in WANDERING])


def test_the_best_iterate_is_returned():
    result = solve(WANDERING)
    assert_same_loss(reference.loss(W, np.ones_like(W), result.left @ result.right), error(0.9))
    assert_same_loss(result.loss, error(0.9))


def test_the_loss_reported_is_the_least_of_the_history():
    result = run()
    assert result.loss == result.history.loss.min()


def test_a_solve_stops_after_so_many_iterations_without_a_lower_loss():
    result = solve([1], patience=3)
    assert result.status == wlra.Status.STALLED
    assert result.iterations == 3


def test_a_lower_loss_renews_the_patience():
    assert solve([3, 2.9, 2.9, 2.9, 2.8, 2.8, 2.8, 2.7, 2.7], patience=3).status == wlra.Status.MAX_ITERS


def test_max_iters_bounds_the_iterations():
    result = run(**OUTCOMES[wlra.Status.MAX_ITERS])
    assert result.iterations == STEPS
    assert np.isfinite(result.history.loss).all()


def test_a_solve_stops_at_the_first_iterate_that_is_stationary_enough():
    result = run()
    shares = result.history.stationarity[: result.iterations + 1]
    np.testing.assert_array_equal(shares <= ARGUMENTS["tol"], np.arange(len(shares)) == result.iterations)


def test_a_step_to_nan_ends_the_solve_with_the_best_iterate_before_it():
    result = solve([3, 0.8, 2, np.nan, 1])
    assert result.status == wlra.Status.NONFINITE
    assert result.iterations == 3
    assert_same_loss(result.loss, error(0.8))
    assert_same_loss(reference.loss(W, np.ones_like(W), result.left @ result.right), error(0.8))


AFTER_TWO = after(2)
HANDING_OVER = {
    "after so many iterations": ([3, 2, 2.5], AFTER_TWO),
    "when it stalls": ([2, 2.5, 2.5, 2.5], never),
    "when it breaks": ([3, 2, np.nan], never),
}


@pytest.mark.parametrize("case", cases(HANDING_OVER, ["when it breaks"]))
def test_a_stage_hands_its_best_factors_to_the_next(case):
    script, until = HANDING_OVER[case]
    scripts = np.stack([padded(script), padded([1, 0.5])])
    result = jax.tree.map(np.asarray, solve_two(scripts, np.int32(3), until=until))
    # The best factors of the first stage are twice the start, where the second begins; half of them are the start.
    np.testing.assert_array_equal(np.isnan(result.history.loss[: len(script)]), np.isnan(script))
    assert_same_loss(
        np.nan_to_num(result.history.loss[: len(script) + 2]), np.nan_to_num([*map(error, [*script, 2, 1])])
    )
    assert_same_loss(result.loss, error(1))


def test_a_stage_crawls_when_its_stationarity_has_not_halved_for_so_many_iterations():
    shares = np.array([1, 0.9, 0.4, 0.3, 0.15, 0.14, 0.13, 0.12, 0.01, 0.01], np.float32)
    until, problem, zero = crawling(3), Problem(jnp.asarray(W), jnp.asarray(WEIGHTS)), jnp.array(0, jnp.int32)
    factors = Factors(jnp.asarray(LEFT), jnp.asarray(RIGHT))
    for entered in (0, 4):
        for iteration in range(entered, len(shares)):
            seen = np.where(np.arange(len(shares)) <= iteration, shares, np.inf).astype(np.float32)
            places = jnp.array(iteration, jnp.int32), jnp.array(entered, jnp.int32)
            history = History(jnp.asarray(seen), jnp.asarray(seen))
            state = State(factors, (), factors, jnp.array(1, jnp.float32), *places, zero, zero, history, zero, zero > 0)
            before, recent = (
                shares[entered : max(iteration - 2, entered)],
                shares[max(iteration - 2, 0) : iteration + 1],
            )
            wanted = len(before) > 0 and recent.min() > before.min() / 2
            assert bool(until(problem, state)) == wanted


@pytest.mark.parametrize("status", OUTCOMES, ids=lambda status: status.name)
def test_every_status_has_a_problem_that_ends_with_it(status):
    assert run(**OUTCOMES[status]).status == status


@pytest.mark.parametrize("status", OUTCOMES, ids=lambda status: status.name)
def test_every_outcome_has_finite_factors(status):
    result = run(**OUTCOMES[status])
    assert np.isfinite(result.left).all()
    assert np.isfinite(result.right).all()


@pytest.mark.parametrize("status", wlra.Status)
def test_every_status_gives_one_sentence_of_advice(status):
    assert len(re.findall(r"\.(?:\s|$)", status.advice)) == 1
    assert status.advice.endswith(".")
    assert len(status.advice) < 120


def test_no_outcome_is_without_a_test():
    elsewhere = {wlra.Status.CLOSED_FORM, wlra.Status.INVALID_PENALTY}  # without a program of penalties here
    assert {*OUTCOMES, *elsewhere} == set(wlra.Status)


def test_going_on_from_the_factors_lowers_the_loss_as_advised():
    first = run(tol=np.float32(0), left=np.zeros_like(LEFT), right=np.zeros_like(RIGHT))
    second = run(tol=np.float32(0), left=first.left, right=first.right)
    assert first.status == wlra.Status.MAX_ITERS
    assert second.loss < first.loss


def test_an_iteration_above_tol_multiplies_three_times_by_a_matrix_of_full_size():
    # left @ right and grad @ right.T, which the loss, the bound of the stationarity and the step share; and
    # new_left.T @ grad. The stationarity itself is a branch that is taken once the bound is at most tol.
    count = full_size_products(program().as_text())
    if not count:
        pytest.skip("this XLA compiles products into calls that do not show their shapes")
    assert count == 3


def full_size_products(program):
    """How many products in the body of the loop that keeps the history have an operand or a result of M N entries."""
    computations, lines = {}, []
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations[header[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    kept = [body for body in bodies if f"f32[{STEPS + 1}]" in "".join(computations[body])]
    return max(count_products(computations, body) for body in kept)


def count_products(computations, name):
    shapes = dict(re.findall(r"%?([\w.\-]+) = \w+\[([\d,]*)\]", "\n".join(computations[name])))
    count = 0
    for line in computations[name]:
        if product := re.search(r"%?([\w.\-]+) = .*? dot\(([^)]*)\)", line):
            names = [product[1], *re.findall(r"%([\w.\-]+)", product[2])]
            count += any(np.prod([int(d) for d in shapes[name].split(",")]) == M * N for name in names)
        for callee in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
            count += count_products(computations, callee)
    return count
