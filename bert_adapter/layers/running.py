"""Any Linen model runs on factorised parameters, unmodified."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn

from bert_adapter.layers.dense import two_products


@contextmanager
def factorised() -> Iterator[None]:
    """Inside, every Linen model runs on dense and on factorised parameters alike: x @ left @ right + bias.

    Works for any module that calls `flax.linen.Dense`, transformers' Flax models among them. Under jit it is the trace
    that must happen inside.
    """
    with nn.intercept_methods(two_products):
        yield


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply({"params": params}, ...)` for parameters that may be factorised."""
    with factorised():
        return module.apply({"params": params}, *args, **kwargs)
