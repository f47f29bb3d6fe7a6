"""Which rank each kernel gets for a budget: where a parameter saves the most loss."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from bert_adapter.checkpoint.bits import DTYPES, INT4, is_matrix, size
from bert_adapter.checkpoint.names import by_path
from bert_adapter.choices import (
    Choices,
    Curve,
    all_plans,
    as_it_is,
    cheapest,
    choices_of,
    dtype_named,
    even,
    in_seconds,
    looked_up,
    useful,
    with_bits,
    within_both,
)
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
from bert_adapter.head_sizes import Pair, identities_in
from bert_adapter.importance.sums import Importance
from bert_adapter.kernels import Shapes, break_even, split_axes
from bert_adapter.latency import Costs, Latency, check_times
from bert_adapter.layers.places import is_table, kernel_names, kernel_path, layer_path
from bert_adapter.layers.stacks import unstacked, whole
from bert_adapter.pairs import by_kernel, cost_of_heads, in_pairs
from bert_adapter.rounding import Rounding, narrower
from bert_adapter.signals.definition import Signal
from wlra.checks import check_count, check_name, check_number

UNITS = ("kernels", "parameters", "bytes", "flops")
Unit = str | Latency
# Of the loss predicted for kernels of zero. There a model of 12 layers scored no more than its last layer alone, of 8 %
# of the kernels (docs/choosing-a-signal.md); one of 6 layers was still ahead at twice that.
FAR = 0.075


class Budget(NamedTuple):
    """What may be kept: a share of something, and of the operations, in these ranks or dense; see `plan`."""

    share: float
    of: Unit = "kernels"
    flops: float | None = None
    uniform: bool = False
    allowed: range = range(1, 10**9)


class Plan(NamedTuple):
    """The ranks by path, the share of the budgeted quantity that they keep, and what they are predicted to cost.

    heads: by the path of a query or a value, of layers whose heads keep fewer dimensions, how many; their kernels stay
      dense.
    dtypes: by path, of the layers that are stored in fewer bits; only plans of bytes have any. Matrices that are not
      selected are stored in 16 bits then, and what that loses is not predicted.
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
    dtypes: Mapping[str, str] = {}
    heads: Mapping[str, int] = {}


