"""How many bits matrices are stored in: what is kept of their values, on the disk and by the plan."""

import functools
import json
import math
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import test_export
import tiny
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file
from tiny import BATCH

import bert_adapter
from bert_adapter import load, merge, save
from bert_adapter.checkpoint.bits import (
    DTYPES,
    INTEGERS,
    as_stored,
    dequantised,
    encoded,
    factorised_tables,
    joined,
    layers_of,
    parts_of,
    quantised,
    size,
)
from bert_adapter.checkpoint.names import by_path, dtypes_of
from bert_adapter.checkpoint.nibbles import DAMPING, compensated, feedback, scales, steps
from bert_adapter.choices import dtype_named
from bert_adapter.cli import main, weights_in
from bert_adapter.compressing import that_fit
from bert_adapter.families import module_for
from bert_adapter.importance.fingerprint import of_params as fingerprint
from bert_adapter.layers.integers import multiplied
from bert_adapter.ranks import Budget, all_choices
from bert_adapter.report import summary
from bert_adapter.rounding import rounding
from wlra import components

RNG = np.random.default_rng(0)
WORDS, QUERY = "embeddings/word_embeddings", "encoder/layer/0/attention/self/query"
FILE, TENSOR = "factorised.safetensors", "encoder.layer.0.attention.self.query.weight"


@functools.cache
def factorised() -> Any:
    """One with factors of a kernel and of the table of words."""
    return tiny.with_factors(tiny.model(), {QUERY: 3, WORDS: 4})


def output(model):
    return np.asarray(bert_adapter.apply(model.module, model.params, **BATCH))


# Rounding.


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16])
def test_integers_and_scales_are_as_near_as_can_be(by_rows, dtype):
    array = RNG.normal(size=(9, 5)) * np.geomspace(1e-6, 1e6, 9 if by_rows else 5)[(..., None) if by_rows else ...]
    array = array.astype(dtype)
    numbers, scale = quantised(array, by_rows)
    assert (numbers.dtype, scale.shape) == (np.int8, (9, 1) if by_rows else (1, 5))
    wide, axis = array.astype(np.float64), 1 if by_rows else 0
    np.testing.assert_allclose(scale, np.max(np.abs(wide), axis=axis, keepdims=True) / 127, rtol=1e-6)
    assert np.all(np.abs(dequantised(numbers, scale) - wide) <= (0.5 + 1e-5) * scale)


@pytest.mark.parametrize("by_rows", [True, False])
def test_what_was_rounded_is_stored_as_the_same_integers_again(by_rows):
    numbers, scale = quantised(RNG.normal(size=(300, 40)).astype(np.float32), by_rows)
    again, same = quantised(dequantised(numbers, scale), by_rows)
    np.testing.assert_array_equal(again, numbers)
    np.testing.assert_array_equal(same, scale)


def test_rows_of_zeros_stay_zero():
    numbers, scale = quantised(np.zeros((2, 3), np.float32), by_rows=True)
    assert not numbers.any()
    assert not scale.any()


def test_every_matrix_of_a_stack_has_its_own_scales():
    stack = RNG.normal(size=(2, 4, 3)).astype(np.float32) * np.array([1, 100], np.float32)[:, None, None]
    numbers, scale = quantised(stack, by_rows=False)
    for i in (0, 1):
        alone = quantised(stack[i], by_rows=False)
        np.testing.assert_array_equal(numbers[i], alone[0])
        np.testing.assert_array_equal(scale[i], alone[1])


# Rounding to 4 bits.


@pytest.mark.parametrize("by_rows", [True, False])
def test_of_two_scales_a_group_of_four_bits_has_the_nearer(by_rows):
    array = (RNG.normal(size=(130, 70)) * np.geomspace(1e-6, 1e6, 130)[:, None]).astype(np.float32)
    found, scale = steps(array, by_rows)
    assert scale.shape == ((130, 2) if by_rows else (3, 70))
    assert (int(found.min()), int(found.max())) == (-8, 7)
    lying, lies = (
        (array, multiplied(found, scale, by_rows)) if by_rows else (array.T, multiplied(found, scale, by_rows).T)
    )
    for begin in range(0, lying.shape[1], 64):
        group, its = (each[:, begin : begin + 64].astype(np.float64) for each in (lying, lies))
        end = np.take_along_axis(group, np.argmax(np.abs(group), axis=1)[:, None], axis=1)
        errors = []
        for step in (-end / 8, np.abs(end) / 7):
            step = step.astype(bfloat16).astype(np.float64)
            errors.append(np.sum((np.clip(np.round(group / step), -8, 7) * step - group) ** 2, axis=1))
        np.testing.assert_allclose(np.sum((its - group) ** 2, axis=1), np.minimum(*errors), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (65, 7), (2, 9, 64), (300, 40)])
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("unit", [1, 1e-30, 1e37])
def test_what_integers_multiply_out_to_is_stored_as_the_same_again(shape, dtype, by_rows, unit):
    array = (unit * RNG.normal(size=shape)).astype(np.float32)
    parts = parts_of(array, dtype, by_rows)
    read = joined(parts)
    assert np.max(np.abs(read - array)) <= np.max(np.abs(array)) / {"int8": 127, "int4": 8}[dtype] * 1.01
    assert read.shape == shape
    assert sum(part.nbytes for part in parts.values()) == size(shape, dtype, by_rows)
    again = parts_of(read, dtype, by_rows)
    for end, part in parts.items():
        np.testing.assert_array_equal(again[end], part)


