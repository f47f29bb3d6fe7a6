"""Of Gram matrices of a kernel's larger side, what the kernel passes on is all that plans and factors need."""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import bert_adapter
import wlra
from bert_adapter.importance import batch
from bert_adapter.importance.sums import Sums, shape_of
from bert_adapter.importance.through import Through, larger_side, of_kernel
from bert_adapter.layers.running import apply
from bert_adapter.signals import SIGNALS
from bert_adapter.signals.definition import Evidence
from bert_adapter.signals.reliability import gram_reliability
from bert_adapter.signals.weights import evidence_of, solver_weights
from wlra import components
from wlra.components import Seen

RNG = np.random.default_rng(4)
EPS = float(np.finfo(np.float32).eps)
STATISTICS = ("inputs", "outputs", "row_gram", "col_gram", "gram_squares")
PATHS = ("up", "down", "even")
BATCH = {
    "x": RNG.normal(size=(4, 3, 5)).astype(np.float32) + 1,
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    "weights": np.array([1.0, 2.0, 0.5, 1.0]),
}


class Net(nn.Module):
    """A layer that is wider than what enters it, one that is narrower, and one that is neither."""

    @nn.compact
    def __call__(self, x, mask):
        x = nn.Dense(4, name="down")(nn.tanh(nn.Dense(12, name="up")(x)))
        return nn.Dense(3, name="even")(nn.tanh(x * mask[:, :, None].astype(x.dtype)).sum(axis=1))


NET: Any = Net()


def run(params, batch):
    return apply(NET, params, batch["x"], batch["attention_mask"])


def sines(output, _):
    return jnp.sum(jnp.sin(output), axis=1)


