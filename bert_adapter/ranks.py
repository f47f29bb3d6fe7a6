"""Which rank each kernel gets for a budget: where a parameter saves the most loss."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from bert_adapter.checkpoint.names import by_path
from bert_adapter.choices import Choices, Curve, all_plans, cheapest, choices_of, even
from bert_adapter.decompositions import (
    Decompositions,
    check_of,
    check_shrink,
    chosen_signal,
    decompositions,
    predicted_losses,
    restricted,
    selected_shapes,
)
from bert_adapter.importance.sums import Importance
from bert_adapter.kernels import Shapes
from bert_adapter.layers.stacks import unstacked, whole
from bert_adapter.signals.definition import Signal
from wlra.checks import check_count, check_name

UNITS = ("kernels", "parameters", "bytes", "flops")
# Of the loss predicted for kernels of zero. There a model of 12 layers scored no more than its last layer alone, of 8 %
# of the kernels (docs/choosing-a-signal.md); one of 6 layers was still ahead at twice that.
FAR = 0.075


class Plan(NamedTuple):
    """The ranks by path, the share of the budgeted quantity that they keep, and what they are predicted to cost.

    predicted: the increase of the mean loss to second order, half the weighted squared error an example. For a signal
      in units of its own (`Signal.units`), the share of each kernel's weighted square that is lost, a mean weighted by
      their parameters.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"easy": {"kernel": np.diag([9.0, 8, 0, 0, 0, 0, 0, 0])}, "hard": {"kernel": np.eye(8)}}
      >>> planned = bert_adapter.plan(params, None, budget=0.75, signal="svd")
      >>> planned.share, round(planned.predicted, 3)
      (0.75, 0.0)
    """

    ranks: dict[str, int]
    share: float
    predicted: float
    curve: Curve


def plan(
    params: Any,
    importance: Importance | Decompositions | None,
    budget: float,
    *,
    signal: str | Signal | None = None,
    of: str = "kernels",
    shrink: float | None = None,
    uniform: bool = False,
    minimum: int = 1,
    maximum: int | None = None,
    multiple_of: int = 1,
    kernels: Shapes | None = None,
) -> Plan:
    """The ranks of least predicted loss for a budget, and those for all other budgets along the way.

    Singular values of a kernel in the coordinates where its weights are equal are what each rank saves; one sort over
    all kernels by saving for a parameter gives the ranks. Where the rest of a kernel costs less dense than by rank, it
    stays dense. A warning says where so much loss is predicted that fewer layers may keep as much. A signal in units of
    its own says nothing of one kernel beside another: savings are then shares of each
    kernel's whole, times its parameters, so that kernels of like spectra keep like shares.

    Args:
      params: nested dicts, with dense kernels.
      importance: what `measure_signal` returned, or `measure_importance` with what the signal needs; None for a signal
        that needs nothing. Or what `decompose` returned, for any number of budgets.
      budget: the share to keep, in (0, 1].
      of: "kernels", the parameters of the selected kernels; "parameters", those of the whole model; "bytes", their
        size in memory, where kernels may have several dtypes; "flops", the operations for a token in all dense layers,
        attention's own products aside.
      signal, shrink: as `compress` takes them.
      uniform: the same share of every kernel, for comparison.
      minimum, maximum, multiple_of: of the ranks of kernels that do not stay dense.
      kernels: what `select_kernels` returned. By default all kernels that were measured; all with two axes where
        nothing was.

    Raises:
      ValueError: a name, share or rank that cannot be, or a budget below what the smallest ranks take.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"easy": {"kernel": np.diag([9.0, 8, 0, 0, 0, 0, 0, 0])}, "hard": {"kernel": np.eye(8)}}
      >>> bert_adapter.plan(params, None, budget=0.75, signal="svd").ranks  # 4 is break-even: "hard" stays dense
      {'easy': 2, 'hard': 4}
    """
    chosen = chosen_signal(signal, shrink, importance)
    check_budget(budget, of, shrink)
    allowed = allowed_ranks(minimum, maximum, multiple_of)
    check_of(importance, params)
    if isinstance(importance, Decompositions):
        known = restricted(importance, kernels)
    else:
        shapes = selected_shapes(params, importance, kernels)
        known = decompositions(params, importance, shapes, signal=chosen, shrink=shrink, method=None)
    return plan_for(params, known, budget, of=of, uniform=uniform, allowed=allowed)


def plan_for(params: Any, known: Decompositions, budget: float, *, of: str, uniform: bool, allowed: range) -> Plan:
    """The plan for kernels that are decomposed; see `plan`."""
    shapes = known.shapes
    flat = by_path(unstacked(params, shapes))
    kernels = {path: flat[f"{path}/kernel"] for path in shapes}
    check_affordable(params, shapes, budget, of=of, allowed=allowed)
    losses = in_units(known)
    choices = {}
    for path, kernel in kernels.items():
        choices[path] = choices_of(shapes[path], price(kernel, of), losses[path], allowed)
    choices = together(choices)
    fixed = fixed_cost(flat, kernels, of)
    total = fixed + sum(float(choice.cost[-1]) for choice in choices.values())
    curve = all_plans(choices, fixed, total)
    chosen = even(choices, budget * total - fixed) if uniform else cheapest(choices, curve, budget, total)
    cost = sum(float(choice.cost[chosen[path]]) for path, choice in choices.items())
    predicted = sum(float(choice.loss[chosen[path]]) for path, choice in choices.items())
    if known.signal.units == "loss" and not uniform:
        warn_if_far(budget, predicted, sum(float(each[0]) for each in losses.values()))
    return Plan(
        ranks={path: int(choices[whole(path)].rank[chosen[whole(path)]]) for path in shapes},
        share=(fixed + cost) / total,
        predicted=predicted,
        curve=curve,
    )


def warn_if_far(budget: float, predicted: float, worst: float) -> None:
    """A warning where so much is predicted to be lost that it may not be worth it; `worst` is for kernels of zero."""
    if predicted > FAR * worst:
        warnings.warn(
            f"budget {budget:g}: the loss is predicted to rise by {predicted:.3g}, {predicted / worst:.1%} of what "
            f"kernels of zero would cost. Beyond {FAR:.1%}, a model of fewer layers may keep as much: compare, keep "
            f"more, or train afterwards",
            stacklevel=4,  # the caller of plan or compress
        )


def together(choices: dict[str, Choices]) -> dict[str, Choices]:
    """By the path of the kernel, what all matrices in it can be, which have one rank."""
    found: dict[str, Choices] = {}
    for path, choice in choices.items():
        known = found.get(whole(path))
        both = choice if known is None else Choices(choice.rank, known.cost + choice.cost, known.loss + choice.loss)
        found[whole(path)] = both
    return found


def in_units(known: Decompositions) -> dict[str, Any]:
    """By path, what adds up over kernels: losses of an example, or shares of each kernel's whole, of all parameters."""
    losses = {path: predicted_losses(squares) for path, squares in known.squares.items()}
    if known.signal.units == "loss":
        return {path: each / known.examples for path, each in losses.items()}
    sizes = {path: math.prod(shape) for path, shape in known.shapes.items()}
    total = sum(sizes.values())
    return {path: each / (each[0] or 1) * (sizes[path] / total) for path, each in losses.items()}


