"""Objects of transformers' Flax classes, which run, save and load factors as their classes do kernels."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint import load, save
from bert_adapter.checkpoint.directory import FACTORS, PARAMETERS
from bert_adapter.checkpoint.names import by_path, heads_of
from bert_adapter.checkpoint.own import load_own
from bert_adapter.families import family_of, flax_architectures
from bert_adapter.files import path_of
from bert_adapter.head_sizes import whole_sizes, widened
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.running import factorised
from bert_adapter.model import Model, on
from bert_adapter.own import Own, arguments


def is_flax_model(model: Any) -> bool:
    """Whether it is an object of one of transformers' Flax classes."""
    return any(kind.__name__ == "FlaxPreTrainedModel" for kind in type(model).__mro__)


@dataclass(frozen=True, eq=False)
class Called:
    """(params, batch, key) -> what the object returns, in training if there is a key."""

    model: Any

    def __call__(self, params: Any, batch: Batch, key: Any = None) -> Any:
        """The output."""
        given = arguments(type(self.model).__call__, batch) | (
            {} if key is None else {"train": True, "dropout_rng": key}
        )
        return self.model(**given | {"params": params})


def of_flax(model: Any) -> Model:
    """The `Model` of an object: of the family that knows its class, or else of its own module."""
    known = flax_architectures()
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in known), None)
    if name is None:
        return Model(model.module, model.params, model.config.to_dict(), {}, forward=Own(Called(model)))
    model_type, architecture = known[name]
    config = model.config.to_dict() | {"model_type": model_type, "architectures": [architecture.names[0]]}
    module = architecture.module(family_of(config).config(config))
    return Model(architecture.fit(module, by_path(model.params)), model.params, config, {})


def with_params_of(model: Any, small: Model) -> Any:
    """A copy of the object with other parameters, and the section of its config that says which have which rank.

    Heads of fewer dimensions are widened: its class has none.
    """
    small = widened(small, whole_sizes(small)) if heads_of(small.config) else small
    made, config = copy.copy(model), copy.deepcopy(model.config)
    if "low_rank" in small.config:
        config.low_rank = small.config["low_rank"]
    elif hasattr(config, "low_rank"):
        del config.low_rank
    made._config, made._params, made._is_initialized = config, small.params, True
    made.__class__ = on_factors(type(model))
    return made


@lru_cache(maxsize=64)
def on_factors(kind: Any) -> Any:
    """The subclass of a Flax class whose objects run on factors and are kept in directories of ours."""
    if hasattr(kind, "of"):
        return kind

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class does, on dense and on factorised parameters."""
        with factorised():
            return kind.__call__(self, *args, **kwargs)

    def save_pretrained(self: Any, save_directory: str | Path, params: Any = None, **others: Any) -> None:
        """The directory holds what `bert_adapter.save` writes: factors under a name that transformers does not read."""
        if asked := [name for name, value in others.items() if value]:
            wanted = "save_directory and params; huggingface_hub uploads a directory"
            raise ValueError(f"save_pretrained: got {', '.join(asked)}, supported: {wanted}")
        model = of_flax(self)
        save(model if params is None else on(model, params), save_directory)

    def from_pretrained(cls: Any, directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The object that was saved there, or, from a directory of transformers', what its class loads."""
        place = path_of(directory)
        directory = place if place.is_dir() else directory
        if not any((place / name).is_file() for name in (FACTORS, PARAMETERS)):
            return with_params_of(dense := kind.from_pretrained(directory, *args, **kwargs), of_flax(dense))
        blank = kind(kind.config_class.from_pretrained(directory), *args, _do_init=False, **kwargs)
        if (place / PARAMETERS).is_file():
            shapes = Model(blank.module, blank.params_shape_tree, {}, {})
            return with_params_of(blank, load_own(place, shapes))
        return with_params_of(blank, load(directory))

    methods = {"__call__": call, "save_pretrained": save_pretrained, "from_pretrained": classmethod(from_pretrained)}
    return type(kind.__name__, (kind,), methods | {"of": kind, "__module__": __name__})
