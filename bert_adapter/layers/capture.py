"""What enters and what leaves every layer, with its gradient, in one forward and one backward pass."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Shaped

from bert_adapter.layers.layer import Order, by_step, matrix_shape, moved, moved_back, real_steps, split
from bert_adapter.layers.observing import Site, observing
from bert_adapter.layers.places import kernel_path
from bert_adapter.layers.stacks import indexed, unstacked, whole

Batch = Mapping[str, Any]
Forward = Callable[[Any, Batch], Any]
Place = tuple[str, int]  # a layer's path, and the number of its call
NEAR = 2.0**-13  # how far two float32 products of one sum may be apart: bfloat16 is further
PROBE = "captured_"  # begins the names of zeros that are put beside a kernel


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["count"])
@dataclass(frozen=True)
class Lookup:
    """What enters a table: the numbers of its rows; `count`, which is no row's, for padding that is known as such."""

    rows: Any  # (batch, time), integers, or their shape
    count: int


class Captured(NamedTuple):
    """A model's output, what enters its layers, and how a gradient of the output reaches what leaves them.

    inputs: by path, (batch, time, in), or a `Lookup`.
    deltas: (gradient of a scalar with respect to the output) -> its gradients with respect to the layers' outputs; and
      of the layers whose kernel is to pass these on, deltas @ kernel.T, (batch, time, in).
    onward: of the layers whose kernel is to pass inputs on, inputs @ kernel, (batch, time, out).
    steps: by path, how many time steps of each example enter the layer, without padding.
    """

    output: Any
    inputs: dict[str, Any]
    deltas: Callable[[Any], tuple[dict[str, Float[Array, "batch time out"]], dict[str, Float[Array, "batch time in"]]]]
    onward: dict[str, Float[Array, "batch time out"]]
    steps: dict[str, Float[Array, " batch"]]


class Call(NamedTuple):
    """One call of a layer: the shapes of what enters and leaves it, and how these are read as steps.

    lifted: the call is inside a transformation of the model's own, such as `nn.scan` or `nn.remat`. No array leaves it,
      or reaches it, but on the ways of parameters and their gradients.
    stack: the leading axes that the kernel has outside.
    looked_up: how many rows the table has; 0 if it is a kernel.
    shape: of the kernel, as a matrix.
    """

    inputs: jax.ShapeDtypeStruct
    outputs: jax.ShapeDtypeStruct
    input_axes: int
    order: Order
    lifted: bool
    stack: tuple[int, ...]
    looked_up: int
    shape: tuple[int, int]

    @property
    def output_axes(self) -> int:
        """How many of the output's axes are the kernel's."""
        return self.outputs.ndim - self.inputs.ndim + self.input_axes

    @property
    def at_hand(self) -> bool:
        """Whether the model itself makes what the kernel passes on, in float32, where that can be had."""
        return not self.lifted and self.inputs.dtype == self.outputs.dtype == jnp.float32


Passes = Callable[[str, tuple[int, int]], int | None]


def nothing(path: str, shape: tuple[int, int]) -> None:
    """Nothing is wanted as a kernel passes it on."""


