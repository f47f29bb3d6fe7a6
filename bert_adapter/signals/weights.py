"""What a signal makes of a measurement: weights for the solver, and how far they can be trusted."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bert_adapter.importance.sums import OF_TABLES, Importance, Sums, named
from bert_adapter.importance.through import Through, of_kernel
from bert_adapter.signals import SIGNALS, as_signal
from bert_adapter.signals.definition import Evidence, Signal, TableWeights


def solver_weights(
    importance: Importance | None,
    signal: str | Signal,
    shapes: Mapping[str, tuple[int, int]],
    shrink: float | None = None,
) -> Mapping[str, Any]:
    """By path, the weights that the signal makes of what was measured, shrunk towards what is simpler.

    They are made when asked for, again each time, so that those of one kernel are held at a time.

    shrink: the share of weights per entry that is their separable fit, of Gram matrices that is the identity. If None,
    as far as they are noise, kernel by kernel: 1 - reliability. What has no known reliability is left as it is.

    Raises:
      ValueError: the signal needs what was not measured, or not whole.
    """
    chosen = as_signal(signal)
    for path in shapes:
        check_measured(importance, chosen, path)
        check_whole(importance, chosen, path, "weights for the solver are")
    return Made(shapes, lambda path: chosen.weights(evidence_of(importance, path, shapes[path]), shrink))


def table_weights(evidence: Evidence, signal: Signal, path: str, shrink: float | None) -> TableWeights:
    """What the signal weighs errors in a table by, of which it has what the signal needs.

    Raises:
      ValueError: the signal has no weights for tables.
    """
    if signal.tables is None:
        raise ValueError(no_tables(signal, path))
    return signal.tables(evidence, shrink)


def no_tables(signal: Signal, path: str) -> str:
    """What is wrong with a signal that has no weights for a table."""
    known = ", ".join(repr(name) for name, one in SIGNALS.items() if one.tables is not None)
    return f"{path}: signal {signal.name!r} has no weights for a table, wanted one of {known}, or exclude it"


class Made(Mapping):
    """What `make` makes of each name, when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Any]) -> None:
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_measured(importance: Importance | None, signal: Signal, path: str) -> None:
    """A ValueError if something that the signal needs was not measured of a kernel."""
    held = held_of(importance, path).keys()
    if missing := [name for name in signal.statistics if not held & {name, OF_TABLES.get(name)}]:
        raise ValueError(
            f"signal {signal.name!r} needs {missing} of {path}, which were not measured: "
            f"measure_signal(..., signal={signal.name!r}) does"
        )


def check_counts(evidence: Evidence, signal: Signal, path: str) -> None:
    """A ValueError if no error in a kernel counts, so that weights of the signal's are zero."""
    held = dict(named(evidence.sums))
    grams = [held[name] for name in signal.statistics if name in held]
    if not all(any(map(np.any, jax.tree.leaves(gram))) for gram in grams):
        raise ValueError(
            f"{path}: got a kernel whose inputs or gradients are zero on all batches, so that no error in it counts: "
            f"exclude={re.escape(path)!r} keeps it dense"
        )


def check_whole(importance: Importance | None, signal: Signal, path: str, wanted: str) -> None:
    """A ValueError if what the signal needs of a kernel was measured `Through` it, which is not what is wanted."""
    sums = held_of(importance, path)
    if held := [name for name in signal.statistics if isinstance(sums.get(name), Through)]:
        raise ValueError(
            f"{wanted} of whole matrices; got {held} of {path} as the kernel passes them on: "
            f"measure_signal(..., whole=True) has them whole"
        )


def held_of(importance: Importance | None, path: str) -> dict[str, Any]:
    """By name, what was measured of a kernel, as it is held."""
    return {} if importance is None else dict(named(importance.sums.get(path, Sums())))


def evidence_of(importance: Importance | None, path: str, shape: tuple[int, int], kernel: Any = None) -> Evidence:
    """What is known of a kernel; nothing if it was not measured."""
    if importance is None:
        return Evidence(Sums(), 0, shape)
    sums = importance[path] if path in importance.sums else Sums()
    known = {name: of_kernel(found, kernel, shape) for name, found in named(sums) if isinstance(found, Through)}
    return Evidence(sums._replace(**known), importance.examples, shape, importance.effective)
