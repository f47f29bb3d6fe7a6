"""Many small matrices at a time, in chunks that fit the memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wlra.sparse import Matrix, grams, is_sparse

CHUNK = 2**26  # numbers that the Gram matrices and what they are made of may take: 256 MiB in float32


def over_grams(function: Callable, weight: Matrix, basis: Float[Array, "k n"], *rows: Array) -> Array:
    """function(basis diag(weight_i) basis', *rows_i) for each i, stacked.

    The Gram matrices are one product of the weights with all pairs of basis rows. Where those would take more than
    CHUNK numbers, (m + n) k^2, they are made in chunks of rows that do not.
    """
    if is_sparse(weight):
        # Of the rows, so that XLA makes them first: their terms and those of the Gram matrices are large.
        later = sum(0 * row[0, 0] for row in rows)
        return jax.vmap(function)(grams(weight, basis + later), *rows)
    k, n = basis.shape
    if (len(weight) + n) * k * k <= CHUNK:
        pairs = (basis[:, None, :] * basis[None, :, :]).reshape(k * k, n)
        return jax.vmap(function)((weight @ pairs.T).reshape(-1, k, k), *rows)

    def one(row: tuple[Array, ...]) -> Array:
        return function((basis * row[0][None, :]) @ basis.T, *row[1:])

    return in_chunks(one, (weight, *rows), max(1, CHUNK // (k * (n + k))))


def in_chunks(function: Callable, arrays: Any, size: int) -> Any:
    """The function of the i-th of each array for every i, stacked, computed for at most `size` of them at a time.

    The last is repeated until chunks of one size hold all. `jax.lax.map` has one of another size in the end, which a
    CPU may compute beside the others; if both call LAPACK for a batch, each can wait for the other's thread for ever.
    """
    count = len(jax.tree.leaves(arrays)[0])
    if size == 1:
        return jax.lax.map(function, arrays)
    steps = -(-count // size)
    size = -(-count // steps)

    def cut(array: Array) -> Array:
        padding = jnp.repeat(array[-1:], steps * size - count, axis=0)
        return jnp.concatenate([array, padding]).reshape(steps, size, *array.shape[1:])

    chunks = jax.lax.map(jax.vmap(function), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:count], chunks)


def after(value: Float[Array, "..."], *, then: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array `then`, not before the value is known.

    On a CPU, LAPACK on a batch waits in a thread for others to help: two at once can wait for each other for ever. XLA
    drops an `optimization_barrier` before it schedules, but not the sum with a zero that only the data can tell.
    """
    first = value.ravel()[0]
    return then + jnp.where(jnp.isfinite(first), 0, first)
