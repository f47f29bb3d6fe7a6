"""DistilBERT (Sanh et al. 2019), with the parameters of Hugging Face's FlaxDistilBert, name for name.

A table of positions is a parameter, as in PyTorch's files, also where `sinusoidal_pos_embds` says that it began as
sinusoids; FlaxDistilBert then has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bert_adapter.families import heads as heads_of
from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.bert import BUFFERS
from bert_adapter.families.config import SUPPORTED, Config, read_config
from bert_adapter.families.family import Architecture, Attention, Family
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier
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
    norm,
    projected,
    refuse,
    stacked,
    visible,
)
from bert_adapter.families.torch_names import from_torch, to_torch


@dataclass(frozen=True)
class DistilBertConfig(Config):
    """DistilBertConfig's defaults; the entries have names of their own, see NAMES. The norms' epsilon is no entry."""

    num_hidden_layers: int = 6
    classifier_dropout: float = 0.2
    qa_dropout: float = 0.1


NAMES = {  # the entries that are read, and as what; the last three are other names that transformers knows
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
    "initializer_range": "initializer_range",
    "seq_classif_dropout": "classifier_dropout",
    "qa_dropout": "qa_dropout",
    "problem_type": "problem_type",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
}


def config_from_dict(config: Mapping[str, Any]) -> DistilBertConfig:
    """The config that a Hugging Face config.json describes; see `read_config`."""
    return read_config(DistilBertConfig, config, NAMES, SUPPORTED | {"sinusoidal_pos_embds": (False, True)})


def sizes(config: DistilBertConfig) -> dict[str, int]:
    """How many values each input may have; the least is 0."""
    return {"input_ids": config.vocab_size, "attention_mask": 2}


def embeddings(context: Context, inputs: Inputs) -> Array:
    """The normalised sum of what a token and its position stand for."""
    config, ids, positions = context.config, jnp.asarray(inputs.input_ids), jnp.asarray(inputs.position_ids)
    x = embed(context, config.vocab_size, "word_embeddings", config.hidden_size)(ids)
    x = x + embed(context, config.max_position_embeddings, "position_embeddings", config.hidden_size)(positions)
    return dropout(context, norm(context, x), config.hidden_dropout_prob)


def attention(context: Context, x: Array, seen: Array) -> Array:
    mixed = attend(context, *projected(context, x, ("q_lin", "k_lin", "v_lin")), visible=seen)
    return dense(context, context.config.hidden_size, "out_lin")(mixed)


def feed_forward(context: Context, x: Array) -> Array:
    config = context.config
    x = ACTIVATIONS[config.hidden_act](dense(context, config.intermediate_size, "lin1")(x))
    return dropout(context, dense(context, config.hidden_size, "lin2")(x), config.hidden_dropout_prob)


def layer(context: Context, x: Array, seen: Array) -> Array:
    x = norm(context, Scope(attention, name="attention")(context, x, seen) + x, "sa_layer_norm")
    return norm(context, Scope(feed_forward, name="ffn")(context, x) + x, "output_layer_norm")


def layers(context: Context, x: Array, seen: Array) -> States:
    return stacked(context, layer, x, seen)


def transformer(context: Context, x: Array, seen: Array) -> States:
    return Scope(layers, name="layer")(context, x, seen)


def encode(context: Context, inputs: Inputs) -> States:
    """DistilBERT's states; positions are counted from 0."""
    refuse(inputs, "token_type_ids", "position_ids")
    inputs = filled(inputs, sizes(context.config), context.config.max_position_embeddings)
    x = Scope(embeddings, name="embeddings")(context, inputs)
    return Scope(transformer, name="transformer")(context, x, visible(inputs.attention_mask))


def head(context: Context, result: Output) -> Array:
    """Two layers on the first token's state, with dropout between them."""
    config = context.config
    x = nn.relu(dense(context, config.hidden_size, "pre_classifier")(result.last_hidden_state[:, 0]))
    return dense(context, config.num_labels, "classifier")(dropout(context, x, config.classifier_dropout))


def token_logits(context: Context, result: Output) -> Array:
    """The classes of each token."""
    x = dropout(context, result.last_hidden_state, context.config.hidden_dropout_prob)
    return dense(context, context.config.num_labels, "classifier")(x)


def span_logits(context: Context, result: Output) -> Array:
    """How likely an answer starts and ends at each token."""
    x = dropout(context, result.last_hidden_state, context.config.qa_dropout)
    return heads_of.span_logits(context, result._replace(last_hidden_state=x))


def choice_logits(context: Context, result: Output) -> Array:
    """How well the first token's state fits."""
    config = context.config
    x = nn.relu(dense(context, config.hidden_size, "pre_classifier")(result.last_hidden_state[:, 0]))
    return dense(context, 1, "classifier")(dropout(context, x, config.classifier_dropout))


def word_logits(context: Context, result: Output, table: heads_of.Table) -> Array:
    """The words at each token, masked or not."""
    config = context.config
    x = ACTIVATIONS[config.hidden_act](dense(context, config.hidden_size, "vocab_transform")(result.last_hidden_state))
    x = norm(context, x, "vocab_layer_norm")
    return heads_of.Decoder(name="vocab_projector")(context, x, table)


class DistilBert(Encoder):
    """FlaxDistilBertModel's hidden states."""

    encode = staticmethod(encode)


class DistilBertEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of FlaxDistilBertModel and those of dense layers among the stages."""

    encode = staticmethod(encode)


class DistilBertClassifier(SequenceClassifier):
    """FlaxDistilBertForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "distilbert"
    encode, head = staticmethod(encode), staticmethod(head)


DISTILBERT = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("DistilBertModel", "DistilBertForMaskedLM"),
        module=DistilBertEmbedder,
        ignored=f"^vocab_(transform|layer_norm|projector)/|{BUFFERS}",  # the pretraining head
        flax="FlaxDistilBertModel",
    ),
    classifier=Architecture(
        names=("DistilBertForSequenceClassification",),
        module=DistilBertClassifier,
        labels=lambda config: config.num_labels,
        ignored=BUFFERS,
        flax="FlaxDistilBertForSequenceClassification",
    ),
    prefix="distilbert/",
    encoder="^(distilbert/)?transformer/",
    from_torch=from_torch,
    to_torch=to_torch,
    inputs=("input_ids", "attention_mask"),
    longest=lambda config: config.max_position_embeddings,
    deviation=lambda config: config.initializer_range,
    sizes=sizes,
    heads=heads_of.heads(
        "DistilBert",
        prefix="distilbert",
        encode=encode,
        pool=None,
        words=word_logits,
        tied={"vocab_projector/kernel": f"distilbert/{heads_of.TABLE}"},
        tokens=token_logits,
        answer=span_logits,
        choice=choice_logits,
        ignored=BUFFERS,
        flax="FlaxDistilBert",
    ),
    attention=Attention(*(f"transformer/layer/{{}}/attention/{name}_lin" for name in ("q", "k", "v", "out"))),
)
