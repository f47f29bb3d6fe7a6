"""Random directions, which belong to an example and not to the batch or piece that it comes in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Draw(NamedTuple):
    """Which directions: those that the key gives the rows from `begin` on."""

    key: Any
    begin: Any

    def rows(self, sampler: Callable[..., Array], like: Array) -> Array:
        """A sample of the shape of `like`, each row from a key of its own: sampler(key, shape, dtype)."""
        numbers = self.begin + jnp.arange(len(like), dtype=jnp.int32)
        keys = jax.vmap(lambda number: jax.random.fold_in(self.key, number))(numbers)
        return jax.vmap(lambda key: sampler(key, like.shape[1:], like.dtype))(keys)
