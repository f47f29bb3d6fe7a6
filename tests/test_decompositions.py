"""One decomposition a kernel, whatever budget is asked for afterwards."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import bert_adapter
import wlra
from bert_adapter.decompositions import check_of, sides
from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.signals import SIGNALS
from bert_adapter.signals.weights import solver_weights
from wlra import components

RNG = np.random.default_rng(0)
SHRINK = 0.1  # Gram matrices of float32 are then positive definite in float64 too


@functools.cache
def model():
    return tiny.model()


@functools.cache
def measured():
    """Gram matrices of seeded numbers, of full rank or less, and one with a row of zeros."""
    sums = {}
    for i, (path, shape) in enumerate(bert_adapter.select_kernels(model()).items()):
        factors = [RNG.normal(size=(size, (1, size // 2, 3 * size)[i % 3])).astype(np.float32) for size in shape]
        factors[0][i % 5] = 0
        grams = [jnp.asarray(factor @ factor.T) for factor in factors]
        rows, inputs, outputs = jnp.diag(grams[0]), *grams
        sums[path] = Sums(rows=rows, inputs=inputs, outputs=outputs, row_gram=inputs, col_gram=outputs)
        sums[path] = sums[path]._replace(inputs=inputs @ inputs, gram_squares=jnp.sum(inputs**2) / 4)
    return Importance(sums, examples=7, tokens=21, batches=1, gradients="labels", seed=0)


@functools.cache
def known(signal="kfac"):
    return bert_adapter.decompose(model().params, measured(), signal=signal, progress=False)


def compress(**options):
    return bert_adapter.compress(model(), (), progress=False, **options)


def assert_same_params(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)


@pytest.mark.parametrize("signal", ["kfac", "activation", "fwsvd", "svd"])
@pytest.mark.parametrize("size", [{"budget": 0.5}, {"budget": 0.8, "of": "parameters"}, {"rank": 2}])
def test_every_budget_and_rank_is_cut_from_one_decomposition(signal, size, monkeypatch):
    calls, decompose = [], components.decompose
    monkeypatch.setattr(components, "decompose", lambda *inputs: calls.append(1) or decompose(*inputs))
    wanted, report = compress(**size, importance=measured(), signal=signal)
    assert len(calls) == len(report.kernels)
    ready = known(signal)
    calls.clear()
    got, other = compress(**size, importance=ready)
    assert not calls
    assert_same_params(got, wanted)
    assert (other.kernels, other.predicted, other.signal) == (report.kernels, report.predicted, report.signal)


def test_ranks_of_the_default_are_those_of_the_marginals_and_its_factors_its_own():
    """From one decomposition, and from the importance again."""
    wanted = bert_adapter.plan(model().params, measured(), 0.5, signal="shampoo")
    ready = known("combined")
    for given in (measured(), ready):
        planned = bert_adapter.plan(model().params, given, 0.5)
        assert (planned.ranks, planned.predicted) == (wanted.ranks, pytest.approx(wanted.predicted, rel=1e-9))
    small, report = compress(budget=0.5, importance=ready)
    again, _ = compress(budget=0.5, importance=measured())
    assert_same_params(small, again)
    assert {row.path: row.rank for row in report.kernels} == wanted.ranks
    other, _ = compress(rank=wanted.ranks, importance=measured(), signal="shampoo")
    apart = jax.tree.map(lambda a, b: bool(np.any(a != b)), small.params, other.params)
    assert any(jax.tree.leaves(apart))


@pytest.mark.parametrize(
    "signal",
    ["combined", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kfac", "activation", "fwsvd", "svd"))],
)
def test_factors_are_those_of_the_solver_in_float64(signal, x64):
    shrink = SHRINK if SIGNALS[signal].shrinks else None
    weights = solver_weights(measured(), signal, known(signal).shapes, shrink)
    small, report = compress(rank=3, importance=measured(), signal=signal, shrink=shrink)
    for row in report.kernels:
        kernel, factors = (tiny.at(each.params, row.path) for each in (model(), small))
        wide = jax.tree.map(lambda array: np.asarray(array, np.float64), (kernel["kernel"], weights[row.path]))
        wanted = wlra.solve(wide[0], wide[1], 3, method=report.method)
        assert row.loss[report.method] == pytest.approx(float(wanted.loss), rel=1e-5)
        error = np.asarray(wanted.left @ wanted.right) - reference.product((factors["left"], factors["right"]))
        row_weights, col_weights = (np.diag(side) if side.ndim == 1 else side for side in sides(*wide))
        whole = np.trace(row_weights @ wide[0] @ col_weights @ wide[0].T)
        assert np.trace(row_weights @ error @ col_weights @ error.T) <= (1e-5) ** 2 * whole


def test_kernels_in_float64_are_solved_in_float64(x64):
    """A decomposition that serves all of float32 is not good enough for them: the plan has its squares alone."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), model().params)
    found = bert_adapter.decompose(params, measured(), signal="kfac", progress=False)
    assert all(each.left is None for each in found.kernels.values())
    weights = solver_weights(measured(), "kfac", found.shapes, SHRINK)
    options = {"signal": "kfac", "shrink": SHRINK, "progress": False}
    small, report = bert_adapter.compress(model()._replace(params=params), (), rank=3, importance=measured(), **options)
    path = report.kernels[1].path
    wanted = reference.kronecker(tiny.at(params, path)["kernel"], *weights[path], k=3)
    got = reference.product((tiny.at(small.params, path)["left"], tiny.at(small.params, path)["right"]))
    halves = [reference.roots(side)[0] for side in weights[path]]
    error = halves[0] @ (got - wanted) @ halves[1]
    assert np.linalg.norm(error) <= 1e-10 * np.linalg.norm(halves[0] @ wanted @ halves[1])


