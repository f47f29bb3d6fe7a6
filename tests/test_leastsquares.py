"""Weighted least squares row by row, beside exact arithmetic and beside LAPACK."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from wlra.leastsquares import by_reflections, coefficients

RNG = np.random.default_rng(0)
N, K = 7, 2
TARGET, COMPONENTS = RNG.normal(size=(20, N)), RNG.normal(size=(K, N))


def exact(target, weight, components):
    """The minimiser for two components, by Cramer's rule in rational numbers."""
    x, w, first, second = ([Fraction(float(v)) for v in row] for row in (target, weight, *components))

    def dot(a, b):
        return sum((p * q * r for p, q, r in zip(w, a, b, strict=True)), Fraction(0))

    a, b, c, d, e = dot(first, first), dot(first, second), dot(second, second), dot(first, x), dot(second, x)
    return [float(part / (a * c - b * b)) for part in (c * d - b * e, a * e - b * d)]


@pytest.mark.parametrize("decades", [2, 8, 12, 30, 100, 250])
def test_every_digit_is_right_however_far_weights_are_apart(decades):
    weight = 10.0 ** RNG.uniform(-decades / 2, decades / 2, size=TARGET.shape)
    got = coefficients(TARGET, weight, COMPONENTS)
    wanted = [exact(*row, COMPONENTS) for row in zip(TARGET, weight, strict=True)]
    # Ten digits of the condition of two of the components' columns.
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_masks_of_tiny_weights_are_nearly_masks_of_zeros():
    mask = RNG.uniform(size=TARGET.shape) < 0.6
    mask[:, :K] = True
    tiny, zero = (coefficients(TARGET, np.where(mask, 1.0, hidden), COMPONENTS) for hidden in (1e-20, 0.0))
    np.testing.assert_allclose(tiny, zero, rtol=1e-9)  # eps, times the condition of a few columns


@pytest.mark.parametrize("seen", range(7))
def test_rows_with_too_few_weights_have_the_shortest_solution(seen):
    components = RNG.normal(size=(4, 6))
    target, weight = RNG.normal(size=(8, 6)), RNG.uniform(0.5, 2, size=(8, 6))
    weight[:, RNG.permutation(6)[seen:]] = 0
    wanted = [np.linalg.lstsq((components * np.sqrt(w)).T, np.sqrt(w) * x)[0] for x, w in zip(target, weight)]  # noqa: B905
    np.testing.assert_allclose(by_reflections(target, weight, components), wanted, atol=1e-12 * np.abs(wanted).max())


def test_components_that_are_the_same_share_the_solution():
    twice = np.stack([COMPONENTS[0], COMPONENTS[0]])
    got = coefficients(TARGET, np.ones_like(TARGET), twice)
    alone = coefficients(TARGET, np.ones_like(TARGET), COMPONENTS[:1])
    np.testing.assert_allclose(got, np.tile(alone / 2, 2), rtol=1e-12)


def test_rows_and_targets_without_weight_are_not_looked_at():
    weight = np.ones_like(TARGET)
    weight[3], weight[5, 2] = 0, 0
    hidden = np.where(weight > 0, TARGET, np.nan)
    got = coefficients(hidden, weight, COMPONENTS)
    assert not got[3].any()
    np.testing.assert_array_equal(got, coefficients(np.where(weight > 0, TARGET, 7.0), weight, COMPONENTS))


def test_weights_in_fewer_bits_are_divided_in_float64():
    target, components = np.array([[1.0, 5.0, 9.0]]), np.array([[1.0, 0, 0], [0, 1.0, 1.0]])
    weights = np.array([[1e25, 1e-25, 3e-25]], np.float32)
    np.testing.assert_allclose(coefficients(target, weights, components), [[1, 8]], rtol=1e-6)
    half = np.asarray(jnp.array([[1, 3]], jnp.bfloat16))
    np.testing.assert_allclose(coefficients(np.array([[1.0, 2.0]]), half, np.ones((1, 2))), [[1.75]], rtol=1e-12)
