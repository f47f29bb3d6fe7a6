"""Families of models, by config.json's "model_type"."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn

from bert_adapter.families.bert import BERT
from bert_adapter.families.distilbert import DISTILBERT
from bert_adapter.families.electra import ELECTRA
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.modernbert import MODERNBERT
from bert_adapter.families.mpnet import MPNET
from bert_adapter.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from bert_adapter.families.sentence import MODULES, declared_stages
from bert_adapter.json_files import shown
from bert_adapter.layers.running import parameter_shapes
from bert_adapter.outputs import OUTPUTS
from bert_adapter.outputs.tokens import are_tags

FAMILIES: dict[str, Family] = {  # a config that names none is of the first
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": CAMEMBERT,
    "xlm-roberta": XLM_ROBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "mpnet": MPNET,
    "modernbert": MODERNBERT,
}

REFUSED = {  # by "model_type", why no family here can be theirs
    "albert": "its layers share one set of kernels, which no family here has; (module, params) of your own may",
}


def family_name(config: Mapping[str, Any]) -> str:
    """The "model_type" of a Hugging Face config.json; without one, the first family's."""
    name = config.get("model_type") or next(iter(FAMILIES))
    if not isinstance(name, str):
        raise ValueError(f"model_type: got {name!r}, wanted a name, supported: {', '.join(map(repr, FAMILIES))}")
    return name


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a Hugging Face config.json names."""
    name = family_name(config)
    if name not in FAMILIES:
        known, advice = ", ".join(map(repr, FAMILIES)), f"bert_adapter.FAMILIES[{name!r}] = ... adds it"
        raise ValueError(f"model_type: got {name!r}, supported: {known}; {REFUSED.get(name, advice)}")
    return FAMILIES[name]


def architectures_of(family: Family) -> dict[str, Architecture]:
    """All that the family can be, by the names of `OUTPUTS`."""
    return {"embedding": family.embedder, "labels": family.classifier, **family.heads}


def output_named(config: Mapping[str, Any]) -> str:
    """What the first known architecture that a Hugging Face config.json names is for, a name in `OUTPUTS`."""
    heads = architectures_of(family_of(config))
    known = {name: output for output, each in heads.items() for name in each.names}
    named = config.get("architectures") or []
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    found = [known[name] for name in names if isinstance(name, str) and name in known]
    if not found:
        raise ValueError(f"architectures: got {named!r}, supported: {', '.join(known)}")
    return found[0]


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The first known one that a Hugging Face config.json names."""
    return architectures_of(family_of(config))[output_named(config)]


def architecture_in(config: dict[str, Any], paths: Iterable[str], embeds: bool = False) -> Architecture:
    """The one that config.json names, or else, as in old ones, the one that the paths of the parameters show.

    That is the classifier if they hold its head, and the encoder if not: what transformers' AutoModel reads. A model
    with a pretraining head counts as its encoder where that head is not among the paths, or files declare that it
    embeds.
    """
    family, paths = family_of(config), set(paths)
    if config.get("architectures"):
        named = architecture_of(config)
        pretrained = named.names[0] in family.embedder.names
        return family.embedder if pretrained and (embeds or not holds_head(config, named, paths)) else named
    if not holds_head(config, family.classifier, paths):
        return family.embedder
    names = config.get("id2label")
    if isinstance(names, dict) and are_tags([str(name) for name in names.values()]):  # a pooler may lie beside it
        wanted = (
            f"those of the head, such as {list(family.heads['tokens'].names[:1])}"
            if "tokens" in family.heads
            else "them"
        )
        raise ValueError(f"config.json: got no 'architectures' and tags of words in 'id2label', wanted {wanted}")
    return family.classifier


def holds_head(config: dict[str, Any], architecture: Architecture, paths: Iterable[str]) -> bool:
    """Whether all that lies beside the encoder is among the paths."""
    family = family_of(config)
    params, _ = parameter_shapes(architecture.module(family.config(config)))
    head = params.keys() - {family.prefix.rstrip("/")}
    return head <= {path.split("/")[0] for path in paths}


def module_for(config: dict[str, Any], files: Mapping[str, bytes] = MappingProxyType({})) -> nn.Module:
    """The module that runs the architecture which a Hugging Face config.json names.

    For an embedder, sentence-transformers' files declare what follows the encoder; without them, it is a mean.
    """
    family, architecture = family_of(config), architecture_of(config)
    if architecture.tied and (tied := config.get("tie_word_embeddings", True)) is not True:
        raise ValueError(f"tie_word_embeddings: got {shown(tied)}, supported: true, for {architecture.names[0]}")
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
        for each in architectures_of(family).values()
        if each.flax is not None
    }


def is_known(module: Any) -> bool:
    """Whether the module is one of a family's."""
    return architecture_running(module) is not None


def architecture_running(module: Any) -> tuple[str, Architecture] | None:
    """What the module's output is for, a name in `OUTPUTS`, and its architecture; None if no family has such a one."""
    known = (item for family in FAMILIES.values() for item in architectures_of(family).items())
    return next(((output, each) for output, each in known if isinstance(module, each.module)), None)


def output_of(module: Any) -> str:
    """What the module's output is for, a name in `OUTPUTS`; an embedding if no family has such a one."""
    found = architecture_running(module)
    return "embedding" if found is None else found[0]


def label_count(module: Any) -> int | None:
    """How many numbers the module's output has for each text, token or choice; None if it is no head's."""
    found = architecture_running(module)
    return None if found is None else found[1].labels(module.config)  # pyright: ignore[reportAttributeAccessIssue]


def predictive(module: Any) -> str:
    """The distribution that the module's output stands for, a name in `DISTRIBUTIONS`.

    "gaussian": around an embedding or values. "categorical": of classes, by a softmax, for each text, each of its
    tokens, or its choices. "bernoulli": of labels at once, each by a sigmoid. "span": of an answer's first and last
    token. Where no "problem_type" is declared, several outputs for a text are those of classes.

    Raises:
      ValueError: an unknown "problem_type", or a single class.
    """
    if label_count(module) is None:
        return "gaussian"
    return OUTPUTS[output_of(module)].distribution(module.config)  # pyright: ignore[reportAttributeAccessIssue]
