"""Weighted low-rank approximation: minimise sum weights * (W - left @ right)**2."""

from wlra.border import Kronecker
from wlra.driver import History, Status
from wlra.path import Selection, select_rank, solve_path
from wlra.restarts import Restarts
from wlra.solve import Result, solve, solve_batch

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
