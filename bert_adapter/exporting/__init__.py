"""Models for other libraries."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint import checked
from bert_adapter.checkpoint.card_file import CARD
from bert_adapter.checkpoint.directory import check_target, replacing
from bert_adapter.checkpoint.names import with_dtypes
from bert_adapter.exporting import pytorch
from bert_adapter.exporting.model_card import check_scores, describe
from bert_adapter.exporting.onnx_file import ONNX
from bert_adapter.exporting.stablehlo import STABLEHLO
from bert_adapter.exporting.target import Target
from bert_adapter.files import check_parent, path_of
from bert_adapter.kinds import as_model
from bert_adapter.model import Model, check_family
from wlra.checks import check_name

TARGETS: dict[str, Target] = {
    "transformers-dense": pytorch.DENSE,
    "transformers": pytorch.FACTORISED,
    "sentence-transformers": pytorch.SENTENCES,
    "onnx": ONNX,
    "stablehlo": STABLEHLO,
}


def export(
    model: Model | str | Path | Any,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """`out` is a directory that another library loads, or, if anything fails, what it was before.

    Args:
      model: a `Model`, dense or factorised, or a directory or a name on the Hub that `load` reads.
      out: a new or empty directory, or one of `export` or `save`, which is replaced.
      to: a name in `TARGETS`. "transformers-dense": factors are multiplied out, and every Auto class loads it.
        "transformers": factorised, and in 8 or 4 bits where the model is, with a small file of code that
        `trust_remote_code=True` runs.
        "sentence-transformers": the same, with what follows the encoder. "onnx": one graph for onnxruntime.
        "stablehlo": a program for `jax.export`.
      dtype: for "onnx", what the graph computes in: "float32", the default, "float16" or "int8".
      scores: by name, what was measured of this model; they are written in its card, README.md.

    Raises:
      ValueError: before work starts, for what cannot be exported, with the reason.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.export(sample_model(), directory, to="transformers-dense")
        ...     sorted(os.listdir(directory))[2:5]
        ['README.md', 'config.json', 'model.safetensors']
    """
    target = TARGETS[check_name("to", to, TARGETS)]
    check_dtype(to, dtype)
    check_packages(to)
    numbers = {
        name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in (scores or {}).items()
    }
    check_scores(numbers)
    check_out(model, path_of(out))
    found = as_model(model)
    check_family(found, "is not exported: jax.export takes your own function of it")
    found = found._replace(config=with_dtypes(found.config, target.integers(found)))
    checked(found)
    target.check(found, dtype)
    chosen = dtype or next(iter(target.dtypes), None)
    with replacing(path_of(out)) as fresh:
        target.write(found, fresh, chosen)
        (fresh / CARD).write_bytes(describe(found, target, dtype=chosen, scores=numbers))


def check_dtype(to: str, dtype: str | None) -> None:
    """A ValueError if the target cannot compute with such numbers."""
    known = TARGETS[to].dtypes
    if dtype is not None and dtype not in known:
        wanted = f"one of {', '.join(map(repr, known))}" if known else "none: it keeps the model's"
        raise ValueError(f"dtype: got {dtype!r} with to={to!r}, wanted {wanted}")


def check_packages(to: str) -> None:
    """A ValueError if something has to be installed first."""
    if missing := [name for name in TARGETS[to].packages if find_spec(name) is None]:
        raise ValueError(f"to={to!r} needs {', '.join(missing)}: pip install 'wlra[export]'")


def check_out(model: Any, out: Path) -> None:
    """A ValueError if nothing may be written there."""
    target = check_target(out)
    check_parent(target)
    if isinstance(model, str | Path) and target.is_relative_to(place := path_of(model).resolve()) and place.is_dir():
        raise ValueError(f"out: {target} lies in {model}, which is to be exported: wanted another place")
