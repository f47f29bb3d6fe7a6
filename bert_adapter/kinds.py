"""Kinds of models that callers bring and get back: ours, Linen's, NNX's, and objects of transformers' Flax classes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
from flax.core import unfreeze

from bert_adapter.checkpoint import load
from bert_adapter.checkpoint.directory import fetch
from bert_adapter.checkpoint.own import load_own
from bert_adapter.families import flax_architectures
from bert_adapter.flax_objects import is_flax_model, of_flax, on_factors, with_params_of
from bert_adapter.model import Model, is_own, on
from bert_adapter.model import forward as function_of
from bert_adapter.own import Called, Own


def as_model(model: Any, *, forward: Callable[..., Any] | None = None, output: int | str | None = None) -> Model:
    """The model itself, the one in a directory, or a `Model` of whatever else `compress` takes.

    That of an object of transformers' FlaxBertModel, or another that a family knows, has our module.

    Args:
      model, forward, output: as in `compress`.

    Raises:
      ValueError: none of these; a Linen module without its parameters.

    Example:
        >>> import flax.linen as nn, numpy as np, bert_adapter
        >>> net = nn.Sequential([nn.Dense(2, use_bias=False)])
        >>> model = bert_adapter.as_model(
        ...     (net, {"layers_0": {"kernel": np.eye(2)}}),
        ...     forward=lambda params, batch: net.apply({"params": params}, batch["x"]),
        ... )
        >>> bert_adapter.forward(model)(model.params, {"x": np.ones((1, 2))}).shape
        (1, 2)
    """
    if is_nnx(model):
        from bert_adapter.nnx_models import config_in, taken_apart

        skeleton, params = taken_apart(model, forward)
        return Model(model, params, config_in(model), {}, forward=Own(skeleton, output))
    found = as_it_is(model)
    if forward is None and output is None:
        return found
    run = function_of(found)
    return found._replace(forward=Own(forward or (run.run if isinstance(run, Own) else run), output))


def as_it_is(model: Any) -> Model:
    """The model, called as is usual for its kind."""
    name = type(model).__name__
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        return load(model)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        return of_linen(*model)
    if is_flax_model(model):
        return of_flax(model)
    if isinstance(model, nn.Module):
        raise ValueError(f"got the module {name} without parameters, wanted it with them: ({name}(...), params)")
    raise ValueError(
        f"wanted a Model, a directory, (module, params) of Linen's, a module of NNX's, or an object of a Flax class of "
        f"transformers', {', '.join(flax_architectures())} among them; got {name}"
    )


def of_linen(module: nn.Module, params: Any) -> Model:
    """A Linen module with its parameters, without the boxes that say where they lie."""
    name = type(module).__name__
    if not hasattr(params, "keys"):
        raise ValueError(f"params: got {type(params).__name__}, wanted nested dicts: ({name}(...), params)")
    if "params" in params and not any(hasattr(leaf, "ndim") for leaf in params.values()):
        others = f"; {sorted(others)} go into a forward= of yours" if (others := params.keys() - {"params"}) else ""
        raise ValueError(f"params: got the variables {sorted(params)} of {name}, wanted variables['params']{others}")
    return Model(module, unfreeze(nn.meta.unbox(params)), {}, {}, forward=Own(Called(module)))


def is_nnx(model: Any) -> bool:
    """Whether it is a module of NNX's, without importing that."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def in_kind(model: Any, small: Model) -> Any:
    """What the caller gets for a model: one of the same kind."""
    if is_nnx(model):
        from bert_adapter.nnx_models import with_params as filled

        return filled(model, small.params, small.config)
    return with_params_of(model, small) if is_flax_model(model) else small


def with_params(model: Any, params: Any) -> Any:
    """A copy of the model, of the same kind, with other parameters: dense, factorised, trained or merged.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> small, _ = bert_adapter.compress(sample_model(), [], rank=2, signal="svd")
        >>> merged = bert_adapter.with_params(small, bert_adapter.merge(small.params))
        >>> merged.params["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"].shape
        (16, 24)
    """
    return in_kind(model, on(as_model(model), params))


def load_into(directory: str | Path, model: Any) -> Any:
    """The model, of the same kind, with the parameters that `save` wrote to the directory.

    Args:
      model: dense, as `compress` takes it, whose parameters give the shapes; or one of transformers' Flax classes.

    Raises:
      ValueError: the directory holds something else, or parameters that are not this model's.

    Example:
        >>> import tempfile, flax.linen as nn, numpy as np, bert_adapter
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(8, use_bias=False, name="layer")(x)
        >>> dense = Net(), {"layer": {"kernel": np.eye(8)}}
        >>> small, _ = bert_adapter.compress(dense, [{"x": np.ones((2, 8))}], rank=2, signal="svd")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     bert_adapter.save(small, directory)
        ...     bert_adapter.load_into(directory, dense).params["layer"]["left"].shape
        (8, 2)
    """
    if isinstance(model, type):
        return on_factors(model).from_pretrained(directory)
    dense = as_model(model)
    return in_kind(model, load_own(fetch(directory), dense) if is_own(dense) else load(directory))
