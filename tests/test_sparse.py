"""A sparse target is solved as the dense one whose other entries weigh nothing, and is never made dense."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.sparse
from contract import SPARSE, Results, cases
from jax.experimental.sparse import BCOO, BCSR

import wlra
from wlra import checks, door
from wlra.linalg.decompose import leading_components
from wlra.options import check_options, prepare
from wlra.pipeline import solve_inputs
from wlra.sparse import as_sparse, grams

M, N, K = 37, 23, 3
ITERS = 8
rng = np.random.default_rng(0)
MASK = (rng.uniform(size=(M, N)) < 0.5) & (np.arange(M) != 5)[:, None] & (np.arange(N) != 7)[None, :]
W = rng.normal(size=(M, K)) @ rng.normal(size=(K, N)) + 0.3 * rng.normal(size=(M, N))
WEIGHTS = np.where(MASK, np.exp(rng.normal(size=(M, N))), 0)
WEIGHTS[tuple(np.argwhere(MASK)[4])] = 0  # stored, and of weight 0
PAIR = rng.normal(size=(M, K)), rng.normal(size=(K, N))
PLACES = np.argwhere(MASK)
ENTRIES = len(PLACES)
# With fewer entries than unknowns, what a row is given of the null space is rounding errors.
assert all(np.sum(WEIGHTS > 0, axis=axis)[np.sum(MASK, axis=axis) > 0].min() > K for axis in (0, 1))
SHUFFLED = rng.permutation(ENTRIES)


def stored(array, order=None, places=PLACES, dtype: Any = np.float32):
    """The array's entries at the places, in the order given."""
    places = places if order is None else places[order]
    return BCOO((jnp.asarray(array[tuple(places.T)], dtype), jnp.asarray(places.astype(np.int32))), shape=array.shape)


def cache_size(program: Any) -> int:
    return program._cache_size()


def pair(dtype):
    return PAIR[0].astype(dtype), PAIR[1].astype(dtype)


def solve(W, weights, method, dtype: Any = np.float32, start=None):
    start = pair(dtype) if start is None else start
    return wlra.solve(W, weights, K, method=method, start=start, tol=0.0, max_iters=ITERS, patience=1000)


# What is solved beside the dense solver: each method, a penalty, and the default start until it has converged.
DEFAULT = {"start": "separable", "max_iters": 400}
CASES: dict[str, Any] = {name: {"method": name} for name in SPARSE} | {
    "with a penalty": {"method": "als", "nuclear": 1.0},
    "from the default start": {"method": "als", **DEFAULT},
}
SINGLE = ("als",)  # in float32, and in quick tests


def prepared(W, weights, dtype, method, start=None, max_iters=ITERS, nuclear=None):
    """The solver's arrays and its options."""
    start = pair(dtype) if start is None else start
    request = check_options(method, start=start, tol=0.0, max_iters=max_iters, patience=1000, nuclear=nuclear)
    return prepare(door.check_problem(W, weights), K, request)


@functools.partial(jax.jit, static_argnames="options")
def solve_all(inputs, options):
    """One program for all: it compiles in half the time of one for each."""
    return {name: solve_inputs(inputs[name], each) for name, each in options}


def solve_cases(W, weights, dtype, names, **changes):
    cases = {name: prepared(W, weights, dtype, **CASES[name] | changes) for name in names}
    inputs = {name: inputs for name, (inputs, _) in cases.items()}
    options = tuple((name, options) for name, (_, options) in cases.items())
    return jax.tree.map(np.asarray, solve_all(inputs, options))


@functools.cache
def beside():
    """In float64: the results of the sparse solver, and those of the dense one."""
    sparse = stored(W, dtype=float), stored(WEIGHTS, dtype=float)
    return tuple(
        Results(lambda names, arrays=arrays: solve_cases(*arrays, float, names), CASES, SINGLE)
        for arrays in (sparse, (W, WEIGHTS))
    )


@functools.cache
def single():
    return solve_cases(stored(W), stored(WEIGHTS), np.float32, SINGLE)


@functools.cache
def sparse_result():
    return solve(stored(W), stored(WEIGHTS), "als")


@pytest.mark.parametrize("method", cases(SPARSE, SINGLE))
def test_every_iterate_is_that_of_the_dense_solver(method, x64):
    sparse, dense = (results[method] for results in beside())
    # Extrapolations divide by differences of iterates, which lose half the digits.
    np.testing.assert_allclose(sparse.history.loss, dense.history.loss, rtol=1e-7)
    np.testing.assert_allclose(sparse.history.stationarity, dense.history.stationarity, rtol=1e-6)
    np.testing.assert_allclose(sparse.left @ sparse.right, dense.left @ dense.right, atol=1e-6)
    assert sparse.status == dense.status


