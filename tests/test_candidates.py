"""What was tried for the default is what it is called."""

import numpy as np
import pytest
import reference
from flax.traverse_util import unflatten_dict
from test_finetune import TEXTS, embedder

from benchmarks import candidates
from bert_adapter.checkpoint.names import by_path
from bert_adapter.compression import compress
from bert_adapter.layers.capture import capture
from bert_adapter.model import forward
from bert_adapter.text import text_batches

MODEL = embedder()
BATCHES = list(text_batches(MODEL, TEXTS[:8], batch_size=4))
LAYER = "encoder/layer/0"
QUERY = f"{LAYER}/attention/self/query"


@pytest.fixture(scope="module")
def marginals():
    return candidates.measured(MODEL, BATCHES, "shampoo")


@pytest.fixture(scope="module")
def small(marginals):
    return compress(MODEL, (), importance=marginals, rank=4, progress=False)[0]


def mean_output(model, path):
    """Of a layer, over all tokens."""
    total, count = 0.0, 0
    kernel, bias = (np.asarray(by_path(model.params)[f"{path}/{name}"]) for name in ("kernel", "bias"))
    for batch in BATCHES:
        x = capture(forward(model), model.params, batch, frozenset([path])).inputs[path]
        mask = batch["attention_mask"].astype(bool)
        total, count = total + np.sum((np.asarray(x) @ kernel + bias)[mask], axis=0), count + mask.sum()
    return total / count


def test_corrected_biases_give_the_mean_outputs_of_the_dense_model(small):
    corrected = candidates.with_biases(MODEL, small, BATCHES)
    np.testing.assert_allclose(mean_output(corrected, QUERY), mean_output(MODEL, QUERY), atol=1e-5)


@pytest.mark.parametrize("tokens", [True, False])
def test_where_nothing_went_before_feedback_is_the_best_for_the_inputs(small, marginals, tokens):
    """With so large a ridge that all inputs count the same."""
    groups = [[QUERY], [f"{LAYER}/output/dense"]]
    model = candidates.fed_back(MODEL, small, BATCHES, marginals, groups, tokens=tokens, ridge=1e6)
    kernel = by_path(MODEL.params)[f"{QUERY}/kernel"]
    wanted = reference.kronecker(kernel, np.eye(16), marginals[QUERY].col_gram, 4)
    np.testing.assert_allclose(by_path(model.params)[f"{QUERY}/kernel"], wanted, atol=1e-3)
    assert np.linalg.matrix_rank(by_path(model.params)[f"{LAYER}/output/dense/kernel"], tol=1e-4) == 4


def test_layers_come_from_below():
    paths = [f"encoder/layer/{layer}/{name}" for layer in (10, 2) for name in ("intermediate/dense", "output/dense")]
    params = unflatten_dict({(*path.split("/"), "kernel"): np.ones((4, 4)) for path in paths})
    assert candidates.by_layer(MODEL._replace(params=params)) == [paths[2:], paths[:2]]