@functools.cache
def params():
    shapes = jax.eval_shape(NET.init, jax.random.key(0), BATCH["x"], BATCH["attention_mask"])["params"]
    return jax.tree.map(lambda leaf: RNG.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def measured(whole, gradients: Any = sines, batches=(BATCH,), **options):
    how: dict[str, Any] = {"statistics": STATISTICS, "gradients": gradients, "progress": False} | options
    return bert_adapter.measure_importance(run, params(), batches, PATHS, whole=whole, **how)


measured_once = functools.cache(measured)


def exact(array) -> Any:
    return np.asarray(array, np.float64)


def passed_on(kernel, gram):
    """W gram W' of a wide kernel, W' gram W of a tall one."""
    wide = np.asarray(kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T, np.float64)
    return wide @ np.asarray(gram, np.float64) @ wide.T


@pytest.mark.parametrize("gradients", [sines, "categorical", "gaussian"])
def test_gram_matrices_of_the_larger_side_are_those_that_the_kernel_passes_on(gradients):
    got, wanted = (measured_once(whole, gradients) for whole in (False, True))
    for path, names in {"up": ("outputs", "col_gram"), "down": ("inputs", "row_gram"), "even": ()}.items():
        kernel = params()[path]["kernel"]
        for name in STATISTICS:
            found, known = (getattr(each[path], name) for each in (got, wanted))
            assert isinstance(found, Through) == (name in names)
            if isinstance(found, Through):
                matrix = passed_on(kernel, known)
                np.testing.assert_allclose(found.matrix, matrix, rtol=0, atol=50 * EPS * np.max(np.abs(matrix)))
                np.testing.assert_allclose(found.mean, np.mean(np.diag(known)), rtol=50 * EPS)
            else:
                np.testing.assert_allclose(found, known, rtol=50 * EPS, atol=50 * EPS * np.max(np.abs(known)))


@pytest.mark.parametrize("gradients", [sines, "gaussian"])
def test_squares_are_those_of_what_each_example_adds(gradients):
    """From what was measured on the examples one by one; but for the direction that is drawn for each, which is not."""
    if gradients == "gaussian":
        ones = {name: array[:1] for name, array in BATCH.items()}
        examples = [measured(False, gradients, [ones])]
        whole = examples[0]
    else:
        alone = [{name: array[i : i + 1] for name, array in BATCH.items()} for i in range(4)]
        examples, whole = [measured(False, gradients, [one]) for one in alone], measured_once(False, gradients)
    for path, name in {"up": "col_gram", "down": "row_gram"}.items():
        wanted = sum(np.sum(np.asarray(getattr(one[path], name).matrix, np.float64) ** 2) for one in examples)
        np.testing.assert_allclose(getattr(whole[path], name).squares, wanted, rtol=100 * EPS)


@pytest.mark.parametrize("gradients", [sines, "gaussian"])
@pytest.mark.parametrize("signal", ["combined", "shampoo", "kfac", "activation"])
def test_plans_and_factors_are_those_of_whole_matrices(signal, gradients):
    got, wanted = (
        bert_adapter.decompose(params(), measured_once(whole, gradients), signal=signal, shrink=0.1, progress=False)
        for whole in (False, True)
    )
    for path in PATHS:
        one, other = wanted.squares[path], got.squares[path]
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6 * np.sum(one))
        products = [reference.product(components.cut(each.kernels[path], 2)) for each in (wanted, got)]
        np.testing.assert_allclose(products[1], products[0], rtol=0, atol=1e-5 * np.max(np.abs(products[0])))


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
@pytest.mark.parametrize("rank", [1, 3, 60])
@pytest.mark.parametrize("power", [-60, 0, 60])
def test_components_by_what_the_target_sees_are_those_by_the_side_itself(shape, rank, power):
    """Gram matrices of rank 1, of half the rank and of full rank, with a row of zeros, of any scale."""
    target = RNG.normal(size=shape).astype(np.float32)
    halves = [RNG.normal(size=(size, min(rank, 3 * size))).astype(np.float32) for size in shape]
    halves[0][1] = 0
    sides: list[Any] = [np.ldexp(half @ half.T, power) for half in halves]
    wanted = components.decompose(target, *sides, rank=4)
    larger = int(shape[1] > shape[0])
    gram = passed_on(target, sides[larger])
    sides[larger] = Seen(gram)
    got = components.decompose(target, *sides, rank=4)
    whole = np.sum(wanted.squares)
    np.testing.assert_allclose(got.squares, wanted.squares, rtol=1e-5, atol=1e-6 * whole)
    for k in (1, 2):
        products = [reference.product(components.cut(each, k)) for each in (wanted, got)]
        np.testing.assert_allclose(*products, rtol=0, atol=1e-4 * np.max(np.abs(products[0])))


def test_a_target_of_zeros_is_decomposed_and_values_that_cannot_be_are_named():
    wide, row = np.ones((2, 8), np.float32), np.eye(2)
    found = components.decompose(0 * wide, row, Seen(np.zeros((2, 2))), rank=1)
    assert found.squares.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"weights\.col must be symmetric positive semi-definite and not zero"):
        components.decompose(wide, row, Seen(np.zeros((2, 2))), rank=1)
    with pytest.raises(ValueError, match="W has 16 NaN or infinite entries"):
        components.decompose(np.nan * wide, row, Seen(np.eye(2)), rank=1)
    with pytest.raises(ValueError, match=r"weights\.col"):
        components.decompose(wide, row, Seen(np.full((2, 2), np.inf)), rank=1)


@pytest.mark.parametrize("examples", [4, 16])
def test_reliability_is_of_what_is_passed_on(examples):
    """The share of the deviation from W W' that is no noise, over many draws of examples with a known mean."""
    kernel = RNG.normal(size=(4, 12))
    scales = np.diag(np.geomspace(3, 0.3, 12))
    shares, wanted = [], []
    for _ in range(400):
        gradients = RNG.normal(size=(examples, 2, 12)) @ scales
        grams = np.einsum("bto,btq->boq", gradients, gradients)
        matrices = np.stack([passed_on(kernel, gram) for gram in grams])
        mean = np.trace(grams.sum(axis=0)) / 12
        held = Through(matrices.sum(axis=0), mean, np.sum(matrices**2))
        known: Any = of_kernel(held, kernel, kernel.shape)
        evidence = Evidence(Sums(col_gram=known), examples, (4, 12))
        deviation = np.sum((matrices.sum(axis=0) - mean * kernel @ kernel.T) ** 2)
        truth = 2 * examples * passed_on(kernel, scales**2)
        shares.append(gram_reliability(evidence)[0] * deviation)
        wanted.append(deviation - np.sum((matrices.sum(axis=0) - truth) ** 2))
    assert np.mean(shares) == pytest.approx(np.mean(wanted), rel=0.1)


