"""What others offer: the published iterations in NumPy, as simple as they are, and packages that may be missing.

An iteration is a generator of products, the start first, zero or the best for equal weights. Dtypes are as given, and
every step has a full LAPACK SVD.
A package is a function of the problem that returns factors, and raises ImportError where it is not installed.
"""

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Course(NamedTuple):
    """The loss of every iterate, the start first, and the seconds until it was there, start included."""

    loss: np.ndarray
    seconds: np.ndarray

    def until(self, loss: float) -> float | None:
        """The seconds until the loss was at most this one; None if never."""
        reached = np.flatnonzero(self.loss <= loss)
        return float(self.seconds[reached[0]]) if len(reached) else None


def course(iterates: Iterator[np.ndarray], W: np.ndarray, weights: np.ndarray, steps: int, cap: float) -> Course:
    """So many iterations, or as many as the seconds allow; evaluating the loss is not counted."""
    losses, seconds, spent = [], [], 0.0
    for _ in range(steps + 1):
        began = time.perf_counter()
        product = next(iterates, None)
        if product is None:
            break
        spent += time.perf_counter() - began
        losses.append(relative_loss(W, weights, product))
        seconds.append(spent)
        if spent > cap:
            break
    return Course(np.array(losses), np.array(seconds))


def relative_loss(W: np.ndarray, weights: np.ndarray, product: np.ndarray) -> float:
    """sum weights (W - product)**2 / sum weights W**2, in float64."""
    W, weights, product = (np.asarray(array, np.float64) for array in (W, weights, product))
    return float(np.sum(weights * (W - product) ** 2) / np.sum(weights * W**2))


def low_rank(matrix: np.ndarray, k: int) -> np.ndarray:
    """The best approximation of rank k for equal weights (Eckart & Young 1936)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vt[:k]


def complete(W: np.ndarray, weights: np.ndarray, X: np.ndarray) -> np.ndarray:
    """The target where its weight is 1, X where it is 0, and their mean between."""
    return X + weights * (W - X)


def em(W: np.ndarray, weights: np.ndarray, k: int, zero: bool = False) -> Iterator[np.ndarray]:
    """Srebro & Jaakkola 2003, sec. 3, with the weights over their maximum."""
    weights = weights / weights.max()
    X = np.zeros_like(W) if zero else low_rank(W, k)
    while True:
        yield X
        X = low_rank(complete(W, weights, X), k)


def nesterov(W: np.ndarray, weights: np.ndarray, k: int, zero: bool = False) -> Iterator[np.ndarray]:
    """Tuzhilina & Hastie 2021, sec. 3.1: the map of X + (t - 1) / (t + 2) (X - previous X), t = 1, 2, ..."""
    weights = weights / weights.max()
    X = before = np.zeros_like(W) if zero else low_rank(W, k)
    for t in itertools.count(1):
        yield X
        ahead = X + W.dtype.type((t - 1) / (t + 2)) * (X - before)
        before, X = X, low_rank(complete(W, weights, ahead), k)


def anderson(W: np.ndarray, weights: np.ndarray, k: int, zero: bool = False, depth: int = 3) -> Iterator[np.ndarray]:
    """Tuzhilina & Hastie 2021, sec. 3.2: the best of the combinations of the last completed matrices, unguarded.

    Coefficients are theta / sum(theta), (R R') theta = 1 for the residuals R, each a completed matrix less the
    combination before. Ends where that system is singular, as theirs does.
    """
    weights = weights / weights.max()
    X, mixed = np.zeros_like(W) if zero else low_rank(W, k), np.zeros_like(W)
    completed: list[np.ndarray] = []
    residuals: list[np.ndarray] = []
    while True:
        yield X
        completed = [*completed, complete(W, weights, X)][-depth - 1 :]
        residuals = [*residuals, (completed[-1] - mixed).ravel()][-depth - 1 :]
        R = np.array(residuals)
        try:
            theta = np.linalg.solve(R @ R.T, np.ones(len(R), W.dtype))
        except np.linalg.LinAlgError:
            return
        mixed = np.tensordot(theta / theta.sum(), np.array(completed), 1)
        if not np.isfinite(mixed).all():
            return
        X = low_rank(mixed, k)


PUBLISHED: dict[str, Callable[..., Iterator[np.ndarray]]] = {
    "em, NumPy, published": em,
    "nesterov, NumPy, published": nesterov,
    "anderson, NumPy, published": anderson,
}

Pair = tuple[np.ndarray, np.ndarray]


def fwsvd(W: np.ndarray, weights: np.ndarray, k: int) -> Pair:
    """Hsu et al. 2022: one SVD with each row scaled by the root of its weights' sum."""
    scale = np.sqrt(weights.sum(1, keepdims=True))
    u, s, vt = np.linalg.svd(scale * W, full_matrices=False)
    return u[:, :k] * s[:k] / np.where(scale > 0, scale, np.inf), vt[:k]


def separable_scales(weights: np.ndarray, sweeps: int = 8) -> Pair:
    """Row and column scales that equalise the 4-norms of the weights' rows and columns (Sinkhorn's iteration)."""
    scaled, col = np.sqrt(weights / weights.max()), np.ones_like(weights[:1])
    for _ in range(sweeps):
        row = np.maximum(np.mean((scaled / col) ** 8, axis=1, keepdims=True) ** 0.125, np.finfo(scaled.dtype).tiny)
        col = np.maximum(np.mean((scaled / row) ** 8, axis=0, keepdims=True) ** 0.125, np.finfo(scaled.dtype).tiny)
    return row, col


def randomized_svd(W: np.ndarray, weights: np.ndarray, k: int, seed: int = 0) -> Pair:
    """scikit-learn's randomized SVD of the matrix in separable scales."""
    from sklearn.utils.extmath import randomized_svd

    row, col = separable_scales(weights)
    u, s, vt = randomized_svd(row * W * col, k, random_state=seed)
    return u * s / row, vt / col


def wv(W: np.ndarray, weights: np.ndarray, k: int, sweeps: int, seed: int = 1) -> Pair:
    """wv.lower_rank: alternating least squares from a random start. It prints, and seeds NumPy's generator."""
    from wv import lower_rank  # pyright: ignore[reportMissingImports]

    state = np.random.get_state()  # noqa: NPY002
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = lower_rank(W, weights, niter=sweeps, nvec=k, randseed=seed)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    left, right = model.coeff.copy(), model.eigvec
    # Its last step takes the basis for orthonormal in rows whose weights are all equal; it is not.
    for i in np.flatnonzero((weights == weights[:, :1]).all(axis=1)):
        left[i] = np.linalg.lstsq(right.T, W[i], rcond=None)[0]
    return left, right


def cmfrec(W: np.ndarray, weights: np.ndarray, k: int, sweeps: int, seed: int = 1) -> Pair:
    """cmfrec.CMF with all that makes it another problem switched off: alternating least squares by Cholesky."""
    from cmfrec import CMF  # pyright: ignore[reportMissingImports]

    bare = {"user_bias": False, "item_bias": False, "center": False, "precompute_for_predictions": False}
    single = W.dtype == np.float32
    how = {"method": "als", "use_cg": False, "use_float": single, "nthreads": 1, "verbose": False}
    model = CMF(k=k, lambda_=0.0, niter=sweeps, random_state=seed, **bare, **how)
    # Entries of weight 0 are missing ones to it.
    model.fit(X=np.where(weights > 0, W, np.nan), W=weights)
    return model.A_, model.B_.T


PACKAGES: dict[str, Callable[..., Pair]] = {"wv": wv, "cmfrec": cmfrec}
