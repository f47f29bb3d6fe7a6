"""A batch has the results of its members, however it is cut into chunks."""

import functools

import jax
import numpy as np
import pytest
import reference
from contract import (
    COLUMNS,
    PAIR,
    PLANTED,
    ROWS,
    SINGLE,
    STARTS,
    TOL,
    WEIGHTS,
    K,
    M,
    N,
    Results,
    W,
    assert_same_loss,
    cases,
    example,
    normal,
    results,
    solve_all,
)
from reference import product

import wlra

PERMUTED = W[ROWS][:, COLUMNS], WEIGHTS[ROWS][:, COLUMNS]
ONES = np.ones_like(W)
MAPPED = ("separable", "anderson")  # the rest is slow


@functools.cache
def problems():
    """Four problems with their starts."""
    start = example()["separable"][:2]
    return [(W, WEIGHTS, start), (W, WEIGHTS, PAIR), (*PERMUTED, PAIR), (W, ONES, PAIR)]


@functools.cache
def members():
    """Their results, solved one by one in the program of the contract."""
    return [example(), example("pair"), *(results(*problem) for problem in problems()[2:])]


def stacked(*leaves):
    return np.stack(leaves)


BATCH = 4
TARGETS, BATCH_WEIGHTS = normal(20, BATCH, M, N), np.exp(normal(21, BATCH, M, N))


@functools.partial(jax.jit, static_argnames="names")
def map_all(W, weights, start, names):
    return jax.vmap(functools.partial(solve_all, rank=K, names=names))(W, weights, start)


@functools.cache
def mapped():
    batch = jax.tree.map(stacked, *problems())
    return Results(lambda names: jax.tree.map(np.asarray, map_all(*batch, names)), SINGLE, MAPPED)


def looped(name):
    return jax.tree.map(stacked, *(results[name] for results in members()))


CHUNKS = [3, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (BATCH, 1))]  # 3 leaves one of four over


@functools.cache
def chunked(chunk):
    W, weights, start = jax.tree.map(stacked, *problems())
    return jax.tree.map(np.asarray, wlra.solve_batch(W, weights, K, method="als", start=start, tol=TOL, chunk=chunk))


@pytest.mark.parametrize("name", cases(SINGLE, MAPPED))
def test_mapping_gives_the_shapes_of_the_loop(name):
    assert jax.tree.map(np.shape, mapped()[name]) == jax.tree.map(np.shape, looped(name))


@pytest.mark.parametrize("name", cases(SINGLE, MAPPED))
def test_mapping_gives_the_first_losses_of_the_loop(name):
    # Batched sums differ by rounding, which the first iterations do not yet amplify.
    assert_same_loss(mapped()[name].history.loss[:, :4], looped(name).history.loss[:, :4])


@pytest.mark.parametrize("name", cases(SINGLE, MAPPED))
def test_mapping_gives_the_last_losses_of_the_loop(name):
    np.testing.assert_allclose(mapped()[name].loss, looped(name).loss, rtol=1e-5)  # tol**2 over the curvature


@pytest.mark.parametrize("name", cases(["als", *STARTS], MAPPED))
def test_mapping_takes_the_iterations_of_the_loop(name):
    # At most one more or less, where a stationarity meets tol up to rounding.
    np.testing.assert_allclose(mapped()[name].iterations, looped(name).iterations, atol=1)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_give_the_losses_of_the_loop(chunk):
    np.testing.assert_allclose(chunked(chunk).loss, looped("als").loss, rtol=1e-5)  # tol**2 over the curvature


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_come_back_in_order(chunk):
    first = chunked(chunk).history.loss[:, 0]
    assert_same_loss(first, looped("als").history.loss[:, 0])
    assert len(set(first)) == BATCH


@pytest.mark.slow
def test_a_chunk_of_one_solves_as_if_alone():
    np.testing.assert_allclose(
        chunked(1).iterations, looped("als").iterations, atol=1
    )  # where a stationarity meets tol up to rounding


def test_finished_lanes_do_not_move():
    starts = tuple(np.stack([part] * BATCH) for part in PAIR)
    alone = map_all(np.stack([PLANTED] * BATCH), np.stack([ONES] * BATCH), starts, MAPPED)["anderson"]
    beside = map_all(np.stack([PLANTED, *TARGETS[1:]]), np.stack([ONES, *BATCH_WEIGHTS[1:]]), starts, MAPPED)[
        "anderson"
    ]
    assert beside.iterations[0] < beside.iterations[1:].min()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), beside, alone)


