"""Times that are measured here: of kernels, dense and at each rank, and of models."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.checkpoint.names import low_rank
from bert_adapter.engines import batch_for, threads_here
from bert_adapter.files import check_writable, write_text
from bert_adapter.json_files import parsed
from bert_adapter.kernels import Shapes, break_even, select_kernels
from bert_adapter.latency import Costs, Latency
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model, check_family, forward
from bert_adapter.progress import track
from wlra.checks import check_count

ROUNDS, LEAST = 7, 0.01  # rounds; seconds that a call runs in each, so that a clock can tell
COPIES, RANKS = 4, 10  # kernels in a row, none of which is at hand from the one before; ranks that are timed
SCHEMA = 1
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


def measure_latency(
    model: Model,
    batch: int = 8,
    length: int = 128,
    *,
    kernels: Shapes | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> Latency:
    """How long the dense model and its kernels take here, at ranks up to break-even, compiled, in float32.

    With it a budget is a share of the dense model's time: `plan(..., of=measure_latency(model))`. What a plan is
    predicted to take is the dense model's time less that of its kernels, and what these take at their ranks.

    Args:
      model: dense, of a family.
      batch, length: how many texts at once, and how many tokens of each.
      kernels: what `select_kernels` returned, by default all of the encoder.
      file: JSON, where it is kept, and read from if it was measured for the same device, versions, threads, texts and
        tokens; shapes that it does not hold are added.
      progress: whether there is a bar on a terminal.

    Raises:
      ValueError: a model of your own, more tokens than positions, numbers that cannot be, or another kind of file.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = sample_model(intermediate_size=64)
      >>> latency = bert_adapter.measure_latency(model, batch=1, length=8)
      >>> sorted(latency.kernels)
      [(16, 16), (16, 64), (64, 16)]
    """
    batch, length = check_count("batch", batch, 1), check_count("length", length, 1)
    check_family(model, "is not timed by its texts: wanted one of a family")
    shapes = sorted(set((select_kernels(model) if kernels is None else kernels).values()))
    place = None if file is None else Path(file)
    if place is not None:
        check_writable(place)
    known = {} if place is None else read_costs(place, where(batch, length))
    missing = [shape for shape in shapes if shape not in known]
    for shape in track(missing, "time kernels", progress):
        known[shape] = costs_of(shape, batch * length)
        if place is not None:
            write_costs(place, where(batch, length), known)
    inputs, run, params = batch_for(model, batch, length), jax.jit(forward(model)), jax.device_put(model.params)
    seconds = median(in_turns({"model": lambda: run(params, inputs)}, ROUNDS)["model"])
    return Latency(batch, length, seconds, kernels={shape: known[shape] for shape in shapes})


def costs_of(shape: tuple[int, int], rows: int) -> Costs:
    """Dense, and at ranks from a few to break-even that rise by the same factor."""
    most = math.ceil(break_even(shape)) - 1
    ranks = sorted({max(1, round(most ** (i / (RANKS - 1)))) for i in range(RANKS)} if most else {1})
    calls = {rank: products(shape, rows, rank) for rank in [None, *ranks]}
    found = {rank: median(each) / COPIES for rank, each in in_turns(calls, ROUNDS).items()}
    return Costs(tuple(ranks), tuple(found[rank] for rank in ranks), found[None])


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
    """Seconds of a call, the mean of so many."""
    begun = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(call())
    return (time.perf_counter() - begun) / times


def kernels_of(model: Model) -> list[Kernel]:
    """The kernels of a model that have factors."""
    shapes = kernel_shapes(model.module)
    return [Kernel(path, shapes[path], rank) for path, rank in low_rank(model.config).items() if path in shapes]


def where(batch: int, length: int) -> dict[str, Any]:
    """What times belong to."""
    device = jax.devices()[0]
    machine = f"{platform.node()}, {device.platform} {device.device_kind}, {threads_here()} threads"
    return {"machine": machine, "jax": jax.__version__, "batch": batch, "length": length}


def read_costs(file: Path, place: dict[str, Any]) -> dict[tuple[int, int], Costs]:
    """By shape, what the file holds for this place; nothing where it is not there."""
    found = {}
    for entry in entries(file):
        if {name: entry[name] for name in place} == place:
            timed = Costs(tuple(entry["ranks"]), tuple(entry["seconds"]), entry["dense"])
            found[tuple(entry["shape"])] = timed
    return found


def entries(file: Path) -> list[dict[str, Any]]:
    """What the file holds, for all places."""
    if not file.exists():
        return []
    try:
        content = parsed(file.read_bytes(), file)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        known = list(content["kernels"])
        for entry in known:
            where_of, costs = [entry[name] for name in where(1, 1)], (entry["shape"], entry["ranks"], entry["seconds"])
            numbers = [*costs[0], *costs[1], *costs[2], entry["dense"]]
            if not all(np.isfinite(number) and number > 0 for number in numbers) or len(costs[1]) != len(costs[2]):
                raise ValueError(f"times that cannot be, of {where_of}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"file: {file} holds no times of kernels, {error}: wanted another file, or none") from None
    return known


def write_costs(file: Path, place: dict[str, Any], known: Mapping[tuple[int, int], Costs]) -> None:
    """The file holds these times, and those of other places that it held."""
    others = [entry for entry in entries(file) if {name: entry[name] for name in place} != place]
    ours = [place | {"shape": list(shape)} | costs._asdict() for shape, costs in known.items()]
    write_text(file, json.dumps({"schema": SCHEMA, "kernels": others + ours}, indent=1) + "\n")
