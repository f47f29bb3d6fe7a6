"""Checkpoint directories to parameters and back, bit for bit, without PyTorch and without pickle.

A directory is Hugging Face's: config.json, the weights, a tokenizer. Transposes happen in this file alone:
the weight of a PyTorch Linear is (out, in) on disk, a kernel is (in, out) in memory. A factorised kernel is
stored as `<module>.left` (in, k) and `<module>.right` (k, out), never transposed. config.json's "low_rank"
section names the factorised modules and their ranks, so that no other checkpoint is needed to read this one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from bert_adapter.checkpoint.directory import CONFIG, INDEX, MSGPACK, SIDE_FILES, WEIGHTS, fetch, replacing, write_texts
from bert_adapter.checkpoint.names import BUFFERS, by_path, check, encoder_only, from_torch, low_rank, shapes, to_torch
from bert_adapter.families import module_for
from bert_adapter.families.bert import SentenceEmbedder
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.model import Model


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


FLAX_BERTS = ("FlaxBertModel", "FlaxBertForSequenceClassification")


def as_model(model: Model | str | Path | Any) -> Model:
    """The model itself, the one in a directory, or a transformers FlaxBert's parameters in our module."""
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        return load(model)
    name = type(model).__name__
    if name not in FLAX_BERTS:
        raise ValueError(f"wanted a Model, a directory, or one of transformers' {', '.join(FLAX_BERTS)}; got {name}")
    config = model.config.to_dict() | {"architectures": [name.removeprefix("Flax")]}
    module = module_for(config)
    if isinstance(module, SentenceEmbedder):
        module = module.clone(add_pooling_layer="pooler" in model.params)
    return Model(module, model.params, config, {})


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
