"""A Flax Linen BERT whose parameter tree equals Hugging Face FlaxBert's, name for name.

Devlin et al. 2019; names, defaults and numerics as in transformers 4.57, the last release with a FlaxBert.
Every projection is a plain `nn.Dense`, so an interceptor of `nn.Dense.__call__` sees all of them, under the
paths of their parameters. Differs from FlaxBert: attention dropout is drawn for every sentence and head, as
BERT's authors do, instead of once a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from bert_adapter.families.stages import PROJECTED, UNDECLARED, Pooling, Projection, Stage, normalised, pooled
from bert_adapter.values import check_values

Ids = Num[Array | np.ndarray, "batch time"]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
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
    problem_type: str | None = None  # what the labels are


def sizes(config: Config) -> dict[str, int]:
    """How many values each input may have; the least is 0."""
    return {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": config.type_vocab_size,
        "position_ids": config.max_position_embeddings,
    }


class Context(NamedTuple):
    """What every part of one forward pass needs to know."""

    config: Config
    deterministic: bool
    dtypes: dict[str, Any]  # dtype and param_dtype


class Inputs(NamedTuple):
    """What a model is called with. By default all tokens are visible, of type 0, and numbered from the left."""

    input_ids: Ids
    attention_mask: Ids | None
    token_type_ids: Ids | None
    position_ids: Ids | None


class Output(NamedTuple):
    """The hidden states before, between and after the layers; the last one; its first token, pooled."""

    last_hidden_state: Float[Array, "batch time hidden"]
    pooler_output: Float[Array, "batch hidden"] | None
    hidden_states: tuple[Float[Array, "batch time hidden"], ...]


class Scope(nn.Module):
    """The parameters that the function `part` makes lie below this module's name."""

    part: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.part(*inputs)


def dense(context: Context, features: int, name: str = "dense") -> nn.Dense:
    init = nn.initializers.normal(context.config.initializer_range)
    return nn.Dense(features, kernel_init=init, name=name, **context.dtypes)


def embed(context: Context, size: int, name: str) -> nn.Embed:
    init = nn.initializers.normal(context.config.initializer_range)
    return nn.Embed(size, context.config.hidden_size, embedding_init=init, name=name, **context.dtypes)


def norm(context: Context, x: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes to float32 for the statistics
        return nn.LayerNorm(epsilon=context.config.layer_norm_eps, name="LayerNorm", **context.dtypes)(x)


def dropout(context: Context, x: Array, rate: float) -> Array:
    return nn.Dropout(rate, deterministic=context.deterministic)(x)


def embeddings(context: Context, input_ids: Ids, token_type_ids: Ids, position_ids: Ids) -> Array:
    """The normalised sum of what a token, its sentence's number and its position stand for."""
    config = context.config
    x = embed(context, config.vocab_size, "word_embeddings")(jnp.asarray(input_ids))
    x = x + embed(context, config.type_vocab_size, "token_type_embeddings")(jnp.asarray(token_type_ids))
    x = x + embed(context, config.max_position_embeddings, "position_embeddings")(jnp.asarray(position_ids))
    return dropout(context, norm(context, x), config.hidden_dropout_prob)


def self_attention(context: Context, x: Array, visible: Bool[Array, "batch 1 1 time"]) -> Array:
    """Each token's mix of the values that it may see.

    A masked score is finfo.min. FlaxBert adds finfo.min to the score: in float32 that rounds to the same, in
    float16 it may overflow to -inf, and a sentence of nothing but padding is then NaN.
    """
    config = context.config
    heads = (*x.shape[:2], config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    query, key, value = (
        dense(context, config.hidden_size, name)(x).reshape(heads) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * heads[-1] ** -0.5, key)
    weights = nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min))
    weights = dropout(context, weights, config.attention_probs_dropout_prob)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


def intermediate(context: Context, x: Array) -> Array:
    return ACTIVATIONS[context.config.hidden_act](dense(context, context.config.intermediate_size)(x))


def output(context: Context, x: Array, residual: Array) -> Array:
    """What closes both halves of a layer: LayerNorm(residual + dropout(dense(x)))."""
    x = dropout(context, dense(context, context.config.hidden_size)(x), context.config.hidden_dropout_prob)
    return norm(context, x + residual)


