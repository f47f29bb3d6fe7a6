"""BERT (Devlin et al. 2019), with the parameters of Hugging Face's FlaxBert, name for name.

Numbers as in transformers 4.57, the last release with a FlaxBert.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool

from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.config import Config, read_config, sizes
from bert_adapter.families.family import Architecture, Attention, Family
from bert_adapter.families.heads import Decoder, Table, heads
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier, with_saved_parts
from bert_adapter.families.parts import (
    Context,
    Inputs,
    Output,
    Scope,
    States,
    attend,
    dense,
    dropout,
    embed,
    filled,
    head_dropout,
    norm,
    projected,
    stacked,
    visible,
)
from bert_adapter.families.torch_names import from_torch, to_torch


def embeddings(context: Context, inputs: Inputs, width: int) -> Array:
    """The normalised sum of what a token, its sentence's number and its position stand for."""
    config, ids = context.config, jnp.asarray(inputs.input_ids)
    types, positions = jnp.asarray(inputs.token_type_ids), jnp.asarray(inputs.position_ids)
    x = embed(context, config.vocab_size, "word_embeddings", width)(ids)
    x = x + embed(context, config.type_vocab_size, "token_type_embeddings", width)(types)
    x = x + embed(context, config.max_position_embeddings, "position_embeddings", width)(positions)
    return dropout(context, norm(context, x), config.hidden_dropout_prob)


def self_attention(context: Context, x: Array, seen: Bool[Array, "batch 1 1 time"]) -> Array:
    return attend(context, *projected(context, x, ("query", "key", "value")), visible=seen)


def intermediate(context: Context, x: Array) -> Array:
    return ACTIVATIONS[context.config.hidden_act](dense(context, context.config.intermediate_size)(x))


def output(context: Context, x: Array, residual: Array) -> Array:
    """What closes both halves of a layer: LayerNorm(residual + dropout(dense(x)))."""
    x = dropout(context, dense(context, context.config.hidden_size)(x), context.config.hidden_dropout_prob)
    return norm(context, x + residual)


def attention(context: Context, x: Array, seen: Array) -> Array:
    mixed = Scope(self_attention, name="self")(context, x, seen)
    return Scope(output, name="output")(context, mixed, x)


def layer(context: Context, x: Array, seen: Array) -> Array:
    x = Scope(attention, name="attention")(context, x, seen)
    return Scope(output, name="output")(context, Scope(intermediate, name="intermediate")(context, x), x)


def layers(context: Context, x: Array, seen: Array) -> States:
    return stacked(context, layer, x, seen)


def encoder(context: Context, x: Array, seen: Array) -> States:
    return Scope(layers, name="layer")(context, x, seen)


def pooler(context: Context, x: Array) -> Array:
    """The first token's state through a dense layer and tanh."""
    return nn.tanh(dense(context, context.config.hidden_size)(x[:, 0]))


def states(context: Context, inputs: Inputs) -> States:
    """The states, of inputs none of which is left out."""
    x = Scope(embeddings, name="embeddings")(context, inputs, context.config.hidden_size)
    return Scope(encoder, name="encoder")(context, x, visible(inputs.attention_mask))


def encode(context: Context, inputs: Inputs) -> States:
    """The states; positions are counted from 0."""
    return states(context, filled(inputs, sizes(context.config), context.config.max_position_embeddings))


def head(context: Context, result: Output) -> Array:
    """The classifier on the pooled token."""
    assert result.pooler_output is not None
    x = dropout(context, result.pooler_output, head_dropout(context.config))
    return dense(context, context.config.num_labels, "classifier")(x)


def transform(context: Context, x: Array) -> Array:
    """A dense layer with the activation of the encoder's, and a norm."""
    return norm(context, ACTIVATIONS[context.config.hidden_act](dense(context, context.config.hidden_size)(x)))


def transformed(context: Context, x: Array) -> Array:
    return Scope(transform, name="transform")(context, x)


def word_logits(context: Context, result: Output, table: Table) -> Array:
    """The words at each token, masked or not."""

    def below(context: Context, x: Array) -> Array:
        return Decoder(transformed, name="predictions")(context, x, table)

    return Scope(below, name="cls")(context, result.last_hidden_state)


class Bert(Encoder):
    """FlaxBertModel: hidden states, and the first token's through a dense layer and tanh."""

    encode, pool = staticmethod(encode), staticmethod(pooler)


class BertEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of FlaxBertModel and those of dense layers among the stages."""

    encode, pool = staticmethod(encode), staticmethod(pooler)


class BertClassifier(SequenceClassifier):
    """FlaxBertForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "bert"
    encode, pool, head = staticmethod(encode), staticmethod(pooler), staticmethod(head)


def config_from_dict(config: dict[str, Any]) -> Config:
    """The Config that a Hugging Face config.json describes; see `read_config`."""
    return read_config(Config, config)


ATTENTION = Attention(
    *(f"encoder/layer/{{}}/attention/self/{name}" for name in ("query", "key", "value")),
    output="encoder/layer/{}/attention/output/dense",
)
BUFFERS = r"embeddings/(position_ids|token_type_ids)$"  # constants that old checkpoints store


HEADS = heads(
    "Bert",
    prefix="bert",
    encode=encode,
    pool=pooler,
    words=word_logits,
    tied={
        "cls/predictions/decoder/kernel": "bert/embeddings/word_embeddings/embedding",
        "cls/predictions/decoder/bias": "cls/predictions/bias",
    },
    ignored=f"^cls/seq_relationship/|{BUFFERS}",  # the other pretraining head
    flax="FlaxBert",
)
BERT = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("BertModel", "BertForPreTraining", "BertForMaskedLM"),
        module=BertEmbedder,
        ignored=f"^cls/|{BUFFERS}",  # the pretraining heads
        fit=with_saved_parts,
        flax="FlaxBertModel",
    ),
    classifier=Architecture(
        names=("BertForSequenceClassification",),
        module=BertClassifier,
        labels=lambda config: config.num_labels,
        ignored=BUFFERS,
        flax="FlaxBertForSequenceClassification",
    ),
    prefix="bert/",
    encoder="^(bert/)?encoder/",
    from_torch=from_torch,
    to_torch=to_torch,
    inputs=Inputs._fields,
    longest=lambda config: config.max_position_embeddings,
    deviation=lambda config: config.initializer_range,
    sizes=sizes,
    heads=HEADS,
    attention=ATTENTION,
)
