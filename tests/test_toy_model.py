"""A family and a layer are added from outside by one assignment each, and go the whole way."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import BATCH, EPS, FILES, random_params

import bert_adapter
from bert_adapter import FAMILIES, LAYERS
from bert_adapter.families.bert import BertClassifier, BertEmbedder
from bert_adapter.families.config import Config
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.torch_names import from_torch, to_torch
from bert_adapter.layers.capture import capture
from bert_adapter.layers.layer import Layer
from bert_adapter.layers.running import kernel_shapes

compress = partial(bert_adapter.compress, rank=2, signal="svd", progress=False)


def toy_config(config):
    return Config(
        vocab_size=config["words"],
        hidden_size=config["width"],
        intermediate_size=config["wide"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["heads"],
        max_position_embeddings=config["length"],
        num_labels=config.get("num_labels", 2),
    )


def toy_from_torch(name, tensor):
    return from_torch(name.removeprefix("toy:").replace("blocks.", "encoder.layer."), tensor)


def toy_to_torch(path, array):
    name, tensor = to_torch(path, array)
    return f"toy:{name.replace('encoder.layer.', 'blocks.')}", tensor


# The arithmetic is BERT's; the config, the architectures and the names on the disk are not.
TOY_FAMILY = Family(
    config=toy_config,
    embedder=Architecture(names=("ToyEmbedder",), module=BertEmbedder),
    classifier=Architecture(names=("ToyClassifier",), module=BertClassifier, labels=lambda config: config.num_labels),
    prefix="bert/",
    encoder="encoder/",
    from_torch=toy_from_torch,
    to_torch=toy_to_torch,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    longest=lambda config: config.max_position_embeddings,
    deviation=lambda config: config.initializer_range,
)
TOY_CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyEmbedder"],
    "words": 20,
    "width": 16,
    "wide": 24,
    "depth": 1,
    "heads": 2,
    "length": 16,
}


class Heads(nn.Module):
    """Each step through a kernel of three axes (in, heads, size)."""

    @nn.compact
    def __call__(self, steps):
        kernel = self.param("kernel", nn.initializers.normal(), (steps.shape[-1], 3, 4))
        bias = self.param("bias", nn.initializers.zeros, (3, 4))
        return jnp.einsum("bti,iho->btho", steps, jnp.asarray(kernel)) + jnp.asarray(bias)[None, None]


TOY_LAYER = Layer(Heads, input_axes=lambda module: 1)


class ByHeads(nn.Module):
    """A small model with such a layer, and embeddings of length one as any embedder's."""

    config: Any

    @nn.compact
    def __call__(self, input_ids):
        steps = nn.Embed(self.config.vocab_size, 8, name="word_embeddings")(jnp.asarray(input_ids))
        heads = nn.tanh(Heads(name="heads")(steps))
        mean = nn.Dense(5, name="last")(heads.reshape(*heads.shape[:2], 12)).mean(axis=1)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def model_of(module, config):
    return bert_adapter.Model(module, random_params(module), config, FILES)


def embed(model):
    return jax.jit(bert_adapter.forward(model))(model.params, BATCH)


def saved_and_loaded(model, directory):
    bert_adapter.save(model, directory)
    again = bert_adapter.load(directory)
    assert (again.module, again.config) == (model.module, model.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, jax.device_get(model.params))
    return again


@pytest.fixture
def toy_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY_FAMILY)


@pytest.fixture
def toy_layer(monkeypatch):
    monkeypatch.setitem(LAYERS, "heads", TOY_LAYER)
    family = TOY_FAMILY._replace(
        config=lambda config: Config(vocab_size=config["words"]),
        embedder=Architecture(names=("ByHeads",), module=ByHeads),
        encoder="heads|last",
        inputs=("input_ids",),
    )
    monkeypatch.setitem(FAMILIES, "by heads", family)
    config = {"model_type": "by heads", "architectures": ["ByHeads"], "words": 20}
    return model_of(ByHeads(Config(vocab_size=20)), config)


@pytest.mark.usefixtures("toy_family")
def test_toy_family_goes_the_whole_way(tmp_path):
    dense = saved_and_loaded(model_of(BertEmbedder(toy_config(TOY_CONFIG)), TOY_CONFIG), tmp_path / "dense")
    small, report = compress(dense, [BATCH])
    kernels = {path for path in kernel_shapes(dense.module) if not path.startswith("embeddings/")}
    assert {kernel.path for kernel in report.kernels} == kernels - {"pooler/dense"}
    again = saved_and_loaded(small, tmp_path / "small")
    np.testing.assert_array_equal(embed(again), embed(small))


