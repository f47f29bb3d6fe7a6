"""With a penalty the solution is that of the convex problem, and the gap certifies how far from it a result can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from contract import PENALISED as TABLE
from contract import Results, cases
from reference import product

import wlra
from wlra.narrowing import narrowed
from wlra.problem import Factors, Problem, gradient_left, gradient_right, loss, stationarity, stationarity_bound

M, N, K = 8, 6, 6
EPS = float(np.finfo(np.float64).eps)
rng = np.random.default_rng(0)
W, WEIGHTS = rng.normal(size=(M, N)), np.exp(rng.normal(size=(M, N)) / 2)
LEFT, RIGHT = rng.normal(size=(M, K)), rng.normal(size=(K, N))
LARGEST = float(np.linalg.norm(WEIGHTS * W, 2))  # the least penalty whose solution is zero
QUICK = ("anderson",)
NUCLEAR = np.float64(LARGEST / 4)  # a Python number would be of another type, and compile anew


@functools.partial(jax.jit, static_argnames="names")
def solve_names(W, weights, nuclear, tol, names):
    options = {"nuclear": nuclear, "tol": tol, "max_iters": 500, "patience": 50}
    return {name: wlra.solve(W, weights, K, **TABLE[name], **options) for name in names}


def solve_all(*inputs):
    return Results(lambda names: jax.tree.map(np.asarray, solve_names(*inputs, names)), TABLE, QUICK)


@functools.cache
def example(tol=1e-8):
    return solve_all(W, WEIGHTS, NUCLEAR, tol)


@functools.cache
def equal_weights():
    return solve_all(W, np.ones_like(W), NUCLEAR, 1e-8)


@functools.cache
def in_units(target, weight):
    arrays = np.ldexp(W, target), np.ldexp(WEIGHTS, weight), np.ldexp(NUCLEAR, target + weight)
    return solve_all(*arrays, 1e-8)


@functools.cache
def optimum():
    """The lowest objective, over that of zero, where soft-impute in NumPy ends."""
    X = reference.em(W, WEIGHTS, K, 3000, NUCLEAR)[-1]
    return X, reference.objective(W, WEIGHTS, X, NUCLEAR)


@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_every_method_finds_the_minimum_of_the_convex_problem(name, x64):
    X, lowest = optimum()
    assert 0 < np.linalg.matrix_rank(X, tol=1e-6) < K  # the penalty has chosen the rank
    assert reference.objective(W, WEIGHTS, product(example()[name]), NUCLEAR) <= lowest * (1 + 1e-6)  # the gap, below


@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_the_loss_is_the_objective_over_that_of_zero(name, x64):
    result = example()[name]
    # The squares of factors whose balance is that of the stationarity, 1e-8, exceed the nuclear norm by less.
    assert result.loss == pytest.approx(reference.objective(W, WEIGHTS, product(result), NUCLEAR), rel=1e-6)


@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_equal_weights_give_the_svd_with_smaller_singular_values(name, x64):
    wanted = reference.eckart_young(W, K, NUCLEAR)
    assert 0 < np.linalg.matrix_rank(wanted) < K
    # The gap below bounds half the squared distance from the minimum, over the squared norm of the target.
    assert np.linalg.norm(product(equal_weights()[name]) - wanted) <= np.sqrt(2e-6) * np.linalg.norm(W)


@pytest.mark.parametrize("tol", [0.3, 0.03, 1e-8])
@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_the_gap_is_at_least_the_distance_from_the_lowest_objective(name, tol, x64):
    result = example(tol)[name]
    reached = reference.objective(W, WEIGHTS, product(result), NUCLEAR)
    assert result.gap >= (reached - optimum()[1]) / reached - 64 * EPS  # sums of 48 terms


@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_the_gap_closes_in_float64(name, x64):
    assert example()[name].gap <= 1e-6  # first order in the stationarity, 1e-8, times the condition


@pytest.mark.parametrize("units", [(10, -40), (-31, 60), (101, -101)])
@pytest.mark.parametrize("name", cases(TABLE, QUICK))
def test_units_that_are_powers_of_two_change_no_bit(name, units, x64):
    got, wanted = in_units(*units)[name], example()[name]
    jax.tree.map(np.testing.assert_array_equal, got[2:], wanted[2:])
    np.testing.assert_array_equal(product(got), np.ldexp(product(wanted), units[0]))


def by_ridge(ridge):
    return wlra.solve(W, WEIGHTS, K, method="lbfgs", ridge=ridge, tol=1e-8, max_iters=500, patience=50)


def test_ridge_is_nuclear_as_a_share_of_the_least_penalty_whose_solution_is_zero(x64):
    got, wanted = by_ridge(1 / 4), example()["anderson"]
    assert got.loss == pytest.approx(wanted.loss, rel=1e-10)  # second order in the stationarity, times the condition
    np.testing.assert_allclose(product(got), product(wanted), rtol=0, atol=1e-6 * np.abs(W).max())  # first order


def test_no_more_than_a_ridge_of_one_is_needed_for_zero(x64):
    assert by_ridge(1.0).loss == pytest.approx(1, abs=1e-15)
    enough = wlra.solve(W, WEIGHTS, K, method="lbfgs", nuclear=1.01 * LARGEST, tol=1e-8)
    assert not product(enough).any()
    assert (enough.loss, enough.stationarity) == (1, 0)
    assert enough.gap <= 4 * EPS
    assert by_ridge(0.99).loss < 1 - 1e-6


@jax.jit
def measures(left, right, penalty):
    problem, factors = Problem(jnp.asarray(W), jnp.asarray(WEIGHTS), penalty), Factors(left, right)
    gradients = gradient_left(problem, factors), gradient_right(problem, factors)
    return loss(problem, factors), gradients, stationarity(problem, factors), stationarity_bound(problem, factors)


def test_gradients_are_minus_half_the_derivatives_of_the_objective(x64):
    def objective(left, right):
        size = jnp.sum(left**2) + jnp.sum(right**2)
        return jnp.sum(WEIGHTS * (W - left @ right) ** 2) + NUCLEAR * size

    value, gradients, *_ = measures(LEFT, RIGHT, NUCLEAR)
    assert value * np.sum(WEIGHTS * W**2) == pytest.approx(float(objective(LEFT, RIGHT)), rel=64 * EPS)  # 48 terms
    for got, wanted in zip(gradients, jax.grad(objective, (0, 1))(jnp.asarray(LEFT), jnp.asarray(RIGHT)), strict=True):
        np.testing.assert_allclose(got, -wanted / 2, rtol=0, atol=64 * EPS * np.abs(wanted).max())  # sums of 8 terms


@pytest.mark.parametrize("penalty", [0.0, NUCLEAR])
def test_the_bound_of_the_stationarity_is_one(penalty, x64):
    for rank in (1, 2, 5):
        *_, share, bound = measures(LEFT * (np.arange(K) < rank), RIGHT, penalty)
        assert 0 < bound <= share * (1 + 1e6 * EPS)  # Gram matrices of condition 1000, squared by their inverses
        assert share <= 1


def test_a_minimum_with_a_penalty_is_stationary(x64):
    u, s, vt = np.linalg.svd(optimum()[0], full_matrices=False)
    share = measures(u * np.sqrt(s), np.sqrt(s)[:, None] * vt, NUCLEAR)[2]
    assert share <= 1e-6  # the square root of the objective's rounding errors, where soft-impute ends


def test_factors_that_rounding_has_changed_are_certified_no_more():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(M, 2)), rng.normal(size=(2, N))
    zero, one = jnp.zeros(()), jnp.ones(1)
    count, history = jnp.array(1, jnp.int32), wlra.result.History(one, one)
    exact = wlra.Result(
        jnp.asarray(left), jnp.asarray(right), zero, zero, count, status=0 * count, history=history, gap=zero
    )
    rounded = narrowed(exact, left @ right, np.ones((M, N)), np.float16)
    assert rounded.status == wlra.Status.STALLED
    assert rounded.gap == np.inf
    assert narrowed(exact, left @ right, np.ones((M, N)), np.float32).gap == 0
