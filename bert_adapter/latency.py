"""How long kernels take, dense and at each rank, and with them a model."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Costs(NamedTuple):
    """Seconds of a product with a kernel of some shape: at some ranks, which rise, and dense."""

    ranks: tuple[int, ...]
    seconds: tuple[float, ...]
    dense: float

    def at(self, ranks: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Seconds at these ranks, read off between those that were timed; a higher rank is never faster."""
        rising = np.maximum.accumulate(np.array([self.seconds[0], *self.seconds]))
        return np.interp(ranks, [0, *self.ranks], rising)


class Latency(NamedTuple):
    """What a plan of time needs to know: `plan(..., of=latency)`.

    batch, length: the texts, and the tokens of each, for which it holds.
    seconds: of the dense model.
    kernels: by shape, of one kernel.

    Example:
      >>> import numpy as np, bert_adapter
      >>> from bert_adapter.latency import Costs
      >>> square = Costs(ranks=(1, 3), seconds=(0.1, 0.3), dense=0.4)
      >>> latency = bert_adapter.Latency(1, 16, seconds=1.0, kernels={(8, 8): square})
      >>> params = {"easy": {"kernel": np.diag([9.0, 8, 0, 0, 0, 0, 0, 0])}, "hard": {"kernel": np.eye(8)}}
      >>> bert_adapter.plan(params, None, budget=0.81, of=latency, signal="svd").ranks
      {'easy': 2, 'hard': 4}
    """

    batch: int
    length: int
    seconds: float
    kernels: Mapping[tuple[int, int], Costs]

    def __str__(self) -> str:
        return f"time for {self.batch} x {self.length} tokens"