def correlated(m):
    """A Gram matrix of inputs, most of which are sums of a few."""
    inputs = RNG.normal(size=(4 * m, m // 8)) @ RNG.normal(size=(m // 8, m)) + 0.3 * RNG.normal(size=(4 * m, m))
    return inputs.T @ inputs


def test_errors_of_one_input_are_made_up_for_by_those_to_come_as_gptq_does():
    """Frantar et al. 2023, algorithm 1: errors go to later inputs by the inverse of the Gram matrix."""
    kernel, gram = RNG.normal(size=(150, 6)), correlated(150)
    damped = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(150)
    upper, left = np.linalg.cholesky(np.linalg.inv(damped)).T, kernel.copy()
    found, wanted = compensated(kernel.astype(np.float32), feedback(gram)), np.empty_like(kernel)
    for i in range(150):
        if i % 64 == 0:
            group = np.zeros((6, 64), np.float32)
            group[:, : min(64, 150 - i)] = left[i : i + 64].T
            scale = scales(group).astype(np.float64)
        wanted[i] = np.clip(np.round(left[i] / scale), -8, 7) * scale
        left[i:] -= np.outer(upper[i, i:], (left[i] - found[i]) / upper[i, i])  # by what was chosen, ties too
    assert np.mean(np.abs(found - wanted) < 1e-6) > 0.99


def test_of_inputs_that_occur_together_a_fraction_is_lost():
    kernel, gram = RNG.normal(size=(256, 40)).astype(np.float32), correlated(256)
    near = multiplied(*steps(kernel, False), False)
    less = compensated(kernel, feedback(gram))
    lost = [np.sum((kernel - each) * (gram @ (kernel - each))) for each in (near, less)]
    assert lost[1] < 0.3 * lost[0]
    np.testing.assert_array_equal(multiplied(*steps(less, False), False), less)
    np.testing.assert_array_equal(compensated(kernel, feedback(np.diag(np.arange(256.0)))), near)


# Plans.


SHAPES = {"wide": (12, 30), "table": (40, 10), "square": (16, 16)}


@functools.cache
def planned_for() -> tuple[Any, Any]:
    """Parameters of which some are not selected, and what is known of those that are: all weights are equal."""
    params: Any = {
        path: {"embedding" if path == "table" else "kernel": RNG.normal(size=shape).astype(np.float32)}
        for path, shape in SHAPES.items()
    }
    params |= {"head": {"kernel": RNG.normal(size=(6, 5)).astype(np.float32), "bias": np.ones(5, np.float32)}}
    return params, bert_adapter.decompose(params, None, signal="svd", kernels=SHAPES, bits=True)


def stored_bytes(params, dtypes):
    return sum(array.nbytes for array in encoded(by_path(params), dtypes, factorised_tables(params)).values())


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3, 0.5, 0.8])
def test_a_plan_of_bytes_predicts_the_size_and_the_loss_of_what_is_stored(budget):
    params, known = planned_for()
    planned = bert_adapter.plan(params, known, budget, of="bytes")
    small, _ = bert_adapter.factorise(params, known.kernels, planned.ranks, method="svd", progress=False)
    whole = stored_bytes(params, {})
    assert planned.share <= budget
    assert stored_bytes(small, planned.dtypes) == pytest.approx(planned.share * whole)
    read = merge(as_stored(small, planned.dtypes))
    lost = {path: np.sum((leaf - by_path(read)[path]) ** 2) / np.sum(leaf**2) for path, leaf in by_path(params).items()}
    sizes = {path: np.prod(shape) for path, shape in SHAPES.items()}
    wanted = sum(lost[f"{path}/{'embedding' if path == 'table' else 'kernel'}"] * sizes[path] for path in sizes)
    np.testing.assert_allclose(planned.predicted, wanted / sum(sizes.values()), rtol=0.1)  # rounding is interpolated
    assert planned.dtypes["head"] == "float16"


