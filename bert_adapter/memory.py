"""Memory that is no longer used goes back to the system."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def give_back() -> None:
    """What was freed leaves the process; glibc keeps hundreds of megabytes of it otherwise, of compilers above all."""
    if trim := trimmer():
        trim(0)


@cache
def trimmer() -> Callable[[int], Any] | None:
    """glibc's function for it; None where there is another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
