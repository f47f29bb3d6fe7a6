"""A model, texts and a budget in; a smaller model that saves, loads and runs, and a true report, out."""

import functools
import json
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import pytest
import reference

import bert_adapter
import wlra
from bert_adapter import as_model
from bert_adapter.checkpoint import load, save
from bert_adapter.checkpoint.names import by_path
from bert_adapter.compressing import Report
from bert_adapter.decompositions import predicted_losses, sides
from bert_adapter.demo import sentences
from bert_adapter.factorisation import merge
from bert_adapter.families import module_for
from bert_adapter.importance.fingerprint import of_params
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.sums import STATISTICS
from bert_adapter.kernels import parameter_count
from bert_adapter.layers.running import factorised
from bert_adapter.losses import task_loss
from bert_adapter.model import Model, forward
from bert_adapter.sample import CONFIG, sample_model
from bert_adapter.signals.weights import solver_weights
from bert_adapter.text import text_batches
from wlra import components

TEXTS = ["a dog runs", "a red fox runs far from it", "foxs", "red", "the dog runs from a dog", "far far far"]
ATTENTION = [f"encoder/layer/0/attention/{name}" for name in ("output/dense", "self/key", "self/query", "self/value")]
PATHS = [*ATTENTION, "encoder/layer/0/intermediate/dense", "encoder/layer/0/output/dense"]
# All kernels are (16, 16), which breaks even at 8.
compress = partial(bert_adapter.compress, progress=False)


@functools.cache
def model():
    return sample_model(intermediate_size=16)


@functools.cache
def batches():
    return tuple(text_batches(model(), TEXTS, batch_size=6))


@functools.cache
def result(seed=0) -> tuple[Model, Report]:
    return compress(model(), batches(), budget=0.5, uniform=True, signal="exact", shrink=0.0, seed=seed)


@functools.cache
def measured():
    paths = [*PATHS, "pooler/dense"]
    return measure_importance(forward(model()), model().params, batches(), paths, statistics=STATISTICS, progress=False)


def fisher_of(sums):
    assert sums.fisher is not None
    return np.asarray(sums.fisher, np.float64).sum(axis=0)


def untouchable():
    pytest.fail("a batch was read before the arguments were checked")
    yield


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def embed(model):
    return jax.jit(forward(model))(model.params, batches()[0])


