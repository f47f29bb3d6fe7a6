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
    flops: the operations for a token after each step, with all that is selected.
    """

    paths: tuple[str, ...]
    kernel: Int[np.ndarray, " steps"]
    rank: Int[np.ndarray, " steps"]
    share: Float[np.ndarray, " steps"]
    predicted: Float[np.ndarray, " steps"]
    option: Int[np.ndarray, " steps"]
    flops: Float[np.ndarray, " steps"]


class Choices(NamedTuple):
    """What one kernel can be: its ranks, their costs, the losses predicted. The last is to stay dense.

    bits: numbers of dtypes, 0 for that of the kernel itself.
    flops: the operations for a token.
    """

    rank: Int[np.ndarray, " options"]
    cost: Float[np.ndarray, " options"]
    loss: Float[np.ndarray, " options"]
    bits: Int[np.ndarray, " options"]
    flops: Float[np.ndarray, " options"]


def choices_of(shape: tuple[int, int], price: int, losses: Float[np.ndarray, " ranks"], ranks: range) -> Choices:
    """The ranks below break-even that are allowed, and dense; `price` is that of a number, losses begin at rank 0."""
    dense = math.ceil(break_even(shape))
    allowed = np.array(ranks[: len(range(ranks.start, dense, ranks.step))], int)
    numbers = np.append(allowed * float(sum(shape)), float(shape[0] * shape[1]))
    return Choices(
        np.append(allowed, dense),
        price * numbers,
        np.append(losses[allowed], 0.0),
        np.zeros(len(allowed) + 1, int),
        flops=2 * numbers,
    )


def looked_up(choices: Choices, width: int) -> Choices:
    """What a table can be: a row of a dense one takes no operations, one of factors a product with `right`."""
    return choices._replace(flops=np.append(2.0 * width * choices.rank[:-1], 0.0))


def with_bits(
    choices: Choices, rounding: Rounding, axes: tuple[tuple[int, ...], ...], *, by_rows: bool, unit: float, scale: int
) -> Choices:
    """The same at fewer bits too: what is lost by rank and by rounding adds up. `unit` is that of the losses.

    axes: of the kernel's inputs, and of its outputs.
    scale: the bytes of a scale of 8 bits.
    """
    ranks, (inputs, outputs), found = choices.rank[:-1], axes, [choices]
    for dtype in rounding.dense:
        left = [size((*inputs, int(rank)), dtype, by_rows, scale) for rank in ranks]
        right = [size((int(rank), *outputs), dtype, False, scale) for rank in ranks]
        cost = np.append(np.add(left, right), float(size((*inputs, *outputs), dtype, by_rows, scale)))
        lost = np.append(rounding.at(ranks, dtype), rounding.dense[dtype])
        bits = np.full(len(choices.rank), DTYPES.index(dtype) + 1)
        found.append(choices._replace(cost=cost, loss=choices.loss + unit * lost, bits=bits))
    return Choices(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def in_seconds(choices: Choices, costs: Costs, highest: bool = True) -> Choices:
    """The ranks that are faster than a dense kernel, and dense, by their times; of equal times the highest rank alone.

    Where it is not, for operations count besides, times rise by as little as tells them apart.
    """
    ranks = choices.rank[:-1]
    seconds = np.append(costs.at(ranks), costs.dense)
    faster = (seconds[:-1] < costs.dense) & (costs.padded(ranks) < choices.rank[-1])
    kept = np.append(faster & ((seconds[:-1] < seconds[1:]) | (not highest)), True)
    if not highest:
        seconds[:-1] += 1e-9 * costs.dense * np.arange(1, len(seconds))
    return Choices(*(array[kept] for array in choices._replace(cost=seconds)))


def dtype_named(number: int) -> str | None:
    """The dtype of that number in `Choices.bits`; None for the kernel's own."""
    return DTYPES[number - 1] if number else None


def as_it_is(choices: Choices) -> int:
    """The number of the option to stay dense in its own dtype."""
    return int(np.flatnonzero(choices.bits == 0)[-1])


def useful(choices: Choices, price: float = 0.0) -> Choices:
    """Those that lose less than all that cost no more, in the order of their costs, at this price of an operation.

    Ranks above the number of components that there are, as of a merged kernel, lose no less. To stay dense in the
    kernel's own dtype is safe even then, where no other dtype is: weights may not see all that it holds.
    """
    cost = choices.cost + price * choices.flops
    order = np.lexsort((choices.loss, cost))
    loss = choices.loss[order]
    least = np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    kept = loss < least
    if len(set(choices.bits)) == 1:
        kept |= order == as_it_is(choices)
    return Choices(*(array[order[kept]] for array in choices))


