"""The public functions: solve one problem, or many of one shape."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from wlra import checks, devices
from wlra.blocks import by_blocks
from wlra.door import Given, enter
from wlra.methods.method import Method
from wlra.options import (
    MAX_ITERS,
    PATIENCE,
    TOL,
    Request,
    check_options,
    is_known,
    join,
    prepare,
    refuse_filled,
    refuse_whole,
    split,
)
from wlra.result import Result
from wlra.runners import known_on_host, solve_chunks, solve_cut, solve_dealt, solve_on_host, solve_repeatedly
from wlra.sparse import is_sparse


def solve(
    W: Any,
    weights: Any,
    rank: int,
    *,
    method: str | Method = "anderson",
    start: str | Method | tuple[Any, Any] = "separable",
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
      W: (m, n): real numbers in whatever holds them, converted exactly or refused by name: the page "What is accepted"
        lists kinds. Of any scale: powers of two bring float64 where float32 holds it. Wide integers are float64;
        float16 and bfloat16 are solved in float32 and cast back. NaN and inf are ignored where the weight is 0; entries
        that a `numpy.ma.MaskedArray` masks have weight 0. Or a sparse matrix, `jax.experimental.sparse.BCOO` or of
        `scipy.sparse`: what it stores is known, zeros too, all else has weight 0, and nothing is densified. For the
        methods that take a penalty, without `ridge`.
      weights: None (all equal), or non-negative and broadcasting to (m, n): (m, 1) per row, (1, n) per column, (m, n)
        per entry; or `Kronecker(row, col)`, for method="kronecker". Only their proportions matter; where those are
        more than 2**100 apart, the problem is solved in float64 and cast back, and the loss is that of the factors
        after that; what is lighter than 2**-700 of the heaviest counts as that. Masked entries are 0. With a sparse
        W: None (1 for each stored entry), or a sparse matrix that stores the same entries.
      rank: k, in [1, min(m, n)].
      method: "auto" picks for you. First order, a few products of 2mnk operations an iteration: "anderson",
        "nesterov", "em", and "lbfgs" (quasi-Newton on both factors). For weights that scaling cannot help: "als" and
        "als-anderson" (exact least squares for one factor, then the other, 2mnk^2 operations for each), "newton"
        (second order, for tight tolerances), "varpro" (damped Gauss-Newton with a dense Hessian, for targets mostly
        unseen; min(m, n) k <= 4096). Closed forms, one SVD, exact for their own kind of weights only: "svd", "fwsvd",
        "separable", "kronecker". "auto" begins as "anderson"; where the stationarity has not halved in 12 iterations
        it goes on as "lbfgs", and where not in 100 of those as "newton", memory permitting. Or a `wlra.Method` of your
        own, which inherits scaling, stopping, batches and devices.
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
        until the lowest loss has been found twice; `result.restarts` tells how often each loss was found. Of several
        blocks that no positive weight connects, each has starts of its own.
      key: of `jax.random`, for restarts.
      mesh: devices that share W and weights, cut along the longer axis, with all memory and work in proportion; NumPy
        arrays go to them in parts. For iterative methods without a penalty and with projection="subspace": what takes
        singular values of the whole matrix needs it on one device.

    Raises:
      ValueError: a shape, dtype, rank, name or value cannot be used. Under a caller's own jit the values are not known,
        and `Status.INVALID_TARGET` or `Status.INVALID_WEIGHTS` says so instead, also of subnormal numbers, which
        processors take for zero.

    Example:
      >>> import numpy as np, wlra
      >>> W = np.outer([1.0, 2.0, 3.0], [1.0, 0.5])
      >>> W[0, 1] = 7.0  # a wild entry, and a weight that says so
      >>> result = wlra.solve(W, [[1, 0], [1, 1], [1, 1]], rank=1)
      >>> bool(result.loss < 1e-6), round(float((result.left @ result.right)[0, 1]), 3)
      (True, 0.5)
    """
    request = check_options(
        method,
        start=start,
        scaling=scaling,
        projection=projection,
        tol=tol,
        max_iters=max_iters,
        patience=patience,
        ridge=ridge,
        nuclear=nuclear,
    )

    devices.check_placed(W, weights, mesh)

    def solved(given: Given) -> Result:
        return solve_given(given, rank, request, restarts=restarts, key=key, mesh=mesh)

    return enter(W, weights, solved, known=is_known(request))


