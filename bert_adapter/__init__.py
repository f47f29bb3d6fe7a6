"""Flax BERT checkpoints, factorised by weighted low-rank approximation."""

from bert_adapter.apply import FACTORISED, apply, factorised
from bert_adapter.checkpoint import Model, load, save, tokenizer
from bert_adapter.compress import Report, as_model, compress, forward, text_batches
from bert_adapter.factorise import factorise, merge
from bert_adapter.fidelity import loss_increase
from bert_adapter.finetune import finetune, with_head
from bert_adapter.importance import Importance, load_importance, measure_importance, save_importance
from bert_adapter.plan import Plan, plan
from bert_adapter.rows import Rows, labelled_batches, read_rows
from bert_adapter.score import score
from bert_adapter.select import choose_ranks, select_kernels
from bert_adapter.weights import measure_signal, reliability

__all__ = [
    "FACTORISED",
    "Importance",
    "Model",
    "Plan",
    "Report",
    "Rows",
    "apply",
    "as_model",
    "choose_ranks",
    "compress",
    "factorise",
    "factorised",
    "finetune",
    "forward",
    "labelled_batches",
    "load",
    "load_importance",
    "loss_increase",
    "measure_importance",
    "measure_signal",
    "merge",
    "plan",
    "read_rows",
    "reliability",
    "save",
    "save_importance",
    "score",
    "select_kernels",
    "text_batches",
    "tokenizer",
    "with_head",
]
