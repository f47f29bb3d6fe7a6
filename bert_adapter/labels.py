"""Labels as a model's head takes them: one door for training, for scores and for files."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from bert_adapter.families import label_count, predictive
from bert_adapter.heads import with_head
from bert_adapter.model import Model

Place = Callable[[int], str]  # what an error calls a row, by its number


def row_number(row: int) -> str:
    """What a row is called that comes from no file."""
    return f"row {row}, counted from 0"


def as_labels(model: Model, labels: Any, place: Place = row_number) -> Num[np.ndarray, "rows *width"]:
    """The labels as the model's head takes them.

    Classes are int32 numbers 0, 1, ..., given as such or by the names in the config. Values are float32. A
    head of several labels at once takes rows of 0 and 1 as wide as it is, one of several values rows of values. For a
    model without a head all finite numbers will do, and integers stay int32.

    Args:
      labels: one for each row: a list, an array, a pandas Series, or what can be iterated.
      place: (number of a row) -> what an error calls it.

    Raises:
      ValueError: a label that is missing, not finite, or none of the head's. The message names the row.
    """
    count, kind = label_count(model.module) or 0, predictive(model.module)
    several = kind == "bernoulli" or (count > 1 and kind == "gaussian")
    names = class_names(model.config) if kind == "categorical" else {}
    given = with_width(as_array(labels), count if several else None)
    numbers = as_numbers(given, names)
    if kind == "categorical":
        hint = f", or one of {', '.join(map(repr, names))}" if names else ""
        known = (numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < count)
        check_all(known, given, place, f"a class of the head, 0 to {count - 1}{hint}")
        return numbers.astype(np.int32)
    if kind == "bernoulli":
        check_all((numbers == 0) | (numbers == 1), given, place, f"0 or 1 for each of the head's {count} labels")
    check_all(np.abs(numbers) <= np.finfo(np.float32).max, given, place, "a finite number")
    return numbers.astype(np.int32 if not count and given.dtype.kind in "biu" else np.float32)


def with_head_for(model: Model, labels: np.ndarray, *, seed: int = 0) -> Model:
    """The model, with a new head for the labels if it has none: for their classes, or for the value of a regression.

    Args:
      labels: integers are classes, and so are names, in their alphabetical order; numbers with a fraction are values.

    Raises:
      ValueError: labels that leave open how many classes there are.
    """
    if label_count(model.module) is not None:
        return model
    if labels.dtype.kind == "f":
        return with_head(model, 1, seed=seed)
    names = sorted(set(labels.tolist()))
    if len(names) < 2 and names != [-1]:  # which is refused as a label, with its row
        raise ValueError(f"labels: all are {names[0]!r}, wanted two classes or more; values are written as 0.0")
    if labels.dtype.kind == "U":
        numbers = {name: number for number, name in enumerate(names)}
        headed = with_head(model, len(names), seed=seed)
        known = {"label2id": numbers, "id2label": {str(number): name for name, number in numbers.items()}}
        return headed._replace(config=headed.config | known)
    if (count := max(2, names[-1] + 1)) > max(2, len(labels)):
        raise ValueError(f"labels: got the class {names[-1]} in {len(labels)} rows; values are written as 0.0")
    return with_head(model, count, seed=seed)


def class_names(config: Mapping[str, Any]) -> dict[str, int]:
    """The classes by their names, as "id2label" and "label2id" have them; what names two classes names none."""
    pairs = {(str(name), int(number)) for number, name in (config.get("id2label") or {}).items()}
    pairs |= {(str(name), int(number)) for name, number in (config.get("label2id") or {}).items() if number is not None}
    uses = Counter(name for name, _ in pairs)
    return {name: number for name, number in sorted(pairs, key=lambda pair: pair[::-1]) if uses[name] == 1}


def as_array(labels: Any) -> np.ndarray:
    """The labels as they are, in an array: of objects, unless they are in an array already."""
    if isinstance(labels, str | bytes | Mapping | set) or not isinstance(labels, Iterable):
        raise ValueError(f"labels: got {type(labels).__name__}, wanted one for each row, as a list or an array")
    if isinstance(labels, np.ma.MaskedArray):
        return np.where(np.ma.getmaskarray(labels), None, labels.astype(object).data)  # pyright: ignore
    found: Any = labels
    found = found.to_numpy() if hasattr(found, "to_numpy") else found
    return np.asarray(found) if hasattr(found, "__array__") else np.array(list(found), object)


def with_width(labels: np.ndarray, width: int | None) -> np.ndarray:
    """One label for each row, or so many."""
    if width is None and labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    if width == 1 and labels.ndim == 1:
        return labels[:, None]
    if labels.shape[1:] != (() if width is None else (width,)) or not labels.ndim:
        one = 'one label for each row; "problem_type": "multi_label_classification" in config.json declares several'
        wanted = one if width is None else f"{width} labels for each row"
        raise ValueError(f"labels: got shape {labels.shape}, wanted {wanted}")
    return labels


def as_numbers(labels: np.ndarray, names: Mapping[str, int]) -> Num[np.ndarray, "rows *width"]:
    """The labels in float64; NaN for what is neither a number nor a name."""
    if labels.dtype.kind in "biuf":
        return labels.astype(np.float64)
    numbers = [as_number(label, names) for label in labels.reshape(-1)]
    return np.array(numbers, np.float64).reshape(labels.shape)


def as_number(label: Any, names: Mapping[str, int]) -> float:
    """The number that a label is or names, or NaN."""
    if isinstance(label, str):
        return float(names.get(label, np.nan))
    if isinstance(label, bytes | complex | np.complexfloating):
        return np.nan
    try:
        return float(label)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def check_all(good: Bool[np.ndarray, "rows *width"], given: np.ndarray, place: Place, wanted: str) -> None:
    """A ValueError that names the first row with a label that is not good."""
    bad = np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))
    if len(bad):
        label = given[bad[0]]
        shown = label.tolist() if isinstance(label, np.ndarray | np.generic) else label
        why = " (-1 marks rows whose labels are withheld, as in GLUE's test files)" if shown in (-1, [-1]) else ""
        raise ValueError(f"{place(int(bad[0]))}: got the label {shown!r}, wanted {wanted}{why}")
