"""What each kernel can be, and the steps that save the most loss for their cost."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bert_adapter.checkpoint.bits import DTYPES, size
from bert_adapter.kernels import break_even
from bert_adapter.latency import Costs
from bert_adapter.rounding import Rounding


class Curve(NamedTuple):
    """All plans from the smallest to the whole: step i gives kernel `paths[kernel[i]]` the rank `rank[i]`.

    option: of the kernel's `Choices`, the number that is.
    share, predicted: of what is budgeted, after each step, and the loss predicted. The first len(paths) steps give
    every kernel its smallest rank. A rank of break-even or more is a dense kernel.
    """

    paths: tuple[str, ...]
    kernel: Int[np.ndarray, " steps"]
    rank: Int[np.ndarray, " steps"]
    share: Float[np.ndarray, " steps"]
    predicted: Float[np.ndarray, " steps"]
    option: Int[np.ndarray, " steps"]


class Choices(NamedTuple):
    """What one kernel can be: its ranks, their costs, the losses predicted. The last is to stay dense.

    bits: numbers of dtypes, 0 for that of the kernel itself.
    """

    rank: Int[np.ndarray, " options"]
    cost: Float[np.ndarray, " options"]
    loss: Float[np.ndarray, " options"]
    bits: Int[np.ndarray, " options"]


def choices_of(shape: tuple[int, int], price: int, losses: Float[np.ndarray, " ranks"], ranks: range) -> Choices:
    """The ranks below break-even that are allowed, and dense; `price` is that of a number, losses begin at rank 0."""
    dense = math.ceil(break_even(shape))
    allowed = np.array(ranks[: len(range(ranks.start, dense, ranks.step))], int)
    return Choices(
        np.append(allowed, dense),
        price * np.append(allowed * float(sum(shape)), float(shape[0] * shape[1])),
        np.append(losses[allowed], 0.0),
        np.zeros(len(allowed) + 1, int),
    )


def with_bits(choices: Choices, rounding: Rounding, shape: tuple[int, int], *, by_rows: bool, unit: float) -> Choices:
    """The same at fewer bits too: what is lost by rank and by rounding adds up. `unit` is that of the losses."""
    ranks, (m, n), found = choices.rank[:-1], shape, [choices]
    for dtype in rounding.dense:
        factors = [size((m, int(rank)), dtype, by_rows) + size((int(rank), n), dtype, False) for rank in ranks]
        cost = np.append(factors, float(size(shape, dtype, by_rows)))
        lost = np.append(rounding.at(ranks, dtype), rounding.dense[dtype])
        bits = np.full(len(choices.rank), DTYPES.index(dtype) + 1)
        found.append(Choices(choices.rank, cost, choices.loss + unit * lost, bits))
    return Choices(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def in_seconds(choices: Choices, costs: Costs) -> Choices:
    """The ranks that are faster than a dense kernel, and dense, by their times."""
    seconds = costs.at(choices.rank[:-1])
    seconds = seconds * (1 + 1e-9 * np.arange(1, len(seconds) + 1))  # which must rise
    faster = np.append(seconds < costs.dense, True)
    cost = np.append(seconds, costs.dense)
    return Choices(*(array[faster] for array in choices._replace(cost=cost)))


def dtype_named(number: int) -> str | None:
    """The dtype of that number in `Choices.bits`; None for the kernel's own."""
    return DTYPES[number - 1] if number else None


def useful(choices: Choices) -> Choices:
    """Those that lose less than all that cost no more, in the order of their costs."""
    order = np.lexsort((choices.loss, choices.cost))
    loss = choices.loss[order]
    least = np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    kept = order[(loss < least) | (order == len(order) - 1)] if len(set(choices.bits)) > 1 else order
    return Choices(*(array[kept] for array in choices))


def all_plans(choices: dict[str, Choices], fixed: float, total: float) -> Curve:
    """The steps of all kernels, each kernel's in their order, those that save most for their cost first."""
    first, steps = [], []
    for number, choice in enumerate(choices.values()):
        corners = lower_hull(choice.cost, choice.loss)
        rank, cost, loss, _ = (array[corners] for array in choice)
        first.append((number, rank[0], cost[0], 0.0, corners[0]))
        number = np.full(len(rank) - 1, number)
        steps.append(np.stack([number, rank[1:], np.diff(cost), -np.diff(loss), corners[1:]]))
    later = np.concatenate(steps, axis=1)
    later = later[:, np.lexsort((later[4], later[0], -later[3] / later[2]))]
    kernel, rank, cost, saved, option = np.concatenate([np.array(first).T, later], axis=1)
    worst = sum(float(choice.loss[0]) for choice in choices.values())
    share, predicted = (fixed + np.cumsum(cost)) / total, np.maximum(worst - np.cumsum(saved), 0)
    kernel, rank, option = (array.astype(int) for array in (kernel, rank, option))
    return Curve(tuple(choices), kernel, rank, share=share, predicted=predicted, option=option)


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
    options = dict(zip(curve.kernel[:count], curve.option[:count], strict=True))
    chosen = {path: int(options[number]) for number, path in enumerate(choices)}
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
