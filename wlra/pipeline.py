"""From checked inputs to a result: units, start, scaling, iterations, and back."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wlra import checks
from wlra.certificate import nearly_equal, trusted
from wlra.driver import RUNNING, Limits, Outcome, closed, run
from wlra.duality import duality_gap
from wlra.linalg.batch import after
from wlra.linalg.decompose import balance, leading_components, mask_rank, spectral_norm, truncated_svd
from wlra.methods.method import Method
from wlra.narrowing import as_dtype
from wlra.options import Inputs, Options
from wlra.problem import Factors, Kronecker, Problem
from wlra.result import Result, Status
from wlra.scaling import SCALINGS, Scaling, longer, rescale_factors, scale, scale_factors, uniform, unscale_factors
from wlra.sparse import Matrix, is_sparse, like, values
from wlra.units import balance_exactly, from_unit, to_unit

Equalise = Callable[[Matrix], Scaling]


@functools.partial(jax.jit, static_argnames="options")
def solve_inputs(inputs: Inputs, options: Options) -> Result:
    """One problem, in float64 if any array is and in float32 else, with matrix products of full precision."""
    double = any(array.dtype == jnp.float64 for array in jax.tree.leaves(inputs[:3]))
    dtype = jnp.float64 if double else jnp.float32

    def cast(array: Array) -> Array:
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array  # indices stay

    target, weights, start = jax.tree.map(cast, inputs[:3])
    given = inputs._replace(
        target=target,
        weights=weights,
        start=start,
        tol=jnp.asarray(inputs.tol, dtype),
        penalty=jnp.asarray(inputs.penalty, dtype),
    )
    with jax.default_matmul_precision("highest"):
        result = solve_standard(given, options)
    return as_dtype(result, inputs.target.dtype)


def solve_standard(inputs: Inputs, options: Options) -> Result:
    """The same in one dtype: in unit scale by the closed form or by the iterations, and back."""
    standard = kronecker_units(inputs, options) if options.method.kronecker else entry_units(inputs, options)
    if options.unit:
        standard = standard._replace(status=with_penalty(standard.status, inputs.penalty, options.unit))
    if options.method.closed_form is not None:
        problem = with_hidden(standard) if options.method.sees_hidden else standard.problem
        evaluated = options.method.closed_form(problem, options.rank, inputs.ranks)
        outcome = closed(evaluated, inputs.tol, standard.status)
        gap = jnp.full_like(outcome.loss, jnp.inf)
    else:
        outcome, gap = iterate(standard, inputs, options)
    left, right = balance_exactly(outcome.factors, standard.exponent)
    return Result(left, right, *outcome[1:], gap=gap)


class Standard(NamedTuple):
    """A problem in unit scale: the largest target and the largest weight are in [1/2, 1), what cannot be used is 0.

    hidden: the target with its entries of weight 0 too, finite or infinite.
    given: the power of two of the target as the solver was given it, which is that of a start.
    exponent, weight_exponent: of the powers of two that give the caller's units back.
    status: RUNNING, or what is wrong with the values.
    """

    problem: Problem
    hidden: Matrix
    given: Int[Array, ""]
    exponent: Int[Array, ""]
    weight_exponent: Int[Array, ""]
    status: Int[Array, ""]


def entry_units(inputs: Inputs, options: Options) -> Standard:
    """With weights of entries."""
    numbers, weight = values(inputs.target), values(inputs.weights)
    status = jnp.array(RUNNING, jnp.int32)
    if not options.examined:
        target_bad, weights_bad, empty = checks.faults(numbers, weight)
        status = named_faults(target_bad, weights_bad | empty)
    counted = jnp.isfinite(weight) & (weight > 0)
    weight, weight_exponent = to_unit(jnp.where(counted, weight, 0))
    if not options.examined:
        lost = counted & (weight < jnp.finfo(weight.dtype).tiny)  # subnormal numbers are taken for 0
        status = jnp.where((status == RUNNING) & jnp.any(lost), Status.INVALID_WEIGHTS, status).astype(jnp.int32)
    finite = jnp.where(jnp.isfinite(numbers), numbers, 0)
    target, given = to_unit(jnp.where(weight > 0, finite, 0))
    return Standard(
        problem=Problem(like(inputs.target, target), like(inputs.target, weight)),
        hidden=like(inputs.target, jnp.ldexp(finite, -given)),
        given=given,
        exponent=given + inputs.units.target,
        weight_exponent=weight_exponent + inputs.units.weights,
        status=status,
    )


def kronecker_units(inputs: Inputs, options: Options) -> Standard:
    """With weights of rows and columns as wholes."""
    status, numbers, weights = jnp.array(RUNNING, jnp.int32), inputs.target, inputs.weights
    if not options.examined:
        valid = checks.semidefinite(weights.row)
        valid &= checks.semidefinite(after(valid.astype(numbers.dtype), then=weights.col))
        status = named_faults(~jnp.all(jnp.isfinite(numbers)), ~valid)
        numbers = after(valid.astype(numbers.dtype), then=numbers)
    target, given = to_unit(jnp.where(jnp.isfinite(numbers), numbers, 0))
    row, col = (to_unit(jnp.where(jnp.isfinite(matrix), matrix, 0))[0] for matrix in weights)
    return Standard(
        problem=Problem(target, Kronecker(row, col)),
        hidden=target,
        given=given,
        exponent=given + inputs.units.target,
        weight_exponent=jnp.zeros_like(given),
        status=status,
    )


def named_faults(target_bad: Bool[Array, ""], weights_bad: Bool[Array, ""]) -> Int[Array, ""]:
    """The status before the first iteration."""
    status = jnp.where(target_bad, Status.INVALID_TARGET, RUNNING)
    return jnp.where(weights_bad, Status.INVALID_WEIGHTS, status).astype(jnp.int32)


def with_penalty(status: Int[Array, ""], penalty: Float[Array, ""], unit: str) -> Int[Array, ""]:
    """The status before the first iteration, of a penalty that nobody could look at before."""
    usable = (penalty >= 0) & jnp.isfinite(penalty) & ((penalty <= 1) | (unit != "ridge"))
    return jnp.where((status == RUNNING) & ~usable, Status.INVALID_PENALTY, status).astype(jnp.int32)


def with_hidden(standard: Standard) -> Problem:
    """The problem with the target's entries of weight 0 too, which svd and fwsvd look at.

    Those 1000 times larger than all that count are taken for what NaN is there, a way to say that nothing is known. So
    are all of them where what counts is zero.
    """
    target, problem = values(standard.hidden), standard.problem
    known = (jnp.abs(target) <= 1024) & jnp.any(values(problem.target) != 0)
    return problem._replace(target=like(problem.target, jnp.where(known, target, 0)))


def iterate(standard: Standard, inputs: Inputs, options: Options) -> tuple[Outcome, Float[Array, ""]]:
    """The outcome of the method's stages, its factors in the standard problem's variables, and the certified gap."""
    equalise = scaling_for(options)
    scaling = equalise(standard.problem.weight)
    scaled = scale(standard.problem, scaling)
    start = mask_rank(scaled_start(standard, scaling, scaled, inputs=inputs, options=options), inputs.ranks)
    scaled = scaled._replace(penalty=scaled_penalty(standard, scaling, scaled, inputs=inputs, options=options))
    method, named, settled = options.method, options.start is not None, jnp.array(False)
    if options.start is not None and not options.unit:
        settled = starts_at_lowest(standard.problem, scaled, options.start, equalise)
    stages = method.svd_stages if options.projection == "svd" else method.stages
    limits = Limits(
        tol=inputs.tol,
        patience=inputs.patience,
        max_iters=options.max_iters,
        settled=settled,
        trusted=trusted(scaled.weight, inputs.tol) if named else jnp.array(False),
        ranks=inputs.ranks,
    )
    outcome = run(scaled, start, stages, limits=limits, status=standard.status)
    outcome = no_worse_than_zero(outcome) if options.unit else outcome
    certified = options.unit and not is_sparse(inputs.target)  # the gap takes a singular value of the whole
    gap = jnp.full_like(outcome.loss, jnp.inf)
    if certified:
        gap = jnp.where(outcome.status == Status.INVALID_PENALTY, gap, duality_gap(scaled, balance(outcome.factors)))
    return outcome._replace(factors=unscale_factors(outcome.factors, scaling)), gap


def no_worse_than_zero(outcome: Outcome) -> Outcome:
    """With a penalty zero may be the solution, to which iterates come ever more slowly: what is no better is zero."""
    worse = (outcome.loss >= 1) & (outcome.iterations > 0)
    left, right = (jnp.where(worse, 0, factor) for factor in outcome.factors)
    return outcome._replace(
        factors=Factors(left, right),
        loss=jnp.where(worse, 1, outcome.loss),
        stationarity=jnp.where(worse, 0, outcome.stationarity),
    )


def starts_at_lowest(problem: Problem, scaled: Problem, start: Method, equalise: Equalise) -> Bool[Array, ""]:
    """Whether a start is within `certificate.WITHIN` of the lowest loss of all; it may be in variables of its own.

    Then it has seen the weights as they are given, and these must be equal, and so in its variables.
    """
    assert start.equalise is not None  # checked
    if start.equalise is equalise:
        return nearly_equal(scaled.weight)
    return nearly_equal(problem.weight) & nearly_equal(scale(problem, start.equalise(problem.weight)).weight)


def scaling_for(options: Options) -> Equalise:
    """The function weight -> scaling; with a penalty, which changes with those of single rows, one number for all."""
    if not options.unit:
        return SCALINGS[options.scaling]
    return longer if (options.projection, options.scaling) == ("svd", "separable") else uniform


def scaled_start(standard: Standard, scaling: Scaling, scaled: Problem, *, inputs: Inputs, options: Options) -> Factors:
    """The factors to begin with, in scaled variables: those given, or of the closed form named, balanced."""
    if options.start is None:
        assert inputs.start is not None  # either is given
        given = mask_rank(from_unit(inputs.start, -standard.given), inputs.ranks)
        return balance(scale_factors(given, scaling))
    decompose = truncated_svd if options.projection == "svd" else leading_components
    equalise = options.start.equalise
    assert equalise is not None  # checked
    if equalise is scaling_for(options):
        return decompose(scaled.target, options.rank)
    problem = with_hidden(standard) if options.start.sees_hidden else standard.problem
    before = equalise(problem.weight)
    factors = mask_rank(decompose(scale(problem, before).target, options.rank), inputs.ranks)
    return balance(rescale_factors(factors, before, scaling))


def scaled_penalty(standard: Standard, scaling: Scaling, scaled: Problem, *, inputs: Inputs, options: Options) -> Any:
    """The penalty on the squares of the scaled factors."""
    if not options.unit:
        return 0.0
    if options.unit == "ridge":
        weighted_target = like(scaled.target, values(scaled.weight) * values(scaled.target))
        return inputs.penalty * spectral_norm(weighted_target)
    in_units = jnp.ldexp(inputs.penalty, -standard.exponent - standard.weight_exponent)
    in_units = jnp.minimum(in_units, values(standard.problem.target).size)  # above any singular value: zero is optimal
    return in_units / jnp.sqrt(scaling.row[0])
