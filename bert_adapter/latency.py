"""How long a model takes here, dense and with factors at each rank: what a plan of time goes by.

Kernels are timed where they are, in the model. On their own they save more: biases, activations and norms around them
take the time that they take, and on a few cores products that do not wait for each other share them.
"""

import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int

from bert_adapter.checkpoint.names import by_path
from bert_adapter.engines import batch_for, threads_here
from bert_adapter.factorisation import factors_of
from bert_adapter.files import check_writable, path_of, write_text
from bert_adapter.head_sizes import Pair, selected_pairs, smaller_sizes, with_factors_between
from bert_adapter.importance.fingerprint import of_function
from bert_adapter.json_files import parsed
from bert_adapter.kernels import Shapes, break_even, select_kernels
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.layers.integers import check_floats
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import is_table, kernel_path, layer_path
from bert_adapter.layers.stacks import restacked, unstacked, whole
from bert_adapter.model import Model, check_family, forward
from bert_adapter.progress import track
from bert_adapter.timing import in_turns
from wlra.checks import check_count

ROUNDS = 7
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of break-even: the ranks that are timed
# Numbers that a processor takes at once: between two multiples a rank takes as long as at the next one, or longer. Of
# kernels whose break-even is a few of them only, every rank counts.
STEP, FEW = 16, 4
SCHEMA = 4  # another where factors run otherwise, or other ranks are timed
NUMBERED, IDENTITY = re.compile(r"(^|/)\d+/"), re.compile(r"_\d+$")  # in paths of layers
PLACE = ("machine", "jax", "batch", "length", "model")