@pytest.mark.parametrize("method", SINGLE)
def test_every_loss_is_that_of_the_dense_solver_in_float32(method, x64):
    wanted = beside()[1][method].history.loss
    np.testing.assert_allclose(single()[method].history.loss, wanted, rtol=3e-4)  # sqrt(eps)


@pytest.mark.slow
def test_a_nuclear_penalty_is_that_of_the_dense_solver_but_for_the_certificate(x64):
    sparse, dense = (results["with a penalty"] for results in beside())
    np.testing.assert_allclose(sparse.history.loss, dense.history.loss, rtol=1e-7)
    assert np.isinf(sparse.gap)


@pytest.mark.slow
def test_the_default_start_is_nearly_that_of_the_dense_solver_and_leads_to_its_loss(x64):
    sparse, dense = (results["from the default start"] for results in beside())
    first, last = sparse.history.loss[0] / dense.history.loss[0], sparse.loss / dense.loss
    assert abs(first - 1) < 1e-2  # a few products with a few vectors
    assert abs(last - 1) < 1e-6  # both have converged


def test_the_start_of_a_matrix_of_low_rank_is_exact(x64):
    low = np.where(MASK.any(axis=1)[:, None] & MASK.any(axis=0)[None, :], PAIR[0] @ PAIR[1], 0)
    whole = stored(low, places=np.argwhere(np.ones((M, N))), dtype=float)
    left, right = leading_components(checks.check_target(whole, batched=False), K)
    np.testing.assert_allclose(left @ right, low, atol=1e-10)
    assert not left[5].any()
    assert not right[:, 7].any()


def test_gram_matrices_are_those_of_the_rows_and_the_columns(x64):
    weight: Any = checks.check_target(stored(WEIGHTS, dtype=float), batched=False)
    left, right = PAIR
    np.testing.assert_allclose(grams(weight, jnp.asarray(right)), np.einsum("ij,ki,li->jkl", WEIGHTS.T, right, right))
    np.testing.assert_allclose(grams(weight.T, jnp.asarray(left.T)), np.einsum("ij,ik,il->jkl", WEIGHTS, left, left))


def test_no_weights_are_weight_one_for_each_stored_entry():
    without, ones = (solve(stored(W), weights, "als") for weights in (None, stored(np.ones((M, N)))))
    np.testing.assert_array_equal(without.history.loss, ones.history.loss)


def test_the_order_of_entries_changes_nothing():
    shuffled = solve(stored(W, SHUFFLED), stored(WEIGHTS, SHUFFLED[::-1]), "als")
    np.testing.assert_array_equal(shuffled.left, sparse_result().left)


def test_what_is_stored_with_weight_zero_is_not_read():
    hidden = np.where(WEIGHTS > 0, W, np.nan)
    np.testing.assert_array_equal(solve(stored(hidden), stored(WEIGHTS), "als").left, sparse_result().left)


@functools.cache
def in_units():
    left, right = pair(np.float32)
    start = np.float32(2.0**4) * left, np.float32(2.0**3) * right
    return solve_cases(stored(2.0**7 * W), stored(2.0**-9 * WEIGHTS), np.float32, SINGLE, start=start)


@pytest.mark.parametrize("method", SINGLE)
def test_units_that_are_powers_of_two_change_no_bit(method, x64):  # as the other, which is the same program then
    np.testing.assert_array_equal(in_units()[method].history.loss, single()[method].history.loss)


@pytest.mark.parametrize("method", SINGLE)
def test_rows_and_columns_without_entries_are_zero(method):
    result = single()[method]
    assert not result.left[5].any()
    assert not result.right[:, 7].any()


@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
def test_nothing_in_the_programs_has_as_many_entries_as_the_matrix(compiled):
    m, n = 997, 1009  # primes, so that no other size is a multiple of both
    places = np.stack([np.arange(40) * 7, np.arange(40) * 5], axis=1)
    matrix = stored(np.ones((m, n)), places=places)
    sizes = set()
    for method in ("als",) if compiled else SINGLE:
        inputs, options = prepared(matrix, None, np.float32, method, "separable", 5)
        lowered = solve_inputs.lower(inputs, options)
        text = (lowered.compile().as_text() or "") if compiled else lowered.as_text().replace("x", ",")
        shapes = re.findall(r"\[(\d[\d,]*)\]|<(\d[\d,]*),[a-z]", text)
        sizes |= {math.prod(int(length) for length in "".join(shape).split(",")) for shape in shapes}
    assert max(sizes) >= m * K  # the factors are found
    assert max(sizes) < m * n / 5  # the largest hold a few directions of both factors


def test_another_pattern_of_the_same_size_compiles_nothing():
    sparse_result()
    before = cache_size(solve_inputs)
    moved = np.argwhere(np.ones((M, N)))[:ENTRIES]
    solve(stored(W, places=moved), stored(np.ones((M, N)), places=moved), "als")
    assert cache_size(solve_inputs) == before


