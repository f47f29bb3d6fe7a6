"""A module with its parameters, its config and its small files."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from bert_adapter.layers.capture import Batch
from bert_adapter.layers.running import apply


class Model(NamedTuple):
    """A module, the parameters it runs with, and what else its checkpoint holds.

    The arrays lie on the host as they were read; `jax.device_put` them once before a loop.
    """

    module: nn.Module
    params: dict[str, Any]
    config: dict[str, Any]  # config.json's, with a "low_rank" section once compressed
    files: dict[str, bytes]  # the tokenizer's and other small files, by name


def forward(model: Model) -> Callable[[Any, Batch], Any]:
    """The function (params, batch) -> output of the model's module, dropout off; keys it does not take are ignored.

    The same function for the same module, so that what is compiled for it once serves again.
    """
    return forward_of(model.module)


@functools.cache
def forward_of(module: Any) -> Callable[[Any, Batch], Any]:
    inputs = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

    def run(params: Any, batch: Batch) -> Any:
        return apply(module, params, **{name: batch[name] for name in inputs if name in batch})

    return run