def solve_given(
    given: Given, rank: Any, request: Request, *, restarts: int | None = None, key: Any = None, mesh: Any = None
) -> Result:
    """The same of a problem that has been checked."""
    if is_sparse(given.target):
        refuse_filled(request, restarts, mesh)
    if key is not None and restarts is None:
        raise ValueError("key draws random starts: got it alone, wanted restarts=10 beside it, or no key")
    if restarts is not None and request.method.closed_form is not None:
        raise ValueError(f"restarts needs a method that iterates; got {request.method.name!r}, which has one result")
    if mesh is not None:
        refuse_whole(request, given.weights, restarts)
        mesh = devices.check_mesh(mesh)
    at_hand = mesh is None and restarts is None and known_on_host(given, request)
    inputs, options = prepare(given, rank, request, at_hand=at_hand)
    if at_hand:
        return solve_on_host(inputs, options)
    if mesh is not None:
        inputs, plan = devices.cut(mesh, inputs)
        return solve_cut(inputs, devices.turned(options, plan), plan)
    inputs = jax.tree.map(on_device, inputs)
    if restarts is not None:
        several = partial(solve_repeatedly, count=checks.check_count("restarts", restarts, 1), key=key)
        return by_blocks(inputs, options, several)
    return by_blocks(inputs, options)


def on_device(leaf: Any) -> Any:
    """The array as one of JAX, which does not change with the caller's."""
    return jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def solve_batch(
    W: Any,
    weights: Any,
    rank: int,
    *,
    method: str | Method = "anderson",
    start: str | Method | tuple[Any, Any] = "separable",
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
      chunk: how many problems are solved at a time. Bounds the memory, and changes no result but for rounding. A chunk
        runs until its slowest problem is done: if None, it is 1 on a CPU, and all elsewhere.
      mesh: devices that share the batch, `chunk` problems at a time on each; none waits for another. Of several
        processes, each passes the same arrays or all pass global ones.

    All else as in `solve`; a pair as `start` has the batch axis too.

    Raises:
      ValueError: as `solve` does, with the index of the problem.

    Example:
      >>> import numpy as np, wlra
      >>> W = np.stack([np.outer([1, 2, 3], [1, 2]), np.outer([3, 2, 1], [1, 1])])
      >>> result = wlra.solve_batch(W, None, rank=1)
      >>> result.left.shape, [bool(loss < 1e-6) for loss in result.loss]
      ((2, 3, 1), [True, True])
    """
    request = check_options(
        method,
        start=start,
        scaling=scaling,
        projection=projection,
        tol=tol,
        max_iters=max_iters,
        patience=patience,
        ridge=ridge,
        nuclear=nuclear,
    )
    more: dict[str, Any] = {"ranks": ranks, "chunk": chunk, "mesh": mesh}
    known = is_known(request)
    devices.check_placed(W, weights, mesh)
    return enter(W, weights, lambda given: batch_given(given, rank, request, **more), batched=True, known=known)


def batch_given(
    given: Given, rank: Any, request: Request, *, ranks: Any = None, chunk: int | None = None, mesh: Any = None
) -> Result:
    """The same of problems that have been checked."""
    count = given.shape[0]
    most = 1 if jax.default_backend() == "cpu" else count
    chunk = most if chunk is None else checks.check_count("chunk", chunk, 1)
    mesh = None if mesh is None else devices.check_mesh(mesh)
    at_hand = mesh is None and known_on_host(given, request)
    inputs, options = prepare(given, rank, request, ranks=ranks, at_hand=at_hand)
    if at_hand:
        return solve_on_host(inputs, options, count)
    if mesh is None:
        return solve_chunks(jax.tree.map(on_device, inputs), options, min(chunk, count))
    arrays, shared = split(inputs)
    dealt = join(devices.deal(arrays, mesh), shared)
    result = solve_dealt(dealt, options, min(chunk, -(-count // mesh.size)), mesh)
    return result if len(result.left) == count else jax.tree.map(lambda leaf: leaf[:count], result)
