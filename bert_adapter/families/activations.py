"""What comes between two products."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

GELU = "gelu by erf"  # the name of the program, by which an export knows it, and which no function in Python has
NOTHING = -9.0  # below it, 1 + erf is 0 in every dtype


def exact_gelu(x: Array) -> Array:
    """x times the share of a normal distribution that is smaller (Hendrycks & Gimpel 2016), in float32 at least.

    As PyTorch computes it, by `erf`; JAX takes `erfc`, for more digits of numbers that vanish beside others. With the
    condition XLA makes one loop of it and of the bias before it, which reads and writes memory once.
    """
    wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
    return jnp.where(wide < NOTHING, 0, wide * 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


exact_gelu.__name__ = GELU
gelu = jax.jit(exact_gelu)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
