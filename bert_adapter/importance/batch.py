"""The sums over the examples of one batch: what enters and leaves all layers at once, then kernel after kernel."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bert_adapter.distributions.draw import Draw
from bert_adapter.importance.gradients import Gradients, output_gradients
from bert_adapter.importance.sums import OF_TABLES, Sums, corners, named, upper_product, zero_upper, zeros
from bert_adapter.importance.through import Through
from bert_adapter.layers.capture import Batch, Forward, Lookup, capture, real_rows

AT_ONCE = 256  # time steps, times gradients of the output, that are held together: more take memory and gain no time
AT_ONCE_ELSEWHERE = 8192  # on what is no CPU, where few are slow


class Wanted(NamedTuple):
    """What is measured of a model: hashable, so that one program serves all its batches."""

    forward: Forward
    gradients: Gradients
    paths: frozenset[str]
    statistics: tuple[str, ...]


class Passed(NamedTuple):
    """What enters and what leaves the layers for some examples, and whether the model's output is finite.

    inputs: by the paths of the layers that it enters.
    deltas: by path, for each gradient of the output; empty if no statistic asks for them.
    """

    inputs: dict[tuple[str, ...], Float[Array, "batch time in"] | Lookup]
    deltas: dict[str, Float[Array, "gradients batch time out"]]
    finite: Bool[Array, ""]

    @property
    def gradients(self) -> int:
        """How many of the output."""
        return next(iter(self.deltas.values())).shape[0] if self.deltas else 1


class Steps(NamedTuple):
    """What enters a layer: float32, zeros for padding, the mean first; and what else add_kernel needs beside deltas.

    products: of each time step of an example with each other one.
    axis: what deltas are to be reflected along.
    root: the square root of how often each example counts.
    """

    values: Float[Array, "batch time in"]
    products: Float[Array, "batch time time"]
    axis: Float[Array, "batch time"]
    root: Float[Array, "batch 1 1"]


class Rows(NamedTuple):
    """The rows of a table that are looked up, `count` for none, and what else add_kernel needs beside deltas.

    products: whether the row is that of another step of the example.
    first: whether it is the first step with that row.
    """

    values: Int[Array, "batch time"]
    products: Float[Array, "batch time time"]
    first: Float[Array, "batch time"]
    root: Float[Array, "batch 1 1"]


def passed(wanted: Wanted, params: Any, batch: Batch, draw: Draw) -> Passed:
    """One pass through the model and back, at full precision."""
    with jax.default_matmul_precision("highest"):
        captured = capture(wanted.forward, params, batch, wanted.paths)
        inputs = {paths: captured.inputs[paths[0]] for paths in sharing(captured.inputs)}
        deltas = {}
        if set(wanted.statistics) - {"inputs"}:
            deltas = each(captured.deltas, output_gradients(wanted.gradients, captured.output, batch, draw))
        return Passed(inputs, deltas, all_finite(captured.output))


def sharing(inputs: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of the layers that the same array enters, together."""
    found = defaultdict(list)
    for path, array in inputs.items():
        found[id(array)].append(path)
    return [tuple(paths) for paths in found.values()]


def each(function: Any, stacked: Any) -> Any:
    """The function's values for what is stacked, stacked."""
    if len(jax.tree.leaves(stacked)[0]) > 1:
        return jax.vmap(function)(stacked)
    return jax.tree.map(lambda leaf: leaf[None], function(jax.tree.map(lambda leaf: leaf[0], stacked)))


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def unpadded(inputs: Float[Array, "batch time in"], mask: Array | None) -> Float[Array, "batch time in"]:
    """float32, with zeros for padding. The gradients of padding are zero as they are."""
    inputs = inputs.astype(jnp.float32)
    if mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs * mask.astype(inputs.dtype)[:, :, None]
    return inputs


def no_sums(statistics: tuple[str, ...], rows: int, columns: int, through: int | None = None) -> Sums:
    """The sums for a kernel (rows, columns) before the first batch.

    through: the side, 0 or 1, of which there is a `Through`, if there is one.
    """
    begin = {
        "fisher": lambda: zeros(2, rows, columns),
        "rows": lambda: zeros(rows),
        "inputs": lambda: zero_upper(rows),
        "outputs": lambda: zero_upper(columns),
        "row_gram": lambda: zero_upper(rows),
        "col_gram": lambda: zero_upper(columns),
        "gram_squares": lambda: zeros(),
    }
    if through is not None:
        smaller = min(rows, columns)
        names = ("inputs", "row_gram") if through == 0 else ("outputs", "col_gram")
        begin[names[0]] = lambda: Through(zero_upper(smaller), zeros())
        begin[names[1]] = lambda: Through(zero_upper(smaller), zeros(), squares=zeros())
    return Sums(**{name: begin[name]() for name in statistics})


