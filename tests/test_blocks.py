"""Problems that fall apart have the solutions of their blocks."""

import jax
import numpy as np
import pytest
import reference
from reference import product
from scipy.sparse import coo_array

import wlra
from wlra.blocks import blocks

M, N, K = 14, 12, 2
RNG = np.random.default_rng(0)
W = (RNG.normal(size=(M, K)) @ RNG.normal(size=(K, N)) + 0.3 * RNG.normal(size=(M, N))).astype(np.float32)
GROUP_OF_ROW, GROUP_OF_COLUMN = RNG.permutation(M) % 2, RNG.permutation(N) % 2
APART = (GROUP_OF_ROW[:, None] == GROUP_OF_COLUMN[None, :]).astype(np.float32)


def test_blocks_are_the_connected_components_of_the_positive_weights():
    found = blocks(APART)
    assert len(found) == 2
    for rows, cols in found:
        group = GROUP_OF_ROW[rows[0]]
        np.testing.assert_array_equal(rows, np.flatnonzero(group == GROUP_OF_ROW))
        np.testing.assert_array_equal(cols, np.flatnonzero(group == GROUP_OF_COLUMN))


def test_a_path_of_single_entries_is_one_block():
    staircase = (np.arange(M)[:, None] - np.arange(N)[None, :] == 0) | (np.arange(M)[:, None] - np.arange(N) == 1)
    (rows, cols), *rest = blocks(staircase.astype(np.float32))
    assert not rest
    assert (len(rows), len(cols)) == (N + 1, N)  # the last row has no entry


def best(rank=K):
    """The loss of the blocks' own singular value decompositions."""
    lost = sum(
        reference.loss(part, np.ones_like(part), reference.eckart_young(part, rank)) * (part.astype(float) ** 2).sum()
        for part in (W[np.ix_(rows, cols)] for rows, cols in blocks(APART))
    )
    return lost / (APART * W.astype(float) ** 2).sum()


def check_best(result, rank=K):
    assert result.status == wlra.Status.CONVERGED
    np.testing.assert_allclose(result.loss, best(rank), rtol=1e-5)  # an SVD in float32
    np.testing.assert_allclose(reference.loss(W, APART, product(result)), best(rank), rtol=1e-5)


def known():
    """The entries of the blocks, and none of the others."""
    rows, cols = np.nonzero(APART)
    return coo_array((W[rows, cols], (rows, cols)), shape=W.shape)


def test_each_block_is_solved_exactly():
    result = wlra.solve(np.where(APART > 0, W, np.nan), APART, K)
    check_best(result)
    assert result.history.loss.shape == (201,)
    np.testing.assert_allclose(result.history.loss[0], best(), rtol=1e-5)


def test_each_block_of_a_sparse_matrix_is_solved_exactly():
    check_best(wlra.solve(known(), None, K))


@pytest.mark.slow
def test_a_large_block_of_a_sparse_matrix_stays_sparse():
    m, n = 300, 270
    rows = np.concatenate([np.repeat(np.arange(m), 15), np.arange(m), [m + 1, m + 2, m + 2]])
    cols = np.concatenate([(7 * np.arange(15 * m)) % n, np.arange(m) % n, [n + 1, n + 1, n + 2]])
    places = np.unique(np.stack([rows, cols], axis=1), axis=0)
    numbers = 1 + np.random.default_rng(1).random(len(places)).astype(np.float32)
    sparse = coo_array((numbers, tuple(places.T)), shape=(m + 3, n + 3))
    dense, observed = np.zeros((2, m + 3, n + 3), np.float32)
    dense[tuple(places.T)], observed[tuple(places.T)] = numbers, 1
    assert [len(rows) for rows, _ in blocks(observed)] == [m, 2]
    result = wlra.solve(sparse, None, 1)
    np.testing.assert_allclose(result.loss, wlra.solve(dense, observed, 1).loss, rtol=1e-3)
    np.testing.assert_allclose(result.loss, reference.loss(dense, observed, product(result)), rtol=1e-5)
    apart = (result.left @ result.right)[m:, n:] * observed[m:, n:]
    np.testing.assert_allclose(apart, dense[m:, n:], rtol=1e-5)


