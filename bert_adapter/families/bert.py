"""A Flax Linen BERT whose parameter tree equals Hugging Face FlaxBert's, name for name.

Devlin et al. 2019; names, defaults and numerics as in transformers 4.57, the last release with a FlaxBert.
Every projection is a plain `nn.Dense`, so an interceptor of `nn.Dense.__call__` sees all of them, under the
paths of their parameters. Differs from FlaxBert: attention dropout is drawn for every sentence and head, as
BERT's authors do, instead of once a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

Ids = Num[Array | np.ndarray, "batch time"]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


SUPPORTED: dict[str, tuple] = {  # the first value is what a missing entry means
    "model_type": ("bert",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class Config:
    """The entries of a Hugging Face config.json that matter here, with BertConfig's defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    num_labels: int = 2
    problem_type: str | None = None  # for whoever computes a loss


class Setting(NamedTuple):
    """What every part of one forward pass needs to know."""

    config: Config
    deterministic: bool
    dtypes: dict[str, Any]  # dtype and param_dtype


class Output(NamedTuple):
    """The hidden states before, between and after the layers; the last one; its first token, pooled."""

    last_hidden_state: Float[Array, "batch time hidden"]
    pooler_output: Float[Array, "batch hidden"] | None
    hidden_states: tuple[Float[Array, "batch time hidden"], ...]


def config_from_dict(config: dict[str, Any]) -> Config:
    """The Config that a Hugging Face config.json describes; entries the model does not use are ignored.

    The number of labels is "num_labels" or, as Hugging Face writes it, the length of "id2label".
    """
    for name, supported in SUPPORTED.items():
        if config.get(name, supported[0]) not in supported:
            raise ValueError(f"{name}: got {config[name]!r}, supported: {', '.join(map(repr, supported))}")
    labels: dict[str, Any] = {"num_labels": len(config["id2label"])} if config.get("id2label") else {}
    given = {field.name: config[field.name] for field in fields(Config) if field.name in config}
    result = Config(**labels | given)
    if result.hidden_size % result.num_attention_heads:
        raise ValueError(
            f"hidden_size: got {result.hidden_size}, wanted a multiple of num_attention_heads, "
            f"{result.num_attention_heads}"
        )
    return result


class Named(nn.Module):
    """The parameters that the function `part` makes lie below this module's name."""

    part: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.part(*inputs)


def dense(setting: Setting, features: int, name: str = "dense") -> nn.Dense:
    init = nn.initializers.normal(setting.config.initializer_range)
    return nn.Dense(features, kernel_init=init, name=name, **setting.dtypes)


def embed(setting: Setting, size: int, name: str) -> nn.Embed:
    init = nn.initializers.normal(setting.config.initializer_range)
    return nn.Embed(size, setting.config.hidden_size, embedding_init=init, name=name, **setting.dtypes)


def norm(setting: Setting, x: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes to float32 for the statistics
        return nn.LayerNorm(epsilon=setting.config.layer_norm_eps, name="LayerNorm", **setting.dtypes)(x)


def dropout(setting: Setting, x: Array, rate: float) -> Array:
    return nn.Dropout(rate, deterministic=setting.deterministic)(x)


def embeddings(setting: Setting, input_ids: Ids, token_type_ids: Ids, position_ids: Ids) -> Array:
    """The normalised sum of what a token, its sentence's number and its position stand for."""
    config = setting.config
    x = embed(setting, config.vocab_size, "word_embeddings")(jnp.asarray(input_ids))
    x = x + embed(setting, config.type_vocab_size, "token_type_embeddings")(jnp.asarray(token_type_ids))
    x = x + embed(setting, config.max_position_embeddings, "position_embeddings")(jnp.asarray(position_ids))
    return dropout(setting, norm(setting, x), config.hidden_dropout_prob)


def self_attention(setting: Setting, x: Array, visible: Bool[Array, "batch 1 1 time"]) -> Array:
    """Each token's mix of the values that it may see.

    A masked score is finfo.min. FlaxBert adds finfo.min to the score: in float32 that rounds to the same, in
    float16 it may overflow to -inf, and a sentence of nothing but padding is then NaN.
    """
    config = setting.config
    heads = (*x.shape[:2], config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    query, key, value = (
        dense(setting, config.hidden_size, name)(x).reshape(heads) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * heads[-1] ** -0.5, key)
    weights = nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min))
    weights = dropout(setting, weights, config.attention_probs_dropout_prob)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


