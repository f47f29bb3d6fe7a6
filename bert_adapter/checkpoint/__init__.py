"""Checkpoint directories to parameters and back, bit for bit, without PyTorch and without pickle.

A directory is Hugging Face's: config.json, the weights, a tokenizer. config.json's "low_rank" section names the
factorised modules and their ranks, so that no other checkpoint is needed to read this one.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from bert_adapter.checkpoint.directory import CONFIG, INDEX, MSGPACK, SIDE_FILES, WEIGHTS, fetch, replacing, write_texts
from bert_adapter.checkpoint.names import by_path, check, low_rank, shapes
from bert_adapter.families import architecture_of, family_of, flax_architectures
from bert_adapter.families.family import Family
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.model import Model


def load(path_or_hub_id: str | Path) -> Model:
    """The model in a local directory, or else the one that the Hugging Face Hub has under that name.

    Reads `model.safetensors`, whole or sharded, or else `flax_model.msgpack`. A checkpoint with pretraining
    heads is read as its encoder, whose config then says so. An encoder that was saved without a pooler has
    none here, because no embedding depends on it. Any other parameter that is missing, and every one that is
    left over or has another shape, is an error.

    Example:
        >>> import tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(sample_model(), directory)
        ...     bert_adapter.load(directory).config["architectures"]
        ['BertModel']
    """
    directory = fetch(path_or_hub_id)
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    family, architecture, ranks = family_of(config), architecture_of(config), low_rank(config)
    module, found = architecture.module(family.config(config)), read(directory, family)
    found = {path: array for path, array in found.items() if not re.search(architecture.ignored, path)}
    if architecture == family.embedder:
        found = without_prefix(found, family.prefix)
    module = architecture.fit(module, found)
    check(shapes(module, ranks), found)
    params = unflatten_dict(found | {f"{path}/kernel": FACTORISED for path in ranks}, sep="/")
    files = {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).is_file()}
    return Model(module, params, config | {"architectures": [architecture.names[0]]}, files)


def as_model(model: Model | str | Path | Any) -> Model:
    """The model itself, the one in a directory, or the parameters of one of transformers' Flax models in our module.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model()
        >>> bert_adapter.as_model(model) is model
        True
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        return load(model)
    name, known = type(model).__name__, flax_architectures()
    if name not in known:
        raise ValueError(f"wanted a Model, a directory, or one of transformers' {', '.join(known)}; got {name}")
    model_type, architecture = known[name]
    config = model.config.to_dict() | {"model_type": model_type, "architectures": [architecture.names[0]]}
    module = architecture.module(family_of(config).config(config))
    return Model(architecture.fit(module, by_path(model.params)), model.params, config, {})


def save(model: Model, directory: str | Path) -> None:
    """`directory` holds the model as `load` reads it, or, if anything fails, what it held before.

    A checkpoint that is there already is replaced; a directory that holds any other file is refused.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(sample_model(), directory)
        ...     sorted(os.listdir(directory))
        ['config.json', 'model.safetensors', 'tokenizer_config.json', 'vocab.txt']
    """
    params = by_path(jax.device_get(model.params))
    lefts = {path.removesuffix("/left"): leaf for path, leaf in params.items() if path.endswith("/left")}
    ranks, claimed = {path: leaf.shape[-1] for path, leaf in lefts.items()}, low_rank(model.config)
    if ranks != claimed:
        raise ValueError(f"config low_rank ranks: got {claimed}, wanted those of the parameters, {ranks}")
    if unknown := model.files.keys() - set(SIDE_FILES):
        raise ValueError(f"files: got {sorted(unknown)}, supported: {', '.join(SIDE_FILES)}")
    check(shapes(model.module, ranks), params)
    tensors = dict(family_of(model.config).to_torch(path, array) for path, array in params.items())
    with replacing(Path(directory)) as fresh:
        write_texts(model, fresh)
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)  # safetensors writes for the owner's eyes only


def read(directory: Path, family: Family) -> dict[str, np.ndarray]:
    """Every parameter in the directory under its Flax path and in Flax layout."""
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
    return dict(family.from_torch(name, tensor) for name, tensor in tensors)


def without_prefix(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """An encoder's parameters without the prefix that they have where heads lie beside them."""
    stripped = prefix if all(path.startswith(prefix) for path in found) else ""
    return {path.removeprefix(stripped): array for path, array in found.items()}