def assert_same_params(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def assert_same_loss(got, wanted, roundings=100):
    """The root of the loss is a relative distance: rounding in sums of some hundred terms moves it by some eps."""
    atol = roundings * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(np.sqrt(np.float64(got)), np.sqrt(np.float64(wanted)), rtol=0, atol=atol)


def flax_bert(name, **options) -> Any:
    """Hugging Face's model with weights of its own; from version 5 on, transformers has none."""
    transformers = pytest.importorskip("transformers")
    reference = getattr(transformers, name, None) or pytest.skip(f"transformers {transformers.__version__}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return reference(transformers.BertConfig(**CONFIG | {"intermediate_size": 16}), input_shape=(1, 4), **options)


def test_directory_is_compressed_saved_and_loaded_with_the_same_outputs(tmp_path):
    save(model(), tmp_path / "dense")
    texts = text_batches(load(tmp_path / "dense"), TEXTS)
    small, _ = compress(tmp_path / "dense", texts, budget=0.5, signal="exact", uniform=True)
    save(small, tmp_path / "small")
    np.testing.assert_array_equal(embed(load(tmp_path / "small")), embed(small))


def test_directory_and_importance_measured_before_have_the_same_result_for_the_same_seed(tmp_path):
    save(model(), tmp_path / "dense")
    small, _ = compress(
        str(tmp_path / "dense"),
        untouchable(),
        budget=0.5,
        uniform=True,
        signal="exact",
        shrink=0.0,
        importance=measured(),
    )
    # What was measured before has more statistics, whose program may round otherwise.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, merge(small.params), merge(result(seed=0)[0].params))


def test_other_seed_has_another_result():
    ours, theirs = (at(result(seed)[0].params, PATHS[0])["left"] for seed in (0, 1))
    assert not np.array_equal(ours, theirs)


def test_outputs_are_those_of_the_merged_model():
    small, _ = result()
    merged = small._replace(params=merge(small.params))
    np.testing.assert_allclose(embed(small), embed(merged), rtol=0, atol=1e-5)  # unit rows, ten layers in float32


def test_all_of_the_encoder_is_factorised_and_nothing_else():
    small, report = result()
    lefts = {path.removesuffix("/left") for path in by_path(small.params) if path.endswith("/left")}
    assert lefts == {kernel.path for kernel in report.kernels} == set(PATHS)


def test_what_is_not_selected_is_untouched():
    small, _ = result()
    for name in ("embeddings", "pooler"):
        assert_same_params(small.params[name], model().params[name])


def test_module_and_files_are_kept():
    small, _ = result()
    assert (small.module, small.files) == (model().module, model().files)


def test_model_given_is_left_alone():
    result()
    assert "low_rank" not in model().config
    assert not any(path.endswith("/left") for path in by_path(model().params))


def test_report_counts_the_parameters():
    small, report = result()
    saved = report.parameters_before - report.parameters_after
    assert report.parameters_before == 6 * 16 * 16
    assert saved == parameter_count(model().params) - parameter_count(small.params)


def test_share_is_kept_to():
    _, report = result()
    assert report.parameters_after <= 0.5 * report.parameters_before


def test_share_is_the_rank_that_it_allows():
    step = partial(compress, model(), (), signal="svd")
    assert_same_params(step(rank=4)[0].params, step(budget=0.5, uniform=True)[0].params)


@functools.cache
def attention_alone() -> tuple[Model, Report]:
    """The other two kernels are to have the rank 8, and stay dense."""
    ranks = dict.fromkeys(PATHS, 8) | dict.fromkeys(ATTENTION, 4)
    return compress(model(), (), rank=ranks, signal="kfac", importance=measured())


def test_ranks_may_be_given_by_path():
    small, _ = attention_alone()
    assert {path: at(small.params, path)["left"].shape[1] for path in ATTENTION} == dict.fromkeys(ATTENTION, 4)


def test_kernels_that_stay_dense_are_reported():
    small, report = attention_alone()
    assert report.dense == PATHS[4:]
    assert at(small.params, PATHS[4])["kernel"] is at(model().params, PATHS[4])["kernel"]


def test_section_has_no_kernels_that_stay_dense():
    assert attention_alone()[0].config["low_rank"]["ranks"] == dict.fromkeys(ATTENTION, 4)


def test_report_names_its_method_and_signal():
    _, report = result()
    assert (report.method, report.signal) == ("anderson", "exact")


def test_report_has_the_seconds_of_every_stage():
    _, report = result()
    assert list(report.seconds) == ["load", "importance", "plan", "solve"]
    assert min(report.seconds.values()) >= 0


@pytest.mark.parametrize("path", PATHS)
def test_losses_are_those_of_the_fisher_information(path):
    small, report = result()
    (row,) = [row for row in report.kernels if row.path == path]
    product = reference.product((at(small.params, path)["left"], at(small.params, path)["right"]))
    wanted = reference.loss(at(model().params, path)["kernel"], fisher_of(measured()[path]), product)
    assert_same_loss(row.loss["anderson"], wanted)


def test_section_says_what_was_done_and_by_which_versions():
    section = dict(result()[0].config["low_rank"])
    calibration = section.pop("calibration")
    assert (calibration["texts"], len(calibration["fingerprint"])) == (len(TEXTS), 16)
    assert section == {
        "schema": 1,
        "ranks": dict.fromkeys(PATHS, 4),
        "method": "anderson",
        "signal": "exact",
        "seed": 0,
        "versions": {"wlra": wlra.__version__, "jax": version("jax"), "flax": version("flax")},
    }


def test_section_is_json():
    section = result()[0].config["low_rank"]
    assert json.loads(json.dumps(section)) == section


def test_rest_of_the_config_is_kept():
    config = result()[0].config
    assert {name: value for name, value in config.items() if name != "low_rank"} == model().config


def test_loss_of_a_task_takes_the_place_of_random_directions():
    with pytest.raises(ValueError, match="zero"):  # all weights are, for a loss that nothing matters to
        compress(model(), batches(), rank=4, signal="fisher", gradients=lambda output, batch: 0 * output[:, 0])


def test_without_weights_no_batch_is_read_and_the_svd_is_best():
    _, report = compress(model(), untouchable(), rank=4, signal="svd")
    for row in report.kernels:
        kernel = at(model().params, row.path)["kernel"]
        best = reference.loss(kernel, np.ones((16, 16)), reference.eckart_young(kernel, 4))
        assert_same_loss(row.loss["svd"], best)


@pytest.mark.parametrize("signal", ["kfac", "shampoo"])
def test_signals_of_two_factors_have_the_loss_of_these(signal):
    _, report = compress(model(), (), rank=4, signal=signal, importance=measured(), shrink=0.0)
    for row in report.kernels:
        sums = measured()[row.path]
        factors = (sums.row_gram, sums.col_gram) if signal == "shampoo" else (sums.inputs, sums.outputs)
        kernel = at(model().params, row.path)["kernel"]
        best = reference.kronecker(kernel, *factors, 4)
        assert list(row.loss) == ["kronecker"]
        wanted = reference.kronecker_loss(kernel, *factors, best)
        assert_same_loss(row.loss["kronecker"], wanted, roundings=500)  # Gram matrices of six examples are singular


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "signal": "hessian"}, "signal must be one of 'combined', .*; got 'hessian'"),
        (
            {"rank": 4, "signal": "kfac", "method": "anderson"},
            "signal 'kfac' needs a method for Kronecker weights; got",
        ),
        ({"rank": 4, "method": "anderson"}, "got 'anderson', which is not: leave method out, and 'kronecker' is used"),
        ({"rank": 4, "signal": "fwsvd", "method": "kronecker"}, "'fwsvd' needs a method for other weights; got 'kron"),
        ({"rank": 4, "signal": "fisher"}, "signal 'fisher' needs gradients=loss, .*; got None. Signals that need no"),
        ({"rank": 4, "signal": "fisher", "gradients": "gaussian"}, "signal 'fisher' needs gradients=loss"),
        ({"rank": 4, "signal": "exact", "gradients": lambda output, batch: output[:, 0]}, "or write signal='fisher'"),
        (
            {"rank": 4, "gradients": "gaussian", "loss": lambda output, batch: output[:, 0]},
            "gradients and loss: got both",
        ),
        ({"rank": 4, "gradients": "poisson"}, "gradients must be a function .*; got 'poisson'"),
        ({}, "wanted exactly one of rank and budget"),
        ({"rank": 4, "multiple_of": 8}, "say how a budget is spent; got a rank"),
        ({"rank": 4, "budget": 0.5}, "wanted exactly one of rank and budget"),
        ({"budget": 50.0}, r"share of the kernels to keep, in \(0, 1\]; got 50.0: 50 % is 0.5"),
        ({"rank": 4, "dtype": {"qurey": "int8"}}, r"dtype: got \['qurey'\], which hold no matrix, wanted paths of"),
        ({"rank": 4, "seed": -1}, "seed must be at least 0; got -1"),
        ({"budget": 0.5, "of": "layers"}, "of must be one of .*; got 'layers'"),
        ({"budget": 0.5, "multiple_of": 0}, "multiple_of must be at least 1; got 0"),
        ({"rank": 4, "shrink": -1.0}, r"shrunk towards simpler ones, in \[0, 1\]; got -1.0"),
        (
            {"rank": 4, "signal": "svd", "shrink": 0.5},
            "shrink: got 0.5 for signal 'svd', .*: leave it out, or take one of",
        ),
        (
            {"rank": 4, "signal": "fwsvd", "shrink": 0.0},
            "shrink: got 0.0 for signal 'fwsvd', whose weights for kernels",
        ),
        ({"rank": 0}, "must be at least 1; got"),
        ({"rank": {"pooler/dense": 4}}, "rank must name exactly the selected kernels"),
        ({"rank": 4, "include": "decoder"}, "select none of"),
        ({"rank": 4, "include": "("}, r"include: got '\(', which is no regular expression"),
        ({"rank": 4, "exclude": "*"}, r"exclude: got '\*', which is no regular expression"),
        ({"rank": 4, "method": "lanczos"}, "method must be one of .*; got 'lanczos'"),
        ({"rank": 4, "signal": "exact", "solver": {"start": "zero"}}, "start must be one of .*; got 'zero'"),
        ({"rank": 4, "solver": {"tol": -1.0}}, r"tol .* in \[0, 1\]; got -1.0"),
    ],
)
def test_bad_arguments_are_refused_before_work_starts(options, message):
    with pytest.raises(ValueError, match=message):
        compress(model(), untouchable(), **options)


