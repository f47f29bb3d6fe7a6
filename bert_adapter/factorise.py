"""Dense kernels become pairs of factors, and back."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import wlra
from bert_adapter.apply import FACTORISED
from bert_adapter.progress import track
from bert_adapter.select import break_even
from wlra import border
from wlra.starts import STARTS


class Row(NamedTuple):
    """What became of one kernel. Losses are relative weighted squared errors, by method; empty if it stays dense."""

    path: str
    shape: tuple[int, int]
    rank: int
    parameters_before: int
    parameters_after: int
    loss: dict[str, float]
    iterations: int
    status: str
    seconds: float
    history: list[float]


def factorise(
    params: Any,
    weights: Mapping[str, Any],
    ranks: Mapping[str, int],
    *,
    method: str = "anderson",
    progress: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], list[Row]]:
    """The parameters with 'kernel' (in, out) replaced by 'left' (in, k) and 'right' (k, out) where `ranks` says so.

    Biases and all else are untouched, and the factors have the kernel's dtype. Kernels of one shape and rank are solved
    together: one transfer to the device, one batch, one transfer back. A rank at or above break-even, mn / (m + n),
    leaves its kernel dense.

    Args:
      params: nested dicts, with the kernels under `path + "/kernel"`.
      weights: by path, as `wlra.solve` takes them: None, an array, or `wlra.Kronecker`.
      ranks: by path.
      method: as `wlra.solve` takes it, and `options` likewise (tol, max_iters, ...).

    Returns:
      The parameters, and a row of the report for each path, in the order of `ranks`.
    """
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    groups = defaultdict(list)
    rows: dict[str, Row] = {}
    full: dict[str, Any] = {}
    for path, rank in ranks.items():
        kernel = flat[f"{path}/kernel"]
        shape = tuple(kernel.shape)
        if rank < break_even(shape):
            groups[shape, rank, str(kernel.dtype)].append(path)
            full[path] = checked_weights(path, kernel, weights[path])
        else:
            rows[path] = Row(path, shape, rank, size(shape), size(shape), {}, 0, "DENSE", 0.0, [])
    for (shape, rank, _), paths in track(sorted(groups.items()), "factorise", progress):
        kernels = np.stack([np.asarray(flat[f"{path}/kernel"]) for path in paths])
        began = time.perf_counter()
        result, losses = solve_group(kernels, [full[path] for path in paths], rank, method, options)
        seconds = (time.perf_counter() - began) / len(paths)
        for i, path in enumerate(paths):
            del flat[f"{path}/kernel"]
            flat |= {f"{path}/kernel": FACTORISED, f"{path}/left": result.left[i], f"{path}/right": result.right[i]}
            rows[path] = Row(
                path,
                shape,
                rank,
                size(shape),
                rank * sum(shape),
                {name: float(loss[i]) for name, loss in losses.items()},
                int(result.iterations[i]),
                wlra.Status(int(result.status[i])).name,
                seconds,
                [float(value) for value in result.history.loss[i][: result.iterations[i] + 1]],
            )
    return unflatten_dict(flat, sep="/"), [rows[path] for path in ranks]


def solve_group(
    kernels: np.ndarray, weights: list[Any], rank: int, method: str, options: dict[str, Any]
) -> tuple[wlra.Result, dict[str, np.ndarray]]:
    """The solutions of kernels of one shape, on the host, and their losses by method, closed forms first.

    On a CPU one at a time, since a batch runs until its slowest member is done; elsewhere all at once.
    """
    chunk = 1 if jax.default_backend() == "cpu" else None
    target = jnp.asarray(kernels)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)
    others = [name for name in STARTS if name != method and method != "kronecker"]
    solved = {name: wlra.solve_batch(target, stacked, rank, method=name, chunk=chunk).loss for name in others}
    result = wlra.solve_batch(target, stacked, rank, method=method, chunk=chunk, **options)
    solved[method] = result.loss
    result, losses = jax.device_get((result, list(solved.values())))
    return result, dict(zip(solved, losses, strict=True))


def checked_weights(path: str, kernel: Any, weights: Any) -> Any:
    """The kernel's weights at their full shape; what is wrong with them is said with the path."""
    try:
        if isinstance(weights, wlra.Kronecker):
            border.check_kronecker_values(jnp.asarray(kernel), weights)
            return weights
        weights = border.check_weights(weights, kernel.shape)
        border.check_values(jnp.asarray(kernel), weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return weights


def merge(params: Any) -> dict[str, Any]:
    """The parameters with every pair of factors multiplied out into the kernel that it stands for."""
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for path in [path.removesuffix("/left") for path in flat if path.endswith("/left")]:
        left, right = flat.pop(f"{path}/left"), flat.pop(f"{path}/right")
        dtype = np.float64 if left.dtype == np.float64 else np.float32
        product = np.asarray(left, dtype) @ np.asarray(right, dtype)
        flat[f"{path}/kernel"] = jnp.asarray(product).astype(left.dtype)
    return unflatten_dict(flat, sep="/")


def size(shape: tuple[int, int]) -> int:
    """How many numbers a dense kernel holds."""
    return shape[0] * shape[1]
