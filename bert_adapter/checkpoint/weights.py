"""Parameters in files, as arrays under the names that the files give them."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from safetensors import safe_open

from bert_adapter.checkpoint.bits import base_of, decoded, joined, kept
from bert_adapter.checkpoint.directory import FACTORS, INDEX, MSGPACK, WEIGHTS, as_it_is_now
from bert_adapter.checkpoint.names import by_path, dtypes_of, is_apart
from bert_adapter.families import architecture_of, family_of
from bert_adapter.families.family import Family
from bert_adapter.families.sentence import MODULES
from bert_adapter.families.stages import Projection, Stage
from bert_adapter.families.torch_names import from_torch
from bert_adapter.json_files import check_fetched, is_there, parsed

CONVERSION = (
    "weights in other formats are not read, because that runs pickled code or takes PyTorch. Where PyTorch is, "
    "`{command}` writes {wanted}"
)


def named(config: dict[str, Any]) -> str:
    """The class of transformers that the config names first; if it names none, one that keeps a head it tells of."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else names
    if isinstance(first, str) and first.isidentifier():
        return first
    labels = config.get("id2label") or {}
    called = isinstance(labels, dict) and any(not str(name).startswith("LABEL_") for name in labels.values())
    counted = {len(labels) or 2, config.get("num_labels") or 2, config.get("_num_labels") or 2} != {2}
    told = called or counted or config.get("finetuning_task") or config.get("problem_type")
    return "AutoModelForSequenceClassification" if told else "AutoModel"


def conversion(directory: Path, config: dict[str, Any]) -> str:
    """A line for the shell that reads a directory with PyTorch and writes safetensors there.

    Of a model on the Hub, whose other formats are not fetched, it reads the name, and writes a new folder, with its
    tokenizer. What files of sentence-transformers declare is its own to read and to write.
    """
    source, target = str(directory), str(directory)
    repository = directory.parent.parent.name
    online = directory.parent.name == "snapshots" and repository.startswith("models--")
    if online:
        source = repository.removeprefix("models--").replace("--", "/")
        target = source.rpartition("/")[2]
    if is_there(directory / MODULES) and embeds(config):
        return as_it_is_now(Path(source), Path(target))
    names = [named(config), *(["AutoTokenizer"] if online else [])]
    calls = (f"transformers.{name}.from_pretrained({source!r}).save_pretrained({target!r})" for name in names)
    return f"python -c {shlex.quote('; '.join(['import transformers', *calls]))}"


def embeds(config: dict[str, Any]) -> bool:
    """Whether files of sentence-transformers count: beside a classifier they do not."""
    if config.get("architectures"):
        return architecture_of(config).names[0] in family_of(config).embedder.names
    return named(config) == "AutoModel"


def read(directory: Path, family: Family, config: dict[str, Any], integers: bool = False) -> dict[str, Any]:
    """Every parameter in the directory under its Flax path and in Flax layout, but those of its dense stages.

    integers: whether matrices that are stored as integers stay so.
    """
    wanted = FACTORS if is_apart(config) else WEIGHTS
    if is_there(directory / wanted):
        tensors = read_tensors(directory / wanted)
    elif wanted == WEIGHTS and is_there(directory / INDEX):
        tensors = read_shards(directory)
    elif wanted == WEIGHTS and is_there(directory / MSGPACK):
        return read_msgpack(directory / MSGPACK)
    else:
        names = sorted(path.name for path in directory.iterdir())
        known = WEIGHTS, INDEX, MSGPACK
        hint = CONVERSION.format(command=conversion(directory, config), wanted=WEIGHTS)
        if wanted == FACTORS:
            known, hint = (FACTORS,), f"{FACTORS} holds what config.json's low_rank names"
        raise ValueError(f"{directory}: got {names}, wanted {' or '.join(known)}: {hint}")
    try:
        return decoded(renamed(tensors, family.from_torch), dtypes_of(config), kept if integers else joined)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def read_stages(directory: Path, stages: Iterable[Stage]) -> dict[str, np.ndarray]:
    """The parameters of the dense layers behind an encoder, which have files of their own."""
    found: dict[str, np.ndarray] = {}
    for stage in stages:
        if isinstance(stage, Projection):
            file = directory / stage.name / WEIGHTS
            if not is_there(file):
                line = CONVERSION.format(command=conversion(directory, {}), wanted=WEIGHTS)
                raise ValueError(f"{file}: the file is missing: {line}")
            found |= {f"{stage.name}/{path}": each for path, each in renamed(read_tensors(file), from_torch).items()}
    return found


def renamed(tensors: dict[str, np.ndarray], from_torch: Callable) -> dict[str, np.ndarray]:
    """The arrays by path, if no two names stand for one. Nothing is left of `tensors`."""
    found: dict[str, np.ndarray] = {}
    bases = {name: base for name in tensors if (base := base_of(name, tensors)) is not None}
    for name in list(tensors):
        path, array = from_torch(bases.get(name, name), tensors.pop(name))
        path += name.removeprefix(bases.get(name, name))  # the end that says what it is of those integers
        if path in found:
            raise ValueError(f"{name}: got a second array for {path}, wanted one")
        found[path] = aligned(array)
    return found


SMALL = ("F8_", "F6_", "F4")  # begin the names of floating numbers that no array here has
ALIGNMENT = 64  # bytes, of memory that JAX uses on a CPU as it lies


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy, in C's order, that JAX on a CPU needs no copy of: with both, a model would take its size twice."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    place = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    place[...] = array
    return place


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file in PyTorch's layout."""
    with file.open("rb") as content:
        check_fetched(file, content.read(64))
    try:
        with safe_open(file, "numpy") as content:
            layout = (content.metadata() or {}).get("format", "pt")
            kinds = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
            readable = {name: kind for name, kind in kinds.items() if not kind.startswith(SMALL)}
            tensors = {name: content.get_tensor(name) for name in readable}
    except Exception as error:  # safetensors has an exception of its own
        size = file.stat().st_size
        raise ValueError(f"{file}: wanted a whole safetensors file; got {size} bytes: {error}") from None
    if layout != "pt":
        raise ValueError(f"{file}: got the layout {layout!r} in its metadata, wanted 'pt', PyTorch's")
    if other := sorted(kinds.keys() - readable.keys()):
        raise ValueError(f"{file}: got {kinds[other[0]]} in {other[0]!r}, wanted floating numbers of 16 bits or more")
    return tensors


def read_shards(directory: Path) -> dict[str, np.ndarray]:
    """The arrays of all files that the index names."""
    index = directory / INDEX
    places = parsed(index.read_bytes(), index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: wanted 'weight_map', an object that names the file of each array")
    found: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not is_there(directory / shard):
            names = sorted(path.name for path in directory.glob("*.safetensors"))
            raise ValueError(f"{index}: got {names}, wanted {shard} too, which it names")
        tensors = read_tensors(directory / shard)
        if repeated := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{directory / shard}: got {repeated[0]!r}, which another file holds too")
        found |= tensors
    if missing := sorted(places.keys() - found.keys()):
        raise ValueError(f"{index}: wanted {missing[0]!r} in {places[missing[0]]}, which does not hold it")
    return found


def read_msgpack(file: Path) -> dict[str, np.ndarray]:
    """The parameters that Flax wrote."""
    content = file.read_bytes()
    check_fetched(file, content[:64])
    try:
        params = msgpack_restore(content)
    except Exception as error:  # msgpack has exceptions of its own
        raise ValueError(f"{file}: wanted a whole file of Flax's; got {len(content)} bytes: {error}") from None
    return {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