def price(kernel: Any, of: str) -> int:
    """What a number of the kernel costs."""
    return {"bytes": kernel.dtype.itemsize, "flops": 2}.get(of, 1)


def check_affordable(params: Any, shapes: Shapes, budget: float, *, of: str, allowed: range) -> None:
    """A ValueError if the smallest ranks cost more than the budget, which is known before anything is measured."""
    flat = by_path(unstacked(params, shapes))
    kernels = {path: flat[f"{path}/kernel"] for path in shapes}
    fixed, least, most = fixed_cost(flat, kernels, of), 0.0, 0.0
    for path, kernel in kernels.items():
        nothing = np.zeros(min(shapes[path]) + 1)
        cost = choices_of(shapes[path], price(kernel, of), nothing, allowed).cost
        least, most = least + float(cost[0]), most + float(cost[-1])
    share = (fixed + least) / (fixed + most)
    if budget * (1 + 1e-12) < share:
        raise ValueError(f"budget: the smallest ranks take {share:.4g} of the {of}; got {budget}")


def check_budget(budget: float | None, of: str, shrink: float | None) -> None:
    """One ValueError for what cannot be, before anything is measured."""
    check_name("of", of, UNITS)
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"budget is the share of the {of} to keep, in (0, 1]; got {budget}")
    check_shrink(shrink)


def allowed_ranks(minimum: int, maximum: int | None, multiple_of: int) -> range:
    """The ranks that a kernel may have, if it does not stay dense."""
    minimum, step = check_count("minimum", minimum, 1), check_count("multiple_of", multiple_of, 1)
    most = 10**9 if maximum is None else check_count("maximum", maximum, minimum)
    return range(-(-minimum // step) * step, most + 1, step)


def fixed_cost(flat: dict[str, Any], kernels: dict[str, Any], of: str) -> float:
    """The cost of what is not selected, whatever the ranks."""
    others = [(path, leaf) for path, leaf in flat.items() if path.removesuffix("/kernel") not in kernels]
    if of == "kernels":
        return 0.0
    if of == "flops":
        return float(sum(2 * leaf.size for path, leaf in others if path.endswith(("/kernel", "/left", "/right"))))
    return float(sum(leaf.nbytes if of == "bytes" else leaf.size for _, leaf in others))
