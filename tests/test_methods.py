"""The contract: what holds for every method. A method added to the registry takes part without a line here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from contract import (
    CLOSED_FORMS,
    COLUMNS,
    EPS,
    ITERATIONS,
    KINDS,
    MASK,
    PAIR,
    PLANTED,
    ROWS,
    SINGLE,
    STARTS,
    STEPS,
    TABLE,
    TOL,
    WEIGHTS,
    K,
    M,
    N,
    P,
    Q,
    W,
    assert_same_loss,
    cases,
    example,
    minimum,
    normal,
    results,
)
from reference import product

import wlra
from wlra.methods.sweeps import als
from wlra.problem import Factors, Problem

EXACT = 4 * K * (8 * EPS) ** 2  # the relative squared error that rounding K terms of an entry leaves, twice as large


DOUBLE = ("separable", "svd")  # what is quick in float64 and of other shapes: test_penalty, test_properties do the rest


@functools.cache
def planted():
    return results(PLANTED, WEIGHTS, PAIR)


@functools.cache
def planted_in_float64():
    target = reference.eckart_young(PLANTED.T, K)  # the rank of a float32 product is K up to rounding only
    return target, results(target, WEIGHTS.T.astype(np.float64), names=STEPS, quick=DOUBLE)


@functools.cache
def completed():
    return results(np.where(MASK > 0, PLANTED, np.float32(np.nan)), MASK)


@functools.cache
def again():
    return results(W, WEIGHTS)


@functools.cache
def thirty_orders():
    return results(W, WEIGHTS * np.logspace(-30, 0, M, dtype=np.float32)[:, None])


@functools.cache
def started_at(factor):
    return results(W, WEIGHTS, (np.float32(factor) * PAIR[0], np.float32(factor) * PAIR[1]))


@functools.cache
def permuted():
    return results(W[ROWS][:, COLUMNS], WEIGHTS[ROWS][:, COLUMNS])


@functools.cache
def transposed():
    return results(W.T.astype(np.float64), WEIGHTS.T.astype(np.float64), names=STEPS, quick=DOUBLE)


@functools.cache
def masked(fill):
    return results(np.where(MASK > 0, W, np.float32(fill)), MASK)


@functools.cache
def equal_weights():
    return results(W, np.ones_like(W), PAIR)


@functools.cache
def row_weights(zero):
    weights = np.broadcast_to(np.where(np.arange(M) == zero, 0, P)[:, None], W.shape)
    return results(W, weights), reference.fwsvd(W, weights, K)


@functools.cache
def separable_weights(zero):
    row, col = np.where(np.arange(M) == zero, 0, P), np.where(np.arange(N) == zero, 0, Q)
    return results(W, np.outer(row, col)), reference.separable(W, row, col, K)


@functools.cache
def in_units(target, weight):
    return results(np.ldexp(W, target), np.ldexp(WEIGHTS, weight))


EXTREME = {(4, 3, 3): DOUBLE, (1, 1, 1): DOUBLE}  # by shape and rank, what is quick
EXTREMES = [
    pytest.param(name, shape, marks=() if name in quick else pytest.mark.slow)
    for shape, quick in EXTREME.items()
    for name in SINGLE
]


@functools.cache
def of_shape(m, n, rank):
    W, weights = normal(11, m, n), np.exp(normal(12, m, n))
    return W, weights, results(W, weights, rank=rank, names=SINGLE, quick=EXTREME[m, n, rank])


def assert_same_product(got, wanted, ulps=256):
    """Singular vectors are known to eps over the relative gap of their values, here 1/100 or more."""
    assert np.linalg.norm(got - wanted) <= ulps * EPS * np.linalg.norm(wanted)


def assert_finite(result):
    assert all(np.isfinite(leaf).all() for leaf in result[:6])


DTYPES = [
    ("bfloat16", "bool"),
    ("float32", "float32"),
    ("float64", "float64"),
    ("float32", "float64"),
    ("float64", "bfloat16"),
    ("float16", "int32"),
    ("int32", "float16"),
]
# The rule is one function for all; that every method keeps to it shows where the factors are cast back.
TYPED = [
    *[(name, *DTYPES[0]) for name in KINDS],
    *[pytest.param(name, *DTYPES[0], marks=pytest.mark.slow) for name in TABLE if name not in KINDS],
    *[("separable", *pair) for pair in DTYPES[1:]],
    *[pytest.param("anderson", *pair, marks=pytest.mark.slow) for pair in DTYPES[1:]],
]


@pytest.mark.parametrize(("name", "dtype", "weights_dtype"), TYPED)
def test_factors_have_the_dtype_of_the_target_and_all_else_the_widest_dtype(name, dtype, weights_dtype, x64):
    arrays = jnp.zeros((M, N), dtype), jnp.zeros((M, N), weights_dtype)
    result = jax.eval_shape(lambda W, weights: wlra.solve(W, weights, K, max_iters=7, **TABLE[name]), *arrays)
    solver = "float64" if {"float64", "int32"} & {dtype, weights_dtype} else "float32"  # which does not hold integers
    factors = "float64" if dtype == "int32" else dtype
    steps = (1 if name in CLOSED_FORMS else 8,)
    assert [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(result)] == [
        ((M, K), factors),
        ((K, N), factors),
        ((), solver),
        ((), solver),
        ((), "int32"),
        ((), "int32"),
        (steps, solver),
        (steps, solver),
        ((), solver),
    ]


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_closed_form_ends_after_no_iteration(name):
    result = example()[name]
    assert result.status == wlra.Status.CLOSED_FORM
    assert result.iterations == 0
    assert result.history.loss.shape == (1,)


@pytest.mark.parametrize("name", cases(TABLE))
def test_the_loss_reported_is_the_loss_of_the_factors(name):
    result = example()[name]
    assert_same_loss(result.loss, reference.loss(W, WEIGHTS, product(result)))


@pytest.mark.parametrize("start", [*STARTS, "pair"])
@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_no_result_is_worse_than_its_start(name, start):
    before = PAIR[0] @ PAIR[1] if start == "pair" else product(example()[start])
    allowed = np.sqrt(reference.loss(W, WEIGHTS, before)) + 32 * EPS  # rounding, as in assert_same_loss
    assert np.sqrt(reference.loss(W, WEIGHTS, product(example(start)[name]))) <= allowed


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_every_iteration_reaches_the_minimum_of_exact_least_squares(name):
    # tol = 1e-4 bounds the excess by tol**2 over the curvature; EM stops 10 times earlier, at float32's idea of a fall.
    np.testing.assert_allclose(example()[name].loss, minimum(), rtol=1e-5)


@pytest.mark.parametrize("name", cases(["em", "als", "em by svd"]))
def test_iterations_without_acceleration_never_raise_the_loss(name):
    losses = example("pair")[name].history.loss
    assert (np.diff(np.sqrt(losses[np.isfinite(losses)])) <= 8 * EPS).all()  # rounding, as in assert_same_loss


@pytest.mark.parametrize("rank", [K, 7])
def test_a_sweep_of_als_is_exact_least_squares_for_every_row_then_every_column(rank, x64):
    arrays = [jnp.asarray(array, jnp.float64) for array in (W, WEIGHTS, normal(13, M, rank), normal(14, rank, N))]
    got = jax.jit(als)(Problem(*arrays[:2]), Factors(*arrays[2:]))
    wanted = reference.als(*(np.asarray(array) for array in arrays))
    # Gram matrices of condition 10^4 at most, in two solutions.
    assert np.linalg.norm(product(got) - product(wanted)) <= 1e-8 * np.linalg.norm(W)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_are_those_of_the_literature_on_equal_weights(name):
    assert_same_product(product(equal_weights()[name]), reference.eckart_young(W, K))


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_equal_weights_give_eckart_young_from_any_start(name):
    wanted = reference.loss(W, np.ones_like(W), reference.eckart_young(W, K))
    np.testing.assert_allclose(equal_weights()[name].loss, wanted, rtol=1e-6)  # tol**2 over the curvature, and rounding


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("name", cases([name for name in TABLE if name != "svd"]))
def test_row_weights_give_fwsvd_in_at_most_one_iteration(name, zero):
    result, closed_form = row_weights(zero)
    assert_same_product(product(result[name]), closed_form)
    assert result[name].iterations <= 1


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("name", cases(["separable", *ITERATIONS]))
def test_separable_weights_give_their_closed_form_in_at_most_one_iteration(name, zero):
    result, closed_form = separable_weights(zero)
    assert_same_product(product(result[name]), closed_form)
    assert result[name].iterations <= 1


@pytest.mark.parametrize("name", cases(TABLE))
def test_a_target_of_the_rank_asked_for_is_recovered_from_any_start(name):
    assert reference.loss(PLANTED, WEIGHTS, product(planted()[name])) <= EXACT


@pytest.mark.parametrize("name", cases(STEPS, DOUBLE))
def test_a_float64_target_is_recovered_to_float64_precision(name, x64):
    target, result = planted_in_float64()
    assert reference.loss(target, WEIGHTS.T, product(result[name])) <= EXACT * (np.finfo(np.float64).eps / EPS) ** 2


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_entries_without_weight_are_completed(name):
    # EM's rate is set by the share that is observed, 60 %: 200 iterations gain three digits, the others reach tol.
    error = np.linalg.norm(product(completed()[name]) - PLANTED) / np.linalg.norm(PLANTED)
    assert error <= (3e-3 if name.startswith("em") else TOL)


@pytest.mark.parametrize("units", [(10, -40), (-31, 60), (101, -101)])
@pytest.mark.parametrize("name", cases(TABLE))
def test_units_that_are_powers_of_two_change_no_bit(name, units):
    got, wanted = in_units(*units)[name], example()[name]
    jax.tree.map(np.testing.assert_array_equal, got[2:], wanted[2:])
    np.testing.assert_array_equal(product(got), np.ldexp(product(wanted), units[0]))
    assert (np.frexp(got.left)[0] == np.frexp(wanted.left)[0]).all()
    assert (np.frexp(got.right)[0] == np.frexp(wanted.right)[0]).all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_permute_with_rows_and_columns(name):
    assert_same_product(product(permuted()[name]), product(example()[name])[ROWS][:, COLUMNS])


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_iterations_permute_with_rows_and_columns(name):
    # Sums in another order differ by rounding, which the first few iterations do not yet amplify.
    assert_same_loss(permuted()[name].history.loss[:4], example()[name].history.loss[:4])


@pytest.mark.parametrize("name", cases([name for name in STEPS if name in ITERATIONS], DOUBLE))
def test_the_transposed_problem_has_the_same_minimum(name, x64):
    np.testing.assert_allclose(transposed()[name].loss, minimum(), rtol=1e-5)  # as before transposing


def test_svd_transposes(x64):
    assert_same_product(product(transposed()["svd"]).T, product(example()["svd"]))


@pytest.mark.parametrize("name", cases(["separable", *ITERATIONS]))
def test_rows_and_columns_without_weight_are_zero_in_the_product(name):
    got = product(separable_weights(3)[0][name])
    assert not got[3].any()
    assert not got[:, 3].any()


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", cases(["separable", *ITERATIONS]))
def test_targets_without_weight_change_no_bit(name, fill):
    jax.tree.map(np.testing.assert_array_equal, masked(fill)[name], masked(0)[name])


@pytest.mark.parametrize(("name", "shape"), EXTREMES)
def test_extreme_shapes_give_a_finite_result_whose_loss_is_as_reported(name, shape):
    W, weights, result = of_shape(*shape)
    assert_finite(result[name])
    assert_same_loss(result[name].loss, reference.loss(W, weights, product(result[name])))


@pytest.mark.parametrize(("name", "shape"), EXTREMES)
def test_full_rank_leaves_no_loss(name, shape):
    W, weights, result = of_shape(*shape)
    assert reference.loss(W, weights, product(result[name])) <= 2 * EXACT  # 3 terms an entry


@pytest.mark.parametrize("name", cases(TABLE))
def test_two_runs_agree_in_every_bit(name):
    jax.tree.map(np.testing.assert_array_equal, again()[name], example()[name])


@pytest.mark.parametrize("name", cases(TABLE))
def test_columns_of_left_are_as_large_as_rows_of_right_to_a_factor_of_two(name):
    for result in (example()[name], in_units(-31, 60)[name]):
        ratio = np.abs(result.left).max(0) / np.abs(result.right).max(1)
        assert ((ratio >= 1 / 2) & (ratio <= 2)).all()


@pytest.mark.parametrize("name", cases(TABLE))
def test_weights_over_thirty_orders_of_magnitude_give_a_finite_result(name):
    assert_finite(thirty_orders()[name])


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_a_start_whose_product_overflows_gives_finite_factors(name):
    assert_finite(started_at(1e30)[name][:2])


@pytest.mark.parametrize("name", cases(ITERATIONS))
def test_a_start_of_zeros_is_no_dead_end(name):
    # EM is still on its way after 200 iterations.
    np.testing.assert_allclose(started_at(0)[name].loss, minimum(), rtol=1e-3)
