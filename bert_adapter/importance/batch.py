"""The sums over the examples of one batch: what enters and leaves all layers at once, then kernel after kernel."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bert_adapter.distributions.draw import Draw
from bert_adapter.importance.gradients import Gradients, output_gradients
from bert_adapter.importance.sums import OF_TABLES, Sums, corners, named, upper_product, zero_upper, zeros
from bert_adapter.importance.through import Through, larger_side
from bert_adapter.layers.capture import Batch, Forward, Lookup, capture, real_rows, unpadded

AT_ONCE = 512  # time steps, times gradients of the output, that are held together: more take memory and gain little
OF_ENTRIES = {"fisher", "rows"}  # statistics of single entries, or of rows, which a kernel does not pass on
AT_ONCE_ELSEWHERE = 8192  # on what is no CPU, where few are slow


class Wanted(NamedTuple):
    """What is measured of a model: hashable, so that one program serves all its batches.

    whole: of which layers Gram matrices of a kernel's larger side are not to be `Through` it.
    """

    forward: Forward
    gradients: Gradients
    paths: frozenset[str]
    statistics: tuple[str, ...]
    whole: frozenset[str]

    def passes(self, path: str, shape: tuple[int, int]) -> int | None:
        """The larger side, where nothing is measured of it but what is `Through` the kernel."""
        return None if path in self.whole or OF_ENTRIES & set(self.statistics) else larger_side(shape)


class Passed(NamedTuple):
    """What enters and what leaves the layers for some examples, and whether the model's output is finite.

    inputs: by the paths of the layers that it enters; `Steps` where the kernel has passed them on.
    deltas: by path, for each gradient of the output; empty if no statistic asks for them.
    steps: by path, how many time steps enter, without padding, as often as their example counts.
    """

    inputs: dict[tuple[str, ...], "Float[Array, 'batch time in'] | Lookup | Steps"]
    deltas: dict[str, "Float[Array, 'gradients batch time out'] | Leaving"]
    finite: Bool[Array, ""]
    steps: dict[str, Float[Array, ""]]

    @property
    def gradients(self) -> int:
        """How many of the output."""
        return jax.tree.leaves(next(iter(self.deltas.values())))[0].shape[0] if self.deltas else 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "products", "axis", "root", "gram"],
    meta_fields=["width"],
)
@dataclass(frozen=True)
class Steps:
    """What enters a layer, float32, zeros for padding, the mean first; or what the kernel has made of that.

    values: (batch, time, width), or as many as the kernel has made of these.
    products: (batch, time, time), of each time step of an example, as it entered, with each other one.
    axis: (batch, time), what deltas are to be reflected along.
    root: (batch, 1, 1), the square root of how often each example counts.
    gram: the `Upper` of the sum of the values' outer products, where all layers that they enter ask for it.
    width: of what entered.
    """

    values: Any
    products: Any
    axis: Any
    root: Any
    gram: Any
    width: int


@partial(jax.tree_util.register_dataclass, data_fields=["values", "products"], meta_fields=["width"])
@dataclass(frozen=True)
class Leaving:
    """Gradients of what leaves a layer, reflected, as often as each example counts; or what the kernel makes of them.

    values: (gradients, batch, time, width), or as many as the kernel has made of these.
    products: (batch, time, time), of each time step of an example with each other one, of the gradients themselves,
      summed over all.
    width: of the gradients themselves.
    """

    values: Any
    products: Any
    width: int


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
        captured = capture(wanted.forward, params, batch, wanted.paths, passes=wanted.passes)
        entered = {path: steps for path, steps in captured.inputs.items() if path not in captured.onward}
        inputs: dict[Any, Any] = {paths: entered[paths[0]] for paths in sharing(entered)}
        mask, weights = by_row(batch.get("attention_mask")), batch.get("weights")
        deltas: dict[str, Any] = {}
        if set(wanted.statistics) - {"inputs"}:
            gradients = output_gradients(wanted.gradients, captured.output, batch, draw)
            deltas, back = each(captured.deltas, gradients)
            for path, passed_back in back.items():
                steps = entering(captured.inputs[path], mask, weights)
                deltas[path] = replace(leaving(deltas[path], steps), values=all_mean_first(passed_back, steps))
        for path, onward in captured.onward.items():
            steps = entering(captured.inputs[path], mask, weights)
            inputs[(path,)] = replace(steps, values=mean_first(unpadded(onward.astype(jnp.float32), mask), steps.axis))
        steps = {path: counted(count, weights) for path, count in captured.steps.items()}
        return Passed(inputs, deltas, all_finite(captured.output), steps=steps)


def counted(count: Float[Array, " batch"], weights: Any) -> Float[Array, ""]:
    """The sum of what examples have, as often as each counts."""
    return jnp.sum(count if weights is None else count * weights.astype(jnp.float32))


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


def by_row(mask: Any) -> Any:
    """The mask with the places of an example in one row, where it is several texts, as its choices are."""
    return None if mask is None else mask.reshape(len(mask), -1)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


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
    return Sums(**{name: begin[name]() for name in statistics}, steps=zeros())


def no_table_sums(statistics: tuple[str, ...], rows: int, columns: int) -> Sums:
    """The sums for a table (rows, columns) before the first batch."""
    others = no_sums(tuple(name for name in statistics if name not in OF_TABLES), rows, columns)
    return others._replace(**{OF_TABLES[name]: zeros(2, rows) for name in statistics if name in OF_TABLES})


@partial(jax.jit, static_argnames="gram")
def entering(inputs: Any, mask: Any, weights: Any, gram: bool = False) -> Steps | Rows:
    """What enters layers, as `add_kernel` takes it; `gram` as in `Steps`."""
    if isinstance(inputs, Lookup):
        rows = real_rows(inputs, mask).rows
        real = rows < inputs.count
        same = ((rows[:, :, None] == rows[:, None, :]) & real[:, :, None]).astype(jnp.float32)
        first = jnp.sum(jnp.tril(same), axis=2) == 1
        counts = jnp.ones(len(rows), jnp.float32) if weights is None else weights.astype(jnp.float32)
        return Rows(rows, same, first.astype(jnp.float32), jnp.sqrt(counts).reshape(-1, 1, 1))
    with jax.default_matmul_precision("highest"):
        real = unpadded(inputs.astype(jnp.float32), mask)  # gradients of padding are zero as they are
        axis = time_axis(real)
        values = mean_first(real, axis)
        counts = jnp.ones(len(real), jnp.float32) if weights is None else weights.astype(jnp.float32)
        root = jnp.sqrt(counts).reshape(-1, 1, 1)
        counted = values * root
        summed = upper_product(counted, counted) if gram else None
        return Steps(values, time_products(values), axis, root=root, gram=summed, width=values.shape[-1])


def leaving(deltas: Float[Array, "gradients batch time out"], steps: Steps) -> Leaving:
    """What leaves a layer, as `add_kernel` needs it."""
    reflected = all_mean_first(deltas, steps)
    return Leaving(reflected, gradient_products(reflected), deltas.shape[-1])


@partial(jax.jit, donate_argnames="total")
def add_kernel(total: Sums, steps: Steps | Rows, deltas: Any, seen: Any) -> tuple[Sums, Bool[Array, ""]]:
    """The total with what some examples add to the sums of one kernel, and whether that is finite.

    One program for all kernels of a shape, whatever the model. The statistics are those that the total has.
    """
    if isinstance(steps, Rows):
        return add_table(total, steps, deltas, seen)
    statistics = dict(named(total))
    with jax.default_matmul_precision("highest"):
        added: dict[str, Any] = {}
        if "inputs" in statistics and steps.gram is not None:
            added["inputs"] = steps.gram
        elif "inputs" in statistics:
            counted = steps.values * steps.root
            mean = trace(steps.products * steps.root**2) / steps.width
            added["inputs"] = held_as(statistics["inputs"], upper_product(counted, counted), mean)
        if deltas is not None:
            left = deltas if isinstance(deltas, Leaving) else leaving(deltas, steps)
            added |= gradient_sums(steps, left, statistics, seen=seen) | input_sums(steps, left, statistics)
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
            products = gradient_products(counted)
            added |= gradient_sums(steps, Leaving(counted, products, counted.shape[-1]), of_steps, seen=seen)
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


def gradient_sums(steps: Any, left: Leaving, statistics: Mapping[str, Any], *, seen: Any) -> dict[str, Any]:
    """By name, the sums over the gradients of the output."""
    added: dict[str, Any] = {}
    if "outputs" in statistics:
        found = upper_product(left.values, left.values)
        added["outputs"] = held_as(statistics["outputs"], found, trace(left.products) / left.width)
    if "col_gram" in statistics:
        found = upper_product(left.values, steps.products @ left.values)
        mean = jnp.sum(steps.products * left.products) / left.width
        norms = square_of(steps.products, gradient_products(left.values))
        added["col_gram"] = held_as(statistics["col_gram"], found, mean, norms)
    if "fisher" in statistics:
        odd = (jnp.arange(left.values.shape[1], dtype=jnp.int32) + seen) % 2
        halves = jnp.stack([1 - odd, odd]).astype(left.values.dtype)

        def squares(delta: Any) -> Any:
            return jnp.einsum("hb,bio->hio", halves, jnp.einsum("bti,bto->bio", steps.values, delta) ** 2)

        added["fisher"] = summed(squares, left.values)
    return added


def input_sums(steps: Steps, left: Leaving, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """By name, what the products of output gradients between time steps are enough for.

    Of gradients G = inputs' deltas these are summed over all gradients of an example first: no matrix (in, out) of an
    example is formed.
    """
    added: dict[str, Any] = {}
    if "rows" in statistics:
        each = jnp.sum(steps.values * (left.products @ steps.values), axis=1)  # squares, but for what is rounded
        added["rows"] = jnp.sum(jnp.maximum(each, 0), axis=0)
    if "row_gram" in statistics:
        found = upper_product(steps.values, left.products @ steps.values)
        mean = jnp.sum(steps.products * left.products) / steps.width
        norms = square_of(time_products(steps.values), left.products)
        added["row_gram"] = held_as(statistics["row_gram"], found, mean, norms)
    if "gram_squares" in statistics:
        added["gram_squares"] = square_of(steps.products, left.products)
    return added


def trace(products: Float[Array, "batch time time"]) -> Float[Array, ""]:
    """The sum of the squared norms of all steps, from their products."""
    return jnp.sum(jnp.diagonal(products, axis1=1, axis2=2))


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


def all_mean_first(
    deltas: Float[Array, "gradients batch time n"], steps: Steps
) -> Float[Array, "gradients batch time n"]:
    """The same of what leaves a layer, as often as each example counts."""
    return jax.vmap(mean_first, in_axes=(0, None))(deltas.astype(jnp.float32) * steps.root[None], steps.axis)


def mean_first(steps: Float[Array, "batch time n"], axis: Float[Array, "batch time"]) -> Float[Array, "batch time n"]:
    """The steps reflected along time, so that the first one holds their mean.

    No sum changes, as long as inputs and output gradients are both reflected. The output gradients of keys sum to
    zero over time, as softmax ignores what all its arguments have in common, while inputs have a large mean: without
    this, sums of many large terms would have to cancel.
    """
    twice = 2 * axis / jnp.sum(axis**2, axis=1, keepdims=True)
    return steps - twice[:, :, None] * jnp.einsum("bt,btn->bn", axis, steps)[:, None, :]
