"""The sums over the examples of one batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.importance.gradients import Gradients, output_gradients
from bert_adapter.importance.sums import FROM_PRODUCTS, Basis, Sums, upper_product
from bert_adapter.layers.capture import Batch, Forward, capture

Alike = Float[Array, "batch time time"] | None  # products of output gradients, if any statistic asks for them


def batch_sums(
    forward: Forward,
    loss: Gradients,
    paths: frozenset[str],
    statistics: tuple[str, ...],
    params: Any,
    batch: Batch,
    key: Any,
    seen: Any,
    bases: Mapping[str, Basis],
) -> dict[str, Sums]:
    """The sums over the examples of one batch, which come after `seen` others."""
    with jax.default_matmul_precision("highest"):
        captured = capture(forward, params, batch, paths)
        mask = batch.get("attention_mask")
        inputs = {path: unpadded(array, mask) for path, array in captured.inputs.items()}
        root = jnp.sqrt(jnp.asarray(batch.get("weights", 1.0), jnp.float32)).reshape(-1, 1, 1)
        total = {path: Sums() for path in inputs}
        if "inputs" in statistics:
            counted = {path: x * root for path, x in inputs.items()}
            total = {path: Sums(inputs=upper_product(x, x)) for path, x in counted.items()}
        if not set(statistics) - {"inputs"}:
            return total
        turned = {path: x @ bases[path].inputs if path in bases else x for path, x in inputs.items()}

        def along(gradient: Any) -> dict[str, tuple[Sums, Alike]]:
            """The sums for one gradient of the output, an example's in each row."""
            deltas = {path: delta.astype(jnp.float32) * root for path, delta in captured.deltas(gradient).items()}
            return {
                path: gradient_sums(turned[path], delta, seen, bases.get(path), statistics)
                for path, delta in deltas.items()
            }

        def step(before: Any, gradient: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, before, along(gradient)), None

        gradients = output_gradients(loss, captured.output, batch, key)
        shapes = jax.eval_shape(along, jax.tree.map(lambda leaf: leaf[0], gradients))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        found, _ = jax.lax.scan(step, zeros, gradients)
        return {
            path: of_inputs(turned[path], alike, statistics, sums._replace(inputs=total[path].inputs))
            for path, (sums, alike) in found.items()
        }


def unpadded(inputs: Float[Array, "batch time in"], mask: Array | None) -> Float[Array, "batch time in"]:
    """float32, with zeros for padding. The gradients of padding are zero as they are."""
    inputs = inputs.astype(jnp.float32)
    if mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs * mask.astype(inputs.dtype)[:, :, None]
    return inputs


def gradient_sums(
    inputs: Float[Array, "batch time in"],
    deltas: Float[Array, "batch time out"],
    seen: Any,
    basis: Basis | None,
    statistics: tuple[str, ...],
) -> tuple[Sums, Alike]:
    """What needs one gradient of the output at a time, and the products of its time steps for what does not.

    The inputs are in the coordinates of the basis already.
    """
    fisher = outputs = col_gram = alike = None
    if "outputs" in statistics:
        outputs = upper_product(deltas, deltas)
    if basis is not None:
        deltas = deltas @ basis.outputs
    if "fisher" in statistics:
        gradients = jnp.einsum("bti,bto->bio", inputs, deltas)
        odd = (jnp.arange(len(inputs), dtype=jnp.int32) + seen) % 2
        halves = jnp.stack([1 - odd, odd]).astype(gradients.dtype)
        fisher = jnp.einsum("hb,bio->hio", halves, gradients**2)
    axis = time_axis(inputs)
    inputs, deltas = mean_first(inputs, axis), mean_first(deltas, axis)
    if "col_gram" in statistics:
        col_gram = upper_product(deltas, products(inputs) @ deltas)
    if FROM_PRODUCTS & set(statistics):
        alike = products(deltas)
    return Sums(fisher=fisher, outputs=outputs, col_gram=col_gram), alike


def of_inputs(inputs: Float[Array, "batch time in"], alike: Alike, statistics: tuple[str, ...], sums: Sums) -> Sums:
    """With what needs of the gradients G = inputs' deltas the products of their time steps alone, summed over all
    gradients of an example: no matrix (in, out) of an example is ever there."""
    if alike is None:
        return sums
    inputs = mean_first(inputs, time_axis(inputs))
    across = alike @ inputs
    if "rows" in statistics:
        sums = sums._replace(rows=jnp.sum(inputs * across, axis=(0, 1)))
    if "row_gram" in statistics:
        sums = sums._replace(row_gram=upper_product(inputs, across))
    if "gram_squares" in statistics:
        both = products(inputs) @ alike
        sums = sums._replace(gram_squares=jnp.sum(both * jnp.swapaxes(both, 1, 2)))
    return sums


def products(steps: Float[Array, "batch time n"]) -> Float[Array, "batch time time"]:
    """Of each step of an example with each other one."""
    return jnp.einsum("btn,bsn->bts", steps, steps)


def time_axis(inputs: Float[Array, "batch time in"]) -> Float[Array, "batch time"]:
    """What `mean_first` reflects along: the mean of the steps that are no padding, and the first step, halfway."""
    real = jnp.any(inputs != 0, axis=2).astype(inputs.dtype)
    axis = real / jnp.sqrt(jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1))
    return axis + jnp.eye(1, axis.shape[1], dtype=axis.dtype)


def mean_first(steps: Float[Array, "batch time n"], axis: Float[Array, "batch time"]) -> Float[Array, "batch time n"]:
    """Reflected along time, so that the first step holds the mean over all of them: as long as inputs and output
    gradients both are, no gradient changes.

    The output gradients of keys sum to zero over time, as softmax ignores what all its arguments have in common, while
    inputs have a large mean: without this, sums of many large terms would have to cancel.
    """
    twice = 2 * axis / jnp.sum(axis**2, axis=1, keepdims=True)
    return steps - twice[:, :, None] * jnp.einsum("bt,btn->bn", axis, steps)[:, None, :]
