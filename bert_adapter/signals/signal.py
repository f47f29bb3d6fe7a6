"""What a notion of importance is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from bert_adapter.importance.sums import Basis, Sums


class Rotated(NamedTuple):
    """Weights of the entries of basis.inputs.T @ kernel @ basis.outputs."""

    weights: Float[Array, "in out"]
    basis: Basis


class Evidence(NamedTuple):
    """What was measured of one kernel (in, out), in coordinates of its own if there is a basis."""

    sums: Sums
    basis: Basis | None
    examples: int
    shape: tuple[int, int]


class Signal(NamedTuple):
    """A notion of importance: what has to be measured for it, the weights that it makes of that, how they are solved.

    statistics: of the first pass over the batches.
    weights: (evidence, shrink) -> None, an array, `wlra.Kronecker` or `Rotated`.
    method: of `wlra.solve`, by default.
    rotated: whether a second pass measures "fisher" in the eigenbasis.
    per_token: whether the weights are sums over tokens times sums over tokens.
    """

    statistics: tuple[str, ...]
    weights: Callable[[Evidence, float | None], Any]
    method: str
    rotated: bool = False
    per_token: bool = False
