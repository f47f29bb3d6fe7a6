"""What a solve returns, and the sentence that goes with each outcome."""

import enum
from typing import NamedTuple

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int


class Status(enum.IntEnum):
    """How a solve ended; `advice` says what to do about it. Set in `wlra.driver` and
    `wlra.pipeline.named_faults`; of closed forms on the host in `wlra.runners`, of blocks in `wlra.blocks`.

    Example:
      >>> import wlra
      >>> wlra.Status.CONVERGED.advice
      'Stationary to `tol`, and within 1 % of a local minimum: nothing to do.'
    """

    CONVERGED = 0
    CLOSED_FORM = 1
    MAX_ITERS = 2
    STALLED = 3
    NONFINITE = 4
    INVALID_TARGET = 5
    INVALID_WEIGHTS = 6
    INVALID_PENALTY = 7

    @property
    def advice(self) -> str:
        return ADVICE[self]


ADVICE = {
    Status.CONVERGED: "Stationary to `tol`, and within 1 % of a local minimum: nothing to do.",
    Status.CLOSED_FORM: "A closed form is exact for its own kind of weights only: for others, use an iterative method.",
    Status.MAX_ITERS: "Still improving: raise `max_iters`, or go on with start=(result.left, result.right).",
    Status.STALLED: "No lower loss in `patience` iterations: raise `tol` or `patience`, or solve in float64.",
    Status.NONFINITE: "An iterate overflowed and the best one before it was kept, or zero: solve in float64.",
    Status.INVALID_TARGET: "W has NaN or inf where the weight is positive: give those entries weight 0.",
    Status.INVALID_WEIGHTS: "Weights are NaN, inf or negative, all zero, or, traced, too far apart: clean them first.",
    Status.INVALID_PENALTY: "The penalty is negative or no finite number, or a ridge is above 1: give another.",
}


class History(NamedTuple):
    """The course of a solve; entry 0 is the start, +inf stands where no iteration came.

    Example:
      >>> import numpy as np, wlra
      >>> history = wlra.solve(np.outer([1, 2, 3], [1, 2]), None, rank=1).history
      >>> history.loss.shape, bool(history.loss[0] < 1e-6), float(history.loss[1])
      ((201,), True, inf)
    """

    loss: Float[Array, " iters"]
    stationarity: Float[Array, " iters"]


class Restarts(NamedTuple):
    """The distinct losses that random starts ended with, lowest first, and how many starts ended with each.

    Of several blocks that no positive weight connects, each with starts of its own: the lowest loss alone, and the
    count of the block that found its own least often.

    Example:
      >>> import numpy as np, wlra
      >>> found = wlra.Restarts(loss=np.array([0.125, 0.5]), count=np.array([2, 3]))
      >>> f"{found.count.sum()} starts, {found.count[0]} of them at the lowest loss"
      '5 starts, 2 of them at the lowest loss'
    """

    loss: Float[np.ndarray, " r"]
    count: Int[np.ndarray, " r"]


class Result(NamedTuple):
    """The best factors found, and how they were found. With a leading batch axis from `solve_batch`.

    `loss` is sum weights (W - left @ right)**2 / sum weights W**2 for the weights as given; with a penalty, the
    objective over that of zero. Of a W of 16 bits, factors are rounded to these at the end, and all numbers are of
    those before; where factors are beyond the numbers of their dtype, they are zero and `status` is NONFINITE.
    `stationarity` is the share of the gradient, in scaled variables, that a matrix of rank k can still follow (see
    `wlra.problem.stationarity`).
    `status` is a `wlra.Status`; `advice` says in a sentence what to do, `converged` whether nothing is to be done: the
    stationarity is at most `tol`, and the loss within 1 % of a local minimum (see `wlra.certificate`).
    `history` holds loss and stationarity of every iterate, entry 0 the start, +inf where no iteration came; a
    stationarity above `tol` may be a lower bound of it, which costs less.
    `gap`, with a penalty, bounds the relative distance of its objective from the lowest of all ranks (see
    `wlra.duality.duality_gap`); +inf without, when nothing certifies it. `restarts` tells what random starts found.
    Each column of `left` is as large as its row of `right`, to a factor of two.

    Example:
      >>> import numpy as np, wlra
      >>> result = wlra.solve(np.outer([1, 2, 3], [1, 2]), None, rank=1)
      >>> bool(result.converged), result.advice
      (True, 'Stationary to `tol`, and within 1 % of a local minimum: nothing to do.')
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

    @property
    def converged(self) -> Bool[Array, "*b"]:
        """Whether nothing is to be done; of each problem of a batch."""
        return self.status == Status.CONVERGED.value

    @property
    def advice(self) -> str | list[str]:
        """What to do, in a sentence; a sentence for each problem of a batch."""
        if isinstance(self.status, Tracer):
            raise TypeError("advice is text: read it outside of jit, where `status` and `converged` are known too")
        status = np.asarray(self.status)
        return Status(int(status)).advice if status.ndim == 0 else [Status(int(one)).advice for one in status.ravel()]
