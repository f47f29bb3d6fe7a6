"""The benchmark for a GPU runs, on whatever device there is; profiles name what takes the time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.operations import profiled

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable}


@pytest.mark.slow
def test_the_gpu_benchmark_writes_one_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "kernels.json"
    command = [SCRIPT, file, "--quick", "--runs", "1", "--longest", "60"]
    done = subprocess.run(command, env=ENVIRONMENT | {"WLRA_GPU_OPTIONAL": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = json.loads(file.read_text())
    assert [(part["kernels"], part["shape"]) for part in line["shapes"]] == [
        (8, [24, 24]),
        (2, [24, 48]),
        (2, [48, 24]),
    ]
    for part in line["shapes"]:
        assert 1 <= part["iterations"] <= 60
        assert 0 <= part["worst_gap"] <= 1.001e-3
    work = sum(6 * p["kernels"] * np.prod(p["shape"]) * 8 * p["iterations"] for p in line["shapes"])
    assert line["tflops"] == pytest.approx(work / line["seconds"] / 1e12)
    assert line["svds_over_seconds"] == pytest.approx(line["svd_seconds"] / line["seconds"])
    assert "bar: seconds for all kernels at most 1:" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([SCRIPT, tmp_path / "file"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "jax must see a GPU; it sees: cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_operations_are_those_that_a_call_spends_its_time_in():
    square = np.cov(np.random.default_rng(0).normal(size=(200, 400)))
    wave = jax.jit(lambda x: jnp.sin(x) @ x)

    def call():
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            np.linalg.eigh(square)
        return wave(jnp.ones((50, 50)))

    found = profiled(call)
    assert any(name.endswith(" eigh") for name in found["host"])
    assert sum(found["XLA"].values()) > 0
