"""Weights of rows and columns as wholes: the closed form is that of the formula."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.random import default_rng
from reference import product

import wlra
from wlra import Kronecker, Status
from wlra.components import cut, decompose, lost

M, N, K = 10, 8, 3
EPS32, EPS = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))


def semidefinite(seed, size, rank=None):
    factor = default_rng(seed).normal(size=(size, rank or 2 * size))
    return factor @ factor.T


W, ROW, COL = default_rng(0).normal(size=(M, N)), semidefinite(1, M), semidefinite(2, N)
P, Q = default_rng(3).exponential(size=M), default_rng(4).exponential(size=N)
SINGULAR = Kronecker(semidefinite(5, M, 6), semidefinite(6, N, 5))
INDEFINITE, LOPSIDED = ROW - np.linalg.eigvalsh(ROW).mean() * np.eye(M), ROW + np.triu(ROW, 1)

solve = functools.partial(wlra.solve, rank=K, method="kronecker")


def assert_close(got, wanted, rtol):
    assert np.linalg.norm(got - wanted) <= rtol * np.linalg.norm(wanted)


def test_the_product_is_that_of_the_closed_form(x64):
    got = solve(W, Kronecker(ROW, COL))
    assert_close(product(got), reference.kronecker(W, ROW, COL, K), rtol=1e5 * EPS)  # roots of condition 10 and a gap


def test_float32_gives_the_closed_form_to_its_own_precision():
    got = solve(np.float32(W), Kronecker(np.float32(ROW), np.float32(COL)))
    assert_close(product(got), reference.kronecker(W, ROW, COL, K), rtol=1e3 * EPS32)  # roots of condition 10 and a gap


@pytest.mark.parametrize("weights", [Kronecker(ROW, COL), SINGULAR], ids=["regular", "singular"])
def test_the_loss_is_the_error_as_defined(weights, x64):
    got = solve(W, weights)
    wanted = reference.kronecker_loss(W, weights.row, weights.col, product(got))
    assert float(got.loss) == pytest.approx(wanted, rel=1e5 * EPS)  # condition of the roots


def test_the_status_says_that_it_is_a_closed_form_at_its_minimum(x64):
    got = solve(W, Kronecker(ROW, COL))
    assert got.status == Status.CONVERGED
    assert got.iterations == 0


def test_no_other_product_of_that_rank_has_a_lower_loss(x64):
    got, noise = solve(W, Kronecker(ROW, COL)), default_rng(7)
    for size in (1e-1, 1e-3) * 10:
        left = got.left + size * noise.normal(size=got.left.shape)
        right = got.right + size * noise.normal(size=got.right.shape)
        assert reference.kronecker_loss(W, ROW, COL, left @ right) > got.loss


def test_diagonal_factors_are_separable_weights(x64):
    got = solve(W, Kronecker(np.diag(P), np.diag(Q)))
    assert_close(product(got), reference.separable(W, P, Q, K), rtol=1e4 * EPS)  # roots of condition 10


def test_units_that_are_powers_of_two_change_no_bit_of_the_loss(x64):
    wanted, got = solve(W, Kronecker(ROW, COL)), solve(2.0**9 * W, Kronecker(2.0**-30 * ROW, 2.0**11 * COL))
    assert got.loss == wanted.loss
    np.testing.assert_array_equal(product(got), 2.0**9 * product(wanted))


def test_singular_factors_cost_no_more_than_their_closed_form(x64):
    got = solve(W, SINGULAR)
    wanted = reference.kronecker_loss(W, *SINGULAR, product=reference.kronecker(W, *SINGULAR, k=K))
    assert float(got.loss) == pytest.approx(wanted, rel=1e5 * EPS)  # condition of the roots on their range


def test_a_product_of_that_rank_is_recovered(x64):
    target = reference.eckart_young(W, K)
    assert_close(product(solve(target, Kronecker(ROW, COL))), target, rtol=1e4 * EPS)  # roots of condition 10


def test_a_batch_has_the_results_of_its_members(x64):
    targets = np.stack([W, 2 * W[::-1]])
    weights = Kronecker(np.stack([ROW, np.diag(P)]), np.stack([COL, np.diag(Q)]))
    got = wlra.solve_batch(targets, weights, K, method="kronecker")
    for i in range(2):
        wanted = reference.kronecker(targets[i], weights.row[i], weights.col[i], K)
        assert_close(np.asarray(got.left[i] @ got.right[i]), wanted, rtol=1e5 * EPS)  # as for one


def test_factors_broadcast_over_the_batch(x64):
    targets, one = np.stack([W, 2 * W[::-1]]), Kronecker(ROW[None], COL[None])
    both = Kronecker(np.stack([ROW, ROW]), np.stack([COL, COL]))
    got, wanted = (wlra.solve_batch(targets, weights, K, method="kronecker") for weights in (one, both))
    np.testing.assert_array_equal(got.loss, wanted.loss)


def spectral(seed, eigenvalues):
    """A positive semi-definite matrix of these eigenvalues and random eigenvectors."""
    vectors = np.linalg.qr(default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    gram = (vectors * eigenvalues) @ vectors.T
    return (gram + gram.T) / 2


def dominated(seed, size):
    """One eigenvalue is a million times the others."""
    return spectral(seed, np.append(1e6, default_rng(seed).uniform(0.1, 2, size - 1)))


def graded(seed, size):
    """The units of the rows are 7 decades apart, those of their squares 14."""
    units = np.logspace(0, -7, size)
    return units[:, None] * semidefinite(seed, size) * units


def deficient(seed, size):
    """Half of the eigenvalues are zero."""
    return semidefinite(seed, size, size // 2)


def decades(seed, size):
    return spectral(seed, np.logspace(0, -14, size))


HARD = {
    "a dominant eigenvalue in rows": (dominated, semidefinite),
    "in columns": (semidefinite, dominated),
    "in both": (dominated, dominated),
    "14 decades in rows": (decades, semidefinite),
    "in both, and": (decades, decades),
    "units 7 decades apart": (graded, dominated),
    "singular beside a dominant eigenvalue": (deficient, dominated),
}


class Cut(NamedTuple):
    left: Any
    right: Any
    loss: float


def assert_at_the_optimum(target, weights, got, rank, dtype):
    """The factors' loss in float64 is at most 0.1 % above the closed form's, where rounding lets the weights see it.

    Weights that rounding made indefinite are taken for the nearest that are not.
    """
    wide = [np.asarray(array, np.float64) for array in (target, *weights)]
    product = np.asarray(got.left, float) @ np.asarray(got.right, float)
    row, col = (vectors * np.sqrt(np.maximum(values, 0)) for values, vectors in map(np.linalg.eigh, wide[1:]))
    squares = np.linalg.svd(row.T @ wide[0] @ col, compute_uv=False) ** 2
    found = np.sum((row.T @ (wide[0] - product) @ col) ** 2)
    # Rounding errors on both sides, and sums of them.
    unseen = 1e4 * float(np.finfo(dtype).eps) ** 2 * float(np.sum(squares))
    assert found <= 1.001 * np.sum(squares[rank:]) + unseen
    # Sums of float32.
    assert float(got.loss) == pytest.approx(reference.kronecker_loss(*wide, product=product), rel=5e-3, abs=unseen)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("grams", HARD.values(), ids=HARD)
def test_what_lies_beside_large_eigenvalues_is_seen(grams, dtype, x64):
    weights = Kronecker(
        *(gram(seed, size).astype(dtype) for gram, seed, size in zip(grams, (1, 2), (M, N), strict=True))
    )
    assert_at_the_optimum(W.astype(dtype), weights, solve(W.astype(dtype), weights), K, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_lies_beside_large_eigenvalues_is_seen_at_all_ranks(dtype, x64):
    m, n, ranks = 96, 128, [1, 5, 13, 27, 41]
    target = default_rng(0).normal(size=(m, n)).astype(dtype)
    pairs = [(row(1, m).astype(dtype), col(2, n).astype(dtype)) for row, col in HARD.values() for _ in ranks]
    stacked = Kronecker(*map(np.stack, zip(*pairs, strict=True)))
    targets, every = np.stack([target] * len(pairs)), ranks * len(HARD)
    got = wlra.solve_batch(targets, stacked, max(ranks), ranks=every, method="kronecker")
    for i, rank in enumerate(every):
        one = got._replace(left=got.left[i], right=got.right[i], loss=got.loss[i])
        assert_at_the_optimum(target, pairs[i], one, rank, dtype)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("grams", HARD.values(), ids=HARD)
def test_what_lies_beside_large_eigenvalues_is_seen_by_one_decomposition_for_all_ranks(grams, flip):
    m, n, ranks = 48, 64, [1, 5, 13, 27]
    target = default_rng(0).normal(size=(m, n)).astype(np.float32)
    row, col = (gram(seed, size).astype(np.float32) for gram, seed, size in zip(grams, (1, 2), (m, n), strict=True))
    if flip:
        target, row, col = target.T, col, row
    found = decompose(target, row, col, rank=max(ranks))
    for rank in ranks:
        got = Cut(*cut(found, rank), loss=lost(found, rank))
        assert_at_the_optimum(target, Kronecker(row, col), got, rank, np.float32)


EASY = {"rank one": 1, "of half the rank": M // 2, "regular": 2 * M}


@pytest.mark.parametrize("power", [0, 60, -60])
@pytest.mark.parametrize("rank", EASY.values(), ids=EASY)
@pytest.mark.parametrize("flip", [False, True])
def test_components_are_those_of_the_closed_form_in_any_units(rank, flip, power):
    target, row, col = W.astype(np.float32), semidefinite(1, M, rank), semidefinite(2, N, rank)
    target[:, 2], row[3], row[:, 3] = 0, 0, 0  # a column of the target, and a row of the weights
    row, col = row.astype(np.float32), col.astype(np.float32)
    if flip:
        target, row, col = target.T, col, row
    scale = np.float32(2.0**power)
    found = decompose(target * scale, row * scale, col / scale, rank=K)
    exact = decompose(target.astype(float), row.astype(float), col.astype(float), rank=K)
    np.testing.assert_allclose(found.squares, exact.squares * float(scale) ** 2, rtol=1e-12)
    halves = [vectors * np.sqrt(np.maximum(values, 0)) for values, vectors in map(np.linalg.eigh, (row, col))]
    halves = [half.astype(float) for half in halves]
    for k in (1, 2, K):
        wanted = reference.eckart_young(halves[0].T @ target @ halves[1], k)
        got = halves[0].T @ (product(cut(found, k)) / float(scale)) @ halves[1]
        assert_close(got, wanted, rtol=3e-5)  # roots by an eigendecomposition in float32, and factors in float32
        loss = np.sum((halves[0].T @ target @ halves[1] - got) ** 2) / np.sum((halves[0].T @ target @ halves[1]) ** 2)
        assert lost(found, k) == pytest.approx(loss, rel=1e-5, abs=1e-9)


def test_there_are_no_components_beyond_the_rank():
    found = decompose(np.outer([1.0, 2, 3], [1.0, 2]).astype("f4"), np.eye(3), np.eye(2), rank=2)
    left, right = cut(found, 2)
    assert (left.shape, right.shape, lost(found, 1) < 1e-12) == ((3, 2), (2, 2), True)
    np.testing.assert_array_equal(left[:, 1], 0)


@pytest.mark.parametrize("flip", [False, True])
def test_values_that_a_decomposition_cannot_use_are_refused(flip):
    bad = {
        "NaN or infinite": (W, ROW, COL * np.nan),
        "semi-definite": (W, INDEFINITE, COL),
        "symmetric": (W, ROW, COL + np.triu(COL, 1)),
        "not zero": (W, 0 * ROW, COL),
        "weights are all zero": (W, 0 * P, Q),
        "negative": (W, P, Q - 1),
        "W has": (W * np.inf, P, Q),
    }
    for message, (target, row, col) in bad.items():
        given = (target.T, col, row) if flip else (target, row, col)
        with pytest.raises(ValueError, match=message):
            decompose(*given, rank=K)


REFUSED = {
    "row indefinite": (
        {"row": INDEFINITE},
        "weights.row must be symmetric positive semi-definite and not zero, and is not",
    ),
    "row not symmetric": ({"row": LOPSIDED}, "weights.row must be symmetric"),
    "col zero": ({"col": 0 * COL}, "weights.col must be symmetric positive semi-definite and not zero"),
    "col NaN": ({"col": COL * np.nan}, "weights.col has 64 NaN or infinite entries, the first nan at"),
    "row of another size": ({"row": COL}, r"weights.row must be \(10, 10\); got shape \(8, 8\)"),
    "a number": ({"row": np.float32(1)}, r"weights.row must be \(10, 10\); got shape \(\)"),
    "row of one column": ({"row": np.ones((10, 1), np.float32)}, r"weights.row must be \(10, 10\); got shape"),
    "col a vector": ({"col": Q}, r"weights.col must be \(8, 8\); got shape \(8,\)"),
    "complex col": ({"col": COL.astype(np.complex64)}, "weights.col must be real"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_factors_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        solve(np.float32(W), Kronecker(np.float32(ROW), np.float32(COL))._replace(**changes))


def test_nan_in_the_target_is_refused_anywhere():
    target = np.where(np.eye(M, N) > 0, np.nan, np.float32(W))
    with pytest.raises(ValueError, match=r"W has 8 NaN or infinite entries, .* Kronecker weights skip no entry"):
        solve(target, Kronecker(np.float32(ROW), np.float32(COL)))


@jax.jit
def traced(W, row, col):
    return solve(W, Kronecker(row, col))


BAD = {
    "NaN target": ((W * np.nan, ROW, COL), Status.INVALID_TARGET),
    "indefinite row": ((W, INDEFINITE, COL), Status.INVALID_WEIGHTS),
    "lopsided row": ((W, LOPSIDED, COL), Status.INVALID_WEIGHTS),
    "zero col": ((W, ROW, 0 * COL), Status.INVALID_WEIGHTS),
    "NaN col": ((W, ROW, COL * np.nan), Status.INVALID_WEIGHTS),
}


@pytest.mark.parametrize(("arrays", "status"), BAD.values(), ids=BAD)
def test_under_jit_a_status_says_the_same(arrays, status):
    assert traced(*map(np.float32, arrays)).status == status


@pytest.mark.parametrize(("arrays", "status"), BAD.values(), ids=BAD)
def test_under_jit_bad_values_give_finite_factors(arrays, status):
    result = traced(*map(np.float32, arrays))
    assert np.isfinite(result.left).all()
    assert np.isfinite(result.right).all()


@pytest.mark.parametrize("side", [[[1, 2], [2, 1]], [[1, 0], [0, -1]], [[1, 1], [1, 0]]])
@pytest.mark.parametrize("turned", [False, True])
def test_a_smaller_side_that_is_indefinite_is_refused(side, turned):
    target, weights = np.arange(6.0).reshape(2, 3) + np.eye(2, 3), Kronecker(np.array(side, float), np.eye(3))
    if turned:
        target, weights = target.T, Kronecker(weights.col, weights.row)
    with pytest.raises(ValueError, match="must be symmetric positive semi-definite"):
        wlra.solve(target, weights, 1, method="kronecker")


def test_sides_in_16_bits_are_judged_in_32():
    column = np.random.default_rng(0).normal(size=N)
    weights = Kronecker(jnp.eye(M, dtype=jnp.bfloat16), jnp.asarray(np.outer(column, column), jnp.bfloat16))
    assert wlra.solve(np.float32(W), weights, 1, method="kronecker").loss <= 1
