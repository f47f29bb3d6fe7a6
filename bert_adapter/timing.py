"""Times that are measured here: of calls in turns, and of kernels, dense and with factors."""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.checkpoint.bits import factorised_tables
from bert_adapter.checkpoint.names import low_rank
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model

ROUNDS, LEAST = 7, 0.01  # rounds; seconds that a call runs in each, so that a clock can tell
COPIES = 4  # kernels in a row, none of which is at hand from the one before
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


@lru_cache(maxsize=1024)
def seconds_of(shape: tuple[int, int], rows: int, rank: int) -> Seconds:
    """Medians over rounds in which both take turns."""
    found = in_turns({each: products(shape, rows, each) for each in (None, rank)}, ROUNDS)
    return Seconds(*(median(each) / COPIES for each in found.values()))


def products(shape: tuple[int, int], rows: int, rank: int | None) -> Callable[[], Any]:
    """What multiplies by COPIES kernels or pairs of factors, each after the other is done."""
    (m, n), rng = shape, np.random.default_rng(0)
    sizes = [(m, n)] if rank is None else [(m, rank), (rank, n)]
    x = jnp.asarray(rng.normal(size=(rows, m)).astype(np.float32))
    kernels = [[jnp.asarray(rng.normal(size=size).astype(np.float32)) for size in sizes] for _ in range(COPIES)]
    return lambda: in_a_row(x, kernels)


@jax.jit
def in_a_row(x: Float[Array, "rows m"], kernels: list[list[Any]]) -> Any:
    """The products of x with each, of which none can begin before the one before has ended."""
    found = []
    for factors in kernels:
        y = x
        for factor in factors:
            y = y @ factor
        found.append(y)
        x = x + 1e-30 * y[:1, :1]
    return found


def in_turns(calls: Mapping[Key, Callable[[], Any]], rounds: int, *, settle: float = 0.0) -> dict[Key, list[float]]:
    """Seconds of each call in each round. In a round all take their turns, short ones several at once.

    Calls in the first `settle` seconds of a turn do not count: threads of the library before spin on for a while, and
    hold the processors.
    """
    often = {}
    for key, call in calls.items():
        jax.block_until_ready(call())  # compiles, or fills caches
        often[key] = max(1, round(LEAST / timed(call, 1)))

    def turn(key: Key) -> float:
        begun = time.perf_counter()
        while True:
            jax.block_until_ready(calls[key]())
            if time.perf_counter() - begun > settle:
                return timed(calls[key], often[key])

    found = [[turn(key) for key in calls] for _ in range(rounds)]
    return {key: list(seconds) for key, seconds in zip(calls, zip(*found, strict=True), strict=True)}


def timed(call: Callable[[], Any], times: int) -> float:
    """Seconds of a call, the mean of `times` calls."""
    begun = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(call())
    return (time.perf_counter() - begun) / times


def kernels_of(model: Model) -> list[Kernel]:
    """The kernels of a model that have factors; a table is looked up, and is none."""
    shapes, tables = kernel_shapes(model.module), factorised_tables(model.params)
    ranks = {path: rank for path, rank in low_rank(model.config).items() if path in shapes and path not in tables}
    return [Kernel(path, shapes[path], rank) for path, rank in ranks.items()]
