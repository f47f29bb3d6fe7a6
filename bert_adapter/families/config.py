"""The entries of a Hugging Face config.json that encoders like BERT have in common, and how they are read.

An entry that changes the arithmetic is computed, or refused by its name.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.json_files import shown


@dataclass(frozen=True)
class Config:
    """What the shared pieces of encoders need to know; the names and defaults are BertConfig's."""

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
    head_sizes: tuple[tuple[int, int], ...] = ()  # of each layer: of queries and keys, of values; () for the whole
    identities: bool = False  # after the queries and values of each head, to measure what fewer dimensions lose


OURS = ("head_sizes", "identities")  # which are no entries of config.json's by these names
Kind = TypeVar("Kind", bound=Config)


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


Entry = tuple[Callable[[Any], bool], str]
ENTRIES: dict[type, Entry] = {  # what an entry may be, by the type of its default
    int: (lambda value: type(value) is int and 0 < value < 2**31, "a positive integer below 2**31"),
    float: (is_fraction, "a number from 0 to 1"),
    type(None): (is_fraction, "a number from 0 to 1, or null"),
    str: (lambda value: value in ACTIVATIONS, f"one of {', '.join(map(repr, ACTIVATIONS))}"),
    bool: (lambda value: type(value) is bool, "true or false"),
}
NAMED: dict[str, Entry] = {  # those that may be something else
    "pad_token_id": (lambda value: type(value) is int and value >= 0, "an integer from 0"),
    "problem_type": (lambda value: True, ""),  # one of SUPPORTED
    "classifier_pooling": (lambda value: True, ""),  # the same
}


def read_config(
    kind: type[Kind],
    config: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    supported: Mapping[str, tuple] = SUPPORTED,
) -> Kind:
    """The family's config that a Hugging Face config.json describes; entries the model does not use are ignored.

    An entry of null counts as missing, with a warning where transformers could not run with it.

    Args:
      kind: a dataclass with the defaults.
      names: the field that each entry is read as, where a family has names of its own; by default all fields.
      supported: by the names of entries, the values that can be computed.

    Raises:
      ValueError: names the entry, what it is, and what it may be.
    """
    for name, values in supported.items():
        if config.get(name) is not None and config[name] not in values:
            raise ValueError(f"{name}: got {config[name]!r}, supported: {', '.join(map(repr, values))}")
    defaults = {field.name: field.default for field in fields(kind)}
    given: dict[str, Any] = labels_of(config)
    for name, field in (names or {name: name for name in defaults if name not in (*given, *OURS)}).items():
        value = config.get(name)
        if value is not None:
            check_entry(name, value, NAMED.get(field) or ENTRIES[type(defaults[field])])
            if given.get(field, value) != value:
                raise ValueError(f"{name}: got {value!r}, wanted {given[field]!r}, which another name of it says")
            given[field] = value
        elif name in config and defaults[field] is not None:
            warnings.warn(f"{name}: null in config.json is read as a missing entry, {defaults[field]!r}", stacklevel=3)
    result = kind(**given)
    check_heads(result, {field: name for name, field in reversed(list((names or {}).items()))})
    return replace(result, head_sizes=head_sizes_in(config, result))


def check_entry(name: str, value: Any, entry: Entry) -> None:
    """A ValueError if the entry cannot be what it is."""
    fits, wanted = entry
    if not (isinstance(value, str | int | float) and fits(value)):
        raise ValueError(f"{name}: got {shown(value)}, wanted {wanted}")


def check_heads(config: Config, names: Mapping[str, str]) -> None:
    """A ValueError if the states cannot be shared out among the heads."""
    width, heads = (names.get(field, field) for field in ("hidden_size", "num_attention_heads"))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{width}: got {config.hidden_size}, wanted a multiple of {heads}, {config.num_attention_heads}"
        )


def head_sizes_in(config: Mapping[str, Any], read: Config) -> tuple[tuple[int, int], ...]:
    """Of each layer, the dimensions of its heads, where the section "low_rank" says that they are fewer."""
    section = config.get("low_rank")
    given = section.get("heads") if isinstance(section, dict) else None
    if given is None:
        return ()
    whole, layers = read.hidden_size // read.num_attention_heads, read.num_hidden_layers
    pairs = [each for each in given if isinstance(each, list) and len(each) == 2] if isinstance(given, list) else []
    sizes = [size for each in pairs for size in each if type(size) is int and 0 < size <= whole]
    if not isinstance(given, list) or len(given) != layers or len(sizes) != 2 * layers:
        wanted = f"two numbers from 1 to {whole} for each of {layers} layers"
        raise ValueError(f"config low_rank heads: got {shown(given)}, wanted {wanted}")
    return tuple((first, second) for first, second in given)


def labels_of(config: Mapping[str, Any]) -> dict[str, int]:
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
    count = given[0] if given else Config.num_labels
    check_entry("num_labels", count, ENTRIES[int])
    return {"num_labels": count}


def sizes(config: Config) -> dict[str, int]:
    """How many values each input may have; the least is 0."""
    return {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": config.type_vocab_size,
        "position_ids": config.max_position_embeddings,
    }


def untyped_sizes(config: Config) -> dict[str, int]:
    """The same, of a model whose tokens have no types."""
    return {name: size for name, size in sizes(config).items() if name != "token_type_ids"}


def check_head(config: Config) -> None:
    """A ValueError if the labels cannot be those of the problem."""
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        raise ValueError("num_labels: got 1 with problem_type 'single_label_classification', wanted 2 or more")
