"""The one door into the solver: what callers give becomes a problem, and the solver's dtype one that holds it."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from wlra import checks
from wlra.convert import check_aligned, check_sides_aligned, in_jax
from wlra.narrowing import narrowed
from wlra.problem import Kronecker
from wlra.sparse import is_sparse, like, values
from wlra.units import Units, exponents, shift

T = TypeVar("T")
# jax.enable_x64 came when jax.experimental.enable_x64 went.
enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64

APART = {"float32": 100, "float64": 700}
"""By dtype, the power of two that weights may be apart (measured: closed forms are right up to 2**120 and 2**800), and
half of which may part the weighted squares that count from that of the largest target and weight."""
LARGEST = {"float32": 200, "float64": 1900}
"""By dtype, the powers of two up to which, and down to whose inverse, factors can be given back for a target."""
X64 = "enable float64 by jax.config.update('jax_enable_x64', True)"


class Given(NamedTuple):
    """A problem as given: real numbers of the right shapes, on the host in their own precision or on a device.

    survey: what is known of the values, which are then fit to be solved; None if a caller traces some, or of Kronecker
    weights. examined: whether they are known to be fit.
    """

    target: Any
    weights: Any
    survey: checks.Survey | None = None
    examined: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape


def enter(W: Any, weights: Any, solve: Callable[[Given], T], *, batched: bool = False, known: bool = True) -> T:
    """What `solve` makes of the problem; from float64, cast back, where float32 does not hold weights so far apart.

    known: whether nothing else that `solve` takes is traced by a caller: else it cannot be computed in float64.

    Raises:
      ValueError: the target or the weights cannot be used.
    """
    given = check_problem(W, weights, batched)
    dtype = "float64" if wide(given) else "float32"
    of_factors = in_jax(values(given.target).dtype)
    narrow = of_factors != np.float64
    if given.survey is None or (held(given, dtype) and not (dtype == "float64" and narrow and known)):
        check_held(given, dtype)
        return solve(given)
    check_held(given, "float64" if known else "float32")
    with jax.ensure_compile_time_eval(), enable_x64(True):  # under a caller's jit, whose programs are of float32
        target, weights = (
            like(matrix, np.asarray(values(matrix)).astype(np.float64)) for matrix in (given.target, given.weights)
        )
        found = solve(given._replace(target=target, weights=weights))
        return narrowed(found, target, weights, of_factors)


def check_problem(W: Any, weights: Any, batched: bool = False) -> Given:
    """The problem, once its shapes and values are known to be fit."""
    check_aligned(W, weights)
    target = checks.check_target(W, batched)
    if isinstance(weights, Kronecker):
        check_sides_aligned(W, weights._asdict())
        if is_sparse(target):
            raise ValueError("weights of a sparse W must be None or sparse like it; got Kronecker")
        checks.hide(W, weights)
        return check_size(Given(target, checks.check_kronecker(weights, target.shape)))
    if is_sparse(target):
        entries = checks.check_sparse_weights(weights, target)
    else:
        entries = checks.hide(W, checks.check_weights(weights, target.shape))
    survey = checks.check_values(target, entries)
    if survey is not None and values(entries).dtype.itemsize > 8:
        check_double(survey)
    return check_size(Given(target, entries, survey, examined=survey is not None))


def check_double(found: checks.Survey) -> None:
    """A ValueError for weights that float64 does not hold, of a dtype that holds more."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray([found.heaviest, found.lightest]).astype(np.float64)
    if not (np.isfinite(rounded) & (rounded >= np.finfo(np.float64).tiny)).all():
        places = f"from {np.min(found.lightest)} to {np.max(found.heaviest)}"
        raise ValueError(
            f"weights must be numbers that float64 holds, or in other units, for only their proportions matter; got "
            f"some {places}"
        )


def wide(given: Given) -> bool:
    """Whether the solver computes in float64."""
    arrays = (
        values(given.target),
        *(given.weights if isinstance(given.weights, Kronecker) else [values(given.weights)]),
    )
    return any(in_jax(array.dtype) == np.float64 for array in arrays)


def held(given: Given, dtype: str) -> bool:
    """Whether numbers of the dtype hold the weights next to each other, and the loss, of what is known."""
    found, apart = given.survey or known_weights(given), APART[dtype]
    if found is None:
        return True
    spread = int(np.max(power(found.heaviest) - power(found.lightest), initial=0))
    if spread <= 0.4 * apart or given.survey is None:
        return spread <= apart
    return (spread <= apart or dtype == "float64") and bool(contribution(given) >= -apart / 2)


def check_held(given: Given, dtype: str) -> None:
    """Raises a ValueError if numbers of the dtype do not hold the problem."""
    if not held(given, dtype):
        found = given.survey or known_weights(given)
        assert found is not None  # else it is held
        places = f"from {np.min(found.lightest):.3g} to {np.max(found.heaviest):.3g}"
        way = "give W and weights in other units" + ("" if dtype == "float64" else f", or {X64}")
        raise ValueError(f"weights are too far apart for {dtype}, {places}: {way}")


