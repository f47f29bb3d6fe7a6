"""Random starts find the lowest of many minima, stop once it has been found twice, and say what they found."""

import functools

import jax
import numpy as np
import pytest

import wlra
from wlra.result import Restarts
from wlra.runners import ROUND, random_starts, tally

M, N, K = 9, 7, 2
rng = np.random.default_rng(0)
W, WEIGHTS = rng.normal(size=(M, N)).astype(np.float32), rng.exponential(size=(M, N)).astype(np.float32) ** 4
PLANTED = (rng.normal(size=(M, K)) @ rng.normal(size=(K, N))).astype(np.float32)


def solve(W, seed, weights=WEIGHTS, **options):
    options = {"method": "als", "tol": 1e-4} | options
    return wlra.solve(W, weights, K, restarts=2 * ROUND, key=jax.random.key(seed), **options)


def found(result) -> Restarts:
    return result.restarts


@functools.cache
def starts():
    return random_starts(jax.numpy.asarray(W), jax.numpy.asarray(WEIGHTS), K, count=2 * ROUND, key=jax.random.key(1))


@functools.cache
def alone():
    """The losses from the same starts, one by one."""
    pairs = [(left, right) for lefts, rights in starts() for left, right in zip(lefts, rights, strict=True)]
    return np.array([wlra.solve(W, WEIGHTS, K, method="als", start=pair, tol=1e-4).loss for pair in pairs])


def test_the_same_key_gives_the_same_bits():
    jax.tree.map(np.testing.assert_array_equal, solve(W, 1), solve(W, 1))


def test_a_key_without_restarts_is_refused():
    with pytest.raises(ValueError, match="key draws random starts: got it alone, wanted restarts=10 beside it"):
        wlra.solve(W, WEIGHTS, K, key=jax.random.key(0))


def test_another_key_gives_other_starts():
    assert solve(W, 1).history.loss[0] != solve(W, 2).history.loss[0]


def test_the_lowest_loss_of_all_starts_is_returned():
    result = solve(W, 1)
    lowest = alone()[: found(result).count.sum()].min()
    assert len(found(result).loss) > 1  # these weights have several minima
    np.testing.assert_allclose(result.loss, lowest, rtol=1e-5)  # tol**2 over the curvature, which sums in batches move
    assert result.loss == np.float32(found(result).loss[0])


def test_no_more_rounds_are_solved_once_the_lowest_loss_was_found_twice():
    result = solve(PLANTED, 1, weights=np.ones_like(W))  # every start ends at the one minimum
    assert found(result).count[0] >= 2
    assert found(result).count.sum() == ROUND


def test_all_starts_are_tried_while_no_loss_comes_twice():
    tried = found(solve(W, 1, max_iters=1))  # no start is anywhere near a minimum yet
    assert tried.count[0] == 1
    assert tried.count.sum() == 2 * ROUND
    assert (np.diff(tried.loss) > 0).all()


def test_random_products_are_as_large_as_the_target():
    left, right = (np.concatenate(part) for part in zip(*starts(), strict=True))
    assert left.shape == (2 * ROUND, M, K)
    products = left @ right
    # 630 entries of 20 products of normal numbers: their mean square is known to a tenth or so.
    assert np.sqrt(np.mean(products**2)) == pytest.approx(np.sqrt(np.mean(W**2)), rel=0.3)


def test_starts_ignore_targets_without_weight():
    holes, key = jax.numpy.asarray(WEIGHTS * (W > 0)), jax.random.key(0)
    got = random_starts(jax.numpy.asarray(np.where(W > 0, W, np.float32(np.nan))), holes, K, count=1, key=key)
    wanted = random_starts(jax.numpy.asarray(np.where(W > 0, W, 1e30)), holes, K, count=1, key=key)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert np.isfinite(got[0][0]).all()


def test_losses_within_the_resolution_are_counted_as_one():
    counted = tally(np.array([2.0, 1.0005, 3.0, 1.0, 2.0001, 1.001]), 1e-3)
    np.testing.assert_array_equal(counted.loss, [1, 2, 3])
    np.testing.assert_array_equal(counted.count, [3, 2, 1])


def test_losses_that_are_not_finite_come_last():
    counted = tally(np.array([np.inf, 0.5, np.inf]), 1e-3)
    np.testing.assert_array_equal(counted.loss, [0.5, np.inf])
    np.testing.assert_array_equal(counted.count, [1, 2])
