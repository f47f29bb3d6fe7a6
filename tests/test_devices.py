"""Over several devices, and several processes, results are those of one."""

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
import several_devices
from contract import cases

import wlra
from wlra.devices import check_mesh, turned_over
from wlra.methods.closed import row_sums

W, WEIGHTS = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
ROUNDING = 1e-5  # of sums of parts, in float32, after iterations that converge


def begin(*arguments: str) -> subprocess.Popen:
    """A process that runs a function of tests/several_devices.py."""
    command = [sys.executable, "-W", "error", "-m", "tests.several_devices", *arguments]
    root, pipe = Path(__file__).parent.parent, subprocess.PIPE
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen) -> dict[str, Any]:
    """What the process printed."""
    with process:
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def four():
    return mesh(2, 2)


@pytest.fixture
def eight():
    return mesh(8)


def mesh(*shape):
    if len(jax.devices()) < np.prod(shape):
        pytest.skip(f"this machine has {len(jax.devices())} devices")
    return several_devices.mesh_of(*shape)


def assert_same(check, product=True):
    assert check["same shapes"]
    assert check["loss"] < ROUNDING
    assert not product or check["product"] < ROUNDING


@pytest.mark.parametrize("method", ["als", pytest.param("newton", marks=pytest.mark.slow)])
def test_a_batch_over_four_devices_has_the_results_of_one(method, four):
    assert_same(several_devices.dealt(four, method))


@pytest.mark.parametrize("method", ["als", pytest.param("anderson", marks=pytest.mark.slow)])
def test_a_matrix_over_four_devices_has_the_result_of_one(method, four):
    # Anderson's last iterates are as far from the minimum as the root of what the loss can tell.
    assert_same(several_devices.cut(four, method), product=method != "anderson")


def test_devices_with_a_batch_exchange_nothing(four):
    assert several_devices.collectives(four) == []


def test_batch_that_devices_do_not_divide_comes_back_whole(four):
    assert_same(several_devices.dealt(four, "als", 6))


SIDES = {
    "rows": (11, 6, np.exp(several_devices.normal(8, 11, 1))),
    "columns": (6, 11, np.exp(several_devices.normal(8, 1, 11))),
    "no weights": (11, 6, None),
}


@pytest.mark.parametrize("side", cases(SIDES, []))
def test_matrix_that_devices_do_not_divide_comes_back_whole(side, eight):
    assert several_devices.exact(eight, *SIDES[side]) < ROUNDING


@pytest.mark.slow
def test_two_processes_give_the_result_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first, second = (begin("two_processes", port, str(i)) for i in range(2))
    with first:
        checks = ended(second)
        assert ended(first) == checks
    assert_same(checks["dealt"])
    assert checks["exact"] < ROUNDING


def test_a_start_that_sums_rows_does_so_of_what_lies_transposed():
    weight = several_devices.normal(9, 4, 3) ** 2
    row, col = turned_over(row_sums)(jax.numpy.asarray(weight.T))
    np.testing.assert_allclose(col, weight.sum(axis=1), rtol=1e-6)
    assert (row == 1).all()


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
