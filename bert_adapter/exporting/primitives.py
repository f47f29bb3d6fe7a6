"""What each of JAX's primitives is in ONNX, of opset 17."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bert_adapter.exporting.graph import Graph, Node, Value, Write, together

BACKWARDS = np.iinfo(np.int64).min  # where a slice ends that runs to the first number


def kind(dtype: Any) -> int:
    """ONNX's number for a dtype."""
    from onnx.helper import np_dtype_to_tensor_dtype  # pyright: ignore[reportMissingImports]

    return np_dtype_to_tensor_dtype(np.dtype(dtype))


def cast(graph: Graph, name: str, dtype: Any) -> str:
    return graph.add("Cast", name, to=kind(dtype))


def scalar(graph: Graph, equation: Any, number: float | int) -> str:
    """A constant of the dtype of the equation's first operand."""
    return graph.constant(np.asarray(number, equation.invars[0].aval.dtype))


def elementwise(op: str, **attributes: int) -> Write:
    """An operation on the numbers in the same places."""
    return lambda graph, equation, *values: Value(
        graph.add(op, *(value.name for value in values), **attributes), together(*(value.shape for value in values))
    )


def logical(op: str) -> Write:
    """An operation on booleans; on the bits of integers there is none in opset 17."""

    def write(graph: Graph, equation: Any, *values: Value) -> Value:
        if equation.outvars[0].aval.dtype.kind != "b":
            raise ValueError(f"{equation.primitive}: got integers, wanted booleans")
        return elementwise(op)(graph, equation, *values)

    return write


def chain(*ops: str) -> Write:
    """Operations on one number, one after the other."""

    def write(graph: Graph, equation: Any, value: Value) -> Value:
        for op in ops:
            value = value._replace(name=graph.add(op, value.name))
        return value

    return write


def same(graph: Graph, equation: Any, value: Value) -> Value:
    return value


