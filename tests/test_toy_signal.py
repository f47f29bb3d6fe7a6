"""A signal that is defined here, in one object, goes all the way through `compress`, `save` and `load`."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

import bert_adapter
import wlra
from bert_adapter.report import kernel_table, summary
from bert_adapter.sample import sample_model
from bert_adapter.signals.weights import solver_weights

TEXTS = ["a dog runs", "a red fox runs far from it"]


def energy(evidence, shrink):
    """How large each input is, on average over tokens; all the same for shrink=1."""
    squares = jnp.diagonal(evidence.sums.inputs)
    return ((1 - (shrink or 0)) * squares + (shrink or 0) * jnp.mean(squares))[:, None]


ENERGY = bert_adapter.Signal(
    name="energy",
    about="how large each input is",
    weights=energy,
    method="fwsvd",
    statistics=("inputs",),
    reliability=lambda evidence: 0.75,
)


@pytest.fixture(scope="module")
def dense():
    return sample_model(intermediate_size=16)  # one shape of kernels, one program


@pytest.fixture(scope="module")
def result(dense):
    batches = bert_adapter.text_batches(dense, TEXTS)
    return bert_adapter.compress(dense, batches, budget=0.5, uniform=True, signal=ENERGY, progress=False)


def test_the_result_is_best_for_the_weights_of_the_signal(dense, result):
    small, report = result
    paths = list(bert_adapter.select_kernels(dense))
    run, batches = bert_adapter.forward(dense), bert_adapter.text_batches(dense, TEXTS)
    importance = bert_adapter.measure_signal(run, dense.params, batches, paths, signal=ENERGY, progress=False)
    weights = solver_weights(importance, ENERGY, dict.fromkeys(paths, (16, 16)))
    merged = bert_adapter.merge(small.params)["encoder"]["layer"]["0"]["output"]["dense"]["kernel"]
    kernel = dense.params["encoder"]["layer"]["0"]["output"]["dense"]["kernel"]
    full = np.broadcast_to(weights["encoder/layer/0/output/dense"], (16, 16))
    (loss,) = [one.loss["fwsvd"] for one in report.kernels if one.path == "encoder/layer/0/output/dense"]
    np.testing.assert_allclose(reference.loss(kernel, full, merged), loss, rtol=1e-4)  # an SVD in float32
    root = np.sqrt(full[:, :1])
    best = reference.eckart_young(root * kernel, 4) / root
    np.testing.assert_allclose(reference.loss(kernel, full, best), loss, rtol=1e-4)


def test_report_says_what_the_signal_says_of_itself(result):
    _, report = result
    assert (report.signal, report.method, report.predicted) == ("energy", "fwsvd", None)
    assert set(report.reliability.values()) == {0.75}
    assert "reliability" in kernel_table(report)[0]
    assert "signal 'energy'" in summary(report)


def test_checkpoint_names_the_signal_and_gives_the_same_outputs(result, tmp_path):
    small, _ = result
    bert_adapter.save(small, tmp_path / "small")
    again = bert_adapter.load(tmp_path / "small")
    (batch,) = bert_adapter.text_batches(small, TEXTS)
    outputs = [bert_adapter.apply(model.module, model.params, **batch) for model in (small, again)]
    assert again.config["low_rank"]["signal"] == "energy"
    np.testing.assert_array_equal(*outputs)


def test_plan_takes_the_signal_too(dense):
    importance = bert_adapter.Importance({}, 1, 1, 1, gradients="gaussian", seed=0)
    with pytest.raises(ValueError, match=r"signal 'energy' needs \['inputs'\] of encoder/layer/0"):
        bert_adapter.plan(
            dense.params, importance, 0.5, signal=ENERGY, kernels=bert_adapter.select_kernels(dense, include="query")
        )


def test_method_of_another_kind_of_weights_is_refused(dense):
    with pytest.raises(ValueError, match="signal 'energy' needs a method for other weights; got 'kronecker'"):
        bert_adapter.compress(dense, (), rank=2, signal=ENERGY, method=wlra.METHODS["kronecker"])
