"""How long models take here, beside the first of them, in each engine."""

import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bert_adapter.checkpoint import load
from bert_adapter.engines import ENGINES, Step, batch_for, missing, threads_here
from bert_adapter.families import family_of
from bert_adapter.model import Model, check_family
from bert_adapter.progress import track
from bert_adapter.timing import Kernel, in_turns, kernels_of, seconds_of
from wlra.checks import check_count, check_name

CELLS = ((1, 16), (1, 32), (1, 128), (8, 128), (32, 128))  # texts by tokens
ROUNDS = 9
SETTLE = 0.2  # seconds in which threads of another library stop to spin
PEAK = "import sys, bert_adapter.speed as b; print(b.peak_bytes(*sys.argv[1:]))"
BATCH = "batch.npz"  # the file of the batch that is run for its memory


class Timing(NamedTuple):
    """A model in an engine at a number of texts and of tokens in each.

    seconds: of a call, the median over rounds in which all models and engines take turns.
    speed: how many times as fast as the first model in the same engine, the median over rounds.
    """

    model: str
    engine: str
    batch: int
    length: int
    seconds: float
    speed: float

    @property
    def texts_per_second(self) -> float:
        return self.batch / self.seconds


class Bench(NamedTuple):
    """What `bench` found.

    timings: by model, engine and cell.
    kernels: of the largest cell in JAX, those with factors.
    peaks: bytes of a process, by model and engine.
    threads: how many ran at once.

    Example:
      >>> import bert_adapter
      >>> found = bert_adapter.Bench([], [], peaks={("bert-half", "jax"): 10**9}, threads=2)
      >>> found.peaks["bert-half", "jax"]
      1000000000
    """

    timings: list[Timing]
    kernels: list[Kernel]
    peaks: dict[tuple[str, str], int]
    threads: int


def bench(
    models: Sequence[str | Path],
    *,
    cells: Iterable[tuple[int, int]] = CELLS,
    engines: Iterable[str] | None = None,
    rounds: int = ROUNDS,
    progress: bool = True,
) -> Bench:
    """How long each model takes beside the first of them, in each engine, on as many threads.

    In a round all models and engines take their turns one after the other, so that what else the machine does slows
    all of them; speeds are compared within rounds. Texts have no padding.

    Args:
      models: directories, or names on the Hub, dense or compressed; the first is what others are compared with.
      cells: numbers of texts, and of tokens in each.
      engines: names in `ENGINES`; by default those that are installed.
      rounds: how often each is timed.
      progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: a model of no family, an engine that is not installed or not known, or a number that cannot be.

    Example:
        >>> import tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(sample_model(), directory)
        ...     found = bert_adapter.bench([directory], cells=[(1, 4)], engines=["jax"], rounds=1, progress=False)
        >>> found.timings[0].engine, found.timings[0].speed
        ('jax', 1.0)
    """
    rounds, cells = check_count("rounds", rounds, 1), [check_cell(cell) for cell in cells]
    names, chosen = [str(model) for model in models], chosen_engines(engines)
    if not names or not cells or len(set(names)) < len(names):
        raise ValueError(f"models and cells: got {names} and {cells}, wanted some, and no model twice")
    loaded = {name: load(name) for name in names}
    for name, model in loaded.items():
        check_model(name, model, cells)
    steps = {(name, engine): started(loaded[name], engine) for engine in chosen for name in names}
    timings: list[Timing] = []
    for batch, length in track(cells, "time", progress):
        calls = {key: partial(step, batch_for(loaded[key[0]], batch, length)) for key, step in steps.items()}
        seconds = in_turns(calls, rounds, settle=SETTLE)
        timings += [timing(key, seconds, first=names[0], cell=(batch, length)) for key in steps]
    most = max(cells, key=lambda cell: cell[0] * cell[1])
    peaks = {key: peak_apart(*key, loaded[key[0]], most) for key in track(list(steps), "memory", progress)}
    return Bench(timings, slower_and_faster(loaded.values(), most[0] * most[1]), peaks, threads_here())


def started(model: Model, engine: str) -> Step:
    """What runs the model in the engine, whose files are gone once they are read."""
    with tempfile.TemporaryDirectory() as folder:
        return ENGINES[engine].start(model, Path(folder), threads_here())


def timing(
    key: tuple[str, str], seconds: Mapping[tuple[str, str], list[float]], *, first: str, cell: tuple[int, int]
) -> Timing:
    """What the rounds say of a model in an engine."""
    name, engine = key
    speeds = [one / other for one, other in zip(seconds[first, engine], seconds[key], strict=True)]
    return Timing(name, engine, *cell, seconds=median(seconds[key]), speed=median(speeds))


def slower_and_faster(models: Iterable[Model], rows: int) -> list[Kernel]:
    """The kernels that have factors, with seconds on so many rows; those of one shape and rank are timed once."""
    found = list(dict.fromkeys(kernel for model in models for kernel in kernels_of(model)))
    kinds = dict.fromkeys((kernel.shape, kernel.rank) for kernel in found)
    seconds = {(shape, rank): seconds_of(shape, rows, rank) for shape, rank in kinds}
    return [kernel._replace(seconds=seconds[kernel.shape, kernel.rank]) for kernel in found]


def check_cell(cell: tuple[int, int]) -> tuple[int, int]:
    """The cell, if it is two numbers from 1."""
    batch, length = cell
    return check_count("cells", batch, 1), check_count("cells", length, 1)


def check_model(name: str, model: Model, cells: Sequence[tuple[int, int]]) -> None:
    """A ValueError if it cannot be run on all cells."""
    check_family(model, "is not timed: time your own call of it")
    longest, most = family_of(model.config).longest(model.module.config), max(length for _, length in cells)
    if most > longest:
        raise ValueError(f"cells: got {most} tokens, wanted at most {longest}, the positions of {name}")


def chosen_engines(engines: Iterable[str] | None) -> list[str]:
    """The names, if all can be had."""
    if engines is None:
        return [name for name in ENGINES if not missing(name)]
    chosen = [check_name("engines", name, ENGINES) for name in engines]
    if lacking := {name: missing(name) for name in chosen if missing(name)}:
        raise ValueError(f"engines: {lacking} are not installed")
    if not chosen:
        raise ValueError(f"engines: got none, wanted some of {list(ENGINES)}")
    return chosen


def peak_bytes(name: str, engine: str, folder: str) -> int:
    """The most memory that this process has held, once it has opened what is in the folder and run the batch there."""
    with np.load(Path(folder) / BATCH) as batch:
        ENGINES[engine].open(name, Path(folder), threads_here())(dict(batch))
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the process that began this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text("utf-8"))[1])  # pyright: ignore
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_apart(name: str, engine: str, model: Model, cell: tuple[int, int]) -> int:
    """The same of a process that does nothing else; what it opens is written here."""
    with tempfile.TemporaryDirectory() as folder:
        ENGINES[engine].write(model, Path(folder))
        arrays: dict[str, Any] = dict(batch_for(model, *cell))
        np.savez(Path(folder) / BATCH, **arrays)
        command = [sys.executable, "-c", PEAK, name, engine, folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{name} in {engine}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])