@functools.cache
def of_another_model():
    """What was measured on a model that differs in one number of a bias."""
    other = jax.tree.map(np.array, model().params)
    other["pooler"]["dense"]["bias"][0] += 1
    return replace(measured(), model=of_params(other))


def test_importance_of_another_model_is_refused():
    with pytest.raises(ValueError, match="importance: measured on another model"):
        compress(model(), untouchable(), rank=4, signal="kfac", importance=of_another_model())
    with pytest.raises(ValueError, match="importance: measured on another model"):
        bert_adapter.plan(model().params, of_another_model(), budget=0.5, signal="kfac")
    anyway = replace(of_another_model(), model="")
    ours, theirs = (
        bert_adapter.plan(model().params, one, budget=0.5, signal="kfac").ranks for one in (anyway, measured())
    )
    assert ours == theirs


def test_importance_of_another_module_with_the_same_parameters_is_refused():
    entries = model().config | {"hidden_act": "relu"}
    other = model()._replace(module=module_for(entries, model().files), config=entries)
    one, two = (
        bert_adapter.measure_signal(
            forward(each), each.params, batches(), bert_adapter.select_kernels(each), signal="kfac", progress=False
        )
        for each in (model(), other)
    )
    for given in (one, bert_adapter.decompose(model().params, one, signal="kfac")):
        with pytest.raises(ValueError, match="importance: measured on another module, whose parameters are the same"):
            compress(other, untouchable(), rank=4, signal="kfac", importance=given)
    with pytest.raises(ValueError, match="wanted measurements of one module and loss; got two"):
        _ = one + two
    small, _ = compress(other, (), rank=4, signal="kfac", importance=replace(one, function=""))
    known = bert_adapter.decompose(model().params, one, signal="kfac")._replace(measured=None)
    again, _ = compress(other, (), rank=4, signal="kfac", importance=known)
    assert small.config["low_rank"]["ranks"] == again.config["low_rank"]["ranks"]


