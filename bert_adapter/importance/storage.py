"""Measurements in files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bert_adapter.files import read_arrays, read_metadata, write_arrays
from bert_adapter.importance.sums import SYMMETRIC, Importance, Sums, named, packed, unpacked
from bert_adapter.importance.through import Through

SCHEMA = 6  # of the file
FIELDS = tuple(field.name for field in fields(Importance) if field.name != "sums")


def save_importance(importance: Importance, file: str | Path) -> None:
    """The file, in safetensors, holds what `load_importance` reads, or, if anything fails, what it held before.

    Of symmetric matrices it has the entries on and above the diagonal.

    Example:
      >>> import tempfile, bert_adapter
      >>> importance = bert_adapter.Importance({}, 8, 80, 1, gradients="gaussian", seed=0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bert_adapter.save_importance(importance, f"{folder}/importance.safetensors")
      ...     again = bert_adapter.load_importance(f"{folder}/importance.safetensors")
      >>> again == importance
      True
    """
    arrays = {
        f"{path}:{name}": packed(array) if is_matrix(name) else np.asarray(array)
        for path, sums in importance.sums.items()
        for name, array in chain.from_iterable(parts(*each) for each in named(sums))
    }
    known = {name: getattr(importance, name) for name in FIELDS}
    about = {"schema": SCHEMA, "paths": list(importance.sums), **known}
    write_arrays(file, arrays, {"importance": json.dumps(about)})


def load_importance(file: str | Path) -> Importance:
    """What `save_importance` wrote.

    Raises:
      ValueError: the file is no safetensors file, or holds something else.

    Example:
      >>> import tempfile, bert_adapter
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = f"{folder}/importance.safetensors"
      ...     bert_adapter.save_importance(
      ...         bert_adapter.Importance({}, 8, 80, 1, gradients="gaussian", seed=0), file
      ...     )
      ...     bert_adapter.load_importance(file).examples
      8
    """
    metadata, names = read_metadata(file, "a file of save_importance")
    try:
        about = json.loads(metadata.get("importance", "{}"))
        if (schema := about.pop("schema", None)) != SCHEMA:
            found = f"schema {schema}" if about else f"the arrays {names[:3]}"
            raise ValueError(f"schema {SCHEMA}; got {found}: measure again")
        paths, fields = about.pop("paths"), set(FIELDS)
        if about.keys() != fields:
            raise ValueError(f"the entries {sorted(fields)}; got {sorted(about)}")
        about["texts"] = tuple(about["texts"])
        about["inputs"] = tuple((name, tuple(shape), dtype) for name, shape, dtype in about["inputs"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: wanted a file of save_importance, of {error}") from None
    arrays = read_arrays(file, "a file of save_importance", as_held)
    sums = {path: Sums(*(joined(arrays, f"{path}:{name}") for name in Sums._fields)) for path in paths}
    return Importance(sums, **about)


def parts(name: str, found: Any) -> Iterator[tuple[str, Any]]:
    """A statistic under its name, or the fields of a `Through` under names that begin with it."""
    if not isinstance(found, Through):
        yield name, found
        return
    for field, array in found._asdict().items():
        if array is not None:
            yield f"{name}.{field}", array


def joined(arrays: Mapping[str, Any], name: str) -> Any:
    """What `parts` took apart; None if there is none."""
    found = {field: arrays.get(f"{name}.{field}") for field in Through._fields}
    return arrays.get(name) if found["matrix"] is None else Through(**found)


def is_matrix(name: str) -> bool:
    """Whether what the file has under that name is a symmetric matrix."""
    return name in SYMMETRIC or name.endswith(".matrix")


def as_held(name: str, array: Any) -> Any:
    """What the file has under that name, as `Importance.sums` holds it."""
    return unpacked(array) if is_matrix(name.rpartition(":")[2]) else jnp.asarray(array)
