"""A kind of layer that can be factorised, and how it runs on factors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

Axes = tuple[tuple[int, ...], tuple[int, ...]]  # of a kernel: those along its inputs, those along its outputs


def run_on_factors(module: Any, inputs: Any, factors: tuple[Any, Any], bias: Any) -> Array:
    """inputs @ left @ right + bias, in the dtype that the module computes in, and with the shape that it returns."""

    def product(inputs: Array, left: Array, right: Array, bias: Array | None) -> Array:
        kept = inputs.shape[: inputs.ndim - left.ndim + 1]
        rank, precision = left.shape[-1], getattr(module, "precision", None)
        hidden = jnp.matmul(inputs.reshape(*kept, -1), left.reshape(-1, rank), precision=precision)
        outputs = jnp.matmul(hidden, right.reshape(rank, -1), precision=precision).reshape(*kept, *right.shape[1:])
        return outputs if bias is None else outputs + bias.reshape((1,) * len(kept) + right.shape[1:])

    return product(*promote_dtype(inputs, *factors, bias, dtype=getattr(module, "dtype", None)))


class Layer(NamedTuple):
    """A kind of Linen module that multiplies its only input by a parameter "kernel", and adds a "bias" if it has one.

    A kernel of any number of axes is a matrix: the axes that are summed over with the input's are its rows, the others
    its columns. Its factors are "left", with the axes of the rows and one for the rank, and "right", with one for the
    rank and the axes of the columns.

    module: the class; subclasses count too.
    input_axes: (module) -> how many of the kernel's first axes are summed over with as many of the input's last.
    run: (module, inputs, (left, right), bias) -> what the module returns for that kernel.

    Example:
        >>> import flax.linen as nn
        >>> from bert_adapter.layers.layer import Layer
        >>> Layer(nn.Dense, input_axes=lambda module: 1).input_axes(nn.Dense(4))
        1
    """

    module: type[nn.Module]
    input_axes: Callable[[Any], int]
    run: Callable[[Any, Any, tuple[Any, Any], Any], Array] = run_on_factors


def split(shape: tuple[int, ...], input_axes: int) -> Axes:
    """The axes of the kernel's rows and those of its columns."""
    return shape[:input_axes], shape[input_axes:]


def matrix_shape(axes: Axes) -> tuple[int, int]:
    """(m, n) of the matrix that the kernel is."""
    return math.prod(axes[0]), math.prod(axes[1])


def by_step(inputs: Array, input_axes: int) -> Float[Array, "batch time in"]:
    """What the rows of the kernel are multiplied by; layers that see one vector per example see one time step."""
    return inputs.reshape(inputs.shape[0], -1, math.prod(inputs.shape[inputs.ndim - input_axes :]))