def capture(forward: Forward, params: Any, batch: Batch, paths: frozenset[str], passes: Passes = nothing) -> Captured:
    """x and delta of every layer in `paths`: the gradient of its kernel, as a matrix, is sum_bt outer(x_bt, delta_bt).

    `forward(params, batch)` runs the model. Every layer's output gets a zero added, and the gradient with respect to
    that zero is delta, so one backward pass serves all layers and no gradient of a kernel is formed; each call of
    `deltas` is one. A layer that is called more than once has the steps of all calls, one call after the other, and
    those of padding are zero. Where rows of an input are several for each example, those of one example follow each
    other. Without dropout, unless `forward` asks for it. Holds the activations of one batch.

    passes: (path, shape of the kernel as a matrix) -> 0 where inputs are wanted as the kernel passes them on, 1 where
      deltas are. The model makes both anyway, but for a bias: they cost nothing where they can be had.

    Raises:
      ValueError: a path is not a layer of `LAYERS` that `forward` calls, or one kernel serves many calls that are
        traced as one, as in `nn.vmap`.
    """
    calls = traced_calls(forward, params, batch, paths)
    sides = sides_of(calls, paths, passes)
    products, gradients = (made_by_model(calls, sides, side) for side in (0, 1))
    zeros: Any = {place: fresh_probes(call, back=place in gradients) for place, call in calls.items()}
    first: dict[int, Place] = {}  # the first call that an array enters, by the array's id
    shared: dict[Place, Place] = {}  # the same for each call

    def perturbed(zeros: Any) -> tuple[Any, Any]:
        seen: dict[Place, Array] = {}
        made: dict[Place, Array] = {}

        def enter(place: Place, inputs: Array) -> Array:
            return inputs + zeros[place]["back"] if place in gradients else inputs

        def perturb(place: Place, site: Site, inputs: Array, outputs: Array) -> Array:
            if place not in calls or calls[place].lifted:
                return exported(site, place, inputs, outputs)
            shared[place] = first.setdefault(id(inputs), place)
            seen[shared[place]] = inputs  # held, so that its id is no other's
            if place in products:
                made[place] = without_bias(site, calls[place], outputs)
            return outputs + zeros[place]["outputs"]

        probed = with_probes(params, {place: zero for place, zero in zeros.items() if calls[place].lifted})
        return touched(forward, probed, batch, paths, touch=perturb, enter=enter), (seen, made)

    output, pull, (entered, made) = jax.vjp(perturbed, zeros, has_aux=True)
    seen = {place: entered[one] for place, one in shared.items()} | lifted_inputs(pull, output, calls)
    steps, mask = partial(by_path, calls=calls, batch=batch, paths=paths), batch.get("attention_mask")

    def deltas(gradient: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        (found,) = pull(gradient)
        leaving = steps({place: each["outputs"] for place, each in found.items()}, of_inputs=False)
        back = steps({place: found[place]["back"] for place in gradients}, of_inputs=True)
        return leaving, multiplied(params, leaving, back, paths_of(sides, 1), back=True)

    inputs, onward = steps(seen, of_inputs=True, mask=mask), steps(made, of_inputs=False, mask=mask)
    onward = multiplied(params, inputs, onward, paths_of(sides, 0))
    return Captured(output, inputs, deltas, onward, steps=steps_of(calls, batch, paths))


def steps_of(calls: Mapping[Place, Call], batch: Batch, paths: frozenset[str]) -> dict[str, Float[Array, " batch"]]:
    """By path, how many time steps of each example enter the layer, in all its calls, without padding."""
    count, mask, found = examples(batch), batch.get("attention_mask"), {}
    for (path, _), call in calls.items():
        rows = math.prod(call.inputs.shape) // (1 if call.looked_up else call.shape[0])
        if mask is None or mask.size != rows:
            each = jnp.full(count, rows / count, jnp.float32)
        else:
            each = jnp.sum(real_steps(mask, count, -1), axis=1, dtype=jnp.float32)
        for index in set(indexed(path, call.stack)) & paths:
            found[index] = found[index] + each if index in found else each
    return found


def lifted_inputs(pull: Callable, output: Any, calls: Mapping[Place, Call]) -> dict[Place, Array]:
    """What enters the calls that no array leaves but as a gradient."""
    lifted = [place for place, call in calls.items() if call.lifted]
    (exports,) = pull(jax.tree.map(jnp.zeros_like, output)) if lifted else ({},)
    return {place: exports[place]["inputs"] for place in lifted}


def paths_of(sides: Mapping[str, int], side: int) -> list[str]:
    """The paths of which that side is wanted as the kernel passes it on."""
    return [path for path, each in sides.items() if each == side]


def multiplied(
    params: Any, steps: Mapping[str, Any], made: Mapping[str, Any], paths: list[str], back: bool = False
) -> dict[str, Any]:
    """By path, the steps @ kernel, or @ kernel.T, in float32, by the model itself where it has made that."""
    flat: dict[str, Any] = dict(flatten_dict(unstacked(params, paths), sep="/"))
    found = {}
    for path in paths:
        array = steps[path].astype(jnp.float32)
        kernel = jnp.asarray(flat[kernel_path(flat, path)], jnp.float32)
        width = array.shape[-1]
        kernel = kernel.reshape(-1, width).T if back else kernel.reshape(width, -1)
        found[path] = confirmed(made[path], array, kernel) if path in made else array @ kernel
    return found


def confirmed(
    made: Float[Array, "batch time n"], steps: Float[Array, "batch time m"], kernel: Float[Array, "m n"]
) -> Float[Array, "batch time n"]:
    """What the model made, if that is steps @ kernel as far as a random combination of the columns tells; else this.

    It is not if a layer does more than a `Layer` should, rounds what it multiplies, or adds a bias that is far larger.
    """
    direction = np.random.default_rng(0).normal(size=kernel.shape[1]).astype(np.float32)
    wanted, got = steps @ (kernel @ direction), made @ direction
    same = jnp.linalg.norm(got - wanted) <= NEAR * jnp.linalg.norm(wanted)
    return jax.lax.cond(same, lambda: made, lambda: steps @ kernel)


def sides_of(calls: Mapping[Place, Call], paths: frozenset[str], passes: Passes) -> dict[str, int]:
    """By path, which side is wanted as the kernel passes it on, of those where one is.

    Sorted: the program would be another in every process.
    """
    shapes = {path: call.shape for place, call in calls.items() for path in indexed(place[0], call.stack)}
    kernels = {place[0] for place, call in calls.items() if not call.looked_up}
    wanted = {path: passes(path, shapes[path]) for path in sorted(paths) if whole(path) in kernels}
    return {path: side for path, side in wanted.items() if side is not None}


def made_by_model(calls: Mapping[Place, Call], sides: Mapping[str, int], side: int) -> list[Place]:
    """The calls in which the model makes what is wanted of that side itself, where that goes for all of a layer's."""
    others = {place[0] for place, call in calls.items() if not call.at_hand}
    return [place for place in calls if sides.get(place[0]) == side and place[0] not in others]


def without_bias(site: Site, call: Call, outputs: Array) -> Array:
    """inputs @ kernel, from what leaves the layer."""
    bias = site.param("bias") if getattr(site.module, "use_bias", True) else None
    if bias is None:
        return outputs
    plain = moved(outputs, call.order.outputs)
    kept = plain.ndim - call.output_axes
    bias = bias.reshape((1,) * kept + plain.shape[kept:]).astype(plain.dtype)
    return moved_back(plain - bias, call.order.outputs)


def touched(
    forward: Forward,
    params: Any,
    batch: Batch,
    paths: frozenset[str],
    *,
    touch: Callable,
    enter: Callable | None = None,
) -> Any:
    """The output of `forward`, where touch(place, site, x, y) replaces the output y of each call of a layer.

    enter: (place, x) -> what the call has in the place of x.
    """
    wanted, calls = {whole(path) for path in paths}, Counter()
    begun: dict[str, list[Place]] = defaultdict(list)  # by path, the calls that have not ended: one may make another

    def entered(site: Site, inputs: Any) -> Any:
        if site.path not in wanted:
            return inputs
        begun[site.path].append((site.path, calls[site.path]))
        calls[site.path] += 1
        return inputs if enter is None else enter(begun[site.path][-1], inputs)

    def counted(site: Site, inputs: Any, outputs: Any) -> Any:
        if site.layer is None or site.path not in wanted:
            return outputs
        return touch(begun[site.path].pop(), site, inputs, outputs)

    with observing(counted, entered):
        return forward(params, batch)


def traced_calls(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> dict[Place, Call]:
    """All calls of the layers that reach the output."""
    calls = every_call(forward, params, batch, paths)
    if missing := sorted(path for path in paths if (whole(path), 0) not in calls):
        called = sorted({path for path, _ in calls})
        raise ValueError(f"no layer that can be factorised is called under {missing}; called are {called}")
    if lifted := {place: call for place, call in calls.items() if call.lifted}:
        used = reads(forward, params, batch, lifted)
        calls = {place: call for place, call in calls.items() if place not in lifted or place in used}
    return calls


def used_often(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> dict[str, str]:
    """By path, of kernels that one call uses many times, as `nn.scan` and `nn.vmap` do, why that is too often."""
    calls: dict[Place, Call] = {}
    jax.eval_shape(lambda params, batch: calls.update(every_call(forward, params, batch, paths)), params, dict(batch))
    lifted = {place: call for place, call in calls.items() if call.lifted}
    most = uses(forward, params, batch, lifted) if lifted else {}
    return {path: too_often(count) for (path, _), count in most.items() if count > 1}


def too_often(count: float) -> str:
    """What is wrong with a kernel that is used so many times by one call."""
    return (
        f"is called {count:.0f} times with one kernel by nn.scan or nn.vmap, and its calls cannot be told apart: loop "
        f"over them in Python, or exclude the layer"
    )


def every_call(forward: Forward, params: Any, batch: Batch, paths: frozenset[str]) -> dict[Place, Call]:
    """All calls of the layers."""
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    calls: dict[Place, Call] = {}
    level: list[Any] = []  # of JAX's transformations around the model

    def note(place: Place, site: Site, inputs: Array, outputs: Array) -> Array:
        assert site.layer is not None
        name = site.layer.kernel
        kernel, outside = site.param(name), flat.get(f"{site.path}/{name}")
        if outside is None:
            raise ValueError(f"forward: the layer {site.path!r} has no {name} at that path of params")
        x, y = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (inputs, outputs))
        calls[place] = Call(
            inputs=x,
            outputs=y,
            input_axes=site.layer.summed_axes(site.module),
            order=site.layer.order(site.module, inputs.ndim),
            lifted=kernel is not outside or current_trace() != level[0],
            stack=outside.shape[: outside.ndim - kernel.ndim],
            looked_up=len(kernel) if site.layer.looked_up else 0,
            shape=matrix_shape(split(kernel.shape, site.layer.input_axes(site.module))),
        )
        return outputs

    def run() -> Any:
        level.append(current_trace())
        return touched(forward, params, batch, paths, touch=note)

    jax.eval_shape(run)
    return calls


def reads(forward: Forward, params: Any, batch: Batch, calls: dict[Place, Call]) -> set[Place]:
    """Those lifted calls that reach the output: `nn.scan` traces a call twice and runs it once.

    Raises:
      ValueError: one of them stands for several calls of one kernel, whose sums could not be told apart.
    """
    paths = frozenset(path for path, _ in calls)
    zeros, run = probed(forward, calls)
    program = jax.make_jaxpr(run)(zeros, params, batch).jaxpr
    _, read = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    found = jax.tree.unflatten(jax.tree.structure(zeros), read[: len(jax.tree.leaves(zeros))])
    used = {place for place, each in found.items() if each["outputs"]}
    if lost := sorted(paths - {path for path, _ in used}):
        raise ValueError(
            f"forward: its output does not depend on {lost} by way of params: hand on all that params hold"
        )
    for (path, _), count in uses(forward, params, batch, calls).items():
        if count > 1:
            raise ValueError(f"the layer {path!r} {too_often(count)}")
    return used


def probed(forward: Forward, calls: Mapping[Place, Call]) -> tuple[Any, Callable[[Any, Any, Batch], Any]]:
    """Zeros, and (zeros, params, batch) -> the output, whose gradients tell of the calls."""
    paths = frozenset(path for path, _ in calls)

    def run(zeros: Any, params: Any, batch: Batch) -> Any:
        def touch(place: Place, site: Site, inputs: Array, outputs: Array) -> Array:
            return exported(site, place, inputs, outputs)

        return touched(forward, with_probes(params, zeros), batch, paths, touch=touch)

    return {place: fresh_probes(call) for place, call in calls.items()}, run


def uses(forward: Forward, params: Any, batch: Batch, calls: Mapping[Place, Call]) -> dict[Place, float]:
    """How many times each lifted call uses its kernel, at most at any index of it."""
    zeros, run = probed(forward, calls)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), (params, batch))

    def counts() -> Any:
        arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (zeros, *shapes))
        output, pull = jax.vjp(lambda zeros: run(zeros, *arrays[1:]), arrays[0])
        (found,) = pull(jax.tree.map(jnp.ones_like, output))
        return {place: jnp.max(each["count"]) for place, each in found.items()}

    with jax.ensure_compile_time_eval():
        return {place: float(count) for place, count in jax.jit(counts)().items()}


