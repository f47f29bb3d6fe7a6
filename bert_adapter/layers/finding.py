"""The kernels of any model, found by tracing it on a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bert_adapter.layers.capture import Batch, Forward, examples
from bert_adapter.layers.layer import Axes, matrix_shape, split
from bert_adapter.layers.observing import Site, observing
from bert_adapter.layers.other import why_not
from bert_adapter.layers.stacks import indexed


class Kernels(NamedTuple):
    """What a model calls, in the order of its calls.

    axes: by path, of each kernel that can be factorised, without leading axes.
    stacks: by path, those leading axes, which `flax.linen.scan` makes.
    refused: by path, why a kernel or a table cannot be factorised.
    """

    axes: dict[str, Axes]
    stacks: dict[str, tuple[int, ...]]
    refused: dict[str, str]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices (m, n) by path; a kernel with leading axes holds one at each index."""
        return {path: matrix_shape(self.axes[base]) for base in self.axes for path in indexed(base, self.stacks[base])}


def find_kernels(forward: Forward, params: Any, batch: Batch) -> Kernels:
    """The kernels of all layers that `forward(params, batch)` calls; nothing is computed.

    Where an input's first axis is not as long as the batch, the model is traced on twice the examples: an axis that
    does not grow with them holds something else.
    """
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    found, sizes = Kernels({}, {}, {}), first_axes(forward, params, batch)

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        if site.layer is None:
            found.refused[site.path] = why_not(site.module)
            return outputs
        inner, outer = kernel_shape(site.param), kernel_shape(lambda name: flat.get(f"{site.path}/{name}"))
        found.axes[site.path] = split(inner, site.layer.input_axes(site.module))
        found.stacks[site.path] = outer[: len(outer) - len(inner)]
        if outer != found.stacks[site.path] + inner:
            kind = type(site.module).__name__
            got = f"the parameters at its path have a kernel of shape {outer or 'none'}, and it is called with {inner}"
            found.refused[site.path] = f"{kind}: {got}, wanted that, behind axes of nn.scan if there are any"
        return outputs

    with observing(note):
        jax.eval_shape(lambda: forward(params, batch))
    if any(set(sizes[path]) != {examples(batch)} for path in found.axes):
        twice = first_axes(forward, params, doubled(batch))
        for path in found.axes:
            if twice.get(path) != [2 * size for size in sizes[path]]:
                found.refused.setdefault(path, "the first axis of its input is not that of the examples")
    for path in found.refused:
        found.axes.pop(path, None)
    return found


def first_axes(forward: Forward, params: Any, batch: Batch) -> dict[str, list[int]]:
    """By path, how long the first axis of the input is in each call."""
    sizes: dict[str, list[int]] = {}

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        sizes.setdefault(site.path, []).append(jnp.shape(inputs)[0] if jnp.ndim(inputs) else 0)
        return outputs

    with observing(note):
        jax.eval_shape(forward, params, batch)
    return sizes


def kernel_shape(param: Any) -> tuple[int, ...]:
    """Of the kernel, or of what its factors multiply out to."""
    left, right = param("left"), param("right")
    if left is not None:
        return (*left.shape[:-1], *right.shape[right.shape.index(left.shape[-1]) + 1 :])
    return jnp.shape(param("kernel")) if param("kernel") is not None else ()


def doubled(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of twice as many examples."""
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    return {
        name: jax.ShapeDtypeStruct((2 * len(array), *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