def no_table_sums(statistics: tuple[str, ...], rows: int, columns: int) -> Sums:
    """The sums for a table (rows, columns) before the first batch."""
    others = no_sums(tuple(name for name in statistics if name not in OF_TABLES), rows, columns)
    return others._replace(**{OF_TABLES[name]: zeros(2, rows) for name in statistics if name in OF_TABLES})


@jax.jit
def entering(inputs: Any, mask: Any, weights: Any) -> Steps | Rows:
    """What enters a layer, as `add_kernel` takes it."""
    if isinstance(inputs, Lookup):
        rows = real_rows(inputs, mask).rows
        real = rows < inputs.count
        same = ((rows[:, :, None] == rows[:, None, :]) & real[:, :, None]).astype(jnp.float32)
        first = jnp.sum(jnp.tril(same), axis=2) == 1
        counts = jnp.ones(len(rows), jnp.float32) if weights is None else weights.astype(jnp.float32)
        return Rows(rows, same, first.astype(jnp.float32), jnp.sqrt(counts).reshape(-1, 1, 1))
    with jax.default_matmul_precision("highest"):
        real = unpadded(inputs, mask)
        axis = time_axis(real)
        values = mean_first(real, axis)
        counts = jnp.ones(len(real), jnp.float32) if weights is None else weights.astype(jnp.float32)
        return Steps(values, time_products(values), axis, jnp.sqrt(counts).reshape(-1, 1, 1))


@partial(jax.jit, donate_argnames="total")
def add_kernel(
    total: Sums, steps: Steps | Rows, deltas: Any, seen: Any, kernel: Any = None
) -> tuple[Sums, Bool[Array, ""]]:
    """The total with what some examples add to the sums of one kernel, and whether that is finite.

    One program for all kernels of a shape, whatever the model. The statistics are those that the total has; the kernel
    is there where it has a `Through`.
    """
    if isinstance(steps, Rows):
        return add_table(total, steps, deltas, seen)
    statistics = dict(named(total))
    with jax.default_matmul_precision("highest"):
        added, entered = {}, steps.values
        if any(isinstance(statistics.get(name), Through) for name in ("inputs", "row_gram")):
            entered = entered @ kernel.reshape(entered.shape[-1], -1).astype(entered.dtype)
        if "inputs" in statistics:
            counted = entered * steps.root
            mean = jnp.sum((steps.values * steps.root) ** 2) / steps.values.shape[-1]
            added["inputs"] = held_as(statistics["inputs"], upper_product(counted, counted), mean)
        if deltas is not None:
            reflected = jax.vmap(mean_first, in_axes=(0, None))(
                deltas.astype(jnp.float32) * steps.root[None], steps.axis
            )
            added |= gradient_sums(steps, reflected, statistics, seen=seen, kernel=kernel)
            added |= input_sums(steps, reflected, statistics, entered)
    good = all_finite([corners(array) for array in added.values()])
    sums = {name: jax.tree.map(jnp.add, getattr(total, name), array) for name, array in added.items()}
    return total._replace(**sums), good


def add_table(total: Sums, steps: Rows, deltas: Any, seen: Any) -> tuple[Sums, Bool[Array, ""]]:
    """The same for a table. Nothing of its size is made for a batch but what is added to."""
    statistics = {name for name, _ in named(total)}
    half = jnp.broadcast_to((jnp.arange(len(steps.values)) + seen)[:, None] % 2, steps.values.shape)
    sums, added, held = {}, {}, dict(named(total))
    with jax.default_matmul_precision("highest"):
        if "token_counts" in statistics:
            counts = jnp.broadcast_to(steps.root[:, :, 0] ** 2, steps.values.shape)
            added["token_counts"] = jnp.zeros_like(held["token_counts"]).at[half, steps.values].add(counts, mode="drop")
        if deltas is not None:
            counted = deltas.astype(jnp.float32) * steps.root[None]
            of_steps = {name: held[name] for name in statistics - {"fisher"}}
            added |= gradient_sums(steps, counted, of_steps, seen=seen)
            products = gradient_products(counted)
            both = steps.products @ products
            if "token_squares" in statistics:
                squares = steps.first * jnp.maximum(jnp.sum(both * steps.products, axis=2), 0)
                zero = jnp.zeros_like(held["token_squares"])
                added["token_squares"] = zero.at[half, steps.values].add(squares, mode="drop")
            if "gram_squares" in statistics:
                added["gram_squares"] = square_of(steps.products, products)
            if "fisher" in statistics:
                sums["fisher"] = with_squares(total.fisher, steps, counted, half)
    good = all_finite([corners(array) for array in added.values()])
    sums |= {name: jax.tree.map(jnp.add, getattr(total, name), array) for name, array in added.items()}
    return total._replace(**sums), good


