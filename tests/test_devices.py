"""Over several devices, and several processes, results are those of one."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import wlra
from wlra.devices import check_mesh

W, WEIGHTS = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
ROUNDING = 1e-5  # of sums of parts, in float32, after iterations that converge


def begin(devices: int, *arguments: str) -> subprocess.Popen:
    """A process with so many devices that runs a function of tests/several_devices.py."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-W", "error", "-m", "tests.several_devices", *arguments]
    root, pipe = Path(__file__).parent.parent, subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen) -> dict[str, Any]:
    """What the process printed."""
    with process:
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@functools.cache
def four():
    return ended(begin(4, "four"))


@functools.cache
def eight():
    return ended(begin(8, "eight"))


def assert_same(check, product=True):
    assert check["same shapes"]
    assert check["loss"] < ROUNDING
    assert not product or check["product"] < ROUNDING


@pytest.mark.parametrize("name", ["dealt als", "dealt newton", "cut als", "cut anderson"])
def test_four_devices_give_the_result_of_one(name):
    # Anderson's last iterates are as far from the minimum as the root of what the loss can tell.
    assert_same(four()[name], product="anderson" not in name)


def test_devices_with_a_batch_exchange_nothing():
    assert four()["collectives"] == []


def test_batch_that_devices_do_not_divide_comes_back_whole():
    assert_same(four()["dealt six"])


@pytest.mark.parametrize("axis", ["rows", "columns", "no weights"])
def test_matrix_that_devices_do_not_divide_comes_back_whole(axis):
    assert eight()[axis] < ROUNDING


def test_two_processes_give_the_result_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first, second = (begin(2, "two_processes", port, str(i)) for i in range(2))
    with first:
        checks = ended(second)
        assert ended(first) == checks
    assert_same(checks["dealt"])
    assert checks["exact"] < ROUNDING


def test_mesh_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"mesh must be a jax.sharding.Mesh.*got list"):
        check_mesh(jax.devices())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "separable"}, "method='separable'"),
        ({"method": "kronecker"}, "method='kronecker'"),
        ({"projection": "svd"}, "projection='svd'"),
        ({"nuclear": 1.0}, "ridge or nuclear"),
        ({"ridge": 0.1}, "ridge or nuclear"),
        ({"restarts": 2}, "restarts"),
    ],
)
def test_what_needs_the_whole_matrix_is_refused_with_a_mesh(options, name):
    with pytest.raises(ValueError, match=f"{name} needs the whole matrix on one device"):
        wlra.solve(W, None, 1, mesh=jax.make_mesh((1,), ("devices",)), **options)


def test_faults_are_found_before_the_matrix_is_cut():
    mesh = jax.make_mesh((1,), ("devices",))
    with pytest.raises(ValueError, match=r"rank must be in \[1, 3\] for W of shape \(4, 3\); got 4"):
        wlra.solve(W, None, 4, mesh=mesh)
    with pytest.raises(ValueError, match=r"weights must broadcast to \(4, 3\); got shape \(3, 4\)"):
        wlra.solve(W, WEIGHTS.T, 1, mesh=mesh)
    with pytest.raises(ValueError, match=r"start's left must have shape \(4, 1\); got \(3, 1\)"):
        wlra.solve(W, None, 1, mesh=mesh, start=(np.ones((3, 1)), np.ones((1, 3))))
    with pytest.raises(ValueError, match=r"W has 1 NaN or infinite entries .*, the first nan at \(3, 1\)"):
        wlra.solve(np.where(np.arange(12).reshape(4, 3) == 10, np.nan, W), None, 1, mesh=mesh)
