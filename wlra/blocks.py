"""Problems that fall apart: blocks of rows and columns that no positive weight connects are solved one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from wlra.options import Inputs, Options, join, split
from wlra.pipeline import solve_inputs
from wlra.problem import Factors
from wlra.result import History, Restarts, Result, Status
from wlra.sparse import Matrix, by_col, by_row, in_row_order, is_sparse, like, row_max, row_sum, values
from wlra.units import balance_exactly

Block = tuple[np.ndarray, np.ndarray]  # the places of its rows and columns
Solve = Callable[[Inputs, Options], Result]
LEAST = 16  # the smallest side of a block's program: smaller ones share it
SMALL, FILLED = 64 * 64, 4  # blocks of a sparse matrix are dense below so many entries, or so many for each known one
WORST_FIRST = (Status.NONFINITE, Status.STALLED, Status.MAX_ITERS, Status.CONVERGED)


def may_be_cut(options: Options) -> bool:
    """Whether blocks of a problem are problems of the same kind: known, without a penalty, and solved by iterations."""
    return options.examined and bool(options.method.stages) and not options.unit


def by_blocks(inputs: Inputs, options: Options, solve: Solve = solve_inputs) -> Result:
    """What `solve` makes of one problem, or of each of its blocks."""
    parts = blocks(inputs.weights) if may_be_cut(options) else []
    return solve_apart(inputs, options, parts, solve) if len(parts) > 1 else solve(inputs, options)


def each_by_blocks(inputs: Inputs, options: Options, solve: Solve) -> Result:
    """What `solve` makes of problems of one shape, but of those that fall apart block by block."""
    whole = jax.lax.map(connected, inputs.weights) if may_be_cut(options) else True
    if whole is True or isinstance(whole, Tracer):
        return solve(inputs, options)
    doubtful = np.flatnonzero(~np.asarray(whole))
    parts = {i: found for i in doubtful.tolist() if len(found := blocks(inputs.weights[i])) > 1}
    if not parts:
        return solve(inputs, options)
    places, (arrays, shared) = np.array(list(parts)), split(inputs)
    result = solve(inputs._replace(target=inputs.target.at[places].set(0)), options)  # of zero there is nothing to do
    apart = [
        solve_apart(join(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), shared), options, found)
        for i, found in parts.items()
    ]
    return jax.tree.map(lambda leaf, *of: leaf.at[places].set(jnp.stack(of)), result, *apart)


def blocks(weights: Any) -> list[Block]:
    """The connected components of the graph whose edges are the positive weights, those of a single side left out.

    Two passes over the weights tell for nearly all problems that there is one.
    """
    m, n = weights.shape
    whole = connected(weights)
    if isinstance(whole, Tracer) or bool(whole):  # under jit nothing is known, not even of constants
        return [(np.arange(m), np.arange(n))]
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    rows, cols = edges(weights)
    graph = csr_matrix((np.ones(len(rows), bool), (rows, m + cols)), shape=(m + n, m + n))
    _, label = connected_components(graph, directed=False)
    members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
    found = [(nodes[nodes < m], nodes[nodes >= m] - m) for nodes in members]
    return [(row, col) for row, col in found if len(row) and len(col)]


@jax.jit
def connected(weights: Matrix) -> Bool[Array, ""]:
    """Whether the row with the most positive weights leads to all rows and columns that have any, in two steps."""
    seen = (values(weights) > 0).astype(jnp.int8)
    first = jnp.argmax(row_sum(like(weights, seen.astype(jnp.int32))))
    rows = (jnp.arange(weights.shape[0]) == first).astype(jnp.int8)
    cols = row_max(like(weights, seen & by_row(weights, rows)).T)
    for _ in range(2):
        rows = row_max(like(weights, seen & by_col(weights, cols)))
        cols = row_max(like(weights, seen & by_row(weights, rows)).T)
    return jnp.all(rows == row_max(like(weights, seen))) & jnp.all(cols == row_max(like(weights, seen).T))


def edges(weights: Any) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"]]:
    """The rows and columns of the positive weights."""
    if not is_sparse(weights):
        rows, cols = np.nonzero(np.asarray(weights) > 0)
        return rows, cols
    positive = np.asarray(weights.values) > 0
    return np.asarray(weights.rows)[positive], np.asarray(weights.cols)[positive]


def solve_apart(inputs: Inputs, options: Options, parts: list[Block], solve: Solve = solve_inputs) -> Result:
    """One problem of several blocks: each is solved in units, scales and iterations of its own."""
    (m, n), rank, dtype = inputs.target.shape, options.rank, inputs.target.dtype
    on_host = jax.tree.map(np.asarray, inputs[:3])
    numbers, known = values(on_host[0]), values(on_host[1]) > 0
    sizes = [max(float(np.max(np.abs(array[known]))), np.finfo(float).tiny) for array in (numbers, values(on_host[1]))]
    cut_out = cutter(on_host[0], on_host[1], rank)
    left, right = np.zeros((m, rank), dtype), np.zeros((rank, n), dtype)
    results, shares = [], []
    for rows, cols in parts:
        target, weights = cut_out(rows, cols)
        start = None if on_host[2] is None else start_of(on_host[2], rows, cols, target.shape)
        block = jax.tree.map(jnp.asarray, inputs._replace(target=target, weights=weights, start=start))
        result = jax.tree.map(np.asarray, solve(block, options))
        left[rows], right[:, cols] = result.left[: len(rows)], result.right[:, : len(cols)]
        results.append(result)
        shares.append(size_of(values(target), values(weights), *sizes))
    return joined(results, np.array(shares), Factors(jnp.asarray(left), jnp.asarray(right)))


def cutter(target: Any, weights: Any, rank: int) -> Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]:
    """The function of a block's rows and columns that gives its target and weights.

    Filled up with weights of 0 to powers of two, so that blocks of about a size share a program; but large ones of a
    sparse matrix, which have as many rows and columns as they need.
    """

    def size_for(rows: np.ndarray, cols: np.ndarray) -> tuple[int, int]:
        return filled(len(rows), rank), filled(len(cols), rank)

    def of_dense(rows: np.ndarray, cols: np.ndarray) -> tuple[Any, Any]:
        size, place = size_for(rows, cols), np.ix_(rows, cols)
        more = [(0, whole - len(side)) for whole, side in zip(size, (rows, cols), strict=True)]
        return np.pad(target[place], more), np.pad(weights[place], more)

    if not is_sparse(target):
        return of_dense
    from scipy.sparse import csr_matrix

    count = np.arange(len(target.values))  # the place of each entry, and no number that SciPy has no dtype for
    places = csr_matrix((count, (target.rows, target.cols)), shape=target.shape)

    def of_sparse(rows: np.ndarray, cols: np.ndarray) -> tuple[Any, Any]:
        inside, size = places[rows][:, cols].tocoo(), size_for(rows, cols)
        if np.prod(size) <= max(SMALL, FILLED * inside.nnz):
            both = [np.zeros(size, matrix.dtype) for matrix in (target, weights)]
            for dense, matrix in zip(both, (target, weights), strict=True):
                dense[inside.row, inside.col] = matrix.values[inside.data]
            return both[0], both[1]
        indices, shape = np.stack([inside.row, inside.col], axis=1), (max(len(rows), rank), max(len(cols), rank))
        block = in_row_order(inside.data, indices, shape, "W")
        return like(block, target.values[block.values]), like(block, weights.values[block.values])

    return of_sparse


def start_of(start: Any, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, ...]) -> Factors:
    """The block's part of the factors to begin with, filled up with zeros."""
    more = shape[0] - len(rows), shape[1] - len(cols)
    left, right = jnp.asarray(start.left[rows]), jnp.asarray(start.right[:, cols])
    return Factors(jnp.pad(left, ((0, more[0]), (0, 0))), jnp.pad(right, ((0, 0), (0, more[1]))))