def fresh_probes(call: Call, back: bool = False) -> dict[str, Array]:
    """Zeros whose gradients are delta and, for what is lifted, x and how often the zeros are read.

    back: one whose gradient is what the kernel makes of delta, too.
    """
    zeros = {"outputs": jnp.zeros((*call.stack, *call.outputs.shape), call.outputs.dtype)}
    if back:
        zeros["back"] = jnp.zeros(call.inputs.shape, call.inputs.dtype)
    if call.lifted:
        kind = jnp.float32 if call.looked_up else call.inputs.dtype
        zeros["inputs"] = jnp.zeros((*call.stack, *call.inputs.shape), kind)
        zeros["count"] = jnp.zeros(call.stack, jnp.float32)
    return zeros


def probe_name(place: Place, name: str) -> str:
    """What a probe is called among the parameters of its layer."""
    return f"{PROBE}{name}_{place[1]}"


def with_probes(params: Any, probes: Mapping[Place, Any]) -> Any:
    """The parameters with the probes beside the kernels."""
    if not probes:
        return params
    flat = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for place, found in probes.items():
        flat |= {f"{place[0]}/{probe_name(place, name)}": zero for name, zero in found.items()}
    return unflatten_dict(flat, sep="/")


def exported(site: Site, place: Place, inputs: Array, outputs: Array) -> Array:
    """The outputs, if there are probes for the call with a way for the gradients."""
    zeros = [site.param(probe_name(place, name)) for name in ("outputs", "inputs", "count")]
    if any(zero is None for zero in zeros):
        return outputs
    return leaving(outputs + zeros[0].astype(outputs.dtype), zeros[1], zeros[2], inputs)