def test_what_is_passed_on_is_shrunk_by_the_square_of_its_reliability():
    kernel = params()["up"]["kernel"]
    evidence = evidence_of(measured_once(False), "up", (5, 12), kernel)
    share, gram = gram_reliability(evidence)[1] ** 2, cast(Any, evidence.sums.col_gram)
    assert 0 < share < 1
    identity = float(gram.mean) * exact(kernel) @ exact(kernel).T
    wanted = (share * exact(gram.matrix) + (1 - share) * identity) / np.trace(exact(evidence.sums.row_gram))
    found = SIGNALS["shampoo"].weights(evidence, None).col
    np.testing.assert_allclose(found.matrix, wanted, rtol=0, atol=50 * EPS * np.max(np.abs(wanted)))


def test_files_and_sums_keep_what_is_passed_on(tmp_path):
    once = measured_once(False)
    bert_adapter.save_importance(once, tmp_path / "sums")
    again = bert_adapter.load_importance(tmp_path / "sums")
    assert jax.tree.structure(again.sums) == jax.tree.structure(once.sums)
    for one, other in zip(jax.tree.leaves(again.sums), jax.tree.leaves(once.sums), strict=True):
        np.testing.assert_array_equal(one, other)
    twice = once + dataclasses.replace(again, texts=())
    for one, other in zip(jax.tree.leaves(twice["up"]), jax.tree.leaves(once["up"]), strict=True):
        np.testing.assert_allclose(one, 2 * np.asarray(other), rtol=2 * EPS)
    with pytest.raises(ValueError, match="wanted two measurements of the same; got down: "):
        _ = once + measured_once(True)
    with pytest.raises(ValueError, match="holds another measurement than is wanted: down: "):
        measured(True, file=tmp_path / "sums")


def test_a_measurement_that_was_killed_goes_on_with_what_is_passed_on(tmp_path):
    other = BATCH | {"x": BATCH["x"] + 1}
    wanted = measured(False, batches=[BATCH, other])
    measured(False, batches=[BATCH], file=tmp_path / "sums")
    got = measured(False, batches=[BATCH, other], file=tmp_path / "sums")
    for one, other in zip(jax.tree.leaves(got.sums), jax.tree.leaves(wanted.sums), strict=True):
        np.testing.assert_array_equal(one, other)


def test_numbers_that_overflow_are_found_wherever_they_are_held():
    steps = batch.entering(jnp.ones((1, 2, 2)), None, None)
    total = batch.no_sums(("row_gram", "col_gram"), 2, 4, through=1)
    for size, fine in ((1.0, True), (1e12, False)):  # whose fourth power is beyond float32
        left = batch.Leaving(jnp.full((1, 1, 2, 2), size), 4 * jnp.ones((1, 2, 2)), 4)
        _, good = batch.add_kernel(jax.tree.map(jnp.copy, total), steps, left, 0)
        assert bool(good) == fine


def test_a_kernel_of_another_model_needs_whole_matrices():
    other = jax.tree.map(lambda leaf: 2 * leaf, params())
    for whole in (True, False):
        free = dataclasses.replace(measured_once(whole), model="")
        if whole:
            assert bert_adapter.decompose(other, free, progress=False).kernels.keys() == set(PATHS)
        else:
            with pytest.raises(ValueError, match=r"fit another model's kernels is of whole matrices; .*whole=True"):
                bert_adapter.decompose(other, free, progress=False)


def test_signals_that_need_no_such_matrix_take_any_measurement():
    found = bert_adapter.decompose(params(), measured_once(False), signal="svd", progress=False)
    assert found.kernels.keys() == set(PATHS)


