"""Files that are written whole or not at all, and arrays in them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open


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
