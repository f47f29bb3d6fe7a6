"""What the solver is to count an error in each entry of a kernel by, from what was measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import wlra
from bert_adapter.capture import Batch, Forward
from bert_adapter.importance import Basis, Gradients, Importance, Sums, eigenbases, measure_importance
from wlra.border import check_name


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


def diagonal(evidence: Evidence, shrink: float | None) -> Float[Array, "in out"]:
    """The diagonal of the Fisher information, blended with its separable fit."""
    halves = evidence.sums.fisher
    assert halves is not None
    fisher = halves[0] + halves[1]
    share = 1 - reliability(halves) if shrink is None else shrink
    return fisher + share * (separable_fit(fisher) - fisher)


def in_eigenbasis(evidence: Evidence, shrink: float | None) -> Rotated:
    """The same in the coordinates of the basis (George et al. 2018, sec. 3)."""
    assert evidence.basis is not None
    return Rotated(diagonal(evidence, shrink), evidence.basis)


def row(evidence: Evidence, shrink: float | None) -> Float[Array, "in 1"]:
    """The Fisher information of an input's entries together (Hsu et al. 2022, sec. 3.2)."""
    assert evidence.sums.rows is not None
    return evidence.sums.rows[:, None]


def shampoo(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The product with the marginals of the Fisher information: what it sums to over inputs, and over outputs.

    With G a gradient, E[GG'] and E[G'G], as in Gupta et al. 2018; the step from the identity towards the nearest
    Kronecker product (Morwani et al. 2024, sec. 3). Unlike E[xx'] and E[delta delta'], they know which steps of time go
    together. Both drawn towards the identity.
    """
    sums = evidence.sums
    grams = [gram for gram in (sums.row_gram, sums.col_gram) if gram is not None]
    shares = [1 - one for one in gram_reliability(evidence)] if shrink is None else [shrink, shrink]
    return wlra.Kronecker(*marginals(grams, shares))


@jax.jit
def marginals(grams: list[Float[Array, "_ _"]], shares: list[Any]) -> list[Float[Array, "_ _"]]:
    """Both drawn towards the identity; of the trace that they have in common, the second is relieved."""
    row, col = (towards_identity(gram, share) for gram, share in zip(grams, shares, strict=True))
    trace = jnp.sum(jnp.diagonal(row))
    return [row, col / jnp.where(trace > 0, trace, 1)]


def towards_identity(gram: Float[Array, "n n"], share: Any) -> Float[Array, "n n"]:
    """Blended with the multiple of the identity that has the same trace (Ledoit & Wolf 2004, sec. 2)."""
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return (1 - share) * gram + share * jnp.mean(jnp.diagonal(gram)) * eye


def kronecker(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """Inputs and output gradients, taken for independent of each other and of other steps of time (Martens & Grosse
    2015, sec. 3)."""
    inputs, outputs = evidence.sums.inputs, evidence.sums.outputs
    assert inputs is not None
    assert outputs is not None
    return wlra.Kronecker(towards_identity(inputs, shrink or 0.0), towards_identity(outputs, shrink or 0.0))


def activation(evidence: Evidence, shrink: float | None) -> wlra.Kronecker:
    """The error of the layer's output (Chen et al. 2021, DRONE)."""
    assert evidence.sums.inputs is not None
    eye = jnp.eye(evidence.shape[1], dtype=jnp.float32)
    return wlra.Kronecker(towards_identity(evidence.sums.inputs, shrink or 0.0), eye)


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
    """By path, the weights that the signal makes of what was measured, as far drawn towards what is simpler.

    shrink: the share of weights per entry that is their separable fit, of Gram matrices that is the identity. If None,
    as far as they are noise, kernel by kernel: 1 - reliability. What has no known reliability is left as it is.

    Raises:
      ValueError: the signal needs what was not measured.
    """
    check_name("importance", signal, SIGNALS)
    chosen, weights = SIGNALS[signal], {}
    needed = (*chosen.statistics, *(("fisher",) if chosen.rotated else ()))
    for path, shape in shapes.items():
        evidence = evidence_of(importance, path, shape)
        if missing := [name for name in needed if getattr(evidence.sums, name) is None]:
            raise ValueError(f"importance {signal!r} needs {missing} of {path}, which were not measured")
        if "fisher" in needed and chosen.rotated != (evidence.basis is not None):
            where = "in the eigenbasis" if chosen.rotated else "of the kernel's own entries"
            raise ValueError(f"importance {signal!r} wants the Fisher information {where}; got the other")
        weights[path] = chosen.weights(evidence, shrink)
    return weights


def evidence_of(importance: Importance | None, path: str, shape: tuple[int, int]) -> Evidence:
    """What is known of a kernel; nothing if it was not measured."""
    if importance is None:
        return Evidence(Sums(), None, 0, shape)
    return Evidence(importance.sums.get(path, Sums()), importance.bases.get(path), importance.examples, shape)


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


def gram_reliability(evidence: Evidence) -> tuple[float, float]:
    """Of E[GG'] and E[G'G], the share of the deviation from a multiple of the identity that is no noise, in [0, 1].

    Squared Frobenius norms of deviations, as Ledoit & Wolf 2004, sec. 3: the variance of a sum of A_b = G_b G_b' is
    N/(N - 1) (sum ||A_b||**2 - ||sum A_b||**2 / N), nothing where examples agree. So is that of G_b' G_b where an
    example has one gradient, whose norm is the same.
    """
    sums, examples = evidence.sums, evidence.examples
    assert sums.gram_squares is not None
    found = []
    for gram in (sums.row_gram, sums.col_gram):
        whole, simple = map(float, squared_norms(gram))
        noise = max(float(sums.gram_squares) - whole / examples, 0) * examples / max(examples - 1, 1)
        real = examples > 1 and whole > simple
        found.append(min(max(1 - noise / (whole - simple), 0.0), 1.0) if real else 0.0)
    return found[0], found[1]


@jax.jit
def squared_norms(gram: Float[Array, "n n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of the matrix, and of the multiple of the identity with its trace."""
    return jnp.sum(gram**2), jnp.sum(jnp.diagonal(gram)) ** 2 / len(gram)  # jnp.trace reads the whole matrix


def reliabilities(
    importance: Importance | None, signal: str, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """By path, that of the signal's weights of entries, or of the worse of its Gram matrices; empty if it has none."""
    chosen, found = SIGNALS[signal], {}
    for path, shape in shapes.items():
        evidence = evidence_of(importance, path, shape)
        if "gram_squares" in chosen.statistics:
            found[path] = min(gram_reliability(evidence))
        elif evidence.sums.fisher is not None and (chosen.rotated or "fisher" in chosen.statistics):
            found[path] = reliability(evidence.sums.fisher)
    return found


def measure_signal(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    signal: str,
    *,
    loss: Gradients = "gaussian",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """What the signal needs to know of the kernels, from one pass over the batches, or two for an eigenbasis.

    Args are those of `measure_importance`. With a file, each of two passes has its own: the first one's has the suffix
    ".factors".
    """
    check_name("importance", signal, SIGNALS)
    chosen, batches, paths = SIGNALS[signal], list(batches), list(paths)
    common: dict[str, Any] = {"loss": loss, "seed": seed, "progress": progress}
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
