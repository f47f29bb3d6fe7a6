"""NNX models: their parameters in nested dicts and back, and layers that run on factors.

Imported when such a model is met, for flax.nnx takes a second to import; `LAYERS` then has its layers.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.layers import LAYERS
from bert_adapter.layers.capture import PROBE, Batch
from bert_adapter.layers.dense import summed_last
from bert_adapter.layers.embed import attend, look_up
from bert_adapter.layers.layer import SHARED_WITH, STANDS_FOR, Layer
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.observing import ENTER, TOUCH, Site, entered, layer_input, layer_of, run_layer
from bert_adapter.layers.places import kernel_names
from bert_adapter.own import arguments, takes_key

# The names of what is noted in the modules of others, which may have any other.
PLACE, SECTION = "_bert_adapter_place", "_bert_adapter_low_rank"


def refused(module: Any) -> str | None:
    """Why a Linear, or a LinearGeneral, is no product with one matrix."""
    if getattr(module, "batch_axis", None):
        return "it has a kernel for each index of its batch axes"
    own = getattr(module, "dot_general", None) not in (None, jax.lax.dot_general)
    return "it was given a dot_general of its own" if own or getattr(module, "dot_general_cls", None) else None


def promoted(module: Any, *arrays: Any) -> Any:
    """The arrays in the dtype that a table computes in; its function takes them in a tuple."""
    return module.promote_dtype(arrays, dtype=module.dtype)


LAYERS["nnx_linear"] = Layer(nnx.Linear, input_axes=lambda module: 1, refuses=refused)
LAYERS["nnx_linear_general"] = Layer(
    nnx.LinearGeneral, input_axes=lambda module: len(module.axis), order=summed_last, refuses=refused
)
LAYERS["nnx_embed"] = Layer(
    nnx.Embed,
    input_axes=lambda module: 1,
    run=partial(look_up, promoted=promoted),
    kernel="embedding",
    looked_up=True,
    methods={"attend": partial(attend, promoted=promoted)},
)


def value_of(variable: Any) -> Any:
    """The array that a Param holds; None of what is no Param, such as a module of that name."""
    if not isinstance(variable, nnx.Variable):
        return None
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


@lru_cache(maxsize=256)
def on_factors(kind: type) -> type:
    """The class of layers as this one's, whose kernel became the Params "left" (*in, k) and "right" (k, *out)."""

    def known(self: Any, out_sharding: Any) -> tuple[Layer, tuple[Any, Any]]:
        """The kind of layer, and the factors."""
        if out_sharding is not None:
            raise ValueError(f"out_sharding: got {out_sharding}, wanted none: a factorised layer has two products")
        layer = layer_of(self)
        assert layer is not None
        return layer, (value_of(self.left), value_of(self.right))

    def call(self: Any, inputs: Any, out_sharding: Any = None) -> Any:
        """inputs @ left @ right + bias, or what is looked up."""
        layer, factors = known(self, out_sharding)
        return run_layer(layer, self, jnp.asarray(inputs), factors, bias=value_of(getattr(self, "bias", None)))

    def method(name: str) -> Callable[..., Any]:
        def other(self: Any, inputs: Any, out_sharding: Any = None) -> Any:
            layer, factors = known(self, out_sharding)
            return layer.methods[name](self, jnp.asarray(inputs), factors)

        return other

    names = {name for layer in LAYERS.values() if issubclass(kind, layer.module) for name in layer.methods}
    calls = {"__call__": call} | {name: method(name) for name in names}
    return type(f"LowRank{kind.__name__}", (kind,), calls | {STANDS_FOR: kind, "__module__": __name__})