def known_weights(given: Given) -> checks.Survey | None:
    """The survey of weights alone, for a target that a caller traces."""
    weights = values(given.weights) if not isinstance(given.weights, Kronecker) else None
    if weights is None or checks.is_traced(weights):
        return None
    return checks.survey(np.broadcast_to(np.float32(0), weights.shape), weights)


def contribution(given: Given) -> Any:
    """The least power of two of the largest weighted square of a problem, in units of the largest target and weight."""
    target, weight = (np.asarray(values(matrix)) for matrix in (given.target, given.weights))
    axes = (-2, -1)[-target.ndim :]
    seen = (weight > 0) & np.isfinite(target) & (target != 0)
    exponent = np.where(seen, power(weight) + 2 * power(np.where(seen, target, 0)), -(2**20))
    survey = given.survey
    assert survey is not None  # asked of known values only
    relative = np.max(exponent, axis=axes) - power(survey.heaviest) - 2 * power(survey.largest)
    return np.min(np.where(np.asarray(survey.largest) > 0, relative, 0))


def power(number: Any) -> np.ndarray:
    """The power of two above the number; 0 for 0 and infinity."""
    return np.asarray(np.frexp(number)[1])


def check_size(given: Given) -> Given:
    """The problem, if the factors of the target can be given back in its dtype."""
    target = values(given.target)
    size = largest(target) if given.survey is None else np.asarray(given.survey.largest)
    dtype = in_jax(target.dtype)
    double = dtype == np.float64
    if size is not None and (np.abs(power(size)) > LARGEST["float64" if double else "float32"]).any():
        worst = size.ravel()[np.argmax(np.abs(power(size)))]
        kind = "large" if worst > 1 else "small"
        way = "give W in other units" + ("" if double else f", or {X64}")
        number = np.format_float_scientific(worst, 2, trim="-")
        raise ValueError(f"W has {number} as its largest entry, too {kind} for factors in {dtype}: {way}")
    return given


def largest(array: Any) -> np.ndarray | None:
    """The size of each problem's largest finite entry; None if it is not on the host."""
    if checks.is_traced(array) or checks.on_accelerator(array):
        return None
    entries = np.asarray(array)
    return np.asarray(np.max(np.where(np.isfinite(entries), np.abs(entries), 0), axis=(-2, -1)[-entries.ndim :]))


def in_units(given: Given) -> tuple[Any, Any, Units]:
    """Target and weights in the dtypes of JAX, once powers of two have brought them where those hold them."""
    if isinstance(given.weights, Kronecker):
        (target, exponent), *factors = (alone(array) for array in (given.target, *given.weights))
        return target, Kronecker(*(array for array, _ in factors)), Units(exponent, np.zeros_like(exponent))
    target, weights = values(given.target), values(given.weights)
    found = given.survey or known_weights(given)
    if given.survey is None and holds_as_it_is(target):
        exponent = np.zeros(target.shape[: max(0, target.ndim - 2)], np.int32)
        target = shift(target, exponent)
    elif given.survey is None:
        target, exponent = alone(target)
    else:
        exponent = exponents(given.survey.largest, target.dtype)
        target = shift(target, exponent)
    if found is None:
        weight_exponent = np.zeros_like(exponent)
    else:
        weight_exponent = exponents(found.heaviest, weights.dtype, found.lightest)
        least = power(found.heaviest) - APART["float64" if wide(given) else "float32"]
        if (power(found.lightest) < least).any():
            weights = raised(np.asarray(weights), least)
        weights = shift(weights, weight_exponent)
    return like(given.target, target), like(given.weights, weights), Units(exponent, weight_exponent)


def holds_as_it_is(target: Any) -> bool:
    """Whether the solver's dtype holds all numbers of a target whose weights are traced: these may hide the largest.

    Raises:
      ValueError: it does not, and the others would be lost beside the largest.
    """
    if checks.is_traced(target) or checks.on_accelerator(target):
        return True  # which has a dtype of JAX
    kind, sizes = np.finfo(in_jax(target.dtype)), np.abs(np.asarray(target))
    sizes = np.where(np.isfinite(sizes), sizes, 0)
    most, least = np.max(sizes, initial=0), np.min(sizes, where=sizes > 0, initial=np.inf)
    if most > kind.max and least < most * float(kind.tiny):
        way = "hide entries by NaN, give W in other units" + ("" if kind.bits == 64 else f", or {X64}")
        raise ValueError(f"W has entries from {least:.3g} to {most:.3g}, too far apart for {kind.dtype}: {way}")
    return bool(most <= kind.max and least >= kind.tiny)


def alone(array: Any) -> tuple[Any, np.ndarray]:
    """The array in units of its own largest finite entry, and the power of two; as it is if it is not on the host."""
    size = largest(array)
    exponent = exponents(np.zeros(array.shape[: max(0, array.ndim - 2)]) if size is None else size, array.dtype)
    return shift(array, exponent), exponent


def raised(weights: Any, least: Any) -> Any:
    """The weights, none that is positive below 2**least: what is so light counts for nothing, but is not unknown."""
    floor = np.ldexp(np.float64(1), least)
    floor = floor.reshape(np.shape(floor) + (1,) * (weights.ndim - np.ndim(floor)))
    return np.where(weights > 0, np.maximum(weights, floor), weights)
