"""RoBERTa (Liu et al. 2019), and CamemBERT and XLM-RoBERTa, which differ from it in their texts alone.

The layers are BERT's. Positions are counted over the tokens that are no padding, from `pad_token_id` + 1. A head has
two layers and no pooler. Parameters are those of Hugging Face's FlaxRoberta, name for name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from bert_adapter.families import bert
from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.config import Config, read_config, sizes
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.heads import TABLE, Decoder, Table, heads
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier, with_saved_parts
from bert_adapter.families.parts import (
    Context,
    Ids,
    Inputs,
    Output,
    Scope,
    States,
    dense,
    filled,
    norm,
    two_layers,
)
from bert_adapter.families.torch_names import from_torch, to_torch


@dataclass(frozen=True)
class RobertaConfig(Config):
    """RobertaConfig's entries and defaults."""

    vocab_size: int = 50265
    pad_token_id: int = 1


@dataclass(frozen=True)
class MultilingualConfig(RobertaConfig):
    """CamembertConfig's and XLMRobertaConfig's."""

    vocab_size: int = 30522


def longest(config: RobertaConfig) -> int:
    """The most tokens a row: the positions up to that of padding are no token's."""
    return config.max_position_embeddings - config.pad_token_id - 1


def numbered(ids: Ids, padding: int) -> Int[Array, "batch time"]:
    """Each token's number among those of its row that are no padding, from padding + 1; that of padding is its id."""
    counts = (jnp.asarray(ids) != padding).astype(jnp.int32)
    return jnp.cumsum(counts, axis=1) * counts + padding


def encode(context: Context, inputs: Inputs) -> States:
    """BERT's states, at RoBERTa's positions."""
    config, given = context.config, inputs.position_ids
    inputs = filled(inputs, sizes(config), longest(config))
    positions = numbered(inputs.input_ids, config.pad_token_id) if given is None else given
    return bert.states(context, inputs._replace(position_ids=positions))


def classifier(context: Context, x: Array) -> Array:
    return two_layers(context, x, nn.tanh)


def head(context: Context, result: Output) -> Array:
    """Two layers on the first token's state."""
    return Scope(classifier, name="classifier")(context, result.last_hidden_state[:, 0])


def transform(context: Context, x: Array) -> Array:
    """A dense layer with GELU, whatever the layers' activation is, and a norm."""
    return norm(context, ACTIVATIONS["gelu"](dense(context, context.config.hidden_size)(x)), "layer_norm")


def word_logits(context: Context, result: Output, table: Table) -> Array:
    """The words at each token, masked or not."""
    return Decoder(transform, name="lm_head")(context, result.last_hidden_state, table)


class Roberta(Encoder):
    """FlaxRobertaModel: hidden states, and the first token's through a dense layer and tanh."""

    encode, pool = staticmethod(encode), staticmethod(bert.pooler)


class RobertaEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of FlaxRobertaModel and those of dense layers among the stages."""

    encode, pool = staticmethod(encode), staticmethod(bert.pooler)


class RobertaClassifier(SequenceClassifier):
    """FlaxRobertaForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "roberta"
    encode, head = staticmethod(encode), staticmethod(head)


def config_of(kind: type[RobertaConfig]) -> Callable[[Mapping[str, Any]], RobertaConfig]:
    """The reader of a Hugging Face config.json with the defaults of `kind`."""

    def read(config: Mapping[str, Any]) -> RobertaConfig:
        result = read_config(kind, config)
        if longest(result) < 1 or result.pad_token_id >= result.vocab_size:
            most = min(result.max_position_embeddings - 2, result.vocab_size - 1)
            raise ValueError(f"pad_token_id: got {result.pad_token_id}, wanted at most {most}, so that texts have room")
        return result

    return read


def family(kind: type[RobertaConfig], name: str, flax: str | None) -> Family:
    """RoBERTa's, with classes of transformers whose names begin so."""
    return Family(
        config=config_of(kind),
        embedder=Architecture(
            names=(f"{name}Model", f"{name}ForMaskedLM"),
            module=RobertaEmbedder,
            ignored=f"^lm_head/|{bert.BUFFERS}",  # the pretraining head
            fit=with_saved_parts,
            flax=flax and f"{flax}Model",
        ),
        classifier=Architecture(
            names=(f"{name}ForSequenceClassification",),
            module=RobertaClassifier,
            labels=lambda config: config.num_labels,
            ignored=f"^roberta/pooler/|{bert.BUFFERS}",  # a pooler that the head does not use
            flax=flax and f"{flax}ForSequenceClassification",
        ),
        prefix="roberta/",
        encoder="^(roberta/)?encoder/",
        from_torch=from_torch,
        to_torch=to_torch,
        inputs=Inputs._fields,
        longest=longest,
        deviation=lambda config: config.initializer_range,
        sizes=sizes,
        heads=heads(
            name,
            prefix="roberta",
            encode=encode,
            pool=bert.pooler,
            words=word_logits,
            tied={"lm_head/decoder/kernel": f"roberta/{TABLE}", "lm_head/decoder/bias": "lm_head/bias"},
            ignored=bert.BUFFERS,
            flax=flax,
        ),
        attention=bert.ATTENTION,
    )


ROBERTA = family(RobertaConfig, "Roberta", flax="FlaxRoberta")
CAMEMBERT = family(MultilingualConfig, "Camembert", flax=None)
XLM_ROBERTA = family(MultilingualConfig, "XLMRoberta", flax="FlaxXLMRoberta")
