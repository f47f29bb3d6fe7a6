"""From checked inputs to a result: units, start, scaling, iterations, and back."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra import checks
from wlra.driver import RUNNING, Outcome, closed, run
from wlra.duality import duality_gap
from wlra.linalg.batch import once
from wlra.linalg.decompose import balance, leading, leading_components, spectral_norm, truncated_svd
from wlra.methods import stay
from wlra.methods.closed import STARTS, nearest
from wlra.options import PROJECTIONS
from wlra.problem import Factors, Problem, gradient
from wlra.result import Result, Status
from wlra.scaling import SCALINGS, Scaling, longer, none, scale, scale_factors, unscale_factors
from wlra.sparse import is_sparse, like, values
from wlra.units import even_out, from_unit, to_unit

STATIC = ("rank", "method", "start", "scaling", "projection", "max_iters", "penalty_unit")


@functools.partial(jax.jit, static_argnames=STATIC)
def solve_arrays(W, weights, pair, own, tol, patience, penalty, **static) -> Result:
    """One problem, in float64 if any array is and in float32 else, with matrix products of full precision."""
    double = any(array.dtype == jnp.float64 for array in jax.tree.leaves((W, weights, pair)))
    dtype = jnp.float64 if double else jnp.float32

    def cast(array: Array) -> Array:
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array  # indices stay

    target, weights, pair = jax.tree.map(cast, (W, weights, pair))
    core = kronecker if static["method"] == "kronecker" else weighted
    with jax.default_matmul_precision("highest"):
        scalars = jnp.asarray(tol, dtype), jnp.asarray(patience, jnp.int32), jnp.asarray(penalty, dtype)
        result = core(target, weights, pair, own, *scalars, **static)
    return result._replace(left=result.left.astype(W.dtype), right=result.right.astype(W.dtype))


def weighted(
    W, weights, pair, own, tol, patience, penalty, *, rank, method, start, scaling, projection, max_iters, penalty_unit
) -> Result:
    """Weights of entries: unit scale, start, change of variables, iterations, and back."""
    numbers, weight = values(W), values(weights)
    target_bad, weights_bad, empty = checks.faults(numbers, weight)
    status = jnp.where(target_bad, Status.INVALID_TARGET, RUNNING)
    status = jnp.where(weights_bad | empty, Status.INVALID_WEIGHTS, status).astype(jnp.int32)
    weight, weight_exponent = to_unit(jnp.where(jnp.isfinite(weight) & (weight > 0), weight, 0))
    finite = jnp.where(jnp.isfinite(numbers), numbers, 0)
    target, exponent = to_unit(jnp.where(weight > 0, finite, 0))
    problem = Problem(like(W, target), like(W, weight))
    decompose = truncated_svd if method in STARTS or projection == "svd" else leading_components
    first = (
        from_unit(Factors(*pair), -exponent)
        if pair
        else STARTS[start](with_hidden(problem, finite, exponent), rank, decompose)
    )
    first = leading(first, own)
    scales = (of_penalised(projection, scaling) if penalty_unit else SCALINGS[scaling])(problem.weight)
    scaled = scale(problem, scales)
    if penalty_unit == "ridge":
        scaled = scaled._replace(penalty=penalty * spectral_norm(gradient(scaled, zero_like(first))))
    elif penalty_unit == "nuclear":
        in_units = jnp.ldexp(penalty, -exponent - weight_exponent)
        scaled = scaled._replace(penalty=in_units / jnp.sqrt(scales.row[0]))
    stages, steps = (stay, 0) if method in STARTS else (PROJECTIONS[projection][method], max_iters)
    begun = scale_factors(first, scales)
    balanced = not pair and not penalty_unit and start == scaling == "separable"
    ready = begun if balanced or method in STARTS else leading(balance(begun), own)
    outcome = run(scaled, ready, stages, tol, patience, steps, status)
    certified = penalty_unit and not is_sparse(W)  # the gap takes a singular value of the gradient
    gap = duality_gap(scaled, balance(outcome.factors)) if certified else jnp.full_like(outcome.loss, jnp.inf)
    best = first if method in STARTS else unscale_factors(outcome.factors, scales)
    return to_result(outcome, best, exponent, gap)


def of_penalised(projection: str, scaling: str) -> Callable[[Float[Array, "m n"]], Scaling]:
    """The scaling of a problem whose penalty changes with those of single rows and columns."""
    return longer if (projection, scaling) == ("svd", "separable") else none


def zero_like(factors: Factors) -> Factors:
    """Factors whose product is zero."""
    return Factors(jnp.zeros_like(factors.left), jnp.zeros_like(factors.right))


def kronecker(W, weights, pair, own, tol, patience, penalty, *, rank, max_iters, **unused) -> Result:
    """Weights of rows and columns as wholes: unit scale, the closed form, and back."""
    del pair, patience, penalty, unused, max_iters
    valid = checks.semidefinite(weights.row)
    valid &= checks.semidefinite(once(valid.astype(W.dtype), weights.col))
    status = jnp.where(jnp.all(jnp.isfinite(W)), RUNNING, Status.INVALID_TARGET)
    status = jnp.where(valid, status, Status.INVALID_WEIGHTS).astype(jnp.int32)
    target, exponent = to_unit(jnp.where(jnp.isfinite(W), W, 0))
    row, col = (to_unit(jnp.where(jnp.isfinite(matrix), matrix, 0))[0] for matrix in weights)
    factors, loss, slope = nearest(once(valid.astype(W.dtype), target), row, col, rank, own)
    best = closed(factors, loss, slope, tol, status)
    return to_result(best, best.factors, exponent, jnp.full_like(loss, jnp.inf))


def with_hidden(problem: Problem, finite: Float[Array, "..."], exponent: Int[Array, ""]) -> Problem:
    """The problem with the target's entries of weight 0 too, which svd and fwsvd look at.

    Those 1000 times larger than all that count are taken for what NaN is there, a way to say that nothing is known.
    """
    target = jnp.ldexp(finite, -exponent)
    return problem._replace(target=like(problem.target, jnp.where(jnp.abs(target) <= 1024, target, 0)))


def to_result(outcome: Outcome, factors: Factors, exponent: Int[Array, ""], gap: Float[Array, ""]) -> Result:
    """The outcome in the caller's units."""
    left, right = even_out(from_unit(factors, exponent))
    return Result(left, right, *outcome[1:], gap)
