"""A program of JAX as a graph of ONNX."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from bert_adapter.checkpoint.names import by_path
from bert_adapter.exporting.graph import Graph, Value
from bert_adapter.exporting.primitives import PRIMITIVES, cast, gelu
from bert_adapter.exporting.program import LAYER_NORM, NO_ROW, OUTPUTS, Program, with_norms
from bert_adapter.families.activations import GELU

INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # under which an equation holds a program of its own


def translated(program: Program) -> tuple[Graph, dict[str, Value]]:
    """The graph, and its outputs by name.

    Raises:
      ValueError: names a primitive of JAX that has no operation of ONNX here.
    """
    arguments = program.arguments()
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64():  # pyright: ignore
        traced, shapes = jax.make_jaxpr(with_norms(program.run), return_shape=True)(program.params, arguments)
    first = next(iter(program.inputs))
    graph = Graph({str(symbol): (first, axis) for axis, symbol in enumerate(program.inputs[first])})
    params = [Value(graph.constant(leaf, path), leaf.shape) for path, leaf in by_path(program.params).items()]
    given = [Value(narrowed(graph, name), tuple(program.inputs[name])) for name in sorted(program.inputs)]
    outputs = run(graph, traced.jaxpr, held(graph, traced.consts), [*params, *given])
    whole = [
        float32(graph, value, variable.aval) for value, variable in zip(outputs, traced.jaxpr.outvars, strict=True)
    ]
    named = dict(zip(sorted(shapes), whole, strict=True))
    return graph, {name: named[name] for name in sorted(named, key=[*OUTPUTS, *named].index)}


def narrowed(graph: Graph, name: str) -> str:
    """An input in 32 bits, whose numbers beyond them are no ids: cut to its lower half one would be another id."""
    least, most = (graph.constant(np.asarray(number, np.int64)) for number in (-1, NO_ROW))
    return cast(graph, graph.add("Min", graph.add("Max", name, least), most), np.int32)


def float32(graph: Graph, value: Value, wanted: Any) -> Value:
    """An output at its shape, in float32 whatever it was computed in."""
    name = graph.whole(value, wanted.shape)
    return Value(name if wanted.dtype == np.float32 else cast(graph, name, np.float32), wanted.shape)


def held(graph: Graph, arrays: Sequence[Any]) -> list[Value]:
    """Arrays that a program has inside."""
    return [Value(graph.constant(np.asarray(array)), np.shape(array)) for array in arrays]


def run(graph: Graph, jaxpr: Any, constants: list[Value], given: list[Value]) -> list[Value]:
    """The outputs of a program, whose equations become nodes one after the other."""
    known: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *given], strict=True))

    def value(variable: Any) -> Value:
        if not isinstance(variable, Literal):
            return known[variable]
        return held(graph, [np.asarray(variable.val, getattr(variable.aval, "dtype"))])[0]  # noqa: B009

    for equation in jaxpr.eqns:
        made = written(graph, equation, [value(variable) for variable in equation.invars])
        known |= dict(zip(equation.outvars, made, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def written(graph: Graph, equation: Any, values: list[Value]) -> list[Value]:
    """What an equation makes of its operands."""
    name, params = equation.primitive.name, equation.params
    if str(params.get("name", "")).startswith(LAYER_NORM):
        epsilon = float(params["name"].removeprefix(LAYER_NORM))
        whole = graph.whole(values[0], equation.invars[0].aval.shape)
        norm = graph.add("LayerNormalization", whole, *(each.name for each in values[1:]), axis=-1, epsilon=epsilon)
        return [Value(norm, equation.outvars[0].aval.shape)]
    if params.get("name") == GELU:
        return [gelu(graph, equation, *values)]
    inner = next((params[key] for key in INNER if key in params), None)
    if inner is not None and name not in ("scan", "while", "cond"):
        return run(graph, getattr(inner, "jaxpr", inner), held(graph, getattr(inner, "consts", ())), values)
    if name not in PRIMITIVES:
        raise ValueError(f"to='onnx': the model uses JAX's {name}, supported: {', '.join(PRIMITIVES)}")
    found = PRIMITIVES[name](graph, equation, *values)
    return found if isinstance(found, list) else [found]