@pytest.mark.usefixtures("toy_family")
def test_toy_family_is_read_under_its_own_names(tmp_path):
    model = model_of(BertEmbedder(toy_config(TOY_CONFIG)), TOY_CONFIG)
    bert_adapter.save(model, tmp_path / "toy")
    names = load_file(tmp_path / "toy/model.safetensors").keys()
    assert "toy:blocks.0.attention.self.query.weight" in names
    assert all(name.startswith("toy:") for name in names)


@pytest.mark.usefixtures("toy_family")
def test_toy_family_gets_a_head_of_its_own(tmp_path):
    headed = bert_adapter.with_head(model_of(BertEmbedder(toy_config(TOY_CONFIG)), TOY_CONFIG), 3)
    assert headed.config["architectures"] == ["ToyClassifier"]
    assert saved_and_loaded(headed, tmp_path / "headed").module.config.num_labels == 3


def test_toy_layer_runs_on_factors(toy_layer):
    left, right = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((8, 2), (2, 3, 4)))
    kernel = np.tensordot(left, right, axes=1)
    layer = {"bias": toy_layer.params["heads"]["bias"]}
    small = toy_layer.params | {"heads": layer | {"kernel": bert_adapter.FACTORISED, "left": left, "right": right}}
    dense = toy_layer.params | {"heads": layer | {"kernel": kernel}}
    got, wanted = (embed(toy_layer._replace(params=params)) for params in (small, dense))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=100 * EPS)  # sums of some ten numbers in two orders


def test_toy_layer_is_captured_as_a_matrix(toy_layer):
    captured = capture(bert_adapter.forward(toy_layer), toy_layer.params, BATCH, frozenset({"heads"}))
    deltas = captured.deltas(jnp.ones(captured.output.shape))[0]["heads"]
    got = np.einsum("bti,bto->io", captured.inputs["heads"], deltas)

    def total(params):
        return jnp.sum(bert_adapter.forward(toy_layer)(params, BATCH))

    wanted = jax.grad(total)(toy_layer.params)["heads"]["kernel"]
    assert kernel_shapes(toy_layer.module) == {"word_embeddings": (20, 8), "heads": (8, 12), "last": (12, 5)}
    np.testing.assert_allclose(got, wanted.reshape(8, 12), rtol=0, atol=100 * EPS)


class Weighted(nn.Module):
    """A product with a parameter that is called neither a kernel nor an embedding."""

    @nn.compact
    def __call__(self, x):
        return x @ jnp.asarray(self.param("weight", nn.initializers.normal(), (x.shape[-1], 8)))


class Steps(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(Weighted(name="weighted")(x)), None


class ByWeights(nn.Module):
    @nn.compact
    def __call__(self, x):
        many = nn.scan(Steps, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(8, name="dense")(Weighted(name="last")(many(name="layers")(x, None)[0]).mean(axis=1))


def test_a_kernel_may_be_called_otherwise(monkeypatch):
    """It is found, planned, factorised, run and merged, in a scan too."""
    monkeypatch.setitem(LAYERS, "weighted", Layer(Weighted, input_axes=lambda module: 1, kernel="weight"))
    batch = {"x": np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)}
    given = ByWeights(), random_params(ByWeights(), batch["x"])
    paths = ["layers/weighted[0]", "layers/weighted[1]", "last"]
    small, report = bert_adapter.compress(given, [batch], budget=0.6, of="flops", exclude="dense", progress=False)
    assert ([kernel.path for kernel in report.kernels], report.dense) == (paths, [])
    whole = bert_adapter.with_params(small, bert_adapter.merge(small.params))
    assert jax.tree.map(np.shape, whole.params) == jax.tree.map(np.shape, given[1])
    run = bert_adapter.forward(small)
    np.testing.assert_allclose(run(whole.params, batch), run(small.params, batch), rtol=0, atol=100 * EPS)
    planned = bert_adapter.plan(given[1], None, budget=0.9, of="flops", signal="svd", kernels={"last": (8, 8)})
    assert planned.share == pytest.approx((3 + planned.ranks["last"] / 4) / 4)


def test_toy_layer_goes_the_whole_way(toy_layer, tmp_path):
    dense = saved_and_loaded(toy_layer, tmp_path / "dense")
    small, report = compress(dense, [BATCH])
    assert {kernel.path: kernel.shape for kernel in report.kernels} == {"heads": (8, 12), "last": (12, 5)}
    assert (small.params["heads"]["left"].shape, small.params["heads"]["right"].shape) == ((8, 2), (2, 3, 4))
    again = saved_and_loaded(small, tmp_path / "small")
    np.testing.assert_array_equal(embed(again), embed(small))
    whole = small._replace(params=bert_adapter.merge(small.params))
    assert whole.params["heads"]["kernel"].shape == (8, 3, 4)
    np.testing.assert_allclose(embed(whole), embed(small), rtol=0, atol=100 * EPS)
