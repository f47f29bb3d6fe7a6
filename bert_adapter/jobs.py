"""Kernels as matrices to be approximated, those of one shape together."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wlra
from bert_adapter.kernels import break_even
from wlra import checks
from wlra.options import Request


class Job(NamedTuple):
    """A kernel as the matrix to be approximated."""

    path: str
    rank: int
    matrix: Any
    weights: Any


def job_for(path: str, rank: int, matrix: Any, weights: Any) -> Job:
    """The matrix and its weights at their full shape; a shape that does not fit is said with the path."""
    try:
        if isinstance(weights, wlra.Kronecker):
            weights = checks.check_kronecker(weights, matrix.shape)
        else:
            weights = checks.check_weights(weights, matrix.shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Job(path, rank, matrix=matrix, weights=weights)


def groups_of(jobs: list[Job], request: Request) -> list[list[Job]]:
    """What one program solves: matrices of one shape and dtype, and of one rank unless the method can mask ranks."""
    together = request.method.keeps_zeros and request.projection == "subspace"
    groups = defaultdict(list)
    for job in jobs:
        groups[job.matrix.shape, None if together else job.rank, str(job.matrix.dtype)].append(job)
    return [group for _, group in sorted(groups.items(), key=lambda item: str(item[0]))]


def solve_group(jobs: list[Job], method: wlra.Method, options: Mapping[str, Any]) -> list[wlra.Result]:
    """Each kernel's solution, on the host, with zeros beyond its rank.

    One compiled program for all ranks.
    """
    ranks = [job.rank for job in jobs]
    # A closed form costs little: at the largest rank there can be, one program serves all plans.
    most = max(ranks) if method.closed_form is None else math.ceil(break_even(jobs[0].matrix.shape)) - 1
    matrices = np.stack([job.matrix for job in jobs])
    weights = jax.tree.map(stacked, *(job.weights for job in jobs))
    batch: dict[str, Any] = {"method": method, "ranks": None if set(ranks) == {most} else ranks}
    try:
        result = jax.device_get(wlra.solve_batch(matrices, weights, most, **batch, **options))
    except ValueError as error:
        raise with_path(error, jobs) from None
    return [jax.tree.map(lambda leaf, i=i: leaf[i], result) for i in range(len(jobs))]


def stacked(*arrays: Any) -> Any:
    """The arrays as one, on the host in their own precision if all of them are."""
    return (np if all(isinstance(array, np.ndarray) for array in arrays) else jnp).stack(arrays)


def with_path(error: ValueError, jobs: list[Job]) -> ValueError:
    """What is wrong with the first kernel whose values the solver cannot use, or else the error itself."""
    for job in jobs:
        check = checks.check_kronecker_values if isinstance(job.weights, wlra.Kronecker) else checks.check_values
        try:
            check(job.matrix, job.weights)
        except ValueError as fault:
            return ValueError(f"{job.path}: {fault}; exclude={re.escape(job.path)!r} keeps it dense")
    return error