def test_importance_of_other_batches_is_refused():
    with pytest.raises(ValueError, match="importance: measured on 1 batches which are not the 2 given"):
        compress(model(), batches() * 2, rank=4, signal="kfac", importance=measured())


@pytest.mark.parametrize("options", [{"file": "sums"}, {"gradients": "gaussian"}])
def test_importance_and_how_to_measure_it_are_refused_together(options):
    with pytest.raises(ValueError, match="wanted either"):
        compress(model(), untouchable(), rank=4, importance=measured(), **options)


def test_labels_of_a_task_are_checked_before_they_are_measured_on():
    head = sample_model(intermediate_size=16, architectures=["BertForSequenceClassification"], num_labels=2)
    bad = [{**batches()[0], "labels": np.array([0, 1, 0, 2, 0, 1])}]
    with pytest.raises(ValueError, match="batch 0, row 3: got the label 2, wanted a class of the head, 0 to 1"):
        compress(head, bad, rank=4, signal="fisher", gradients=task_loss(head.module))


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches: wanted at least one"):
        compress(model(), [], rank=4)


def test_kernel_that_nothing_depends_on_is_named():
    with pytest.raises(ValueError, match="pooler/dense"):  # no embedding depends on it
        compress(model(), (), rank=4, include="pooler", signal="exact", importance=measured())


def test_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"wanted a Model, a directory, \(module, params\) .*; got dict"):
        compress({}, batches(), rank=4)


def test_what_is_compressed_already_is_refused():
    with pytest.raises(ValueError, match="6 of the selected kernels are factorised already"):
        compress(result()[0], batches(), rank=2)


def test_parts_may_be_compressed_one_after_the_other(tmp_path):
    part, _ = attention_alone()
    whole, _ = compress(part, (), rank=8, exclude="attention/", signal="svd")  # stay dense again
    save(whole, tmp_path / "small")
    assert load(tmp_path / "small").config["low_rank"]["ranks"] == dict.fromkeys(ATTENTION, 4)