@pytest.mark.parametrize("rows", [1, 3])
def test_columns_that_are_no_weights_are_refused_where_they_are_multiplied_once(rows):
    """Of a kernel of one row, an antisymmetric part leaves nothing to see."""
    kernel, col = RNG.normal(size=(rows, 9)).astype(np.float32), np.eye(9) + np.triu(np.ones((9, 9)), 1)

    def weights(evidence, shrink):
        return wlra.Kronecker(np.eye(rows), col)

    own = SIGNALS["svd"]._replace(name="own", weights=weights, ranks=weights, method="kronecker")
    with pytest.raises(ValueError, match=r"weights\.col must be symmetric positive semi-definite"):
        bert_adapter.decompose({"layer": {"kernel": kernel}}, None, signal=own, progress=False)


def batches_of_net():
    return [{"x": BATCH["x"], "mask": BATCH["attention_mask"]}]


@pytest.mark.parametrize("kind", ["float64", "own method"])
def test_whole_matrices_are_measured_where_factors_are_not_cut(kind):
    """float64 without x64, which JAX makes float32 of; and a method that is not the signal's own."""
    wide = params() if kind == "own method" else jax.tree.map(lambda leaf: leaf.astype(np.float64), params())
    method = None if kind == "float64" else wlra.METHODS["kronecker"]._replace(on_host=None)
    _, report = bert_adapter.compress((NET, wide), batches_of_net(), rank=2, method=method, progress=False)
    assert [row.status for row in report.kernels] == ["CONVERGED"] * 2 + ["DENSE"] * (len(report.kernels) - 2)


def test_whole_matrices_are_asked_for_where_they_are_needed():
    through, shapes = measured_once(False), {"up": (5, 12)}
    with pytest.raises(ValueError, match=r"weights for the solver are of whole matrices; got .* of up .*whole=True"):
        solver_weights(through, "shampoo", shapes)
    with pytest.raises(ValueError, match=r"plans of bytes.*whole matrices; got .* of up .*whole=True"):
        bert_adapter.decompose(params(), through, kernels=shapes, bits=True, progress=False)
    mine = SIGNALS["shampoo"]._replace(name="mine", through=False)
    with pytest.raises(ValueError, match=r"signal 'mine' is of whole matrices; got .* of up .*whole=True"):
        bert_adapter.decompose(params(), through, signal=mine, kernels=shapes, progress=False)
    assert np.shape(solver_weights(through, "shampoo", {"even": (4, 3)})["even"].col) == (3, 3)


@pytest.mark.parametrize(("options", "whole"), [({}, False), ({"of": "bytes"}, True)])
def test_compress_measures_whole_matrices_for_plans_of_bytes_alone(options, whole, tmp_path):
    model, file = tiny.model(intermediate_size=32), tmp_path / "sums"
    bert_adapter.compress(model, [tiny.BATCH], budget=0.5, file=file, progress=False, **options)
    found = bert_adapter.load_importance(file).sums
    assert any(isinstance(sums.col_gram, Through) for sums in found.values()) != whole


def test_kernels_of_float64_and_signals_of_ones_own_have_whole_matrices(x64):
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params())
    paths = {"statistics": STATISTICS, "gradients": sines, "whole": False, "progress": False}
    batch = BATCH | {"x": BATCH["x"].astype(np.float64)}
    found = bert_adapter.measure_importance(run, wide, [batch], PATHS, **paths)
    assert shape_of(found["up"].col_gram) == (12, 12)
    mine = SIGNALS["shampoo"]._replace(name="mine", through=False)
    found = bert_adapter.measure_signal(run, params(), [BATCH], PATHS, signal=mine, gradients=sines, progress=False)
    assert shape_of(found["up"].col_gram) == (12, 12)


def test_a_side_is_larger_from_twice_the_other_on():
    assert [larger_side(shape) for shape in ((4, 8), (8, 4), (4, 7), (7, 4), (4, 4))] == [1, 0, None, None, None]
