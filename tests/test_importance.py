"""The Fisher information is the sum of the squares of each example's own gradient."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter.apply import FACTORISED, apply
from bert_adapter.importance import measure_importance
from bert_adapter.model import Bert, config_from_dict, module_for

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "num_labels": 3,
}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(0, 50, (4, 8)),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 7 + [0]]),
    "labels": np.array([0, 2, 1, 0]),
}
LAYER = [
    "attention/self/query",
    "attention/self/key",
    "attention/self/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
]
PATHS = [f"bert/encoder/layer/{i}/{name}" for i in (0, 1) for name in LAYER] + ["bert/pooler/dense", "classifier"]
MODULE = module_for(CONFIG)
EPS = float(np.finfo(np.float32).eps)
measure = partial(measure_importance, progress=False)


class Net(nn.Module):
    """One vector for every example, from a mean over the steps."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, name="last")(nn.tanh(nn.Dense(4, name="first")(x)).sum(axis=1))


X = np.random.default_rng(1).normal(size=(3, 2, 5)).astype(np.float32)


def net(width=3) -> Any:
    return Net(width)


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def run(module, params, batch):
    return apply(module, params, batch["input_ids"], batch["attention_mask"])


def run_net(module, params, batch):
    return apply(module, params, batch["x"])


def cross_entropy(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)[:, 0]


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def sum_of_squares(loss, params, batch):
    """The squares of the gradients of loss(params, batch of one) summed over the examples, in float64."""
    ones = {name: jnp.asarray(array)[:, None] for name, array in batch.items()}
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, ones)
    return jax.tree.map(lambda leaf: np.sum(np.asarray(leaf, np.float64) ** 2, axis=0), gradients)