@pytest.mark.parametrize("shape", [(), (BATCH, 1, 1), (1, M, N), (1, M, 1), (BATCH, 1, N)])
def test_weights_broadcast_over_the_batch(shape):
    weights = np.exp(normal(4, *shape))
    got = wlra.solve_batch(TARGETS, weights, K, method="separable")
    wanted = wlra.solve_batch(TARGETS, np.broadcast_to(weights, TARGETS.shape), K, method="separable")
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_every_problem_goes_on_from_its_own_pair():
    before = wlra.solve_batch(TARGETS, BATCH_WEIGHTS, K, method="separable")
    result = wlra.solve_batch(TARGETS, BATCH_WEIGHTS, K, method="als", start=(before.left, before.right))
    assert_same_loss(result.history.loss[:, 0], before.loss)
    assert (np.asarray(result.loss) < np.asarray(before.loss)).all()


@jax.jit
def statuses(W, weights):
    return wlra.solve_batch(W, weights, K, method="separable").status


def test_every_problem_has_its_own_status():
    targets = np.stack([PLANTED, TARGETS[1], TARGETS[2] * np.nan, TARGETS[3]])
    got = statuses(targets, np.stack([ONES, *BATCH_WEIGHTS[1:3], -BATCH_WEIGHTS[3]]))
    wanted = ["CONVERGED", "CLOSED_FORM", "INVALID_TARGET", "INVALID_WEIGHTS"]
    assert [wlra.Status(int(status)).name for status in got] == wanted


RANKS = (1, 4, 2)
RANKED = ("separable", "als")
# Every method at a rank between, one of them at the ends.
ALONE = [(name, 2) for name in RANKED] + [pytest.param("als", rank, marks=pytest.mark.slow) for rank in (1, 4)]


@jax.jit
def in_one_batch(W, weights):
    """Each method's results of problems with ranks of their own, in one program."""
    return {name: wlra.solve_batch(W, weights, 4, method=name, ranks=RANKS, max_iters=5) for name in RANKED}


RANKED_PROBLEMS = TARGETS[:3, :9, :7], BATCH_WEIGHTS[:3, :9, :7]


@functools.cache
def ranked():
    return jax.tree.map(np.asarray, in_one_batch(*RANKED_PROBLEMS))


@pytest.mark.parametrize(("method", "rank"), ALONE)
def test_ranks_of_their_own_are_those_of_single_solves(method, rank):
    place = RANKS.index(rank)
    W, weights = (arrays[place] for arrays in RANKED_PROBLEMS)
    alone = wlra.solve(W, weights, rank, method=method, max_iters=5)
    np.testing.assert_allclose(ranked()[method].loss[place], alone.loss, rtol=2e-3)  # five steps apart in rounding


@pytest.mark.parametrize("method", RANKED)
def test_factors_are_zero_beyond_ranks_of_their_own(method):
    batch = ranked()[method]
    for left, right, rank in zip(batch.left, batch.right, RANKS, strict=True):
        assert not left[:, rank:].any()
        assert not right[rank:].any()
        assert np.linalg.matrix_rank(left @ right, tol=1e-4) == rank


def test_ranks_of_their_own_are_those_of_single_closed_forms_for_kronecker_weights():
    rng = np.random.default_rng(4)
    W = rng.normal(size=(3, 9, 7)).astype(np.float32)
    row, col = (np.stack([np.cov(rng.normal(size=(n, 40))) for _ in range(3)]).astype(np.float32) for n in (9, 7))
    batch = wlra.solve_batch(W, wlra.Kronecker(row, col), 4, method="kronecker", ranks=RANKS)
    for i, rank in enumerate(RANKS):
        wanted = reference.kronecker_loss(W[i], row[i], col[i], reference.kronecker(W[i], row[i], col[i], rank))
        np.testing.assert_allclose(batch.loss[i], wanted, rtol=1e-4)  # roots of matrices in float32
        np.testing.assert_allclose(
            reference.kronecker_loss(W[i], row[i], col[i], product((batch.left[i], batch.right[i]))), wanted, rtol=1e-4
        )
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