@lru_cache(maxsize=256)
def announced(kind: type) -> type:
    """The class of modules as this one's whose calls `observing` sees."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        site = Site(getattr(self, PLACE), self, layer_of(self), lambda name: value_of(getattr(self, name, None)))
        its_args, its_kwargs = entered(ENTER.get(), site, args, kwargs)
        outputs, touch = kind.__call__(self, *its_args, **its_kwargs), TOUCH.get()
        return outputs if touch is None else touch(site, layer_input(args, kwargs), outputs)

    return type(kind.__name__, (kind,), {"__call__": call, STANDS_FOR: kind, "__module__": __name__})


@dataclass(frozen=True, eq=False)
class Skeleton:
    """(params, batch) -> what an NNX model returns, without dropout.

    paths: of its Params, in the order of the leaves of their state, whose structure that is.
    rest: the state that is no Params.
    forward: (model, batch) -> output; None if it is called with the entries of a batch by their names. One that takes a
      third argument gets the key of dropout in training, where the model is in its mode for that, and else None.
    """

    graph: Any
    structure: Any
    paths: tuple[str, ...]
    rest: Any
    forward: Callable[..., Any] | None

    def filled(self, params: Any) -> Any:
        """A model with these parameters, where they hold factors with layers that run on them.

        Raises:
          ValueError: parameters that are missing, or that no module has.
        """
        flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
        flat = {path: leaf for path, leaf in flat.items() if hasattr(type(leaf), "dtype") and not marks(path, leaf)}
        leaves = [flat.get(path, jnp.zeros(())) for path in self.paths]
        model = nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves), self.rest)
        placed = {path for path in self.paths if path in flat}
        for path, module in modules(model):
            placed |= {f"{path}/{name}" for name in changed(module, path, flat)}
        if odd := sorted(
            (flat.keys() - placed) | {path for path in self.paths if path not in flat and gone(path, flat)}
        ):
            raise ValueError(f"params: wanted those of the model; these are missing or left over: {odd}")
        return model

    def __call__(self, params: Any, batch: Batch, key: Any = None) -> Any:
        """The output."""
        model, with_key = self.filled(params), self.forward is not None and takes_key(self.forward)
        call = type(model).__call__
        model.train() if with_key and key is not None else model.eval()
        if TOUCH.get() is not None:
            announce(model, params)
        if self.forward is None:
            return model(**arguments(call, batch))
        return self.forward(model, batch, key) if with_key else self.forward(model, batch)


def marks(path: str, leaf: Any) -> bool:
    """Whether it is no parameter: the marker of a kernel, or a zero that a gradient leaves by."""
    return isinstance(leaf, Factorised) or path.rpartition("/")[2].startswith(PROBE)


def gone(path: str, flat: dict[str, Any]) -> bool:
    """Whether a Param of the model has nothing in its place: no kernel for factors, no factors for a kernel."""
    layer, _, name = path.rpartition("/")
    kernels = kernel_names()
    instead = ["left"] if name in kernels else kernels if name in ("left", "right") else []
    return not any(f"{layer}/{other}" in flat for other in instead)


def changed(module: Any, path: str, flat: dict[str, Any]) -> list[str]:
    """The names of the factors, or of the kernel, that take the place of what the module had."""
    layer = layer_of(module)
    if layer is None:
        return []
    if f"{path}/left" in flat and not has_factors(module):
        old, new = [layer.kernel], ["left", "right"]
        module.__class__ = on_factors(type(module))
    elif has_factors(module) and f"{path}/{layer.kernel}" in flat:
        old, new = ["left", "right"], [layer.kernel]
        module.__class__ = getattr(type(module), STANDS_FOR)
    else:
        return []
    for name in old:
        delattr(module, name)
    for name in new:
        setattr(module, name, nnx.Param(jnp.asarray(flat[f"{path}/{name}"])))
    return new


def has_factors(module: Any) -> bool:
    """Whether it is a layer that runs on factors."""
    return value_of(getattr(module, "left", None)) is not None and layer_of(module) is not None


def shared(model: Any) -> dict[str, str]:
    """By the path of a module whose kernel or table lies at another place of the model too, that place."""
    places: dict[int, list[tuple[str, str]]] = {}
    for path, module in modules(model):
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Variable):
                places.setdefault(id(variable), []).append((path, name))
    pairs = (pair for found in places.values() for pair in permutations(found, 2))
    return {path: f"{at}/{other}" for (path, name), (at, other) in pairs if name in kernel_names()}


def modules(model: Any) -> list[tuple[str, Any]]:
    """Every module in the model, by its path."""
    return [("/".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]


def announce(model: Any, params: Any) -> None:
    """The model's layers, and other modules with a kernel or a table, are seen when they are called."""
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    probes = [name.rpartition("/") for name in flat if re.search(f"(^|/){PROBE}[^/]*$", name)]
    others = shared(model)
    for path, module in modules(model):
        if any(value_of(getattr(module, name, None)) is not None for name in (*kernel_names(), "left")):
            module.__class__ = announced(type(module))
            setattr(module, PLACE, path)
            if path in others:
                setattr(module, SHARED_WITH, others[path])
            for name in [name for at, _, name in probes if at == path]:
                setattr(module, name, nnx.Param(flat[f"{path}/{name}"]))


def taken_apart(model: Any, forward: Callable[..., Any] | None) -> tuple[Skeleton, dict[str, Any]]:
    """The skeleton, and the Params in nested dicts, where factors have the marker of their kernel beside them."""
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    paths = ["/".join(str(key.key) for key in path if hasattr(key, "key")) for path, _ in leaves]
    flat: dict[str, Any] = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
    flat |= dict(marked(path, module) for path, module in modules(model) if has_factors(module))
    skeleton = Skeleton(graph, jax.tree.structure(state), tuple(paths), rest=rest, forward=forward)
    return skeleton, unflatten_dict(flat, sep="/")


def marked(path: str, module: Any) -> tuple[str, Factorised]:
    """The path of the kernel of a layer that runs on factors, and what stands for it."""
    layer = layer_of(module)
    assert layer is not None
    stacked = value_of(module.left).ndim - 1 - layer.input_axes(module)  # -1 where `right` has an input's axis of 1
    return f"{path}/{layer.kernel}", Factorised(max(stacked, 0))


def with_params(model: Any, params: Any, config: dict[str, Any]) -> Any:
    """A copy of the NNX model with these parameters, dense or factorised, and what its config says of them."""
    made = taken_apart(model, None)[0].filled(params)
    if "low_rank" in config:
        setattr(made, SECTION, json.dumps(config["low_rank"]))
    elif hasattr(made, SECTION):
        delattr(made, SECTION)
    return made


def config_in(model: Any) -> dict[str, Any]:
    """What the NNX model says of its factors, and of how its matrices are stored."""
    section = getattr(model, SECTION, None)
    return {"low_rank": json.loads(section)} if isinstance(section, str) else {}
