"""What enters and what leaves every layer, with its gradient, in one forward and one backward pass."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.layers.layer import by_step
from bert_adapter.layers.running import called_layer, layer_input, on_factors

Batch = Mapping[str, Any]
Forward = Callable[[Any, Batch], Any]


class Captured(NamedTuple):
    """A model's output, what enters its layers, and how a gradient of the output reaches what leaves them.

    inputs: the same array for all layers that one array enters.
    deltas: (gradient of a scalar with respect to the output) -> its gradients with respect to the layers' outputs.
    """

    output: Any
    inputs: dict[str, Float[Array, "batch time in"]]
    deltas: Callable[[Any], dict[str, Float[Array, "batch time out"]]]


def capture(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> Captured:
    """x and delta of every layer in `paths`: the gradient of its kernel, as a matrix, is sum_bt outer(x_bt, delta_bt).

    `forward(params, batch)` runs a Linen model. Every layer's output gets a zero added, and the gradient with respect
    to that zero is delta, so one backward pass serves all layers and no gradient of a kernel is formed; each call of
    `deltas` is one. Without dropout, unless `forward` asks for it. Holds the activations of one batch.

    Raises:
      ValueError: a path is not a layer of `LAYERS` that `forward` calls, or it is called more than once.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    first: dict[int, str] = {}  # the path of the first layer that an array enters, by the array's id
    shared: dict[str, str] = {}  # the same by the path of each layer
    run = partial(intercepted, forward, params, batch=batch, paths=paths)

    def note(path: str, inputs: Array, outputs: Array) -> Array:
        if path in shapes:
            raise ValueError(f"the layer {path!r} is called more than once: its gradient is no single product")
        shapes[path] = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
        shared[path] = first.setdefault(id(inputs), path)
        return outputs

    jax.eval_shape(lambda: run(touch=note))
    if missing := sorted(paths - shapes.keys()):
        raise ValueError(f"no layer that can be factorised is called under {missing}; called are {sorted(shapes)}")
    zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}

    def perturbed(perturbations: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        seen: dict[str, Array] = {}

        def perturb(path: str, inputs: Array, outputs: Array) -> Array:
            seen[shared[path]] = inputs
            return outputs + perturbations[path]

        return run(touch=perturb), seen

    output, pull, seen = jax.vjp(perturbed, zeros, has_aux=True)

    def deltas(gradient: Any) -> dict[str, Float[Array, "batch time out"]]:
        (found,) = pull(gradient)
        return {path: found[path].reshape(*seen[shared[path]].shape[:2], -1) for path in sorted(paths)}

    return Captured(output, {path: seen[shared[path]] for path in sorted(paths)}, deltas)


def intercepted(
    forward: Forward, params: Any, batch: Batch, paths: frozenset[str], touch: Callable[[str, Array, Array], Array]
) -> Any:
    """The output of `forward`, with the outputs of the layers in `paths` replaced by touch(path, x, y).

    x is what the kernel's rows are multiplied by, (batch, time, m): one array for all layers that the same one enters.
    """
    entered: dict[tuple[int, int], tuple[Any, Array]] = {}  # by id, which is no other array's while this one is held

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        outputs, layer = next_fun(*args, **kwargs), called_layer(context)
        path = "/".join(context.module.path)
        if layer is None or path not in paths:
            return outputs
        array, axes = layer_input(args, kwargs), layer.input_axes(context.module)
        _, steps = entered.setdefault((id(array), axes), (array, by_step(array, axes)))
        return touch(path, steps, outputs)

    with nn.intercept_methods(on_factors), nn.intercept_methods(interceptor):
        return forward(params, batch)
