"""MPNet (Song et al. 2020): positions counted from the first token, and how far apart two tokens are in every layer.

Names and numbers as in transformers 4.57. Tokens have no types. The bias of a distance is that of its bucket, the same
in all layers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bert_adapter.families import bert
from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.config import SUPPORTED, Config, read_config, untyped_sizes
from bert_adapter.families.family import Architecture, Attention, Family
from bert_adapter.families.heads import Decoder, Table, heads
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier, with_saved_parts
from bert_adapter.families.parts import (
    Context,
    Ids,
    Inputs,
    Output,
    Scope,
    States,
    attend,
    dense,
    dropout,
    embed,
    filled,
    norm,
    projected,
    refuse,
    stacked,
    two_layers,
    visible,
)
from bert_adapter.families.roberta import numbered
from bert_adapter.families.torch_names import from_torch, to_torch

PADDING = 1  # the token, whatever config.json calls so
BUCKETS = 32  # of distances


@dataclass(frozen=True)
class MpnetConfig(Config):
    """MPNetConfig's defaults where they are not BERT's."""

    vocab_size: int = 30527


READ = {  # the rest of BERT's entries mean nothing here
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "problem_type",
    )
}


def config_from_dict(config: dict[str, Any]) -> MpnetConfig:
    """The MpnetConfig that a Hugging Face config.json describes; see `read_config`."""
    result = read_config(MpnetConfig, config, READ, SUPPORTED | {"relative_attention_num_buckets": (BUCKETS,)})
    if longest(result) < 1:
        least = result.max_position_embeddings - longest(result) + 1
        raise ValueError(f"max_position_embeddings: got {result.max_position_embeddings}, wanted at least {least}")
    return result


def bucket(distance: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The number of each distance's bucket: one half of them for tokens before, the other for tokens after.

    Of each half, the first 8 are the distances below 8, and bucket 8 + j begins at 8 * 2**(j / 2): what Song et al.
    write with logarithms, here in squares, so that nothing is rounded.
    """
    half, own = BUCKETS // 2, BUCKETS // 4
    far = np.abs(distance)
    growing = own + np.sum(far[..., None] ** 2 >= own**2 * 2 ** np.arange(1, own), axis=-1)
    return np.where(distance > 0, half, 0) + np.where(far < own, far, growing)


class Pairs(NamedTuple):
    """Which token sees which other, and what is added to the score of that."""

    visible: Bool[Array, "batch 1 1 time"]
    bias: Float[Array, "1 heads time time"]


def distance_bias(context: Context, time: Any) -> Float[Array, "1 heads time time"]:
    """What each head adds to the score of a token that lies so far off; `time` may be a symbol of jax.export."""
    most, steps = context.config.max_position_embeddings, jnp.arange(time)
    buckets = jnp.asarray(bucket(np.arange(1 - most, most)))[steps[None, :] - steps[:, None] + (most - 1)]
    table = embed(context, BUCKETS, "relative_attention_bias", context.config.num_attention_heads)
    return jnp.transpose(table(buckets), (2, 0, 1))[None]


def embeddings(context: Context, input_ids: Ids, position_ids: Ids) -> Array:
    """The normalised sum of what a token and its position stand for."""
    config = context.config
    x = embed(context, config.vocab_size, "word_embeddings")(jnp.asarray(input_ids))
    x = x + embed(context, config.max_position_embeddings, "position_embeddings")(jnp.asarray(position_ids))
    return dropout(context, norm(context, x), config.hidden_dropout_prob)


def self_attention(context: Context, x: Array, pairs: Pairs) -> Array:
    mixed = attend(context, *projected(context, x, ("q", "k", "v")), **pairs._asdict())
    return dense(context, context.config.hidden_size, "o")(mixed)


def attention(context: Context, x: Array, pairs: Pairs) -> Array:
    mixed = Scope(self_attention, name="attn")(context, x, pairs)
    return norm(context, dropout(context, mixed, context.config.hidden_dropout_prob) + x)


def layer(context: Context, x: Array, pairs: Pairs) -> Array:
    x = Scope(attention, name="attention")(context, x, pairs)
    wide = Scope(bert.intermediate, name="intermediate")(context, x)
    return Scope(bert.output, name="output")(context, wide, x)


def layers(context: Context, x: Array, pairs: Pairs) -> States:
    return stacked(context, layer, x, pairs)


def encoder(context: Context, x: Array, seen: Array) -> States:
    return Scope(layers, name="layer")(context, x, Pairs(seen, distance_bias(context, x.shape[1])))


def longest(config: MpnetConfig) -> int:
    """The most tokens a row: the first one's position is 2."""
    return config.max_position_embeddings - PADDING - 1


def encode(context: Context, inputs: Inputs) -> States:
    """MPNet's states."""
    refuse(inputs, "token_type_ids")
    given = filled(inputs, untyped_sizes(context.config), longest(context.config))
    positions = numbered(inputs.input_ids, PADDING) if inputs.position_ids is None else inputs.position_ids
    x = Scope(embeddings, name="embeddings")(context, given.input_ids, positions)
    return Scope(encoder, name="encoder")(context, x, visible(given.attention_mask))


def head(context: Context, result: Output) -> Array:
    """The classifier on the first token: two dense layers, tanh between."""
    return Scope(two_layers, name="classifier")(context, result.last_hidden_state[:, 0], nn.tanh)


def transform(context: Context, x: Array) -> Array:
    """A dense layer, GELU and a norm, whatever the encoder's activation."""
    return norm(context, ACTIVATIONS["gelu"](dense(context, context.config.hidden_size)(x)), "layer_norm")


def word_logits(context: Context, result: Output, table: Table) -> Array:
    """The words at each token, masked or not."""
    return Decoder(transform, name="lm_head")(context, result.last_hidden_state, table)


class MpnetEncoder(Encoder):
    """MPNetModel: hidden states, and the first token's through a dense layer and tanh."""

    encode, pool = staticmethod(encode), staticmethod(bert.pooler)


class MpnetEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of MPNetModel and those of dense layers among the stages."""

    encode, pool = staticmethod(encode), staticmethod(bert.pooler)


class MpnetClassifier(SequenceClassifier):
    """MPNetForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "mpnet"
    encode, head = staticmethod(encode), staticmethod(head)


BUFFERS = "embeddings/position_ids$"  # constants that old checkpoints store
HEADS = heads(
    "MPNet",
    prefix="mpnet",
    encode=encode,
    pool=bert.pooler,
    words=word_logits,
    tied={
        "lm_head/decoder/kernel": "mpnet/embeddings/word_embeddings/embedding",
        "lm_head/decoder/bias": "lm_head/bias",
    },
    ignored=BUFFERS,
)


MPNET = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("MPNetModel", "MPNetForMaskedLM", "MPNetForPreTraining"),
        module=MpnetEmbedder,
        ignored=f"^lm_head/|{BUFFERS}",  # the pretraining head
        fit=with_saved_parts,
    ),
    classifier=Architecture(
        names=("MPNetForSequenceClassification",),
        module=MpnetClassifier,
        labels=lambda config: config.num_labels,
        ignored=f"^mpnet/pooler/|{BUFFERS}",  # a pooler that the head does not use
    ),
    prefix="mpnet/",
    encoder="^(mpnet/)?encoder/",
    from_torch=from_torch,
    to_torch=to_torch,
    inputs=("input_ids", "attention_mask", "position_ids"),
    longest=longest,
    deviation=lambda config: config.initializer_range,
    sizes=untyped_sizes,
    heads=HEADS,
    attention=Attention(*(f"encoder/layer/{{}}/attention/attn/{name}" for name in "qkvo")),
)
