"""Which operations a call spends its time in: those of XLA, and functions on the host."""

import re
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax

EVERY = 0.01  # seconds between two looks at what the threads do
LIBRARY = sysconfig.get_path("stdlib")
PACKAGES = sysconfig.get_path("purelib")
WAITING = ("wait", "_worker", "accept", "select", "poll", "block_until_ready")  # functions in which threads do so


def profiled(call: Callable[[], Any]) -> dict[str, Counter[str]]:
    """Seconds by operation: under "XLA" and under "host"."""
    options: Any = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options), Watch() as watch:
            jax.block_until_ready(call())
        return {"XLA": of_xla(Path(folder)), "host": watch.seconds}


def of_xla(folder: Path) -> Counter[str]:
    """Seconds of XLA's operations, in all threads; names that differ in numbers alone are one."""
    found: Any = Counter()
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if any(name == "hlo_op" for name, _ in event.stats):
                        found[re.sub(r"\.\d+|\.clone", "", event.name)] += event.duration_ns / 1e9
    return found


class Watch:
    """While it is open, a thread looks at what the others do.

    Counted is the innermost function of each thread, standard library left out, unless the thread waits for another.
    """

    def __init__(self) -> None:
        self.seconds: Any = Counter()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def look(self) -> None:
        while not self.ended.wait(EVERY):
            for thread, frame in sys._current_frames().items():
                if thread != threading.get_ident() and (name := function_of(frame)):
                    self.seconds[name] += EVERY


def function_of(frame: FrameType | None) -> str | None:
    """Where a thread is; None where it waits."""
    if frame is not None and frame.f_code.co_name in WAITING:
        return None
    while frame is not None:
        file = frame.f_code.co_filename
        if PACKAGES in file or not file.startswith((LIBRARY, "<")):
            return f"{Path(file).parent.name}/{Path(file).name} {frame.f_code.co_name}"
        frame = frame.f_back
    return None