def assert_near(got, wanted, relative):
    """Relative to the largest entry: small ones are sums of gradients that cancel."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=relative * float(np.max(np.abs(wanted))))


def assert_same_but_for_rounding(got, wanted):
    assert got.keys() == wanted.keys()
    for path, triple in wanted.items():
        for ours, theirs in zip(got[path], triple, strict=True):
            assert_near(ours, theirs, relative=100 * EPS)  # other sums of some ten layers in float32


@pytest.fixture(scope="module")
def params():
    return random_params(MODULE, np.zeros((1, 1), np.int32))


@pytest.fixture(scope="module")
def measured(params):
    return measure(partial(run, MODULE), params, [BATCH], PATHS, loss=cross_entropy)


@pytest.fixture(scope="module")
def truth(params):
    def loss(params, batch):
        return cross_entropy(MODULE.apply({"params": params}, batch["input_ids"], batch["attention_mask"]), batch)[0]

    return sum_of_squares(loss, params, BATCH)


@pytest.fixture(scope="module")
def states(params):
    """What enters the first layer, the second, and the pooler."""
    output: Any = jax.jit(partial(run, Bert(config_from_dict(CONFIG))))(params["bert"], BATCH)
    return output.hidden_states


@pytest.mark.parametrize("path", PATHS)
def test_fisher_is_the_sum_of_squared_gradients_of_the_examples(measured, truth, path):
    assert_near(measured[path].fisher, at(truth, path)["kernel"], relative=1e-5)  # some hundred roundings in float32


def test_exactly_the_paths_asked_for_are_measured(measured):
    assert set(measured) == set(PATHS)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", LAYER[:3])
def test_inputs_factor_sums_over_the_tokens_that_are_no_padding(states, measured, layer, name):
    tokens = np.asarray(states[layer], np.float64)[BATCH["attention_mask"] == 1]
    got = measured[f"bert/encoder/layer/{layer}/{name}"].inputs
    assert_near(got, tokens.T @ tokens, relative=100 * EPS)  # sums of 22 terms behind some ten layers in float32


def test_outputs_factor_sums_over_the_gradients_of_the_logits(params, measured):
    logits = run(MODULE, params, BATCH)
    deltas = np.asarray(jax.nn.softmax(logits), np.float64) - np.eye(3)[BATCH["labels"]]
    assert_near(measured["classifier"].outputs, deltas.T @ deltas, relative=100 * EPS)  # as above


def test_factors_of_a_net_are_those_written_out_in_numpy():
    params = random_params(Net(), X)
    first, last = (jax.tree.map(np.float64, params[name]) for name in ("first", "last"))
    hidden = np.tanh(X @ first["kernel"] + first["bias"])
    output = hidden.sum(axis=1) @ last["kernel"] + last["bias"]
    deltas = (1 - hidden**2) * (output @ last["kernel"].T)[:, None, :]  # of half the squared output
    got = measure(
        partial(run_net, Net()), params, [{"x": X}], ["first"], loss=lambda output, _: 0.5 * jnp.sum(output**2, axis=1)
    )["first"]
    tokens, deltas = X.reshape(-1, 5).astype(np.float64), deltas.reshape(-1, 4)
    assert_near(got.inputs, tokens.T @ tokens, relative=20 * EPS)  # six terms
    assert_near(got.outputs, deltas.T @ deltas, relative=100 * EPS)  # two layers, there and back


def test_longer_padding_changes_nothing(params, measured):
    longer = {name: array if array.ndim == 1 else np.pad(array, ((0, 0), (0, 3))) for name, array in BATCH.items()}
    longer["input_ids"][:, 8:] = 7
    got = measure(partial(run, MODULE), params, [longer], PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_cut_of_the_batches_changes_nothing(params, measured):
    halves = ({name: array[half] for name, array in BATCH.items()} for half in (slice(0, 2), slice(2, 4)))
    got = measure(partial(run, MODULE), params, halves, PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_dropout_is_off(params, measured):
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    got = measure(partial(run, module_for(CONFIG | rates)), params, [BATCH], PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_kernels_that_stayed_dense_are_measured_beside_factors():
    params, rng = random_params(Net(), X), np.random.default_rng(2)
    left, right = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    bias = params["first"]["bias"]
    small = params | {"first": {"kernel": FACTORISED, "left": left, "right": right, "bias": bias}}
    dense = params | {"first": {"kernel": left @ right, "bias": bias}}
    got, wanted = (measure(partial(run_net, Net()), tree, [{"x": X}], ["last"]) for tree in (small, dense))
    assert_same_but_for_rounding(got, wanted)


def test_sums_of_a_bfloat16_model_are_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(Net(), X))
    got = measure(partial(run_net, Net()), params, [{"x": X.astype(jnp.bfloat16)}], ["first"])
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


def test_without_labels_an_output_of_one_number_gives_its_own_squared_gradient():
    params = random_params(net(width=1), X)  # the only directions are 1 and -1
    module = net(width=1)
    wanted = sum_of_squares(lambda params, batch: module.apply({"params": params}, **batch)[0, 0], params, {"x": X})
    got = measure(partial(run_net, module), params, [{"x": X}], ["first"])
    assert_near(got["first"].fisher, wanted["first"]["kernel"], relative=100 * EPS)  # two layers in float32


def test_without_labels_the_expectation_is_the_mean_over_the_coordinates_of_the_output():
    copies, params = 20_000, random_params(Net(), X)
    exact = [
        sum_of_squares(lambda params, batch, i=i: net().apply({"params": params}, **batch)[0, i], params, {"x": X})
        for i in range(3)
    ]
    wanted = np.mean([tree["first"]["kernel"] for tree in exact], axis=0)
    batch = {"x": np.concatenate([X] * copies)}
    got = np.asarray(measure(partial(run_net, Net()), params, [batch], ["first"])["first"].fisher) / copies
    # A squared projection's deviation is below sqrt(2) of its mean; five deviations of the mean of 20000.
    np.testing.assert_allclose(got, wanted, rtol=5 * np.sqrt(2 / copies))


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same", "other"])
def test_without_labels_the_seed_decides(seeds):
    params = random_params(Net(), X)
    first, second = (
        np.asarray(measure(partial(run_net, Net()), params, [{"x": X}], ["first"], seed=seed)["first"].fisher)
        for seed in seeds
    )
    assert np.array_equal(first, second) == (seeds[0] == seeds[1])


def test_without_labels_each_batch_has_its_own_directions():
    params = random_params(Net(), X)
    once, twice = (
        np.asarray(measure(partial(run_net, Net()), params, [{"x": X}] * times, ["first"])["first"].fisher)
        for times in (1, 2)
    )
    assert not np.allclose(twice, 2 * once, rtol=1e-3)  # rounding is a thousand times smaller


def test_with_a_loss_the_seed_does_not_matter():
    params = random_params(Net(), X)
    first, second = (
        measure(partial(run_net, Net()), params, [{"x": X}], ["first"], loss=lambda output, _: output[:, 0], seed=seed)
        for seed in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_without_labels_an_output_that_is_no_embedding_is_refused():
    module = Bert(config_from_dict(CONFIG))
    params = random_params(module, np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match=r"without a loss the model's output must be one array \(batch, width\); got"):
        measure(partial(run, module), params, [BATCH], ["pooler/dense"])


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches: wanted at least one"):
        measure(partial(run_net, Net()), random_params(Net(), X), [], ["first"])


def test_path_of_no_dense_layer_is_named():
    with pytest.raises(ValueError, match=r"no dense layer is called under \['second'\]"):
        measure(partial(run_net, Net()), random_params(Net(), X), [{"x": X}], ["first", "second"])
