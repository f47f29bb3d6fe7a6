"""The coefficients of given components, row by row: weighted least squares on the host, in float64."""

import numpy as np
from jaxtyping import Float

CHUNK = 2**22  # numbers that the matrices of a chunk of rows may take: 32 MiB
EASY = 1e-6  # the least eigenvalue of a Gram matrix over the largest from which its inverse has ten right digits


def coefficients(
    target: Float[np.ndarray, "m n"], weight: Float[np.ndarray, "m n"], components: Float[np.ndarray, "k n"]
) -> Float[np.ndarray, "m k"]:
    """Row i is the shortest z that minimises sum_j weight_ij (target_ij - (z @ components)_j)**2.

    Where weight is 0, target is not looked at. Rows with Gram matrices that are far from singular come from those, the
    others from reflections. `wlra.methods.sweeps.best_left` computes the same where only one z does.
    """
    m, n = target.shape
    k = len(components)
    weight = at_least_double(weight)
    largest = np.max(weight, axis=1, keepdims=True)
    positive = weight > 0
    weight = (weight / np.where(largest > 0, largest, 1)).astype(np.float64)
    weight = np.where(positive, np.maximum(weight, np.finfo(np.float64).tiny), 0)
    target = np.where(positive, target, 0)
    result = np.empty((m, k))
    step = max(1, CHUNK // (k * max(n, k)))
    for start in range(0, m, step):
        rows = slice(start, start + step)
        result[rows] = of_chunk(target[rows], weight[rows], components)
    return result


def at_least_double(array: np.ndarray) -> np.ndarray:
    """The array in float64, or in more."""
    return array if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.astype(np.float64)


def of_chunk(
    target: Float[np.ndarray, "m n"], weight: Float[np.ndarray, "m n"], components: Float[np.ndarray, "k n"]
) -> Float[np.ndarray, "m k"]:
    """The same of a few rows, whose largest weights are 1 or 0."""
    k, n = components.shape
    gram = (weight @ (components[:, None] * components[None]).reshape(k * k, n).T).reshape(-1, k, k)
    sizes, vectors = np.linalg.eigh(gram)
    easy = sizes[:, 0] > EASY * sizes[:, -1]
    along = np.einsum("mij,mi->mj", vectors, (weight * target) @ components.T)
    result = np.einsum("mij,mj->mi", vectors, along / np.where(easy[:, None], sizes, 1))
    if not easy.all():
        hard = ~easy
        result[hard] = by_reflections(target[hard], weight[hard], components)
    return result


def by_reflections(
    target: Float[np.ndarray, "m n"], weight: Float[np.ndarray, "m n"], components: Float[np.ndarray, "k n"]
) -> Float[np.ndarray, "m k"]:
    """The same, right in every digit that float64 has for weights any number of decades apart.

    Householder's QR with the entries in order of their weight and with column pivoting, whose errors are small relative
    to each entry, not to the heaviest (Powell & Reid 1969; Cox & Higham 1998). Triangular rows below rounding errors of
    the entries that are left end it. The rows found, each over its own size, have the shortest solution by a second QR.
    """
    order = np.argsort(-weight, axis=1, kind="stable")
    roots = np.sqrt(np.take_along_axis(weight, order, axis=1))
    matrix = components.T[order] * roots[:, :, None]  # (m, n, k)
    right = np.take_along_axis(target, order, axis=1) * roots
    noise = matrix.shape[2] * 8 * np.finfo(np.float64).eps * np.max(np.abs(matrix), axis=2)
    count, k = len(target), len(components)
    columns = np.tile(np.arange(k), (count, 1))
    upper, image = np.zeros((count, k, k)), np.zeros((count, k))
    alive = np.ones(count, bool)
    for step in range(min(k, matrix.shape[1])):
        swap(matrix, upper, columns, step)
        alive &= (np.abs(matrix[:, step:, step]) > noise[:, step:]).any(axis=1)
        reflect(matrix, right, step)
        size = np.where(alive, matrix[:, step, step], 1)
        upper[:, step] = np.where(alive[:, None], matrix[:, step] / size[:, None], 0)
        upper[:, step, :step] = 0
        image[:, step] = np.where(alive, right[:, step] / size, 0)
    basis, lower = np.linalg.qr(np.swapaxes(upper, 1, 2))
    dead = ~np.any(upper, axis=2)
    lower = lower + np.where(dead[:, :, None], np.eye(k), 0)
    found = np.einsum("mij,mj->mi", basis, np.linalg.solve(np.swapaxes(lower, 1, 2), image[:, :, None])[:, :, 0])
    result = np.empty_like(found)
    np.put_along_axis(result, columns, found, axis=1)
    return result


def swap(matrix: Float[np.ndarray, "m n k"], upper: Float[np.ndarray, "m k k"], columns: np.ndarray, step: int) -> None:
    """Brings the column that is largest below the step to its place."""
    pivot = step + np.argmax(np.sum(matrix[:, step:, step:] ** 2, axis=1), axis=1)
    rows = np.arange(len(matrix))
    for array in (matrix, upper):
        first, chosen = array[:, :, step].copy(), array[rows, :, pivot]
        array[:, :, step], array[rows, :, pivot] = chosen, first
    columns[rows, pivot], columns[:, step] = columns[:, step].copy(), columns[rows, pivot]


def reflect(matrix: Float[np.ndarray, "m n k"], right: Float[np.ndarray, "m n"], step: int) -> None:
    """Turns the step's column into a multiple of the first axis, and all to the right of it and the target with it."""
    column = matrix[:, step:, step].copy()
    scale = np.max(np.abs(column), axis=1)
    column /= np.where(scale > 0, scale, 1)[:, None]
    norm = np.linalg.norm(column, axis=1)
    column[:, 0] += np.where(column[:, 0] < 0, -norm, norm)
    square = np.sum(column**2, axis=1)
    column *= np.sqrt(2 / np.where(square > 0, square, 1))[:, None]
    matrix[:, step:, step:] -= column[:, :, None] * np.einsum("mi,mij->mj", column, matrix[:, step:, step:])[:, None]
    right[:, step:] -= column * np.sum(column * right[:, step:], axis=1)[:, None]
