"""How long a kernel takes here, dense and at each rank."""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bert_adapter.checkpoint.names import low_rank
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model

ROUNDS, LEAST = 7, 0.01  # rounds; seconds that a call runs in each, so that a clock can tell
Key = TypeVar("Key")


class Seconds(NamedTuple):
    """Of one product with the kernel, and of two with its factors."""

    dense: float
    low_rank: float


class Kernel(NamedTuple):
    """A kernel with factors, and how long it takes."""

    path: str
    shape: tuple[int, int]
    rank: int
    seconds: Seconds | None = None


def kernels_of(model: Model) -> list[Kernel]:
    """The kernels of a model that have factors."""
    shapes = kernel_shapes(model.module)
    return [Kernel(path, shapes[path], rank) for path, rank in low_rank(model.config).items()]


@lru_cache(maxsize=1024)
def seconds_of(shape: tuple[int, int], rows: int, rank: int) -> Seconds:
    """Medians over rounds in which both take turns, in float32."""
    (m, n), rng = shape, np.random.default_rng(0)

    def drawn(*axes: int) -> Any:
        return jnp.asarray(rng.normal(size=axes).astype(np.float32))

    x, kernel, left, right = drawn(rows, m), drawn(m, n), drawn(m, rank), drawn(rank, n)
    calls = {"dense": lambda: dense(x, kernel), "low_rank": lambda: factorised(x, left, right)}
    return Seconds(**{name: median(seconds) for name, seconds in in_turns(calls, ROUNDS).items()})


@jax.jit
def dense(x: Any, kernel: Any) -> Any:
    return x @ kernel


@jax.jit
def factorised(x: Any, left: Any, right: Any) -> Any:
    return (x @ left) @ right


def in_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each call in each round. In a round all take their turns, short ones several at once."""
    often = {}
    for key, call in calls.items():
        jax.block_until_ready(call())  # compiles, or fills caches
        often[key] = max(1, round(LEAST / timed(call, 1)))
    found = [[timed(call, often[key]) for key, call in calls.items()] for _ in range(rounds)]
    return {key: list(seconds) for key, seconds in zip(calls, zip(*found, strict=True), strict=True)}


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of a call, the mean of so many."""
    begun = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(call())
    return (time.perf_counter() - begun) / times