def intermediate(setting: Setting, x: Array) -> Array:
    return ACTIVATIONS[setting.config.hidden_act](dense(setting, setting.config.intermediate_size)(x))


def output(setting: Setting, x: Array, residual: Array) -> Array:
    """What closes both halves of a layer: LayerNorm(residual + dropout(dense(x)))."""
    x = dropout(setting, dense(setting, setting.config.hidden_size)(x), setting.config.hidden_dropout_prob)
    return norm(setting, x + residual)


def attention(setting: Setting, x: Array, visible: Array) -> Array:
    mixed = Named(self_attention, name="self")(setting, x, visible)
    return Named(output, name="output")(setting, mixed, x)


def layer(setting: Setting, x: Array, visible: Array) -> Array:
    x = Named(attention, name="attention")(setting, x, visible)
    return Named(output, name="output")(setting, Named(intermediate, name="intermediate")(setting, x), x)


def layers(setting: Setting, x: Array, visible: Array) -> tuple[Array, ...]:
    """The states before the first layer and after each."""

    def step(x: Array, i: int) -> Array:
        return Named(layer, name=str(i))(setting, x, visible)

    return tuple(accumulate(range(setting.config.num_hidden_layers), step, initial=x))


def encoder(setting: Setting, x: Array, visible: Array) -> tuple[Array, ...]:
    return Named(layers, name="layer")(setting, x, visible)


def pooler(setting: Setting, x: Array) -> Array:
    """The first token's state through a dense layer and tanh."""
    return nn.tanh(dense(setting, setting.config.hidden_size)(x[:, 0]))


def encode(
    setting: Setting, ids: Ids, mask: Ids | None, types: Ids | None, positions: Ids | None, pool: bool
) -> Output:
    """BERT's output, from parameters directly below the module that calls.

    By default all tokens are visible, of type 0, and numbered from the left.
    """
    limit = setting.config.max_position_embeddings
    if ids.shape[1] > limit:
        raise ValueError(f"input_ids: got {ids.shape[1]} tokens a row, wanted at most {limit}")
    visible = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) > 0
    types = jnp.zeros(ids.shape, jnp.int32) if types is None else types
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else positions
    x = Named(embeddings, name="embeddings")(setting, ids, types, positions)
    states = Named(encoder, name="encoder")(setting, x, visible[:, None, None, :])
    return Output(states[-1], Named(pooler, name="pooler")(setting, states[-1]) if pool else None, states)


def mean_embedding(hidden: Float[Array, "batch time hidden"], mask: Ids | None) -> Float[Array, "batch hidden"]:
    """Each row is the mean hidden state of a sentence's visible tokens, scaled to length one.

    Reimers & Gurevych 2019, sec. 3. A sentence without visible tokens gets zeros, with zero gradients.
    """
    weights = jnp.ones(hidden.shape[:2], hidden.dtype) if mask is None else jnp.asarray(mask, hidden.dtype)
    mean = (hidden * weights[:, :, None]).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)[:, None]
    squared = (mean**2).sum(axis=1, keepdims=True)
    return mean / jnp.sqrt(jnp.where(squared > 0, squared, 1))


class Bert(nn.Module):
    """FlaxBertModel: hidden states, and the first token's through a dense layer and tanh."""

    config: Config
    add_pooling_layer: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Output:
        setting = Setting(self.config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        return encode(setting, input_ids, attention_mask, token_type_ids, position_ids, self.add_pooling_layer)


class SentenceEmbedder(nn.Module):
    """Sentence embeddings of length one, from the parameters of FlaxBertModel.

    The pooler is there so that the trees are equal. Nothing depends on it, so its gradients are zero.
    """

    config: Config
    add_pooling_layer: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch hidden"]:
        setting = Setting(self.config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        result = encode(setting, input_ids, attention_mask, token_type_ids, position_ids, self.add_pooling_layer)
        return mean_embedding(result.last_hidden_state, attention_mask)


class SequenceClassifier(nn.Module):
    """FlaxBertForSequenceClassification's logits; a single one is the value of a regression."""

    config: Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: Ids | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        config = self.config
        setting = Setting(config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        bert = Bert(config, name="bert", **setting.dtypes)
        pooled = bert(input_ids, attention_mask, token_type_ids, position_ids, deterministic).pooler_output
        assert pooled is not None
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        return dense(setting, config.num_labels, "classifier")(dropout(setting, pooled, rate))
