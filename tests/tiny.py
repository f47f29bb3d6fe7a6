"""One small BERT for all tests, and small models that are no BERT. Nothing is computed before it is asked for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter import sample
from bert_adapter.families import module_for
from bert_adapter.layers.capture import capture
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.stacks import unstacked
from bert_adapter.model import Model
from bert_adapter.text import LabelledTexts, labelled_batches

EMBEDDER, CLASSIFIER = "BertModel", "BertForSequenceClassification"
ARCHITECTURES = [EMBEDDER, CLASSIFIER]
CONFIG, FILES, WORDS = sample.CONFIG, sample.FILES, sample.WORDS
EPS = float(np.finfo(np.float32).eps)
BATCH = {  # whole, cut and of two sentences
    "input_ids": np.array([[2, 5, 6, 7, 9, 10, 13, 3], [2, 8, 9, 11, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]], np.int32),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6], np.int32),
    "token_type_ids": np.array([[0] * 4 + [1] * 4, [0] * 8, [0, 1] * 4], np.int32),
}


def config(architecture=EMBEDDER, **entries) -> dict[str, Any]:
    return CONFIG | {"architectures": [architecture]} | entries


@functools.cache
def module(architecture=EMBEDDER, **entries) -> Any:
    return module_for(config(architecture, **entries), sample.files_of(config(architecture)))


def random_params(module, *inputs, size=0.5):
    """Parameters of that size, so that no bias is zero, no scale is one, and attention is far from uniform."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *(inputs or [np.zeros((1, 1), np.int32)]))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, size, leaf.shape).astype(np.float32), shapes)


@functools.cache
def params(architecture=EMBEDDER, **entries):
    return random_params(module(architecture, **entries))


@functools.cache
def model(architecture=EMBEDDER, size=0.3, **entries) -> Model:
    made, entries = module(architecture, **entries), config(architecture, **entries)
    return Model(made, random_params(made, size=size), entries, sample.files_of(entries))


def of_distilbert() -> Model:
    """One that takes no token types, which its tokenizer gives."""
    sizes = {"vocab_size": 20, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
    entries = {"model_type": "distilbert", "architectures": ["DistilBertModel"], **sizes}
    made = module_for(entries, FILES)
    return Model(made, random_params(made, size=0.3), entries, FILES)


@functools.cache
def rows() -> LabelledTexts:
    """Forty texts of six words; red things are of class 1."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[5:13], size=6)) for _ in range(40)]
    return LabelledTexts(texts, np.array(["red" in text for text in texts], np.int32))


@functools.cache
def row_batches():
    return labelled_batches(model(), rows(), batch_size=8)


def at(tree, path) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def assert_passed_on(forward, params, batch, shapes, near=1.0):
    """What kernels pass on of inputs, and back of deltas, are the products with them, layers' biases left out.

    near: how large biases are.
    """
    paths, batch = frozenset(shapes), jax.tree.map(jnp.asarray, batch)
    for side in (0, 1):
        captured = capture(forward, params, batch, paths, passes=lambda path, shape, side=side: side)
        deltas, back = captured.deltas(jax.tree.map(jnp.ones_like, captured.output))
        steps, found = (captured.inputs, captured.onward) if side == 0 else (deltas, back)
        assert found.keys() == paths
        for path in paths:
            kernel = np.asarray(at(unstacked(params, paths), path)["kernel"], np.float64).reshape(shapes[path])
            wanted = np.asarray(steps[path], np.float64) @ (kernel if side == 0 else kernel.T)
            atol = 1000 * EPS * np.max(np.abs(wanted))  # a product of float32
            atol = max(atol, min(8 * EPS * near, 2.0**-10))  # and a bias that was added and taken off
            np.testing.assert_allclose(found[path], wanted, rtol=0, atol=atol, err_msg=path)


def factors(shape, rank, dtype: Any = np.float32):
    """Random factors (m, k) and (k, n) of a matrix of that shape."""
    rng = np.random.default_rng((*shape, rank))
    return tuple(rng.normal(0, 0.5, each).astype(dtype) for each in ((shape[0], rank), (rank, shape[1])))


def split(params, rank=2, dtype: Any = np.float32):
    """The parameters with random factors for every kernel, and with the products of these factors."""
    if not isinstance(params, dict):
        return params.astype(dtype), params.astype(dtype)
    small, dense = {}, {}
    for name, value in params.items():
        if name == "kernel":
            left, right = factors(value.shape, rank, dtype)
            small |= {"kernel": FACTORISED, "left": left, "right": right}
            dense[name] = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
        else:
            small[name], dense[name] = split(value, rank, dtype)
    return small, dense


def with_factors(model: Model, ranks: dict[str, int]) -> Model:
    """The model with random factors of those ranks for some of its kernels and tables."""
    params: Any = jax.tree.map(lambda leaf: leaf, model.params)
    for path, rank in ranks.items():
        name = next(name for name in ("kernel", "embedding") if name in at(params, path))
        kernel = at(params, path)[name]
        left, right = factors(kernel.shape, rank, kernel.dtype)
        at(params, path).update({name: FACTORISED, "left": left, "right": right})
    return model._replace(params=params, config=model.config | {"low_rank": {"schema": 1, "ranks": ranks}})


def cast(model: Model, dtype: Any) -> Model:
    return model._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))


def flax_bert(name, **entries) -> Any:
    """Hugging Face's model; from version 5 on, transformers has none."""
    transformers: Any = pytest.importorskip("transformers")
    reference = getattr(transformers, f"Flax{name}", None) or pytest.skip(f"transformers {transformers.__version__}")
    return reference(transformers.BertConfig(**CONFIG | entries), _do_init=False)
