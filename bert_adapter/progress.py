"""A bar for anything that takes more than a few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds without a bar


def track(items: Iterable[T], name: str, show: bool) -> Iterator[T]:
    """The items, counted off by a bar on a terminal's standard error, with the time left where their number is known.

    What ends within `PATIENCE` has none.
    """
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    began, total = time.monotonic(), len(items) if isinstance(items, Sized) else None
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total, visible=False)
        for item in items:
            yield item
            bar.update(task, advance=1, visible=time.monotonic() - began > PATIENCE)
