"""What the solver is to count an error in each entry of a kernel by, from what was measured."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

import wlra
from bert_adapter.capture import Batch, Forward
from bert_adapter.importance import Basis, Gradients, Importance, Sums, counts, eigenbases, measure_importance
from wlra.border import check_name


class Rotated(NamedTuple):
    """Weights of the entries of basis.inputs.T @ kernel @ basis.outputs."""

    weights: Float[Array, "in out"]
    basis: Basis


class Signal(NamedTuple):
    """A notion of importance: what has to be measured for it, the weights that it makes of that, how they are solved.

    statistics: of the first pass over the batches.
    weights: (sums, basis, shrink, shape) -> None, an array, `wlra.Kronecker` or `Rotated`.
    method: of `wlra.solve`, by default.
    rotated: whether a second pass measures "fisher" in the eigenbasis.
    per_token: whether the weights are sums over tokens times sums over tokens.
    """

    statistics: tuple[str, ...]
    weights: Callable[[Sums, Basis | None, float, tuple[int, int]], Any]
    method: str
    rotated: bool = False
    per_token: bool = False


def diagonal(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> Float[Array, "in out"]:
    """The diagonal of the Fisher information, blended with its separable fit."""
    assert sums.fisher is not None
    fisher = sums.fisher[0] + sums.fisher[1]
    return fisher + shrink * (separable_fit(fisher) - fisher)


def in_eigenbasis(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> Rotated:
    """The same in the coordinates of the basis (George et al. 2018, sec. 3)."""
    assert basis is not None
    return Rotated(diagonal(sums, None, shrink, shape), basis)


def row(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> Float[Array, "in 1"]:
    """The Fisher information of an input's entries together (Hsu et al. 2022, sec. 3.2)."""
    assert sums.rows is not None
    return sums.rows[:, None]


