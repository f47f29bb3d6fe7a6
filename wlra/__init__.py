"""Weighted low-rank approximation: minimise sum weights * (W - left @ right)**2."""

from wlra.api import solve, solve_batch
from wlra.path import solve_path
from wlra.problem import Kronecker
from wlra.result import History, Restarts, Result, Status
from wlra.selection import Selection, select_rank

__all__ = [
    "History",
    "Kronecker",
    "Restarts",
    "Result",
    "Selection",
    "Status",
    "select_rank",
    "solve",
    "solve_batch",
    "solve_path",
]
__version__ = "0.1.0"
