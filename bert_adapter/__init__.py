"""Flax models, BERT checkpoints among them, factorised by weighted low-rank approximation."""

from bert_adapter.calibration import calibration_batches
from bert_adapter.checkpoint import load, save
from bert_adapter.compressing import Report, compress
from bert_adapter.correcting import corrected
from bert_adapter.decompositions import Decompositions, decompose
from bert_adapter.engines import ENGINES, Engine
from bert_adapter.evaluate import loss_increase, score
from bert_adapter.exporting import TARGETS, export
from bert_adapter.factorisation import KernelReport, factorise, merge
from bert_adapter.families import FAMILIES
from bert_adapter.families.family import Family
from bert_adapter.heads import with_head, without_head
from bert_adapter.healing import Healing, heal
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import Importance
from bert_adapter.kernels import choose_ranks, select_kernels
from bert_adapter.kinds import as_model, load_into, with_params
from bert_adapter.latency import Latency, measure_latency
from bert_adapter.layers import LAYERS
from bert_adapter.layers.layer import Layer
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.running import apply, factorised
from bert_adapter.model import Model, forward
from bert_adapter.outputs import OUTPUTS
from bert_adapter.pairs import with_identities
from bert_adapter.ranks import Plan, plan
from bert_adapter.reading import read_choices, read_questions, read_rows, read_texts
from bert_adapter.rows import LabelledTexts
from bert_adapter.signals import SIGNALS
from bert_adapter.signals.definition import Signal
from bert_adapter.signals.measure import measure_signal
from bert_adapter.signals.reliability import reliability
from bert_adapter.speed import Bench, bench
from bert_adapter.tagged import read_tagged
from bert_adapter.text import labelled_batches, text_batches, tokenizer
from bert_adapter.training import finetune
from bert_adapter.trimming import Trimmed, trim

__all__ = [
    "ENGINES",
    "FACTORISED",
    "FAMILIES",
    "LAYERS",
    "OUTPUTS",
    "SIGNALS",
    "TARGETS",
    "Bench",
    "Decompositions",
    "Engine",
    "Family",
    "Healing",
    "Importance",
    "KernelReport",
    "LabelledTexts",
    "Latency",
    "Layer",
    "Model",
    "Plan",
    "Report",
    "Signal",
    "Trimmed",
    "apply",
    "as_model",
    "bench",
    "calibration_batches",
    "choose_ranks",
    "compress",
    "corrected",
    "decompose",
    "export",
    "factorise",
    "factorised",
    "finetune",
    "forward",
    "heal",
    "labelled_batches",
    "load",
    "load_importance",
    "load_into",
    "loss_increase",
    "measure_importance",
    "measure_latency",
    "measure_signal",
    "merge",
    "plan",
    "read_choices",
    "read_questions",
    "read_rows",
    "read_tagged",
    "read_texts",
    "reliability",
    "save",
    "save_importance",
    "score",
    "select_kernels",
    "text_batches",
    "tokenizer",
    "trim",
    "with_head",
    "with_identities",
    "with_params",
    "without_head",
]
