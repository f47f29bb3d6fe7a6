"""A kind of layer that can be factorised, and how it runs on factors."""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Shaped

SHARED_WITH = "_bert_adapter_shared_with"  # where a module says which other one has the same kernel, if one has
STANDS_FOR = "_bert_adapter_stands_for"  # how classes that we make to see or replace the calls of others name these
Axes = tuple[tuple[int, ...], tuple[int, ...]]  # of a kernel: those along its inputs, those along its outputs


def run_on_factors(module: Any, inputs: Any, factors: tuple[Any, Any], bias: Any) -> Array:
    """inputs @ left @ right + bias, in the dtype that the module computes in, and with the shape that it returns."""
    into = getattr(module, "preferred_element_type", None)

    def product(inputs: Array, left: Array, right: Array, bias: Array | None) -> Array:
        kept = inputs.shape[: inputs.ndim - left.ndim + 1]
        rank, precision = left.shape[-1], getattr(module, "precision", None)
        hidden = jnp.matmul(inputs.reshape(*kept, -1), left.reshape(-1, rank), precision=precision)
        outputs = jnp.matmul(hidden, right.reshape(rank, -1), precision=precision, preferred_element_type=into)
        outputs = outputs.reshape(*kept, *right.shape[1:])
        return outputs if bias is None else outputs + bias.reshape((1,) * len(kept) + right.shape[1:])

    return product(*promote_dtype(inputs, *factors, bias, dtype=getattr(module, "dtype", None)))


class Order(NamedTuple):
    """Where the axes of what enters a layer, and of what leaves it, go for a product with the kernel; None: they stay.

    inputs: the axes of the input, with those that are summed over last, in the order of the kernel's.
    outputs: the axes of the output, with those of the kernel last, in its order.
    """

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


def last_axes(module: Any, ndim: int) -> Order:
    """The input's last axes are summed over, and the output's last ones are the kernel's."""
    return Order()


def product_of_its_own(module: Any) -> str | None:
    """A layer that was given another product than JAX's is no product of matrices that we know."""
    given = getattr(module, "dot_general", None), getattr(module, "dot_general_cls", None)
    return "it was given a dot_general of its own" if any(each is not None for each in given) else None


class Layer(NamedTuple):
    """A kind of module that multiplies its only input by a parameter "kernel", and adds a "bias" if it has one.

    A kernel of any number of axes is a matrix: the axes that are summed over with the input's are its rows, the others
    its columns. Its factors are "left", with the axes of the rows and one for the rank, and "right", with one for the
    rank and the axes of the columns.

    module: the class; subclasses count too, unless they have a call, or one of these methods, of their own.
    input_axes: (module) -> how many of the kernel's first axes are summed over with as many of the input's.
    run: (module, inputs, (left, right), bias) -> what the module returns for that kernel, where the axes that are
      summed over are the input's last, and the kernel's others the output's last.
    order: (module, number of the input's axes) -> how its axes, and the output's, come into that order.
    refuses: (module) -> why this one cannot be factorised, or None.
    kernel: what the module calls the parameter.
    looked_up: whether the input holds the numbers of the kernel's rows, which stand for rows of the identity. The left
      factor of such a one may be `Integers`, and the right one None, where all of it stays integers in memory.
    methods: by name, what else the module does with the kernel: (module, input, (left, right)) -> what it returns.

    Example:
        >>> import flax.linen as nn
        >>> from bert_adapter.layers.layer import Layer
        >>> Layer(nn.Dense, input_axes=lambda module: 1).input_axes(nn.Dense(4))
        1
    """

    module: type
    input_axes: Callable[[Any], int]
    run: Callable[[Any, Any, tuple[Any, Any], Any], Array] = run_on_factors
    order: Callable[[Any, int], Order] = last_axes
    refuses: Callable[[Any], str | None] = product_of_its_own
    kernel: str = "kernel"
    looked_up: bool = False
    methods: Mapping[str, Callable[[Any, Any, tuple[Any, Any]], Array]] = MappingProxyType({})

    def summed_axes(self, module: Any) -> int:
        """How many of the input's axes are summed over: none where it is looked up."""
        return 0 if self.looked_up else self.input_axes(module)

    def why_not(self, module: Any) -> str | None:
        """Why a module of this kind cannot be factorised, or None."""
        if (other := getattr(module, SHARED_WITH, None)) is not None:
            return f"its {self.kernel} is that of {other!r} too"
        kinds, names = (type(module), self.module), ("__call__", *self.methods)
        own = next((name for name in names if len({defined(kind, name) for kind in kinds}) > 1), None)
        if own is not None:
            return "its class has a call of its own" if own == "__call__" else f"its class has its own {own}"
        return self.refuses(module)


def defined(kind: type, name: str) -> Any:
    """The function that a class's method is, below what Flax wraps it in, and below classes that stand for others."""
    found = (vars(each)[name] for each in kind.__mro__ if name in vars(each) and STANDS_FOR not in vars(each))
    return inspect.unwrap(next(found))


def split(shape: tuple[int, ...], input_axes: int) -> Axes:
    """The axes of the kernel's rows and those of its columns."""
    return shape[:input_axes], shape[input_axes:]


def matrix_shape(axes: Axes) -> tuple[int, int]:
    """(m, n) of the matrix that the kernel is."""
    return math.prod(axes[0]), math.prod(axes[1])


def moved(array: Any, order: tuple[int, ...] | None) -> Any:
    """The array with its axes in that order."""
    return array if order is None else jnp.transpose(array, order)


def moved_back(array: Any, order: tuple[int, ...] | None) -> Any:
    """The array whose axes were put into that order."""
    return array if order is None else jnp.transpose(array, tuple(order.index(i) for i in range(len(order))))


def real_steps(mask: Any, *shape: int) -> Any:
    """Whether each step is no padding, in that shape: what a mask marks by anything but 0, such as numbers of texts."""
    return (jnp.asarray(mask) != 0).reshape(*shape)


def by_step(inputs: Array, input_axes: int) -> Shaped[Array, "batch time in"]:
    """What the rows of the kernel are multiplied by; layers that see one vector per example see one time step."""
    return inputs.reshape(inputs.shape[0], -1, math.prod(inputs.shape[inputs.ndim - input_axes :]))
