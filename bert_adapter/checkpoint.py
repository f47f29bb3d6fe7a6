"""Checkpoint directories to parameters and back, bit for bit, without PyTorch and without pickle.

A directory is Hugging Face's: config.json, the weights, a tokenizer. Transposes happen in this file alone:
the weight of a PyTorch Linear is (out, in) on disk, a kernel is (in, out) in memory. A factorised kernel is
stored as `<module>.left` (in, k) and `<module>.right` (k, out), never transposed. config.json's "low_rank"
section names the factorised modules and their ranks, so that no other checkpoint is needed to read this one.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from bert_adapter.apply import FACTORISED
from bert_adapter.model import SentenceEmbedder, module_for

SCHEMA = 1  # of the "low_rank" section
CONFIG, MSGPACK = "config.json", "flax_model.msgpack"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
SENTENCE_TRANSFORMERS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
SIDE_FILES = (*TOKENIZER, "added_tokens.json", *SENTENCE_TRANSFORMERS, "1_Pooling/config.json")
CHECKPOINT_FILES = (CONFIG, WEIGHTS, INDEX, "model-*.safetensors", *SIDE_FILES)
BUFFERS = ("embeddings/position_ids", "embeddings/token_type_ids")  # constants that old checkpoints store

Texts = Sequence[str] | Sequence[tuple[str, str]]
Tokenizer = Callable[[Texts], dict[str, np.ndarray]]


class Model(NamedTuple):
    """A module, the parameters it runs with, and what else its checkpoint holds.

    The arrays lie on the host as they were read; `jax.device_put` them once before a loop.
    """

    module: nn.Module
    params: dict[str, Any]
    config: dict[str, Any]  # config.json's, with a "low_rank" section once compressed
    files: dict[str, bytes]  # the tokenizer's and other small files, by name


def load(path_or_hub_id: str | Path) -> Model:
    """The model in a local directory, or else the one that the Hugging Face Hub has under that name.

    Reads `model.safetensors`, whole or sharded, or else `flax_model.msgpack`. A checkpoint with pretraining
    heads is read as its encoder, whose config then says "BertModel". An encoder that was saved without a
    pooler has none here, because no embedding depends on it. Any other parameter that is missing, and every
    one that is left over or has another shape, is an error.
    """
    directory = fetch(path_or_hub_id)
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    module, found, ranks = module_for(config), read(directory), low_rank(config)
    if isinstance(module, SentenceEmbedder):
        found, config = encoder_only(found), config | {"architectures": ["BertModel"]}
        module = module.clone(add_pooling_layer=any(path.startswith("pooler/") for path in found))
    check(shapes(module, ranks), found)
    params = unflatten_dict(found | {f"{path}/kernel": FACTORISED for path in ranks}, sep="/")
    files = {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).is_file()}
    return Model(module, params, config, files)


def save(model: Model, directory: str | Path) -> None:
    """`directory` holds the model as `load` reads it, or, if anything fails, what it held before.

    A checkpoint that is there already is replaced; a directory that holds any other file is refused.
    """
    params = by_path(jax.device_get(model.params))
    lefts = {path.removesuffix("/left"): leaf for path, leaf in params.items() if path.endswith("/left")}
    ranks, claimed = {path: leaf.shape[-1] for path, leaf in lefts.items()}, low_rank(model.config)
    if ranks != claimed:
        raise ValueError(f"config low_rank ranks: got {claimed}, wanted those of the parameters, {ranks}")
    if unknown := model.files.keys() - set(SIDE_FILES):
        raise ValueError(f"files: got {sorted(unknown)}, supported: {', '.join(SIDE_FILES)}")
    check(shapes(model.module, ranks), params)
    tensors = dict(to_torch(path, array) for path, array in params.items())
    with replacing(Path(directory)) as fresh:
        write_texts(model, fresh)
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)  # safetensors writes for the owner's eyes only


def tokenizer(model: Model, max_length: int = 128, multiple_of: int = 16) -> Tokenizer:
    """A function from texts, or pairs of texts, to the int32 arrays that the model's module takes by name.

    Rows are cut at max_length, or at the model's last position, and padded to the longest of them rounded up
    to a multiple of multiple_of: few lengths are few compilations. The lengths in tokenizer.json are
    overruled.
    """
    from transformers import AutoTokenizer

    if not model.files.keys() & {"tokenizer.json", "vocab.txt"}:
        raise ValueError(f"files: got {sorted(model.files)}, wanted tokenizer.json or vocab.txt")
    with tempfile.TemporaryDirectory() as directory:
        write_texts(model, Path(directory))
        tokenize = AutoTokenizer.from_pretrained(directory)
    limit = min(max_length, model.module.config.max_position_embeddings)
    padding = {"input_ids": tokenize.pad_token_id, "attention_mask": 0, "token_type_ids": 0}

    def encode(texts: Texts) -> dict[str, np.ndarray]:
        columns = [list(texts)] if isinstance(texts[0], str) else map(list, zip(*texts, strict=True))
        rows = tokenize(*columns, truncation=True, max_length=limit, return_token_type_ids=True)
        longest = max(map(len, rows["input_ids"]))
        length = min(-(-longest // multiple_of) * multiple_of, limit)
        return {
            name: np.array([row + [value] * (length - len(row)) for row in rows[name]], np.int32)
            for name, value in padding.items()
        }

    return encode


def fetch(path_or_hub_id: str | Path) -> Path:
    """A directory with the checkpoint's files; of a checkpoint on the Hub, only the files that are read."""
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    try:
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(CHECKPOINT_FILES)))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(str(path_or_hub_id), allow_patterns=[MSGPACK])
        return directory
    except Exception as error:  # each release of huggingface_hub has exceptions of its own
        wanted = "a local directory or the name of a model on the Hugging Face Hub"
        raise ValueError(f"got {str(path_or_hub_id)!r}, wanted {wanted}: {error}") from error


