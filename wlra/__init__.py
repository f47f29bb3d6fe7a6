"""Weighted low-rank approximation: minimise sum weights * (W - left @ right)**2."""

from wlra.border import Kronecker
from wlra.driver import History, Status
from wlra.restarts import Restarts
from wlra.solve import Result, solve, solve_batch

__all__ = ["History", "Kronecker", "Restarts", "Result", "Status", "solve", "solve_batch"]
__version__ = "0.1.0"
