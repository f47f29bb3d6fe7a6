"""What tests/test_devices.py compares over several devices, and runs itself in two processes that share four."""

import functools
import json
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import wlra

BATCH, M, N, K = 8, 8, 6, 1
TIGHT = {"tol": 1e-6, "max_iters": 100}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(*shape: int) -> np.ndarray:
    *batch, m, n = shape
    return normal(0, *batch, m, K) @ normal(1, *batch, K, n)


W, WEIGHTS = planted(BATCH, M, N) + 0.1 * normal(2, BATCH, M, N), np.exp(normal(3, BATCH, M, N))
TALL = planted(12, 5) + 0.1 * normal(4, 12, 5)


def everywhere(result: wlra.Result) -> wlra.Result:
    """The result as arrays of NumPy, in every process."""
    return multihost_utils.process_allgather(result, tiled=True)


def difference(got: wlra.Result, wanted: wlra.Result) -> dict[str, Any]:
    """How far results are from those wanted: loss and product, relative; and whether the shapes are the same."""
    product, reference = (np.asarray(result.left) @ np.asarray(result.right) for result in (got, wanted))
    return {
        "loss": float(np.max(np.abs(np.asarray(got.loss) / np.asarray(wanted.loss) - 1))),
        "product": float(np.max(np.abs(product - reference)) / np.max(np.abs(reference))),
        "same shapes": jax.tree.map(np.shape, got) == jax.tree.map(np.shape, wanted),
    }


@functools.cache
def alone() -> wlra.Result:
    """A batch on one device."""
    return wlra.solve_batch(W, WEIGHTS, K, method="als", **TIGHT)


def dealt(mesh: Mesh, method: str, count: int = BATCH) -> dict[str, Any]:
    """A batch over the mesh, of so many problems, beside the minima found on one device."""
    got = wlra.solve_batch(W[:count], WEIGHTS[:count], K, method=method, mesh=mesh, **TIGHT)
    return difference(everywhere(got), jax.tree.map(lambda leaf: leaf[:count], alone()))


@functools.cache
def whole() -> wlra.Result:
    """A matrix on one device."""
    return wlra.solve(TALL, np.exp(normal(5, *TALL.shape)), K, method="als", **TIGHT)


def cut(mesh: Mesh, method: str) -> dict[str, Any]:
    """A matrix over the mesh beside the minimum found on one device."""
    got = wlra.solve(TALL, np.exp(normal(5, *TALL.shape)), K, method=method, mesh=mesh, **TIGHT)
    return difference(everywhere(got), whole())


def exact(mesh: Mesh, m: int, n: int, weights: np.ndarray | None) -> float:
    """How far the solution of a matrix of rank K is from the matrix."""
    target, start = planted(m, n), (normal(6, m, K), normal(7, K, n))
    result = everywhere(wlra.solve(target, weights, K, method="als", start=start, mesh=mesh))
    return float(np.max(np.abs(result.left @ result.right - target)) / np.max(np.abs(target)))


def collectives(mesh: Mesh) -> list[str]:
    """The exchanges in the program for a batch over the mesh."""
    solve = jax.jit(functools.partial(wlra.solve_batch, rank=K, method="als", mesh=mesh, **TIGHT))
    text = solve.lower(W, WEIGHTS).compile().as_text() or ""
    return re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text)


def mesh_of(*shape: int) -> Mesh:
    """A mesh of the first devices."""
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], devices=jax.devices()[: int(np.prod(shape))])


def two_processes(port: str, process: str) -> dict[str, Any]:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = mesh_of(4)
    checks = {"dealt": dealt(mesh, "als"), "exact": exact(mesh, 11, 6, None)}
    jax.distributed.shutdown()
    return checks


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))  # noqa: T201
