"""Closed forms of known values are computed on the host, and are those of the compiled programs."""

import functools

import jax
import numpy as np
import pytest
import reference
from numpy.random import default_rng

import wlra

M, N, K = 9, 7, 3
RNG = default_rng(0)
W = RNG.normal(size=(M, N)).astype(np.float32)
P, Q = RNG.lognormal(size=(M, 1)).astype(np.float32), RNG.lognormal(size=(1, N)).astype(np.float32)
WEIGHTS = {
    "equal": np.ones((M, N), np.float32),
    "of rows": P * np.ones((1, N), np.float32),
    "of rows and columns": P * Q,
    "nearly so": P * Q * RNG.uniform(0.995, 1, (M, N)).astype(np.float32),
    "of entries": RNG.lognormal(size=(M, N)).astype(np.float32),
    "zeros and ones": (RNG.uniform(size=(M, N)) > 0.4).astype(np.float32),
    "a row and a column of zeros": P * Q * (np.arange(M) != 2)[:, None] * (np.arange(N) != 4),
}


@functools.cache
def compiled(method):
    return jax.jit(lambda W, weights: wlra.solve(W, weights, K, method=method))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("method", ["svd", "fwsvd", "separable"])
def test_the_host_has_the_result_of_the_compiled_program(method, weights):
    got, wanted = wlra.solve(W, weights, K, method=method), compiled(method)(W, weights)
    np.testing.assert_allclose(reference.product(got), reference.product(wanted), rtol=0, atol=3e-5)  # numbers up to 3
    assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert float(got.loss) == pytest.approx(reference.loss(W, weights, reference.product(got)), rel=1e-5)
    assert float(got.stationarity) == pytest.approx(float(wanted.stationarity), abs=1e-4)
    assert (got.status, got.iterations) == (wanted.status, 0)
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, wanted)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, wanted)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "separable", "kronecker"])
def test_a_batch_is_a_loop_of_solves(method):
    targets, weights = np.stack([W, 2 * W, W[::-1]]), np.stack(list(WEIGHTS.values())[2:5])
    if method == "kronecker":
        weights = wlra.Kronecker(*(np.stack([side @ side.T + np.eye(len(side), dtype="f4")] * 3) for side in (W, W.T)))
    ranks = [1, 3, 2]
    got = wlra.solve_batch(targets, weights, K, ranks=ranks, method=method)
    for i, rank in enumerate(ranks):
        one = wlra.solve(targets[i], jax.tree.map(lambda leaf, i=i: leaf[i], weights), rank, method=method)
        np.testing.assert_allclose(reference.product((got.left[i], got.right[i])), reference.product(one), atol=1e-5)
        np.testing.assert_array_equal(got.left[i][:, rank:], 0)
        assert float(got.loss[i]) == pytest.approx(float(one.loss), rel=1e-5, abs=1e-12)


def test_entries_without_weight_may_be_anything():
    hidden = np.where(WEIGHTS["zeros and ones"] > 0, W, np.nan)
    for method in ("svd", "fwsvd", "separable"):
        assert np.isfinite(wlra.solve(hidden, WEIGHTS["zeros and ones"], K, method=method).loss)


def test_a_problem_of_a_batch_that_cannot_be_used_is_named():
    sides = [np.stack([np.eye(size, dtype="f4")] * 3) for size in (M, N)]
    sides[0][1] *= -1
    with pytest.raises(ValueError, match=r"problem 1 of the batch: weights\.row must be symmetric positive semi"):
        wlra.solve_batch(np.stack([W] * 3), wlra.Kronecker(*sides), K, method="kronecker")
