"""ELECTRA (Clark et al. 2020), with the parameters of Hugging Face's FlaxElectra, name for name.

The layers are BERT's. Tables may be narrower than the states, and are then projected; a head has two layers and no
pooler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.bert import ATTENTION, BUFFERS, embeddings, encoder
from bert_adapter.families.config import Config, read_config, sizes
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.heads import TABLE, Decoder, Table, heads
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier
from bert_adapter.families.parts import (
    Context,
    Inputs,
    Output,
    Scope,
    States,
    dense,
    filled,
    norm,
    two_layers,
    visible,
)
from bert_adapter.families.torch_names import from_torch, to_torch


@dataclass(frozen=True)
class ElectraConfig(Config):
    """ElectraConfig's entries and defaults."""

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024


def config_from_dict(config: Mapping[str, Any]) -> ElectraConfig:
    """The config that a Hugging Face config.json describes; see `read_config`."""
    return read_config(ElectraConfig, config)


def encode(context: Context, inputs: Inputs) -> States:
    """BERT's states, from tables of another width."""
    config = context.config
    inputs = filled(inputs, sizes(config), config.max_position_embeddings)
    x = Scope(embeddings, name="embeddings")(context, inputs, config.embedding_size)
    if config.embedding_size != config.hidden_size:
        x = dense(context, config.hidden_size, "embeddings_project")(x)
    return Scope(encoder, name="encoder")(context, x, visible(inputs.attention_mask))


def classifier(context: Context, x: Array) -> Array:
    return two_layers(context, x, ACTIVATIONS["gelu"])  # whatever the layers' is


def head(context: Context, result: Output) -> Array:
    """Two layers on the first token's state."""
    return Scope(classifier, name="classifier")(context, result.last_hidden_state[:, 0])


def transform(context: Context, x: Array) -> Array:
    """A dense layer with GELU, whatever the layers' activation is, and a norm, as wide as the tables."""
    return norm(context, ACTIVATIONS["gelu"](dense(context, context.config.embedding_size)(x)))


def word_logits(context: Context, result: Output, table: Table) -> Array:
    """The words at each token, masked or not."""
    x = Scope(transform, name="generator_predictions")(context, result.last_hidden_state)
    return Decoder(name="generator_lm_head")(context, x, table)


class Electra(Encoder):
    """FlaxElectraModel's hidden states."""

    encode = staticmethod(encode)


class ElectraEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of FlaxElectraModel and those of dense layers among the stages."""

    encode = staticmethod(encode)


class ElectraClassifier(SequenceClassifier):
    """FlaxElectraForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "electra"
    encode, head = staticmethod(encode), staticmethod(head)


ELECTRA = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("ElectraModel", "ElectraForPreTraining", "ElectraForMaskedLM"),
        module=ElectraEmbedder,
        ignored=f"^(discriminator_predictions|generator_predictions|generator_lm_head)/|{BUFFERS}",
        flax="FlaxElectraModel",
    ),
    classifier=Architecture(
        names=("ElectraForSequenceClassification",),
        module=ElectraClassifier,
        labels=lambda config: config.num_labels,
        ignored=BUFFERS,
        flax="FlaxElectraForSequenceClassification",
    ),
    prefix="electra/",
    encoder="^(electra/)?encoder/",
    from_torch=from_torch,
    to_torch=to_torch,
    inputs=Inputs._fields,
    longest=lambda config: config.max_position_embeddings,
    deviation=lambda config: config.initializer_range,
    sizes=sizes,
    heads=heads(
        "Electra",
        prefix="electra",
        encode=encode,
        pool=None,
        words=word_logits,
        tied={"generator_lm_head/kernel": f"electra/{TABLE}"},
        choice=None,  # its summary has options of its own
        ignored=BUFFERS,
        flax="FlaxElectra",
    ),
    attention=ATTENTION,
)
