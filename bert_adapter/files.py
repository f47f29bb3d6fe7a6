"""Files that are written whole or not at all, and arrays in them."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path beside `path` whose file takes its place when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """A ValueError if no file can be put there, so that it is known before work and not after it."""
    if path.is_dir():
        raise ValueError(f"{path}: got a directory, wanted the name of a file")
    check_parent(path)


def check_parent(path: Path) -> None:
    """A ValueError if nothing can be put where the path lies."""
    nearest = next(parent for parent in path.expanduser().absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise ValueError(f"{path}: {nearest} is a file, wanted a directory to write in")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: no permission to write in {nearest}")


def write_arrays(path: Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """The file, in safetensors, holds the arrays, or what it held before.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    with writing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:  # which is no OSError, whatever the disk says
            raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """The file holds the text, or what it held before."""
    with writing(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_arrays(file: str | Path, wanted: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata of a safetensors file, and its arrays by name.

    Raises:
      ValueError: it is none; the message says that what is `wanted` was.
    """
    try:
        with safe_open(file, "numpy") as content:
            return content.metadata() or {}, {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an exception of its own
        raise ValueError(f"{file}: wanted {wanted}: {error}") from error
