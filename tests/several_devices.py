"""What tests/test_devices.py runs in processes of their own, since the number of devices is fixed when JAX starts."""

import json
import re
import sys
from functools import partial
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


def dealt(mesh: Mesh, method: str, *counts: int) -> list[dict[str, Any]]:
    """Batches over the mesh, of so many problems, beside the same on one device."""
    solve = partial(wlra.solve_batch, rank=K, method=method, **TIGHT)
    alone = solve(W, WEIGHTS)
    return [
        difference(everywhere(solve(W[:i], WEIGHTS[:i], mesh=mesh)), jax.tree.map(lambda leaf, i=i: leaf[:i], alone))
        for i in counts
    ]


def cut(mesh: Mesh, method: str) -> dict[str, Any]:
    """A matrix over the mesh beside the same on one device."""
    solve = partial(wlra.solve, TALL, np.exp(normal(5, *TALL.shape)), K, method=method, **TIGHT)
    return difference(everywhere(solve(mesh=mesh)), solve())


def exact(mesh: Mesh, m: int, n: int, weights: np.ndarray | None) -> float:
    """How far the solution of a matrix of rank K is from the matrix."""
    target, start = planted(m, n), (normal(6, m, K), normal(7, K, n))
    result = everywhere(wlra.solve(target, weights, K, method="als", start=start, mesh=mesh))
    return float(np.max(np.abs(result.left @ result.right - target)) / np.max(np.abs(target)))


def collectives(mesh: Mesh) -> list[str]:
    """The exchanges in the program for a batch over the mesh."""
    solve = jax.jit(partial(wlra.solve_batch, rank=K, method="als", mesh=mesh, **TIGHT))
    text = solve.lower(W, WEIGHTS).compile().as_text() or ""
    return re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text)


def four() -> dict[str, Any]:
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    eight, six = dealt(mesh, "als", 8, 6)
    return {
        "dealt als": eight,
        "dealt six": six,
        "dealt newton": dealt(mesh, "newton", 8)[0],
        "cut als": cut(mesh, "als"),
        "cut anderson": cut(mesh, "anderson"),
        "collectives": collectives(mesh),
    }


def eight() -> dict[str, Any]:
    mesh = jax.make_mesh((8,), ("devices",))
    return {
        "rows": exact(mesh, 11, 6, np.exp(normal(8, 11, 1))),
        "columns": exact(mesh, 6, 11, np.exp(normal(8, 1, 11))),
        "no weights": exact(mesh, 11, 6, None),
    }


def two_processes(port: str, process: str) -> dict[str, Any]:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = jax.make_mesh((4,), ("devices",))
    checks = {"dealt": dealt(mesh, "als", 8)[0], "exact": exact(mesh, 11, 6, None)}
    jax.distributed.shutdown()
    return checks


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))  # noqa: T201