def not_equal(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    return Value(graph.add("Not", graph.add("Equal", a.name, b.name)), together(a.shape, b.shape))


def square(graph: Graph, equation: Any, value: Value) -> Value:
    return value._replace(name=graph.add("Mul", value.name, value.name))


def integer_pow(graph: Graph, equation: Any, value: Value) -> Value:
    if (power := equation.params["y"]) == 2:
        return square(graph, equation, value)
    return value._replace(name=graph.add("Pow", value.name, scalar(graph, equation, power)))


def erfc(graph: Graph, equation: Any, value: Value) -> Value:
    """1 - erf(x); of -x / sqrt(2), as in GELU, in the form that onnxruntime has a kernel for."""
    one, node = scalar(graph, equation, 1), graph.made_by.get(value.name, Node("", (), ()))
    negated = graph.made_by.get(node.inputs[0]) if node.op == "Mul" else None
    if negated and negated.op == "Neg" and np.allclose(graph.constants.get(node.inputs[1], 0), 0.5**0.5, atol=1e-3):
        scaled = graph.add("Div", negated.inputs[0], scalar(graph, equation, 2**0.5))
        return value._replace(name=graph.add("Add", graph.add("Erf", scaled), one))
    return value._replace(name=graph.add("Sub", one, graph.add("Erf", value.name)))


def gelu(graph: Graph, equation: Any, x: Value) -> Value:
    """x (1 + erf(x / sqrt(2))) / 2, in the form that onnxruntime has a kernel for."""
    one, half, root = (scalar(graph, equation, number) for number in (1, 0.5, 2**0.5))
    share = graph.add("Add", graph.add("Erf", graph.add("Div", x.name, root)), one)
    return x._replace(name=graph.add("Mul", graph.add("Mul", x.name, share), half))


def divide(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    """a / b; a softmax, where it is one, or its product with what `a` is multiplied by."""
    last = len(a.shape) - 1
    weights, *rest = inputs_of(graph, a.name, "MatMul")
    for exponentials in (a.name, weights):
        if (source := softmax_of(graph, exponentials, b.name, last)) is not None:
            softmax = graph.add("Softmax", source, axis=-1)
            return a._replace(name=softmax if exponentials == a.name else graph.add("MatMul", softmax, *rest))
    return elementwise("Div")(graph, equation, a, b)


def inputs_of(graph: Graph, name: str, op: str) -> tuple[str, ...]:
    """The inputs of the node that makes it, if that is one of the operation."""
    node = graph.made_by.get(name)
    return node.inputs if node is not None and node.op == op else ("", "")


def softmax_of(graph: Graph, a: str, b: str, last: int) -> str | None:
    """x, if a is exp(x - max x) and b is the sum of a, both along the last axis."""
    axis = graph.integers(last)
    x, largest = inputs_of(graph, inputs_of(graph, a, "Exp")[0], "Sub")
    reduced, below = inputs_of(graph, largest, "Unsqueeze")
    found = graph.made_by.get(inputs_of(graph, reduced, "Max")[-1] or reduced)  # of minus infinity too
    along = found is not None and (found.op, found.inputs, dict(found.attributes).get("axes")) == (
        "ReduceMax",
        (x,),
        (last,),
    )
    total, beside = inputs_of(graph, b, "Unsqueeze")
    return x if along and inputs_of(graph, total, "ReduceSum") == (a, axis) and below == beside == axis else None


def select(graph: Graph, equation: Any, which: Value, no: Value, *yes: Value) -> Value:
    if len(yes) != 1 or equation.invars[0].aval.dtype.kind != "b":
        raise ValueError(f"select_n: got {1 + len(yes)} cases, wanted two and a boolean")
    if equation.invars[1].aval.dtype.kind == "b":  # onnxruntime's Where takes none
        parts = graph.add("And", which.name, yes[0].name), graph.add("And", graph.add("Not", which.name), no.name)
        return Value(graph.add("Or", *parts), together(which.shape, no.shape, yes[0].shape))
    shape = together(which.shape, no.shape, yes[0].shape)
    return Value(graph.add("Where", which.name, yes[0].name, no.name), shape)


def convert(graph: Graph, equation: Any, value: Value) -> Value:
    dtype = equation.params["new_dtype"]
    return value if dtype == equation.invars[0].aval.dtype else value._replace(name=cast(graph, value.name, dtype))


def clamp(graph: Graph, equation: Any, low: Value, value: Value, high: Value) -> Value:
    name = graph.add("Min", graph.add("Max", value.name, low.name), high.name)
    return Value(name, together(low.shape, value.shape, high.shape))


def broadcast(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    """The tensor with axes of one number in the new places: what uses it repeats it."""
    places, rank = equation.params["broadcast_dimensions"], len(equation.params["shape"])
    if not value.shape:
        return value
    new = [axis for axis in range(rank) if axis not in places]
    shape = [1] * rank
    for place, size in zip(places, value.shape, strict=True):
        shape[place] = size
    return Value(graph.add("Unsqueeze", value.name, graph.integers(*new)) if new else value.name, tuple(shape))


def reshape(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    before, after = equation.invars[0].aval.shape, tuple(equation.params["new_sizes"])
    return Value(graph.reshape(graph.whole(value, before), before, after), after)


def squeeze(graph: Graph, equation: Any, value: Value) -> Value:
    axes = equation.params["dimensions"]
    if not value.shape:
        return value
    kept = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
    return Value(graph.add("Squeeze", value.name, graph.integers(*axes)), kept)


def transpose(graph: Graph, equation: Any, value: Value) -> Value:
    order = equation.params["permutation"]
    if not value.shape:
        return value
    return Value(permuted(graph, value.name, order), tuple(value.shape[axis] for axis in order))


def permuted(graph: Graph, name: str, order: Sequence[int]) -> str:
    """The tensor with its axes in this order."""
    return name if list(order) == list(range(len(order))) else graph.add("Transpose", name, perm=list(order))


def dot_general(graph: Graph, equation: Any, a: Value, b: Value) -> Value:
    """A product of matrices: the axes of the batch first, then what is kept of a, then of b."""
    (a_sum, b_sum), (a_batch, b_batch) = equation.params["dimension_numbers"]
    a_shape, b_shape = (operand.aval.shape for operand in equation.invars)
    a_kept, b_kept = kept(a_shape, (*a_sum, *a_batch)), kept(b_shape, (*b_sum, *b_batch))
    left = permuted(graph, graph.whole(a, a_shape), (*a_batch, *a_kept, *a_sum))
    right = permuted(graph, graph.whole(b, b_shape), (*b_batch, *b_sum, *b_kept))
    batch, rows, between, columns = (
        [shape[axis] for axis in axes]
        for shape, axes in ((a_shape, a_batch), (a_shape, a_kept), (a_shape, a_sum), (b_shape, b_kept))
    )
    flat = rows if not batch and len(between) == 1 else [product(rows)]  # MatMul repeats a matrix by itself
    left = graph.reshape(left, [*batch, *rows, *between], [*batch, *flat, product(between)])
    right = graph.reshape(right, [*batch, *between, *columns], [*batch, product(between), product(columns)])
    name, shape = graph.add("MatMul", left, right), [*batch, *rows, *columns]
    name = graph.reshape(name, [*batch, *flat, product(columns)], shape)
    wanted = equation.outvars[0].aval.dtype
    return Value(name if wanted == equation.invars[0].aval.dtype else cast(graph, name, wanted), tuple(shape))


def kept(shape: Sequence[Any], gone: Sequence[int]) -> list[int]:
    """The other axes."""
    return [axis for axis in range(len(shape)) if axis not in gone]


def product(sizes: Sequence[Any]) -> Any:
    """Of sizes that may be symbols."""
    result = 1
    for size in sizes:
        result = result * size
    return result


def reduce(op: str) -> Write:
    """An operation along axes, which vanish."""

    def write(graph: Graph, equation: Any, value: Value) -> Value:
        axes, truth = equation.params["axes"], equation.invars[0].aval.dtype.kind == "b"
        name = graph.whole(value, equation.invars[0].aval.shape)
        name = cast(graph, name, np.int32) if truth else name
        if op == "ReduceSum":
            name = graph.add(op, name, graph.integers(*axes), keepdims=0)
        else:
            name = graph.add(op, name, axes=list(axes), keepdims=0)
        return Value(cast(graph, name, bool) if truth else name, equation.outvars[0].aval.shape)

    return write


def argument(op: str) -> Write:
    """The place of the largest or the smallest number, of equal ones the first."""

    def write(graph: Graph, equation: Any, value: Value) -> Value:
        (axis,), operand = equation.params["axes"], equation.invars[0].aval
        name = graph.whole(value, operand.shape)
        name = cast(graph, name, np.int32) if operand.dtype.kind == "b" else name
        found = graph.add(op, name, axis=axis, keepdims=0)
        return Value(cast(graph, found, equation.params["index_dtype"]), equation.outvars[0].aval.shape)

    return write


def cumulated(graph: Graph, equation: Any, value: Value) -> Value:
    shape, axis = equation.invars[0].aval.shape, equation.params["axis"]
    place = graph.constant(np.asarray(axis, np.int64))
    name = graph.add("CumSum", graph.whole(value, shape), place, reverse=int(equation.params["reverse"]))
    return Value(name, shape)


def iota(graph: Graph, equation: Any, *_: Value) -> Value:
    """0, 1, ... along one axis; the others are of one number."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    stop = graph.add("Squeeze", graph.size(shape[axis]), graph.integers(0))
    zero, one = (graph.constant(np.asarray(number, np.int64)) for number in (0, 1))
    name = cast(graph, graph.add("Range", zero, stop, one), equation.params["dtype"])
    new = [other for other in range(len(shape)) if other != axis]
    name = graph.add("Unsqueeze", name, graph.integers(*new)) if new else name
    return Value(name, tuple(size if place == axis else 1 for place, size in enumerate(shape)))


def dimension(graph: Graph, equation: Any) -> Value:
    """The size of an axis as a number."""
    name = graph.add("Squeeze", graph.size(equation.params["dim"]), graph.integers(0))
    return Value(cast(graph, name, equation.outvars[0].aval.dtype), ())


def cut(graph: Graph, equation: Any, value: Value) -> Value:
    """A slice."""
    shape, params = equation.invars[0].aval.shape, equation.params
    steps = params["strides"] or (1,) * len(shape)
    name = graph.whole(value, shape)
    axes = graph.integers(*range(len(shape)))
    bounds = (graph.vector(params[end]) for end in ("start_indices", "limit_indices"))
    return Value(graph.add("Slice", name, *bounds, axes, graph.integers(*steps)), equation.outvars[0].aval.shape)


def reverse(graph: Graph, equation: Any, value: Value) -> Value:
    axes, shape = equation.params["dimensions"], equation.invars[0].aval.shape
    ends = (graph.integers(*[number] * len(axes)) for number in (-1, BACKWARDS))
    name = graph.add(
        "Slice", graph.whole(value, shape), *ends, graph.integers(*axes), graph.integers(*[-1] * len(axes))
    )
    return Value(name, shape)


def tile(graph: Graph, equation: Any, value: Value) -> Value:
    times = graph.vector(equation.params["reps"])
    name = graph.add("Tile", graph.whole(value, equation.invars[0].aval.shape), times)
    return Value(name, equation.outvars[0].aval.shape)


def concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
    names = [graph.whole(value, operand.aval.shape) for value, operand in zip(values, equation.invars, strict=True)]
    name = graph.add("Concat", *names, axis=equation.params["dimension"])
    return Value(name, equation.outvars[0].aval.shape)


def split(graph: Graph, equation: Any, value: Value) -> list[Value]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    name = graph.whole(value, equation.invars[0].aval.shape)
    names = graph.several("Split", name, graph.vector(sizes), outputs=len(sizes), axis=axis)
    return [Value(one, out.aval.shape) for one, out in zip(names, equation.outvars, strict=True)]


def pad(graph: Graph, equation: Any, value: Value, filled: Value) -> Value:
    shape, sides = equation.invars[0].aval.shape, equation.params["padding_config"]
    if any(inner for _, _, inner in sides):
        raise ValueError("pad: got padding between numbers, wanted none")
    amounts = graph.vector([low for low, _, _ in sides] + [high for _, high, _ in sides])
    return Value(graph.add("Pad", graph.whole(value, shape), amounts, filled.name), equation.outvars[0].aval.shape)


def gather(graph: Graph, equation: Any, table: Value, places: Value) -> Value:
    """Rows of a table. A place that is not there is an error of onnxruntime's, and NaN or the next one in JAX."""
    numbers, (shape, places_shape) = equation.params["dimension_numbers"], (each.aval.shape for each in equation.invars)
    if len(places_shape) == 1 and not numbers.collapsed_slice_dims:
        return cut_from(graph, equation, table, places)
    check_rows(numbers, shape, equation.params["slice_sizes"])
    name, (axis,), batch = graph.whole(table, shape), numbers.start_index_map, len(numbers.operand_batching_dims)
    if batch:
        index, lying = cast(graph, graph.whole(places, places_shape), np.int64), tuple(places_shape[:-1])
        found, made, at = graph.add("GatherND", name, index, batch_dims=batch), lying + tuple(shape[axis + 1 :]), 0
    else:
        full = places if places.shape else Value(graph.whole(places, places_shape), places_shape)
        index, lying = graph.add("Squeeze", full.name, graph.integers(len(places_shape) - 1)), full.shape[:-1]
        found, made, at = graph.add("Gather", name, index, axis=axis), (*shape[:axis], *lying, *shape[axis + 1 :]), axis
    chosen = iter(range(at, at + len(lying)))
    others = iter([*range(at), *range(at + len(lying), len(made))])
    order = [next(others if place in numbers.offset_dims else chosen) for place in range(len(made))]
    return Value(permuted(graph, found, order), tuple(made[place] for place in order))


def cut_from(graph: Graph, equation: Any, value: Value, places: Value) -> Value:
    """A slice whose beginning is computed: what JAX makes of x[:, :n] where lengths are symbols."""
    (shape, places_shape), sizes = (each.aval.shape for each in equation.invars), equation.params["slice_sizes"]
    axes = equation.params["dimension_numbers"].start_index_map
    if any(axis not in axes and sizes[axis] != shape[axis] for axis in range(len(shape))):
        raise ValueError(f"gather: got slices of {sizes} from places along {axes}, wanted whole axes elsewhere")
    begin = cast(graph, graph.whole(places, places_shape), np.int64)
    end = graph.add("Add", begin, graph.vector([sizes[axis] for axis in axes]))
    name = graph.add("Slice", *(graph.whole(value, shape), begin, end, graph.integers(*axes)))
    return Value(name, equation.outvars[0].aval.shape)


def check_rows(numbers: Any, shape: Sequence[Any], sizes: Sequence[Any]) -> None:
    """A ValueError if it is not rows along one axis, behind the axes of a batch, that are gathered."""
    batch, axes = tuple(numbers.operand_batching_dims), tuple(numbers.start_index_map)
    gone, leading = {*batch, *axes}, tuple(range(len(batch)))
    rows = len(axes) == 1 and set(numbers.collapsed_slice_dims) == set(axes) and (not batch or axes == (len(batch),))
    whole = all(axis in gone or sizes[axis] == shape[axis] for axis in range(len(shape)))
    if not (rows and whole and batch == tuple(numbers.start_indices_batching_dims) == leading):
        raise ValueError(f"gather: got {numbers} with slices of {sizes}, wanted rows along one axis")


PRIMITIVES: dict[str, Write] = {
    "abs": chain("Abs"),
    "add": elementwise("Add"),
    "add_any": elementwise("Add"),
    "and": logical("And"),
    "argmax": argument("ArgMax"),
    "argmin": argument("ArgMin"),
    "broadcast_in_dim": broadcast,
    "ceil": chain("Ceil"),
    "clamp": clamp,
    "concatenate": concatenate,
    "convert_element_type": convert,
    "copy": same,
    "copy_p": same,
    "cos": chain("Cos"),
    "cumsum": cumulated,
    "dim_as_value": dimension,
    "div": divide,
    "dot_general": dot_general,
    "eq": elementwise("Equal"),
    "erf": chain("Erf"),
    "erfc": erfc,
    "exp": chain("Exp"),
    "floor": chain("Floor"),
    "gather": gather,
    "ge": elementwise("GreaterOrEqual"),
    "gt": elementwise("Greater"),
    "integer_pow": integer_pow,
    "iota": iota,
    "le": elementwise("LessOrEqual"),
    "log": chain("Log"),
    "logistic": chain("Sigmoid"),
    "lt": elementwise("Less"),
    "max": elementwise("Max"),
    "min": elementwise("Min"),
    "mul": elementwise("Mul"),
    "ne": not_equal,
    "neg": chain("Neg"),
    "not": logical("Not"),
    "or": logical("Or"),
    "pad": pad,
    "pow": elementwise("Pow"),
    "reduce_and": reduce("ReduceMin"),
    "reduce_max": reduce("ReduceMax"),
    "reduce_min": reduce("ReduceMin"),
    "reduce_or": reduce("ReduceMax"),
    "reduce_prod": reduce("ReduceProd"),
    "reduce_sum": reduce("ReduceSum"),
    "rem": elementwise("Mod", fmod=1),  # with the sign of what is divided, as in C
    "reshape": reshape,
    "rev": reverse,
    "rsqrt": chain("Sqrt", "Reciprocal"),
    "select_n": select,
    "sign": chain("Sign"),
    "sin": chain("Sin"),
    "slice": cut,
    "split": split,
    "sqrt": chain("Sqrt"),
    "square": square,
    "squeeze": squeeze,
    "stop_gradient": same,
    "sub": elementwise("Sub"),
    "tanh": chain("Tanh"),
    "tile": tile,
    "transpose": transpose,
    "xor": logical("Xor"),
}
