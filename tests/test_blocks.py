"""Problems that fall apart have the solutions of their blocks."""

import numpy as np
import reference
from reference import product

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


def test_each_block_is_solved_exactly():
    best = (
        sum(
            reference.loss(part, np.ones_like(part), reference.eckart_young(part, K)) * (part.astype(float) ** 2).sum()
            for part in (W[np.ix_(rows, cols)] for rows, cols in blocks(APART))
        )
        / (APART * W.astype(float) ** 2).sum()
    )
    result = wlra.solve(np.where(APART > 0, W, np.nan), APART, K)
    assert result.status == wlra.Status.CONVERGED
    np.testing.assert_allclose(result.loss, best, rtol=1e-5)  # an SVD in float32
    np.testing.assert_allclose(reference.loss(W, APART, product(result)), best, rtol=1e-5)
    assert result.history.loss.shape == (201,)
    np.testing.assert_allclose(result.history.loss[0], best, rtol=1e-5)


def test_what_blocks_weigh_decides_their_share_of_the_loss():
    far = APART * np.where(GROUP_OF_ROW == 0, 1e-12, 1e12)[:, None].astype(np.float32)
    result = wlra.solve(W, far, K)
    np.testing.assert_allclose(result.loss, reference.loss(W, far, product(result)), rtol=1e-5)
    light = GROUP_OF_ROW[:, None] == 0
    alone = wlra.solve(W, APART, K)
    np.testing.assert_allclose(product(result) * (APART * light), product(alone) * (APART * light), atol=1e-4)