def test_a_plan_of_bytes_loses_less_than_one_of_ranks_alone():
    """At a quarter of the bytes, all integers: nothing is left of that precision for floats of so low a rank."""
    params, known = planned_for()
    for budget in (0.3, 0.5):
        bits = bert_adapter.plan(params, known, budget, of="bytes")
        ranks = bert_adapter.plan(params, known, budget, of="parameters")
        assert bits.predicted < 0.5 * ranks.predicted


def operations(ranks):
    """For a token: of a kernel its numbers, or those of its factors, twice; of a table of factors, those of `right`."""
    factors = {"wide": 42, "square": 32, "table": 10}
    dense = {"wide": 360, "square": 256, "table": 0}
    wide = {path: m * n / (m + n) for path, (m, n) in SHAPES.items()}
    spent = [factors[path] * rank if rank < wide[path] else dense[path] for path, rank in ranks.items()]
    return 2 * (sum(spent) + 30)  # and of the head


@pytest.mark.parametrize("budget", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("flops", [0.3, 0.5, 0.8, 1.0])
def test_a_plan_of_bytes_keeps_to_a_share_of_the_operations_too(budget, flops):
    params, known = planned_for()
    free = bert_adapter.plan(params, known, budget, of="bytes")
    both = bert_adapter.plan(params, known, budget, of="bytes", flops=flops)
    whole = operations(dict.fromkeys(SHAPES, 100))
    assert both.share <= budget
    assert operations(both.ranks) <= flops * whole
    assert both.predicted >= 0.8 * free.predicted  # steps of so small a matrix are large
    if operations(free.ranks) <= flops * whole:
        assert (both.ranks, both.dtypes) == (free.ranks, free.dtypes)
    small, _ = bert_adapter.factorise(params, known.kernels, both.ranks, method="svd", progress=False)
    assert stored_bytes(small, both.dtypes) == pytest.approx(both.share * stored_bytes(params, {}))


@pytest.mark.parametrize(("budget", "flops"), [(0.15, 0.3), (0.25, 0.5), (0.3, 0.3)])
def test_no_plan_within_both_budgets_predicts_much_less(budget, flops):
    """All options of three matrices, which are so small that the steps of one are large."""
    params, known = planned_for()
    limit = flops * operations(dict.fromkeys(SHAPES, 100)) - 60
    flat = by_path(params)
    every = list(all_choices(known, flat, Budget(budget, "bytes")).values())
    whole = stored_bytes(params, {})
    fixed = whole - sum(choice.cost.max() for choice in every) - 60  # of the head, at 16 bits
    cost, spent, loss = (
        functools.reduce(np.add.outer, [getattr(choice, name) for choice in every])
        for name in ("cost", "flops", "loss")
    )
    least = np.min(loss[(fixed + cost <= budget * whole) & (spent <= limit)])
    found = bert_adapter.plan(params, known, budget, of="bytes", flops=flops).predicted
    assert least * (1 - 1e-6) <= found <= 1.1 * least


@pytest.mark.parametrize(("budget", "flops"), [(0.15, None), (0.4, None), (0.25, 0.5)])
def test_nothing_is_left_that_could_still_be_spent(budget, flops):
    params, known = planned_for()
    planned = bert_adapter.plan(params, known, budget, of="bytes", flops=flops)
    whole, every = stored_bytes(params, {}), all_choices(known, by_path(params), Budget(budget, "bytes"))
    rest = (budget - planned.share) * whole
    spent = math.inf if flops is None else flops * operations(dict.fromkeys(SHAPES, 100)) - operations(planned.ranks)
    for path, choice in every.items():
        named = np.array([dtype_named(int(bits)) == planned.dtypes.get(path) for bits in choice.bits])
        (has,) = np.flatnonzero(named & (choice.rank == planned.ranks[path]))
        fits = (choice.cost - choice.cost[has] < rest) & (choice.flops - choice.flops[has] < spent)
        assert np.min(choice.loss[fits], initial=np.inf) >= choice.loss[has]


def test_all_bytes_are_kept_as_they_are():
    params, known = planned_for()
    planned = bert_adapter.plan(params, known, 1.0, of="bytes")
    assert (planned.share, planned.predicted, planned.dtypes) == (1.0, 0.0, {})


def test_a_plan_of_bytes_needs_to_know_what_rounding_loses():
    params, _ = planned_for()
    known = bert_adapter.decompose(params, None, signal="svd", kernels=SHAPES)
    with pytest.raises(ValueError, match=r"decomposed without bits.*decompose\(..., bits=True\)"):
        bert_adapter.plan(params, known, 0.5, of="bytes")


def test_too_few_bytes_are_refused_before_anything_is_measured():
    params, known = planned_for()
    least = bert_adapter.plan(params, known, 0.1, of="bytes").curve.share[len(SHAPES) - 1]
    with pytest.raises(ValueError, match=f"the smallest ranks take {least:.4g} of the bytes; got 0.02"):
        bert_adapter.plan(params, known, 0.02, of="bytes")


def test_a_model_is_compressed_to_a_share_of_its_bytes(tmp_path):
    model = tiny.model()
    small, report = bert_adapter.compress(model, [BATCH], budget=0.4, of="bytes", signal="fwsvd", progress=False)
    save(model, tmp_path / "dense")
    save(small, tmp_path / "small")
    tensors = [load_file(file) for file in (tmp_path / "dense/model.safetensors", tmp_path / "small" / FILE)]
    whole, part = (sum(tensor.nbytes for tensor in each.values()) for each in tensors)
    assert part <= 0.4 * whole
    assert INTEGERS.keys() & set(report.dtypes.values())
    np.testing.assert_array_equal(output(load(tmp_path / "small")), output(small))
    assert "Stored in fewer bits" in summary(report)


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("held", ["float16", "int8", "int4"])
def test_a_budget_is_of_what_matrices_take_though_fewer_bits_hold_them_exactly(budget: float, held: str):
    params, _ = planned_for()
    rounded = as_stored(params, dict.fromkeys(SHAPES, held))
    known = bert_adapter.decompose(rounded, None, signal="svd", kernels=SHAPES, bits=True)
    planned = bert_adapter.plan(rounded, known, budget, of="bytes")
    small, _ = bert_adapter.factorise(rounded, known.kernels, planned.ranks, method="svd", progress=False)
    assert planned.share <= budget
    assert stored_bytes(small, planned.dtypes) == pytest.approx(planned.share * stored_bytes(params, {}))


def test_what_is_behind_an_encoder_stays_as_it_is_in_plans_too(tmp_path):
    files = tiny.FILES | test_export.STAGES
    module = module_for(tiny.config(), files)
    dense = tiny.model()._replace(module=module, files=files, params=tiny.random_params(module, size=0.3))
    for include in (None, "query|2_Dense"):
        options: Any = {"signal": "svd", "budget": 0.4 if include is None else 0.9, "of": "bytes", "include": include}
        small, report = bert_adapter.compress(dense, [], **options, progress=False)
        assert not [path for path in report.dtypes if path.startswith("2_Dense")]
        save(small, tmp_path / "small")
        np.testing.assert_array_equal(output(load(tmp_path / "small")), output(small))


def test_a_model_of_integers_is_compressed_to_what_is_saved(tmp_path):
    save(tiny.model(), tmp_path / "int4", dtype="int4")
    small, _ = bert_adapter.compress(load(tmp_path / "int4"), [], rank=4, signal="svd", include="query", progress=False)
    assert dtypes_of(small.config)[QUERY] == "int4"  # of the factors
    save(small, tmp_path / "small")
    np.testing.assert_array_equal(output(load(tmp_path / "small")), output(small))


@pytest.mark.parametrize("scales", [(1e6, 1.0), (1e-6, 1.0), (1.0, 1e-38)])
def test_matrices_of_a_stack_have_bits_that_hold_all_of_them(scales):
    kernel = RNG.normal(size=(2, 12, 16)).astype(np.float32) * np.array(scales, np.float32)[:, None, None]
    params, shapes = {"layers": {"kernel": kernel}}, {"layers[0]": (12, 16), "layers[1]": (12, 16)}
    known = bert_adapter.decompose(params, None, signal="svd", kernels=shapes, bits=True)
    for budget in (0.15, 0.3, 0.55):
        planned = bert_adapter.plan(params, known, budget, of="bytes")
        small, _ = bert_adapter.factorise(params, known.kernels, planned.ranks, method="svd", progress=False)
        read = merge(as_stored(small, planned.dtypes, known.given))["layers"]["kernel"]
        wide = kernel.astype(np.float64)
        lost = np.sum((read - wide) ** 2, axis=(1, 2)) / np.sum(wide**2, axis=(1, 2))
        assert np.all(lost <= 1.01)


# Directories.


@pytest.mark.parametrize("given", [tiny.model, factorised])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_matrices_are_stored_as_integers_beside_their_scales(given, dtype, tmp_path):
    model = given()
    save(model, tmp_path / "small", dtype=dtype)
    tensors = load_file(tmp_path / "small" / FILE)
    matrices = [name for name, tensor in tensors.items() if tensor.dtype == INTEGERS[dtype]]
    params = by_path(model.params)
    assert len(matrices) == sum(np.ndim(leaf) == 2 for leaf in params.values())
    assert {name for name in tensors if name.endswith("_scale")} == {f"{name}_scale" for name in matrices}
    loaded = load(tmp_path / "small")
    for path, leaf in by_path(loaded.params).items():
        wanted = params[path]
        if np.ndim(wanted) == 2:
            by_rows = path.endswith("embedding") or path == f"{WORDS}/left"
            np.testing.assert_array_equal(leaf, joined(parts_of(wanted, dtype, by_rows)))
        else:
            np.testing.assert_array_equal(leaf, wanted)
    near = {"int8": 0.1, "int4": 0.8}[dtype]  # of 127 and of 8 steps
    assert np.abs(output(loaded) - output(model)).max() < near * np.abs(output(model)).max()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_directory_of_integers_is_saved_as_it_was_loaded(dtype, tmp_path):
    save(factorised(), tmp_path / "first", dtype=dtype)
    save(load(tmp_path / "first"), tmp_path / "second")
    for name in (FILE, "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    save(load(tmp_path / "first"), tmp_path / "wide", dtype="float32")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert config["low_rank"]["schema"] == 1
    assert "dtypes" not in config["low_rank"]
    np.testing.assert_array_equal(output(load(tmp_path / "wide")), output(load(tmp_path / "first")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_of_sixteen_bits_are_what_other_libraries_read(dtype, tmp_path):
    save(tiny.model(), tmp_path, dtype=dtype)
    assert "low_rank" not in json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values() if tensor.ndim == 2} == {dtype}
    assert {str(tensor.dtype) for tensor in tensors.values() if tensor.ndim == 1} == {"float32"}
    kernel = tiny.at(tiny.model().params, QUERY)["kernel"]
    np.testing.assert_array_equal(tensors[TENSOR].T, kernel.astype(bfloat16 if dtype == "bfloat16" else dtype))
    assert load(tmp_path).config == tiny.model().config


MASKED = "BertForMaskedLM"


@functools.cache
def with_decoder() -> Any:
    """One whose decoder is tied to the table of words."""
    return tiny.model(MASKED)


@pytest.mark.parametrize("given", [tiny.model, factorised, with_decoder])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_may_stay_so_in_memory(given, dtype, tmp_path):
    save(given(), tmp_path / "small", dtype=dtype)
    floats, kept = load(tmp_path / "small"), load(tmp_path / "small", integers=True)
    whole, part = (sum(leaf.nbytes for leaf in by_path(each.params).values()) for each in (floats, kept))
    assert part < {"int8": 0.55, "int4": 0.5}[dtype] * whole  # of matrices so small that scales and biases count
    run = jax.jit(bert_adapter.forward(kept))
    np.testing.assert_allclose(run(kept.params, BATCH), run(floats.params, BATCH), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output(kept), output(floats), rtol=1e-5, atol=1e-6)
    assert fingerprint(kept.params) == fingerprint(floats.params)
    save(kept, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "small" / FILE).read_bytes()
    save(merge(kept), tmp_path / "merged")
    np.testing.assert_allclose(output(load(tmp_path / "merged")), output(floats), rtol=1e-5, atol=1e-6)


def test_of_a_table_of_integers_rows_alone_are_multiplied_out(tmp_path):
    for model in (tiny.model(), factorised()):
        save(model, tmp_path / "small", dtype="int4")
        kept = load(tmp_path / "small", integers=True)
        program = str(jax.make_jaxpr(bert_adapter.forward(kept))(kept.params, BATCH))
        words, width = tiny.at(tiny.model().params, WORDS)["embedding"].shape
        assert f"f32[{words},{width}]" not in program
        assert f"f32[{words},4]" not in program


@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_bfloat16_is_rounded_to_is_what_is_read(dtype: str, tmp_path):
    model = tiny.cast(tiny.model(), bfloat16)
    rounded = as_stored(model.params, dict.fromkeys(layers_of(by_path(model.params)), dtype))
    save(model, tmp_path, dtype=dtype)
    for path, leaf in by_path(load(tmp_path).params).items():
        np.testing.assert_array_equal(leaf, by_path(rounded)[path])


def test_a_directory_of_small_numbers_in_sixteen_bits_is_saved_again(tmp_path):
    params: Any = jax.tree.map(lambda leaf: leaf, tiny.model().params)
    tiny.at(params, QUERY)["kernel"] = np.full((16, 16), 3e-5, np.float16).astype(np.float32)
    dtypes: Any = {"schema": 2, "ranks": {}, "dtypes": {QUERY: "float16", WORDS: "int8"}}
    save(tiny.model()._replace(params=params, config=tiny.config(low_rank=dtypes)), tmp_path)
    np.testing.assert_array_equal(tiny.at(load(tmp_path).params, QUERY)["kernel"], tiny.at(params, QUERY)["kernel"])


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_numbers_that_are_none_are_refused_of_a_module_of_ones_own(dtype, tmp_path):
    import flax.linen as nn

    model = bert_adapter.as_model((nn.Dense(3), {"kernel": np.full((4, 3), np.nan, np.float32), "bias": np.zeros(3)}))
    with pytest.raises(ValueError, match=f"dtype: got {dtype}, which cannot hold nan in kernel: wanted finite numbers"):
        save(model, tmp_path / "new", dtype=dtype)


def test_a_model_of_ones_own_is_saved_only_if_it_can_be_loaded_again(tmp_path):
    import flax.linen as nn

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x * self.param("left", nn.initializers.ones, (4,))[None])

    net, good = nn.Dense(3), {"kernel": np.eye(4, 3, dtype=np.float32), "bias": np.zeros(3, np.float32)}
    save(bert_adapter.as_model((net, good)), tmp_path / "out")
    for wrong, message in ((good["bias"] * np.nan, "NaN or infinite"), (np.zeros(3, int), "int64")):
        with pytest.raises(ValueError, match=f"the parameters do not fit the model(.|\n)*bias: got .*{message}"):
            save(bert_adapter.as_model((net, good | {"bias": wrong})), tmp_path / "out")
    np.testing.assert_array_equal(
        bert_adapter.load_into(tmp_path / "out", (net, good)).params["kernel"], good["kernel"]
    )
    own = Named(), tiny.random_params(Named(), np.zeros((1, 4), np.float32))
    save(bert_adapter.as_model(own), tmp_path / "own")
    np.testing.assert_array_equal(bert_adapter.load_into(tmp_path / "own", own).params["left"], own[1]["left"])
    (tmp_path / "own/parameters.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"own/parameters.safetensors: wanted a whole safetensors file; got 3 bytes"):
        bert_adapter.load_into(tmp_path / "own", own)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_stays_dense_is_rounded_as_it_will_be_stored(dtype, tmp_path):
    small, _ = bert_adapter.compress(tiny.model(), [], budget=1.0, signal="svd", dtype=dtype)
    save(small, tmp_path)
    again = load(tmp_path)
    kernels = [tiny.at(each.params, QUERY)["kernel"] for each in (tiny.model(), small, again)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    np.testing.assert_array_equal(kernels[1], np.asarray(kernels[2], np.float32))


def test_bytes_of_float64_are_those_that_are_stored():
    from bert_adapter.checkpoint.bits import size

    kernel = np.random.default_rng(0).normal(size=(12, 7))
    for dtype, scale in ((np.float32, 4), (np.float64, 8)):
        parts = parts_of(kernel.astype(dtype), "int8", by_rows=False)
        assert sum(part.nbytes for part in parts.values()) == size((12, 7), "int8", False, scale)


def test_rounding_is_predicted_by_the_scales_that_are_stored():
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(6, 3, 5)) * [[1.0], [10.0], [100.0]]).astype(np.float32)
    found = components.decompose(kernel.reshape(6, 15), np.ones(6), np.ones(15), 4)
    ones: Any = np.eye(6), np.ones(15)
    predicted = rounding(kernel.reshape(6, 15), found, ones, by_rows=False, axes=((6,), (3, 5)))
    wanted = np.sum((kernel - joined(parts_of(kernel, "int8", by_rows=False))) ** 2) / 2
    np.testing.assert_allclose(predicted.dense["int8"], wanted, rtol=1e-4)
    plain = rounding(kernel.reshape(6, 15), found, ones, by_rows=False)
    assert abs(plain.dense["int8"] / wanted - 1) > 0.1


def test_integers_in_memory_are_not_trained(tmp_path):
    save(factorised(), tmp_path, dtype="int4")
    kept, texts = load(tmp_path, integers=True), [{name: array[:2] for name, array in BATCH.items()}] * 20
    message = r"got a model with integers in memory, wanted floats: load\(directory\)"
    with pytest.raises(ValueError, match=f"model: {message}"):
        bert_adapter.compress(kept, texts, budget=0.5)
    with pytest.raises(ValueError, match=f"small: {message}"):
        bert_adapter.heal(kept, tiny.model(), texts)
    with pytest.raises(ValueError, match=f"model: {message}"):
        bert_adapter.finetune(kept, tiny.row_batches(), loss=lambda outputs, batch: outputs.sum(axis=1))


def test_some_layers_may_be_stored_otherwise_than_others(tmp_path):
    save(tiny.model(), tmp_path, dtype={WORDS: "int8", QUERY: "bfloat16"})
    loaded = load(tmp_path)
    assert dtypes_of(loaded.config) == {WORDS: "int8", QUERY: "bfloat16"}
    kernel = tiny.at(loaded.params, QUERY)["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tiny.at(tiny.model().params, QUERY)["kernel"].astype(bfloat16))
    tensors = load_file(tmp_path / FILE)
    assert tensors["embeddings.word_embeddings.weight"].dtype == np.int8
    assert tensors[TENSOR].dtype == bfloat16
    assert sum(tensor.dtype == np.int8 for tensor in tensors.values()) == 1


def test_other_libraries_are_kept_from_integers(tmp_path):
    save(tiny.model(), tmp_path, dtype="int8")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "low_rank_bert"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_dense_model_of_integers_is_merged_exported_and_given_a_head(tmp_path):
    save(tiny.model(), tmp_path / "small", dtype="int8")
    small = load(tmp_path / "small")
    assert "low_rank" not in merge(small).config
    bert_adapter.export(small, tmp_path / "theirs", to="transformers-dense")
    np.testing.assert_array_equal(output(load(tmp_path / "theirs")), output(small))
    headed = bert_adapter.with_head(small, 2)
    save(headed, tmp_path / "headed")
    assert f"bert/{QUERY}" in dtypes_of(load(tmp_path / "headed").config)


def test_a_model_of_ones_own_is_stored_as_integers(tmp_path):
    import flax.linen as nn

    net = nn.Sequential([nn.Dense(6), nn.Dense(3)])
    params = tiny.random_params(net, np.zeros((1, 4), np.float32))
    model = bert_adapter.as_model((net, params))
    for dtype in INTEGERS:
        save(model, tmp_path, dtype=dtype)
        again = bert_adapter.load_into(tmp_path, (net, params))
        for path in ("layers_0", "layers_1"):
            wanted = joined(parts_of(params[path]["kernel"], dtype, by_rows=False))
            np.testing.assert_array_equal(again.params[path]["kernel"], wanted)


def without(tensors, config):
    del tensors[f"{TENSOR}_scale"]


def undeclared(tensors, config):
    del config["low_rank"]["dtypes"][QUERY]


def missing(tensors, config):
    config["low_rank"]["dtypes"]["pooler/none"] = "int8"


def partly(tensors, config):
    tensors[TENSOR] = tensors[TENSOR].astype(np.float32)
    del tensors[f"{TENSOR}_scale"]


def other(tensors, config):
    config["low_rank"]["dtypes"][QUERY] = "int3"


def wide(tensors, config):
    config["low_rank"]["dtypes"][QUERY] = "float16"


def nan(tensors, config):
    tensors[f"{TENSOR}_scale"][0] = np.nan


def negative(tensors, config):
    tensors[f"{TENSOR}_scale"][0] = -1


def shape(tensors, config):
    tensors[f"{TENSOR}_scale"] = np.ones((1, 5), np.float32)


def shapeless(tensors, config):
    del tensors[f"{TENSOR}_shape"]


def other_shape(tensors, config):
    tensors[f"{TENSOR}_shape"][0] = 40


def halves(tensors, config):
    config["low_rank"]["dtypes"][QUERY] = "int8"


@functools.cache
def stored(folder, dtype) -> Any:
    save(tiny.model(), folder / dtype, dtype=dtype)
    return load_file(folder / dtype / FILE), (folder / dtype / "config.json").read_text()


OF_BOTH = [
    (without, rf"{QUERY}/kernel: got {{0}} without {QUERY}/kernel_scale, wanted its scales too"),
    (undeclared, f"{QUERY}/kernel: got {{0}}, which config.json's low_rank dtypes do not name"),
    (missing, "pooler/none: config.json says int8, and there is no matrix"),
    (partly, f"{QUERY}/kernel: got float32, wanted {{0}}"),
    (other, "config low_rank dtypes: got .*int3.* wanted one of bfloat16, float16, int8, int4"),
    (wide, f"{QUERY}/kernel: got {{0}}, which config.json's low_rank dtypes do not name"),
    (nan, f"{QUERY}/kernel_scale: got values that are NaN"),
]


@pytest.mark.parametrize(
    ("dtype", "spoil", "message"),
    [
        *((dtype, spoil, message.replace("{0}", dtype)) for dtype in INTEGERS for spoil, message in OF_BOTH),
        ("int8", negative, f"{QUERY}/kernel_scale: got values that are NaN, infinite or negative"),
        ("int8", shape, rf"{QUERY}/kernel_scale: got float32 \(5, 1\), wanted floats of shape \(16, 1\) or \(1, 16\)"),
        ("int4", shape, rf"{QUERY}/kernel_scale: got float32 \(5, 1\), wanted bfloat16 that go with bytes \(8, 16\)"),
        ("int4", shapeless, f"{QUERY}/kernel: got int4 without {QUERY}/kernel_shape, wanted its shape too"),
        ("int4", other_shape, rf"{QUERY}/kernel_scale: got bfloat16 .* wanted .* and _shape int32 \[40, 16\]"),
        ("int4", halves, f"{QUERY}/kernel: got int4, which config.json's low_rank dtypes do not name"),
    ],
)
def test_integers_that_cannot_be_read_are_refused(dtype, spoil, message, tmp_path, tmp_path_factory):
    tensors, text = stored(tmp_path_factory.getbasetemp() / "stored", dtype)
    tensors, config = {name: tensor.copy() for name, tensor in tensors.items()}, json.loads(text)
    spoil(tensors, config)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int2", "dtype must be one of"),
        ({"nowhere": "int8"}, r"dtype: got \['nowhere'\], which hold no matrix"),
        ({WORDS: "int3"}, f"dtype of {WORDS} must be one of"),
    ],
)
def test_dtypes_that_cannot_be_are_refused_and_nothing_is_written(dtype, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tiny.model(), tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [
        ("float16", np.float32(1e5), "bfloat16"),
        ("float16", np.float32(1e-6), "bfloat16"),
        ("bfloat16", np.float64(1e300), "float64"),
        ("float32", np.float64(1e-300), "float64"),
        ("int4", np.float64(1e300), "float64"),
    ],
)
def test_numbers_that_fewer_bits_cannot_hold_are_refused(dtype, value, wanted, tmp_path):
    model = tiny.model()
    params: Any = jax.tree.map(lambda leaf: leaf, model.params)
    tiny.at(params, QUERY)["kernel"] = np.full((16, 16), value)
    message = f"dtype: got {dtype}, which cannot hold {value:.4g} in {QUERY}/kernel: wanted {wanted}"
    with pytest.raises(ValueError, match=re.escape(message)):
        save(model._replace(params=params), tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_the_command_line_stores_integers(tmp_path):
    save(tiny.model(), tmp_path / "dense")
    (tmp_path / "texts").write_text("a red fox\na dog runs far\n")
    options = ["--text", str(tmp_path / "texts"), "-o", str(tmp_path / "small"), "--rank", "2", "--dtype", "int8"]
    assert (
        main(["compress", str(tmp_path / "dense"), *options, "--signal", "svd", "--include", "query", "--embeddings"])
        == 0
    )
    assert set(load(tmp_path / "small").config["low_rank"]["ranks"]) == {QUERY, WORDS}
    assert set(dtypes_of(load(tmp_path / "small").config)) == set(layers_of(by_path(tiny.model().params)))
    assert set(DTYPES) >= {"int8"}


def test_kernels_with_more_than_two_axes_have_no_4_bits():
    net = nn.MultiHeadDotProductAttention(num_heads=4)
    batches = [{"inputs_q": np.random.default_rng(0).normal(size=(4, 6, 128)).astype(np.float32)}]
    params = jax.jit(net.init)(jax.random.key(0), **batches[0])["params"]
    kernels = bert_adapter.select_kernels(bert_adapter.as_model((net, params)), batch=batches[0])
    known = bert_adapter.decompose(params, None, signal="svd", kernels=kernels, bits=True, progress=False)
    assert len(known.roundings) == 4
    assert not any("int4" in rounding.dense for rounding in known.roundings.values())


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_what_is_stored_in_few_bits_is_smaller_when_it_is_compressed(dtype, tmp_path):
    """It was larger: factors came in floats."""
    whole = tiny.model(tiny.CLASSIFIER, hidden_size=64, intermediate_size=64)
    save(whole, tmp_path / "few", dtype=dtype)
    given = load(tmp_path / "few")
    small, _ = bert_adapter.compress(given, [], budget=0.5, signal="svd", progress=False)
    save(small, tmp_path / "small")
    before, after = (weights_in(tmp_path / name) for name in ("few", "small"))
    assert after < before
    np.testing.assert_array_equal(output(load(tmp_path / "small")), output(small))
    if dtypes_of(given.config):
        with pytest.raises(ValueError, match=f"of: got 'bytes' for a model whose .* is stored in {dtype}"):
            bert_adapter.compress(given, [], budget=0.5, of="bytes", signal="svd", progress=False)


def test_factors_that_16_bits_do_not_hold_stay_in_32():
    right = np.ones((1, 2), np.float32)
    for number, held in ((1e5, False), (1.0, True)):
        params = {"layer": {"left": np.full((2, 1), number, np.float32), "right": right}}
        assert ("layer" in that_fit(params, {"layer": "float16"})) is held


def test_a_kernel_that_stays_dense_keeps_its_integers(tmp_path):
    save(tiny.model(), tmp_path / "few", dtype="int8")
    given = load(tmp_path / "few")
    small, report = bert_adapter.compress(given, [], rank=9, signal="svd", include="query|intermediate", progress=False)
    assert report.dense  # the square one, at that rank
    assert report.dense != [kernel.path for kernel in report.kernels]
    assert set(report.dense) <= dtypes_of(small.config).keys()
    assert set(dtypes_of(small.config).values()) == {"int8"}  # of the factors too
    for path in report.dense:
        np.testing.assert_array_equal(by_path(small.params)[f"{path}/kernel"], by_path(given.params)[f"{path}/kernel"])
