"""Labels as numbers: one door for training, for scores and for files."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from bert_adapter.outputs.definition import Head
from bert_adapter.rows import NO_ROWS, Place


def labels_for(head: Head, labels: Any, place: Place) -> Num[np.ndarray, "rows *width"]:
    """One label for each row, or as many as the head has at once, as `as_labels` describes them."""
    count, kind = head.count, head.distribution
    several = kind == "bernoulli" or (count > 1 and kind == "gaussian")
    names = class_names(head.config) if kind == "categorical" else {}
    given = with_width(as_array(labels), count if several else None)
    check_not_names(given, names)
    numbers = as_numbers(given, names)
    if kind == "categorical":
        hint = f", or one of {', '.join(map(repr, names))}" if names else ""
        known = (numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < count)
        check_all(known, given, place, f"a class of the head, 0 to {count - 1}{hint}")
        return numbers.astype(np.int32)
    if kind == "bernoulli":
        check_all((numbers == 0) | (numbers == 1), given, place, f"0 or 1 for each of the head's {count} labels")
    check_all(np.abs(numbers) <= np.finfo(np.float32).max, given, place, "a finite number")
    whole = not count and given.dtype.kind in "biu" and bool(np.all(np.abs(numbers) <= np.iinfo(np.int32).max))
    return numbers.astype(np.int32 if whole else np.float32)


def class_names(config: Mapping[str, Any]) -> dict[str, int]:
    """The classes by their names, as "id2label" and "label2id" have them; what names two classes names none."""
    pairs = {(str(name), int(number)) for number, name in (config.get("id2label") or {}).items()}
    pairs |= {(str(name), int(number)) for name, number in (config.get("label2id") or {}).items() if number is not None}
    uses = Counter(name for name, _ in pairs)
    return {name: number for name, number in sorted(pairs, key=lambda pair: pair[::-1]) if uses[name] == 1}


def names_of(config: Mapping[str, Any]) -> dict[int, str]:
    """What transformers calls each class: its name in "id2label", or in "label2id" where there is no other."""
    if known := config.get("id2label"):
        return {int(number): str(name) for number, name in known.items()}
    return {int(number): str(name) for name, number in (config.get("label2id") or {}).items() if number is not None}


def as_array(labels: Any) -> np.ndarray:
    """The labels as they are, in an array: of objects, unless they are in an array already."""
    if isinstance(labels, NO_ROWS) or not isinstance(labels, Iterable):
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
        more = f"{width} labels for each row, as LabelledTexts(texts, labels) takes them: a file holds one"
        wanted = one if width is None else more
        raise ValueError(f"labels: got shape {labels.shape}, wanted {wanted}")
    return labels


def as_numbers(labels: np.ndarray, names: Mapping[str, int]) -> Num[np.ndarray, "rows *width"]:
    """The labels in float64; NaN for what is neither a number nor a name."""
    if labels.dtype.kind in "biuf":
        return labels.astype(np.float64)
    numbers = [as_number(label, names) for label in labels.reshape(-1)]
    return np.array(numbers, np.float64).reshape(labels.shape)


def check_not_names(labels: np.ndarray, names: Mapping[str, int]) -> None:
    """A ValueError for integers each of which is the name of a class too, and one of them that of another class."""
    given = labels.reshape(-1).tolist() if names else []
    if not given or not all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in given):
        return
    both = {int(label): names.get(str(label)) for label in set(given)}
    if None not in both.values() and (odd := [label for label, number in sorted(both.items()) if number != label]):
        raise ValueError(
            f"labels: got the integer {odd[0]}, a class's number, and in id2label the name of class {both[odd[0]]}: "
            f"wanted names as str, or an id2label whose names are no integers"
        )


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
        withheld = shown in (-1, [-1]) if isinstance(shown, int | float | list) else False
        why = " (-1 marks rows whose labels are withheld, as in GLUE's test files)" if withheld else ""
        raise ValueError(f"{place(int(bad[0]))}: got the label {shown!r}, wanted {wanted}{why}")
