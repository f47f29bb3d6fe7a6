"""Matrices as integers of 4 bits, two in a byte, in groups of 64 that share a scale of 16 bits.

A group runs along a row of a table, and along the inputs of a kernel or factor. What rounding takes away of one input
of a kernel can be given to the inputs that are still to come and that occur together with it: dense
kernels of all-MiniLM-L6-v2 lose about a third so of what rounding to the nearest loses (Frantar et al. 2023, GPTQ; in
the form of Chee et al. 2023, QuIP, sec. 3, which inverts nothing).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt
from ml_dtypes import bfloat16

from bert_adapter.layers.integers import GROUP, LOWEST, in_groups
from wlra.tall import BLOCK

HIGHEST = 7
DAMPING = 0.01  # of a Gram matrix's mean diagonal, which is added to it


def steps(array: Float[np.ndarray, "*stack m n"], by_rows: bool) -> tuple[Int[np.ndarray, "*stack m n"], np.ndarray]:
    """Integers in [-8, 7], and the scales of their groups, (m, n / 64) or (m / 64, n), rounded up.

    What they multiply out to has itself for its nearest.

    Example:
      >>> import numpy as np
      >>> from bert_adapter.checkpoint.nibbles import steps
      >>> found, scale = steps(np.array([[8.0], [-3.9], [0.4]], np.float32), by_rows=False)
      >>> found.ravel().tolist(), scale.tolist()
      ([-8, 4, 0], [[-1.0]])
    """
    if by_rows and array.ndim == 2 and len(array) > BLOCK:  # of a table piece by piece: nothing of its size is made
        pieces = [steps(array[begin : begin + BLOCK], by_rows) for begin in range(0, len(array), BLOCK)]
        found, scale = (np.concatenate(each) for each in zip(*pieces, strict=True))
        return found, scale
    lying = np.asarray(array, np.float32) if by_rows else np.swapaxes(np.asarray(array, np.float32), -1, -2)
    groups = in_groups(lying)
    scale = scales(groups.reshape(-1, GROUP)).reshape(groups.shape[:-1])
    found = nearest(groups, scale[..., None]).reshape(*lying.shape[:-1], -1)[..., : lying.shape[-1]].astype(np.int8)
    return (found, scale) if by_rows else (np.swapaxes(found, -1, -2), np.swapaxes(scale, -1, -2))


def scales(groups: Float[np.ndarray, "groups 64"]) -> Float[np.ndarray, " groups"]:
    """At which the largest number of a group is -8 or -7 steps, whichever leaves less of it.

    Of a group that lies on the steps of a scale already, that scale.
    """
    high, low = groups.max(axis=1), groups.min(axis=1)
    end = np.where(high > -low, -high, -low)
    size = np.where(end != 0, np.abs(end), 1)[:, None]
    found, least = np.zeros(len(groups), bfloat16), np.full(len(groups), np.inf, np.float32)
    for count in range(8, 0, -1):
        scale = ((end if count == 8 else np.abs(end)) / np.float32(count)).astype(bfloat16)
        tried = np.arange(len(groups))
        if count < 7:  # such a scale is for what lies on it alone
            first = groups[:, 0]
            tried = np.flatnonzero((first == nearest(first, scale) * scale) & (least > 0))
        some, its = groups[tried], scale[tried, None]
        left = np.sum(((some - nearest(some, its) * its.astype(np.float32)) / size[tried]) ** 2, axis=1)
        better = left < least[tried] if count >= 7 else left == 0
        found[tried[better]], least[tried[better]] = scale[tried[better]], left[better]
    return found


def nearest(numbers: Float[np.ndarray, "..."], scale: Any) -> Float[np.ndarray, "..."]:
    """The steps nearest to them, 0 where the scale is."""
    wide = np.asarray(scale, np.float32)
    found = np.divide(numbers, wide, out=np.zeros_like(numbers), where=wide != 0)
    return np.clip(np.rint(found, out=found), LOWEST, HIGHEST, out=found)


def feedback(gram: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "m m"]:
    """What later inputs are given of the errors of earlier ones: A, strictly upper, of gram = (A + I) D (A + I)'."""
    wide = np.array(gram, np.float64)
    size = float(np.trace(wide)) / len(wide)
    wide[np.diag_indices_from(wide)] += DAMPING * size
    factor = np.linalg.cholesky(wide[::-1, ::-1] / (size or 1))[::-1, ::-1]
    return np.triu((factor / np.diag(factor)).astype(np.float32), 1)


def compensated(array: Float[np.ndarray, "m n"], given: Float[np.ndarray, "m m"]) -> Float[np.ndarray, "m n"]:
    """What a kernel or its left factor is rounded to, where each input is given what `feedback` says.

    `steps` finds it again as it is.
    """
    array, m = np.asarray(array, np.float32), len(array)
    assert given.shape == (m, m)
    found, errors = np.empty_like(array), np.zeros_like(array)
    for begin in range(0, m, GROUP):
        end = min(begin + GROUP, m)
        within, earlier = given[begin:end, begin:end], given[:begin, begin:end].T @ errors[:begin]
        best = array[begin:end] + np.linalg.solve(np.eye(end - begin, dtype=np.float32) + within.T, earlier)
        scale = scales(in_groups(best.T)[:, 0]).astype(np.float32)
        for i in range(begin, end):
            row = array[i] + earlier[i - begin] + given[begin:i, i] @ errors[begin:i]
            found[i] = nearest(row, scale) * scale
            errors[i] = array[i] - found[i]
    return found


def packed(found: Int[np.ndarray, "*stack m n"], by_rows: bool) -> UInt[np.ndarray, "..."]:
    """Two of a group in a byte, the first in its lower half; where there is no second, a zero."""
    lying = found if by_rows else np.swapaxes(found, -1, -2)
    if lying.shape[-1] % 2:
        lying = np.concatenate([lying, np.zeros_like(lying[..., :1])], axis=-1)
    halves = (lying - LOWEST).astype(np.uint8)
    both = halves[..., ::2] | (halves[..., 1::2] << 4)
    return np.ascontiguousarray(both if by_rows else np.swapaxes(both, -1, -2))
