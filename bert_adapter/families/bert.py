"""BERT (Devlin et al. 2019): its config, what its checkpoints hold, and what they are read as."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from bert_adapter.families.bert_module import (
    ACTIVATIONS,
    Bert,
    Config,
    Inputs,
    SentenceEmbedder,
    SequenceClassifier,
    sizes,
)
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.torch_names import from_torch, to_torch
from bert_adapter.json_files import shown

SUPPORTED: dict[str, tuple] = {  # the first value is what a missing entry means, or null
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
    "quantization_config": (None,),  # weights that are no plain numbers
    "auto_map": (None, {}),  # the model is code in its directory
}


def is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def is_class(number: Any) -> bool:
    return number is None or (type(number) is not bool and str(number).isdecimal())


DEFAULTS = {field.name: field.default for field in fields(Config)}
ENTRIES: dict[type, tuple[Callable[[Any], bool], str]] = {  # what an entry may be, by the type of its default
    int: (lambda value: type(value) is int and value > 0, "a positive integer"),
    float: (is_fraction, "a number from 0 to 1"),
    type(None): (is_fraction, "a number from 0 to 1, or null"),
    str: (lambda value: value in ACTIVATIONS, f"one of {', '.join(map(repr, ACTIVATIONS))}"),
}


def config_from_dict(config: dict[str, Any]) -> Config:
    """The Config that a Hugging Face config.json describes; entries the model does not use are ignored.

    An entry of null counts as missing, with a warning where transformers could not run with it.
    """
    for name, supported in SUPPORTED.items():
        if config.get(name) is not None and config[name] not in supported:
            raise ValueError(f"{name}: got {config[name]!r}, supported: {', '.join(map(repr, supported))}")
    given: dict[str, Any] = {name: config[name] for name in DEFAULTS if name in config} | labels_of(config)
    for name in [name for name, value in given.items() if value is None]:
        if DEFAULTS[name] is not None:
            warnings.warn(f"{name}: null in config.json is read as a missing entry, {DEFAULTS[name]!r}", stacklevel=2)
        del given[name]
    for name, value in given.items():
        fits, wanted = ENTRIES[type(DEFAULTS[name])]
        if name != "problem_type" and not (isinstance(value, str | int | float) and fits(value)):
            raise ValueError(f"{name}: got {shown(value)}, wanted {wanted}")
    result = Config(**given)
    if result.hidden_size % result.num_attention_heads:
        raise ValueError(
            f"hidden_size: got {result.hidden_size}, wanted a multiple of num_attention_heads, "
            f"{result.num_attention_heads}"
        )
    return result


def labels_of(config: dict[str, Any]) -> dict[str, int]:
    """The number of labels: as in transformers the length of "id2label", or else "num_labels", or its name of 2019."""
    names = config.get("id2label")
    if names is not None and not isinstance(names, dict):
        raise ValueError(f"id2label: got {shown(names)}, wanted an object")
    if not all(str(number).isdecimal() for number in names or {}):
        raise ValueError(f"id2label: got {shown(names)}, wanted the numbers of classes as keys")
    named = config.get("label2id")
    if named is not None and not (isinstance(named, dict) and all(is_class(number) for number in named.values())):
        raise ValueError(f"label2id: got {shown(named)}, wanted an object with the numbers of classes as values")
    if names:
        return {"num_labels": len(names)}
    given = [config[name] for name in ("num_labels", "_num_labels") if config.get(name) is not None]
    return {"num_labels": given[0] if given else Config.num_labels}


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
    sizes=sizes,
)
