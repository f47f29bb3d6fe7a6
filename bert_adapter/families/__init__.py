"""Families of models, by config.json's "model_type"."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn

from bert_adapter.families.bert import BERT
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.sentence import MODULES, declared_stages
from bert_adapter.layers.running import parameter_shapes
from wlra.checks import check_name

FAMILIES: dict[str, Family] = {  # a config that names none is of the first
    "bert": BERT,
}


def family_name(config: Mapping[str, Any]) -> str:
    """The "model_type" of a Hugging Face config.json; without one, the first family's."""
    return config.get("model_type") or next(iter(FAMILIES))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a Hugging Face config.json names."""
    name = family_name(config)
    if name not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"model_type: got {name!r}, supported: {known}; bert_adapter.FAMILIES[{name!r}] = ... adds it")
    return FAMILIES[name]


def architectures_of(family: Family) -> tuple[Architecture, ...]:
    """All that the family can be."""
    return family.embedder, family.classifier


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The first known one that a Hugging Face config.json names.

    A model with pretraining heads counts as its encoder, whose use is to embed sentences.
    """
    known = {name: each for each in architectures_of(family_of(config)) for name in each.names}
    named = config.get("architectures") or []
    found = [known[name] for name in ([named] if isinstance(named, str) else named) if name in known]
    if not found:
        raise ValueError(f"architectures: got {named!r}, supported: {', '.join(known)}")
    return found[0]


def architecture_in(config: dict[str, Any], paths: Iterable[str]) -> Architecture:
    """The one that config.json names, or else, as in old ones, the one that the paths of the parameters show.

    That is the classifier if they hold its head, and the encoder if not: what transformers' AutoModel reads.
    """
    if config.get("architectures"):
        return architecture_of(config)
    family = family_of(config)
    params, _ = parameter_shapes(family.classifier.module(family.config(config)))
    head = params.keys() - {family.prefix.rstrip("/")}
    return family.classifier if head <= {path.split("/")[0] for path in paths} else family.embedder


def module_for(config: dict[str, Any], files: Mapping[str, bytes] = MappingProxyType({})) -> nn.Module:
    """The module that runs the architecture which a Hugging Face config.json names.

    For an embedder, sentence-transformers' files declare what follows the encoder; without them, it is a mean.
    """
    family, architecture = family_of(config), architecture_of(config)
    module, stages = architecture.module(family.config(config)), declared_stages(files)
    if stages is None:
        return module
    if not hasattr(module, "stages"):
        raise ValueError(f"files: got {MODULES} or 1_Pooling/config.json, wanted none for {architecture.names[0]}")
    return module.clone(stages=stages)


def flax_architectures() -> dict[str, tuple[str, Architecture]]:
    """By the names of transformers' Flax classes, the "model_type" and the architecture that their parameters fit."""
    return {
        each.flax: (name, each)
        for name, family in FAMILIES.items()
        for each in architectures_of(family)
        if each.flax is not None
    }


def label_count(module: nn.Module) -> int | None:
    """How many labels the module's output has; None if it is no head's."""
    known = (each for family in FAMILIES.values() for each in architectures_of(family))
    return next((each.labels(module.config) for each in known if isinstance(module, each.module)), None)  # pyright: ignore[reportAttributeAccessIssue]


PROBLEMS = {  # by config.json's "problem_type", the distributions that a head's output stands for
    "regression": "gaussian",
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
}


def predictive(module: nn.Module) -> str:
    """The distribution that the module's output stands for.

    "gaussian": around an embedding or values. "categorical": of classes, by a softmax. "bernoulli": of labels at once,
    each by a sigmoid. Where no "problem_type" is declared, several outputs are those of classes.

    Raises:
      ValueError: an unknown "problem_type", or a single class.
    """
    if (count := label_count(module)) is None:
        return "gaussian"
    problem = getattr(module.config, "problem_type", None)  # pyright: ignore[reportAttributeAccessIssue]
    if problem is None:
        return "categorical" if count > 1 else "gaussian"
    kind = PROBLEMS[check_name("problem_type", problem, PROBLEMS)]
    if kind == "categorical" and count == 1:
        raise ValueError(f"problem_type: got {problem!r} with one label, whose softmax is always 1; wanted two or more")
    return kind