def shampoo(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> wlra.Kronecker:
    """The product with the marginals of the Fisher information: what it sums to over inputs, and over outputs.

    With G a gradient, E[GG'] and E[G'G], as in Gupta et al. 2018; the step from the identity towards the nearest
    Kronecker product (Morwani et al. 2024, sec. 3). Unlike E[xx'] and E[delta delta'], they know which steps of time go
    together.
    """
    assert sums.row_gram is not None
    assert sums.col_gram is not None
    row, col = sums.row_gram, sums.col_gram
    trace = jnp.trace(min(row, col, key=len))  # both have the same: sum_b ||G_b||_F**2
    unit = 1 / jnp.where(trace > 0, trace, 1)
    return wlra.Kronecker(row * unit, col) if len(row) < len(col) else wlra.Kronecker(row, col * unit)


def kronecker(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> wlra.Kronecker:
    """Inputs and output gradients, taken for independent of each other and of other steps of time (Martens & Grosse
    2015, sec. 3)."""
    return wlra.Kronecker(sums.inputs, sums.outputs)


def activation(sums: Sums, basis: Basis | None, shrink: float, shape: tuple[int, int]) -> wlra.Kronecker:
    """The error of the layer's output (Chen et al. 2021, DRONE)."""
    return wlra.Kronecker(sums.inputs, jnp.eye(shape[1], dtype=jnp.float32))


SIGNALS: dict[str, Signal] = {
    "shampoo": Signal(("row_gram", "col_gram", "gram_squares"), shampoo, "kronecker"),
    "eigenbasis": Signal(("inputs", "outputs"), in_eigenbasis, "anderson", rotated=True),
    "fisher": Signal(("fisher",), diagonal, "anderson"),
    "exact": Signal(("fisher",), diagonal, "anderson"),
    "kronecker": Signal(("inputs", "outputs"), kronecker, "kronecker", per_token=True),
    "activation": Signal(("inputs",), activation, "kronecker", per_token=True),
    "row": Signal(("rows",), row, "fwsvd"),
    "none": Signal((), lambda *_: None, "svd"),
}


def solver_weights(
    importance: Importance | None, signal: str, shapes: Mapping[str, tuple[int, int]], shrink: float | None = None
) -> dict[str, Any]:
    """By path, the weights that the signal makes of what was measured. None for `shrink`: 1 - reliability, by kernel.

    Raises:
      ValueError: the signal needs what was not measured.
    """
    check_name("importance", signal, SIGNALS)
    chosen, weights = SIGNALS[signal], {}
    needed = (*chosen.statistics, *(("fisher",) if chosen.rotated else ()))
    for path, shape in shapes.items():
        sums = importance[path] if importance is not None and path in importance.sums else Sums()
        basis = importance.bases.get(path) if importance is not None else None
        if missing := [name for name in needed if getattr(sums, name) is None]:
            raise ValueError(f"importance {signal!r} needs {missing} of {path}, which were not measured")
        if "fisher" in needed and chosen.rotated != (basis is not None):
            where = "in the eigenbasis" if chosen.rotated else "of the kernel's own entries"
            raise ValueError(f"importance {signal!r} wants the Fisher information {where}; got the other")
        share = 1 - reliability(sums.fisher) if shrink is None and sums.fisher is not None else shrink or 0.0
        weights[path] = chosen.weights(sums, basis, share, shape)
    return weights


def separable_fit(fisher: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The product of the sums of its rows and of its columns over the sum of all: equal where rows are proportional."""
    whole = jnp.sum(fisher)
    return jnp.sum(fisher, axis=1)[:, None] * (jnp.sum(fisher, axis=0) / jnp.where(whole > 0, whole, 1))[None, :]


def reliability(halves: Float[Array, "2 in out"]) -> float:
    """The share of the weights' deviation from their separable fit that is no noise, in [0, 1].

    In units of the fit, the halves of an estimate differ by its noise alone: (a - b)**2 is in expectation the noise of
    a + b, squared. With more examples it tends to 1, unless the weights are separable.
    """
    fisher = halves[0] + halves[1]
    fit = separable_fit(fisher)
    unit = jnp.where(fit > 0, 1 / jnp.where(fit > 0, fit, 1), 0)
    noise = jnp.sum(((halves[0] - halves[1]) * unit) ** 2)
    deviation = jnp.sum(((fisher - fit) * unit) ** 2)
    return float(jnp.where(deviation > 0, jnp.clip(1 - noise / jnp.where(deviation > 0, deviation, 1), 0, 1), 0))


def gram_reliability(sums: Sums, examples: int) -> float:
    """The share of the Gram matrices' squared norm that is no noise, the smaller of the two, in [0, 1].

    The variance of a sum of A_b is N/(N - 1) (sum ||A_b||**2 - ||sum A_b||**2 / N): 0 where examples agree. With
    A_b = G_b G_b', for both: where an example has one gradient, G_b' G_b has the same norm.
    """
    assert sums.gram_squares is not None
    squares = min(float(jnp.sum(gram**2)) for gram in (sums.row_gram, sums.col_gram) if gram is not None)
    if examples < 2 or not squares > 0:
        return 0.0
    noise = examples / (examples - 1) * (float(sums.gram_squares) / squares - 1 / examples)
    return min(max(1 - noise, 0.0), 1.0)


def reliabilities(importance: Importance | None, paths: Iterable[str]) -> dict[str, float]:
    """By path, the reliability of the weights of entries, or else of the Gram matrices; empty if neither is known."""
    if importance is None:
        return {}
    found = {path: importance[path] for path in paths if path in importance.sums}
    entries = {path: reliability(sums.fisher) for path, sums in found.items() if sums.fisher is not None}
    grams = {path: sums for path, sums in found.items() if sums.gram_squares is not None}
    return {path: gram_reliability(sums, importance.examples) for path, sums in grams.items()} | entries


def measure_signal(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    signal: str,
    *,
    loss: Gradients = "gaussian",
    seed: int = 0,
    probes: int | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """What the signal needs to know of the kernels, from one pass over the batches, or two for an eigenbasis.

    Args are those of `measure_importance`. By default few examples have several random directions each, up to 8, so
    that there are 1,024 in all. With a file, each of two passes has its own: the first one's has the suffix ".factors".
    """
    check_name("importance", signal, SIGNALS)
    chosen, batches, paths = SIGNALS[signal], list(batches), list(paths)
    probes = probes_for(sum(counts(batch)[0] for batch in batches)) if probes is None else probes
    common: dict[str, Any] = {"loss": loss, "seed": seed, "probes": probes, "progress": progress}
    if not chosen.rotated:
        return measure_importance(forward, params, batches, paths, statistics=chosen.statistics, file=file, **common)
    beside = None if file is None else f"{file}.factors"
    factors = measure_importance(forward, params, batches, paths, statistics=chosen.statistics, file=beside, **common)
    bases = eigenbases(factors)
    turned = measure_importance(
        forward, params, batches, paths, statistics=("fisher",), bases=bases, file=file, **common
    )
    both = {path: sums._replace(fisher=turned[path].fisher) for path, sums in factors.sums.items()}
    return replace(turned, sums=both)


def probes_for(examples: int) -> int:
    """How many random directions each example has: where there are few examples, their noise is the larger part."""
    return min(8, max(1, math.ceil(1024 / max(examples, 1))))
