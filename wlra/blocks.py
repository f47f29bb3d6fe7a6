"""Problems that fall apart: blocks of rows and columns that no positive weight connects are solved one by one."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from wlra.options import Inputs, Options
from wlra.pipeline import solve_inputs
from wlra.problem import Factors
from wlra.result import History, Restarts, Result, Status
from wlra.sparse import Matrix, by_col, by_row, in_row_order, is_sparse, like, row_max, row_sum, values
from wlra.units import balance_exactly

Block = tuple[np.ndarray, np.ndarray]  # the places of its rows and columns
Solve = Callable[[Inputs, Options], Result]
LEAST = 16  # the smallest side of a block's program: smaller ones share it
SMALL, FILLED = 256 * 256, 4  # blocks of a sparse matrix are dense up to so many entries, or so many for each known one
MOST, LARGE = 256, 4  # a sparse matrix of more blocks, or of more large ones, is solved as a whole
WORST_FIRST = (Status.NONFINITE, Status.STALLED, Status.MAX_ITERS, Status.CONVERGED)


def by_blocks(inputs: Inputs, options: Options, solve: Solve = solve_inputs) -> Result:
    """What `solve` makes of one problem, or of each of its blocks."""
    parts = blocks(inputs.weights) if may_be_cut(inputs, options) else []
    if is_sparse(inputs.target) and not worth_it(parts, inputs.target.shape, options.rank):
        parts = []
    return solve_apart(inputs, options, parts, solve) if len(parts) > 1 else solve(inputs, options)


def may_be_cut(inputs: Inputs, options: Options) -> bool:
    """Whether blocks of a problem are problems of the same kind: known, without a penalty, and solved by iterations."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(inputs))
    return options.examined and not traced and bool(options.method.stages) and not options.unit


def worth_it(parts: list[Block], shape: tuple[int, ...], rank: int) -> bool:
    """Whether blocks of a sparse matrix are few, and so few of them large that their programs are soon compiled."""
    large = sum(math.prod(padded(block, shape, rank)) > SMALL for block in parts)
    return len(parts) <= MOST and large <= LARGE


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
    cut_out = cut_sparse if is_sparse(on_host[0]) else cut_dense
    left, right = np.zeros((m, rank), dtype), np.zeros((rank, n), dtype)
    results, shares = [], []
    for rows, cols in parts:
        size = padded((rows, cols), (m, n), rank)
        target, weights = cut_out(on_host[0], on_host[1], (rows, cols), size)
        start = None if on_host[2] is None else start_of(on_host[2], rows, cols, target.shape)
        block = inputs._replace(**jax.tree.map(jnp.asarray, {"target": target, "weights": weights, "start": start}))
        result = jax.tree.map(np.asarray, solve(block, options))
        left[rows], right[:, cols] = result.left[: len(rows)], result.right[:, : len(cols)]
        results.append(result)
        shares.append(size_of(values(target), values(weights), *sizes))
    return joined(results, np.array(shares), Factors(jnp.asarray(left), jnp.asarray(right)))


def cut_dense(target: Any, weights: Any, block: Block, size: tuple[int, ...]) -> tuple[Any, Any]:
    """The block's target and weights, filled up with weights of 0, so that blocks of about a size share a program."""
    more = [(0, whole - len(side)) for whole, side in zip(size, block, strict=True)]
    return np.pad(target[np.ix_(*block)], more), np.pad(weights[np.ix_(*block)], more)


def cut_sparse(target: Any, weights: Any, block: Block, size: tuple[int, ...]) -> tuple[Any, Any]:
    """The same of a sparse matrix; dense, unless it is large."""
    rows, cols = (np.full(whole, -1) for whole in target.shape)
    for places, side in zip((rows, cols), block, strict=True):
        places[side] = np.arange(len(side))
    inside = np.flatnonzero((rows[target.rows] >= 0) & (cols[target.cols] >= 0))
    indices = np.stack([rows[target.rows[inside]], cols[target.cols[inside]]], axis=1)
    if math.prod(size) <= max(SMALL, FILLED * len(inside)):
        both = [np.zeros(size, matrix.dtype) for matrix in (target, weights)]
        for dense, matrix in zip(both, (target, weights), strict=True):
            dense[tuple(indices.T)] = matrix.values[inside]
        return both[0], both[1]
    part = in_row_order(inside, indices, size, "W")
    return like(part, target.values[part.values]), like(part, weights.values[part.values])


def start_of(start: Any, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, ...]) -> Factors:
    """The block's part of the factors to begin with, filled up with zeros."""
    more = shape[0] - len(rows), shape[1] - len(cols)
    left, right = jnp.asarray(start.left[rows]), jnp.asarray(start.right[:, cols])
    return Factors(jnp.pad(left, ((0, more[0]), (0, 0))), jnp.pad(right, ((0, 0), (0, more[1]))))


def padded(block: Block, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The powers of two that hold the block's rows and columns, and the rank; at most what the whole matrix has."""
    counts = (max(len(side), rank, LEAST) for side in block)
    return tuple(min(1 << (count - 1).bit_length(), whole) for count, whole in zip(counts, shape, strict=True))


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
