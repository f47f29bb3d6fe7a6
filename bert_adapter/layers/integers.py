"""Matrices that stay integers in memory: they are multiplied out where a model uses them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

GROUP, LOWEST = 64, -8  # of those of 4 bits: how many share a scale, and the smallest


@jax.tree_util.register_pytree_node_class
class Integers:
    """A matrix (*stack, m, n) of integers beside their scales; NumPy and JAX take it for what that multiplies out to.

    numbers: of 8 bits, or two of 4 bits in a byte, as `checkpoint.bits` stores them.
    scale: what they are multiplied by.
    shape: the matrix's.
    axis: along which two lie in a byte, -1 or -2; None for 8 bits.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, numbers: Any, scale: Any, shape: tuple[int, ...], axis: int | None) -> None:
        self.numbers, self.scale, self.shape, self.axis = numbers, scale, shape, axis

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[tuple[int, ...], int | None]]:
        """What JAX moves and traces, and what it compiles for."""
        return (self.numbers, self.scale), (self.shape, self.axis)

    @classmethod
    def tree_unflatten(cls, kept: tuple[tuple[int, ...], int | None], arrays: tuple[Any, Any]) -> "Integers":
        """What undoes it."""
        return cls(*arrays, *kept)

    @property
    def ndim(self) -> int:
        """How many axes the matrix has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return int(self.numbers.nbytes + self.scale.nbytes)

    def whole(self) -> Array:
        """The matrix."""
        return multiplied_out(self.numbers, self.scale, self.axis, self.shape)

    def rows(self, ids: Any) -> Array:
        """The rows of a table at these indices; nothing else is multiplied out."""
        numbers, scale = (jnp.take(each, ids, axis=0) for each in (self.numbers, self.scale))
        return multiplied_out(numbers, scale, self.axis, (*numbers.shape[:-1], self.shape[-1]))

    def __jax_array__(self) -> Array:
        return self.whole()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.whole(), dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.whole()[index]


def multiplied_out(numbers: Any, scale: Any, axis: int | None, shape: tuple[int, ...]) -> Array:
    """Integers times their scales, in float32."""
    wide = jnp.asarray(scale, jnp.float32)
    if axis is None:
        return jnp.asarray(numbers, jnp.float32) * wide
    axis += len(shape)
    halves = jnp.stack([numbers & 15, numbers >> 4], axis=axis + 1).astype(jnp.float32) + LOWEST
    found = halves.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    count = shape[axis]
    along = jnp.repeat(wide, GROUP, axis=axis)
    return jax.lax.slice_in_dim(found, 0, count, axis=axis) * jax.lax.slice_in_dim(along, 0, count, axis=axis)


def is_integers(leaf: Any) -> bool:
    """Whether a parameter is a matrix of integers."""
    return isinstance(leaf, Integers)


def check_floats(params: Any, what: str) -> None:
    """A ValueError if a matrix is integers, which have no gradients."""
    if any(map(is_integers, jax.tree.leaves(params, is_leaf=is_integers))):
        raise ValueError(f"{what}: got a model with integers in memory, wanted floats: load(directory) reads it so")
