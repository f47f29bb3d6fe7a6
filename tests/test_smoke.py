"""The adapter from end to end, with any supported transformers: load, tokenize, compress, run, save, load, run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bert_adapter
from bert_adapter.families import module_for

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "dog", "runs", "far", "."]
FILES = {
    "vocab.txt": "\n".join(WORDS).encode(),
    "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer", "do_lower_case": true}',
}


def test_checkpoint_is_loaded_compressed_run_saved_loaded_and_run_again(tmp_path):
    module, rng = module_for(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    bert_adapter.save(bert_adapter.Model(module, params, CONFIG, FILES), tmp_path / "dense")

    dense = bert_adapter.load(tmp_path / "dense")
    texts = bert_adapter.text_batches(dense, ["A red fox runs.", "far"])
    # Separable alone: as its own method it needs no compiled loop.
    options: Any = {"method": "separable", "signal": "exact"}
    small, report = bert_adapter.compress(dense, texts, rank=4, include="bert/.*/attention/", **options)
    logits = bert_adapter.apply(small.module, small.params, **texts[0])
    bert_adapter.save(small, tmp_path / "small")
    again = bert_adapter.load(tmp_path / "small")

    assert texts[0]["input_ids"][0, :7].tolist() == [2, 5, 6, 7, 9, 11, 3]
    assert (report.parameters_before, report.parameters_after) == (4 * 16 * 16, 4 * 4 * (16 + 16))
    np.testing.assert_array_equal(bert_adapter.apply(again.module, again.params, **texts[0]), logits)
