"""How near a compressed sentence embedder stays to the dense one, on texts of one's own."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from bert_adapter.capture import Batch
from bert_adapter.checkpoint import Model, Texts, tokenizer
from bert_adapter.compress import forward
from bert_adapter.finetune import distillation
from bert_adapter.importance import Loss


class Fidelity(NamedTuple):
    """cosine: the mean cosine of each text's embedding to its dense one. spearman: the rank correlation of the cosines
    of all pairs of texts with those of the dense embeddings. Both are 1 for a perfect copy."""

    cosine: float
    spearman: float


def embed(model: Model, texts: Texts, batch_size: int = 32, max_length: int = 128) -> np.ndarray:
    """Row i is the embedding of text i, of length one; (texts, width)."""
    encode, run = tokenizer(model, max_length), jax.jit(forward(model))
    params = jax.device_put(model.params)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[np.ndarray | None] = [None] * len(texts)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        # The last batch is filled up, so that it has the shape of the others.
        filled = chosen + [chosen[0]] * (min(batch_size, len(texts)) - len(chosen))
        outputs = np.asarray(run(params, encode([texts[i] for i in filled])))  # pyright: ignore[reportArgumentType]
        for i, row in zip(chosen, outputs, strict=False):
            rows[i] = row
    return np.stack([row for row in rows if row is not None])


def compare(dense: np.ndarray, other: np.ndarray) -> Fidelity:
    """The fidelity of embeddings to the dense ones of the same texts, both with rows of length one."""
    pairs = np.triu_indices(len(dense), 1)
    return Fidelity(
        cosine=float(np.mean(np.sum(dense * other, axis=1))),
        spearman=spearman((dense @ dense.T)[pairs], (other @ other.T)[pairs]),
    )


def loss_increase(dense: Model, small: Model, batches: Iterable[Batch], loss: Loss | None = None) -> float:
    """How much higher the small model's mean loss is: what `plan` predicts, measured on rows of one's own.

    (output, batch) -> (batch,) is the loss of labelled rows. If None, it is the expected one if labels were drawn from
    what the dense model predicts: between classes, the divergence of the predictions; else half the squared distance
    of the outputs. "weights", if a batch has any, weigh its examples.
    """
    runs = [(jax.jit(forward(model)), jax.device_put(model.params)) for model in (dense, small)]
    apart = distillation(dense.module, temperature=1.0)
    total = count = 0.0
    for batch in batches:
        before, after = (run(params, batch) for run, params in runs)
        each = apart(after, before) if loss is None else loss(after, batch) - loss(before, batch)
        weights = np.asarray(batch.get("weights", np.ones(len(each))), float)
        total, count = total + float(np.sum(weights * np.asarray(each))), count + float(np.sum(weights))
    if not count:
        raise ValueError("no batches: wanted at least one to measure the loss on")
    return total / count


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank, from 0; equal values have the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]
