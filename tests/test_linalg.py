"""Factorisations hold what their first lines say, for singular matrices too, and never give NaN."""

import jax
import numpy as np
import pytest
import reference
from reference import product

from wlra.linalg import batch
from wlra.linalg.batch import over_grams
from wlra.linalg.decompose import balance, square_root, subspace_step, truncated_svd
from wlra.linalg.gram import eliminated, gram_inverse, gram_solve, psd_inverse, tiny_solve
from wlra.problem import Factors
from wlra.units import balance_exactly

M, N, K = 12, 10, 3
EPS32, EPS = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))
rng = np.random.default_rng(0)
TARGET, LEFT, RIGHT, GRADIENT = (rng.normal(size=shape) for shape in [(M, N), (M, K), (K, N), (M, N)])
GAUGE = rng.normal(size=(K, K))

INVERSES = {
    "gram_inverse": gram_inverse,
    "eliminated": eliminated,
    "gram_solve": lambda gram, ridge: jax.vmap(lambda side: gram_solve(gram, side, ridge))(np.eye(len(gram))),
    "tiny_solve": lambda gram, ridge: jax.vmap(lambda side: tiny_solve(gram + ridge * np.eye(len(gram)), side))(
        np.eye(len(gram))
    ),
}

inverse = jax.jit(gram_inverse)
step = jax.jit(lambda gradient, left, right: subspace_step(gradient, Factors(left, right)))
svd = jax.jit(truncated_svd, static_argnames="rank")
balanced = jax.jit(lambda left, right: balance(Factors(left, right)))
evened = jax.jit(lambda left, right: balance_exactly(Factors(left, right)))
root_of = jax.jit(square_root)


def assert_close(got, wanted, ulps, eps=EPS):
    """Up to so many eps of the norm."""
    assert np.linalg.norm(got - wanted) <= ulps * eps * np.linalg.norm(wanted)


def graded(m, n, orders):
    """A matrix with singular values from 1 down to 10**-orders."""
    u, v = (np.linalg.qr(np.random.default_rng(size).normal(size=(size, min(m, n))))[0] for size in (m, n))
    return (u * np.logspace(0, -orders, min(m, n))) @ v.T


def test_gram_inverse_is_the_inverse_up_to_its_shift(x64):
    for gram in (RIGHT @ RIGHT.T, LEFT.T @ LEFT):
        # The condition number, some 10, times the shift, k eps, and rounding.
        assert_close(inverse(gram), np.linalg.inv(gram), ulps=1e3)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in INVERSES for size in (1, 7, 37)][:-1],  # 37 is halved unevenly; the last is unrolled
)
def test_every_inverse_is_that_of_numpy(name, size, ridge, x64):
    scales = np.logspace(-8, 8, size)  # rows of any units: only the unit-diagonal form counts
    factor = np.random.default_rng(3).normal(size=(size, 2 * size)) * np.sqrt(scales)[:, None]
    gram = factor @ factor.T
    got = np.asarray(jax.jit(INVERSES[name])(gram, ridge * scales.min()))
    wanted = np.linalg.inv(gram + ridge * scales.min() * np.eye(size))
    units = np.sqrt(np.diagonal(gram))
    # The condition number of the unit-diagonal form, some 100, times the shift, k eps, and rounding.
    assert_close(units[:, None] * got * units, units[:, None] * wanted * units, ulps=1e5)


def test_a_gram_matrix_that_rounding_has_left_indefinite_is_solved_with():
    """All rows have one direction: its shift is k eps, and errors of products may be more."""
    gram = np.ones((5, 5), np.float32) + np.float32(4e-6) * np.sign(rng.normal(size=(5, 5))).astype(np.float32)
    gram = (gram + gram.T) / 2
    assert np.linalg.eigvalsh(gram.astype(float))[0] < -5 * np.finfo(np.float32).eps
    got = jax.jit(gram_solve)(gram, gram @ np.ones(5, np.float32))
    np.testing.assert_allclose(gram @ got, gram @ np.ones(5), rtol=1e-3)


def test_pseudo_inverses_are_those_of_numpy(x64):
    gram = LEFT @ LEFT.T  # of rank K
    assert_close(jax.jit(psd_inverse)(gram), np.linalg.pinv(gram, rcond=1e-10), ulps=1e4)  # condition 10


@pytest.mark.parametrize("chunk", [1, 5])
def test_gram_matrices_in_chunks_give_what_they_give_at_once(chunk, monkeypatch, x64):
    weight = np.random.default_rng(4).uniform(size=(M, N))
    wanted = np.stack([np.linalg.solve((RIGHT * row) @ RIGHT.T, side) for row, side in zip(weight, LEFT, strict=True)])

    def together():
        return np.asarray(over_grams(gram_solve, *map(jax.numpy.asarray, (weight, RIGHT, LEFT))))

    assert_close(together(), wanted, ulps=1e5)  # the condition numbers, some 100, times the shift, k eps
    monkeypatch.setattr(batch, "CHUNK", chunk * K * (N + K))  # two chunks of 5 rows leave one of 2
    assert_close(together(), wanted, ulps=1e5)