class Costs(NamedTuple):
    """Seconds that a kernel of some shape adds to the model: at some ranks, which rise, and dense.

    What it adds at the fastest of these ranks counts as none: a plan needs differences.

    step: a rank takes as long as the next multiple of it.
    """

    ranks: tuple[int, ...]
    seconds: tuple[float, ...]
    dense: float
    step: int = 1

    def times(self, unit: float) -> "Costs":
        """The same in another unit."""
        return self._replace(seconds=tuple(unit * each for each in self.seconds), dense=unit * self.dense)

    def padded(self, ranks: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The next multiples of `step`."""
        return -(-ranks // self.step) * self.step

    def at(self, ranks: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Seconds at these ranks, read off between those that were timed; a higher rank is never faster."""
        rising = np.maximum.accumulate(np.array([self.seconds[0], *self.seconds]))
        return np.interp(self.padded(ranks), [0, *self.ranks], rising)


class Latency(NamedTuple):
    """What a plan of time needs to know: `plan(..., of=latency)`.

    batch, length: the texts, and the tokens of each, for which it holds.
    seconds: of the dense model.
    kernels: by shape, of one kernel.
    heads: by their dimensions, of a layer's queries and keys, 0, and of its values, 1, if they were timed.
    numbers: how many the kernels of its layers hold, which tells another model; 0 if that is not known.

    Example:
      >>> import numpy as np, bert_adapter
      >>> from bert_adapter.latency import Costs
      >>> square = Costs(ranks=(1, 3), seconds=(0.1, 0.3), dense=0.4)
      >>> latency = bert_adapter.Latency(1, 16, seconds=1.0, kernels={(8, 8): square})
      >>> params = {"easy": {"kernel": np.diag([9.0, 8, 0, 0, 0, 0, 0, 0])}, "hard": {"kernel": np.eye(8)}}
      >>> bert_adapter.plan(params, None, budget=0.81, of=latency, signal="svd").ranks
      {'easy': 2, 'hard': 4}
    """

    batch: int
    length: int
    seconds: float
    kernels: Mapping[tuple[int, int], Costs]
    heads: Mapping[int, Costs] = {}
    numbers: int = 0

    def __str__(self) -> str:
        return f"time for {self.batch} x {self.length} tokens"


def measure_latency(
    model: Model,
    batch: int = 8,
    length: int = 128,
    *,
    kernels: Shapes | None = None,
    pairs: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> Latency:
    """How long the model takes here, compiled, and how much faster it is for each kernel with factors of some rank.

    With it a budget is a share of the dense model's time: `plan(..., of=measure_latency(model))`. For each shape the
    model is timed with factors of a few ranks up to break-even for all kernels of that shape, in turns with the dense
    one. What several shapes save is taken to add up, and kernels of one shape to save the same.

    Args:
      model: dense, of a family.
      batch, length: how many texts at once, and how many tokens of each.
      kernels: what `select_kernels` returned, by default all of the encoder. Tables are not timed: looking a word up
        takes no time.
      pairs: whether heads of fewer dimensions are timed too, for `compress(model, ..., pairs=True)`.
      file: JSON, where times are kept, and read from if they were measured for the same program, kernels, device,
        version of JAX, threads, texts and tokens.
      progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: a model of your own or with integers in memory, kernels that it has not, more tokens than positions,
        numbers that cannot be, or another kind of file.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = sample_model()
      >>> kernels = bert_adapter.select_kernels(model, include="query")
      >>> latency = bert_adapter.measure_latency(model, batch=1, length=8, kernels=kernels)
      >>> sorted(latency.kernels)
      [(16, 16)]
    """
    batch, length = check_count("batch", batch, 1), check_count("length", length, 1)
    check_family(model, "is not timed by its texts: wanted one of a family")
    check_floats(model.params, "model")
    shapes = multiplied(model, select_kernels(model) if kernels is None else kernels)
    met = selected_pairs(model, shapes) if pairs else []
    place = None if file is None else path_of(file)
    if place is not None:
        check_writable(place)
    inputs = batch_for(model, batch, length)
    timed = sorted({whole(path) for path in shapes}) + ["heads"] * pairs
    here = where(model, inputs, timed) if place is not None else {}
    numbers = numbers_in(model.params)
    if place is not None and (known := read(place, here)) is not None:
        return known._replace(numbers=numbers)
    run, params, found = jax.jit(forward(model)), jax.device_put(model.params), {}
    for shape in track(sorted(set(shapes.values())), "time kernels", progress):
        paths = [path for path in shapes if shapes[path] == shape]
        found[shape] = timed_in(run, params, inputs, paths=paths, shape=shape)
    sides = sorted({pair.side for pair in met})
    heads = {side: timed_heads(model, inputs, met, side) for side in track(sides, "time heads", progress)}
    seconds = median(dense for dense, _ in (*found.values(), *heads.values()))
    costs = {shape: each.times(seconds) for shape, (_, each) in found.items()}
    of_heads = {side: each.times(seconds) for side, (_, each) in heads.items()}
    latency = Latency(batch, length, seconds, costs, heads=of_heads, numbers=numbers)
    if place is not None:
        write(place, here, latency)
    return latency


def numbers_in(params: Any) -> int:
    """How many numbers the kernels in numbered layers hold, without identities between them."""
    flat = by_path(params)
    layers = {path: layer_path(path) or "" for path in flat if not is_table(path)}
    counted = [path for path, layer in layers.items() if NUMBERED.search(layer) and not IDENTITY.search(layer)]
    return sum(flat[path].size for path in counted)


def check_times(latency: Latency, params: Any) -> None:
    """A ValueError for times of another model."""
    if latency.numbers and (found := numbers_in(params)) != latency.numbers:
        raise ValueError(
            f"of: got times of a model with {latency.numbers:,} numbers in its layers' kernels, wanted those "
            f"of this one, with {found:,}: measure_latency(model)"
        )


def multiplied(model: Model, kernels: Shapes) -> dict[str, tuple[int, int]]:
    """Those of the kernels that are multiplied by: tables are looked up."""
    flat = flatten_dict(unstacked(model.params, kernels), keep_empty_nodes=True, sep="/")
    if wrong := [path for path in kernels if isinstance(flat.get(kernel_path(flat, path)), (type(None), Factorised))]:
        raise ValueError(f"kernels: got {wrong[0]!r}, wanted dense ones of the model: select_kernels(model)")
    found = {path: shape for path, shape in kernels.items() if not is_table(kernel_path(flat, path))}
    if not found:
        raise ValueError(
            f"kernels: got {list(kernels)}, wanted some that are no tables: looking a word up takes no time"
        )
    return found


def timed_in(
    run: Forward, params: Any, inputs: Batch, *, paths: Sequence[str], shape: tuple[int, int]
) -> tuple[float, Costs]:
    """Seconds of the dense model, and as shares of these what each of the kernels adds."""
    most = max(1, math.ceil(break_even(shape)) - 1)
    step = STEP if most >= FEW * STEP else 1
    ranks = sorted({step * max(1, math.ceil(share * most / step)) for share in SHARES})
    models = {None: params} | {rank: with_factors(params, paths, shape, rank) for rank in ranks}
    calls = {rank: lambda each=each: run(each, inputs) for rank, each in models.items()}
    return costs_of(calls, [len(paths)] * len(ranks), step)


def timed_heads(model: Model, inputs: Batch, pairs: Sequence[Pair], side: int) -> tuple[float, Costs]:
    """Seconds of the dense model, and as shares of these what heads of a layer add, by their dimensions on a side."""
    met = [pair for pair in pairs if pair.side == side]
    most = max(pair.size for pair in met)
    step = int(smaller_sizes(most)[0])
    sizes = sorted({step * max(1, math.floor(share * most / step)) for share in SHARES[1:-1]})
    models = {None: model} | {size: with_fewer(model, met, size) for size in sizes}
    calls = {size: compiled(each, inputs) for size, each in models.items()}
    counts = [sum(pair.size > size for pair in met) for size in sizes]
    seconds, costs = costs_of(calls, counts, step)
    return seconds, costs._replace(ranks=(*costs.ranks, most), seconds=(*costs.seconds, costs.dense))


def with_fewer(model: Model, pairs: Sequence[Pair], size: int) -> Model:
    """The model with the first dimensions of its heads."""
    factors = {}
    for pair in pairs:
        eye = np.eye(pair.size, min(size, pair.size))
        factors[pair.layer, pair.side] = (np.stack([eye] * len(pair.identities)),) * 2
    return with_factors_between(model, factors)


def compiled(model: Model, inputs: Batch) -> Callable[[], Any]:
    """A call of the model."""
    run, params = jax.jit(forward(model)), jax.device_put(model.params)
    return lambda: run(params, inputs)


def costs_of(calls: Mapping[int | None, Callable[[], Any]], counts: Sequence[int], step: int) -> tuple[float, Costs]:
    """Seconds of the dense model, that of None, and as shares of these what a kernel or a pair adds.

    counts: how many are smaller, for each rank.
    """
    found = in_turns(calls, ROUNDS)
    ranks = [rank for rank in calls if rank is not None]
    shares = [median(one / other for one, other in zip(found[rank], found[None], strict=True)) for rank in ranks]
    saved = [(1 - share) / count for share, count in zip(shares, counts, strict=True)]
    most_saved = max(0.0, *saved)
    return median(found[None]), Costs(tuple(ranks), tuple(most_saved - each for each in saved), most_saved, step)


def with_factors(params: Any, paths: Sequence[str], shape: tuple[int, int], rank: int) -> Any:
    """The parameters with factors in place of these kernels; only their shapes and dtypes mean something."""
    flat: dict[str, Any] = dict(flatten_dict(unstacked(params, paths), keep_empty_nodes=True, sep="/"))
    left, right = np.full((shape[0], rank), 1 / shape[0], "f4"), np.full((rank, shape[1]), 1 / rank, "f4")
    for path in paths:
        place = kernel_path(flat, path)
        flat |= factors_of(path, shape, left, right, kernel=flat[place], place=place)
    return jax.device_put(restacked(unflatten_dict(flat, sep="/")))


def where(model: Model, inputs: Batch, timed: list[str]) -> dict[str, Any]:
    """What times belong to."""
    (device,), shape = jax.device_put(0.0).devices(), np.shape(inputs["input_ids"])  # where the model runs
    kind = processor() if device.platform == "cpu" else device.device_kind
    machine = f"{platform.node()}, {device.platform} {kind}, {threads_here()} threads"
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), model.params)
    program = f"{of_function(forward(model), params, inputs)}, {timed}"
    return dict(zip(PLACE, (machine, jax.__version__, shape[0], shape[-1], program), strict=True))


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    told = Path("/proc/cpuinfo")  # on Linux, where Python knows no more than the kind
    names = re.findall(r"^model name\s*:\s*(.+)$", told.read_text("utf-8"), re.MULTILINE) if told.exists() else []
    return names[0] if names else platform.processor()


