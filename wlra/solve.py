"""The public functions: solve one problem, or many of one shape."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from wlra import border, devices
from wlra.border import Kronecker
from wlra.driver import RUNNING, History, Outcome, Status, closed, run
from wlra.dual import duality_gap
from wlra.kronecker import nearest
from wlra.linalg import (
    Factors,
    balance,
    even_out,
    in_chunks,
    leading,
    leading_components,
    once,
    spectral_norm,
    truncated_svd,
)
from wlra.methods import METHODS, PENALISED, PUBLISHED, SPARSE, SWEEPS, stay
from wlra.problem import Problem, gradient
from wlra.restarts import Restarts, random_starts, tally
from wlra.scaling import SCALINGS, Scaling, longer, none, scale, scale_factors, unscale_factors
from wlra.sparse import Sparse, is_sparse, like, values
from wlra.starts import STARTS

PROJECTIONS = {"subspace": METHODS, "svd": PUBLISHED}
TOL, MAX_ITERS, PATIENCE = 1e-3, 200, 30


class Result(NamedTuple):
    """The best factors found, and how they were found. With a leading batch axis from `solve_batch`.

    `loss` is sum weights (W - left @ right)**2 / sum weights W**2 for the weights as given. `stationarity` is the share
    of the gradient, in scaled variables, that a matrix of rank k can still follow (see `wlra.problem.stationarity`).
    `status` is a `wlra.Status`: `wlra.Status(int(result.status)).advice` says in a sentence what to do.
    `history` holds loss and stationarity of every iterate, entry 0 the start, +inf where no iteration came.
    `gap`, with a penalty, bounds the relative distance of its objective from the lowest of all ranks (see
    `wlra.dual.duality_gap`); +inf without, when nothing certifies it. `restarts` tells what random starts found.
    Each column of `left` is as large as its row of `right`, to a factor of two.
    """

    left: Float[Array, "*b m k"]
    right: Float[Array, "*b k n"]
    loss: Float[Array, "*b"]
    stationarity: Float[Array, "*b"]
    iterations: Int[Array, "*b"]
    status: Int[Array, "*b"]
    history: History
    gap: Float[Array, "*b"]
    restarts: Restarts | None = None


def solve(
    W: Any,
    weights: Any,
    rank: int,
    *,
    method: str = "anderson",
    start: str | tuple[Any, Any] = "separable",
    scaling: str = "separable",
    projection: str = "subspace",
    tol: float | Float[Array, ""] = TOL,
    max_iters: int = MAX_ITERS,
    patience: int | Int[Array, ""] = PATIENCE,
    ridge: float | Float[Array, ""] | None = None,
    nuclear: float | Float[Array, ""] | None = None,
    restarts: int | None = None,
    key: Array | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """left @ right, of rank at most `rank`, has the least weighted squared distance from W that the method finds.

    Minimises sum_ij weights_ij (W_ij - (left @ right)_ij)**2 (Srebro & Jaakkola 2003). Never worse than its start.

    Args:
      W: (m, n). Integers are cast to float32; float16 and bfloat16 are solved in float32 and cast back. NaN and inf
        are ignored where the weight is 0. Or a sparse `jax.experimental.sparse.BCOO`, each entry once: what it does not
        store has weight 0, and nothing is densified. For the methods that take a penalty, without `ridge`.
      weights: None (all equal), or non-negative and broadcasting to (m, n): (m, 1) per row, (1, n) per column, (m, n)
        per entry; or `Kronecker(row, col)`, for method="kronecker". Only their proportions matter. With a
        sparse W: None (1 for each stored entry), or a BCOO that stores the same entries.
      rank: k, in [1, min(m, n)].
      method: "auto" picks for you. First order, a few products of 2mnk operations an iteration: "anderson",
        "nesterov", "em", and "lbfgs" (quasi-Newton on both factors). For weights that scaling cannot help: "als" and
        "als-anderson" (exact least squares for one factor, then the other, 2mnk^2 operations for each), "newton"
        (second order, for tight tolerances), "varpro" (damped Gauss-Newton with a dense Hessian, for targets mostly
        unseen; min(m, n) k <= 4096). Closed forms, one SVD, exact for their own kind of weights only: "svd", "fwsvd",
        "separable", "kronecker". "auto" begins as "anderson"; where the stationarity has not halved in 12 iterations
        it goes on as "lbfgs", and where not in 100 of those as "newton", memory permitting.
      start: a closed form, or a pair (left, right) to go on from. Closed forms are their own start.
      scaling: "separable" removes from the weights what rows and columns explain, before iterating; "none" only divides
        them by their maximum. The problem solved is the same, its conditioning is not.
      projection: "subspace" needs no SVD; "svd" makes an exact one in every iteration. With scaling="none" and
        start="svd" that is "em", "nesterov" and "anderson" as published.
      tol: stop at this stationarity, in [0, 1]. The loss is then above a minimum by a share of about tol**2 over the
        least curvature: on the Fisher weights of real kernels, 1e-3 leaves less than 1e-4.
      max_iters: stop after so many iterations.
      patience: stop after so many iterations without a lower loss.
      nuclear: lambda >= 0 adds a penalty: the objective is sum weights (W - left @ right)**2 / 2 + lambda ||left @
        right||_*, the rank is an upper bound, `loss` is the objective over that of zero, and `gap` certifies it. For
        "em", "nesterov", "anderson", "als", "als-anderson", "lbfgs". It is not invariant to the scaling of rows and
        columns, so "separable" scales nothing but lengthens the steps of projection="svd" 1.6 times.
      ridge: the same penalty, as a share in [0, 1] of the least lambda whose solution is zero, ||weights * W||_2.
        It equals lambda / 2 times the squares of both factors.
      restarts: how many random starts, drawn with `key` and solved a few at a time, may be tried in place of `start`
        until the lowest loss has been found twice; `result.restarts` tells how often each loss was found.
      key: of `jax.random`, for restarts.
      mesh: devices that share W and weights, cut along the longer axis, with all memory and work in proportion; NumPy
        arrays go to them in parts. For iterative methods without a penalty and with projection="subspace": what takes
        singular values of the whole matrix needs it on one device.

    Raises:
      ValueError: a shape, dtype, rank, name or value cannot be used. Under a caller's own jit the values are not known,
        and `Status.INVALID_TARGET` or `Status.INVALID_WEIGHTS` says so instead.

    Example:
      >>> import numpy as np, wlra
      >>> W = np.outer([1.0, 2.0, 3.0], [1.0, 0.5])
      >>> W[0, 1] = 7.0  # a wild entry, and a weight that says so
      >>> result = wlra.solve(W, [[1, 0], [1, 1], [1, 1]], rank=1)
      >>> bool(result.loss < 1e-6), round(float((result.left @ result.right)[0, 1]), 3)
      (True, 0.5)
    """
    if isinstance(W, BCOO):
        refuse_filled(weights, method, projection, ridge, restarts, mesh)
    if mesh is not None:
        refuse_whole(method, projection, ridge, nuclear, restarts, weights)
        W, weights, start, plan = devices.cut(devices.check_mesh(mesh), W, weights, rank, start)
        options = (method, start, scaling, projection, tol, max_iters, patience)
        return solve_cut(*prepare(border.check_target(W, batched=False), weights, rank, *options), plan)
    W = border.check_target(W, batched=False)
    if restarts is not None:
        starts = random_starts(W, weights, rank, border.check_count("restarts", restarts, 1), key)
        options = (method, "separable", scaling, projection, tol, max_iters, patience, ridge, nuclear)
        inputs, static = prepare(W, weights, rank, *options)
        return repeated(inputs, static | {"start": "pair"}, starts)
    options = (method, start, scaling, projection, tol, max_iters, patience, ridge, nuclear)
    inputs, static = prepare(W, weights, rank, *options)
    return solve_arrays(*inputs, **static)


def solve_batch(
    W: Any,
    weights: Any,
    rank: int,
    *,
    method: str = "anderson",
    start: str | tuple[Any, Any] = "separable",
    scaling: str = "separable",
    projection: str = "subspace",
    tol: float | Float[Array, ""] = TOL,
    max_iters: int = MAX_ITERS,
    patience: int | Int[Array, ""] = PATIENCE,
    ridge: float | Float[Array, ""] | None = None,
    nuclear: float | Float[Array, ""] | None = None,
    ranks: Any = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """The results of `solve` on problems of one shape, stacked; problems that have converged do not move on.

    Args:
      W: (batch, m, n).
      weights: None, or broadcasting to (batch, m, n), or `Kronecker` of (batch, m, m) and (batch, n, n).
      ranks: (batch,), in [1, rank]: each problem's own, beyond which columns of `left` and rows of `right` are zero.
        One program serves all; each costs what `rank` does. For "em", "nesterov", "anderson", "als", "als-anderson"
        with projection="subspace", and the closed forms.
      chunk: how many problems are solved at a time, all if None. Bounds the memory, and changes no result but for
        rounding. A chunk runs until its slowest problem is done: on a CPU, chunk=1 is fastest.
      mesh: devices that share the batch, `chunk` problems at a time on each; none waits for another. Of several
        processes, each passes the same arrays or all pass global ones.

    All else as in `solve`; a pair as `start` has the batch axis too.
    """
    W = border.check_target(W, batched=True)
    chunk = len(W) if chunk is None else border.check_count("chunk", chunk, 1)
    options = (method, start, scaling, projection, tol, max_iters, patience, ridge, nuclear)
    mesh = None if mesh is None else devices.check_mesh(mesh)
    inputs, static = prepare(W, weights, rank, *options, ranks=ranks)
    if mesh is None:
        return solve_chunks(*inputs, **static, chunk=min(chunk, len(W)))
    own = min(chunk, -(-len(W) // mesh.size))
    result = solve_dealt(*devices.deal(inputs[:4], mesh), *inputs[4:], **static, chunk=own, mesh=mesh)
    return result if len(result.left) == len(W) else jax.tree.map(lambda leaf: leaf[: len(W)], result)


def prepare(
    W: Array | Sparse,
    weights: Any,
    rank: Any,
    method: Any,
    start: Any,
    scaling: Any,
    projection: Any,
    tol: Any,
    max_iters: Any,
    patience: Any,
    ridge: Any = None,
    nuclear: Any = None,
    ranks: Any = None,
) -> tuple[tuple, dict[str, Any]]:
    """The traced and the static arguments of the solver, checked."""
    rank = border.check_rank(rank, W.shape)
    tol, max_iters, patience = check_options(method, start, scaling, projection, tol, max_iters, patience)
    if isinstance(weights, Kronecker) != (method == "kronecker"):
        raise ValueError(
            f"Kronecker weights have a closed form only: write method='kronecker'; got method={method!r}"
            if isinstance(weights, Kronecker)
            else f"method 'kronecker' needs weights=wlra.Kronecker(row, col); got {type(weights).__name__}"
        )
    if isinstance(weights, Kronecker):
        weights = border.check_kronecker(weights, W.shape)
        border.check_kronecker_values(W, weights)  # pyright: ignore[reportArgumentType] a BCOO was refused
    else:
        sparse = is_sparse(W)
        weights = border.check_sparse_weights(weights, W) if sparse else border.check_weights(weights, W.shape)
        border.check_values(W, weights)
    penalty, unit = border.check_penalty(ridge, nuclear)
    if unit and method not in PENALISED:
        raise ValueError(f"{unit} needs one of the methods {', '.join(map(repr, PENALISED))}; got {method!r}")
    if ranks is not None:
        if method not in (*STARTS, "kronecker", *SWEEPS) or projection != "subspace":
            able = ", ".join(map(repr, (*STARTS, "kronecker", *SWEEPS)))
            raise ValueError(
                f"ranks needs projection='subspace' and one of the methods {able}; got {projection!r} and {method!r}"
            )
        ranks = border.check_ranks(ranks, W.shape[0], rank)
    pair = None
    if method in STARTS:
        start = method
    elif method in METHODS and not isinstance(start, str):
        pair, start = border.check_pair(start, W.shape, rank), "pair"
    static = {"rank": rank, "method": method, "start": start, "scaling": scaling, "projection": projection}
    return (W, weights, pair, ranks, tol, patience, penalty), static | {"max_iters": max_iters, "penalty_unit": unit}


def check_options(
    method: Any,
    start: Any = "separable",
    scaling: Any = "separable",
    projection: Any = "subspace",
    tol: Any = TOL,
    max_iters: Any = MAX_ITERS,
    patience: Any = PATIENCE,
) -> tuple[Any, int, Any]:
    """tol, max_iters and patience as the solver takes them, once every option is known to be usable."""
    border.check_name("method", method, (*METHODS, *STARTS, "kronecker"))
    border.check_name("scaling", scaling, SCALINGS)
    border.check_name("projection", projection, PROJECTIONS)
    if method in METHODS and method not in PROJECTIONS[projection]:
        raise ValueError(f"method {method!r} projects nothing: projection must be 'subspace'; got {projection!r}")
    if method in METHODS and isinstance(start, str):
        border.check_name("start", start, STARTS)
    if not border.is_traced(patience):
        patience = border.check_count("patience", patience, 1)
    return border.check_tol(tol), border.check_count("max_iters", max_iters, 1), patience


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


@functools.partial(jax.jit, static_argnames=(*STATIC, "chunk"))
def solve_chunks(W, weights, pair, own, tol, patience, penalty, *, chunk, **static) -> Result:
    """Many problems of one shape, `chunk` at a time."""

    def one(arrays: tuple) -> Result:
        return solve_arrays(*arrays, tol, patience, penalty, **static)

    if chunk == len(W):
        return jax.vmap(one)((W, weights, pair, own))
    return in_chunks(one, (W, weights, pair, own), chunk)


@functools.partial(jax.jit, static_argnames=(*STATIC, "chunk", "mesh"))
def solve_dealt(W, weights, pair, own, tol, patience, penalty, *, chunk, mesh, **static) -> Result:
    """Many problems of one shape, each device its own, `chunk` at a time."""

    def part(arrays: tuple, scalars: tuple) -> Result:
        return solve_chunks(*arrays, *scalars, **static, chunk=chunk)

    return devices.each_its_own(part, mesh)((W, weights, pair, own), (tol, patience, penalty))


def solve_cut(inputs: tuple, static: dict[str, Any], plan: devices.Cut) -> Result:
    """One problem cut over the devices: the compiler makes every product and sum of parts."""
    result = solve_arrays(*inputs, **static)
    left, right = devices.uncut(result.left, result.right, plan)
    return result._replace(left=left, right=right)


def refuse_whole(method: Any, projection: Any, ridge: Any, nuclear: Any, restarts: Any, weights: Any) -> None:
    """A mesh is not given with options that need the whole matrix on one device."""
    needs = {
        f"method={method!r}": method in (*STARTS, "kronecker"),
        f"projection={projection!r}": projection == "svd",
        "ridge or nuclear": ridge is not None or nuclear is not None,
        "restarts": restarts is not None,
        "Kronecker weights": isinstance(weights, Kronecker),
    }
    for name, needed in needs.items():
        if needed:
            raise ValueError(f"{name} needs the whole matrix on one device: it cannot be cut over a mesh")


def refuse_filled(weights: Any, method: Any, projection: Any, ridge: Any, restarts: Any, mesh: Any) -> None:
    """A sparse W is not given with dense weights, nor with options that need every entry."""
    if weights is not None and not isinstance(weights, BCOO):
        raise ValueError(f"weights of a sparse W must be None or a BCOO like it; got {type(weights).__name__}")
    if method not in SPARSE:
        raise ValueError(f"method must be one of {', '.join(map(repr, SPARSE))} for a sparse W; got {method!r}")
    needs = {
        f"projection={projection!r}": projection != "subspace",
        "ridge, a share of a singular value,": ridge is not None,
        "restarts": restarts is not None,
        "a mesh": mesh is not None,
    }
    for name, given in needs.items():
        if given:
            raise ValueError(f"{name} needs a dense W; got a BCOO")


def repeated(inputs: tuple, static: dict[str, Any], starts: list[tuple[Array, Array]]) -> Result:
    """The result of the lowest loss from random starts, which stop once it has been found twice."""
    W, weights, _, own, tol, patience, penalty = inputs
    losses, found = np.zeros(0), tally(np.full(1, np.inf), 0.0)
    rounds: list[Result] = []
    for pair in starts:
        rounds.append(solve_from_each(W, weights, pair, own, tol, patience, penalty, **static))
        losses = np.append(losses, np.nan_to_num(rounds[-1].loss, nan=np.inf))
        found = tally(losses, float(jnp.finfo(rounds[-1].loss.dtype).eps) ** (1 / 3))
        if found.count[0] > 1:
            break
    place, winner = divmod(int(np.argmin(losses)), len(rounds[0].loss))
    return jax.tree.map(lambda leaf: leaf[winner], rounds[place])._replace(restarts=found)


@functools.partial(jax.jit, static_argnames=STATIC)
def solve_from_each(W, weights, pairs, own, tol, patience, penalty, **static) -> Result:
    """One problem from several starts at a time."""
    return jax.vmap(lambda pair: solve_arrays(W, weights, pair, own, tol, patience, penalty, **static))(pairs)


def weighted(
    W, weights, pair, own, tol, patience, penalty, *, rank, method, start, scaling, projection, max_iters, penalty_unit
) -> Result:
    """Weights of entries: unit scale, start, change of variables, iterations, and back."""
    numbers, weight = values(W), values(weights)
    target_bad, weights_bad, empty = border.faults(numbers, weight)
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
    valid = border.semidefinite(weights.row)
    valid &= border.semidefinite(once(valid.astype(W.dtype), weights.col))
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


def to_unit(array: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Int[Array, ""]]:
    """The array over the power of two 2**exponent that brings its largest entry into [1/2, 1); no bit is lost."""
    exponent = jnp.frexp(jnp.max(jnp.abs(array)))[1]
    return jnp.ldexp(array, -exponent), exponent


def from_unit(factors: Factors, exponent: Int[Array, ""]) -> Factors:
    """The factors of the product times 2**exponent, which both share."""
    half = exponent // 2
    return Factors(jnp.ldexp(factors.left, half), jnp.ldexp(factors.right, exponent - half))
