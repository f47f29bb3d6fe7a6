"""What was tried for the default is what it is called."""

import functools

import numpy as np
import pytest
import reference
import tiny

from benchmarks import candidates
from bert_adapter.checkpoint.names import by_path
from bert_adapter.compressing import compress
from bert_adapter.layers.capture import capture
from bert_adapter.model import forward
from bert_adapter.text import text_batches

LAYER = "encoder/layer/0"
QUERY = f"{LAYER}/attention/self/query"


@functools.cache
def dense():
    return tiny.model(intermediate_size=16)


@functools.cache
def batches():
    return list(text_batches(dense(), tiny.rows().texts[:8], batch_size=4))


@pytest.fixture(scope="module")
def marginals():
    return candidates.measured(dense(), batches(), "shampoo")


@pytest.fixture(scope="module")
def small(marginals):
    return compress(dense(), (), importance=marginals, signal="shampoo", rank=4, progress=False)[0]


def mean_output(model, path):
    """Of a layer, over all tokens."""
    total, count = 0.0, 0
    kernel, bias = (np.asarray(by_path(model.params)[f"{path}/{name}"]) for name in ("kernel", "bias"))
    for batch in batches():
        x = capture(forward(model), model.params, batch, frozenset([path])).inputs[path]
        mask = batch["attention_mask"].astype(bool)
        total, count = total + np.sum((np.asarray(x) @ kernel + bias)[mask], axis=0), count + mask.sum()
    return total / count


@pytest.mark.slow
def test_corrected_biases_give_the_mean_outputs_of_the_dense_model(small):
    corrected = candidates.with_biases(dense(), small, batches())
    np.testing.assert_allclose(mean_output(corrected, QUERY), mean_output(dense(), QUERY), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [True, False])
def test_where_nothing_went_before_feedback_is_the_best_for_the_inputs(small, marginals, tokens):
    """With so large a ridge that all inputs count the same."""
    groups = [[QUERY], [f"{LAYER}/output/dense"]]
    model = candidates.fed_back(dense(), small, batches(), marginals, groups=groups, tokens=tokens, ridge=1e6)
    kernel = by_path(dense().params)[f"{QUERY}/kernel"]
    wanted = reference.kronecker(kernel, np.eye(16), marginals[QUERY].col_gram, 4)
    np.testing.assert_allclose(by_path(model.params)[f"{QUERY}/kernel"], wanted, atol=1e-3)
    assert np.linalg.matrix_rank(by_path(model.params)[f"{LAYER}/output/dense/kernel"], tol=1e-4) == 4


def test_layers_come_from_below():
    groups = candidates.by_layer(tiny.model(num_hidden_layers=11))
    assert [len(group) for group in groups] == [6] * 11
    assert all(path.startswith(f"encoder/layer/{i}/") for i, group in enumerate(groups) for path in group)
