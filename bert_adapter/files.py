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
    check_writable(path)
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
    """A ValueError if no file can be put there, so that it is known before work and not after it.

    What is there and is neither a file nor a directory, such as /dev/null or a pipe, is left alone: a file that takes
    its place would be in the way of all that use it.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{path}: got {kind}, wanted the name of a file")
    check_parent(path)


def check_parent(path: Path) -> None:
    """A ValueError if nothing can be put where the path lies."""
    nearest = next(parent for parent in path.expanduser().absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise ValueError(f"{path}: {nearest} is a file, wanted a directory to write in")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot write in {nearest}: {error.strerror}") from None


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
