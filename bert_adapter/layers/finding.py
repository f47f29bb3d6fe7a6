"""The kernels of any model, found by tracing it on a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval

from bert_adapter.layers.capture import Batch, Forward, examples, used_often
from bert_adapter.layers.layer import Axes, matrix_shape, split
from bert_adapter.layers.observing import Site, observing
from bert_adapter.layers.other import why_not
from bert_adapter.layers.places import kernel_path
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

    It is traced on twice the examples too: a first axis of a layer's input that does not grow with them holds
    something else.
    """
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    found, sizes = Kernels({}, {}, {}), first_axes(forward, params, batch)

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        if site.layer is None:
            found.refused[site.path] = why_not(site.module)
            return outputs
        name = site.layer.kernel
        inner = kernel_shape(site.param, name)
        outer = kernel_shape(lambda name: flat.get(f"{site.path}/{name}"), name)
        found.axes[site.path] = split(inner, site.layer.input_axes(site.module))
        found.stacks[site.path] = outer[: len(outer) - len(inner)]
        if outer != found.stacks[site.path] + inner:
            kind = type(site.module).__name__
            got = f"the parameters at its path have a {name} of shape {outer or 'none'}, and it is called with {inner}"
            found.refused[site.path] = f"{kind}: {got}, wanted that, behind axes of nn.scan if there are any"
        elif site.layer.looked_up and found.stacks[site.path]:
            found.refused[site.path] = f"{type(site.module).__name__}: its table has leading axes of nn.scan"
        return outputs

    with observing(note):
        jax.eval_shape(lambda: forward(params, batch))
    twice, unread = grown(forward, params, batch), unread_params(forward, params, batch)
    for path in found.axes:
        if kernel_path(unread, path) in unread:
            found.refused[path] = "the output that counts does not depend on it"
        elif not path:
            found.refused[path] = "a layer that is the whole model has no path: put it into a module"
        elif twice is None and set(sizes[path]) != {examples(batch)}:
            found.refused[path] = "the first axis of its input is not as long as the batch"
        elif twice is not None and twice.get(path) != [2 * size for size in sizes[path]]:
            found.refused.setdefault(path, "the first axis of its input is not that of the examples")
    dense = [path for path in found.axes if path not in found.refused and f"{path}/left" not in flat]
    kept = frozenset(each for path in dense for each in indexed(path, found.stacks[path]))
    for path, why in used_often(forward, params, batch, kept).items():
        found.refused[path] = f"it {why}"
    for path in found.refused:
        found.axes.pop(path, None)
    return found


def first_axes(forward: Forward, params: Any, batch: Batch) -> dict[str, list[int]]:
    """By path, how long the first axis of the input is in each call."""
    sizes: dict[str, list[int]] = {}

    def note(site: Site, inputs: Any, outputs: Any) -> Any:
        shape = getattr(inputs, "shape", ())
        sizes.setdefault(site.path, []).append(shape[0] if shape else 0)
        return outputs

    with observing(note):
        jax.eval_shape(
            lambda params, batch: forward(params, batch), params, batch
        )  # anew: JAX keeps traces by function
    return sizes


def unread_params(forward: Forward, params: Any, batch: Batch) -> set[str]:
    """The paths of the parameters that the output does not depend on."""
    program = jax.make_jaxpr(lambda params: forward(params, batch))(params).jaxpr
    _, read = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return {name for name, is_read in zip(names, read, strict=True) if not is_read}


def grown(forward: Forward, params: Any, batch: Batch) -> dict[str, list[int]] | None:
    """The same for twice the examples; None for a model that takes a batch of one size alone."""
    try:
        return first_axes(forward, params, doubled(batch))
    except Exception:  # whatever the caller's own code says of another size
        return None


def kernel_shape(param: Any, name: str) -> tuple[int, ...]:
    """Of the parameter of that name, or of what its factors multiply out to."""
    left, right = param("left"), param("right")
    if left is not None:
        return (*left.shape[:-1], *right.shape[right.shape.index(left.shape[-1]) + 1 :])
    return jnp.shape(param(name)) if param(name) is not None else ()


def doubled(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of twice as many examples."""
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    return {
        name: jax.ShapeDtypeStruct((2 * len(array), *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
