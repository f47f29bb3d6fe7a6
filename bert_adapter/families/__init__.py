"""Families of models."""

from typing import Any

import flax.linen as nn

from bert_adapter.families.bert import SentenceEmbedder, SequenceClassifier, config_from_dict

MODULES = {
    "BertModel": SentenceEmbedder,
    "BertForPreTraining": SentenceEmbedder,
    "BertForMaskedLM": SentenceEmbedder,
    "BertForSequenceClassification": SequenceClassifier,
}


def predictive(module: nn.Module) -> str:
    """The distribution that the module's output stands for: of classes, or around an embedding or a value."""
    classes = isinstance(module, SequenceClassifier) and module.config.num_labels > 1
    return "categorical" if classes else "gaussian"


def module_for(config: dict[str, Any]) -> nn.Module:
    """The module that runs the architecture which a Hugging Face config.json names.

    A model with pretraining heads counts as its encoder, whose use is to embed sentences.
    """
    architectures = config.get("architectures") or []
    known = [MODULES[name] for name in architectures if name in MODULES]
    if not known:
        raise ValueError(f"architectures: got {architectures!r}, supported: {', '.join(MODULES)}")
    return known[0](config_from_dict(config))
