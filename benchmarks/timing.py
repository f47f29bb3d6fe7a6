"""How long a call takes once it is compiled, what memory it needs, and what it ran on."""

import platform
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import wlra


class Measured(NamedTuple):
    """What a call returned and what it cost. Peak memory is XLA's own figure, or None if it gives none."""

    value: Any
    compile_seconds: float | None
    run_seconds: float
    peak_bytes: int | None


def median_seconds(call: Callable[[], Any], runs: int = 5) -> float:
    """The median over several runs, with results awaited, after one that is not counted and compiles."""
    jax.block_until_ready(call())
    return median_of(call, runs)


def median_of(call: Callable[[], Any], runs: int = 5) -> float:
    """The median over several runs, with results awaited."""
    return float(np.median([timed(call)[1] for _ in range(runs)]))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, awaited, and its seconds."""
    began = time.perf_counter()
    value = jax.block_until_ready(call())
    return value, time.perf_counter() - began


def compiled(function: Callable, *arrays: Any) -> tuple[Callable, float, int | None]:
    """The function, jitted or not, compiled for the arrays, the seconds that took, and the peak bytes of a call."""
    began = time.perf_counter()
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    program = jitted.lower(*arrays).compile()
    seconds, memory = time.perf_counter() - began, program.memory_analysis()
    if memory is None:
        return program, seconds, None
    parts = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    parts -= memory.alias_size_in_bytes  # arguments that are donated make room for the output
    return program, seconds, parts  # not peak_memory_in_bytes, which on a CPU has no temporaries


def measure(function: Callable, *arrays: Any, runs: int = 5) -> Measured:
    """The function of arrays compiled, and its median over several runs after one that is not counted."""
    arrays = jax.device_put(arrays)
    program, seconds, peak = compiled(function, *arrays)
    value = jax.block_until_ready(program(*arrays))
    return Measured(value, seconds, median_of(lambda: program(*arrays), runs), peak)


def measure_host(call: Callable[[], Any], runs: int = 5) -> Measured:
    """A call that is not JAX's. Peak memory is that of the whole process so far, which is all the system tells."""
    value, seconds = timed(call)
    return Measured(value, None, seconds if runs == 1 else median_of(call, runs), process_peak_bytes())


def process_peak_bytes() -> int:
    """The most memory the process has held."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def svd_seconds(W: np.ndarray, runs: int = 5) -> float:
    """The median time of one numpy.linalg.svd(W, full_matrices=False), the unit of all comparisons."""
    return median_seconds(lambda: np.linalg.svd(W, full_matrices=False), runs)


def environment() -> dict[str, str]:
    """The versions and the device that a result belongs to."""
    return {
        "wlra": wlra.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
