"""Checkpoint directories to parameters and back, bit for bit, without PyTorch and without pickle.

A directory is Hugging Face's: config.json, the weights, a tokenizer. config.json's "low_rank" section names the
factorised modules and their ranks, so that no other checkpoint is needed to read this one.
"""

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from bert_adapter.checkpoint.bits import base_of, chosen_dtypes, encoded, factorised_tables
from bert_adapter.checkpoint.card_file import CARD, card, provenance
from bert_adapter.checkpoint.directory import (
    CONFIG,
    FACTORS,
    WEIGHTS,
    check_names,
    fetch,
    read_config,
    read_texts,
    replacing,
    write_texts,
)
from bert_adapter.checkpoint.names import (
    by_path,
    check,
    dtypes_of,
    heads_of,
    is_apart,
    low_rank,
    markers,
    restored,
    shapes,
    stored,
    with_dtypes,
)
from bert_adapter.checkpoint.own import describes_own, save_own
from bert_adapter.checkpoint.weights import read, read_stages
from bert_adapter.families import architecture_in, family_name, family_of, module_for
from bert_adapter.families.family import Architecture
from bert_adapter.families.sentence import MODULES, SETTINGS, activations, declared_stages, settings, stage_paths
from bert_adapter.families.stages import UNDECLARED, Projection
from bert_adapter.families.torch_names import to_torch
from bert_adapter.files import path_of, writing_tensors
from bert_adapter.head_sizes import check_plain
from bert_adapter.json_files import is_there
from bert_adapter.model import Model, is_own


def load(path_or_hub_id: str | Path, *, integers: bool = False) -> Model:
    """The model in a local directory, or else the one that the Hugging Face Hub has under that name.

    Reads `model.safetensors`, whole or sharded, or else `flax_model.msgpack`; `factorised.safetensors` where the config
    has ranks. A masked LM is read as such, or as its encoder where sentence-transformers' files say that it embeds, or
    where its head is not in the file; other pretraining heads are left out. The config then says so. An encoder, or a
    masked LM, has a pooler if it was saved with one, for heads to come. Any other parameter that is missing, and every
    one that is left over or has another shape, is an error. An encoder embeds as `modules.json` declares: pooling,
    dense layers, scaling to length one; without that file as `1_Pooling/config.json` does, or else it is the mean of a
    text's tokens, unscaled. Outputs of a classifier are logits, whatever activation a cross-encoder declares: a
    warning names one.

    Args:
      integers: whether matrices that are stored as integers stay so in memory, which is then a quarter or an eighth. A
        call multiplies out what it uses: it takes longer for few texts. Such a model is not trained.

    Raises:
      ValueError: names the file, the entry or the parameter that cannot be read or honoured.

    Example:
        >>> import tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(sample_model(), directory)
        ...     bert_adapter.load(directory).config["architectures"]
        ['BertModel']
    """
    directory = fetch(path_or_hub_id)
    if describes_own(directory):
        raise ValueError(f"{directory} holds parameters alone: load_into(directory, (module, params)) reads them")
    config = restored(read_config(directory))
    family, ranks = family_of(config), low_rank(config)
    family.config(config)  # what cannot be is found before weights are read
    found = read(directory, family, config, integers)
    declared = any(is_there(directory / name) for name in (MODULES, f"{stage_paths(None)[0]}/{CONFIG}"))
    architecture = architecture_in(config, found, embeds=declared)
    config = config | {"architectures": [architecture.names[0]]}
    embeds = architecture == family.embedder
    files = read_texts(directory, embeds)
    if not path_of(path_or_hub_id).is_dir():
        files[CARD] = card(provenance(files.get(CARD)) | {"base_model": str(path_or_hub_id)})
    check_settings(files, family.longest(family.config(config)))
    if not embeds:
        for entry, kind in activations(config, files).items():
            warnings.warn(f"{entry}: {kind} is not applied, outputs are logits", stacklevel=2)
    module = module_for(config, files)
    found = {path: array for path, array in found.items() if not re.search(architecture.ignored, path)}
    found = untied(found, architecture)
    if embeds:
        found = without_prefix(found, family.prefix)
    found |= read_stages(directory, getattr(module, "stages", ()))
    module = architecture.fit(module, found)
    check(shapes(module, ranks), found)
    params = unflatten_dict(found | markers(module, ranks), sep="/")
    return Model(module, params, config, files)


def untied(found: dict[str, np.ndarray], architecture: Architecture) -> dict[str, np.ndarray]:
    """Every parameter once: those that are other ones again are left out, once it is known that they are."""
    found = dict(found)
    for again, path in architecture.tied.items():
        if again in found:
            array = found.pop(again)
            array = array.T if again.endswith("/kernel") else array
            if not np.array_equal(found.setdefault(path, array), array):
                raise ValueError(f"{again}: got other numbers than in {path}, wanted the same: the two are tied")
    return found


def check_settings(files: dict[str, bytes], positions: int) -> None:
    """A ValueError for what cannot be; a warning if the files want longer texts than there are positions for."""
    longest = settings(files).longest
    if longest is not None and longest > positions:
        said = f"got max_seq_length {longest}: texts are cut to {positions} tokens, for there are no more positions"
        warnings.warn(f"{SETTINGS}: {said}", stacklevel=3)


