"""Closed forms are those of the literature, and every iteration can begin with each of them."""

import functools

import jax
import numpy as np
import pytest
import reference
from contract import STARTS, cases

import wlra

M, N, K = 11, 8, 3
EPS32, EPS = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))
rng = np.random.default_rng(0)
W, WEIGHTS = rng.normal(size=(M, N)), rng.exponential(size=(M, N))
P, Q = rng.exponential(size=M), rng.exponential(size=N)


@jax.jit
def closed_forms(W, weights):
    return {name: wlra.solve(W, weights, K, method=name)[:2] for name in STARTS}


@functools.partial(jax.jit, static_argnames="start")
def first_loss(W, weights, start):
    return wlra.solve(W, weights, K, method="em", start=start, max_iters=1).history.loss[0]


def product(name, weights, W=W):
    return reference.product(closed_forms(W, weights)[name])


def assert_close(got, wanted):
    assert np.linalg.norm(got - wanted) <= 1e3 * EPS * np.linalg.norm(wanted)  # 1 over the gap, and roots of weights


def test_svd_is_eckart_young_whatever_the_weights(x64):
    assert_close(product("svd", WEIGHTS), reference.eckart_young(W, K))


def test_fwsvd_weights_rows_by_their_sums(x64):
    assert_close(product("fwsvd", WEIGHTS), reference.fwsvd(W, WEIGHTS, K))


def test_separable_is_exact_for_weights_of_rank_one(x64):
    assert_close(product("separable", np.outer(P, Q)), reference.separable(W, P, Q, K))


def test_separable_fits_weights_better_than_rows_alone(x64):
    weights = np.outer(P, Q) * np.random.default_rng(1).uniform(0.5, 1, size=(M, N))
    losses = {name: reference.loss(W, weights, product(name, weights)) for name in STARTS}
    assert losses["separable"] < losses["fwsvd"] < losses["svd"]


@pytest.mark.parametrize("name", ["fwsvd", "separable"])
def test_rows_without_weight_are_zero(name, x64):
    weights = np.where(np.arange(M) == 2, 0, WEIGHTS.T).T
    assert not product(name, weights)[2].any()


def test_columns_without_weight_are_zero_in_the_separable_form(x64):
    weights = np.where(np.arange(N) == 2, 0, WEIGHTS)
    assert not product("separable", weights)[:, 2].any()


def test_separable_reads_no_target_without_weight(x64):
    weights, other = WEIGHTS * (WEIGHTS > 0.5), np.where(WEIGHTS > 0.5, W, 1e5)
    np.testing.assert_array_equal(product("separable", weights, other), product("separable", weights))


@pytest.mark.parametrize("name", cases(STARTS, ["fwsvd"]))
def test_an_iteration_begins_with_the_start_it_is_given(name):
    arrays = W.astype(np.float32), WEIGHTS.astype(np.float32)
    wanted = reference.loss(*arrays, reference.product(closed_forms(*arrays)[name]))
    got = first_loss(*arrays, start=name)
    assert np.sqrt(got) == pytest.approx(np.sqrt(wanted), abs=32 * EPS32)  # a relative distance, and rounding moves it


@pytest.mark.parametrize(("weights", "start"), [([[1.0], [100.0]], "svd"), ([[1.0, 100.0]], "fwsvd")])
def test_a_start_in_other_variables_than_the_scalings_is_looked_around(weights, start):
    """The SVD of a diagonal target is stationary, and keeps what weighs a hundredth."""
    result = wlra.solve(np.diag([3.0, 2.0]), weights, 1, start=start)
    np.testing.assert_allclose(result.loss, 9 / 409, rtol=1e-4)
