"""Ranks go where a parameter saves the most predicted loss."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import wlra
from bert_adapter import decompositions
from bert_adapter.choices import lower_hull
from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.ranks import plan
from bert_adapter.signals import SIGNALS
from wlra import components
from wlra.components import square_root

RNG = np.random.default_rng(0)
SHAPES = {"wide": (6, 14), "tall": (12, 5), "square": (8, 8)}
KERNELS = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
PARAMS: dict[str, Any] = {
    "encoder": {
        path: {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)} for path, kernel in KERNELS.items()
    },
    "head": {"kernel": np.zeros((5, 3), np.float32)},
}
PATHS = [f"encoder/{path}" for path in SHAPES]
# Separable, so that what is predicted is what is lost.
ROWS = {path: RNG.uniform(0.1, 4, shape[0]) for path, shape in SHAPES.items()}
COLS = {path: RNG.uniform(0.1, 4, shape[1]) for path, shape in SHAPES.items()}
EXAMPLES = 7


def importance(**fields):
    sums = {f"encoder/{path}": Sums(**{name: jnp.asarray(of(path)) for name, of in fields.items()}) for path in SHAPES}
    return Importance(sums, examples=EXAMPLES, tokens=3 * EXAMPLES, batches=1, gradients="labels", seed=0)


FISHER = importance(fisher=lambda path: np.stack([np.outer(ROWS[path], COLS[path]) / 2] * 2))
of = partial(plan, PARAMS, FISHER, signal="fisher")


def best(path, rank):
    """The least weighted squared error of a rank, by the closed form in float64."""
    scaled = np.sqrt(ROWS[path])[:, None] * np.float64(KERNELS[path]) * np.sqrt(COLS[path])
    return np.sum(np.linalg.svd(scaled, compute_uv=False)[rank:] ** 2)


def cost(path, rank):
    return min(rank * sum(SHAPES[path]), np.prod(SHAPES[path]))


def loss(path, rank):
    return 0.0 if rank * sum(SHAPES[path]) >= np.prod(SHAPES[path]) else best(path, rank) / 2 / EXAMPLES


def dense(path, rank):
    shape = SHAPES[path.removeprefix("encoder/")]
    return rank * sum(shape) >= np.prod(shape)


def totals(ranks):
    paths = {path.removeprefix("encoder/"): rank for path, rank in ranks.items()}
    return sum(cost(*item) for item in paths.items()), sum(loss(*item) for item in paths.items())


WHOLE = sum(np.prod(shape) for shape in SHAPES.values())


def test_predicted_loss_is_half_the_weighted_error_of_an_example():
    for budget in (0.3, 0.6, 0.9, 1.0):
        found = of(budget)
        np.testing.assert_allclose(found.predicted, totals(found.ranks)[1], rtol=1e-4, atol=1e-4)  # float32 sums


@pytest.mark.parametrize("budget", [0.26, 0.31, 0.5, 0.64, 0.77, 0.9, 1.0])
@pytest.mark.parametrize("uniform", [False, True])
def test_budget_is_kept_to(budget, uniform):
    found = of(budget, uniform=uniform)
    numbers, _ = totals(found.ranks)
    assert found.share == pytest.approx(numbers / WHOLE)
    assert numbers <= budget * WHOLE * (1 + 1e-9)


def test_at_the_corners_of_the_curve_no_ranks_of_the_same_cost_predict_less():
    every = np.stack(np.meshgrid(*(np.arange(1, -(-np.prod(s) // sum(s)) + 1) for s in SHAPES.values())), -1)
    others = np.array([totals(dict(zip(PATHS, ranks, strict=True))) for ranks in every.reshape(-1, len(SHAPES))])
    curve = of(0.5).curve
    for share, predicted in list(zip(curve.share, curve.predicted, strict=True))[len(SHAPES) - 1 :: 2]:
        least = np.min(others[others[:, 0] <= share * WHOLE * (1 + 1e-9), 1])
        np.testing.assert_allclose(predicted, least, rtol=1e-4, atol=1e-4)  # sums in float32


def test_planned_predicts_no_more_than_uniform():
    for budget in (0.3, 0.5, 0.75):
        assert of(budget).predicted <= of(budget, uniform=True).predicted * (1 + 1e-4)


def test_whole_budget_keeps_all_dense():
    found = of(1.0)
    assert (found.share, found.predicted) == (1.0, 0.0)
    assert all(dense(path, rank) for path, rank in found.ranks.items())


def test_curve_falls_from_the_smallest_plan_to_the_whole():
    curve = of(0.5).curve
    assert np.all(np.diff(curve.share) > 0)
    assert np.all(np.diff(curve.predicted) <= 0)
    assert curve.share[-1] == pytest.approx(1)
    assert curve.predicted[-1] == pytest.approx(0, abs=1e-5 * curve.predicted[0])


def test_every_point_of_the_curve_is_the_plan_of_its_budget():
    curve = of(0.5).curve
    for share, predicted in list(zip(curve.share, curve.predicted, strict=True))[len(SHAPES) - 1 :: 5]:
        found = of(float(share))
        assert found.share == pytest.approx(share)
        assert found.predicted == pytest.approx(predicted, rel=1e-4, abs=1e-4)


def test_ranks_are_multiples_within_limits_or_dense():
    found = of(0.6, multiple_of=2, minimum=2, maximum=4)
    assert all(dense(path, rank) or (rank % 2 == 0 and 2 <= rank <= 4) for path, rank in found.ranks.items())


def test_kernels_that_are_named_are_planned_for():
    assert set(of(0.5, kernels={"encoder/wide": (6, 14)}).ranks) == {"encoder/wide"}


def test_by_default_what_was_measured_is_planned_for_or_all_matrices():
    assert set(of(0.5).ranks) == set(PATHS)
    assert set(plan(PARAMS, None, 0.5, signal="svd").ranks) == {*PATHS, "head"}


def test_kernels_of_several_axes_are_planned_for_as_matrices():
    params = {"a": {"kernel": KERNELS["wide"].reshape(6, 7, 2)}, "b": {"kernel": KERNELS["square"]}}
    flat = {"a": {"kernel": KERNELS["wide"]}, "b": {"kernel": KERNELS["square"]}}
    kernels = {"a": (6, 14), "b": (8, 8)}
    got, wanted = (plan(tree, None, 0.6, signal="svd", kernels=kernels) for tree in (params, flat))
    assert (got.ranks, got.predicted) == (wanted.ranks, wanted.predicted)


@pytest.mark.parametrize("name", ["combined", "shampoo", "kfac", "exact", "fisher", "activation", "fwsvd", "svd"])
def test_units_are_those_of_the_loss_or_good_for_comparisons_only(name):
    assert SIGNALS[name].units == ("own" if name in ("activation", "fwsvd", "svd") else "loss")


def test_units_of_its_own_compare_no_kernel_with_another():
    """Whatever the size of a kernel, its ranks are the same; kernels of like spectra keep like shares."""
    encoder = PARAMS["encoder"] | {"wide": {"kernel": 100 * KERNELS["wide"]}}
    kernels = dict(zip(PATHS, SHAPES.values(), strict=True))
    for units, same in (("own", True), ("loss", False)):
        signal = SIGNALS["svd"]._replace(units=units)
        trees = (PARAMS, {"encoder": encoder})
        plans = [plan(params, None, 0.6, signal=signal, kernels=kernels) for params in trees]
        assert (plans[0].ranks == plans[1].ranks) == same
    like = {str(n): {"kernel": np.kron(np.eye(n), np.diag([3.0, 2, 1, 1]))} for n in (2, 4)}
    assert plan(like, None, 0.5, signal="svd").ranks == {"2": 2, "4": 4}


def test_predicted_in_units_of_its_own_is_the_share_that_is_lost():
    found = plan(PARAMS, None, 0.5, signal="svd", kernels=dict(zip(PATHS, SHAPES.values(), strict=True)))
    lost = 0.0
    for path, kernel in zip(PATHS, KERNELS.values(), strict=True):
        squares = np.linalg.svd(kernel.astype(np.float64), compute_uv=False) ** 2
        share = 0 if dense(path, found.ranks[path]) else np.sum(squares[found.ranks[path] :]) / np.sum(squares)
        lost += share * kernel.size / WHOLE
    assert found.predicted == pytest.approx(lost, rel=1e-6)


def test_a_plan_that_loses_a_large_share_of_all_says_so():
    """Of a kernel whose squares fall by 16 from each to the next, rank 1 loses a fifteenth; of equal ones, 7/8."""
    for factor, warned in ((4.0, False), (1.0, True)):
        params = {"a": {"kernel": np.diag(factor ** -np.arange(8.0))}}
        signal = SIGNALS["svd"]._replace(units="loss")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = plan(params, None, 0.25, signal=signal)
            plan(params, None, 0.25, signal="svd")  # whose units say nothing of the loss
            plan(params, None, 0.25, signal=signal, uniform=True)  # for comparison
        assert found.ranks == {"a": 1}
        assert len(caught) == warned
        for one in caught:
            assert str(one.message).startswith("budget 0.25: the loss is predicted to rise by 3.5, 87.5% of what")


def test_units_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="units of signal 'svd' must be one of 'loss', 'own'; got 'mine'"):
        plan(PARAMS, None, 0.5, signal=SIGNALS["svd"]._replace(units="mine"))


@pytest.mark.parametrize(
    ("unit", "whole"),
    [
        ("kernels", WHOLE),
        ("parameters", WHOLE + 14 + 5 + 8 + 15),
        ("flops", 2 * (WHOLE + 15)),
    ],
)
def test_share_is_of_what_the_budget_names(unit, whole):
    found = of(0.7, of=unit)
    numbers, _ = totals(found.ranks)
    price = {"flops": 2}.get(unit, 1)
    fixed = whole - price * WHOLE
    assert found.share == pytest.approx((price * numbers + fixed) / whole)
    assert found.share <= 0.7


def squares(kernel, weights):
    return components.decompose(kernel, *decompositions.sides(kernel, weights), 0).squares


@pytest.mark.parametrize("tall", [False, True])
def test_singular_values_are_those_of_the_coordinates_with_equal_weights(tall):
    kernel = KERNELS["wide"].astype(np.float64)
    m, n = kernel.shape
    row, col = (np.cov(RNG.normal(size=(size, 3 * size))) for size in (m, n))
    weights = wlra.Kronecker(row, col)
    if tall:
        kernel, weights = kernel.T, wlra.Kronecker(col, row)
    for value, k in ((weights, 2), (weights, 5)):
        got = np.sum(squares(kernel.astype(np.float32), value)[k:])
        cut = np.linalg.svd(np.linalg.cholesky(value.row).T @ kernel @ np.linalg.cholesky(value.col), compute_uv=False)
        np.testing.assert_allclose(got, np.sum(cut[k:] ** 2), rtol=1e-3)


@pytest.mark.parametrize("tall", [False, True])
def test_what_is_left_beside_a_dominant_eigenvalue_is_seen(tall):
    kernel, sides = RNG.normal(size=(20, 30)).astype(np.float32), []
    for size in kernel.shape:
        vectors = np.linalg.qr(RNG.normal(size=(size, size)))[0]
        sides.append(((vectors * np.append(1e6, RNG.uniform(0.1, 2, size - 1))) @ vectors.T).astype(np.float32))
    row, col = (np.linalg.cholesky(side.astype(np.float64)) for side in sides)
    wanted = np.linalg.svd(row.T @ kernel.astype(np.float64) @ col, compute_uv=False) ** 2
    given = (kernel.T, wlra.Kronecker(*sides[::-1])) if tall else (kernel, wlra.Kronecker(*sides))
    # The largest is 1e10 times the second; float64 sees the fifteenth to 1e-4.
    np.testing.assert_allclose(squares(*given)[:15], wanted[:15], rtol=1e-3)


def test_root_of_a_gram_matrix_that_rounding_made_indefinite():
    factor = RNG.normal(size=(6, 3))
    gram = factor @ factor.T
    gram -= 1e-3 * np.eye(6)
    half = square_root(gram)
    np.testing.assert_allclose(half @ half.T, gram, atol=2e-3 * np.max(np.abs(gram)))


def test_a_kernel_that_nothing_depends_on_gets_the_smallest_rank():
    nothing = replace(FISHER, sums=FISHER.sums | {"encoder/wide": Sums(fisher=jnp.zeros((2, 6, 14)))})
    assert plan(PARAMS, nothing, 0.5, signal="fisher").ranks["encoder/wide"] == 1


@pytest.mark.parametrize("uniform", [False, True])
def test_no_rank_is_above_the_number_of_components(uniform):
    """A model that was merged has no more of them; columns of zeros would be paid for."""
    merged = {f"{i}": {"kernel": (RNG.normal(size=(20, 3)) @ RNG.normal(size=(3, 20))).astype("f4")} for i in range(2)}
    planned = plan(merged, None, 0.8, signal="svd", uniform=uniform)
    assert set(planned.ranks.values()) <= {3, 10}  # or dense
    assert planned.predicted == 0


def test_hull_is_that_of_all_lines_between_points():
    x, y = np.sort(RNG.uniform(size=30)), RNG.uniform(size=30)
    corners = lower_hull(x, y)
    line = np.interp(x, x[corners], y[corners])
    assert np.all(line <= y + 1e-12)
    assert np.all(np.diff(np.diff(y[corners]) / np.diff(x[corners])) > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"share of the kernels to keep, in \(0, 1\]; got 0.0"),
        ({"budget": 1.5, "of": "bytes"}, r"share of the bytes to keep, in \(0, 1\]; got 1.5"),
        ({"budget": 0.01}, r"the smallest ranks take 0.\d+ of the kernels; got 0.01"),
        ({"budget": 0.5, "of": "layers"}, "of must be one of 'kernels', .*; got 'layers'"),
        ({"budget": 0.5, "shrink": 2.0}, r"shrunk towards simpler ones, in \[0, 1\]; got 2.0"),
        ({"budget": 0.5, "flops": 1.5}, r"operations that may be left, in \(0, 1\]; got 1.5"),
        ({"budget": 0.5, "flops": 0.5, "of": "flops"}, r"flops: got 0.5 with of='flops', wanted it beside"),
        ({"budget": 0.5, "flops": 0.5, "uniform": True}, "flops: got 0.5 with uniform, wanted it beside"),
        ({"budget": 0.5, "flops": 0.01}, r"the smallest ranks take 0.\d+ of the flops; got 0.01"),
        ({"budget": 0.5, "multiple_of": 0}, "multiple_of must be at least 1; got 0"),
        ({"budget": 0.5, "minimum": 4, "maximum": 2}, "maximum must be at least 4; got 2"),
        ({"budget": 0.5, "signal": "kfac"}, r"signal 'kfac' needs \['inputs', 'outputs'\] of encoder/"),
        ({"budget": 0.5, "kernels": {"encoder/none": (2, 2)}}, r"got \['encoder/none'\], which are no dense kernels"),
        ({"budget": 0.5, "kernels": {"encoder/wide": (7, 12)}}, r"axes \(6, 14\) is no matrix of shape \(7, 12\)"),
        ({"budget": 0.5, "signal": "magic"}, "signal must be one of .*; got 'magic'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(PARAMS, FISHER, **{"signal": "fisher"} | options)


@pytest.mark.parametrize("thin", [1, 2])
def test_equal_shares_leave_room_for_kernels_whose_smallest_rank_is_more_than_theirs(thin):
    shapes = {"thin": (thin, 64), "square": (64, 64)}
    params = {path: {"kernel": RNG.normal(size=shape).astype(np.float32)} for path, shape in shapes.items()}
    assert plan(params, None, 0.3125, signal="svd", uniform=True).share <= 0.3125
