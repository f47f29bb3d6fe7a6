"""Problems that fall apart: blocks of rows and columns that no positive weight connects are solved one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Num

from wlra.options import Inputs, Options
from wlra.pipeline import solve_inputs
from wlra.problem import Factors
from wlra.result import History, Result, Status
from wlra.sparse import is_sparse
from wlra.units import balance_exactly

Block = tuple[np.ndarray, np.ndarray]  # the places of its rows and columns
LEAST = 16  # the smallest side of a block's program: smaller ones share it
WORST_FIRST = (Status.NONFINITE, Status.STALLED, Status.MAX_ITERS, Status.CONVERGED)


def may_be_cut(inputs: Inputs, options: Options) -> bool:
    """Whether blocks of the problem are problems of the same kind: dense, by iterations from a start of their own."""
    dense = not is_sparse(inputs.target)
    return dense and options.start is not None and not options.unit and inputs.ranks is None


def blocks(weights: Num[Any, "m n"]) -> list[Block]:
    """The connected components of the graph whose edges are the positive weights, those of a single side left out.

    Two passes over the weights tell for nearly all problems that there is one.
    """
    whole = connected(weights)
    if isinstance(whole, Tracer) or bool(whole):  # under jit nothing is known, not even of constants
        return [(np.arange(weights.shape[0]), np.arange(weights.shape[1]))]
    from scipy.sparse import bmat, csr_matrix
    from scipy.sparse.csgraph import connected_components

    seen = csr_matrix(np.asarray(weights) > 0)
    count, label = connected_components(bmat([[None, seen], [seen.T, None]]), directed=False)
    rows, cols = np.split(label, [weights.shape[0]])
    found = [(np.flatnonzero(rows == i), np.flatnonzero(cols == i)) for i in range(count)]
    return [(row, col) for row, col in found if len(row) and len(col)]


@jax.jit
def connected(weights: Num[Array, "m n"]) -> Bool[Array, ""]:
    """Whether the row with the most positive weights leads to all rows and columns that have any, in two steps."""
    seen = weights > 0
    cols = seen[jnp.argmax(jnp.sum(seen, axis=1))]
    for _ in range(2):
        rows = jnp.any(seen & cols[None, :], axis=1)
        cols = jnp.any(seen & rows[:, None], axis=0)
    return jnp.all(rows == jnp.any(seen, axis=1)) & jnp.all(cols == jnp.any(seen, axis=0))


def solve_apart(inputs: Inputs, options: Options, parts: list[Block]) -> Result:
    """One problem of several blocks: each is solved in units, scales and iterations of its own.

    Blocks are filled up with weights of 0 to powers of two, so that those of about a size share a program.
    """
    (m, n), rank = inputs.target.shape, options.rank
    largest = [
        max(float(jnp.max(jnp.where(inputs.weights > 0, jnp.abs(array), 0))), np.finfo(float).tiny)
        for array in inputs[:2]
    ]
    left, right = np.zeros((m, rank), inputs.target.dtype), np.zeros((rank, n), inputs.target.dtype)
    results, shares = [], []
    for rows, cols in parts:
        target, weights = (np.asarray(array)[np.ix_(rows, cols)] for array in (inputs.target, inputs.weights))
        size = tuple((0, filled(count, rank) - count) for count in target.shape)
        padded = (jnp.asarray(np.pad(array, size)) for array in (target, weights))
        result = solve_inputs(inputs._replace(**dict(zip(("target", "weights"), padded, strict=True))), options)
        left[rows], right[:, cols] = result.left[: len(rows)], result.right[:, : len(cols)]
        results.append(jax.tree.map(np.asarray, result))
        shares.append(size_of(target, weights, *largest))
    return joined(results, np.array(shares), Factors(jnp.asarray(left), jnp.asarray(right)))


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
    return Result(
        left=left,
        right=right,
        loss=jnp.asarray(shares @ np.stack([result.loss for result in results])),
        stationarity=jnp.asarray(np.max([result.stationarity for result in results])),
        iterations=jnp.asarray(steps - 1, jnp.int32),
        status=jnp.asarray(status, jnp.int32),
        history=History(jnp.asarray(until_last(shares @ losses)), jnp.asarray(until_last(stationarities.max(axis=0)))),
        gap=results[0].gap,
    )
