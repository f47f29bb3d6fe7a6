"""What each kernel can be, and the steps that save the most loss for their cost."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bert_adapter.kernels import break_even


class Curve(NamedTuple):
    """All plans from the smallest to the whole: step i gives kernel `paths[kernel[i]]` the rank `rank[i]`.

    share, predicted: of what is budgeted, after each step, and the loss predicted. The first len(paths) steps give
    every kernel its smallest rank. A rank of break-even or more is a dense kernel.
    """

    paths: tuple[str, ...]
    kernel: Int[np.ndarray, " steps"]
    rank: Int[np.ndarray, " steps"]
    share: Float[np.ndarray, " steps"]
    predicted: Float[np.ndarray, " steps"]


class Choices(NamedTuple):
    """What one kernel can be: its ranks, their costs, the losses predicted. The last is to stay dense."""

    rank: Int[np.ndarray, " options"]
    cost: Float[np.ndarray, " options"]
    loss: Float[np.ndarray, " options"]


def choices_of(shape: tuple[int, int], price: int, losses: Float[np.ndarray, " ranks"], ranks: range) -> Choices:
    """The ranks below break-even that are allowed, and dense; `price` is that of a number, losses begin at rank 0."""
    dense = math.ceil(break_even(shape))
    allowed = np.array(ranks[: len(range(ranks.start, dense, ranks.step))], int)
    return Choices(
        np.append(allowed, dense),
        price * np.append(allowed * float(sum(shape)), float(shape[0] * shape[1])),
        np.append(losses[allowed], 0.0),
    )


def all_plans(choices: dict[str, Choices], fixed: float, total: float) -> Curve:
    """The steps of all kernels, each kernel's in their order, those that save most for their cost first."""
    first, steps = [], []
    for number, choice in enumerate(choices.values()):
        corners = lower_hull(choice.cost, choice.loss)
        rank, cost, loss = (array[corners] for array in choice)
        first.append((number, rank[0], cost[0], 0.0))
        steps.append(np.stack([np.full(len(rank) - 1, number), rank[1:], np.diff(cost), -np.diff(loss)]))
    later = np.concatenate(steps, axis=1)
    later = later[:, np.lexsort((later[1], later[0], -later[3] / later[2]))]
    kernel, rank, cost, saved = np.concatenate([np.array(first).T, later], axis=1)
    worst = sum(float(choice.loss[0]) for choice in choices.values())
    share, predicted = (fixed + np.cumsum(cost)) / total, np.maximum(worst - np.cumsum(saved), 0)
    return Curve(
        paths=tuple(choices), kernel=kernel.astype(int), rank=rank.astype(int), share=share, predicted=predicted
    )


def lower_hull(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> list[int]:
    """The corners of the convex hull from below (Andrew 1979), for x that rises."""
    points, corners = list(zip(x.tolist(), y.tolist(), strict=True)), []
    for i, point in enumerate(points):
        while len(corners) > 1 and above(points[corners[-2]], points[corners[-1]], point):
            corners.pop()
        corners.append(i)
    return corners


def above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def cheapest(choices: dict[str, Choices], curve: Curve, budget: float, total: float) -> dict[str, int]:
    """By path, the option that the steps within the budget lead to; the next step is gone as far as the rest allows."""
    limit = budget * (1 + 1e-12)
    count = int(np.searchsorted(curve.share, limit, side="right"))
    ranks = dict(zip(curve.kernel[:count], curve.rank[:count], strict=True))
    chosen = {
        path: int(np.searchsorted(choice.rank, ranks[number])) for number, (path, choice) in enumerate(choices.items())
    }
    if count < len(curve.share):
        path = curve.paths[curve.kernel[count]]
        left = (limit - curve.share[count - 1]) * total + choices[path].cost[chosen[path]]
        chosen[path] = int(np.searchsorted(choices[path].cost, left, side="right")) - 1
    return chosen


def even(choices: dict[str, Choices], affordable: float) -> dict[str, int]:
    """By path, the option that keeps the same share of every kernel, or the smallest allowed."""
    share = affordable / sum(choice.cost[-1] for choice in choices.values()) * (1 + 1e-12)
    return {
        path: max(0, int(np.searchsorted(choice.cost, share * choice.cost[-1], side="right")) - 1)
        for path, choice in choices.items()
    }
