"""What a signal is: a notion of importance, from what is measured to the weights of the solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

import wlra
from bert_adapter.importance.sums import Sums


class Evidence(NamedTuple):
    """What was measured of one kernel (in, out). Symmetric matrices are whole, or `Through` the kernel.

    effective: how many examples that count alike tell as much; None: all.
    """

    sums: Sums
    examples: int | float
    shape: tuple[int, int]
    effective: float | None = None


class TableWeights(NamedTuple):
    """What errors in a table (vocabulary, width) are weighted by.

    rows: of each row, from every other example and from the rest, which add up.
    columns: a weight for each column, or a matrix (width, width).
    ranks: the same as `rows`, of what ranks and bits are planned by where that is something else.
    normed: whether what is looked up is brought to one size, by a norm: then errors count by how much shorter the rows
      of factors are.
    """

    rows: Float[Array | np.ndarray, "2 vocabulary"]
    columns: Float[Array | np.ndarray, "..."]
    ranks: Float[Array | np.ndarray, "2 vocabulary"] | None = None
    normed: bool = False

    @property
    def planned(self) -> Float[Array | np.ndarray, "2 vocabulary"]:
        """What ranks and bits are planned by."""
        return self.rows if self.ranks is None else self.ranks


UNITS = ("loss", "own")


class Signal(NamedTuple):
    """A notion of importance, and everything that the rest of the package needs to know of it.

    name: what it is called in reports, in config.json and on the command line.
    about: one line for --help.
    weights: (evidence, shrink) -> what `wlra.solve` takes as weights. `shrink` is the share that is what is simpler,
      or None for as much as is noise.
    method: of `wlra.solve`, by default.
    ranks: the same as `weights`, of what ranks are planned by where that is something else.
    statistics: what is measured for it, of those of `Sums`; nothing if there are none.
    per_token: whether the weights are sums over tokens times sums over tokens.
    units: "loss" if half the squared error, weighted by `ranks`, is an increase of the loss, so that those of all
      kernels add up; "own" if it only compares errors in one kernel: ranks are then planned by the share of each kernel
      that is lost.
    needs_labels: whether the gradients must be those of a loss of labels; the command line, which has none, does not
      offer it then.
    refuses_labels: whether they must not be.
    tables: (evidence, shrink) -> weights for a table, which then needs no `weights`; None if the signal has none, and
      tables are refused.
    reliability: (evidence) -> the share of what was measured, beyond what is simpler, that is no noise, in [0, 1].
    shrinks: whether `weights` heed `shrink`, which is refused for kernels otherwise; those of a table always may.
    through: whether `weights` and `ranks` take matrices that are `Through` the kernel, and return Kronecker's of them;
      for others they are measured whole. Set it to False with functions of your own in a copy of such a signal.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> def plain(evidence, shrink):
      ...     return None  # all entries count the same
      >>> mine = bert_adapter.Signal("plain", "every entry counts the same", plain, method="svd")
      >>> small, report = bert_adapter.compress(sample_model(intermediate_size=16), [], budget=0.5, signal=mine)
      >>> report.signal
      'plain'
    """

    name: str
    about: str
    weights: Callable[[Evidence, float | None], Any]
    method: str | wlra.Method
    statistics: tuple[str, ...] = ()
    per_token: bool = False
    units: str = "own"
    needs_labels: bool = False
    refuses_labels: bool = False
    reliability: Callable[[Evidence], float] | None = None
    tables: Callable[[Evidence, float | None], TableWeights] | None = None
    ranks: Callable[[Evidence, float | None], Any] | None = None
    through: bool = False
    shrinks: bool = True
