"""A BERT small enough to try things on."""

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
EMBEDDER = {  # what declares the mean of a text's tokens, scaled to length one
    "modules.json": modules_file([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]),
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
}


def files_of(config: dict[str, Any]) -> dict[str, bytes]:
    """A tokenizer, and an embedder's declarations if the config is one's."""
    return FILES | (EMBEDDER if config["architectures"] == ["BertModel"] else {})


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
