"""Matrices that stay integers in memory: they are multiplied out where a model uses them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

GROUP, LOWEST = 64, -8  # of those of 4 bits: how many share a scale, and the smallest


@jax.tree_util.register_pytree_node_class
class Integers:
    """A matrix (*stack, m, n) of integers beside their scales; NumPy and JAX take it for what that multiplies out to.

    numbers: of 8 bits, or two of 4 bits in a byte, as `checkpoint.bits` stores them.
    scale: what they are multiplied by.
    shape: the matrix's.
    by_rows: whether two in a byte are of one row, or of one column; None for 8 bits.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, numbers: Any, scale: Any, shape: tuple[int, ...], by_rows: bool | None) -> None:
        self.numbers, self.scale, self.shape, self.by_rows = numbers, scale, shape, by_rows

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[tuple[int, ...], bool | None]]:
        """What JAX moves and traces, and what it compiles for."""
        return (self.numbers, self.scale), (self.shape, self.by_rows)

    @classmethod
    def tree_unflatten(cls, kept: tuple[tuple[int, ...], bool | None], arrays: tuple[Any, Any]) -> "Integers":
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
        return self.multiplied_out(self.numbers, self.scale)

    def rows(self, ids: Any) -> Array:
        """The rows of a table at these indices; nothing else is multiplied out."""
        return self.multiplied_out(*(jnp.take(each, ids, axis=0) for each in (self.numbers, self.scale)))

    def multiplied_out(self, numbers: Any, scale: Any) -> Array:
        """Integers of the matrix, all or rows of them, times their scales."""
        if self.by_rows is None:
            return jnp.asarray(numbers, jnp.float32) * scale
        found = unpacked(numbers, self.shape[-1 if self.by_rows else -2], self.by_rows, jnp)
        return multiplied(found, scale, self.by_rows, jnp)

    def __jax_array__(self) -> Array:
        return self.whole()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.whole(), dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.whole()[index]


def multiplied(
    found: Num[Any, "*stack m n"], scale: Num[Any, "..."], by_rows: bool, xp: Any = np
) -> Float[Any, "*stack m n"]:
    """What integers of 4 bits and the scales of their groups multiply out to, in NumPy or `xp`."""
    if not by_rows:
        return xp.swapaxes(multiplied(xp.swapaxes(found, -1, -2), xp.swapaxes(scale, -1, -2), True, xp), -1, -2)
    whole = in_groups(found, xp).astype(np.float32)
    whole *= scale.astype(np.float32)[..., None]  # in place, in NumPy: a table is large
    return whole.reshape(*found.shape[:-1], -1)[..., : found.shape[-1]]


def in_groups(lying: Num[Any, "*stack n"], xp: Any = np) -> Num[Any, "*stack groups 64"]:
    """The last axis in groups, of which the last is filled up with zeros."""
    n = lying.shape[-1]
    padded = xp.pad(lying, [(0, 0)] * (lying.ndim - 1) + [(0, -n % GROUP)]) if n % GROUP else lying
    return padded.reshape(*lying.shape[:-1], -1, GROUP)


def unpacked(both: Num[Any, "..."], count: int, by_rows: bool, xp: Any = np) -> Num[Any, "*stack m n"]:
    """The `count` integers of each row, or column, of which two lie in a byte."""
    lying = both if by_rows else xp.swapaxes(both, -1, -2)
    found = xp.stack([lying & 15, lying >> 4], axis=-1).astype(np.int8) + np.int8(LOWEST)
    found = found.reshape(*lying.shape[:-1], -1)[..., :count]
    return found if by_rows else xp.swapaxes(found, -1, -2)


def is_integers(leaf: Any) -> bool:
    """Whether a parameter is a matrix of integers."""
    return isinstance(leaf, Integers)


def check_floats(params: Any, what: str) -> None:
    """A ValueError if a matrix is integers, which have no gradients."""
    if any(map(is_integers, jax.tree.leaves(params, is_leaf=is_integers))):
        raise ValueError(f"{what}: got a model with integers in memory, wanted floats: load(directory) reads it so")
