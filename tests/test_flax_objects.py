"""Objects of transformers' Flax classes stay what they are: they are called, saved and loaded as they were before."""

from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from tiny import BATCH, CONFIG, EPS

import bert_adapter

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(transformers, "FlaxBertModel"), reason=f"{transformers.__version__}")


@contextmanager
def as_they_compute():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@cache
def dense(name):
    with as_they_compute():
        return getattr(transformers, name)(transformers.BertConfig(**CONFIG | {"intermediate_size": 16}))


@cache
def small(name):
    with as_they_compute():
        return bert_adapter.compress(dense(name), [BATCH], rank=3, signal="svd", progress=False)


@cache
def called(model):
    with as_they_compute():
        return np.asarray(model(**BATCH)[0])


NAMES = [
    "FlaxBertModel",
    *(pytest.param(f"FlaxBertFor{head}", marks=pytest.mark.slow) for head in ("SequenceClassification", "MaskedLM")),
]


@pytest.mark.parametrize("name", NAMES)
def test_object_stays_of_its_class_and_is_called_as_before(name):
    """The last is of no family of ours: its own module is compressed, and its logits count."""
    made, report = small(name)
    assert isinstance(made, getattr(transformers, name))
    assert made.params["bert" if name != "FlaxBertModel" else "encoder"] is not None
    assert len([kernel for kernel in report.kernels if kernel.status != "DENSE"]) >= 6
    with as_they_compute():
        wanted = dense(name)(**BATCH, params=bert_adapter.merge(made.params))[0]
    np.testing.assert_allclose(called(made), wanted, rtol=0, atol=2000 * EPS * float(np.max(np.abs(wanted))))


def test_object_that_was_given_is_left_as_it_was():
    small("FlaxBertModel")
    assert type(dense("FlaxBertModel")) is transformers.FlaxBertModel
    assert "left" not in dense("FlaxBertModel").params["encoder"]["layer"]["0"]["intermediate"]["dense"]


@pytest.mark.parametrize("name", NAMES)
def test_object_is_saved_and_loaded_as_before(name, tmp_path):
    made, _ = small(name)
    made.save_pretrained(tmp_path / "small")
    with as_they_compute():
        again = type(made).from_pretrained(tmp_path / "small")
        same = bert_adapter.load_into(tmp_path / "small", getattr(transformers, name))
    for each in (again, same):
        assert isinstance(each, getattr(transformers, name))
        np.testing.assert_array_equal(called(each), called(made))


def test_class_that_knows_no_factors_finds_no_weights(tmp_path):
    """And draws no random kernels in their place."""
    small("FlaxBertModel")[0].save_pretrained(tmp_path / "small")
    with pytest.raises(OSError, match="no file named"):
        transformers.FlaxBertModel.from_pretrained(tmp_path / "small")


def test_dense_directory_is_loaded_as_its_class_does(tmp_path):
    dense("FlaxBertModel").save_pretrained(tmp_path / "dense")
    with as_they_compute():
        again = type(small("FlaxBertModel")[0]).from_pretrained(tmp_path / "dense")
    np.testing.assert_array_equal(called(again), called(dense("FlaxBertModel")))


def test_merged_object_is_one_of_dense_kernels(tmp_path):
    made, _ = small("FlaxBertModel")
    whole = bert_adapter.with_params(dense("FlaxBertModel"), bert_adapter.merge(made.params))
    assert jax.tree.map(np.shape, whole.params) == jax.tree.map(np.shape, dense("FlaxBertModel").params)
    np.testing.assert_allclose(called(whole), called(made), rtol=0, atol=1e-4)


def test_merged_parameters_of_an_object_are_saved_as_dense_ones(tmp_path):
    made, _ = small("FlaxBertModel")
    whole = bert_adapter.with_params(made, bert_adapter.merge(made.params))
    assert not hasattr(whole.config, "low_rank")
    whole.save_pretrained(tmp_path / "one")
    made.save_pretrained(tmp_path / "two", params=bert_adapter.merge(made.params))
    for place in ("one", "two"):
        again = bert_adapter.load(tmp_path / place)
        assert "low_rank" not in again.config
        jax.tree.map(np.testing.assert_array_equal, again.params, jax.device_get(whole.params))


def test_what_an_object_cannot_do_as_it_saves_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained: got push_to_hub, supported: save_directory and params"):
        small("FlaxBertModel")[0].save_pretrained(tmp_path / "small", push_to_hub=True)
    assert not (tmp_path / "small").exists()


def test_saved_object_is_a_model_of_ours(tmp_path):
    made, report = small("FlaxBertForSequenceClassification")
    made.save_pretrained(tmp_path / "small")
    ours = bert_adapter.load(tmp_path / "small")
    assert len(ours.config["low_rank"]["ranks"]) == len(report.kernels)
    np.testing.assert_allclose(
        bert_adapter.forward(ours)(ours.params, BATCH), called(made), rtol=0, atol=2000 * EPS
    )  # of numbers below one
