"""Small files as text and as JSON: what they hold, or one error that names the file."""

import json
import os
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"  # how a file of Git LFS begins whose content was not fetched


def check_fetched(name: Any, beginning: bytes) -> None:
    """A ValueError if a file holds nothing, or a pointer to what it should hold."""
    if not beginning:
        raise ValueError(f"{name}: the file is empty: copy it again")
    if beginning.startswith(POINTER):
        raise ValueError(f"{name}: got a pointer of Git LFS, wanted the file it points to: run `git lfs pull` there")


def is_there(file: Path) -> bool:
    """Whether it is a file; a ValueError for a link to nothing, which a lost cache leaves."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file}: got a link to {os.readlink(file)}, which is not there: copy the file again")
    return file.is_file()


def without_mark(content: bytes, name: Any) -> bytes:
    """The UTF-8 text without a byte-order mark, which no reader of these files skips."""
    check_fetched(name, content)
    try:
        return content.decode("utf-8-sig").encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: wanted text in UTF-8: {error}") from None


def parsed(content: bytes, name: Any, kind: type = dict) -> Any:
    """The JSON object, or list, that a file holds."""
    try:
        value = json.loads(without_mark(content, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: wanted JSON: {error}") from None
    if not isinstance(value, kind):
        wanted = "an object {...}" if kind is dict else "a list [...]"
        raise ValueError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    return value


def shown(value: Any) -> str:
    """A value as JSON writes it."""
    return json.dumps(value, default=repr)
