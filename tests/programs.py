"""How long each module of tests takes and how many programs it compiles: `pytest --programs` prints the table.

A program is whatever JAX compiles, single operations too; the large ones take more than a tenth of a second. Those of
processes that a test begins are not counted.
"""

import time
from collections import Counter

import jax
import pytest

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_make_collect_report",
    "pytest_runtest_protocol",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]
COLUMNS = ("tests", "seconds", "compiling", "programs", "large", "from the cache")
costs: dict[str, Counter] = {}  # of each module, by column
now = [""]  # the module whose test runs


def pytest_addoption(parser):
    parser.addoption("--programs", action="store_true", help="print seconds and compiled programs of each module")


def pytest_configure(config):
    if config.getoption("--programs"):
        jax.monitoring.register_event_duration_secs_listener(count_program)
        jax.monitoring.register_event_listener(count_hit)


def add(module, **amounts):
    costs.setdefault(module, Counter()).update(amounts)


def count_program(event, duration, **unused):
    if event == "/jax/core/compile/backend_compile_duration":
        add(now[0], compiling=duration, programs=1, large=int(duration > 0.1))


def count_hit(event, **unused):
    if event == "/jax/compilation_cache/cache_hits":
        add(now[0], **{"from the cache": 1})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    now[0], begun = item.path.stem, time.perf_counter()
    done = yield
    add(now[0], tests=1, seconds=time.perf_counter() - begun)
    return done


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    now[0], begun = "(collection)", time.perf_counter()
    report = yield
    add(now[0], seconds=time.perf_counter() - begun)
    return report


def pytest_sessionfinish(session):
    """A worker hands its counts to the process that began it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["costs"] = {module: dict(cost) for module, cost in costs.items()}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    for module, cost in getattr(node, "workeroutput", {}).get("costs", {}).items():
        add(module, **cost)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--programs"):
        return
    total = sum(costs.values(), Counter())
    rows = [*sorted(costs.items(), key=lambda row: -row[1]["seconds"]), ("all", total)]
    terminalreporter.write_line(" | ".join(["| module", *COLUMNS]) + " |")
    terminalreporter.write_line("|---" + "|---:" * len(COLUMNS) + "|")
    for module, cost in rows:
        terminalreporter.write_line(" | ".join([f"| {module}", *(f"{cost[name]:.0f}" for name in COLUMNS)]) + " |")
