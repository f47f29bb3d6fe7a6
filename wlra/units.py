"""Powers of two into and out of the solver's units: no bit is lost."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra.problem import Factors


def balance_exactly(factors: Factors, exponent: Int[Array, ""] | int = 0) -> Factors:
    """The product times 2**exponent, bit for bit, with each column of `left` as large as its row of `right`.

    To a factor of two, which no power of two can remove.
    """
    size_left, size_right = jnp.max(jnp.abs(factors.left), axis=0), jnp.max(jnp.abs(factors.right), axis=1)
    (mantissa_left, exponent_left), (mantissa_right, exponent_right) = jnp.frexp(size_left), jnp.frexp(size_right)
    both, half = (size_left > 0) & (size_right > 0), exponent // 2
    ratio = jnp.log2(jnp.where(both, mantissa_right / jnp.where(both, mantissa_left, 1), 1))
    apart = jnp.where(both, exponent_right - exponent_left + exponent - 2 * half, 0)
    shift = half + jnp.round((ratio + apart.astype(ratio.dtype)) / 2).astype(apart.dtype)
    left, right = jnp.ldexp(factors.left, shift[None, :]), jnp.ldexp(factors.right, (exponent - shift)[:, None])
    return Factors(left, right)


def to_unit(array: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Int[Array, ""]]:
    """The array over the power of two 2**exponent that brings its largest entry into [1/2, 1); no bit is lost."""
    exponent = jnp.frexp(jnp.max(jnp.abs(array)))[1]
    return jnp.ldexp(array, -exponent), exponent


def from_unit(factors: Factors, exponent: Int[Array, ""]) -> Factors:
    """The factors of the product times 2**exponent, which both share."""
    half = exponent // 2
    return Factors(jnp.ldexp(factors.left, half), jnp.ldexp(factors.right, exponent - half))
