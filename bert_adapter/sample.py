"""A BERT small enough to try things on."""

import json
from typing import Any

import jax
import numpy as np

from bert_adapter.families import module_for
from bert_adapter.families.sentence import modules_file
from bert_adapter.layers.running import parameter_shapes
from bert_adapter.model import Model

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "fox",
    "dog",
    "runs",
    "far",
    "from",
    "it",
    ".",
    "##s",
]
FILES = {
    "vocab.txt": "\n".join(WORDS).encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer", "do_lower_case": true}',
}
MODULES_FILE = modules_file([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])


def files_of(config: dict[str, Any]) -> dict[str, bytes]:
    """A tokenizer, and an embedder's declarations if the config is one's."""
    if config["architectures"] != ["BertModel"]:
        return dict(FILES)
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True}
    return FILES | {"modules.json": MODULES_FILE, "1_Pooling/config.json": json.dumps(pooling).encode()}


def sample_model(**entries: Any) -> Model:
    """A BERT of one layer with random parameters and a vocabulary of a dozen words; `entries` are its config's.

    Example:
        >>> from bert_adapter.sample import sample_model
        >>> sample_model(hidden_size=32).params["pooler"]["dense"]["kernel"].shape
        (32, 32)
    """
    config = CONFIG | entries
    module, rng = module_for(config, files_of(config)), np.random.default_rng(0)
    shapes, _ = parameter_shapes(module)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return Model(module, params, config, files_of(config))