def attention(context: Context, x: Array, visible: Array) -> Array:
    mixed = Scope(self_attention, name="self")(context, x, visible)
    return Scope(output, name="output")(context, mixed, x)


def layer(context: Context, x: Array, visible: Array) -> Array:
    x = Scope(attention, name="attention")(context, x, visible)
    return Scope(output, name="output")(context, Scope(intermediate, name="intermediate")(context, x), x)


def layers(context: Context, x: Array, visible: Array) -> tuple[Array, ...]:
    """The states before the first layer and after each."""

    def step(x: Array, i: int) -> Array:
        return Scope(layer, name=str(i))(context, x, visible)

    return tuple(accumulate(range(context.config.num_hidden_layers), step, initial=x))


def encoder(context: Context, x: Array, visible: Array) -> tuple[Array, ...]:
    return Scope(layers, name="layer")(context, x, visible)


def pooler(context: Context, x: Array) -> Array:
    """The first token's state through a dense layer and tanh."""
    return nn.tanh(dense(context, context.config.hidden_size)(x[:, 0]))


def encode(context: Context, inputs: Inputs, pool: bool) -> Output:
    """BERT's output, from parameters directly below the module that calls."""
    check_values(sizes(context.config), inputs._asdict())
    ids, mask, types, positions = inputs
    limit = context.config.max_position_embeddings
    if ids.shape[1] > limit:
        raise ValueError(f"input_ids: got {ids.shape[1]} tokens a row, wanted at most {limit}")
    visible = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) > 0
    types = jnp.zeros(ids.shape, jnp.int32) if types is None else types
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else positions
    x = Scope(embeddings, name="embeddings")(context, ids, types, positions)
    states = Scope(encoder, name="encoder")(context, x, visible[:, None, None, :])
    return Output(states[-1], Scope(pooler, name="pooler")(context, states[-1]) if pool else None, states)


def project(context: Context, stage: Projection, x: Array) -> Array:
    """A dense layer on the embedding, with its activation."""
    if x.shape[-1] != stage.inputs:
        raise ValueError(f"{stage.name}/config.json: got in_features {stage.inputs}, wanted {x.shape[-1]}")
    init = nn.initializers.normal(context.config.initializer_range)
    layer = nn.Dense(stage.features, stage.use_bias, kernel_init=init, name="linear", **context.dtypes)
    return PROJECTED[stage.activation](layer(x))


def embedding(context: Context, stages: tuple[Stage, ...], hidden: Array, mask: Ids | None) -> Array:
    """What the stages make of the states, one after the other."""
    x = hidden
    for stage in stages:
        if isinstance(stage, Pooling):
            x = pooled(stage, x, mask)
        elif isinstance(stage, Projection):
            x = Scope(project, name=stage.name)(context, stage, x)
        else:
            x = normalised(x)
    return x


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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        context = Context(self.config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        return encode(context, inputs, self.add_pooling_layer)


class SentenceEmbedder(nn.Module):
    """Sentence embeddings, from the parameters of FlaxBertModel and those of dense layers among the stages.

    The pooler is there so that the trees are equal. Nothing depends on it, so its gradients are zero.
    """

    config: Config
    add_pooling_layer: bool = True
    stages: tuple[Stage, ...] = UNDECLARED
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
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        context = Context(self.config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        result = encode(context, inputs, self.add_pooling_layer)
        return embedding(context, self.stages, result.last_hidden_state, attention_mask)


def check_head(config: Config) -> None:
    """A ValueError if the labels cannot be those of the problem."""
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        raise ValueError("num_labels: got 1 with problem_type 'single_label_classification', wanted 2 or more")


class SequenceClassifier(nn.Module):
    """FlaxBertForSequenceClassification's logits, or its values: see `families.predictive`."""

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
        check_head(config)
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        context = Context(config, deterministic, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        bert = Bert(config, name="bert", **context.dtypes)
        pooled = bert(**inputs._asdict(), deterministic=deterministic).pooler_output
        assert pooled is not None
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        return dense(context, config.num_labels, "classifier")(dropout(context, pooled, rate))
