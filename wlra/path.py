"""Solutions for many ranks or penalties, each started from the one before; and the rank that predicts best."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wlra import checks
from wlra.api import solve_given
from wlra.door import Given, enter, in_units
from wlra.linalg.decompose import balance, leading_components
from wlra.methods.method import choose
from wlra.options import Request, check_options, is_known
from wlra.problem import Factors, Problem, loss
from wlra.result import Result
from wlra.scaling import equilibrate, scale, scale_factors, unscale_factors
from wlra.sparse import Matrix, like, values
from wlra.units import from_unit, to_unit


def solve_path(
    W: Any,
    weights: Any,
    ranks: Sequence[int] | None = None,
    *,
    rank: int | None = None,
    nuclear: Sequence[Any] | None = None,
    ridge: Sequence[Any] | None = None,
    **options: Any,
) -> Result:
    """The results of `solve` for each rank, or for each penalty at one rank, stacked in the order given.

    Each is started from the solution before it, from the largest rank or penalty to the smallest: a smaller rank from
    the larger one cut to its leading components, in scaled variables (Mazumder, Hastie & Tibshirani 2010, sec. 5, for
    penalties).

    Args:
      W, weights: as in `solve`, sparse ones too.
      ranks: the ranks, as `solve_path(W, weights, [8, 16, 32])`. Factors are padded with zeros to the largest.
      rank: the bound of the rank, for a path of penalties.
      nuclear, ridge: the penalties, as `solve_path(W, weights, rank=32, nuclear=[100.0, 10.0, 1.0])`.
      options: of `solve`, but for start, restarts and key.

    Raises:
      ValueError: not exactly one of `ranks`, `nuclear` and `ridge` is given, or is empty; or `solve` does.

    Example:
      >>> import numpy as np, wlra
      >>> W = np.diag([3.0, 2.0, 1.0])
      >>> [round(float(loss), 3) for loss in wlra.solve_path(W, None, [1, 2], method="svd").loss]
      [0.357, 0.071]
    """
    given = {"ranks": ranks, "nuclear": nuclear, "ridge": ridge}
    names = [name for name, steps in given.items() if steps is not None]
    if len(names) != 1:
        raise ValueError(f"give one of ranks, nuclear and ridge; got {' and '.join(names) or 'none of them'}")
    name = names[0]
    steps = checks.check_list(name, given[name])
    if any(map(checks.is_traced, steps)):
        raise ValueError(f"{name} is put in order, and must be known: call outside of jit and vmap; got a tracer")
    if (name == "ranks") != (rank is None):
        wanted = "no rank next to ranks" if name == "ranks" else f"rank=..., the bound of the rank, next to {name}"
        raise ValueError(f"wanted {wanted}; got rank={rank!r}")
    for refused in ("start", "restarts", "key"):
        if refused in options:
            raise ValueError(f"a path starts each solve from the one before: {refused} cannot be given")
    mesh, method = options.pop("mesh", None), options.pop("method", "anderson")
    penalties = [{} if name == "ranks" else {name: value} for value in steps]
    requests = [check_options(method, **penalty, **options) for penalty in penalties]

    def solve_all(problem: Given) -> Result:
        bounds = [checks.check_rank(value if rank is None else rank, problem.shape) for value in steps]
        results: dict[int, Result] = {}
        start = None
        for i in sorted(range(len(steps)), key=lambda i: -float(steps[i])):
            request = warm(problem, requests[i], start, bounds[i])
            results[i] = start = solve_given(problem, bounds[i], request, mesh=mesh)
        return stacked([results[i] for i in range(len(steps))])

    return enter(W, weights, solve_all, known=all(map(is_known, requests)))


def warm(given: Given, request: Request, result: Result | None, rank: int) -> Request:
    """The request, started from a result of at least this rank if there is one and the method iterates."""
    if result is None or not request.method.stages:
        return request
    penalised = request.ridge is not None or request.nuclear is not None
    return request._replace(start=truncate(given, result, rank, compared=not penalised))


def truncate(given: Given, result: Result, rank: int, *, compared: bool = True) -> tuple[Array, Array]:
    """The leading components of a result, in variables that make the weights nearly equal; or the target's own there.

    Those with the lower loss: what a result holds where nothing is observed can be as large as it likes. Not where they
    are not `compared`: with a penalty it cannot.
    """
    target, weights, units = in_units(given)
    exponent = jnp.broadcast_to(jnp.asarray(units.target, jnp.int32), result.loss.shape)
    return truncate_arrays(target, weights, exponent, Factors(result.left, result.right), rank=rank, compared=compared)


@functools.partial(jax.jit, static_argnames=("rank", "compared"))
def truncate_arrays(
    target: Any, weights: Any, exponent: Array, factors: Factors, *, rank: int, compared: bool
) -> tuple[Array, Array]:
    """The same for arrays, with a batch axis or without; the target is the caller's over 2**exponent."""
    dtype = jnp.promote_types(jnp.promote_types(values(weights).dtype, factors.left.dtype), jnp.float32)
    target, weights = (like(matrix, values(matrix).astype(dtype)) for matrix in (target, weights))

    def one(target: Matrix, weights: Matrix, exponent: Array, factors: Factors) -> tuple[Array, Array]:
        weight = like(weights, values(weights) / jnp.max(values(weights)))
        shown, power = to_unit(jnp.where(values(weight) > 0, values(target), 0))
        scaling = equilibrate(weight)
        scaled, exponent = scale(Problem(like(target, shown), weight), scaling), exponent + power
        (left, power_left), (right, power_right) = map(to_unit, factors)
        ordered = balance(scale_factors(Factors(left, right), scaling))
        cut = from_unit(Factors(ordered.left[:, :rank], ordered.right[:rank]), power_left + power_right - exponent)
        if compared:
            own = leading_components(scaled.target, rank)
            cut = choose(loss(scaled, cut) <= loss(scaled, own), cut, own)
        left, right = from_unit(unscale_factors(cut, scaling), exponent)
        return left, right

    with jax.default_matmul_precision("highest"):
        function = jax.vmap(one) if factors.left.ndim == 3 else one
        return function(target, weights, exponent, jax.tree.map(lambda factor: factor.astype(dtype), factors))


def stacked(results: list[Result]) -> Result:
    """The results with a leading axis, their factors padded with zeros to the largest rank."""
    rank = max(result.left.shape[1] for result in results)

    def padded(result: Result) -> Result:
        extra = rank - result.left.shape[1]
        return result._replace(
            left=jnp.pad(result.left, ((0, 0), (0, extra))), right=jnp.pad(result.right, ((0, extra), (0, 0)))
        )

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[padded(result) for result in results])
