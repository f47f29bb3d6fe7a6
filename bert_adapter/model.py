"""A module with its parameters, its config and its small files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn

from bert_adapter.families import family_of, module_for
from bert_adapter.families.bert import Bert
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.layers.running import apply
from bert_adapter.values import check_values

__all__ = ["Bert", "Model", "check_batch", "forward", "module_for", "training_forward_of"]


class Model(NamedTuple):
    """A module, the parameters it runs with, and what else its checkpoint holds.

    The arrays lie on the host as they were read; `jax.device_put` them once before a loop.

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


def forward(model: Model) -> Forward:
    """The function (params, batch) -> output of the model's module, dropout off; keys it does not take are ignored.

    The same function for the same module, so that what is compiled for it once serves again.

    Example:
        >>> import jax, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model()
        >>> (batch,) = bert_adapter.text_batches(model, ["a red fox runs", "a dog"])
        >>> jax.jit(bert_adapter.forward(model))(model.params, batch).shape
        (2, 16)
    """
    family = family_of(model.config)
    return forward_of(model.module, family.inputs, tuple(family.sizes(model.module.config).items()))


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


def check_batch(forward: Forward, batch: Batch, number: int) -> None:
    """A ValueError if a batch holds values that the model does not know: a compiled program could not say so."""
    try:
        check_values(dict(getattr(forward, "sizes", ())), batch)
    except ValueError as error:
        raise ValueError(f"batch {number}: {error}") from None


@lru_cache(maxsize=32)
def training_forward_of(module: Any, inputs: tuple[str, ...]) -> Callable[[Any, Batch, Any], Any]:
    """The function (params, batch, key) -> output, with dropout drawn from the key."""

    def run(params: Any, batch: Batch, key: Any) -> Any:
        given = {name: batch[name] for name in inputs if name in batch}
        return apply(module, params, **given, deterministic=False, rngs={"dropout": key})

    return run