def save(model: Model, directory: str | Path, *, dtype: str | Mapping[str, str] | None = None) -> None:
    """`directory` holds the model as `load` reads it, or, if anything fails, what it held before.

    A checkpoint that is there already is replaced; a directory that holds any other file is refused. Of a model of your
    own it holds the parameters alone, for `load_into`.

    Args:
      dtype: what matrices are stored as: "float32", "bfloat16", "float16", "int8" or "int4", or that for each path of a
        layer. By default as the model's config says, or else as they are. "int8" and "int4" are integers, rounded to
        the nearest, with a scale for each row of a table and each column of a kernel or factor, of 4 bits for each 64
        there; config.json names them, and `load` multiplies them out. Norms, biases and the dense layers behind an
        encoder stay as they are.

    Raises:
      ValueError: a model that is not whole, an unknown dtype or path, or a place that may not be written.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(sample_model(), directory)
        ...     print(*sorted(os.listdir(directory)))
        1_Pooling 2_Normalize config.json model.safetensors modules.json tokenizer_config.json vocab.txt
    """
    if is_own(model):
        save_own(model, directory, dtype)
        return
    params = checked(model)
    dtypes = chosen_dtypes(dtype, params, dtypes_of(model.config))
    found = model._replace(config=with_dtypes(model.config, dtypes))
    tensors = encoded(params, dtypes, factorised_tables(model.params))
    config = stored(found.config, family_name(model.config))
    with replacing(path_of(directory)) as fresh:
        write(found._replace(config=config), fresh, by_file(found, tensors))


def with_dtype_of(config: dict[str, Any], tensors: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The config, whose "dtype" is, where it has one, that of most floating numbers in the files: transformers 5 reads,
    and computes, in it. Scales of integers count as the numbers that they make, in 32 bits.
    """
    sizes: Counter[str] = Counter()
    for file in tensors:
        for name, array in file.items():
            if jnp.issubdtype(array.dtype, jnp.floating):
                base = base_of(name, file)
                sizes["float32" if base else str(array.dtype)] += file[base or name].size
    kind = sizes.most_common(1)[0][0]
    return config | {name: kind for name in ("dtype", "torch_dtype") if isinstance(config.get(name), str)}


def checked(model: Model) -> dict[str, np.ndarray]:
    """The parameters by path, on the host, once it is known that module, config and files are theirs."""
    params = {path: np.asarray(leaf) for path, leaf in by_path(jax.device_get(model.params)).items()}
    lefts = {path.removesuffix("/left"): leaf for path, leaf in params.items() if path.endswith("/left")}
    ranks, claimed = {path: leaf.shape[-1] for path, leaf in lefts.items()}, low_rank(model.config)
    if ranks != claimed:
        raise ValueError(f"config low_rank ranks: got {claimed}, wanted those of the parameters, {ranks}")
    check_names(model.files)
    check_stages(model)
    check_heads(model)
    check(shapes(model.module, ranks), params)
    return params


def write(model: Model, directory: Path, tensors: dict[str, dict[str, np.ndarray]]) -> None:
    """The directory holds config.json, the small files, and the tensors in files of these names."""
    write_texts(model._replace(config=with_dtype_of(model.config, tensors.values())), directory)
    for folder in stage_paths(model.files[MODULES]) if MODULES in model.files else ():
        (directory / folder).mkdir(exist_ok=True)  # it may hold no file
    for name, arrays in tensors.items():
        (directory / name).parent.mkdir(exist_ok=True)
        with writing_tensors(directory / name):
            save_file(arrays, directory / name, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / name)  # safetensors writes for the owner's eyes only


def check_heads(model: Model) -> None:
    """A ValueError if the config says other sizes of heads than the module has."""
    check_plain(model)
    runs = getattr(getattr(model.module, "config"), "head_sizes", ())  # noqa: B009
    declared = tuple(tuple(each) for each in heads_of(model.config) or ())
    if runs != declared:
        raise ValueError(f"config low_rank heads: got {declared}, wanted those of the module, {runs}")


def check_stages(model: Model) -> None:
    """A ValueError if the files declare another embedding than the module computes."""
    declared, runs = declared_stages(model.files), getattr(model.module, "stages", None)
    if (UNDECLARED if declared is None and runs is not None else declared) != runs:
        got = "no modules.json" if declared is None else f"modules.json and its folders for {declared}"
        raise ValueError(f"files: got {got}, wanted what declares the module's stages, {runs}")


def by_file(model: Model, params: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each file: those of the dense layers behind the encoder lie in folders of their own."""
    stages = [stage.name for stage in projections(model)]
    main, rename = FACTORS if is_apart(model.config) else WEIGHTS, family_of(model.config).to_torch
    files: dict[str, dict[str, np.ndarray]] = {main: {}}
    for path, array in params.items():
        stage, _, rest = path.partition("/")
        base = base_of(path, params)
        name, tensor = to_torch(rest, array) if stage in stages else rename(base or path, array)
        name += path.removeprefix(base or path)  # the end that says what it is of those integers
        files.setdefault(f"{stage}/{WEIGHTS}" if stage in stages else main, {})[name] = tensor
    return files


def projections(model: Model) -> list[Projection]:
    """The dense layers behind the encoder."""
    return [stage for stage in getattr(model.module, "stages", ()) if isinstance(stage, Projection)]


def without_prefix(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """An encoder's parameters without the prefix that they have where heads lie beside them."""
    stripped = prefix if all(path.startswith(prefix) for path in found) else ""
    return {path.removeprefix(stripped): array for path, array in found.items()}
