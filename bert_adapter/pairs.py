"""Which heads of attention keep how many dimensions.

Query and key meet in the dimensions of a head alone, and so do value and output. An identity between the two that is
factorised at rank r, and multiplied into both, leaves r dimensions: narrower dense kernels in place of two products
each, and attention's own products with them. Identities are weighed as kernels are, by what enters them and the
gradients of what leaves them, and all heads of a layer keep as many dimensions.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from bert_adapter.choices import Choices, all_plans, useful
from bert_adapter.factorisation import KernelReport
from bert_adapter.head_sizes import SIDES, Pair, check_heads, pairs_of, smaller_sizes, with_factors_between
from bert_adapter.kernels import Shapes, break_even
from bert_adapter.latency import Costs
from bert_adapter.model import Model
from wlra.components import Decomposed, cut

NARROW = "NARROW"  # what a report says of kernels whose heads have fewer dimensions


class Option(NamedTuple):
    """What a pair can be: kernels of these ranks, or heads of so many dimensions."""

    ranks: tuple[int, int]
    size: int | None = None


def with_identities(model: Model) -> Model:
    """The same outputs, through an identity for each head after queries and after values.

    What is measured on it, or decomposed, is what `compress(model, ..., pairs=True)` takes as `importance`, for any
    number of budgets.

    Raises:
      ValueError: the model's heads cannot have fewer dimensions.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> model = bert_adapter.with_identities(sample_model())
      >>> model.params["encoder"]["layer"]["0"]["attention"]["self"]["query_1"]["kernel"].shape
      (8, 8)
    """
    check_heads(model)
    flat: dict[str, Any] = dict(flatten_dict(model.params, keep_empty_nodes=True, sep="/"))
    for pair in pairs_of(model):
        flat |= {f"{path}/kernel": np.eye(pair.size, dtype=np.float32) for path in pair.identities}
    module: Any = model.module
    module = module.clone(config=replace(module.config, identities=True))
    return model._replace(module=module, params=unflatten_dict(flat, sep="/"))


def in_pairs(
    choices: Mapping[str, Choices],
    pairs: Iterable[Pair],
    losses: Mapping[str, Any],
    times: Mapping[int, Costs] | None = None,
) -> tuple[dict[str, Choices], dict[str, list[Option]]]:
    """The choices of each pair at once in the place of its first kernel's, whose "ranks" are numbers of options.

    choices: of kernels, by path.
    losses: of identities, by path and rank, from 0 on.
    times: by side, of heads by their dimensions, where costs are seconds.
    """
    found, options = dict(choices), {}
    for pair in pairs:
        apart, ranks = both(*(useful(found.pop(path)) for path in pair.kernels))
        lost = np.sum([losses[path] for path in pair.identities], axis=0)
        heads = of_heads(pair, lost, apart, None if times is None else times[pair.side])
        path = pair.kernels[0]
        options[path] = [*(Option((0, 0), int(size)) for size in heads.rank), *map(Option, ranks)]
        together = (np.concatenate(arrays) for arrays in zip(heads, apart, strict=True))
        found[path] = Choices(*together)._replace(rank=np.arange(len(options[path])))
    return found, options


def of_heads(pair: Pair, losses: Float[np.ndarray, " sizes"], apart: Choices, times: Costs | None) -> Choices:
    """What all heads of a layer can be at once, and the dimensions of each then.

    losses: by dimensions, from 0 on.
    apart: what the two kernels can be instead, whole ones last.
    """
    sizes = smaller_sizes(pair.size)
    cost, flops = cost_of_heads(pair, float(apart.cost[-1]), times), cost_of_heads(pair, float(apart.flops[-1]), None)
    return Choices(sizes, cost, losses[sizes], bits=np.zeros(len(sizes), int), flops=flops)


def cost_of_heads(pair: Pair, whole: float, times: Costs | None) -> Float[np.ndarray, " sizes"]:
    """By the dimensions that heads may keep, of kernels that cost so much whole."""
    sizes = smaller_sizes(pair.size)
    if times is None:
        return whole * sizes / pair.size
    return whole - (times.at(np.array([pair.size])) - times.at(sizes))


def by_kernel(
    chosen: Mapping[str, int], pairs: Iterable[Pair], options: Mapping[str, list[Option]], shapes: Shapes
) -> tuple[dict[str, int], dict[str, int]]:
    """The ranks of all kernels, and by the first kernel of a pair, which stay dense, the dimensions of their heads."""
    ranks, heads = dict(chosen), {}
    for pair in pairs:
        first = pair.kernels[0]
        option, dense = options[first][chosen[first]], [math.ceil(break_even(shapes[path])) for path in pair.kernels]
        ranks |= zip(pair.kernels, option.ranks if option.size is None else dense, strict=True)
        heads |= {} if option.size is None else {first: option.size}
    return ranks, heads


def both(first: Choices, second: Choices) -> tuple[Choices, list[tuple[int, int]]]:
    """What two kernels can be together, of the ranks of each that save most for their cost."""
    curve, chosen, found = all_plans({"first": first, "second": second}, 0.0, 1.0), [0, 0], []
    for kernel, option in zip(curve.kernel, curve.option, strict=True):
        chosen[kernel] = option
        found.append(tuple(chosen))
    one, other = np.array(found[1:]).T  # after the first step, which gives one of them alone a rank
    ranks = list(zip(first.rank[one].tolist(), second.rank[other].tolist(), strict=True))
    loss = first.loss[one] + second.loss[other]
    count, bits = np.arange(len(one)), np.zeros(len(one), int)
    return Choices(count, curve.share[1:], loss, bits=bits, flops=curve.flops[1:]), ranks


def narrowed(model: Model, pairs: Iterable[Pair], sizes: Mapping[str, int], known: Mapping[str, Decomposed]) -> Model:
    """The model with heads of these dimensions, by the path of a pair's first kernel."""
    factors = {}
    for pair in pairs:
        if (size := sizes.get(pair.kernels[0])) is not None:
            lefts, rights = zip(*(cut(known[path], size) for path in pair.identities), strict=True)
            factors[pair.layer, pair.side] = np.stack(lefts), np.swapaxes(np.stack(rights), 1, 2)
    return with_factors_between(model, factors) if factors else model


def of_whole(known: Mapping[str, Any], pairs: Iterable[Pair], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What is known of kernels' inputs, but for those whose inputs are heads that have other dimensions now."""
    outputs = {pair.kernels[1] for pair in pairs if pair.kernels[0] in sizes and SIDES[pair.side][1] == "output"}
    return {path: each for path, each in known.items() if path not in outputs}


def reported(kernels: list[KernelReport], pairs: Iterable[Pair], sizes: Mapping[str, int]) -> list[KernelReport]:
    """The reports, with what became of each kernel whose heads have fewer dimensions."""
    of_pair = {
        path: (pair, sizes[pair.kernels[0]]) for pair in pairs if pair.kernels[0] in sizes for path in pair.kernels
    }

    def one(kernel: KernelReport) -> KernelReport:
        if kernel.path not in of_pair:
            return kernel
        pair, size = of_pair[kernel.path]
        heads = len(pair.identities)
        after = kernel.parameters_before * size // pair.size
        return kernel._replace(rank=heads * size, parameters_after=after, status=NARROW)

    return [one(kernel) for kernel in kernels]
