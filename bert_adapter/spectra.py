"""The loss predicted for a kernel at every rank."""

from typing import Any

import numpy as np
from jaxtyping import Float

import wlra
from bert_adapter.importance.sums import BLOCK


def predicted_losses(kernel: Any, weights: Any) -> Float[np.ndarray, " ranks"]:
    """Half the weighted squared error of the best approximation of each rank 0, 1, ..., as far as weights separate."""
    squared = squared_singular_values(np.asarray(kernel, np.float64), weights)
    return np.append(np.cumsum(squared[::-1])[::-1], 0) / 2


def squared_singular_values(kernel: Float[np.ndarray, "m n"], weights: Any) -> Float[np.ndarray, " ranks"]:
    """Of the kernel in coordinates in which its weights, or their separable fit, are equal; the largest first.

    In float64 throughout: what is left beside a large singular value is lost in its square's float32.
    """
    kernel = np.asarray(kernel, np.float64)
    if isinstance(weights, wlra.Kronecker):
        row, col = np.asarray(weights.row, np.float64), np.asarray(weights.col, np.float64)
    elif weights is None:
        row, col = (np.ones(size) for size in kernel.shape)
    else:
        full = np.broadcast_to(np.asarray(weights), kernel.shape)
        row, col = (full.sum(axis=axis, dtype=np.float64) for axis in (1, 0))
        col = col / (col.sum() or 1)
    if kernel.shape[0] > kernel.shape[1]:
        kernel, row, col = kernel.T, col, row
    if row.ndim == 1:
        scaled = np.sqrt(row)[:, None] * kernel * np.sqrt(col)[None, :]
        gram = scaled @ scaled.T
    else:
        half = root(row)
        small = len(col) < 2 * len(row)  # the cheaper order
        gram = congruent(half.T @ kernel, col) if small else half.T @ congruent(kernel, col) @ half
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def root(gram: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "m m"]:
    """root @ root.T is the Gram matrix, to rounding of its diagonal; negative eigenvalues of rounding count as 0."""
    scale = np.sqrt(np.maximum(np.diag(gram), 0))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    unit = gram * inverse[:, None] * inverse[None, :]
    try:
        shift = len(gram) * np.finfo(gram.dtype).eps * np.eye(len(gram), dtype=gram.dtype)
        return scale[:, None] * np.linalg.cholesky(unit + shift)
    except np.linalg.LinAlgError:  # seven times as fast, where it goes
        values, vectors = np.linalg.eigh(unit)
        return scale[:, None] * vectors * np.sqrt(np.maximum(values, 0))


def congruent(kernel: Float[np.ndarray, "m n"], gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "m m"]:
    """kernel @ gram @ kernel.T, from the Gram matrix's upper triangle alone: a third fewer operations."""
    product = np.empty_like(kernel)
    for begin in range(0, len(gram), BLOCK):
        end = begin + BLOCK
        product[:, begin:end] = kernel[:, :begin] @ gram[:begin, begin:end]
        product[:, begin:end] += 0.5 * kernel[:, begin:end] @ gram[begin:end, begin:end]
    half = product @ kernel.T
    return half + half.T
