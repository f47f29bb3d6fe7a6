"""What a family of models says of itself: all that the rest of the package knows of it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np


def no_labels(config: Any) -> None:
    """The output is an embedding."""


def no_sizes(config: Any) -> dict[str, int]:
    """No input's values are checked."""
    return {}


def no_entries(config: Any) -> dict[str, Any]:
    """All that config.json says is read by every release."""
    return {}


def unchanged(module: Any, paths: Iterable[str]) -> Any:
    """Every checkpoint has all parameters of the module."""
    return module


class Architecture(NamedTuple):
    """A module, and what its output is.

    names: its names in config.json's "architectures"; whatever was read, the first is written.
    module: the class, which is called with the family's config and keeps it as `.config`. An embedder's that has a
      field `stages` takes there what sentence-transformers' files declare; others are refused such files.
    labels: (config) -> how many numbers the output has for each text, token or choice; None if it is an embedding. What
      they stand for is said by its place in the family: see `families.predictive`.
    ignored: a regular expression, searched in the paths of a checkpoint's parameters: those found are not read.
    fit: (module, paths of parameters) -> the module without the optional parts that a checkpoint leaves out.
    flax: the class of transformers whose parameters fit; None if there is none.
    tied: by their paths, parameters of a checkpoint that are other ones again, to which these paths lead: they may be
      missing, and are not written. A kernel is the transpose.
    """

    names: tuple[str, ...]
    module: type[nn.Module]
    labels: Callable[[Any], int | None] = no_labels
    ignored: str = r"(?!)"  # nothing
    fit: Callable[[Any, Iterable[str]], Any] = unchanged
    flax: str | None = None
    tied: Mapping[str, str] = MappingProxyType({})


class Attention(NamedTuple):
    """The paths of a layer's kernels of attention, below the prefix, with {} for the layer's number."""

    query: str
    key: str
    value: str
    output: str


class Family(NamedTuple):
    """Models that share a config, a naming of parameters and an encoder.

    config: (config.json's entries) -> the config that the modules take, or a ValueError that names the entry.
    embedder, classifier: what its models are for: "embedding" and "labels" of `OUTPUTS`.
    prefix: of the encoder's parameters where a head lies beside them.
    encoder: a regular expression that finds the paths of the encoder's kernels, with the prefix and without.
    words: one that finds the path of the table of words. Other tables stay dense.
    from_torch: (name, array) in PyTorch's files -> (path, array) of the module.
    to_torch: the way back; contiguous, because safetensors writes the memory as it lies.
    inputs: the names of what the modules are called with.
    longest: (config) -> the most tokens a row.
    deviation: (config) -> the standard deviation of a new kernel.
    sizes: (config) -> by the names of inputs, how many values they may have, the least of which is 0.
    heads: by the names of `OUTPUTS`, what else its models are for.
    older: (config) -> entries for the config.json of an export, by which transformers before 5 computes the same; or a
      ValueError if it cannot.
    attention: where a layer's kernels of attention are, of modules that take the sizes of heads from their config, and
      identities; None where heads cannot have fewer dimensions.

    Example:
        >>> from bert_adapter import FAMILIES
        >>> FAMILIES["bert"].longest(FAMILIES["bert"].config({"max_position_embeddings": 64}))
        64
    """

    config: Callable[[dict[str, Any]], Any]
    embedder: Architecture
    classifier: Architecture
    prefix: str
    encoder: str
    from_torch: Callable[[str, np.ndarray], tuple[str, np.ndarray]]
    to_torch: Callable[[str, np.ndarray], tuple[str, np.ndarray]]
    inputs: tuple[str, ...]
    longest: Callable[[Any], int]
    deviation: Callable[[Any], float]
    sizes: Callable[[Any], dict[str, int]] = no_sizes
    heads: Mapping[str, Architecture] = MappingProxyType({})
    words: str = "(^|/)(word|tok)_embeddings$"
    older: Callable[[Any], dict[str, Any]] = no_entries
    attention: Attention | None = None
