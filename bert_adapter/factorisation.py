"""Dense kernels become pairs of factors, and back."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import wlra
from bert_adapter.importance.sums import Basis
from bert_adapter.kernels import break_even
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.progress import track
from bert_adapter.signals.signal import Rotated
from wlra import checks
from wlra.methods import METHODS, SWEEPS
from wlra.methods.closed import STARTS


class Row(NamedTuple):
    """What became of one kernel. Losses are relative weighted squared errors, of the closed form that the method begins
    with and of the method; empty if it stays dense."""

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

    Biases and all else are untouched, and the factors have the kernel's dtype. Kernels of one shape are solved
    together: one transfer to the device, one batch, one transfer back. A rank at or above break-even, mn / (m + n),
    leaves its kernel dense.

    Args:
      params: nested dicts, with the kernels under `path + "/kernel"`.
      weights: by path, as `wlra.solve` takes them: None, an array, or `wlra.Kronecker`; or `Rotated`, in whose
        coordinates the kernel is then factorised.
      ranks: by path.
      method: as `wlra.solve` takes it, and `options` likewise (tol, max_iters, ...).

    Returns:
      The parameters, and a row of the report for each path, in the order of `ranks`.
    """
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    groups = defaultdict(list)
    rows: dict[str, Row] = {}
    full: dict[str, Any] = {}
    bases: dict[str, Basis] = {}
    together = method in (*SWEEPS, *STARTS, "kronecker") and options.get("projection", "subspace") == "subspace"
    for path, rank in ranks.items():
        kernel = flat[f"{path}/kernel"]
        shape = tuple(kernel.shape)
        if rank < break_even(shape):
            chosen = weights[path]
            if isinstance(chosen, Rotated):
                chosen, bases[path] = chosen
                kernel = rotate(kernel, bases[path])
            groups[shape, None if together else rank, str(kernel.dtype)].append(path)
            full[path] = kernel, checked_weights(path, kernel, chosen)
        else:
            rows[path] = Row(path, shape, rank, size(shape), size(shape), {}, 0, "DENSE", 0.0, [])
    for (shape, *_), paths in track(sorted(groups.items(), key=str), "factorise", progress):
        kernels, group = zip(*(full.pop(path) for path in paths), strict=True)
        began = time.perf_counter()
        result = solve_group(np.stack(kernels), list(group), [ranks[path] for path in paths], method, options)
        seconds = (time.perf_counter() - began) / len(paths)
        for i, path in enumerate(paths):
            left, right = result.left[i][:, : ranks[path]], result.right[i][: ranks[path]]
            if path in bases:
                left, right = rotate_back(left, right, bases[path])
            dtype = flat[f"{path}/kernel"].dtype
            flat |= {f"{path}/left": left.astype(dtype), f"{path}/right": right.astype(dtype)}
            flat[f"{path}/kernel"] = FACTORISED
            history = [float(value) for value in result.history.loss[i][: result.iterations[i] + 1]]
            losses = {options.get("start", "separable"): history[0]} if method in METHODS else {}
            rows[path] = Row(
                path,
                shape,
                ranks[path],
                size(shape),
                ranks[path] * sum(shape),
                losses | {method: float(result.loss[i])},
                int(result.iterations[i]),
                wlra.Status(int(result.status[i])).name,
                seconds,
                history,
            )
    return unflatten_dict(flat, sep="/"), [rows[path] for path in ranks]


def rotate(kernel: Any, basis: Basis) -> np.ndarray:
    """The kernel's coordinates, in float32."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(basis.inputs.T @ jnp.asarray(kernel, jnp.float32) @ basis.outputs)


def rotate_back(left: Any, right: Any, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the kernel from factors of its coordinates."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(basis.inputs @ left), np.asarray(right @ basis.outputs.T)


def solve_group(
    kernels: np.ndarray, weights: list[Any], ranks: list[int], method: str, options: dict[str, Any]
) -> wlra.Result:
    """The solutions of kernels of one shape, on the host, with zeros beyond each one's rank.

    One compiled program for all ranks. On a CPU one at a time, since a batch runs until its slowest member is done;
    elsewhere all at once.
    """
    chunk = 1 if jax.default_backend() == "cpu" else None
    closed = method in (*STARTS, "kronecker")  # at little cost, one program for all plans
    most = math.ceil(break_even(kernels.shape[1:])) - 1 if closed else max(ranks)
    own = None if set(ranks) == {most} else ranks
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)
    result = wlra.solve_batch(jnp.asarray(kernels), stacked, most, method=method, ranks=own, chunk=chunk, **options)
    return jax.device_get(result)


def checked_weights(path: str, kernel: Any, weights: Any) -> Any:
    """The kernel's weights at their full shape; what is wrong with them is said with the path."""
    try:
        if isinstance(weights, wlra.Kronecker):
            checks.check_kronecker_values(jnp.asarray(kernel), weights)
            return weights
        weights = checks.check_weights(weights, kernel.shape)
        checks.check_values(jnp.asarray(kernel), weights)
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