def read(directory: Path) -> dict[str, np.ndarray]:
    """Every parameter in the directory under its Flax path and in Flax layout; buffers are left out."""
    if (directory / WEIGHTS).is_file():
        shards = {WEIGHTS}
    elif (directory / INDEX).is_file():
        shards = set(json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values())
    elif (directory / MSGPACK).is_file():
        return by_path(msgpack_restore((directory / MSGPACK).read_bytes()))
    else:
        names = sorted(path.name for path in directory.iterdir())
        raise ValueError(f"{directory}: got {names}, wanted {WEIGHTS}, {INDEX} or {MSGPACK}")
    tensors = (item for shard in sorted(shards) for item in load_file(directory / shard).items())
    found = dict(from_torch(name, tensor) for name, tensor in tensors)
    return {path: array for path, array in found.items() if not path.endswith(BUFFERS)}


def by_path(params: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, "encoder/layer/0/...". FACTORISED is no leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def from_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """A PyTorch parameter's Flax path and value. In the oldest, LayerNorm has gamma and beta."""
    *parents, leaf = name.split(".")
    parent = ["", *parents][-1]
    weight = "scale" if parent == "LayerNorm" else "embedding" if parent.endswith("_embeddings") else "kernel"
    leaf = {"weight": weight, "gamma": "scale", "beta": "bias"}.get(leaf, leaf)
    return "/".join([*parents, leaf]), tensor.T if leaf == "kernel" else tensor


def to_torch(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A Flax parameter's PyTorch name and value; contiguous, for safetensors writes the memory as it lies."""
    *parents, leaf = path.split("/")
    name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*parents, name]), np.ascontiguousarray(array.T if leaf == "kernel" else array)


def encoder_only(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's parameters: without the pretraining heads, and without the prefix it has beside heads."""
    encoder = {path: array for path, array in found.items() if not path.startswith("cls/")}
    prefix = "bert/" if all(path.startswith("bert/") for path in encoder) else ""
    return {path.removeprefix(prefix): array for path, array in encoder.items()}


def low_rank(config: Mapping[str, Any]) -> dict[str, int]:
    """The rank of every module that the config says is factorised."""
    section = config.get("low_rank", {"schema": SCHEMA})
    schema = section.get("schema")
    if schema != SCHEMA:
        raise ValueError(f"config low_rank schema: got {schema}, wanted {SCHEMA}; upgrade bert_adapter to read it")
    return section.get("ranks", {})


def shapes(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the module once the kernels named by `ranks` are factorised."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    full = {path: leaf.shape for path, leaf in by_path(params).items()}
    if unknown := [path for path in ranks if f"{path}/kernel" not in full]:
        raise ValueError(f"config low_rank ranks: got {unknown}, wanted paths of dense modules")
    kept = {path: shape for path, shape in full.items() if path.removesuffix("/kernel") not in ranks}
    left = {f"{path}/left": (full[f"{path}/kernel"][0], rank) for path, rank in ranks.items()}
    right = {f"{path}/right": (rank, full[f"{path}/kernel"][1]) for path, rank in ranks.items()}
    return kept | left | right


def check(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> None:
    """One ValueError lists every parameter that is missing, left over, of another shape, or not floating."""
    got = {
        path: array.shape if jnp.issubdtype(array.dtype, jnp.floating) else f"{array.dtype} {array.shape}"
        for path, array in found.items()
    }
    problems = [
        f"{path}: got {got.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in {**wanted, **got}
        if got.get(path) != wanted.get(path)
    ]
    if problems:
        raise ValueError("the parameters do not fit the model\n  " + "\n  ".join(problems))


def write_texts(model: Model, directory: Path) -> None:
    """config.json and the small files are in the directory."""
    config = json.dumps(model.config, indent=2) + "\n"
    for name, content in (model.files | {CONFIG: config.encode()}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `target` when the block ends, and vanishes if it fails.

    It lies beside `target`, so that taking its place is a rename. Where a directory has to give way it is
    two, and a crash just between them leaves the old one under a name that ends in ".old".
    """
    target = check_target(target)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        fresh.mkdir(parents=True)
        yield fresh
        synchronise(fresh)
        swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


def check_target(target: Path) -> Path:
    """The absolute path, if a checkpoint may be written there."""
    target = target.expanduser().resolve()
    if not replaceable(target):
        raise ValueError(f"{target}: wanted a new or empty directory, or a checkpoint and no other files")
    return target


def replaceable(target: Path) -> bool:
    """Whether nothing but a checkpoint is lost when `target` is deleted."""
    if not target.is_dir():
        return not target.exists()
    paths = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(target).as_posix() for path in paths]
    known = all(any(fnmatch(name, pattern) for pattern in (*CHECKPOINT_FILES, MSGPACK)) for name in names)
    return known and (not names or CONFIG in names)


def synchronise(directory: Path) -> None:
    """The files' contents are on the disk, so that no crash leaves a renamed directory of empty files."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def swap(fresh: Path, target: Path) -> None:
    """`fresh` is called `target`; what was called so is gone, or back in place if the renaming failed."""
    aside = fresh.with_suffix(".old")
    if not target.exists():
        os.rename(fresh, target)
        return
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
