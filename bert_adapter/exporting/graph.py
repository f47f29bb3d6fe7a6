"""An ONNX graph that grows node by node, with the sizes that are known only when it runs."""

import ast
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Value(NamedTuple):
    """A tensor of the graph.

    shape: as it lies there. An axis of 1 may stand for a longer one that all its rows would be equal along, and no
      axes for any: whoever needs the whole calls `Graph.whole`.
    """

    name: str
    shape: tuple[Any, ...]


class Node(NamedTuple):
    """An operation, its inputs, its attributes."""

    op: str
    inputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]


class Graph:
    """Nodes in the order in which they run, the same node never twice, and constants.

    sizes: by the name of a symbol, the input and its axis.
    """

    def __init__(self, sizes: dict[str, tuple[str, int]]):
        self.sizes = sizes
        self.nodes: dict[Node, tuple[str, ...]] = {}
        self.made_by: dict[str, Node] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.small: dict[tuple[Any, ...], str] = {}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """The name of the operation's output; of several, the first."""
        frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
        node = Node(op, inputs, tuple(sorted(frozen.items())))
        if node not in self.nodes:
            self.nodes[node] = tuple(f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(outputs))
            self.made_by |= dict.fromkeys(self.nodes[node], node)
        return self.nodes[node][0]

    def several(self, op: str, *inputs: str, outputs: int, **attributes: Any) -> tuple[str, ...]:
        """The names of all outputs of an operation."""
        return self.nodes[self.made_by[self.add(op, *inputs, outputs=outputs, **attributes)]]

    def constant(self, array: Any, name: str = "") -> str:
        """The name of an array that the graph holds."""
        array = np.asarray(array)
        key = (array.tobytes(), array.shape, array.dtype.name)
        if not name and key in self.small:
            return self.small[key]
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = array
        if array.size <= 16:
            self.small.setdefault(key, name)
        return name

    def integers(self, *numbers: int) -> str:
        """A vector of them."""
        return self.constant(np.array(numbers, np.int64))

    def size(self, dimension: Any) -> str:
        """A vector of one number, the size of an axis."""
        return self.computed(ast.parse(str(dimension).replace("^", "**"), mode="eval").body)

    def computed(self, tree: Any) -> str:
        """A vector of one number, for an expression of `jax.export`."""
        if isinstance(tree, ast.Constant):
            return self.integers(int(tree.value))  # pyright: ignore[reportArgumentType]
        if isinstance(tree, ast.Name):
            source, axis = self.sizes[tree.id]
            return self.add("Shape", source, start=axis, end=axis + 1)
        if isinstance(tree, ast.UnaryOp):
            return self.add("Neg", self.computed(tree.operand))
        if isinstance(tree, ast.BinOp):
            op, parts = OPERATORS[type(tree.op)], (tree.left, tree.right)
        else:
            op, parts = FUNCTIONS[tree.func.id], tree.args
        return self.add(op, *map(self.computed, parts))

    def vector(self, shape: Sequence[Any]) -> str:
        """The sizes of all axes."""
        if all(isinstance(size, int) for size in shape):
            return self.integers(*shape)
        return self.add("Concat", *map(self.size, shape), axis=0)

    def whole(self, value: Value, shape: Sequence[Any]) -> str:
        """The name of the tensor at this shape."""
        if value.shape == tuple(shape):
            return value.name
        return self.add("Expand", value.name, self.vector(shape))

    def reshape(self, name: str, before: Sequence[Any], after: Sequence[Any]) -> str:
        """The tensor's numbers in another shape; axes that are the same in their places need not be computed."""
        if tuple(before) == tuple(after):
            return name
        same = [i < len(before) and before[i] == after[i] for i in range(len(after))]
        open_ = [i for i, size in enumerate(after) if not same[i] and not isinstance(size, int)]
        if len(open_) > 1:
            return self.add("Reshape", name, self.vector(after))
        sizes = [0 if same[i] else -1 if i in open_ else size for i, size in enumerate(after)]
        return self.add("Reshape", name, self.integers(*sizes))

    def needed(self, outputs: Iterable[str]) -> tuple[list[Node], set[str]]:
        """The nodes that the outputs depend on, and the names of all that these read."""
        used, nodes = set(outputs), []
        for node, names in reversed(self.nodes.items()):
            if used & set(names):
                used |= set(node.inputs)
                nodes.append(node)
        return nodes[::-1], used


OPERATORS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}
FUNCTIONS = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}
Write = Callable[..., Any]  # (graph, equation, *values) -> a value, or a list of them


def together(*shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape of what an operation makes of numbers in the same places."""
    longest = max(map(len, shapes))
    full = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*full, strict=True))
