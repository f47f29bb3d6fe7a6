"""A batch has the results of its members, however it is cut into chunks."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import wlra
from wlra.methods import METHODS, PUBLISHED
from wlra.methods.closed import STARTS

BATCH, M, N, K = 4, 8, 6, 1
EPS = float(np.finfo(np.float32).eps)
SINGLE = [name for name in METHODS if name != "auto"]  # which is slow to compile, and three of the others in turn
TABLE: dict[str, Any] = {name: {"method": name} for name in (*STARTS, *SINGLE)} | {
    f"{name} by svd": {"method": name, "projection": "svd"} for name in PUBLISHED
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, WEIGHTS = normal(0, BATCH, M, N), np.exp(normal(1, BATCH, M, N))
EASY = normal(2, M, K) @ normal(3, K, N)


@jax.jit
def solve_all(W, weights):
    """One program for the whole table: it compiles in half the time of one for each method."""
    return {name: wlra.solve(W, weights, K, **options) for name, options in TABLE.items()}


map_all = jax.jit(jax.vmap(solve_all))


@functools.cache
def mapped():
    return jax.tree.map(np.asarray, map_all(W, WEIGHTS))


@functools.cache
def looped():
    members = [solve_all(*member) for member in zip(W, WEIGHTS, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


@functools.cache
def chunked(chunk):
    return jax.tree.map(np.asarray, wlra.solve_batch(W, WEIGHTS, K, method="em", chunk=chunk))


def assert_same_loss(got, wanted):
    """The root of the loss is a relative distance: rounding in sums of a few terms moves it by some eps."""
    np.testing.assert_allclose(np.sqrt(np.float64(got)), np.sqrt(np.float64(wanted)), rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("name", TABLE)
def test_mapping_gives_the_shapes_of_the_loop(name):
    assert jax.tree.map(np.shape, mapped()[name]) == jax.tree.map(np.shape, looped()[name])


@pytest.mark.parametrize("name", TABLE)
def test_mapping_gives_the_first_losses_of_the_loop(name):
    # Batched sums differ by rounding, which the first iterations do not yet amplify.
    assert_same_loss(mapped()[name].history.loss[:, :4], looped()[name].history.loss[:, :4])


@pytest.mark.parametrize("name", TABLE)
def test_mapping_gives_the_last_losses_of_the_loop(name):
    np.testing.assert_allclose(mapped()[name].loss, looped()[name].loss, rtol=1e-5)  # tol**2 over the curvature


@pytest.mark.parametrize("name", ["als", *STARTS])
def test_mapping_takes_the_iterations_of_the_loop(name):
    # At most one more or less, where a stationarity meets tol up to rounding.
    np.testing.assert_allclose(mapped()[name].iterations, looped()[name].iterations, atol=1)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_chunks_give_the_losses_of_the_loop(chunk):
    np.testing.assert_allclose(chunked(chunk).loss, looped()["em"].loss, rtol=1e-5)  # tol**2 over the curvature


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_chunks_come_back_in_order(chunk):
    first = chunked(chunk).history.loss[:, 0]
    assert_same_loss(first, looped()["em"].history.loss[:, 0])
    assert len(set(first)) == BATCH


def test_a_chunk_of_one_solves_as_if_alone():
    np.testing.assert_allclose(chunked(1).iterations, looped()["em"].iterations, rtol=0.1)  # EM stalls at rounding


def test_a_chunk_above_the_batch_is_the_batch():
    jax.tree.map(np.testing.assert_array_equal, wlra.solve_batch(W, WEIGHTS, K, method="em", chunk=99), chunked(None))


def test_finished_lanes_do_not_move():
    ones = np.ones_like(W)
    alone = map_all(np.stack([EASY] * BATCH), ones)["anderson"]
    beside = map_all(np.stack([EASY, *W[1:]]), np.stack([ones[0], *WEIGHTS[1:]]))["anderson"]
    assert beside.iterations[0] < beside.iterations[1:].min()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), beside, alone)


@pytest.mark.parametrize("shape", [(), (BATCH, 1, 1), (1, M, N), (1, M, 1), (BATCH, 1, N)])
def test_weights_broadcast_over_the_batch(shape):
    weights = np.exp(normal(4, *shape))
    got = wlra.solve_batch(W, weights, K, method="separable")
    wanted = wlra.solve_batch(W, np.broadcast_to(weights, W.shape), K, method="separable")
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_every_problem_goes_on_from_its_own_pair():
    before = wlra.solve_batch(W, WEIGHTS, K, method="separable")
    result = wlra.solve_batch(W, WEIGHTS, K, method="em", start=(before.left, before.right))
    assert_same_loss(result.history.loss[:, 0], before.loss)
    assert (np.asarray(result.loss) < np.asarray(before.loss)).all()


@jax.jit
def statuses(W, weights):
    return wlra.solve_batch(W, weights, K, method="separable").status


def test_every_problem_has_its_own_status():
    got = statuses(np.stack([EASY, W[1], W[2] * np.nan, W[3]]), np.stack([*WEIGHTS[:3], -WEIGHTS[3]]))
    wanted = ["CONVERGED", "CLOSED_FORM", "INVALID_TARGET", "INVALID_WEIGHTS"]
    assert [wlra.Status(int(status)).name for status in got] == wanted


@pytest.mark.parametrize("method", ["separable", "svd", "em", "nesterov", "anderson", "als"])
def test_ranks_of_their_own_are_those_of_single_solves(method):
    rng = np.random.default_rng(3)
    W, weights = rng.normal(size=(3, 9, 7)).astype(np.float32), np.exp(rng.normal(size=(3, 9, 7))).astype(np.float32)
    ranks = [1, 4, 2]
    batch = wlra.solve_batch(W, weights, 4, method=method, ranks=ranks, max_iters=5)
    for i, rank in enumerate(ranks):
        alone = wlra.solve(W[i], weights[i], rank, method=method, max_iters=5)
        np.testing.assert_allclose(batch.loss[i], alone.loss, rtol=2e-3)  # five steps apart in rounding
        assert not np.any(batch.left[i][:, rank:])
        assert not np.any(batch.right[i][rank:])
        product = np.asarray(batch.left[i] @ batch.right[i])
        assert np.linalg.matrix_rank(product, tol=1e-4) == rank


def test_ranks_of_their_own_are_those_of_single_solves_for_kronecker_weights():
    rng = np.random.default_rng(4)
    W = rng.normal(size=(3, 9, 7)).astype(np.float32)
    row, col = (np.stack([np.cov(rng.normal(size=(n, 40))) for _ in range(3)]).astype(np.float32) for n in (9, 7))
    batch = wlra.solve_batch(W, wlra.Kronecker(row, col), 4, method="kronecker", ranks=[1, 4, 2])
    for i, rank in enumerate((1, 4, 2)):
        alone = wlra.solve(W[i], wlra.Kronecker(row[i], col[i]), rank, method="kronecker")
        np.testing.assert_allclose(batch.loss[i], alone.loss, rtol=1e-4)  # roots of matrices in float32
        assert not np.any(batch.left[i][:, rank:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": [1, 2]}, r"ranks must be \(3,\) whole numbers; got int64 of shape \(2,\)"),
        ({"ranks": [1.0, 2.0, 3.0]}, "whole numbers; got float64"),
        ({"ranks": [0, 2, 3]}, "from 1 to rank, 3; got 0 to 3"),
        ({"ranks": [1, 2, 4]}, "from 1 to rank, 3; got 1 to 4"),
        ({"ranks": [1, 2, 3], "method": "newton"}, "ranks needs .*; got 'subspace' and 'newton'"),
        ({"ranks": [1, 2, 3], "projection": "svd"}, "ranks needs projection='subspace'"),
    ],
)
def test_ranks_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wlra.solve_batch(np.ones((3, 9, 7), np.float32), None, 3, **options)
