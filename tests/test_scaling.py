"""Scaling changes the variables and not the problem, and takes out of the weights what rows and columns explain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from wlra import scaling
from wlra.problem import Factors, Problem, loss

M, N, K = 24, 20, 3
EPS = float(np.finfo(np.float32).eps)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TARGET, LEFT, RIGHT = normal(0, M, N), normal(1, M, K), normal(2, K, N)
EXPONENTIAL = np.random.default_rng(3).exponential(size=(M, N)).astype(np.float32)
THIRTY_ORDERS = EXPONENTIAL * np.logspace(-30, 0, M, dtype=np.float32)[:, None]
MASK = (EXPONENTIAL > 1).astype(np.float32)
HOLES = np.where((np.arange(M) == 4)[:, None] | (np.arange(N) == 7)[None, :], np.float32(0), EXPONENTIAL)
WEIGHTS = {"exponential": EXPONENTIAL, "30 orders": THIRTY_ORDERS, "mask": MASK, "zero row and column": HOLES}

every_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
every_scaling = pytest.mark.parametrize("name", scaling.SCALINGS)


@jax.jit
def scaled_by_all(weight):
    """Of each scaling: the scaling itself, the scaled problem and factors, and both losses, and the factors back."""
    problem, factors = Problem(jnp.asarray(TARGET), weight), Factors(jnp.asarray(LEFT), jnp.asarray(RIGHT))
    return {name: scaled(problem, factors, function(weight)) for name, function in scaling.SCALINGS.items()}


def scaled(problem, factors, scales):
    new_problem, new_factors = scaling.scale(problem, scales), scaling.scale_factors(factors, scales)
    back = scaling.unscale_factors(new_factors, scales)
    return scales, new_problem, loss(new_problem, new_factors), back


def run(weights, name="separable"):
    return jax.tree.map(np.asarray, scaled_by_all(weights)[name])


def fourth_norms(weight, axis):
    """The fourth root of the mean fourth power of the positive entries."""
    weight = np.float64(weight)
    return (np.sum(weight**4, axis) / np.sum(weight > 0, axis)) ** 0.25


@every_scaling
@every_weights
def test_scaled_weights_lie_between_zero_and_one(weights, name):
    weight = run(weights, name)[1].weight
    assert weight.min() >= 0
    assert weight.max() == pytest.approx(1, abs=4 * EPS)  # two divisions


@every_scaling
@every_weights
def test_no_positive_weight_is_lost(weights, name):
    weight = run(weights, name)[1].weight
    np.testing.assert_array_equal(weight > 0, weights > 0)


@every_scaling
@every_weights
def test_the_loss_is_the_same_before_and_after(weights, name):
    wanted = reference.loss(TARGET, weights, reference.product((LEFT, RIGHT)))
    assert run(weights, name)[2] == pytest.approx(wanted, rel=64 * EPS)  # sums of 480 terms, in pairs


@every_scaling
@pytest.mark.parametrize("weights", [EXPONENTIAL, THIRTY_ORDERS, MASK], ids=["exponential", "30 orders", "mask"])
def test_unscaled_factors_are_those_that_were_scaled(weights, name):
    left, right = run(weights, name)[3]
    np.testing.assert_allclose(left, LEFT, rtol=4 * EPS)  # a product and a quotient
    np.testing.assert_allclose(right, RIGHT, rtol=4 * EPS)


def test_unscaled_factors_are_zero_without_weight():
    left, right = run(HOLES)[3]
    assert not left[4].any()
    assert not right[:, 7].any()


@every_weights
def test_rows_have_nearly_equal_norms_and_columns_exactly(weights):
    # The last half-sweep evens out columns; eight sweeps leave the rows within some thousandths.
    weight = run(weights)[1].weight
    seen = np.where(weights > 0, weight, 0)[:, weights.any(0)][weights.any(1)]
    columns, rows = fourth_norms(seen, 0), fourth_norms(seen, 1)
    np.testing.assert_allclose(columns, columns.mean(), rtol=64 * EPS)  # sums of 24 fourth powers
    np.testing.assert_allclose(rows, rows.mean(), rtol=0.01)


def test_masks_are_left_alone():
    scales = run(MASK)[0]
    np.testing.assert_array_equal(scales.row, 1)
    np.testing.assert_array_equal(scales.col, 1)


def test_weights_of_rank_one_become_constant():
    row, col = np.logspace(-15, 0, M, dtype=np.float32), np.logspace(0, -10, N, dtype=np.float32)
    weight = run(row[:, None] * col[None, :])[1].weight
    np.testing.assert_allclose(weight, 1, rtol=16 * EPS)  # a quotient, a fourth root, two more quotients


def test_without_scaling_weights_are_only_divided_by_their_maximum():
    scales, problem, *_ = run(EXPONENTIAL, "none")
    np.testing.assert_allclose(problem.weight, EXPONENTIAL / EXPONENTIAL.max(), rtol=EPS)  # one quotient
    assert len(np.unique(np.outer(scales.row, scales.col))) == 1


def test_weights_scale_by_rows_and_columns():
    row, col = np.ldexp(1, 3 * (np.arange(M) % 5)), np.ldexp(1, -2 * (np.arange(N) % 4))
    got = run((EXPONENTIAL * np.outer(row, col)).astype(np.float32))[1].weight
    # The limit of Sinkhorn's iteration is the same; after eight sweeps a few per cent of the start are left.
    np.testing.assert_allclose(got, run(EXPONENTIAL)[1].weight, rtol=0.1)