@pytest.mark.parametrize("count", [60, 300])
def test_a_sparse_matrix_of_many_blocks_is_fitted_or_not_said_to_be(count):
    places, numbers = np.arange(count), np.arange(1, count + 1, dtype=np.float32)
    result = wlra.solve(coo_array((numbers, (places, places))), None, 1, max_iters=20)
    assert (result.status == wlra.Status.CONVERGED) == bool(result.loss < 1e-6)
    assert count > 256 or result.loss < 1e-6


def test_problems_of_a_batch_that_fall_apart_leave_their_saddles():
    result = wlra.solve_batch(np.stack([W, W]), np.stack([np.ones_like(APART), APART]), K)
    check_best(jax.tree.map(lambda leaf: leaf[1], result))


@pytest.mark.slow
def test_a_block_is_no_larger_than_the_whole():
    """Whose size a method may have a limit for."""
    weights = np.ones((140, 1000), np.float32)
    weights[130:, :900], weights[:130, 900:] = 0, 0
    target = np.random.default_rng(2).normal(size=weights.shape).astype(np.float32)
    result = wlra.solve(target, weights, 29, method="varpro", max_iters=1)
    assert np.isfinite(result.loss)


def test_what_vmap_traces_is_not_cut():
    start = wlra.solve(W, APART, K, max_iters=1)
    lefts, rights = (np.stack([factor, factor]) for factor in (start.left, start.right))
    losses = jax.vmap(lambda left, right: wlra.solve(W, APART, K, start=(left, right)).loss)(lefts, rights)
    np.testing.assert_allclose(losses, best(), rtol=1e-5)
    losses = jax.vmap(lambda tol: wlra.solve(W, APART, K, tol=tol).loss)(np.array([1e-3, 1e-4], np.float32))
    np.testing.assert_allclose(losses, best(), rtol=1e-5)


def test_random_starts_are_those_of_each_block():
    result = wlra.solve(W, APART, K, method="als", restarts=10, key=jax.random.key(0))
    check_best(result)
    assert result.restarts is not None
    np.testing.assert_allclose(result.restarts.loss, [best()], rtol=1e-5)
    assert result.restarts.count[0] >= 2


def test_a_solution_that_is_gone_on_from_is_cut_as_the_problem_is():
    alone = wlra.solve(W, APART, K)
    again = wlra.solve(W, APART, K, start=(alone.left, alone.right))
    check_best(again)
    assert again.iterations == 0


@pytest.mark.parametrize("target", [W, known()], ids=["dense", "sparse"])
def test_a_path_of_ranks_is_one_of_each_block(target):
    weights = APART if target is W else None
    result = wlra.solve_path(target, weights, [1, K])
    for i, rank in enumerate((1, K)):
        check_best(jax.tree.map(lambda leaf, i=i: leaf[i], result), rank)


@pytest.mark.parametrize("target", [W, known()], ids=["dense", "sparse"])
def test_under_jit_nothing_is_known_of_constants(target):
    weights = APART if target is W else None
    result = jax.jit(lambda: wlra.solve(target, weights, K, max_iters=3))()
    np.testing.assert_allclose(result.loss, reference.loss(W, APART, product(result)), rtol=1e-5)


def test_what_blocks_weigh_decides_their_share_of_the_loss():
    far = APART * np.where(GROUP_OF_ROW == 0, 1e-12, 1e12)[:, None].astype(np.float32)
    result = wlra.solve(W, far, K)
    np.testing.assert_allclose(result.loss, reference.loss(W, far, product(result)), rtol=1e-5)
    light = GROUP_OF_ROW[:, None] == 0
    alone = wlra.solve(W, APART, K)
    np.testing.assert_allclose(product(result) * (APART * light), product(alone) * (APART * light), atol=1e-4)