def all_plans(choices: dict[str, Choices], fixed: float, total: float, price: float = 0.0) -> Curve:
    """The steps of all kernels, each kernel's in their order, those that save most for their cost first."""
    first, steps = [], []
    for number, choice in enumerate(choices.values()):
        priced = choice.cost + price * choice.flops
        corners = lower_hull(priced, choice.loss)
        rank, cost, loss, _, flops = (array[corners] for array in choice)
        first.append((number, rank[0], cost[0], 0.0, corners[0], flops[0], 0.0))
        number, rate = np.full(len(rank) - 1, number), -np.diff(loss) / np.diff(priced[corners])
        steps.append(np.stack([number, rank[1:], np.diff(cost), -np.diff(loss), corners[1:], np.diff(flops), rate]))
    later = np.concatenate(steps, axis=1)
    later = later[:, np.lexsort((later[4], later[0], -later[6]))]
    kernel, rank, cost, saved, option, flops, _ = np.concatenate([np.array(first).T, later], axis=1)
    worst = sum(float(choice.loss[0]) for choice in choices.values())
    share, predicted = (fixed + np.cumsum(cost)) / total, np.maximum(worst - np.cumsum(saved), 0)
    kernel, rank, option = (array.astype(int) for array in (kernel, rank, option))
    return Curve(tuple(choices), kernel, rank, share=share, predicted=predicted, option=option, flops=np.cumsum(flops))


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


def cheapest(
    choices: dict[str, Choices], curve: Curve, budget: float, total: float, *, flops: float = math.inf
) -> dict[str, int]:
    """By path, the option that the steps within the budget lead to, with what is left spent on whatever saves most.

    flops: the most operations for a token, if those are limited too.
    """
    share, flops = budget * (1 + 1e-12), flops * (1 + 1e-12)
    over = np.append((curve.share > share) | (curve.flops > flops), True)
    if (count := int(np.argmax(over))) < len(choices):
        least = float(curve.share[len(choices) - 1])
        raise ValueError(f"budget: the smallest ranks take {least:.4g} of what the model takes; got {budget}")
    options = dict(zip(curve.kernel[:count], curve.option[:count], strict=True))
    chosen = {path: int(options[number]) for number, path in enumerate(choices)}
    rest = (share - curve.share[count - 1]) * total, flops - curve.flops[count - 1]
    return filled(choices, chosen, *rest)


def filled(choices: dict[str, Choices], chosen: dict[str, int], rest: float, flops: float) -> dict[str, int]:
    """The same with what is left spent too, of the budget and of the operations.

    It goes to the option of any kernel that saves the most of all that it can pay for, until none saves anything.
    """
    chosen = dict(chosen)
    while True:
        best, gain = None, 0.0
        for path, choice in choices.items():
            has = chosen[path]
            fits = (choice.cost - choice.cost[has] <= rest) & (choice.flops - choice.flops[has] <= flops)
            loss = np.where(fits, choice.loss, np.inf)
            option = int(np.argmin(loss))
            if choice.loss[has] - loss[option] > gain:
                best, gain = (path, option), float(choice.loss[has] - loss[option])
        if best is None:
            return chosen
        path, option = best
        rest -= choices[path].cost[option] - choices[path].cost[chosen[path]]
        flops -= choices[path].flops[option] - choices[path].flops[chosen[path]]
        chosen[path] = option


def within_both(
    choices: dict[str, Choices], fixed: float, total: float, *, budget: float, flops: float
) -> tuple[dict[str, Choices], dict[str, int]]:
    """The useful choices and the option of each, for a budget and a limit of operations for a token.

    An operation has a price in units of the budget. At the right one, steps use up both (Everett 1963, Generalized
    Lagrange multiplier method); it is found by bisection, and the best plan of all that were tried is returned.
    """
    unit = total / max(sum(float(choice.flops.max()) for choice in choices.values()), 1.0)
    price, low, high, best = 0.0, 1e-4, 1e4, (math.inf, choices, {})
    for _ in range(17):
        priced = {path: useful(choice, price * unit) for path, choice in choices.items()}
        curve = all_plans(priced, fixed, total, price * unit)
        many, large = curve.flops > flops * (1 + 1e-12), curve.share > budget * (1 + 1e-12)
        ends = [int(np.argmax(np.append(over, True))) for over in (many, large)]
        if min(ends) >= len(choices):
            chosen = cheapest(priced, curve, budget, total, flops=flops)
            lost = sum(float(priced[path].loss[option]) for path, option in chosen.items())
            best = min(best, (lost, priced, chosen), key=lambda found: found[0])
        if price == 0.0 and not many[: ends[1]].any():
            break
        low, high = (price or low, high) if ends[0] < ends[1] else (low, price or high)
        price = math.sqrt(low * high)
    if not best[2]:
        raise ValueError("budget and flops: the smallest ranks within either exceed the other; wanted more of both")
    return best[1:]


def even(choices: dict[str, Choices], wholes: dict[str, float], affordable: float) -> dict[str, int]:
    """By path, the option that keeps the same share of every kernel, all of them together costing no more.

    A kernel whose smallest option is more than that keeps it, and the others share what is left.
    """
    free, smallest, share = dict(wholes), {path: float(choice.cost[0]) for path, choice in choices.items()}, 1.0
    while free:
        left = affordable - sum(cost for path, cost in smallest.items() if path not in free)
        whole = sum(free.values())
        share = left / whole * (1 + 1e-12) if whole > 0 else 1.0
        fitting = {path: each for path, each in free.items() if smallest[path] <= share * each}
        if len(fitting) == len(free):
            break
        free = fitting
    return {
        path: int(np.searchsorted(choice.cost, share * free[path], side="right")) - 1 if path in free else 0
        for path, choice in choices.items()
    }
