"""What a signal makes of a measurement: weights for the solver, and how far they can be trusted."""

from collections.abc import Mapping
from typing import Any

from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.signals import as_signal
from bert_adapter.signals.definition import Evidence, Signal


def solver_weights(
    importance: Importance | None,
    signal: str | Signal,
    shapes: Mapping[str, tuple[int, int]],
    shrink: float | None = None,
) -> dict[str, Any]:
    """By path, the weights that the signal makes of what was measured, shrunk towards what is simpler.

    shrink: the share of weights per entry that is their separable fit, of Gram matrices that is the identity. If None,
    as far as they are noise, kernel by kernel: 1 - reliability. What has no known reliability is left as it is.

    Raises:
      ValueError: the signal needs what was not measured.
    """
    chosen = as_signal(signal)
    evidence = {path: evidence_for(importance, chosen, path, shape) for path, shape in shapes.items()}
    return {path: chosen.weights(known, shrink) for path, known in evidence.items()}


def evidence_for(importance: Importance | None, signal: Signal, path: str, shape: tuple[int, int]) -> Evidence:
    """What is known of a kernel, with all that the signal needs."""
    evidence = evidence_of(importance, path, shape)
    if missing := [name for name in signal.statistics if getattr(evidence.sums, name) is None]:
        raise ValueError(
            f"signal {signal.name!r} needs {missing} of {path}, which were not measured: "
            f"measure_signal(..., signal={signal.name!r}) does"
        )
    return evidence


def evidence_of(importance: Importance | None, path: str, shape: tuple[int, int]) -> Evidence:
    """What is known of a kernel; nothing if it was not measured."""
    if importance is None:
        return Evidence(Sums(), 0, shape)
    return Evidence(importance.sums.get(path, Sums()), importance.examples, shape)


def reliabilities(
    importance: Importance | None, signal: str | Signal, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """By path, how reliable the signal is; empty where it cannot tell."""
    reliability = as_signal(signal).reliability
    if reliability is None:
        return {}
    return {path: reliability(evidence_of(importance, path, shape)) for path, shape in shapes.items()}