def read(file: Path, place: dict[str, Any]) -> Latency | None:
    """What the file holds for this place, if anything."""
    for entry in entries(file):
        if {name: entry[name] for name in PLACE} == place:
            costs = {tuple(each["shape"]): costs_from(each) for each in entry["kernels"]}
            heads = {each["side"]: costs_from(each) for each in entry["heads"]}
            return Latency(entry["batch"], entry["length"], entry["seconds"], costs, heads=heads)
    return None


def costs_from(entry: dict[str, Any]) -> Costs:
    """What an entry of the file says, or a ValueError."""
    found = Costs(tuple(entry["ranks"]), tuple(entry["seconds"]), entry["dense"], entry["step"])
    shape = entry.get("shape", (1, 1))  # heads have none
    counts, times = [*shape, *found.ranks, found.step], [*found.seconds, found.dense]
    rising = found.ranks and list(found.ranks) == sorted(set(found.ranks)) and len(found.ranks) == len(found.seconds)
    if len(shape) != 2 or not rising or min(counts) < 1 or not all(0 <= each < math.inf for each in times):
        raise ValueError(f"times that cannot be, {entry}")
    return found


UNKNOWN = ": wanted another file, or none"


def entries(file: Path) -> list[dict[str, Any]]:
    """What the file holds, for all places."""
    if not file.exists():
        return []
    try:
        content = parsed(file.read_bytes(), file)
        if type(content["schema"]) is int and 0 < content["schema"] < SCHEMA:
            return []  # what an earlier version measured otherwise
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        known = list(content["models"])
        for entry in known:
            if not 0 < entry["seconds"] < math.inf or not all(name in entry for name in PLACE):
                raise ValueError(f"times that cannot be, of {[entry[name] for name in PLACE]}")
            for each in (*entry["kernels"], *entry["heads"]):
                costs_from(each)
            if not {each["side"] for each in entry["heads"]} <= {0, 1}:
                raise ValueError(f"heads that cannot be, {entry['heads']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"file: {file} holds no times of kernels, {error}{UNKNOWN}") from None
    return known


def write(file: Path, place: dict[str, Any], latency: Latency) -> None:
    """The file holds these times, and those of other places that it held."""
    others = [entry for entry in entries(file) if {name: entry[name] for name in PLACE} != place]
    costs = [{"shape": list(shape)} | each._asdict() for shape, each in latency.kernels.items()]
    heads = [{"side": side} | each._asdict() for side, each in latency.heads.items()]
    ours = place | {"seconds": latency.seconds, "kernels": costs, "heads": heads}
    write_text(file, json.dumps({"schema": SCHEMA, "models": [*others, ours]}, indent=1) + "\n")
