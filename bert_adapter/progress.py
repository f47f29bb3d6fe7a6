"""Progress of anything that takes more than a few seconds: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds without a bar
EVERY = 60.0  # seconds between lines, where there is no terminal


def track(items: Iterable[T], name: str, show: bool) -> Iterator[T]:
    """The items, counted off on standard error, with the time left where their number is known.

    On a terminal by a bar, unless all ends within `PATIENCE`; in a file, or a notebook, by a line each minute.
    """
    if not show:
        yield from items
    elif sys.stderr.isatty():
        yield from with_bar(items, name)
    else:
        yield from with_lines(items, name)


def with_bar(items: Iterable[T], name: str) -> Iterator[T]:
    """The items, with a bar."""
    from rich.console import Console
    from rich.progress import Progress

    began, total = time.monotonic(), size_of(items)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total, visible=False)
        for item in items:
            yield item
            bar.update(task, advance=1, visible=time.monotonic() - began > PATIENCE)


def with_lines(items: Iterable[T], name: str) -> Iterator[T]:
    """The items, with a line each minute."""
    began = said = time.monotonic()
    total = size_of(items)
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - said >= EVERY:
            left = "" if total is None else f" of {total:,}, {(now - began) / done * (total - done) / 60:.0f} min left"
            print(f"{name}: {done:,}{left}", file=sys.stderr, flush=True)  # noqa: T201
            said = now


def size_of(items: Iterable[T]) -> int | None:
    """How many there are, if that is known."""
    return len(items) if isinstance(items, Sized) else None
