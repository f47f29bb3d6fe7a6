"""Weighted low-rank approximation: minimise sum weights * (W - left @ right)**2."""

import importlib
from typing import TYPE_CHECKING, Any

from wlra.api import solve, solve_batch
from wlra.methods import METHODS
from wlra.methods.method import Method, Stage
from wlra.path import solve_path
from wlra.problem import Factors, Kronecker, Problem
from wlra.result import History, Restarts, Result, Status
from wlra.selection import Selection, select_rank

if TYPE_CHECKING:
    from wlra import plot

__all__ = [
    "METHODS",
    "Factors",
    "History",
    "Kronecker",
    "Method",
    "Problem",
    "Restarts",
    "Result",
    "Selection",
    "Stage",
    "Status",
    "plot",
    "select_rank",
    "solve",
    "solve_batch",
    "solve_path",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The figures, imported when they are first asked for: they need matplotlib, the extra `plot`."""
    if name == "plot":
        return importlib.import_module("wlra.plot")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
