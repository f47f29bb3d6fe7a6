"""Dense kernels become pairs of factors, and back."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import wlra
from bert_adapter.checkpoint.names import heads_of
from bert_adapter.head_sizes import whole_sizes, widened
from bert_adapter.jobs import Job, groups_of, job_for, solve_group
from bert_adapter.kernels import Shapes, break_even, shape_of_kernel, split_axes
from bert_adapter.layers.marker import FACTORISED, Factorised
from bert_adapter.layers.places import kernel_path, layer_path
from bert_adapter.layers.stacks import check_whole_stacks, restacked, unstacked
from bert_adapter.model import Model
from bert_adapter.progress import track
from wlra.components import Decomposed, cut, lost
from wlra.options import Request, check_options


class KernelReport(NamedTuple):
    """What became of one kernel.

    loss: relative weighted squared errors, of the closed form that the method begins with and of the method; empty if
      the kernel stays dense.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"head": {"kernel": np.diag(np.arange(9.0, 1, -1))}}
      >>> _, (kernel,) = bert_adapter.factorise(params, {"head": None}, {"head": 2}, method="svd")
      >>> kernel.path, kernel.shape, kernel.rank, kernel.parameters_before, kernel.parameters_after
      ('head', (8, 8), 2, 64, 32)
    """

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
    shapes: Shapes | None = None,
    method: str | wlra.Method | None = None,
    solver: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[KernelReport]]:
    """The parameters with 'kernel' (in, out) replaced by 'left' (in, k) and 'right' (k, out) where `ranks` says so.

    So are tables, 'embedding' (vocabulary, width).

    Biases and all else are untouched, and the factors have the kernel's dtype. Kernels of one shape are solved
    together: one transfer to the device, one batch, one transfer back. A rank at or above break-even, mn / (m + n),
    leaves its kernel dense.

    Args:
      params: nested dicts, with the kernels under `path + "/kernel"`, and tables under `path + "/embedding"`.
      weights: by path, as `wlra.solve` takes them: None, an array, or `wlra.Kronecker`. Or the components that
        `decompose` found, which are cut.
      ranks: by path.
      shapes: by path, the matrices (m, n) that the kernels are, as `select_kernels` returns them; needed for kernels
        with more than two axes, whose factors keep them: 'left' (*in, k) and 'right' (k, *out).
      method: as `wlra.solve` takes it; by default the one that fits the weights, "kronecker" for `wlra.Kronecker`,
        "svd" where there are none, and else "anderson".
      solver: other options of `wlra.solve_batch` (tol, max_iters, ...).

    Returns:
      The parameters, and a report for each path, in the order of `ranks`.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"layer": {"kernel": np.outer(np.arange(1.0, 7), np.ones(4)), "bias": np.zeros(4)}}
      >>> small, reports = bert_adapter.factorise(params, {"layer": None}, {"layer": 1}, method="svd")
      >>> small["layer"]["left"].shape, small["layer"]["right"].shape, reports[0].loss["svd"] < 1e-6
      ((6, 1), (1, 4), True)
    """
    request = check_options(method_for(weights, ranks) if method is None else method, **(solver or {}))
    check_components(weights, request)
    flat: dict[str, Any] = dict(flatten_dict(unstacked(params, ranks), keep_empty_nodes=True, sep="/"))
    check_whole_stacks(ranks, filter(None, map(layer_path, flat)), "ranks")
    jobs, reports = [], {}
    for path, rank in ranks.items():
        place = kernel_path(flat, path)
        kernel = flat[place]
        shape = shape_of_kernel(path, kernel, shapes)
        if rank < break_even(shape) and isinstance(weights[path], Decomposed):
            flat |= factors_of(path, shape, *cut(weights[path], rank), kernel=kernel, place=place)
            reports[path] = report_of_cut(path, rank, shape, loss={request.method.name: lost(weights[path], rank)})
        elif rank < break_even(shape):
            jobs.append(job_for(path, rank, kernel.reshape(shape), weights[path]))
        else:
            reports[path] = dense_report(path, rank, shape)
    for group in track(groups_of(jobs, request), "factorise", progress):
        began = time.perf_counter()
        results = solve_group(group, request.method, solver or {})
        seconds = (time.perf_counter() - began) / len(group)
        for job, result in zip(group, results, strict=True):
            left, right = result.left[:, : job.rank], result.right[: job.rank]
            place = kernel_path(flat, job.path)
            flat |= factors_of(job.path, job.matrix.shape, left, right, kernel=flat[place], place=place)
            reports[job.path] = report_of(job, result, request)._replace(seconds=seconds)
    return restacked(unflatten_dict(flat, sep="/")), [reports[path] for path in ranks]


def method_for(weights: Mapping[str, Any], paths: Iterable[str]) -> str:
    """The name of the method that fits the weights of all these kernels."""
    kinds = {type(weights[path]) for path in paths} - {Decomposed}
    if wlra.Kronecker in kinds and len(kinds) > 1:
        raise ValueError("weights: got wlra.Kronecker for some kernels and others for the rest: factorise them in turn")
    return "kronecker" if wlra.Kronecker in kinds else "anderson" if kinds - {type(None)} else "svd"


def check_components(weights: Mapping[str, Any], request: Request) -> None:
    """A ValueError for components where the method is none that cuts them, or for squares without components."""
    for path, known in weights.items():
        if isinstance(known, Decomposed) and (known.left is None or request.method.closed_form is None):
            what = "squares alone" if known.left is None else "components"
            raise ValueError(f"{path}: got {what} for method {request.method.name!r}, wanted weights")


def factors_of(path: str, shape: tuple[int, int], left: Any, right: Any, *, kernel: Any, place: str) -> dict[str, Any]:
    """By path, what stands in the place of a kernel or table."""
    inputs, outputs = split_axes(path, kernel.shape, shape)
    return {
        f"{path}/left": left.reshape(*inputs, -1).astype(kernel.dtype),
        f"{path}/right": right.reshape(-1, *outputs).astype(kernel.dtype),
        place: FACTORISED,
    }


def report_of(job: Job, result: wlra.Result, request: Request) -> KernelReport:
    """What the solver says of a kernel; the seconds are still to come."""
    history = [float(value) for value in result.history.loss[: result.iterations + 1]]
    method, start = request.method, request.start
    name = start.name if isinstance(start, wlra.Method) else "start"
    before = {name: history[0]} if method.closed_form is None else {}
    return KernelReport(
        path=job.path,
        shape=job.matrix.shape,
        rank=job.rank,
        parameters_before=math.prod(job.matrix.shape),
        parameters_after=job.rank * sum(job.matrix.shape),
        loss=before | {method.name: float(result.loss)},
        iterations=int(result.iterations),
        status=wlra.Status(int(result.status)).name,
        seconds=0.0,
        history=history,
    )


def report_of_cut(path: str, rank: int, shape: tuple[int, int], loss: dict[str, float]) -> KernelReport:
    """What the decomposition says of a kernel, which took its time before."""
    return dense_report(path, rank, shape)._replace(
        parameters_after=rank * sum(shape), loss=loss, status=wlra.Status.CONVERGED.name, history=list(loss.values())
    )


def dense_report(path: str, rank: int, shape: tuple[int, int]) -> KernelReport:
    """Of a kernel that stays dense: no work was done."""
    size = math.prod(shape)
    return KernelReport(
        path=path,
        shape=shape,
        rank=rank,
        parameters_before=size,
        parameters_after=size,
        loss={},
        iterations=0,
        status="DENSE",
        seconds=0.0,
        history=[],
    )


def merge(params: Any) -> Any:
    """The parameters with every pair of factors multiplied out into the kernel, or table, that it stands for.

    Of a `Model`, the model with such parameters, and with heads of as many dimensions as the hidden size gives them,
    which is saved as any dense one is.

    Example:
      >>> import numpy as np, bert_adapter
      >>> factors = {"left": np.ones((3, 1), "f4"), "right": np.ones((1, 2, 4), "f4")}
      >>> bert_adapter.merge({"layer": factors})["layer"]["kernel"].shape
      (3, 2, 4)
    """
    if isinstance(params, Model):
        config = {name: value for name, value in params.config.items() if name != "low_rank"}
        dense = params._replace(params=merge(params.params), config=config)
        return widened(dense, whole_sizes(dense)) if heads_of(params.config) else dense
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for path in [path.removesuffix("/left") for path in flat if path.endswith("/left")]:
        left, right = flat.pop(f"{path}/left"), flat.pop(f"{path}/right")
        dtype, place = np.float64 if left.dtype == np.float64 else np.float32, kernel_path(flat, path)
        marker = flat.get(place)
        stack = left.shape[: marker.stacked] if isinstance(marker, Factorised) else ()
        pairs = [(np.asarray(left[index], dtype), np.asarray(right[index], dtype)) for index in np.ndindex(*stack)]
        product = np.stack([np.tensordot(*pair, axes=1) for pair in pairs])
        flat[place] = product.reshape(*stack, *product.shape[1:]).astype(left.dtype)
    return unflatten_dict(flat, sep="/")
