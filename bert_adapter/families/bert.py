"""BERT (Devlin et al. 2019): its config, what its checkpoints hold, and what they are read as."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from bert_adapter.families.bert_module import ACTIVATIONS, Bert, Config, Inputs, SentenceEmbedder, SequenceClassifier
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.torch_names import from_torch, to_torch

SUPPORTED: dict[str, tuple] = {  # the first value is what a missing entry means
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": tuple(ACTIVATIONS),
}


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


def with_saved_parts(module: Bert | SentenceEmbedder, paths: Iterable[str]) -> Bert | SentenceEmbedder:
    """Without a pooler if the checkpoint has none: no embedding depends on it."""
    return module.clone(add_pooling_layer=any(path.startswith("pooler/") for path in paths))


BUFFERS = r"embeddings/(position_ids|token_type_ids)$"  # constants that old checkpoints store


BERT = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("BertModel", "BertForPreTraining", "BertForMaskedLM"),
        module=SentenceEmbedder,
        ignored=f"^cls/|{BUFFERS}",  # the pretraining heads
        fit=with_saved_parts,
        flax="FlaxBertModel",
    ),
    classifier=Architecture(
        names=("BertForSequenceClassification",),
        module=SequenceClassifier,
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
)