def test_result_for_a_model_of_transformers_runs_on_it():
    theirs = flax_bert("FlaxBertForSequenceClassification")
    small, report = compress(theirs, (), rank=4, signal="svd")

    @jax.jit
    def run(params):
        return theirs(**batches()[0], params=params)[0]

    with factorised(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got, wanted = run(small.params), run(merge(small.params))
    assert len(report.kernels) == 6
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # numbers of about one, ten layers in float32


def test_model_of_transformers_is_our_module_on_its_parameters():
    theirs = flax_bert("FlaxBertModel")
    ours = as_model(theirs)
    assert ours.module == module_for(model().config)  # no file declares what follows the encoder
    assert_same_params(ours.params, theirs.params)


def test_model_of_transformers_without_a_pooler_embeds():
    ours = as_model(flax_bert("FlaxBertModel", add_pooling_layer=False))
    assert embed(ours).shape == (6, 16)


def test_batches_hold_every_text_once_the_longest_first():
    encode = bert_adapter.tokenizer(model())
    rows = [row[mask > 0].tolist() for batch in batches() for row, mask in zip(*unpacked(batch), strict=True)]
    wanted = sorted(TEXTS, key=len, reverse=True)
    assert rows == [encode([text])["input_ids"][0][encode([text])["attention_mask"][0] > 0].tolist() for text in wanted]


def unpacked(batch):
    return batch["input_ids"], batch["attention_mask"]


def test_batches_have_the_size_asked_for():
    assert [len(batch["input_ids"]) for batch in text_batches(model(), TEXTS, batch_size=4)] == [4, 2]


def test_batches_of_pairs_know_which_is_which():
    (batch,) = text_batches(model(), [("a dog", "runs"), ("red", "a fox runs far")])
    assert batch["token_type_ids"][0, :7].tolist() == [0, 0, 0, 1, 1, 1, 1]  # [CLS] red [SEP] a fox runs far


@pytest.mark.slow
def test_real_model_is_near_itself_and_every_kernel_at_its_best(minilm_path):
    """The attention of one layer: four kernels of one shape, so that little has to be compiled."""
    nouns = ["dog", "child", "river", "engine", "teacher", "market", "song", "window"]
    lines = [f"The {noun} {verb} here." for noun in nouns for verb in ("waits", "grows", "turns", "sleeps")]
    dense = load(minilm_path)
    texts = text_batches(dense, lines, batch_size=32)
    small, report = compress(
        dense, texts, rank=48, signal="exact", include="encoder/layer/0/attention/", solver={"tol": 1e-2}
    )
    for row in report.kernels:
        slack = 1 + 1e-4  # rounding in float32 of sums of a hundred thousand terms
        assert row.loss["anderson"] <= slack * row.loss["separable"], row.path
    wanted, got = (np.asarray(jax.jit(forward(model))(model.params, texts[0])) for model in (dense, small))
    assert len(report.kernels) == 4
    assert np.isfinite(got).all()
    assert (got * wanted).sum(axis=1).mean() > 0.9  # one layer of six is a little off


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "shrink"), [("combined", None), ("shampoo", 0.0), ("kfac", 0.0)])
def test_real_kernels_lose_what_the_plan_predicts(signal, shrink, minilm_path):
    dense, include = load(minilm_path), r"encoder/layer/[05]/(attention/self/query|output/dense)"
    texts = text_batches(dense, sentences("calibration")[:64], batch_size=32)
    shapes = bert_adapter.select_kernels(dense, include)
    statistics = bert_adapter.SIGNALS[signal].statistics
    importance = measure_importance(forward(dense), dense.params, texts, shapes, statistics=statistics, progress=False)
    weights = solver_weights(importance, signal, shapes, shrink)
    for budget in (0.3, 0.7):
        options = {"signal": signal, "shrink": shrink, "importance": importance, "include": include}
        small, report = compress(dense, (), budget=budget, **options)
        for row in (row for row in report.kernels if row.status != "DENSE"):
            kernel, factors = at(dense.params, row.path)["kernel"], at(small.params, row.path)
            error = np.asarray(kernel, float) - np.asarray(factors["left"], float) @ np.asarray(factors["right"], float)
            found = np.sum((np.float64(weights[row.path].row) @ error) * (error @ np.float64(weights[row.path].col)))
            both = sides(np.asarray(kernel), weights[row.path])
            losses = 2 * predicted_losses(components.decompose(kernel, *both, 0).squares)
            # Rounding makes weights of few examples, which are singular, indefinite.
            assert found == pytest.approx(losses[row.rank], rel=1e-3, abs=1e-9 * losses[0]), row.path
