"""Closed forms in NumPy, for values that are known on a CPU: nothing to compile, and one decomposition each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from wlra.certificate import WITHIN
from wlra.components import cut, decompose, in_units, lost
from wlra.problem import Kronecker

EPS = float(np.finfo(np.float32).eps)
Rows = Float[np.ndarray, " _"]


class Found(NamedTuple):
    """Factors of float32, their relative loss and stationarity, and whether that loss is about the lowest of all."""

    left: Float[np.ndarray, "m k"]
    right: Float[np.ndarray, "k n"]
    loss: float
    stationarity: float
    lowest: bool


OnHost = Callable[[Any, Any, int], Found]
Equalise = Callable[[Float[np.ndarray, "m n"]], tuple[Rows, Rows]]


def of_rows_and_columns(target: Any, weights: Kronecker, rank: int) -> Found:
    """For Kronecker weights: exact, so what is lost is known from the squares."""
    found = decompose(target, weights.row, weights.col, rank)
    return Found(*cut(found, rank), loss=lost(found, rank), stationarity=0.0, lowest=True)


def of_entries(equalise: Equalise, sees_hidden: bool) -> OnHost:
    """For weights of entries, which are taken for the product of what `equalise` makes of them."""

    def solve(target: Any, weights: Any, rank: int) -> Found:
        weights, _ = in_units(weights)
        finite = np.where(np.isfinite(target), target, 0)
        seen, power = in_units(np.where(weights > 0, finite, 0))
        known = with_hidden(np.ldexp(finite.astype(np.float64), -power), seen) if sees_hidden else seen
        row, col = equalise(weights)
        whole = decompose(known, row, col, rank)
        left, right = cut(whole, rank)
        share = divide(divide(weights, row[:, None]), col[None, :])
        low, high = np.min(share), np.max(share)
        if low >= (1 - 4 * EPS) * high:
            found = Found(left, right, loss=lost(whole, rank), stationarity=0.0, lowest=True)
        else:
            found = evaluated(seen, weights, equilibrated(weights), left=left, right=right)
            found = found._replace(lowest=found.lowest or bool(low >= (1 - WITHIN) * high))
        half = np.ldexp(1.0, power // 2)
        return found._replace(left=half * left, right=half * right)

    return solve


def with_hidden(known: Float[np.ndarray, "m n"], seen: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """The target with its entries of weight 0, but for those 1000 times larger than what counts: see the pipeline."""
    largest = np.max(np.abs(seen))
    return np.where(np.abs(known) <= np.ldexp(1024.0 * (largest > 0), np.frexp(largest)[1]), known, 0)


def evaluated(
    target: Float[np.ndarray, "m n"], weights: Float[np.ndarray, "m n"], scaling: Any, *, left: Any, right: Any
) -> Found:
    """Loss and stationarity (see `wlra.problem`) in variables in which weights are divided by the scaling."""
    share = divide(divide(weights, scaling[0][:, None]), scaling[1][None, :]).astype(np.float32)
    row, col = map(np.sqrt, scaling)
    scaled = (row[:, None] * target * col[None, :]).astype(np.float32)
    one, other = (row[:, None] * left).astype(np.float32), (right * col[None, :]).astype(np.float32)
    residual = share * (scaled - one @ other)
    error, zero = np.vdot(residual, scaled - one @ other), np.vdot(share * scaled, scaled)
    along_right, along_left = residual @ other.T, one.T @ residual
    both = along_left @ other.T
    over_left, over_right = inverse(one.T @ one), inverse(other @ other.T)
    tangent = np.vdot(along_right, along_right @ over_right) + np.vdot(along_left, over_left @ along_left)
    tangent -= np.vdot(both, over_left @ both @ over_right)
    loss = float(error / zero) if zero > 0 else float(error)
    told = loss > (8 * EPS) ** 2 * left.shape[1]
    whole = np.vdot(residual, residual)
    stationarity = float(np.sqrt(np.clip(tangent / whole, 0, 1))) if told and whole > 0 else 0.0
    return Found(left, right, loss=loss, stationarity=stationarity, lowest=not told)


def inverse(gram: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """That of its unit-diagonal form shifted by k eps; what is zero has no part."""
    gram = gram.astype(np.float64)
    diagonal = np.diag(gram)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    unit = gram * scale[:, None] * scale[None, :]
    return np.linalg.inv(unit + np.diag(len(gram) * EPS + (diagonal <= 0))) * scale[:, None] * scale[None, :]


def equal_weights(weights: Float[np.ndarray, "m n"]) -> tuple[Rows, Rows]:
    """All weights are taken for equal."""
    m, n = weights.shape
    return np.ones(m), np.ones(n)


def summed(weights: Float[np.ndarray, "m n"]) -> tuple[Rows, Rows]:
    """The weights of a row are replaced by their sum."""
    return weights.sum(axis=1, dtype=np.float64), np.ones(weights.shape[1])


def equilibrated(weights: Float[np.ndarray, "m n"], sweeps: int = 8) -> tuple[Rows, Rows]:
    """Those of `wlra.scaling.equilibrate`."""
    row = power_mean(weights)
    col = power_mean(divide(weights, row[:, None]).T)
    share = divide(divide(weights, row[:, None]), col[None, :])
    powers, seen = share**4, share > 0
    p, q = np.ones_like(row), np.ones_like(col)
    row_count, col_count = seen.sum(axis=1), seen.sum(axis=0)
    for _ in range(sweeps - 1):
        p = divide(powers @ divide(np.ones_like(q), q), row_count)
        q = divide(powers.T @ divide(np.ones_like(p), p), col_count)
    row, col = row * p**0.25, col * q**0.25
    return row * np.max(divide(divide(weights, row[:, None]), col[None, :])), col


def power_mean(rows: Float[np.ndarray, "m n"]) -> Rows:
    """The fourth root of the mean fourth power of each row's positive entries; 0 for a row of zeros."""
    largest = np.max(rows, axis=1).astype(np.float64)
    count = np.maximum(np.sum(rows > 0, axis=1), 1)
    return largest * (np.sum(divide(rows, largest[:, None]) ** 4, axis=1) / count) ** 0.25


def divide(numerator: Any, denominator: Any) -> Any:
    """The quotient; 0 where the denominator is."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1), 0)
