"""Results have the dtype of the target, and numbers that it holds."""

import jax.numpy as jnp
import numpy as np
import pytest

import wlra

FAR = np.array([[1e12, 1], [1, 0]])  # fits three entries, and leaves the last to whatever factors make of it
SOME = np.random.default_rng(0).normal(size=(5, 4))


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (np.array([[1e-2, 6e4], [6e4, 0]], np.float16), FAR),
        (1e29 * np.array([[1e-6, 1e30], [1e30, 0]]), np.array([[1e40, 1], [1, 0]])),
    ],
    ids=["float16", "float32 for float64"],
)
def test_factors_that_a_dtype_does_not_hold_are_zero_and_said_to_be(target, weights):
    found = wlra.solve(target, weights, 1, method="als", max_iters=500)
    assert not np.asarray(found.left).any()
    assert not np.asarray(found.right).any()
    assert (found.loss, found.status, found.gap) == (1, wlra.Status.NONFINITE, np.inf)


def test_of_a_batch_only_those_are():
    target = np.array([[[1e-2, 6e4], [6e4, 0]], [[1, 2], [3, 4]]], np.float16)
    found = wlra.solve_batch(target, np.stack([FAR, FAR]), 1, method="als", max_iters=500)
    assert found.status[0] == wlra.Status.NONFINITE
    assert found.status[1] != wlra.Status.NONFINITE
    assert np.isfinite(np.asarray(found.left, float)).all()
    assert found.loss[1] < 1


@pytest.mark.parametrize("method", ["svd", "als"])
def test_factors_are_float32_however_far_apart_the_weights_are(method):
    weights = np.ones((5, 4))
    weights[0, 0] = 1e-40
    assert wlra.solve(SOME, weights, 2, method=method).left.dtype == jnp.float32
