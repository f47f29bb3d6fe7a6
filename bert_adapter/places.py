"""Where a command may write, beside what it reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint.directory import check_target
from bert_adapter.files import check_parent, check_writable


def check_places(
    models: Mapping[str, Any],
    read: Mapping[str, Path | None],
    written: Mapping[str, Path | None],
    output: Path | None = None,
) -> None:
    """A ValueError unless all that is read is there, and all that is written has a place of its own.

    Args:
      models: by the option, directories that are read, or names on the Hub, which have no place here.
      read, written: by the option, files.
      output: the directory of the new checkpoint, if there is one.
    """
    inputs = {name: path.resolve() for name, path in read.items() if path is not None}
    directories = {name: Path(path).resolve() for name, path in models.items() if path and Path(path).is_dir()}
    outputs = {name: path.resolve() for name, path in written.items() if path is not None}
    checkpoint = {} if output is None else {"-o": output.resolve()}
    for name, path in inputs.items():
        if path.is_dir() or not path.exists():
            raise ValueError(f"{name}: {path} is {'a directory' if path.is_dir() else 'not there'}, wanted a file")
    for name, path in {**checkpoint, **outputs}.items():
        for other, directory in directories.items():
            if path.is_relative_to(directory):
                raise ValueError(f"{name}: {path} lies in {directory}, which {other} names: wanted another place")
    for name, target in checkpoint.items():
        named(name, check_parent, target)
        named(name, check_target, target)
    for name, path in outputs.items():
        others = {other: place for other, place in (outputs | inputs).items() if other != name}
        if same := [other for other, place in others.items() if place == path]:
            raise ValueError(f"{name}: {path} is {same[0]}'s file too, wanted another")
        if inside := [target for target in checkpoint.values() if path.is_relative_to(target)]:
            raise ValueError(f"{name}: {path} lies in the new checkpoint, {inside[0]}: wanted another place")
        named(name, check_writable, path)


def check_apart(files: Mapping[str, Path | None]) -> None:
    """A ValueError if two options name one file: what is measured on rows that were trained on says nothing."""
    seen: dict[Path, str] = {}
    for name, path in files.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            raise ValueError(f"{name}: {path} is {other}'s file too, wanted other rows than those that are trained on")


def named(name: str, check: Any, path: Path) -> None:
    """The check, whose error begins with the option's name."""
    try:
        check(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
