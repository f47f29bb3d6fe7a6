"""How long a call takes once it is compiled, and what it ran on."""

import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import wlra


def median_seconds(call: Callable[[], Any], runs: int = 5) -> float:
    """The median over several runs, with results awaited, after one that is not counted and compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def environment() -> dict[str, str]:
    """The versions and the device that a result belongs to."""
    return {
        "wlra": wlra.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