def plan(
    params: Any,
    importance: Importance | Decompositions | None,
    budget: float,
    *,
    signal: str | Signal | None = None,
    of: Unit = "kernels",
    flops: float | None = None,
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
        size on the disk, where each matrix is stored in its own dtype, in 16 bits, or as integers of 8 or 4 with
        their scales, whatever loses least; "flops", the operations for a token in all dense layers,
        attention's own products aside; or what `measure_latency` returned, the dense model's time on this machine.
      flops: the share of those operations that may be left besides, in (0, 1], where the budget is of something else:
        few bits leave a model small and slow.
      signal, shrink: as `compress` takes them.
      uniform: the same share of every kernel, for comparison; of bytes, what no kernel's next option fits is not spent.
      minimum, maximum, multiple_of: of the ranks of kernels that do not stay dense. Multiples of 16 are faster, since
        processors take as many numbers at once; a plan of time has others only where these options ask for them.
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
    ranks: dict[str, Any] = {"minimum": minimum, "maximum": maximum, "multiple_of": multiple_of}
    wanted = budget_of(budget, of, flops=flops, uniform=uniform, **ranks)
    check_shrink(shrink)
    check_of(importance, params)
    if isinstance(importance, Decompositions):
        known = restricted(importance, kernels)
    else:
        shapes = selected_shapes(params, importance, kernels)
        how: dict[str, Any] = {"signal": chosen, "shrink": shrink, "method": None}
        known = decompositions(params, importance, shapes, **how, bits=needs_bits(wanted))
    return plan_for(params, known, wanted)


def plan_for(params: Any, known: Decompositions, budget: Budget, pairs: Sequence[Pair] = ()) -> Plan:
    """The plan for kernels that are decomposed; see `plan`.

    pairs: those whose identities are decomposed too, where heads may have fewer dimensions instead.
    """
    between = losses_between(known, pairs)
    known = restricted(known, {path: shape for path, shape in known.shapes.items() if path not in between})
    shapes = known.shapes
    flat = by_path(unstacked(params, shapes))
    kernels = {path: flat[kernel_path(flat, path)] for path in shapes}
    check_affordable(params, shapes, budget, pairs)
    times = budget.of.heads if isinstance(budget.of, Latency) else None
    every, options = in_pairs(all_choices(known, flat, budget), pairs, between, times)
    choices = {path: useful(choice) for path, choice in every.items()}
    fixed = fixed_cost(params, flat, shapes, budget.of)
    wholes = {path: float(choice.cost[as_it_is(choice)]) for path, choice in every.items()}
    total = fixed + sum(wholes.values())
    others = unselected(params, kernels) if needs_bits(budget) else {}
    fixed -= sum(flat[path].nbytes // 2 for path in others)
    curve = all_plans(choices, fixed, total)
    if budget.uniform:
        chosen = even(choices, wholes, budget.share * total - fixed)
    elif budget.flops is None:
        chosen = cheapest(choices, curve, budget.share, total)
    else:
        others_flops = fixed_cost(params, flat, shapes, "flops")
        dense_flops = sum(float(choice.flops[as_it_is(choice)]) for choice in every.values())
        flops = budget.flops * (others_flops + dense_flops) - others_flops
        choices, chosen = within_both(every, fixed, total, budget=budget.share, flops=flops)
    cost = sum(float(choice.cost[chosen[path]]) for path, choice in choices.items())
    predicted = sum(float(choice.loss[chosen[path]]) for path, choice in choices.items())
    if known.signal.units == "loss" and not budget.uniform:
        zero = {path: float(each.sum()) / 2 / known.examples[path] for path, each in known.squares.items()}
        layers = [path for path in zero if not is_table(kernel_path(flat, path))]
        warn_if_far(budget.share, predicted, sum(zero[path] for path in layers or zero))
    rank_of = {path: int(choice.rank[chosen[path]]) for path, choice in choices.items()}
    ranks, heads = by_kernel(rank_of, pairs, options, shapes)
    return Plan(
        ranks={path: ranks[whole(path)] for path in shapes},
        share=(fixed + cost) / total,
        predicted=predicted,
        curve=curve,
        dtypes=dtypes_in(choices, chosen) | others_in(others),
        heads=heads,
    )


def losses_between(known: Decompositions, pairs: Sequence[Pair]) -> dict[str, Any]:
    """By path, what the identities of the pairs lose at each rank from 0 on."""
    units = units_of(known)
    return {path: units[path] * predicted_losses(known.squares[path]) for path in identities_in(pairs)}


def all_choices(known: Decompositions, flat: dict[str, Any], budget: Budget) -> dict[str, Choices]:
    """By path, what each kernel can be, those of a stack together."""
    units, shapes, of, choices = units_of(known), known.shapes, budget.of, {}
    for path, shape in shapes.items():
        place = kernel_path(flat, path)
        losses = units[path] * predicted_losses(known.squares[path])
        choices[path] = choices_of(shape, price(flat[place], of), losses, budget.allowed)
        if is_table(place):
            choices[path] = looked_up(choices[path], shape[1])
        if is_table(place) and (of == "flops" or isinstance(of, Latency)):
            choices[path] = dense_alone(choices[path])
        elif isinstance(of, Latency):
            alone = budget is None or budget.flops is None
            choices[path] = in_seconds(choices[path], costs_in(of, path, shape), highest=alone)
        if needs_bits(budget) and is_matrix(place, flat[place]):
            how: dict[str, Any] = {"by_rows": is_table(place), "unit": units[path], "scale": scale_of(flat[place])}
            axes = split_axes(path, np.shape(flat[place]), shape)
            choices[path] = with_bits(choices[path], rounding_of(known, path), axes, **how)
    return together(choices)


def dtypes_in(choices: Mapping[str, Choices], chosen: Mapping[str, int]) -> dict[str, str]:
    """By path, the dtypes of the chosen options that are stored in fewer bits."""
    found = {path: dtype_named(int(choice.bits[chosen[path]])) for path, choice in choices.items()}
    return {path: dtype for path, dtype in found.items() if dtype is not None}


def dense_alone(choices: Choices) -> Choices:
    """What a table can be where operations or time count: a row of a dense one takes none, so that is what it stays."""
    return Choices(*(array[-1:] for array in choices._replace(cost=0 * choices.cost)))


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
        if known is not None:
            known, choice = (both_have(*pair) for pair in ((known, choice), (choice, known)))
            more = {name: getattr(known, name) + getattr(choice, name) for name in ("cost", "loss", "flops")}
            choice = choice._replace(**more)
        found[whole(path)] = choice
    return found


def both_have(choices: Choices, others: Choices) -> Choices:
    """Those of the choices whose bits are among the others': one matrix may not be held by what holds another."""
    return Choices(*(array[np.isin(choices.bits, others.bits)] for array in choices))


def units_of(known: Decompositions) -> dict[str, float]:
    """By path, what makes of half the weighted squares what adds up over kernels.

    That is the loss of an example, or the share of each kernel's whole, of all parameters.
    """
    if known.signal.units == "loss":
        return {path: 1 / known.examples[path] for path in known.squares}
    sizes = {path: math.prod(shape) for path, shape in known.shapes.items()}
    total, whole = sum(sizes.values()), {path: float(each.sum()) / 2 for path, each in known.squares.items()}
    return {path: sizes[path] / total / (whole[path] or 1) for path in known.squares}


def costs_in(latency: Latency, path: str, shape: tuple[int, int]) -> Costs:
    """The times of a kernel."""
    if shape not in latency.kernels:
        raise ValueError(
            f"of: got times of {sorted(latency.kernels)}, wanted those of {path} too, {shape}: "
            f"measure_latency(model, kernels=select_kernels(model, ...))"
        )
    return latency.kernels[shape]


def needs_bits(budget: Budget | None) -> bool:
    """Whether a plan chooses bits; where all bytes may be kept, all are."""
    return budget is not None and budget.of == "bytes" and budget.share < 1


def rounding_of(known: Decompositions, path: str) -> Rounding:
    """What fewer bits lose of a matrix."""
    if path not in known.roundings:
        raise ValueError("importance: decomposed without bits, which of='bytes' plans: decompose(..., bits=True)")
    return known.roundings[path]


def unselected(params: Any, kernels: dict[str, Any]) -> dict[str, str]:
    """By path, the other matrices of 32 bits, and the dtype of 16 that holds their numbers."""
    others = {
        path: leaf for path, leaf in by_path(params).items() if is_matrix(path, leaf) and leaf.dtype.itemsize == 4
    }
    return {
        path: narrower(leaf)[0] for path, leaf in others.items() if layer_path(path) not in set(map(whole, kernels))
    }


def others_in(others: Mapping[str, str]) -> dict[str, str]:
    """By layer, what all of its matrices are stored as."""
    layers: dict[str, set[str]] = {}
    for path, dtype in others.items():
        layers.setdefault(path.rpartition("/")[0], set()).add(dtype)
    return {layer: "bfloat16" if "bfloat16" in dtypes else "float16" for layer, dtypes in layers.items()}


def scale_of(kernel: Any) -> int:
    """The bytes of a scale of its integers of 8 bits."""
    return max(4, kernel.dtype.itemsize)


def cheapest_bits(axes: tuple[tuple[int, ...], tuple[int, ...]], ranks: range, *, by_rows: bool, scale: int) -> int:
    """The fewest bytes that a matrix of these inputs and outputs can be stored in."""
    (inputs, outputs), rank = axes, ranks.start
    dtypes = [dtype for dtype in DTYPES if dtype != INT4 or len(inputs) == len(outputs) == 1]
    dense = [size((*inputs, *outputs), dtype, by_rows, scale) for dtype in dtypes]
    shapes = ((*inputs, rank), by_rows), ((rank, *outputs), False)
    factors = [sum(size(shape, dtype, rows, scale) for shape, rows in shapes) for dtype in dtypes]
    few = ranks and rank < break_even((math.prod(inputs), math.prod(outputs)))
    return min(dense + factors) if few else min(dense)


def price(kernel: Any, of: Unit) -> int:
    """What a number of the kernel costs."""
    return {"bytes": kernel.dtype.itemsize, "flops": 2}.get(str(of), 1)


def check_affordable(
    params: Any, shapes: Shapes, budget: Budget | None, pairs: Sequence[Pair] = (), name: str = "budget"
) -> None:
    """A ValueError if the smallest ranks cost more than the budget, which is known before anything is measured."""
    if budget is None:
        return
    if budget.flops is not None:
        of_flops = budget._replace(share=budget.flops, of="flops", flops=None)
        check_affordable(params, shapes, of_flops, pairs, name="flops")
    of, allowed, flat = budget.of, budget.allowed, by_path(unstacked(params, shapes))
    if isinstance(of, Latency):
        check_times(of, params)
    kernels = {path: flat[kernel_path(flat, path)] for path in shapes}
    fixed, ends = fixed_cost(params, flat, shapes, of), {}
    for path, kernel in kernels.items():
        nothing = np.zeros(min(shapes[path]) + 1)
        cost = choices_of(shapes[path], price(kernel, of), nothing, allowed).cost
        table = is_table(kernel_path(flat, path))
        if table and (of == "flops" or isinstance(of, Latency)):
            cost = np.zeros(1)
        elif isinstance(of, Latency):
            cost = in_seconds(choices_of(shapes[path], 1, nothing, allowed), costs_in(of, path, shapes[path])).cost
        if needs_bits(budget) and is_matrix(kernel_path(flat, path), kernel):
            axes = split_axes(path, np.shape(kernel), shapes[path])
            cost = np.append(cheapest_bits(axes, allowed, by_rows=table, scale=scale_of(kernel)), cost)
        ends[path] = float(cost[0]), float(cost[-1])
    least, most = (sum(each) for each in zip(*ends.values(), strict=True))
    least -= sum(saved_by_heads(pair, ends, of) for pair in pairs)
    whole, others = fixed + most, unselected(params, kernels) if needs_bits(budget) else {}
    fixed -= sum(flat[path].nbytes // 2 for path in others)
    share = (fixed + least) / whole
    if budget.share * (1 + 1e-12) < share:
        raise ValueError(f"{name}: the smallest ranks take {share:.4g} of the {of}; got {budget.share}")


def saved_by_heads(pair: Pair, ends: Mapping[str, tuple[float, float]], of: Unit) -> float:
    """By how much the smallest heads cost less than the smallest ranks of a pair, if they do."""
    least, most = (sum(each) for each in zip(*(ends[path] for path in pair.kernels), strict=True))
    if isinstance(of, Latency) and pair.side not in of.heads:
        wanted = "measure_latency(model, kernels=select_kernels(model, ...), pairs=True)"
        raise ValueError(f"of: got times without those of the heads of {pair.kernels[0]}, wanted them too: {wanted}")
    times = of.heads[pair.side] if isinstance(of, Latency) else None
    return max(0.0, least - float(cost_of_heads(pair, most, times)[0]))


def budget_of(
    share: float,
    of: Unit = "kernels",
    *,
    flops: float | None = None,
    uniform: bool = False,
    minimum: int = 1,
    maximum: int | None = None,
    multiple_of: int = 1,
) -> Budget:
    """The budget, or one ValueError for what cannot be, before anything is measured."""
    check_unit(of)
    check_share("budget", share, f"the share of the {of} to keep")
    if flops is not None and (uniform or of == "flops"):
        other = "uniform" if uniform else "of='flops'"
        raise ValueError(f"flops: got {flops} with {other}, wanted it beside a budget of something else, not uniform")
    if flops is not None:
        check_share("flops", flops, "the share of the operations that may be left")
    return Budget(share, of, flops, uniform, allowed=allowed_ranks(minimum, maximum, multiple_of))


def check_share(name: str, value: Any, what: str) -> None:
    """A ValueError unless it is a number above 0, and at most 1."""
    wanted = f"{name} is {what}, in (0, 1]"
    found = check_number(value, float("inf"), wanted)
    if not 0 < found <= 1:
        percent = f": {found:g} % is {found / 100:g}" if 5 <= found <= 100 else ""
        raise ValueError(f"{wanted}; got {value!r}{percent}")


def check_unit(of: Unit) -> None:
    """A ValueError for what no budget is of."""
    if of == "latency":
        raise ValueError("of: got 'latency', wanted times of this machine: of=bert_adapter.measure_latency(model)")
    if not isinstance(of, Latency):
        check_name("of", of, UNITS)


def allowed_ranks(minimum: int, maximum: int | None, multiple_of: int) -> range:
    """The ranks that a kernel may have, if it does not stay dense."""
    minimum, step = check_count("minimum", minimum, 1), check_count("multiple_of", multiple_of, 1)
    most = 10**9 if maximum is None else check_count("maximum", maximum, minimum)
    return range(-(-minimum // step) * step, most + 1, step)


def fixed_cost(params: Any, flat: dict[str, Any], shapes: Shapes, of: Unit) -> float:
    """The cost of what is not selected, whatever the ranks."""
    tables = {layer_path(path) for path in flatten_dict(params, keep_empty_nodes=True, sep="/") if is_table(path)}
    others = [(path, leaf) for path, leaf in flat.items() if layer_path(path) not in shapes]
    if isinstance(of, Latency):
        timed = [path for path in shapes if not is_table(kernel_path(flat, path))]
        return max(0.0, of.seconds - sum(costs_in(of, path, shapes[path]).dense for path in timed))
    if of == "kernels":
        return 0.0
    if of == "flops":
        looked_up = {f"{path}/{name}" for path in tables for name in (*kernel_names(), "left")}
        ends = tuple(f"/{name}" for name in (*kernel_names(), "left", "right"))
        return float(sum(2 * leaf.size for path, leaf in others if path.endswith(ends) and path not in looked_up))
    return float(sum(leaf.nbytes if of == "bytes" else leaf.size for _, leaf in others))
