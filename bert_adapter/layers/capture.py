"""What enters and what leaves every dense layer, with its gradient, in one forward and one backward pass."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.layers.dense import dense_inputs, is_dense, two_products

Batch = Mapping[str, Any]


Forward = Callable[[Any, Batch], Any]


class Captured(NamedTuple):
    """A model's output, what enters its dense layers, and how a gradient of the output reaches what leaves them.

    deltas: (gradient of a scalar with respect to the output) -> its gradients with respect to the layers' outputs.
    """

    output: Any
    inputs: dict[str, Float[Array, "batch time in"]]
    deltas: Callable[[Any], dict[str, Float[Array, "batch time out"]]]


def capture(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> Captured:
    """x and delta of every dense layer in `paths`: the kernel's gradient is sum_bt outer(x_bt, delta_bt).

    `forward(params, batch)` runs a Linen model. Every layer's output gets a zero added, and the gradient with respect
    to that zero is delta, so one backward pass serves all layers and no gradient of a kernel is formed; each call of
    `deltas` is one. Without dropout, unless `forward` asks for it. Holds the activations of one batch.

    Raises:
      ValueError: a path is not a dense layer that `forward` calls, or it is called more than once.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def note(path: str, inputs: Array, outputs: Array) -> Array:
        if path in shapes:
            raise ValueError(f"the dense layer {path!r} is called more than once: its gradient is no single product")
        shapes[path] = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
        return outputs

    jax.eval_shape(lambda: intercepted(forward, params, batch, paths, note))
    if missing := sorted(paths - shapes.keys()):
        raise ValueError(f"no dense layer is called under {missing}; there are {sorted(shapes)}")
    zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}

    def perturbed(perturbations: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        seen: dict[str, Array] = {}

        def perturb(path: str, inputs: Array, outputs: Array) -> Array:
            seen[path] = inputs
            return outputs + perturbations[path]

        return intercepted(forward, params, batch, paths, perturb), seen

    output, pull, inputs = jax.vjp(perturbed, zeros, has_aux=True)

    def deltas(gradient: Any) -> dict[str, Float[Array, "batch time out"]]:
        (found,) = pull(gradient)
        return {path: with_time(found[path]) for path in sorted(paths)}

    return Captured(output, {path: with_time(inputs[path]) for path in sorted(paths)}, deltas)


def intercepted(
    forward: Forward,
    params: Any,
    batch: Batch,
    paths: frozenset[str],
    touch: Callable[[str, Array, Array], Array],
) -> Any:
    """The output of `forward`, with the outputs of the dense layers in `paths` replaced by touch(path, x, y)."""

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        outputs = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        return touch(path, dense_inputs(args, kwargs), outputs) if is_dense(context) and path in paths else outputs

    with nn.intercept_methods(two_products), nn.intercept_methods(interceptor):
        return forward(params, batch)


def with_time(array: Array) -> Float[Array, "batch time width"]:
    """Layers that see one vector per example see one time step."""
    return array.reshape(array.shape[0], -1, array.shape[-1])
