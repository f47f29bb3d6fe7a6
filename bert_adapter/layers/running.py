"""Any Linen model runs on factorised parameters, unmodified."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.layers.integers import Integers
from bert_adapter.layers.layer import Axes, matrix_shape, split
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.observing import Site, observing, on_factors
from bert_adapter.layers.places import is_table, kernel_path


@contextmanager
def factorised() -> Iterator[None]:
    """Inside, every Linen model runs on dense and on factorised parameters: x @ left @ right + bias.

    A factorised table of `nn.Embed` is looked up in `left`, and what is found is multiplied by `right`.

    Works for any module that calls the layers in `LAYERS`, transformers' Flax models among them. Under jit it is the
    trace that must happen inside.

    Example:
        >>> import flax.linen as nn, numpy as np, bert_adapter
        >>> layer = {"kernel": bert_adapter.FACTORISED, "left": np.ones((3, 1)), "right": np.ones((1, 2))}
        >>> with bert_adapter.factorised():
        ...     print(nn.Dense(2, use_bias=False).apply({"params": layer}, np.ones((1, 3))))
        [[3. 3.]]
    """
    with nn.intercept_methods(on_factors):
        yield


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply({"params": params}, ...)` for parameters that may be factorised.

    Example:
        >>> import flax.linen as nn, numpy as np, bert_adapter
        >>> layer = {"kernel": bert_adapter.FACTORISED, "left": np.ones((3, 1)), "right": np.ones((1, 2))}
        >>> print(bert_adapter.apply(nn.Dense(2, use_bias=False), layer, np.ones((1, 3))))
        [[3. 3.]]
    """
    with factorised():
        return module.apply({"params": runnable(params)}, *args, **kwargs)


def runnable(params: Any) -> Any:
    """The parameters as a module can run on them: what stays integers is tables, of which rows are looked up.

    A dense table is a factor without another.
    """
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    kept = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Integers)}
    if not kept:
        return params
    for path, leaf in kept.items():
        layer, _, name = path.rpartition("/")
        if is_table(path):
            flat |= {path: FACTORISED, f"{layer}/left": leaf}
        elif not (name == "left" and is_table(kernel_path(flat, layer))):
            flat[path] = leaf.whole()
    return unflatten_dict(flat, sep="/")


def kernel_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The matrix shape (m, n) of every kernel or table that can be factorised, by the path of its layer.

    Nothing is computed.
    """
    return {path: matrix_shape(axes) for path, axes in parameter_shapes(module)[1].items()}


def parameter_shapes(module: nn.Module) -> tuple[Any, dict[str, Axes]]:
    """The dense parameters as shapes, and the axes of those kernels that can be factorised, by path."""
    found: dict[str, Axes] = {}

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        if site.layer is not None:
            found[site.path] = split(site.param(site.layer.kernel).shape, site.layer.input_axes(site.module))
        return outputs

    with observing(note):
        params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return params, found
