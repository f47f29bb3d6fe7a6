"""Factors stand where kernels stood, with the losses that the report says, and nothing else has changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import wlra
from bert_adapter.factorisation import factorise, merge
from bert_adapter.layers.marker import FACTORISED
from wlra import checks

M, N, K = 8, 6, 2  # breaks even at 24 / 7
RANKS = {"layer/1/dense": 1, "layer/0/dense": K, "head": 3}
EPS = float(np.finfo(np.float32).eps)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "head": {"kernel": normal(0, M, N)},
    "layer": {
        "0": {"dense": {"kernel": normal(1, M, N), "bias": normal(2, N)}, "LayerNorm": {"scale": normal(3, N)}},
        "1": {"dense": {"kernel": jnp.asarray(normal(4, M, N)), "bias": jnp.asarray(normal(5, N))}},
    },
    "tail": {"kernel": normal(6, M, N)},
}
WEIGHTS = {path: np.exp(2 * normal(seed, M, N)) for seed, path in enumerate(RANKS, 7)}
EQUAL = wlra.Kronecker(jnp.eye(M), jnp.eye(N))


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def kernel(path):
    return at(PARAMS, path)["kernel"]


def weighted_loss(params, path, weights):
    factors = at(params, path)["left"], at(params, path)["right"]
    return reference.loss(kernel(path), weights, reference.product(factors))


def assert_same_loss(got, wanted):
    """The root of the loss is a relative distance: rounding in sums of a few terms moves it by some eps."""
    np.testing.assert_allclose(np.sqrt(np.float64(got)), np.sqrt(np.float64(wanted)), rtol=0, atol=32 * EPS)


@pytest.fixture(scope="module")
def small_and_rows():
    """Three kernels of one shape with ranks of their own: one program."""
    params, rows = factorise(PARAMS, WEIGHTS, RANKS, progress=False)
    return params, {row.path: row for row in rows}


@pytest.fixture(scope="module")
def alone():
    """The kernel of rank 2, solved by itself."""
    return wlra.solve(kernel("layer/0/dense"), WEIGHTS["layer/0/dense"], K)


@pytest.fixture(scope="module")
def small(small_and_rows):
    return small_and_rows[0]


@pytest.fixture(scope="module")
def rows(small_and_rows):
    return small_and_rows[1]


@pytest.mark.parametrize("path", RANKS)
def test_loss_of_the_method_is_that_of_the_factors(small, rows, path):
    assert_same_loss(rows[path].loss["anderson"], weighted_loss(small, path, WEIGHTS[path]))


def test_loss_of_the_start_is_that_of_the_closed_form(rows):
    _, closed = factorise(PARAMS, WEIGHTS, RANKS, method="separable", progress=False)
    for row in closed:
        assert_same_loss(rows[row.path].loss["separable"], row.loss["separable"])


@pytest.mark.parametrize("path", RANKS)
def test_method_is_at_least_as_good_as_its_start(rows, path):
    assert rows[path].loss["anderson"] <= rows[path].loss["separable"] * (1 + 32 * EPS)  # rounding


def test_start_comes_before_the_method(rows):
    assert list(rows["head"].loss) == ["separable", "anderson"]


@pytest.mark.parametrize("path", RANKS)
def test_kernels_of_one_shape_may_have_ranks_of_their_own(small, path):
    got = at(small, path)
    assert (got["left"].shape, got["right"].shape) == ((M, RANKS[path]), (RANKS[path], N))


def test_solving_together_has_the_loss_of_solving_alone(rows, alone):
    assert_same_loss(rows["layer/0/dense"].loss["anderson"], alone.loss)


def test_rows_come_in_the_order_of_the_ranks(rows):
    assert list(rows) == list(RANKS)


def test_rows_say_what_they_are_of(rows):
    row = rows["head"]
    assert (row.path, row.shape, row.rank) == ("head", (M, N), 3)
    assert (row.parameters_before, row.parameters_after) == (M * N, 3 * (M + N))


@pytest.mark.parametrize("path", RANKS)
def test_history_starts_at_the_separable_loss(rows, path):
    assert_same_loss(rows[path].history[0], rows[path].loss["separable"])


@pytest.mark.parametrize("path", RANKS)
def test_lowest_loss_of_the_history_is_that_of_the_method(rows, path):
    assert_same_loss(min(rows[path].history), rows[path].loss["anderson"])


@pytest.mark.parametrize("path", RANKS)
def test_history_has_an_entry_for_the_start_and_each_iteration(rows, path):
    row = rows[path]
    assert np.isfinite(row.history).all()
    assert len(row.history) == row.iterations + 1 > 1


def test_kernel_gives_way_to_a_marker_and_factors(small):
    got = at(small, "layer/0/dense")
    assert set(got) == {"kernel", "left", "right", "bias"}
    assert got["kernel"] == FACTORISED
    assert (got["left"].shape, got["right"].shape) == ((M, K), (K, N))


def test_all_else_is_the_same_objects(small):
    assert small["tail"]["kernel"] is PARAMS["tail"]["kernel"]
    for layer in ("0", "1"):
        assert small["layer"][layer]["dense"]["bias"] is PARAMS["layer"][layer]["dense"]["bias"]
    assert small["layer"]["0"]["LayerNorm"]["scale"] is PARAMS["layer"]["0"]["LayerNorm"]["scale"]


def test_parameters_given_are_left_alone(small):
    del small
    assert "left" not in PARAMS["head"]
    np.testing.assert_array_equal(PARAMS["head"]["kernel"], normal(0, M, N))


@pytest.mark.parametrize("rank", [4, 6, 100])
def test_kernel_stays_dense_from_break_even_on(rank):
    params, (row,) = factorise(PARAMS, {"head": WEIGHTS["head"]}, {"head": rank}, progress=False)
    assert params["head"]["kernel"] is PARAMS["head"]["kernel"]
    assert (row.status, row.rank, row.parameters_before, row.parameters_after) == ("DENSE", rank, M * N, M * N)


def test_kernel_stays_dense_where_factors_are_exactly_as_large():
    params = {"square": {"kernel": normal(0, 8, 8)}}  # 4 * (8 + 8) = 8 * 8
    _, (row,) = factorise(params, {"square": None}, {"square": 4}, progress=False)
    assert row.status == "DENSE"


def test_row_of_a_dense_kernel_claims_no_work():
    _, (row,) = factorise(PARAMS, {"head": None}, {"head": 4}, progress=False)
    assert (row.loss, row.iterations, row.seconds, row.history) == ({}, 0, 0.0, [])


def test_rows_of_dense_kernels_keep_their_place():
    ranks = {"layer/1/dense": 5, "head": K, "layer/0/dense": 4}
    _, rows = factorise(PARAMS, dict.fromkeys(ranks, EQUAL), ranks, method="kronecker", progress=False)
    assert [(row.path, row.status == "DENSE") for row in rows] == [
        ("layer/1/dense", True),
        ("head", False),
        ("layer/0/dense", True),
    ]


def test_shapes_are_kept_apart():
    params = {"a": {"kernel": normal(0, M, N)}, "b": {"kernel": normal(1, N, M)}}
    ranks, weights = {"a": K, "b": 1}, {"a": EQUAL, "b": wlra.Kronecker(EQUAL.col, EQUAL.row)}
    got, _ = factorise(params, weights, ranks, method="kronecker", progress=False)
    for path, rank in ranks.items():
        wanted = reference.eckart_young(params[path]["kernel"], rank)
        product = reference.product((got[path]["left"], got[path]["right"]))
        np.testing.assert_allclose(product, wanted, rtol=0, atol=100 * EPS)  # an SVD in float32, of numbers up to 3


def test_factors_of_kernels_of_several_dtypes_have_each_their_own():
    params = {"a": {"kernel": normal(0, M, N).astype(jnp.bfloat16)}, "b": {"kernel": normal(1, M, N)}}
    got, _ = factorise(params, {"a": EQUAL, "b": EQUAL}, {"a": K, "b": K}, method="kronecker", progress=False)
    for path, dtype in {"a": jnp.bfloat16, "b": np.float32}.items():
        assert (got[path]["left"].dtype, got[path]["right"].dtype) == (dtype, dtype)


@pytest.mark.parametrize("axes", [(M, 2, 3), (2, 4, N)], ids=["outputs", "inputs"])
def test_kernels_of_several_axes_are_factorised_as_matrices_and_keep_their_axes(axes):
    flat = normal(0, M, N)
    params = {"a": {"kernel": flat.reshape(axes)}}
    got, (row,) = factorise(params, {"a": EQUAL}, {"a": K}, shapes={"a": (M, N)}, method="kronecker", progress=False)
    left, right = ((M, K), (K, 2, 3)) if axes[0] == M else ((2, 4, K), (K, N))
    assert (got["a"]["left"].shape, got["a"]["right"].shape, row.shape) == (left, right, (M, N))
    merged = np.asarray(merge(got)["a"]["kernel"])
    assert merged.shape == axes
    np.testing.assert_allclose(merged.reshape(M, N), reference.eckart_young(flat, K), rtol=0, atol=100 * EPS)


def bad(entry):
    weights = np.ones((M, N), np.float32)
    weights[1, 2] = entry
    return weights


def test_values_that_cannot_be_used_are_said_with_the_path_of_their_kernel():
    with pytest.raises(ValueError, match=r"head: weights has 1 NaN, infinite or negative entries.*\(1, 2\)"):
        factorise(PARAMS, WEIGHTS | {"head": bad(-1)}, RANKS, progress=False)
    lopsided = wlra.Kronecker(jnp.eye(M).at[0, 1].set(0.5), jnp.eye(N))
    with pytest.raises(ValueError, match=r"head: weights\.row must be symmetric"):
        factorise(PARAMS, {"head": lopsided}, {"head": K}, method="kronecker", progress=False)
    with pytest.raises(ValueError, match="head: weights has one axis"):
        factorise(PARAMS, {"head": np.ones(M)}, {"head": K}, progress=False)


def test_values_are_examined_once(monkeypatch):
    calls, check = [], checks.check_values
    monkeypatch.setattr(checks, "check_values", lambda *arrays: calls.append(1) or check(*arrays))
    factorise(PARAMS, WEIGHTS, RANKS, method="separable", progress=False)
    assert len(calls) <= 1  # of three kernels, which are solved together


@pytest.mark.parametrize(
    "weights",
    [None, np.exp(normal(20, M, 1)), np.exp(normal(21, 1, N)), np.exp(normal(22, M, N)).tolist(), np.float32(2)],
    ids=["none", "per row", "per column", "lists", "scalar"],
)
@pytest.mark.parametrize("others", ["same", "full"])
def test_weights_may_be_whatever_the_solver_takes(weights, others):
    """For one kernel of three, or for all of them."""
    mine = weights if others == "same" else WEIGHTS["head"]
    given: dict[str, Any] = {"layer/1/dense": weights, "layer/0/dense": mine, "head": mine}
    params, rows = factorise(PARAMS, given, RANKS, method="separable", progress=False)
    for row in rows:
        full = 1 if given[row.path] is None else np.asarray(given[row.path])
        assert_same_loss(row.loss["separable"], weighted_loss(params, row.path, np.broadcast_to(full, (M, N))))


def test_kronecker_weights_have_numpys_loss():
    row, col = (normal(seed, 20, size).T @ normal(seed, 20, size) for seed, size in ((30, M), (31, N)))
    weights = {"head": wlra.Kronecker(jnp.asarray(row), jnp.asarray(col))}
    _, (got,) = factorise(PARAMS, weights, {"head": K}, method="kronecker", progress=False)
    best = reference.kronecker(kernel("head"), row, col, K)
    assert list(got.loss) == ["kronecker"]
    assert_same_loss(got.loss["kronecker"], reference.kronecker_loss(kernel("head"), row, col, best))


def test_options_reach_the_solver():
    _, rows = factorise(PARAMS, WEIGHTS, RANKS, solver={"max_iters": 1, "tol": 0.0}, progress=False)
    assert [(row.iterations, row.status) for row in rows] == [(1, "MAX_ITERS")] * 3


def test_a_method_may_be_passed_as_itself():
    _, (row,) = factorise(PARAMS, {"head": EQUAL}, {"head": K}, method=wlra.METHODS["kronecker"], progress=False)
    assert list(row.loss) == ["kronecker"]


def test_unknown_option_is_refused():
    with pytest.raises(ValueError, match=r"options must be of .*; got \['toll'\]"):
        factorise(PARAMS, WEIGHTS, RANKS, method="svd", solver={"toll": 1e-3}, progress=False)


def test_merged_kernel_is_the_product_of_the_factors(small):
    merged = merge(small)
    for path in RANKS:
        left, right = (np.asarray(at(small, path)[name], np.float64) for name in ("left", "right"))
        product = left @ right
        bound = 4 * EPS * np.abs(left) @ np.abs(right)  # two products, a sum, a store
        assert np.all(np.abs(np.float64(at(merged, path)["kernel"]) - product) <= bound)


def test_merged_tree_has_the_form_of_the_dense_one(small):
    merged = merge(small)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, PARAMS)


def test_merging_leaves_all_else_alone(small):
    assert merge(small)["layer"]["1"]["dense"]["bias"] is PARAMS["layer"]["1"]["dense"]["bias"]


def test_merging_dense_parameters_changes_nothing():
    jax.tree.map(np.testing.assert_array_equal, merge(PARAMS), PARAMS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_merged_kernel_has_the_dtype_of_its_factors(dtype):
    factors = {"kernel": FACTORISED, "left": normal(0, M, K).astype(dtype), "right": normal(1, K, N).astype(dtype)}
    assert merge({"a": factors})["a"]["kernel"].dtype == dtype


def test_merged_kernel_of_float64_factors_keeps_their_digits(x64):
    del x64
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(M, K)), rng.normal(size=(K, N))
    got = merge({"a": {"kernel": FACTORISED, "left": left, "right": right}})["a"]["kernel"]
    np.testing.assert_allclose(got, left @ right, rtol=0, atol=1e-14)  # a few roundings of numbers of about one
