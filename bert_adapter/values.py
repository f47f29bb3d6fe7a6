"""Values of a batch that a model has no meaning for, found before they run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer


def check_values(sizes: Mapping[str, int], batch: Mapping[str, Any]) -> None:
    """A ValueError names the first value outside 0 ... size - 1, where values are known: under jit they are not.

    sizes: by the names of inputs, how many values these may have.
    """
    for name, size in sizes.items():
        values = batch.get(name)
        if values is None or isinstance(values, Tracer):
            continue
        array = np.asarray(values)
        whole = array == np.floor(array) if array.dtype.kind == "f" else True
        wrong = np.argwhere(~((array >= 0) & (array < size) & whole))
        if len(wrong):
            row, *place = (int(i) for i in wrong[0])
            choice = f", choice {place[0]}" if place[1:] else ""
            token = f"{choice}, token {place[-1]}" if place else ""
            got = array[tuple(wrong[0])].item()
            raise ValueError(f"{name}: got {got} in row {row}{token}, wanted 0 to {size - 1}: the model knows no other")


def check_arrays(batch: Any, number: int) -> None:
    """A ValueError unless the batch is a mapping of arrays, each of which has a row for each of its examples."""
    where = f"batch {number}"
    if not isinstance(batch, Mapping) or not batch:
        got = f"{batch!r:.40}" if isinstance(batch, str | Mapping) else type(batch).__name__
        made = "calibration_batches(model, texts) makes some of texts"
        raise ValueError(f"{where}: got {got}, wanted a mapping of arrays, in a list even if it is one: {made}")
    for name, array in batch.items():
        if not hasattr(array, "shape"):
            raise ValueError(f"{where}, {name!r}: got {type(array).__name__}, wanted an array: np.asarray(...)")
    rows = {name: array.shape[0] if array.shape else 0 for name, array in batch.items()}
    first, count = next(iter(rows.items()))
    if odd := [name for name in rows if rows[name] != count or not count]:
        shared = "what all examples share belongs into forward="
        wanted = f"{count or 'some'}, one for each example, as in {first!r}"
        raise ValueError(f"{where}, {odd[0]!r}: got {rows[odd[0]]} rows, wanted {wanted}; {shared}")


def check_listed(**lists: Any) -> None:
    """A ValueError for what is no list of batches, by its name; of an iterator, each is checked when it comes."""
    for name, batches in lists.items():
        try:
            for number, batch in enumerate(batches if isinstance(batches, Sequence | Mapping) else ()):
                check_arrays(batch, number)
        except ValueError as error:
            raise ValueError(str(error) if name == "batches" else f"{name}: {error}") from None


def check_finite(output: Any, number: int, whose: str = "the model") -> None:
    """A FloatingPointError names the batch and the first row where an output is NaN or infinite."""
    array = np.asarray(output)
    finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if not finite.all():
        row, count = int(np.argmin(finite)), int((~finite).sum())
        raise FloatingPointError(
            f"batch {number}: the output of {whose} is NaN or infinite in {count} of {len(array)} rows, first in row "
            f"{row}: look at its parameters, or compute in float32"
        )
