"""A bar for anything that takes more than a few seconds."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], name: str, show: bool) -> Iterator[T]:
    """The items, with a bar on a terminal's standard error that counts them off."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    total = len(items) if isinstance(items, Sized) else None
    yield from bar(items, name, total=total, console=Console(stderr=True), transient=True)