@jax.custom_vjp
def leaving(outputs: Array, zero: Array, count: Array, inputs: Array) -> Array:
    """The outputs. Backwards, the gradient of `zero` is the inputs, and that of `count` is one."""
    return outputs


def leaving_forwards(outputs: Array, zero: Array, count: Array, inputs: Array) -> tuple[Array, Any]:
    """What is kept: the inputs, and empty arrays of the dtypes."""
    return outputs, (inputs, zero[..., :0], count)


def leaving_backwards(kept: Any, gradient: Array) -> tuple[Array, Array, Array, Array | None]:
    """The gradients."""
    inputs, zero, count = kept
    one = jnp.ones_like(count)
    once = jnp.where(jnp.ravel(inputs)[0] == 0, one, one)  # of the inputs, so that `nn.vmap` adds it up over its lanes
    of_inputs = jnp.zeros_like(inputs) if jnp.issubdtype(inputs.dtype, jnp.inexact) else None
    return gradient, inputs.astype(zero.dtype), once, of_inputs


leaving.defvjp(leaving_forwards, leaving_backwards)


def by_path(
    arrays: Mapping[Place, Array],
    *,
    calls: dict[Place, Call],
    batch: Batch,
    paths: frozenset[str],
    of_inputs: bool,
    mask: Any = None,
) -> dict[str, Any]:
    """What enters, or what leaves, the layers at the paths, as steps of the examples, one call after the other.

    One array for all layers that the same one enters. Of calls that no array is given for, nothing.

    of_inputs: whether the arrays have the axes of inputs; else they have those of outputs.
    mask: what tells padding, which is to be zero where a layer has several calls.
    """
    parts: dict[str, list[Any]] = defaultdict(list)
    made: dict[Any, tuple[Array, Any]] = {}  # by id, with the array, which is then no other's
    for place in (place for place in calls if place in arrays):
        call = calls[place]
        order, axes = (call.order.inputs, call.input_axes) if of_inputs else (call.order.outputs, call.output_axes)
        for path, index in zip(indexed(place[0], call.stack), np.ndindex(*call.stack), strict=True):
            array = arrays[place][index] if index else arrays[place]
            key = id(array), axes, order, call.looked_up
            if key not in made:
                steps = of_examples(by_step(moved(array, order), axes), batch, place[0])
                rows = of_inputs and call.looked_up
                made[key] = array, Lookup(steps[..., 0].astype(jnp.int32), call.looked_up) if rows else steps
            parts[path].append(made[key][1])
    return {path: joined(parts[path], mask) for path in sorted(paths) if path in parts}


