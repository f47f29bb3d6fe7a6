"""The sums over the examples of one batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bert_adapter.importance.gradients import Gradients, output_gradients
from bert_adapter.importance.sums import FROM_TIME_GRAM, Basis, Sums, upper_product
from bert_adapter.layers.capture import Batch, Forward, capture

TimeGram = Float[Array, "batch time time"] | None  # products of output gradients, if any statistic asks for them


class Wanted(NamedTuple):
    """What is measured of a model: hashable, so that one program serves all its batches."""

    forward: Forward
    gradients: Gradients
    paths: frozenset[str]
    statistics: tuple[str, ...]


class Position(NamedTuple):
    """What a batch's sums depend on beside its arrays: a key, how many examples came before, the bases by path."""

    key: Any
    seen: Any
    bases: Mapping[str, Basis]


def batch_sums(
    wanted: Wanted, params: Any, batch: Batch, position: Position
) -> tuple[dict[str, Sums], Bool[Array, ""]]:
    """The sums over the examples of one batch, at full precision, and whether the model's output is finite."""
    with jax.default_matmul_precision("highest"):
        captured = capture(wanted.forward, params, batch, wanted.paths)
        finite = all_finite(captured.output)
        rows, mask = len(next(iter(batch.values()))), batch.get("attention_mask")
        mask = None if mask is None else mask.reshape(rows, -1)
        inputs = {path: unpadded(by_example(array, rows), mask) for path, array in captured.inputs.items()}
        root = jnp.sqrt(jnp.asarray(batch.get("weights", 1.0), jnp.float32)).reshape(-1, 1, 1)
        total = {path: Sums() for path in inputs}
        if "inputs" in wanted.statistics:
            counted = {path: x * root for path, x in inputs.items()}
            total = {path: Sums(inputs=upper_product(x, x)) for path, x in counted.items()}
        if not set(wanted.statistics) - {"inputs"}:
            return total, finite
        bases, statistics = position.bases, wanted.statistics
        rotated = {path: x @ bases[path].inputs if path in bases else x for path, x in inputs.items()}

        def along(gradient: Any) -> dict[str, tuple[Sums, TimeGram]]:
            """The sums for one gradient of the output, an example's in each row."""
            found = {path: by_example(delta, rows) for path, delta in captured.deltas(gradient).items()}
            deltas = {path: delta.astype(jnp.float32) * root for path, delta in found.items()}
            return {
                path: gradient_sums(rotated[path], delta, statistics, seen=position.seen, basis=bases.get(path))
                for path, delta in deltas.items()
            }

        gradients = output_gradients(wanted.gradients, captured.output, batch, position.key)
        return {
            path: input_sums(rotated[path], time_gram, statistics, sums._replace(inputs=total[path].inputs))
            for path, (sums, time_gram) in summed(along, gradients).items()
        }, finite


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def summed(function: Any, stacked: Any) -> Any:
    """The function's values, summed over what is stacked, one at a time."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], stacked))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, function(one)), None), zeros, stacked)
    return total


def by_example(steps: Float[Array, "texts time n"], rows: int) -> Float[Array, "batch steps n"]:
    """The steps of an example in one row, where it is several texts to the layers, as its choices are."""
    return steps.reshape(rows, -1, steps.shape[-1]) if len(steps) % rows == 0 else steps


def unpadded(inputs: Float[Array, "batch time in"], mask: Array | None) -> Float[Array, "batch time in"]:
    """float32, with zeros for padding. The gradients of padding are zero as they are."""
    inputs = inputs.astype(jnp.float32)
    if mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs * mask.astype(inputs.dtype)[:, :, None]
    return inputs


def gradient_sums(
    inputs: Float[Array, "batch time in"],
    deltas: Float[Array, "batch time out"],
    statistics: tuple[str, ...],
    *,
    seen: Any,
    basis: Basis | None,
) -> tuple[Sums, TimeGram]:
    """What needs one gradient of the output at a time, and its products between time steps for what does not.

    The inputs are in the coordinates of the basis already.
    """
    fisher = outputs = col_gram = time_gram = None
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
        col_gram = upper_product(deltas, time_products(inputs) @ deltas)
    if FROM_TIME_GRAM & set(statistics):
        time_gram = time_products(deltas)
    return Sums(fisher=fisher, outputs=outputs, col_gram=col_gram), time_gram


def input_sums(
    inputs: Float[Array, "batch time in"], time_gram: TimeGram, statistics: tuple[str, ...], sums: Sums
) -> Sums:
    """The sums, with what the products of output gradients between time steps are enough for.

    Of gradients G = inputs' deltas these are summed over all gradients of an example first: no matrix (in, out) of an
    example is formed.
    """
    if time_gram is None:
        return sums
    inputs = mean_first(inputs, time_axis(inputs))
    across = time_gram @ inputs
    if "rows" in statistics:
        sums = sums._replace(rows=jnp.sum(inputs * across, axis=(0, 1)))
    if "row_gram" in statistics:
        sums = sums._replace(row_gram=upper_product(inputs, across))
    if "gram_squares" in statistics:
        both = time_products(inputs) @ time_gram
        sums = sums._replace(gram_squares=jnp.sum(both * jnp.swapaxes(both, 1, 2)))
    return sums


def time_products(steps: Float[Array, "batch time n"]) -> Float[Array, "batch time time"]:
    """The product of each time step of an example with each other one."""
    return jnp.einsum("btn,bsn->bts", steps, steps)


def time_axis(inputs: Float[Array, "batch time in"]) -> Float[Array, "batch time"]:
    """What `mean_first` reflects along: halfway between the first step and the mean of those that are no padding."""
    real = jnp.any(inputs != 0, axis=2).astype(inputs.dtype)
    axis = real / jnp.sqrt(jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1))
    return axis + jnp.eye(1, axis.shape[1], dtype=axis.dtype)


def mean_first(steps: Float[Array, "batch time n"], axis: Float[Array, "batch time"]) -> Float[Array, "batch time n"]:
    """The steps reflected along time, so that the first one holds their mean.

    No gradient changes, as long as inputs and output gradients are both reflected. The output gradients of keys sum to
    zero over time, as softmax ignores what all its arguments have in common, while inputs have a large mean: without
    this, sums of many large terms would have to cancel.
    """
    twice = 2 * axis / jnp.sum(axis**2, axis=1, keepdims=True)
    return steps - twice[:, :, None] * jnp.einsum("bt,btn->bn", axis, steps)[:, None, :]
