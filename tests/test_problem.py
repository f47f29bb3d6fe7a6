"""The objective and its stationarity are those of the formulas, in any gauge and any units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from wlra.problem import Factors, Problem, loss, rounding, stationarity, weighted_residual

M, N, K = 9, 7, 3
EPS = float(np.finfo(np.float64).eps)
rng = np.random.default_rng(0)
TARGET, WEIGHT = rng.normal(size=(M, N)), rng.uniform(size=(M, N))
LEFT, RIGHT, GAUGE = rng.normal(size=(M, K)), rng.normal(size=(K, N)), rng.normal(size=(K, K))

compiled_loss = jax.jit(lambda *arrays: loss(Problem(*arrays[:2]), Factors(*arrays[2:])))
compiled_stationarity = jax.jit(lambda *arrays: stationarity(Problem(*arrays[:2]), Factors(*arrays[2:])))


@functools.cache
def minimum():
    """Factors where exact alternating least squares ends."""
    left, right = LEFT, RIGHT
    for _ in range(1000):
        left, right = reference.als(TARGET, WEIGHT, left, right)
    return left, right


def test_loss_is_the_weighted_squared_error_relative_to_that_of_zero(x64):
    wanted = reference.loss(TARGET, WEIGHT, LEFT @ RIGHT)
    assert compiled_loss(TARGET, WEIGHT, LEFT, RIGHT) == pytest.approx(wanted, rel=64 * EPS)  # sums of 63 terms


def test_the_loss_of_zero_is_one(x64):
    assert compiled_loss(TARGET, WEIGHT, 0 * LEFT, RIGHT) == 1


def test_the_loss_of_a_target_of_zeros_is_the_error_itself(x64):
    wanted = np.sum(WEIGHT * (LEFT @ RIGHT) ** 2)
    assert compiled_loss(0 * TARGET, WEIGHT, LEFT, RIGHT) == pytest.approx(wanted, rel=64 * EPS)  # sums of 63 terms


def test_gradient_is_minus_half_the_derivative_of_the_objective(x64):
    def objective(product):
        return jnp.sum(WEIGHT * (TARGET - product) ** 2)

    wanted = -jax.grad(objective)(jnp.asarray(LEFT @ RIGHT)) / 2
    got = weighted_residual(
        Problem(jnp.asarray(TARGET), jnp.asarray(WEIGHT)), Factors(jnp.asarray(LEFT), jnp.asarray(RIGHT))
    )
    np.testing.assert_allclose(got, wanted, rtol=0, atol=16 * EPS * np.abs(wanted).max())  # rounding of 3 terms


def test_stationarity_is_the_length_of_the_projected_gradient(x64):
    wanted = reference.stationarity(TARGET, WEIGHT, LEFT, RIGHT)
    # The Gram matrices have condition 100, and their inverses are shifted by some eps.
    assert compiled_stationarity(TARGET, WEIGHT, LEFT, RIGHT) == pytest.approx(wanted, rel=1e4 * EPS)


def test_stationarity_does_not_depend_on_the_gauge(x64):
    wanted = compiled_stationarity(TARGET, WEIGHT, LEFT, RIGHT)
    got = compiled_stationarity(TARGET, WEIGHT, LEFT @ GAUGE, np.linalg.solve(GAUGE, RIGHT))
    assert got == pytest.approx(float(wanted), rel=1e6 * EPS)  # the gauge squares into the condition, some 10^4


@pytest.mark.parametrize("measure", [compiled_loss, compiled_stationarity])
def test_units_that_are_powers_of_four_change_no_bit(measure, x64):
    wanted = measure(TARGET, WEIGHT, LEFT, RIGHT)
    assert measure(TARGET * 4.0**5, WEIGHT * 2.0**-40, LEFT * 2.0**5, RIGHT * 2.0**5) == wanted


def test_a_minimum_is_stationary(x64):
    # Least squares to eps leaves the gradient of each row at eps times the condition of its system.
    assert compiled_stationarity(TARGET, WEIGHT, *minimum()) <= 1e4 * EPS


def test_the_best_for_equal_weights_is_stationary_for_them(x64):
    u, s, vt = np.linalg.svd(TARGET)
    got = compiled_stationarity(TARGET, np.ones((M, N)), u[:, :K] * s[:K], vt[:K])
    assert got <= 64 * EPS  # rounding in sums of 9 terms


def test_a_gradient_that_rank_k_can_follow_has_stationarity_one(x64):
    got = compiled_stationarity(LEFT @ GAUGE @ RIGHT, np.ones((M, N)), LEFT, RIGHT)
    assert got == pytest.approx(1, rel=1e4 * EPS)  # the Gram matrices have condition 100, squared by their inverses


def test_the_stationarity_of_an_exact_fit_is_zero():
    left, right = LEFT.astype(np.float32), RIGHT.astype(np.float32)
    assert compiled_stationarity(left @ right, WEIGHT.astype(np.float32), left, right) == 0


def test_an_error_above_rounding_still_has_a_stationarity():
    left, right = LEFT.astype(np.float32), RIGHT.astype(np.float32)
    off = np.float32(1 + 4 * np.sqrt(rounding(Factors(jnp.asarray(left), jnp.asarray(right)))))
    assert compiled_stationarity(off * (left @ right), np.ones((M, N), np.float32), left, right) > 0


@pytest.mark.parametrize("zero", ["left", "right", "both", "component"])
def test_stationarity_of_factors_without_full_rank_is_finite(zero):
    left, right = LEFT.astype(np.float32), RIGHT.astype(np.float32)
    mask = np.arange(K, dtype=np.float32) > 0 if zero == "component" else np.zeros(K, bool)
    left = left * mask[None, :] if zero != "right" else left
    right = right * mask[:, None] if zero != "left" else right
    arrays = TARGET.astype(np.float32), WEIGHT.astype(np.float32), left, right
    assert np.isfinite(compiled_stationarity(*arrays))