def test_padding_of_jax_is_no_entry():
    matrix = stored(W)
    padding = jnp.asarray([[M, N], [M, N]], jnp.int32)
    padded = BCOO(
        (jnp.append(matrix.data, jnp.zeros(2)), jnp.concatenate([matrix.indices, padding])), shape=matrix.shape
    )
    np.testing.assert_array_equal(solve(padded, None, "als").left, solve(matrix, None, "als").left)


def changed(array, places=PLACES, **parts):
    matrix = stored(array, places=places)
    return BCOO((matrix.data, matrix.indices), shape=parts.get("shape", matrix.shape))


TWICE = np.append(PLACES, PLACES[2:3], axis=0)
OTHER = np.append(PLACES[1:], np.argwhere(~MASK)[:1], axis=0)
NAN = np.where(WEIGHTS.max() == WEIGHTS, np.nan, W)
REFUSED = {
    "each entry once: W.sum_duplicates.remove_zeros=False.": (stored(W, places=TWICE), None, {}),
    "W stores 1 entries again": (stored(W, places=TWICE), None, {}),
    "weights stores 1 entries again": (stored(W), stored(WEIGHTS, places=TWICE), {}),
    "the same entries as W; got one at": (stored(W), stored(WEIGHTS, places=OTHER), {}),
    f"the same {ENTRIES} entries as W; got {ENTRIES - 1}": (stored(W), stored(WEIGHTS, places=PLACES[1:]), {}),
    "weights must have the shape of W": (stored(W), changed(WEIGHTS, shape=(M + 1, N)), {}),
    "None or sparse like it; got ndarray": (stored(W), WEIGHTS, {}),
    "weights must be dense here; got a BCOO": (W.astype(np.float32), stored(WEIGHTS), {}),
    "W stores no entry": (stored(W, places=PLACES[:0]), None, {}),
    "got shape .* n_dense=1": (BCOO.fromdense(jnp.ones((M, N)), n_dense=1), None, {}),
    "indices >= 0; got .-3, ": (BCOO((jnp.ones(1), jnp.array([[-3, 0]], jnp.int32)), shape=(M, N)), None, {}),
    "weights has 1 NaN, infinite or negative": (stored(W), stored(np.where(NAN != NAN, -1, WEIGHTS)), {}),
    "W has 1 NaN or infinite entries": (stored(NAN), stored(WEIGHTS), {}),
    "weights are all zero": (stored(W), stored(0 * WEIGHTS), {}),
    "for a sparse W; got 'svd'": (stored(W), None, {"method": "svd"}),
    "for a sparse W; got 'auto'": (stored(W), None, {"method": "auto"}),
    "for a sparse W; got 'newton'": (stored(W), None, {"method": "newton"}),
    "projection='svd' needs a dense W": (stored(W), None, {"projection": "svd"}),
    "ridge, .* needs a dense W": (stored(W), None, {"ridge": 0.1}),
    "restarts needs a dense W": (stored(W), None, {"restarts": 3}),
}


def test_entries_stored_twice_are_summed_as_the_error_says_and_known_zeros_stay():
    matrix = stored(np.where(MASK & (np.cumsum(MASK).reshape(M, N) > 1), 0, W), places=TWICE)
    summed = matrix.sum_duplicates(remove_zeros=False)
    assert summed.nse == ENTRIES
    assert (wlra.solve(summed, None, K, max_iters=1).left.shape) == (M, K)


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_solved_is_refused(message):
    W, weights, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        wlra.solve(W, weights, K, **options)


def test_an_entry_that_is_wrong_is_named_by_row_and_column():
    row, col = np.argwhere(np.isnan(NAN))[0]
    with pytest.raises(ValueError, match=re.escape(f"nan at ({row}, {col})")):
        wlra.solve(stored(NAN), stored(WEIGHTS), K)


def as_scipy(array, kind: Any = scipy.sparse.csr_array):
    return kind(scipy.sparse.coo_array((array[tuple(PLACES.T)], tuple(PLACES.T)), shape=array.shape))


def through_the_door(W, weights=None):
    target, weight, _ = door.in_units(door.check_problem(W, weights))
    return target, weight


