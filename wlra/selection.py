"""The rank that predicts hidden entries best."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wlra import checks
from wlra.api import batch_given, solve_given
from wlra.door import Given, enter
from wlra.options import Request, check_options, is_known, refuse_filled
from wlra.path import stacked, warm
from wlra.problem import Kronecker
from wlra.result import Result
from wlra.sparse import entries_on_host, is_sparse, like, values


class Selection(NamedTuple):
    """The rank whose solutions predict hidden entries best, and the errors that say so.

    `error` is sum weights (W - left @ right)**2 over the entries hidden in each fold, over a fold's mean share of sum
    weights W**2: its mean over the folds is the relative error of all entries, each predicted once without being seen.
    `tied` are the ranks whose mean error is the least but for rounding, and `rank` is the smallest of them.

    Example:
      >>> import numpy as np, wlra
      >>> selection = wlra.Selection(2, np.array([1, 2]), error=np.array([[0.5, 0.7], [0.1, 0.3]]))
      >>> selection.error.mean(axis=1)
      array([0.6, 0.2])
    """

    rank: int
    ranks: Int[np.ndarray, " r"]
    error: Float[np.ndarray, "r folds"]

    @property
    def tied(self) -> Int[np.ndarray, " t"]:
        """The ranks whose mean error is the least but for rounding."""
        return self.ranks[ties(self.error)]


def select_rank(
    W: Any,
    weights: Any,
    ranks: Sequence[int],
    *,
    key: Array,
    folds: int = 5,
    chunk: int | None = None,
    **options: Any,
) -> Selection:
    """The rank with the least mean error on entries that the solver did not see; of ranks that tie, the smallest.

    The entries of positive weight are dealt at random to the folds (Owen & Perry 2009, who hold out blocks; Wold 1978,
    entries); each fold is hidden once, as weights of zero, from solves of all ranks.

    Args:
      W, weights: as in `solve`, but for Kronecker weights. Of a sparse W the stored entries are dealt to the folds,
        which are solved one by one.
      ranks: the ranks to compare.
      key: of `jax.random`: deals the entries.
      folds: how many parts the entries are dealt to, at least 2.
      chunk: how many folds are solved at a time, as in `solve_batch`; not for a sparse W.
      options: of `solve_batch`, but for start and ranks.

    Warns:
      UserWarning: all ranks tie: hidden entries do not tell which is best.

    Raises:
      ValueError: an option cannot be used, fewer entries have positive weight than there are folds, or W is 0 in all of
        them, so that there is nothing to predict.

    Example:
      >>> import jax, numpy as np, wlra
      >>> rng = np.random.default_rng(0)
      >>> W = np.outer(rng.normal(size=12), rng.normal(size=10)) + 0.1 * rng.normal(size=(12, 10))
      >>> wlra.select_rank(W, None, [1, 2], key=jax.random.key(0)).rank
      1
    """
    folds, key, ranks = checks.check_count("folds", folds, 2), checks.check_key(key), checks.check_list("ranks", ranks)
    if "start" in options:
        raise ValueError("each rank starts from the one above it: start cannot be given")
    mesh, method = options.pop("mesh", None), options.pop("method", "anderson")
    request = check_options(method, **options)

    def select(given: Given) -> Selection:
        candidates = sorted({checks.check_rank(rank, given.shape) for rank in ranks})
        hidden = deal(given, folds, key)
        solve = each_fold(given, hidden, request, chunk=chunk, mesh=mesh)
        errors, before = {}, None
        for rank in reversed(candidates):
            before = solve(rank, before)
            errors[rank] = hidden_error(given, hidden, before)
        table = np.stack([errors[rank] for rank in candidates])
        return Selection(candidates[int(np.argmax(ties(table)))], np.array(candidates), table)

    selection = enter(W, weights, select, known=is_known(request))
    if len(selection.tied) == len(selection.ranks) > 1:
        message = f"all ranks predict the hidden entries equally well; the smallest, {selection.rank}, is returned"
        warnings.warn(message, stacklevel=2)
    return selection


def deal(given: Given, folds: int, key: Array) -> Bool[np.ndarray, "folds ..."]:
    """Which entries each fold hides."""
    if isinstance(given.weights, Kronecker):
        raise ValueError("Kronecker weights hide no entry: select_rank needs weights of entries")
    if not given.examined:
        raise ValueError(
            "entries of positive weight are dealt to the folds, and must be known: call outside of jit and vmap"
        )
    target, weight = (np.asarray(values(matrix)) for matrix in (given.target, given.weights))
    seen = np.flatnonzero(weight > 0)
    if len(seen) < folds:
        raise ValueError(f"{folds} folds need as many entries of positive weight; got {len(seen)}")
    if not target.ravel()[seen].any():
        raise ValueError("W is 0 wherever the weight is positive: there is nothing to predict")
    fold = np.full(weight.size, -1)
    fold[np.asarray(jax.random.permutation(key, seen))] = np.arange(len(seen)) % folds
    return np.arange(folds).reshape(-1, *[1] * weight.ndim) == fold.reshape(1, *weight.shape)


def each_fold(
    given: Given, hidden: Bool[np.ndarray, "folds ..."], request: Request, *, chunk: int | None, mesh: Any
) -> Callable[[int, Result | None], Result]:
    """The function (rank, results of a larger rank or None) -> the results of all folds, stacked."""
    target, weight = values(given.target), np.asarray(values(given.weights))
    shown = np.where(hidden, weight.dtype.type(0), weight[None])
    if not is_sparse(given.target):
        target = np.asarray(target)
        targets = np.where(
            hidden, target.dtype.type(np.nan), target[None]
        )  # some closed forms look at what weighs nothing
        batch = Given(targets, shown, checks.check_values(targets, shown), examined=True)
        return lambda rank, before: batch_given(batch, rank, warm(batch, request, before, rank), chunk=chunk, mesh=mesh)
    refuse_filled(request, mesh=mesh)
    if chunk is not None:
        raise ValueError(f"chunk must be None for a sparse W, whose folds are solved one by one; got {chunk!r}")
    problems = [
        Given(given.target, like(given.weights, part), checks.check_values(target, part), examined=True)
        for part in shown
    ]

    def solve_each(rank: int, before: Result | None) -> Result:
        results = []
        for i, problem in enumerate(problems):
            mine = None if before is None else jax.tree.map(lambda leaf, i=i: leaf[i], before)
            results.append(solve_given(problem, rank, warm(problem, request, mine, rank)))
        return stacked(results)

    return solve_each


def hidden_error(given: Given, hidden: Bool[np.ndarray, "folds ..."], result: Result) -> Float[np.ndarray, " folds"]:
    """The weighted squared error of each fold's hidden entries over a fold's mean share of the weighted squares of W.

    On the host in float64, in units in which no square overflows; infinite where it is no number.
    """
    assert given.survey is not None  # asked of known values only
    target, weight = (np.asarray(values(matrix)).astype(np.float64) for matrix in (given.target, given.weights))
    power, shares = np.frexp(given.survey.largest)[1], weight / float(given.survey.heaviest)
    target = np.ldexp(np.where(weight > 0, target, 0), -power)
    zero = np.sum(shares * target**2) / len(hidden)
    errors, factors = [], [np.asarray(factor, np.float64) for factor in (result.left, result.right)]
    for place, left, right in zip(hidden, *factors, strict=True):
        product = entries_on_host(given.target, left, right)
        errors.append(np.sum(np.where(place, shares, 0) * (target - np.ldexp(product, -power)) ** 2) / zero)
    return np.nan_to_num(np.array(errors), nan=np.inf, posinf=np.inf)


def ties(error: Float[np.ndarray, "r folds"]) -> Bool[np.ndarray, " r"]:
    """Which ranks have the least mean error but for rounding: of float32, in sums and in fits that are exact."""
    mean, rounding = error.mean(axis=1), 64 * float(np.finfo(np.float32).eps)
    return mean <= mean.min() * (1 + rounding) + rounding**2