def with_squares(fisher: Any, steps: Rows, deltas: Float[Array, "gradients batch time out"], half: Any) -> Any:
    """The squared gradients of a table's entries, with those of some examples."""
    together = jnp.einsum("bts,gbso->gbto", steps.products, deltas)
    squares = steps.first[:, :, None] * jnp.sum(together**2, axis=0)
    return fisher.at[half, steps.values].add(squares, mode="drop")


def held_as(total: Any, matrix: Any, mean: Any, squares: Any = None) -> Any:
    """A Gram matrix as the total is: it alone, or `Through`. What is not held is not computed either, once compiled."""
    return Through(matrix, mean, squares) if isinstance(total, Through) else matrix


def square_of(products: Float[Array, "batch time time"], others: Float[Array, "batch time time"]) -> Float[Array, ""]:
    """The sum of ||A_b' B_b B_b' A_b||_F**2 over examples, from A_b A_b' and B_b B_b'."""
    both = products @ others
    return jnp.sum(both * jnp.swapaxes(both, 1, 2))


def gradient_sums(
    steps: Any,
    deltas: Float[Array, "gradients batch time out"],
    statistics: Mapping[str, Any],
    *,
    seen: Any,
    kernel: Any = None,
) -> dict[str, Any]:
    """By name, the sums over the gradients of the output."""
    added: dict[str, Any] = {}
    left, width = deltas, deltas.shape[-1]
    if any(isinstance(statistics.get(name), Through) for name in ("outputs", "col_gram")):
        left = deltas @ kernel.reshape(-1, width).astype(deltas.dtype).T
    if "outputs" in statistics:
        added["outputs"] = held_as(statistics["outputs"], upper_product(left, left), jnp.sum(deltas**2) / width)
    if "col_gram" in statistics:
        found = upper_product(left, jnp.einsum("bts,gbso->gbto", steps.products, left))
        mean = jnp.sum(steps.products * gradient_products(deltas)) / width
        norms = square_of(steps.products, gradient_products(left))
        added["col_gram"] = held_as(statistics["col_gram"], found, mean, norms)
    if "fisher" in statistics:
        odd = (jnp.arange(deltas.shape[1], dtype=jnp.int32) + seen) % 2
        halves = jnp.stack([1 - odd, odd]).astype(deltas.dtype)

        def squares(delta: Any) -> Any:
            return jnp.einsum("hb,bio->hio", halves, jnp.einsum("bti,bto->bio", steps.values, delta) ** 2)

        added["fisher"] = summed(squares, deltas)
    return added


def input_sums(
    steps: Steps,
    deltas: Float[Array, "gradients batch time out"],
    statistics: Mapping[str, Any],
    entered: Float[Array, "batch time _"],
) -> dict[str, Any]:
    """By name, what the products of output gradients between time steps are enough for.

    Of gradients G = inputs' deltas these are summed over all gradients of an example first: no matrix (in, out) of an
    example is formed.

    entered: the inputs, or what the kernel makes of them where Gram matrices are `Through` it.
    """
    added: dict[str, Any] = {}
    time_gram = gradient_products(deltas)
    if "rows" in statistics:
        each = jnp.sum(steps.values * (time_gram @ steps.values), axis=1)  # squares, but for what is rounded
        added["rows"] = jnp.sum(jnp.maximum(each, 0), axis=0)
    if "row_gram" in statistics:
        found = upper_product(entered, time_gram @ entered)
        mean = jnp.sum(steps.products * time_gram) / steps.values.shape[-1]
        norms = square_of(time_products(entered), time_gram)
        added["row_gram"] = held_as(statistics["row_gram"], found, mean, norms)
    if "gram_squares" in statistics:
        added["gram_squares"] = square_of(steps.products, time_gram)
    return added


def summed(function: Any, stacked: Any) -> Any:
    """The function's values, summed over what is stacked, one at a time."""
    first = jax.tree.map(lambda leaf: leaf[0], stacked)
    if len(stacked) == 1:
        return function(first)
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, function(one)), None), zero, stacked)
    return total


def gradient_products(deltas: Float[Array, "gradients batch time n"]) -> Float[Array, "batch time time"]:
    """The products of the time steps of an example, summed over all gradients."""
    return jnp.sum(jax.vmap(time_products)(deltas), axis=0)


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

    No sum changes, as long as inputs and output gradients are both reflected. The output gradients of keys sum to
    zero over time, as softmax ignores what all its arguments have in common, while inputs have a large mean: without
    this, sums of many large terms would have to cancel.
    """
    twice = 2 * axis / jnp.sum(axis**2, axis=1, keepdims=True)
    return steps - twice[:, :, None] * jnp.einsum("bt,btn->bn", axis, steps)[:, None, :]