@pytest.mark.parametrize("kind", [scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array])
def test_a_matrix_of_scipy_is_the_same_as_one_of_jax(kind):
    for ours, theirs in zip(
        through_the_door(as_scipy(W, kind), as_scipy(WEIGHTS)),
        through_the_door(stored(W), stored(WEIGHTS)),
        strict=True,
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(
        np.testing.assert_array_equal, through_the_door(BCSR.from_bcoo(stored(W))), through_the_door(stored(W))
    )


def test_duplicates_of_scipy_are_summed_and_its_zeros_are_known():
    rows, cols = [0, 2, 0, 1], [1, 0, 1, 1]
    given = scipy.sparse.coo_array((np.array([100, 0, 100, 3], np.int8), (rows, cols)), shape=(3, 2))
    target, weight = through_the_door(given)
    np.testing.assert_array_equal(target.values, [200, 3, 0])  # by row; in 8 bits the sum would be -56
    np.testing.assert_array_equal(target.rows, [0, 1, 2])
    assert len(weight.values) == 3
    flags = scipy.sparse.coo_array((np.array([True, True]), ([0, 0], [1, 1])), shape=(3, 2))
    np.testing.assert_array_equal(through_the_door(flags)[0].values, [1])


def test_values_of_scipy_keep_their_precision():
    tiny = as_scipy(W.astype(np.float64) * 2.0**-140)
    target, _, units = door.in_units(door.check_problem(tiny, None))
    kept = np.ldexp(np.float64(target.values), units.target)
    np.testing.assert_allclose(kept, W[tuple(PLACES.T)] * 2.0**-140, rtol=2**-24)


OPTIONS = {"method": "als", "max_iters": ITERS, "tol": 1e-3}


@functools.cache
def path():
    return wlra.solve_path(stored(W), stored(WEIGHTS), [2, 1], **OPTIONS)


@pytest.mark.slow
def test_a_path_of_a_sparse_matrix_has_the_losses_of_its_factors():
    losses = [reference.loss(W, WEIGHTS, np.float64(left) @ right) for left, right in zip(*path()[:2], strict=True)]
    np.testing.assert_allclose(path().loss, losses, rtol=1e-4)  # float32 sums
    assert losses[0] < losses[1]


def select(ranks):
    return wlra.select_rank(as_scipy(W), as_scipy(WEIGHTS), ranks, key=jax.random.key(0), folds=3, **OPTIONS)


def test_a_rank_of_a_sparse_matrix_is_judged_by_hidden_entries():
    selection = select([1])
    assert selection.error.shape == (1, 3)
    assert (selection.error > 0).all()
    assert selection.error.mean() < 2  # of the squares of W, which zeros miss by 1


@pytest.mark.slow
def test_a_rank_is_selected_of_a_sparse_matrix():
    selection = select([2, 1])
    assert list(selection.ranks) == [1, 2]
    assert np.isfinite(selection.error).all()
    # Beside the minimum of all entries seen, which hidden ones cannot be predicted better than.
    assert (selection.error.mean(axis=1) > path().loss[::-1]).all()


@pytest.mark.slow
def test_folds_and_errors_are_those_of_the_dense_matrix():
    options: dict[str, Any] = {"key": jax.random.key(0), "folds": 3} | OPTIONS | {"max_iters": 200}
    sparse = wlra.select_rank(stored(W), stored(WEIGHTS), [3], **options)
    dense = wlra.select_rank(W, WEIGHTS, [3], **options)
    np.testing.assert_allclose(sparse.error.mean(), dense.error.mean(), rtol=0.05)  # two starts, one minimum or so


def test_what_folds_of_a_sparse_matrix_cannot_have_is_refused():
    select = functools.partial(wlra.select_rank, stored(W), None, [1], key=jax.random.key(0))
    with pytest.raises(ValueError, match="chunk must be None for a sparse W"):
        select(chunk=2, method="als")
    with pytest.raises(ValueError, match="for a sparse W; got 'svd'"):
        select(method="svd")
    with pytest.raises(ValueError, match=r"ridge, .* needs a dense W"):
        wlra.solve_path(stored(W), None, rank=2, ridge=[0.1], method="als")


def test_axes_beyond_32_bits_are_refused():
    long = scipy.sparse.coo_array((np.ones(1), ([0], [2**32])), shape=(2, 2**33))
    with pytest.raises(ValueError, match=r"axes from 1 to 2\*\*31 - 1; got shape \(2, 8589934592\)"):
        door.check_problem(long, None)


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="W must be dense here; got a BCOO"):
        wlra.solve_batch(stored(W), None, K)


def test_traced_indices_are_refused():
    with pytest.raises(ValueError, match="its indices must be known"):
        jax.jit(lambda W: wlra.solve(W, None, K))(stored(W))


def test_zeros_that_diagonals_store_are_known():
    stored = np.array([[1.0, 0, 3], [2, 2, 2], [1, 1, 1]])
    diagonals = scipy.sparse.dia_array((stored, [0, -1, 1]), shape=(3, 3))
    found = as_sparse(diagonals, "W")
    assert len(found.values) == diagonals.nnz == 7
    assert found.values.tolist() == [1, 1, 2, 0, 1, 2, 3]
    assert found.rows.tolist() == [0, 0, 1, 1, 1, 2, 2]
