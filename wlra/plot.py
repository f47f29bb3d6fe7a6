"""Figures, for those who would rather look than read. Needs matplotlib, the extra `plot`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(losses: Mapping[str, Any], best: float | None = None, ax: "Axes | None" = None) -> "Axes":
    """The axes, with the relative gap (loss - best) / best of every named course of losses against the iteration.

    Where the best is 0, the losses themselves are drawn.

    Args:
      losses: by name, losses per iteration, entry 0 the start: `result.history.loss`; what is not finite ends a course.
      best: the lowest loss known; if None, the lowest among `losses`.
      ax: axes to draw on; new ones if None.

    Raises:
      ValueError: no courses, or one of several problems or of no losses.

    Example:
      >>> import matplotlib, numpy as np, wlra
      >>> matplotlib.use("Agg")
      >>> wlra.plot.convergence({"mine": [0.3, 0.2, 0.1, np.inf], "other": [0.3, 0.25, 0.2, 0.15]}).get_xlabel()
      'iteration'
    """
    import matplotlib.pyplot as plt

    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(
            f"losses: got {type(losses).__name__}, wanted courses by name: {{'mine': result.history.loss}}"
        )
    courses = {name: course_of(name, course) for name, course in losses.items()}
    if ax is None:
        ax = plt.subplots(figsize=(6, 4), layout="constrained")[1]
    lowest = min(course.min() for course in courses.values()) if best is None else best
    for name, course in courses.items():
        gap = np.maximum((course - lowest) / lowest if lowest > 0 else course, 1e-7)
        ax.plot(gap, label=name, marker="o" if len(gap) < 3 else None)
    above = "loss above the best known, relative" if lowest > 0 else "loss"
    ax.set(xlabel="iteration", ylabel=above, yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def course_of(name: str, losses: Any) -> np.ndarray:
    """The losses up to the first that is not finite."""
    course = np.asarray(losses, np.float64)
    if course.ndim != 1:
        raise ValueError(
            f"losses[{name!r}]: got shape {course.shape}, wanted one problem's: history.loss[i] of a batch"
        )
    end = np.argmin(np.isfinite(course)) if not np.isfinite(course).all() else len(course)
    if not end:
        raise ValueError(f"losses[{name!r}]: got no loss that is finite at the start, wanted one")
    return course[:end]


def path(
    values: Any, losses: Mapping[str, Any] | Any, xlabel: str = "rank", ylabel: str = "loss", ax: "Axes | None" = None
) -> "Axes":
    """The axes, with the losses along a path of ranks or penalties.

    Args:
      values: the ranks or penalties, (r,).
      losses: an array or arrays by name: (r,), as the `loss` of `solve_path`; or (r, folds), as the `error` of
        `select_rank`, drawn as means with standard errors.
      xlabel, ylabel: names of the axes.
      ax: axes to draw on; new ones if None.

    Raises:
      ValueError: losses that are not one, or one for each fold, for each value.

    Example:
      >>> import matplotlib, wlra
      >>> matplotlib.use("Agg")
      >>> wlra.plot.path([1, 2, 4], [0.5, 0.2, 0.1]).get_ylabel()
      'loss'
    """
    import matplotlib.pyplot as plt

    courses = losses if isinstance(losses, Mapping) else {"": losses}
    for name, shape in ((name, np.shape(course)) for name, course in courses.items()):
        if shape[:1] != np.shape(values) or len(shape) > 2:
            said = f"losses[{name!r}]" if isinstance(losses, Mapping) else "losses"
            raise ValueError(f"{said}: got shape {shape} for values of shape {np.shape(values)}, wanted one for each")
    if ax is None:
        ax = plt.subplots(figsize=(6, 4), layout="constrained")[1]
    order = np.argsort(np.asarray(values))
    for name, course in courses.items():
        course = np.asarray(course, np.float64)[order]
        x = np.asarray(values)[order]
        if course.ndim == 1:
            ax.plot(x, course, marker="o", label=name)
        else:
            folds = course.shape[1]
            error = course.std(axis=1, ddof=1) / np.sqrt(folds) if folds > 1 else None
            ax.errorbar(x, course.mean(axis=1), error, marker="o", capsize=3, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if np.min(np.asarray(values)) > 0 else "linear")
    ax.grid(alpha=0.3)
    if isinstance(losses, Mapping):
        ax.legend(fontsize="small")
    return ax
