"""What cutting kernels is predicted to lose, corrected by what the cuts of a plan are measured to lose.

A prediction is of second order, around the dense model, and takes what kernels lose to add up. How far it is off
depends on the kind of kernel and on how far it is cut: most for queries and keys, which a softmax follows, and for
feed-forward kernels of classifiers (benchmarks/corrected.py).
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from bert_adapter.decompositions import Decompositions, check_of, predicted_losses
from bert_adapter.evaluate import increases
from bert_adapter.head_sizes import Pair, identities_in, pairs_of
from bert_adapter.importance.fingerprint import of_arrays
from bert_adapter.kernels import break_even
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.integers import check_floats
from bert_adapter.layers.places import kernel_path, kind_of
from bert_adapter.layers.stacks import restacked, unstacked
from bert_adapter.model import Model
from bert_adapter.progress import track
from bert_adapter.ranks import Budget, Plan, Unit, budget_of, plan_for
from bert_adapter.values import check_arrays
from wlra.components import cut

ROUNDS = 2  # plans, each of whose cuts are measured; a third changes little
MILD = 0.75  # of the numbers of a kernel, to which one that the plan leaves whole is cut
STEPS = 8192  # tokens, or rows of other inputs, on which that is measured
LOOSE = 0.5  # a relative standard error above it is that of few texts, one of which may lose nine tenths of all
FIRM = 1e-5  # of what kernels of zero would lose by prediction: less is not told from rounding errors


def corrected(
    model: Model,
    known: Decompositions,
    batches: Iterable[Batch],
    budget: float,
    *,
    of: Unit = "kernels",
    flops: float | None = None,
    multiple_of: int = 1,
    progress: bool = True,
) -> Decompositions:
    """The decompositions with predicted losses that fit what is measured, for plans of about this budget.

    All kernels of a kind, of one shape and with paths that differ in numbers alone, are cut together as the budget's
    plan cuts them, and the others left whole. By how much the loss rises then, over what was predicted, is what
    predictions for each of them are multiplied by. That is done twice, the second time for the plan that the first
    led to. No labels are needed: the loss is that of `loss_increase`. It takes two passes over a few thousand tokens
    for a kind, each time.

    Args:
      model: the one that was decomposed, with what `with_identities` gave it, if that was.
      known: what `decompose` returned, for a signal in units of the loss.
      batches: other texts like those to come, for what was measured fits its own texts better than others; the first
        few thousand tokens are used. Where a few of the texts lose nearly all, as those that a classifier is unsure of,
        a warning says that more are wanted, and predictions are corrected no further.
      budget, of, flops, multiple_of: as in `plan`, and as they will be there.
      progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: decompositions of another model, of a signal in units of its own, or without components; no batches,
        or those that the importance was measured on; a budget that cannot be.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = sample_model()
      >>> batches = bert_adapter.text_batches(model, ["a red fox runs", "a dog", "it runs far"])
      >>> kernels, run = bert_adapter.select_kernels(model), bert_adapter.forward(model)
      >>> importance = bert_adapter.measure_signal(run, model.params, batches, kernels)
      >>> others = bert_adapter.text_batches(model, ["a dog runs", "it runs from a fox", "a red dog"] * 4)
      >>> known = bert_adapter.decompose(model.params, importance)
      >>> fixed = bert_adapter.corrected(model, known, others, budget=0.5)
      >>> bert_adapter.plan(model.params, fixed, budget=0.5).predicted > 0
      True
    """
    wanted = budget_of(budget, of, flops=flops, multiple_of=multiple_of)
    return corrected_for(model, known, batches, budget=wanted, progress=progress)


def corrected_for(
    model: Model, known: Decompositions, batches: Iterable[Batch], *, budget: Budget, progress: bool
) -> Decompositions:
    """The same for a budget that is known to be one."""
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
    probed = getattr(getattr(model.module, "config", None), "identities", False)
    pairs = pairs_of(model, known.shapes) if probed else []
    params, kinds, found = without_identities(model.params, pairs), kinds_of(known), known
    for number in range(ROUNDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plan that counts is still to come
            ranks = cuts(plan_for(params, found, budget, pairs), known.shapes, pairs)
        factors: dict[str, float] = {}
        for paths in track(kinds, f"correct, {number + 1} of {ROUNDS}", progress):
            off = off_by(model, known, {path: ranks[path] for path in paths}, few)
            if off.error > LOOSE:
                warn_of_few(kind_of(paths[0]), off)
                return found
            factors |= dict.fromkeys(paths, off.factor)
        examples = {path: count / factors.get(path, 1.0) for path, count in known.examples.items()}
        found = known._replace(examples=examples)
    return found


def warn_of_few(kind: str, off: "Off") -> None:
    """A few texts say what cuts lose: by others it may be a tenth of that, or ten times as much."""
    warnings.warn(
        f"correct: got too few texts: what cuts of {kind} are measured to lose has a relative standard "
        f"error of {off.error:.3g}, wanted {LOOSE} at most: predictions are corrected no further",
        stacklevel=4,
    )


def kinds_of(known: Decompositions) -> list[list[str]]:
    """The paths of each kind of kernel."""
    kinds: dict[Any, list[str]] = {}
    for path in known.kernels:
        kinds.setdefault((kind_of(path), known.shapes[path]), []).append(path)
    return list(kinds.values())


def without_identities(params: Any, pairs: Sequence[Pair]) -> Any:
    """The parameters of the model itself."""
    flat, identities = flatten_dict(params, keep_empty_nodes=True, sep="/"), identities_in(pairs)
    return unflatten_dict(
        {path: leaf for path, leaf in flat.items() if path.removesuffix("/kernel") not in identities}, sep="/"
    )


def cuts(planned: Plan, shapes: Mapping[str, tuple[int, int]], pairs: Sequence[Pair]) -> dict[str, int]:
    """The ranks that a plan cuts kernels to; of those that it leaves whole, a mild cut.

    Of a pair, the kernels and the identities between them are cut to as large a share, whichever of them is planned.
    """
    shares = {path: min(MILD, rank / break_even(shapes[path])) for path, rank in planned.ranks.items()}
    for pair in pairs:
        size = planned.heads.get(pair.kernels[0])
        share = float(np.mean([shares[path] for path in pair.kernels])) if size is None else size / pair.size
        shares |= dict.fromkeys(pair.identities, min(MILD, share))
        shares |= dict.fromkeys(pair.kernels, min(MILD, share)) if size is not None else {}
    sizes = {path: shapes[path][0] for pair in pairs for path in pair.identities}
    return {path: max(1, round(share * sizes.get(path, break_even(shapes[path])))) for path, share in shares.items()}


def first_of(batches: Iterable[Batch]) -> list[Batch]:
    """As many of the batches as hold STEPS tokens, one at least."""
    found, count = [], 0
    for number, batch in enumerate(batches):
        check_arrays(batch, number)
        found.append(batch)
        count += math.prod(np.shape(next(iter(batch.values())))[:2])
        if count >= STEPS:
            break
    if not found:
        raise ValueError("batches: got none, wanted texts on which losses are measured")
    return found


class Off(NamedTuple):
    """What is measured over what is predicted, and the relative standard error of the mean over texts."""

    factor: float = 1.0
    error: float = 0.0


def off_by(model: Model, known: Decompositions, ranks: Mapping[str, int], batches: list[Batch]) -> Off:
    """How far predictions are off for kernels that are cut together; not at all where nothing can be told."""
    flat: dict[str, Any] = dict(flatten_dict(unstacked(model.params, ranks), keep_empty_nodes=True, sep="/"))
    predicted = whole = 0.0
    for path, rank in ranks.items():
        place = kernel_path(flat, path)
        losses = predicted_losses(known.squares[path]) / known.examples[path]
        left, right = cut(known.kernels[path], rank)
        flat[place] = (left @ right).reshape(flat[place].shape).astype(flat[place].dtype)
        predicted, whole = predicted + float(losses[rank]), whole + float(losses[0])
    if not predicted > FIRM * whole:
        return Off()
    small = model._replace(params=restacked(unflatten_dict(flat, sep="/")))
    weights, each = increases(model, small, batches, progress=False)
    measured, error = mean_of(weights / weights.sum(), each)
    return Off(measured / predicted, error / measured) if measured > 0 else Off()


def mean_of(shares: Float[np.ndarray, " rows"], each: Float[np.ndarray, " rows"]) -> tuple[float, float]:
    """The mean of rows by their shares, and its standard error; infinite for one row."""
    mean, count = float(np.sum(shares * each)), np.count_nonzero(shares)
    spread = float(np.sqrt(np.sum(np.square(shares * (each - mean)))))
    return mean, spread * math.sqrt(count / (count - 1)) if count > 1 else math.inf
