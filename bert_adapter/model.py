"""A module with its parameters, its config and its small files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
from flax.traverse_util import flatten_dict

from bert_adapter.families import family_of, is_known
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.running import apply
from bert_adapter.own import Called, Own
from bert_adapter.values import check_arrays, check_values

__all__ = ["Model", "check_batch", "check_family", "forward", "is_own", "on", "training_forward"]


class Model(NamedTuple):
    """A module, the parameters it runs with, and what else its checkpoint holds.

    The arrays lie on the host as they were read; `jax.device_put` them once before a loop.

    module: of a family, or any other of Linen's, whose config and files may be empty.
    forward: (params, batch) -> output, where that is not the module's own call with what a batch holds.

    Example:
      >>> import flax.linen as nn, numpy as np, bert_adapter
      >>> model = bert_adapter.Model(nn.Dense(2), {"kernel": np.eye(2)}, config={}, files={})
      >>> bert_adapter.apply(model.module, model.params | {"bias": np.zeros(2)}, np.ones((1, 2))).shape
      (1, 2)
    """

    module: nn.Module
    params: dict[str, Any]
    config: dict[str, Any]  # config.json's, with a "low_rank" section once compressed
    files: dict[str, bytes]  # the tokenizer's and other small files, by name
    forward: Forward | None = None


def on(model: Model, params: Any) -> Model:
    """The model with other parameters; its config forgets the ranks where none of them is a factor."""
    flat = flatten_dict(params, keep_empty_nodes=True)
    config = dict(model.config)
    if not any(isinstance(leaf, Factorised) for leaf in flat.values()):
        section = {name: value for name, value in (config.pop("low_rank", None) or {}).items() if name != "dtypes"}
        config |= {"low_rank": section | {"ranks": {}}} if section.get("heads") else {}
    return model._replace(params=params, config=config)


def forward(model: Model) -> Forward:
    """The function (params, batch) -> output of the model's module, dropout off; keys it does not take are ignored.

    The same function for the same module, so that what is compiled for it once serves again. A module of no family is
    called with the entries of a batch that its `__call__` takes by name, or as `Model.forward` does it.

    Example:
        >>> import jax, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model()
        >>> (batch,) = bert_adapter.text_batches(model, ["a red fox runs", "a dog"])
        >>> jax.jit(bert_adapter.forward(model))(model.params, batch).shape
        (2, 16)
    """
    check_model(model)
    if model.forward is not None:
        return model.forward
    if is_own(model):
        return Own(Called(model.module))
    family = family_of(model.config)
    return forward_of(model.module, family.inputs, tuple(family.sizes(model.module.config).items()))


def is_own(model: Any) -> bool:
    """Whether the module is the caller's own: of no family in `FAMILIES`, or brought without a config."""
    check_model(model)
    return not is_known(model.module) or (isinstance(model.forward, Own) and not model.config.get("model_type"))


def check_model(model: Any) -> None:
    """A ValueError for what is no `Model`."""
    if not isinstance(model, Model):
        made = "bert_adapter.load(directory) and bert_adapter.as_model(...) make one"
        raise ValueError(f"model: got {type(model).__name__}, wanted a Model: {made}")


def check_family(model: Any, wanted: str) -> None:
    """A ValueError for a caller's own module, which knows nothing of texts, labels and heads."""
    if is_own(model):
        kind = type(model.module).__name__
        raise ValueError(f"got a model of your own, {kind}, which {wanted}")


@lru_cache(maxsize=32)
def forward_of(module: Any, inputs: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Forward:
    """One function for each module and what it takes."""
    return Run(module, inputs, sizes)


@dataclass(frozen=True)
class Run:
    """(params, batch) -> output; the names of the inputs, and how many values each may have."""

    module: Any
    inputs: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]

    def __call__(self, params: Any, batch: Batch) -> Any:
        check_values(dict(self.sizes), batch)
        return apply(self.module, params, **{name: batch[name] for name in self.inputs if name in batch})


def check_same_tokens(model: Model, other: Model, name: str) -> None:
    """A ValueError unless both read token ids of one number."""
    sizes = [dict(getattr(forward(one), "sizes", ())).get("input_ids") for one in (model, other)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}: got a model of {sizes[1]} tokens, wanted {sizes[0]} as the model has: their ids are not the same"
        )


def check_batch(forward: Forward, batch: Any, number: int) -> None:
    """A ValueError if a batch is none, or holds values that the model does not know: a program could not say so."""
    check_arrays(batch, number)
    try:
        check_values(dict(getattr(forward, "sizes", ())), batch)
    except ValueError as error:
        raise ValueError(f"batch {number}: {error}") from None


def training_forward(model: Model) -> Callable[[Any, Batch, Any], Any]:
    """The function (params, batch, key) -> output, with dropout drawn from the key.

    Where the caller's forward takes no key it has no dropout.
    """
    run: Any = forward(model)
    if isinstance(run, Own):
        return run
    if model.forward is not None:
        return lambda params, batch, key: run(params, batch)
    return training_forward_of(model.module, family_of(model.config).inputs)


@lru_cache(maxsize=32)
def training_forward_of(module: Any, inputs: tuple[str, ...]) -> Callable[[Any, Batch, Any], Any]:
    """The function (params, batch, key) -> output, with dropout drawn from the key."""

    def run(params: Any, batch: Batch, key: Any) -> Any:
        given = {name: batch[name] for name in inputs if name in batch}
        return apply(module, params, **given, deterministic=False, rngs={"dropout": key})

    return run