@pytest.mark.parametrize("angle", [1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_gram_inverse_is_as_accurate_as_the_condition_allows(angle, x64):
    for seed in range(10):
        factor = RIGHT[:1] + angle * np.random.default_rng(seed).normal(size=(K, N))  # rows at about this angle
        gram = factor @ factor.T
        defect = np.linalg.norm(np.eye(K) - gram @ np.asarray(inverse(gram)))
        assert defect <= 100 * K * EPS * np.linalg.cond(gram)  # the shift is K eps, and rounding is as large


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["zero", "singular", "ones", "graded"])
def test_gram_inverse_of_a_singular_matrix_is_finite(kind, dtype, x64):
    factor = {"zero": 0 * RIGHT, "singular": np.vstack([RIGHT[:1]] * K), "ones": np.ones((K, N)), "graded": None}[kind]
    factor = np.logspace(0, -20, K)[:, None] * RIGHT if factor is None else factor
    gram = (factor @ factor.T).astype(dtype)
    assert np.isfinite(inverse(gram)).all()


def test_gram_inverses_of_a_batch_are_those_of_its_members(x64):
    gram = np.stack([RIGHT @ RIGHT.T, np.zeros((K, K))])
    # What is zero has no part in anything: ones stand for it, and the other knows nothing of them.
    got = jax.vmap(inverse)(gram)
    np.testing.assert_allclose(got[0], inverse(RIGHT @ RIGHT.T), rtol=64 * EPS)  # rounding of batched code
    np.testing.assert_allclose(got[1], np.eye(K) / (1 + K * EPS), rtol=64 * EPS)


def test_subspace_step_projects_on_the_span_of_the_mapped_rows(x64):
    Y = LEFT @ RIGHT + GRADIENT
    U = np.linalg.qr(Y @ RIGHT.T)[0]
    assert_close(product(step(GRADIENT, LEFT, RIGHT)), U @ U.T @ Y, ulps=1e4)  # two Gram matrices of condition 100


def test_subspace_step_is_free_of_gauge(x64):
    wanted = product(step(GRADIENT, LEFT, RIGHT))
    got = step(GRADIENT, LEFT @ GAUGE, np.linalg.solve(GAUGE, RIGHT))
    assert_close(product(got), wanted, ulps=1e6)  # the gauge squares into the Gram matrices' condition


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subspace_step_leaves_the_best_approximation_as_it_is(dtype, x64):
    u, s, vt = np.linalg.svd(TARGET)
    left, right = (u[:, :K] * s[:K] @ GAUGE).astype(dtype), np.linalg.solve(GAUGE, vt[:K]).astype(dtype)
    gradient = TARGET.astype(dtype) - left @ right
    moved = step(gradient, left, right)
    # The gradient is orthogonal to both factors up to rounding, which the Gram matrices' condition enlarges.
    assert_close(moved.left, left, ulps=1e3, eps=float(np.finfo(dtype).eps))
    assert_close(moved.right, right, ulps=1e3, eps=float(np.finfo(dtype).eps))


def test_subspace_step_of_ill_conditioned_factors_is_finite_in_float32():
    size, rank = 384, 150
    left, right = graded(size, rank, 12).astype(np.float32), graded(rank, size, 12).astype(np.float32)
    gradient = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    moved = step(gradient, left, right)
    assert np.isfinite(moved.left).all()
    assert np.isfinite(moved.right).all()


@pytest.mark.parametrize("zero", ["left", "right", "both"])
def test_subspace_step_of_zeros_is_finite(zero):
    left, right = (0 if zero in ("left", "both") else 1) * LEFT, (0 if zero in ("right", "both") else 1) * RIGHT
    moved = step(*(array.astype(np.float32) for array in (GRADIENT, left, right)))
    assert np.isfinite(moved.left).all()
    assert np.isfinite(moved.right).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_truncated_svd_is_the_best_approximation(dtype, x64):
    got = product(svd(TARGET.astype(dtype), rank=K))
    assert_close(got, reference.eckart_young(TARGET, K), ulps=256, eps=float(np.finfo(dtype).eps))  # 1 over the gap


def test_truncated_svd_shares_the_singular_values_evenly(x64):
    left, right = svd(TARGET, rank=K)
    wanted = np.linalg.svd(TARGET)[1][:K]
    np.testing.assert_allclose(np.linalg.norm(left, axis=0) ** 2, wanted, rtol=256 * EPS)  # 1 over the gap
    np.testing.assert_allclose(np.linalg.norm(right, axis=1) ** 2, wanted, rtol=256 * EPS)


def test_truncated_svd_keeps_small_rows_and_columns_to_their_own_precision():
    rows, columns = np.logspace(-6, 0, M), np.logspace(-6, 0, N)
    matrix = (rows[:, None] * (LEFT @ RIGHT) * columns[None, :]).astype(np.float32)
    error = product(svd(matrix, rank=K)) - matrix
    for axis in (0, 1):  # LAPACK's own errors are a million eps here: eps of the largest row and column
        assert (np.linalg.norm(error, axis=axis) <= 64 * EPS32 * np.linalg.norm(matrix, axis=axis)).all()


def test_truncated_svd_of_zeros_is_zero():
    left, right = svd(np.zeros((M, N), np.float32), rank=K)
    np.testing.assert_array_equal(left @ right, 0)


def test_balanced_factors_have_the_same_product_and_equal_diagonal_gram_matrices(x64):
    left, right = balanced(LEFT, RIGHT)
    values = np.linalg.svd(LEFT @ RIGHT)[1][:K]
    assert_close(product((left, right)), LEFT @ RIGHT, ulps=64)  # orthogonal transformations
    assert_close(left.T @ left, np.diag(values), ulps=64)
    assert_close(right @ right.T, np.diag(values), ulps=64)


@pytest.mark.parametrize("zero", ["left", "right", "both", "one component"])
def test_balancing_gives_right_full_rank_and_keeps_the_product(zero):
    keep = np.arange(K) > 0 if zero == "one component" else np.zeros(K)
    left = (LEFT * keep).astype(np.float32) if zero != "right" else LEFT.astype(np.float32)
    right = (RIGHT * keep[:, None]).astype(np.float32) if zero != "left" else RIGHT.astype(np.float32)
    got = balanced(left, right)
    assert np.linalg.matrix_rank(np.float64(got.right), tol=EPS32) == K
    np.testing.assert_allclose(product(got), product((left, right)), atol=64 * EPS32)  # entries of about 1


def test_evening_out_changes_no_bit_of_the_product(x64):
    left, right = LEFT.astype(np.float32) * np.array([1e-10, 1, 1e5], np.float32), RIGHT.astype(np.float32)
    np.testing.assert_array_equal(product(evened(left, right)), product((left, right)))


def test_evened_out_components_are_equally_large_to_a_factor_of_two():
    left, right = LEFT.astype(np.float32), RIGHT.astype(np.float32)
    for exponents in np.random.default_rng(2).integers(-20, 20, (20, K)):
        one, other = evened(np.ldexp(left, exponents), right)
        ratio = np.abs(one).max(0) / np.abs(other).max(1)
        assert ((ratio >= 1 / 2) & (ratio <= 2)).all()


def test_evening_out_leaves_zero_components_alone():
    left, right = LEFT.astype(np.float32) * np.array([0, 1, 1], np.float32), RIGHT.astype(np.float32)
    assert not np.asarray(evened(left, right).left)[:, 0].any()
    np.testing.assert_array_equal(evened(left, right).right[0], right[0])


@pytest.mark.parametrize("rank", [N, K, 0])
def test_square_root_times_its_transpose_is_the_matrix(rank, x64):
    units = np.logspace(0, -12, N)  # rows of any units have their own relative accuracy
    factor = units[:, None] * TARGET.T[:, :rank]
    root = np.asarray(root_of(factor @ factor.T)) / units[:, None]
    factor = factor / units[:, None]
    assert_close(root @ root.T, factor @ factor.T, ulps=64)  # an eigendecomposition and a product


def test_square_root_takes_negative_eigenvalues_for_zero(x64):
    shifted = TARGET.T[:, :K] @ TARGET.T[:, :K].T - 1e-9 * np.eye(N)
    root = np.asarray(root_of(shifted))
    np.testing.assert_allclose(root @ root.T, shifted, atol=1e-8)  # N of them, of 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_chunks_give_what_all_at_once_give_from_one_loop(size):
    numbers = np.arange(7, dtype=np.float32)
    vectors = rng.normal(size=(7, 2)).astype(np.float32)
    calls = []

    def one(arrays):
        number, vector = arrays
        calls.append(number)
        return number * vector, number

    compute = jax.jit(lambda *arrays: batch.in_chunks(one, arrays, size)).lower(numbers, vectors).compile()
    products, same = compute(numbers, vectors)
    np.testing.assert_array_equal(products, numbers[:, None] * vectors)
    np.testing.assert_array_equal(same, numbers)
    assert len(calls) == 1  # no chunk of another size
