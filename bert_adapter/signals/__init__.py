"""What the solver is to count an error in each entry of a kernel by, from what was measured."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_adapter.importance.gradients import Gradients
from bert_adapter.importance.measure import eigenbases, measure_importance
from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.signals.diagonal import diagonal, in_eigenbasis, row
from bert_adapter.signals.kfac import activation, kronecker
from bert_adapter.signals.marginals import shampoo
from bert_adapter.signals.reliability import gram_reliability, reliability
from bert_adapter.signals.signal import Evidence, Signal
from wlra.checks import check_name

SIGNALS: dict[str, Signal] = {
    "shampoo": Signal(("row_gram", "col_gram", "gram_squares"), shampoo, "kronecker"),
    "eigenbasis": Signal(("inputs", "outputs"), in_eigenbasis, "anderson", rotated=True),
    "fisher": Signal(("fisher",), diagonal, "anderson"),
    "exact": Signal(("fisher",), diagonal, "anderson"),
    "kronecker": Signal(("inputs", "outputs"), kronecker, "kronecker", per_token=True),
    "activation": Signal(("inputs",), activation, "kronecker", per_token=True),
    "row": Signal(("rows",), row, "fwsvd"),
    "none": Signal((), lambda *_: None, "svd"),
}


def solver_weights(
    importance: Importance | None, signal: str, shapes: Mapping[str, tuple[int, int]], shrink: float | None = None
) -> dict[str, Any]:
    """By path, the weights that the signal makes of what was measured, as far drawn towards what is simpler.

    shrink: the share of weights per entry that is their separable fit, of Gram matrices that is the identity. If None,
    as far as they are noise, kernel by kernel: 1 - reliability. What has no known reliability is left as it is.

    Raises:
      ValueError: the signal needs what was not measured.
    """
    check_name("importance", signal, SIGNALS)
    chosen, weights = SIGNALS[signal], {}
    needed = (*chosen.statistics, *(("fisher",) if chosen.rotated else ()))
    for path, shape in shapes.items():
        evidence = evidence_of(importance, path, shape)
        if missing := [name for name in needed if getattr(evidence.sums, name) is None]:
            raise ValueError(f"importance {signal!r} needs {missing} of {path}, which were not measured")
        if "fisher" in needed and chosen.rotated != (evidence.basis is not None):
            where = "in the eigenbasis" if chosen.rotated else "of the kernel's own entries"
            raise ValueError(f"importance {signal!r} wants the Fisher information {where}; got the other")
        weights[path] = chosen.weights(evidence, shrink)
    return weights


def evidence_of(importance: Importance | None, path: str, shape: tuple[int, int]) -> Evidence:
    """What is known of a kernel; nothing if it was not measured."""
    if importance is None:
        return Evidence(Sums(), None, 0, shape)
    return Evidence(importance.sums.get(path, Sums()), importance.bases.get(path), importance.examples, shape)


def reliabilities(
    importance: Importance | None, signal: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """By path, that of the signal's weights of entries, or of the worse of its Gram matrices; empty if it has none."""
    chosen, found = SIGNALS[signal], {}
    for path, shape in shapes.items():
        evidence = evidence_of(importance, path, shape)
        if "gram_squares" in chosen.statistics:
            found[path] = min(gram_reliability(evidence))
        elif evidence.sums.fisher is not None and (chosen.rotated or "fisher" in chosen.statistics):
            found[path] = reliability(evidence.sums.fisher)
    return found


def measure_signal(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    signal: str,
    *,
    loss: Gradients = "gaussian",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """What the signal needs to know of the kernels, from one pass over the batches, or two for an eigenbasis.

    Args are those of `measure_importance`. With a file, each of two passes has its own: the first one's has the suffix
    ".factors".
    """
    check_name("importance", signal, SIGNALS)
    chosen, batches, paths = SIGNALS[signal], list(batches), list(paths)
    common: dict[str, Any] = {"loss": loss, "seed": seed, "progress": progress}
    if not chosen.rotated:
        return measure_importance(forward, params, batches, paths, statistics=chosen.statistics, file=file, **common)
    beside = None if file is None else f"{file}.factors"
    factors = measure_importance(forward, params, batches, paths, statistics=chosen.statistics, file=beside, **common)
    bases = eigenbases(factors)
    turned = measure_importance(
        forward, params, batches, paths, statistics=("fisher",), bases=bases, file=file, **common
    )
    both = {path: sums._replace(fisher=turned[path].fisher) for path, sums in factors.sums.items()}
    return replace(turned, sums=both)
