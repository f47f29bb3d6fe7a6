"""Every layer as it is called, whatever model calls it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn

from bert_adapter.layers import LAYERS
from bert_adapter.layers.layer import Layer, moved, moved_back
from bert_adapter.layers.places import kernel_names


class Site(NamedTuple):
    """A layer, or another module with a kernel or a table, as it is called.

    layer: the kind; None if the module cannot be factorised.
    param: (name) -> its parameter as the call sees it, or None.
    """

    path: str
    module: Any
    layer: Layer | None
    param: Callable[[str], Any]


Touch = Callable[[Site, Any, Any], Any]  # (site, inputs, outputs) -> what stands in the place of the outputs
Enter = Callable[[Site, Any], Any]  # (site, inputs) -> what the layer is called with in their place
TOUCH: ContextVar[Touch | None] = ContextVar("touch", default=None)  # for models that are not Linen's
ENTER: ContextVar[Enter | None] = ContextVar("enter", default=None)
ON_FACTORS: ContextVar[Touch | None] = ContextVar("on_factors", default=None)  # for layers that run on factors


def layer_of(module: Any) -> Layer | None:
    """The kind of layer, the one registered last if there are several; None if it cannot be factorised."""
    kind = next((layer for layer in reversed(LAYERS.values()) if isinstance(module, layer.module)), None)
    return None if kind is None or kind.why_not(module) else kind


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a layer is called with; None for a module that is called with nothing."""
    return next(iter((*args, *kwargs.values())), None)


def entered(enter: Enter | None, site: Site, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with what `enter` makes of a layer's input, in the place where `layer_input` finds it."""
    if enter is None or site.layer is None:
        return args, kwargs
    inputs = enter(site, layer_input(args, kwargs))
    if args:
        return (inputs, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): inputs}


@contextmanager
def observing(touch: Touch, enter: Enter | None = None, factors: bool = False) -> Iterator[None]:
    """Inside, every call of a module that has a kernel or a table of its own is seen, and its outputs replaced.

    enter: replaces the inputs of those that have it before they are called.
    factors: those that run on factors too, whose kernel is no array.
    """

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return next_fun(*args, **kwargs)
        its_args, its_kwargs = entered(enter, site_of(module), args, kwargs)
        outputs = next_fun(*its_args, **its_kwargs)
        if not has_kernel(module):
            return outputs
        if factors and module.has_variable("params", "left") and layer_of(module) is not None:
            return outputs  # seen by `on_factors`, which may be the outer one of both
        return touch(site_of(module), layer_input(args, kwargs), outputs)

    token, inner, outer = TOUCH.set(touch), ON_FACTORS.set(touch if factors else None), ENTER.set(enter)
    try:
        with nn.intercept_methods(on_factors), nn.intercept_methods(interceptor):
            yield
    finally:
        TOUCH.reset(token)
        ON_FACTORS.reset(inner)
        ENTER.reset(outer)


def has_kernel(module: nn.Module) -> bool:
    """Whether a Linen module has a kernel or a table of its own; a module inside it may be called so too."""
    found = [module.get_variable("params", name) for name in kernel_names()]
    return any(each is not None and not isinstance(each, Mapping) for each in found)


def site_of(module: nn.Module) -> Site:
    """A Linen module as it is called."""
    return Site("/".join(module.path), module, layer_of(module), lambda name: module.get_variable("params", name))


def on_factors(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """A layer whose parameters hold factors runs on these."""
    module = context.module
    if (layer := layer_of(module)) is None or context.method_name not in ("__call__", *layer.methods):
        return next_fun(*args, **kwargs)
    if not module.has_variable("params", "left"):
        return next_fun(*args, **kwargs)
    bias = module.get_variable("params", "bias") if getattr(module, "use_bias", True) else None
    factors = module.get_variable("params", "left"), module.get_variable("params", "right")
    if context.method_name != "__call__":
        return layer.methods[context.method_name](module, layer_input(args, kwargs), factors)
    inputs, touch = layer_input(args, kwargs), ON_FACTORS.get()
    outputs = run_layer(layer, module, inputs, factors, bias=bias)
    return outputs if touch is None else touch(site_of(module), inputs, outputs)


def run_layer(layer: Layer, module: Any, inputs: Any, factors: tuple[Any, Any], *, bias: Any) -> Any:
    """What the module returns for the kernel that the factors multiply out to."""
    order = layer.order(module, inputs.ndim)
    if not layer.looked_up:
        factors = with_axes(factors, layer.input_axes(module))
    return moved_back(layer.run(module, moved(inputs, order.inputs), factors, bias), order.outputs)


def with_axes(factors: tuple[Any, Any], input_axes: int) -> tuple[Any, Any]:
    """The factors with that many axes of inputs: the matrix does not tell whose an axis of length 1 between both is."""
    left, right = factors
    axes = (*left.shape[:-1], *right.shape[1:])
    return left.reshape(*axes[:input_axes], left.shape[-1]), right.reshape(right.shape[0], *axes[input_axes:])
