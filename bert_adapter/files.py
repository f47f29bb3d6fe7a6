"""Files that are written whole or not at all, and arrays in them."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


def path_of(path: str | Path) -> Path:
    """The path, whose ~ is the user's home: of whatever is read or written, before anything looks at it."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` whose file takes its place when the block ends, and vanishes if it fails."""
    path = path_of(path)
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


def check_writable(path: str | Path) -> None:
    """A ValueError if no file can be put there, so that it is known before work and not after it.

    What is there and is neither a file nor a directory, such as /dev/null or a pipe, is left alone: a file that takes
    its place would be in the way of all that use it.
    """
    path = path_of(path)
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{path}: got {kind}, wanted the name of a file")
    check_parent(path)


def check_parent(path: Path) -> None:
    """A ValueError if nothing can be put where the path lies."""
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise ValueError(f"{path}: {nearest} is a file, wanted a directory to write in")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot write in {nearest}: {error.strerror}") from None


KINDS = {  # of numbers: NumPy's names, and those of safetensors
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_arrays(path: str | Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """The file, in safetensors, holds the arrays, or what it held before.

    A list of flat arrays is one array, end to end. Nothing is copied, where safetensors' own function would make all of
    the file in memory first, twice.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    parts = {name: array if isinstance(array, list) else [np.asarray(array)] for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, pieces in parts.items():
        shape = pieces[0].shape if len(pieces) == 1 else (sum(map(len, pieces)),)
        begin, end = end, end + sum(piece.nbytes for piece in pieces)
        header[name] = {"dtype": KINDS[pieces[0].dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as numbers are read from there that lie at multiples of 8
    with writing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for piece in chain.from_iterable(parts.values()):
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        except OSError as error:  # which does not name the file
            raise OSError(f"{path}: {error.strerror or error}") from error


@contextmanager
def writing_tensors(file: Path) -> Iterator[None]:
    """What safetensors raises where a file cannot be written, as on a full disk, is an OSError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """The file holds the text, or what it held before."""
    with writing(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_arrays(
    file: str | Path, wanted: str, use: Callable[[str, Any], Any] = lambda name, array: array
) -> dict[str, Any]:
    """The arrays of a safetensors file by name, or what `use(name, array)` makes of each as soon as it is read.

    Raises:
      ValueError: it is none; the message says that what is `wanted` was.
    """
    with opened(file, wanted) as content:
        return {name: use(name, content.get_tensor(name)) for name in content.keys()}  # noqa: SIM118


def read_metadata(file: str | Path, wanted: str) -> tuple[dict[str, str], list[str]]:
    """The metadata of a safetensors file, and the names of its arrays.

    Raises:
      ValueError: as `read_arrays`.
    """
    with opened(file, wanted) as content:
        return content.metadata() or {}, sorted(content.keys())


@contextmanager
def opened(file: str | Path, wanted: str) -> Iterator[Any]:
    """A safetensors file, or a ValueError that says that what is `wanted` was."""
    try:
        with safe_open(path_of(file), "numpy") as content:
            yield content
    except Exception as error:  # safetensors has an exception of its own
        raise ValueError(f"{file}: wanted {wanted}: {error}") from error
