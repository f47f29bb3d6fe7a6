"""Flax BERT checkpoints, factorised by weighted low-rank approximation."""

from bert_adapter.apply import FACTORISED, apply, factorised
from bert_adapter.checkpoint import Model, load, save, tokenizer
from bert_adapter.compress import Report, as_model, compress, forward, text_batches
from bert_adapter.factorise import factorise, merge
from bert_adapter.importance import measure_importance
from bert_adapter.select import choose_ranks, select_kernels

__all__ = [
    "FACTORISED",
    "Model",
    "Report",
    "apply",
    "as_model",
    "choose_ranks",
    "compress",
    "factorise",
    "factorised",
    "forward",
    "load",
    "measure_importance",
    "merge",
    "save",
    "select_kernels",
    "text_batches",
    "tokenizer",
]
