"""Parameters alone in a directory: what is kept of a model whose module is the caller's own."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from bert_adapter.checkpoint.bits import chosen_dtypes, decoded, encoded, factorised_tables
from bert_adapter.checkpoint.directory import CONFIG, PARAMETERS, read_config, replacing, write_texts
from bert_adapter.checkpoint.names import by_path, check, dtypes_of, low_rank, section_of, with_dtypes
from bert_adapter.checkpoint.weights import read_tensors
from bert_adapter.files import path_of, writing_tensors
from bert_adapter.json_files import is_there
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import kernel_path
from bert_adapter.model import Model, on


def save_own(model: Model, directory: str | Path, dtype: str | Mapping[str, str] | None = None) -> None:
    """The directory holds the parameters by their paths, and config.json, whose "low_rank" section has the ranks."""
    params = {path: np.asarray(leaf) for path, leaf in by_path(jax.device_get(model.params)).items()}
    flat = flatten_dict(model.params, keep_empty_nodes=True, sep="/")
    layers = [str(path).rpartition("/")[0] for path, leaf in flat.items() if isinstance(leaf, Factorised)]
    ranks = {path: params[f"{path}/left"].shape[-1] for path in layers}
    section = section_of(model.config.get("low_rank", {}), ranks, dtypes_of(model.config))
    dtypes = chosen_dtypes(dtype, params, dtypes_of(model.config))
    check({path: leaf.shape for path, leaf in params.items()}, params)  # that they are numbers that `load_own` takes
    config = with_dtypes(on(model, model.params).config | ({"low_rank": section} if ranks else {}), dtypes)
    arrays = encoded(params, dtypes, factorised_tables(model.params))
    with replacing(path_of(directory)) as fresh:
        write_texts(model._replace(config=config), fresh)
        with writing_tensors(fresh / PARAMETERS):
            save_file({path: np.require(leaf, requirements="C") for path, leaf in arrays.items()}, fresh / PARAMETERS)
        shutil.copymode(fresh / CONFIG, fresh / PARAMETERS)  # safetensors writes for the owner's eyes only


def load_own(directory: Path, into: Model) -> Model:
    """The model with the directory's parameters in place of its own, whose shapes say what is wanted.

    Raises:
      ValueError: the directory holds something else, or parameters of another module.
    """
    if not is_there(directory / PARAMETERS):
        raise ValueError(
            f"{directory}: got no {PARAMETERS}, wanted what save(model, directory) wrote of your own model"
        )
    config = read_config(directory)
    try:
        found = decoded(read_tensors(directory / PARAMETERS), dtypes_of(config))
    except ValueError as error:
        said = str(error)
        raise ValueError(said if str(directory) in said else f"{directory}: {said}") from None
    dense: dict[str, Any] = flatten_dict(into.params, sep="/")
    if done := [path for path, leaf in dense.items() if isinstance(leaf, Factorised)]:
        raise ValueError(f"model: got one whose {done[0]} is factorised, wanted the dense one, whose shapes are known")
    wanted = {path: leaf.shape for path, leaf in dense.items()}
    params: dict[str, Any] = dict(found)
    for path, rank in low_rank(config).items():
        place = kernel_path(wanted, path)
        kernel = wanted.pop(place, ())
        left, right = found.get(f"{path}/left"), found.get(f"{path}/right")
        if left is None or right is None:
            raise ValueError(
                f"{directory}: config.json has the rank {rank} for {path}, and {PARAMETERS} no factors of it"
            )
        stacked = left.ndim + right.ndim - 2 - len(kernel)
        stack, inputs = kernel[: max(stacked, 0)], left.ndim - 1
        wanted |= {f"{path}/left": (*kernel[:inputs], rank), f"{path}/right": (*stack, rank, *kernel[inputs:])}
        params[place] = Factorised(stacked)
    check(wanted, found)
    return into._replace(params=unflatten_dict(params, sep="/"), config=into.config | config)


def describes_own(directory: Path) -> bool:
    """Whether the directory holds parameters alone."""
    return is_there(directory / PARAMETERS)
