"""What cutting kernels is predicted to lose, corrected by what cutting all kernels of a kind is measured to lose.

A prediction is of second order, around the dense model, and takes what kernels lose to add up. How far it is off
depends on the kind of kernel: most for queries and keys, which a softmax follows (benchmarks/corrected.py).
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.decompositions import Decompositions, check_of, is_identity, predicted_losses
from bert_adapter.evaluate import loss_increase
from bert_adapter.importance.fingerprint import of_arrays
from bert_adapter.kernels import break_even
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.integers import check_floats
from bert_adapter.layers.places import kernel_path
from bert_adapter.layers.stacks import restacked, unstacked
from bert_adapter.model import Model
from bert_adapter.progress import track
from wlra.components import cut

SHARE = 0.25  # of the numbers of a kernel, to which those of a kind are cut together
STEPS = 8192  # tokens, or rows of other inputs, on which that is measured
FIRM = 1e-3  # of what kernels of zero would lose by prediction: less is not told from rounding errors


def corrected(
    model: Model, known: Decompositions, batches: Iterable[Batch], *, progress: bool = True
) -> Decompositions:
    """The decompositions with predicted losses that fit what is measured, for plans of any budget.

    All kernels of a kind, of one shape and with paths that differ in numbers alone, are cut to a quarter together. By
    how much the loss rises then, over what was predicted, is what predictions for each of them are multiplied by. No
    labels are needed: the loss is that of `loss_increase`. It takes two passes over a few thousand tokens for a kind.

    Args:
      model: the one that was decomposed, with what `with_identities` gave it, if that was.
      known: what `decompose` returned, for a signal in units of the loss.
      batches: other texts like those to come, for what was measured fits its own texts better than others; the first
        few thousand tokens are used.
      progress: whether there is a bar on a terminal.

    Raises:
      ValueError: decompositions of another model, of a signal in units of its own, or without components; no batches,
        or those that the importance was measured on.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = sample_model()
      >>> batches = bert_adapter.text_batches(model, ["a red fox runs", "a dog", "it runs far"])
      >>> kernels, run = bert_adapter.select_kernels(model), bert_adapter.forward(model)
      >>> importance = bert_adapter.measure_signal(run, model.params, batches, kernels)
      >>> others = bert_adapter.text_batches(model, ["a dog runs", "it runs from a fox"])
      >>> known = bert_adapter.corrected(model, bert_adapter.decompose(model.params, importance), others)
      >>> bert_adapter.plan(model.params, known, budget=0.5).predicted > 0
      True
    """
    check_floats(model.params, "model")
    check_of(known, model.params)
    if known.signal.units != "loss":
        raise ValueError(f"known: got signal {known.signal.name!r}, in units of its own, wanted one of the loss")
    if without := [path for path, each in known.kernels.items() if each.left is None]:
        raise ValueError(f"known: got no components of {without[0]}, wanted what the signal's closed form makes")
    few = first_of(batches)
    if known.measured is not None and set(map(of_arrays, few)) & set(known.measured.texts):
        raise ValueError(
            "batches: got some that importance was measured on, wanted other texts, which it fits no better"
        )
    kinds: dict[Any, list[str]] = {}
    for path in known.kernels:
        kinds.setdefault((re.sub(r"\d+", "#", path), known.shapes[path]), []).append(path)
    factors: dict[str, float] = {}
    for paths in track(list(kinds.values()), "correct", progress):
        factors |= dict.fromkeys(paths, off_by(model, known, paths, few))
    return known._replace(examples={path: count / factors.get(path, 1.0) for path, count in known.examples.items()})


def first_of(batches: Iterable[Batch]) -> list[Batch]:
    """As many of the batches as hold STEPS tokens, one at least."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += math.prod(np.shape(next(iter(batch.values())))[:2])
        if count >= STEPS:
            break
    if not found:
        raise ValueError("batches: got none, wanted texts on which losses are measured")
    return found


def off_by(model: Model, known: Decompositions, paths: list[str], batches: list[Batch]) -> float:
    """What is measured, over what is predicted, for kernels that are cut together; 1 where nothing can be told."""
    flat: dict[str, Any] = dict(flatten_dict(unstacked(model.params, paths), keep_empty_nodes=True, sep="/"))
    predicted = whole = 0.0
    for path in paths:
        place = kernel_path(flat, path)
        size = len(flat[place]) if is_identity(np.asarray(flat[place])) else break_even(known.shapes[path])
        rank = max(1, round(SHARE * size))
        losses = predicted_losses(known.squares[path]) / known.examples[path]
        left, right = cut(known.kernels[path], rank)
        flat[place] = (left @ right).reshape(flat[place].shape).astype(flat[place].dtype)
        predicted, whole = predicted + float(losses[rank]), whole + float(losses[0])
    if not predicted > FIRM * whole:
        return 1.0
    small = model._replace(params=restacked(unflatten_dict(flat, sep="/")))
    measured = loss_increase(model, small, batches, progress=False)
    return measured / predicted if measured > 0 else 1.0