def filled(count: int, rank: int) -> int:
    """The power of two that holds both, and not below LEAST."""
    return 1 << (max(count, rank, LEAST) - 1).bit_length()


def size_of(target: np.ndarray, weights: np.ndarray, largest_target: float, largest_weight: float) -> float:
    """The loss of zero in units of the largest target and weight, in float64."""
    shares = weights.astype(float) / largest_weight
    return float(np.sum(shares * (np.where(shares > 0, target, 0).astype(float) / largest_target) ** 2))


def joined(results: list[Result], sizes: np.ndarray, factors: Factors) -> Result:
    """The result of the whole: losses by their share, the largest stationarity, the worst status."""
    shares = (sizes / sizes.sum() if sizes.sum() > 0 else sizes).astype(results[0].loss.dtype)
    steps = 1 + max(int(result.iterations) for result in results)

    def course(history: Any) -> np.ndarray:
        known = np.isfinite(history)
        return history[np.maximum.accumulate(np.where(known, np.arange(len(history)), 0))]

    def until_last(history: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(history)) < steps, history, np.inf).astype(history.dtype)

    losses = np.stack([course(result.history.loss) for result in results])
    stationarities = np.stack([course(result.history.stationarity) for result in results])
    status = next(status for status in WORST_FIRST if any(result.status == status for result in results))
    left, right = balance_exactly(factors)
    loss = shares @ np.stack([result.loss for result in results])
    return Result(
        left=left,
        right=right,
        loss=jnp.asarray(loss),
        stationarity=jnp.asarray(np.max([result.stationarity for result in results])),
        iterations=jnp.asarray(steps - 1, jnp.int32),
        status=jnp.asarray(status, jnp.int32),
        history=History(jnp.asarray(until_last(shares @ losses)), jnp.asarray(until_last(stationarities.max(axis=0)))),
        gap=results[0].gap,
        restarts=least_often([result.restarts for result in results], float(loss)),
    )


def least_often(found: list[Restarts | None], loss: float) -> Restarts | None:
    """The lowest loss of the whole, found as often as in the block where its share was found least."""
    counts = [restarts.count[0] for restarts in found if restarts is not None]
    return Restarts(np.array([loss]), np.array([min(counts)])) if counts else None