def test_plan_is_the_same_from_the_importance_and_from_decompositions():
    got, wanted = (bert_adapter.plan(model().params, each, 0.4, signal="kfac") for each in (known(), measured()))
    assert got.ranks == wanted.ranks
    assert got.predicted == pytest.approx(wanted.predicted, rel=1e-9)


def test_some_kernels_are_planned_for():
    path, shape = next(iter(known().shapes.items()))
    assert set(bert_adapter.plan(model().params, known(), 0.4, kernels={path: shape}).ranks) == {path}


def test_what_was_given_is_left_whole():
    before = set(measured().sums)
    compress(budget=0.5, importance=measured(), signal="kfac")
    assert set(measured().sums) == before


def test_components_are_given_to_a_closed_form_only():
    path = next(iter(known().kernels))
    with pytest.raises(ValueError, match=f"{path}: got components for method 'anderson', wanted weights"):
        bert_adapter.factorise(model().params, known().kernels, {path: 1}, method="anderson", progress=False)
    squares = {path: known().kernels[path]._replace(left=None, right=None)}
    with pytest.raises(ValueError, match=f"{path}: got squares alone for method 'kronecker', wanted weights"):
        bert_adapter.factorise(model().params, squares, {path: 1}, method="kronecker", progress=False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another signal": ({"signal": "activation"}, "decomposed for signal 'kfac'; got signal='activation'"),
    "another share": ({"shrink": 0.5}, "decomposed for shrink=None; got shrink=0.5"),
    "other kernels": ({"include": "pooler"}, r"decomposed for \[.*\]; got \['pooler/dense'\] too"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_decompositions_of_something_else_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress(**{"budget": 0.5, "importance": known()} | options)


def test_decompositions_for_another_method_or_model_are_refused():
    with pytest.raises(ValueError, match="the closed form of signal 'fwsvd'; method 'anderson' needs the importance"):
        compress(budget=0.5, importance=known("fwsvd"), method="anderson")
    with pytest.raises(ValueError, match="decomposed for another model"):
        compress(budget=0.5, importance=known("svd")._replace(model="0"))


def test_values_that_cannot_be_used_are_said_with_the_path_of_their_kernel():
    path = list(measured().sums)[1]
    for change, message in ((np.nan, "weights.row has .* NaN"), (-1, "weights.row must be symmetric positive semi")):
        bad = measured()[path]._replace(inputs=change * jnp.asarray(measured()[path].inputs))
        importance = dataclasses.replace(measured(), sums=measured().sums | {path: bad})
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            bert_adapter.decompose(model().params, importance, signal="kfac", progress=False)


def test_what_is_no_importance_and_no_parameters_is_refused_by_name():
    with pytest.raises(ValueError, match=r"params: got list, wanted nested dicts of arrays: model\.params"):
        check_of(None, [])
    with pytest.raises(ValueError, match="importance: got str, wanted what measure_signal or decompose returns"):
        check_of("fisher", {})
