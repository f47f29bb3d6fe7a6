"""Powers of two into and out of the solver's units: no bit is lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from wlra.convert import in_jax
from wlra.problem import Factors

COMFORT = {4: 64, 8: 512}  # by the bytes of a dtype: numbers up to this power of two, or down to its inverse, stay


class Units(NamedTuple):
    """Powers of two that give the caller's target, and weights over penalty, back; of each problem of a batch."""

    target: Any
    weights: Any


def exponents(largest: Any, dtype: Any, smallest: Any = np.inf) -> np.ndarray:
    """Even powers of two that bring the largest numbers near 1; 0 where the dtype, or float32, holds all as is."""
    comfort = COMFORT[8 if in_jax(dtype) == np.float64 else 4]
    power, least = (np.frexp(np.asarray(size))[1].astype(np.int32) for size in (largest, smallest))
    held = (np.abs(power) <= comfort) & (least > 20 - 2 * comfort)
    return np.asarray(np.where(held, 0, power + power % 2).astype(np.int32))


def shift(array: Any, exponent: Any) -> Any:
    """array / 2**exponent in the dtype that JAX has for it, computed before the cast.

    The exponent has the array's leading axes: that of each problem, or of each of a factor's components too.

    Of NumPy if the array is. What the dtype does not hold becomes infinite or zero.
    """
    dtype = in_jax(array.dtype)
    exponent = np.asarray(exponent).reshape(np.shape(exponent) + (1,) * (array.ndim - np.ndim(exponent)))
    if isinstance(array, jax.Array) and not exponent.any():
        return array
    if isinstance(array, Tracer):
        return jnp.ldexp(array, -exponent)
    array = np.asarray(array)  # XLA may take subnormal numbers for 0
    with np.errstate(over="ignore", under="ignore"):
        if exponent.any():
            array = np.ldexp(array.astype(np.promote_types(array.dtype, np.float64)), -exponent)
        return array.astype(dtype, copy=False)


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


def start_in_units(pair: tuple[Any, Any], exponent: np.ndarray) -> Factors:
    """The factors of the product / 2**exponent, columns as large as rows where their dtype might not hold them."""
    left, right = pair
    if any(isinstance(factor, Tracer) for factor in pair):
        return Factors(shift(left, exponent // 2), shift(right, exponent - exponent // 2))
    sizes = [np.max(np.abs(np.asarray(factor)), axis=axis) for factor, axis in zip(pair, (-2, -1), strict=True)]
    if not (
        exponent.any() or any(exponents(size, factor.dtype).any() for size, factor in zip(sizes, pair, strict=True))
    ):
        return Factors(shift(left, np.int32(0)), shift(right, np.int32(0)))
    power, exponent = [np.frexp(size)[1].astype(np.int32) for size in sizes], exponent[..., None]
    half = (power[0] + power[1] - exponent) // 2
    columns = shift(np.swapaxes(left, -2, -1), power[0] - half)  # whose components lead
    return Factors(np.swapaxes(columns, -2, -1), shift(right, exponent - power[0] + half))