def joined(parts: list[Any], mask: Any) -> Any:
    """The steps of several calls, without those of padding, which could not be told any more."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Lookup):
        rows = jnp.concatenate([real_rows(part, mask).rows for part in parts], axis=1)
        return Lookup(rows, parts[0].count)
    return jnp.concatenate([part if mask is None else unpadded(part, mask) for part in parts], axis=1)


def real_rows(lookup: Lookup, mask: Any) -> Lookup:
    """The lookup without that of padding, where the mask is of its steps."""
    if mask is None or mask.size != lookup.rows.size:
        return lookup
    return Lookup(jnp.where(real_steps(mask, *lookup.rows.shape), lookup.rows, lookup.count), lookup.count)


def unpadded(steps: Array, mask: Any) -> Array:
    """The steps with zeros for padding, where the mask is of them."""
    if mask is None or mask.size != steps[..., 0].size:
        return steps
    return jnp.where(real_steps(mask, *steps.shape[:2], 1), steps, jnp.zeros((), steps.dtype))


def of_examples(steps: Shaped[Array, "rows time n"], batch: Batch, path: str) -> Shaped[Array, "batch steps n"]:
    """The steps of each example, where it has one row or several."""
    count = examples(batch)
    if len(steps) % count:
        raise ValueError(f"the layer {path!r} is called with {len(steps)} rows for {count} examples: exclude it")
    return steps if len(steps) == count else steps.reshape(count, -1, steps.shape[-1])


def examples(batch: Batch) -> int:
    """How many a batch holds."""
    return len(next(iter(batch.values())))
