"""Structured pruning after Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", from the paper.

Masks of heads and of the feed-forward layers' neurons: found by the Fisher information of their gradients for what
operations there are (sec. 4.1), dealt anew within each layer by what pruned units do together (sec. 4.2), and tuned
layer by layer by least squares to the dense model's states (sec. 4.3). Models of BERT's layout or MPNet's. The rows of
a kernel that a pruned unit enters are zero, so the model runs as the dense one does; `Pruned` says what would be left.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from benchmarks.candidates import with_leaves
from bert_adapter.checkpoint.names import by_path
from bert_adapter.layers.capture import Batch, capture
from bert_adapter.model import Model, forward

# by the end of the path of what attention's heads enter, that of a layer that the residual enters
HEADS = {"attention/output/dense": "attention/self/query", "attention/attn/o": "attention/attn/q"}
DAMP, FAR = 1.0, 10.0  # of the paper's solver, and beyond which it takes a tuned mask for failed
Gradient = Callable[[Any, Batch, Any], Any]  # (output, batch, key) -> the loss's gradient with respect to the output


class Group(NamedTuple):
    """The units that a mask has: heads of `size` rows, or neurons of one, of the kernel that they enter.

    cost: multiplications for a token that each unit takes, before and after it.
    residual: the path of a layer that what is added to the kernel's output enters too.
    """

    path: str
    residual: str
    size: int
    cost: int


class Pruned(NamedTuple):
    """The model with masked kernels, and the share of the encoder's multiplications with kernels that is left.

    heads: the share of the heads that is left, as attention's own products have it.
    """

    model: Model
    operations: float
    heads: float


def groups_of(dense: Model) -> list[Group]:
    """From the first layer on: the heads of each layer, and then its neurons."""
    config = dense.module.config
    width, wide = config.hidden_size, config.hidden_size // config.num_attention_heads
    found = []
    for path, (heads, residual) in itertools.product(by_path(dense.params), HEADS.items()):
        if path.endswith(f"/{heads}/kernel"):
            layer = path.removesuffix(f"/{heads}/kernel")
            found.append(Group(f"{layer}/{heads}", f"{layer}/{residual}", wide, 4 * width * wide))
            found.append(Group(f"{layer}/output/dense", f"{layer}/intermediate/dense", 1, 2 * width))
    return sorted(found, key=lambda group: int(group.path.split("layer/")[1].split("/")[0]))  # stable


def pruned(dense: Model, batches: list[Batch], budget: float, gradient: Gradient) -> Pruned:
    """The dense model cut to a share of the multiplications with its encoder's kernels."""
    groups = groups_of(dense)
    gradients = mask_gradients(dense, batches, groups, gradient)
    masks = searched(groups, [np.sum(each**2, axis=0) for each in gradients], budget)
    masks = [rearranged(mask, each) for mask, each in zip(masks, gradients, strict=True)]
    total = sum(group.cost * len(mask) for group, mask in zip(groups, masks, strict=True))
    left = sum(group.cost * int(mask.sum()) for group, mask in zip(groups, masks, strict=True))
    heads = np.concatenate([mask for group, mask in zip(groups, masks, strict=True) if group.size > 1])
    return Pruned(tuned(dense, batches, groups, masks), left / total, float(heads.mean()))


def mask_gradients(
    dense: Model, batches: list[Batch], groups: list[Group], gradient: Gradient
) -> list[Float[np.ndarray, "examples units"]]:
    """Of each mask, for each example: the sum of x (W delta), x what enters a kernel W and delta what leaves it."""
    run, paths = forward(dense), frozenset(group.path for group in groups)
    kernels = by_path(dense.params)

    @jax.jit
    def of_batch(params: Any, batch: Batch, key: Any) -> list[Any]:
        found = capture(run, params, batch, paths)
        deltas, _ = found.deltas(gradient(found.output, batch, key))
        both = [(found.inputs[each.path], deltas[each.path] @ kernels[f"{each.path}/kernel"].T) for each in groups]
        sums = [jnp.sum(x * y, axis=1) for x, y in both]
        return [rows.reshape(len(rows), -1, group.size).sum(axis=2) for rows, group in zip(sums, groups, strict=True)]

    params, keys = jax.device_put(dense.params), jax.random.split(jax.random.key(0), len(batches))
    found = [
        [rows[counted(batch)] for rows in jax.device_get(of_batch(params, batch, key))]
        for batch, key in zip(batches, keys, strict=True)
    ]
    return [np.concatenate(each).astype(np.float64) for each in zip(*found, strict=True)]


def counted(batch: Batch) -> Bool[np.ndarray, " batch"]:
    """Which rows count; one that fills a batch up does not."""
    return np.asarray(batch.get("weights", np.ones(len(batch["input_ids"])))) > 0


def searched(
    groups: list[Group], importance: list[Float[np.ndarray, " units"]], budget: float
) -> list[Bool[np.ndarray, " units"]]:
    """The heads and the neurons of most importance, as many of each as lose least for the budget."""
    of_heads, of_neurons = (
        [i for i, group in enumerate(groups) if (group.size > 1) == heads] for heads in (True, False)
    )
    heads, neurons = (np.concatenate([importance[i] for i in each]) for each in (of_heads, of_neurons))
    head, neuron = groups[of_heads[0]].cost, groups[of_neurons[0]].cost
    allowed = budget * (head * len(heads) + neuron * len(neurons))
    lost_heads, lost_neurons = (np.append(np.cumsum(np.sort(each)[::-1])[::-1], 0) for each in (heads, neurons))
    counts = [(kept, min(len(neurons), int((allowed - head * kept) // neuron))) for kept in range(len(heads) + 1)]
    best = min((both for both in counts if both[1] >= 0), key=lambda both: lost_heads[both[0]] + lost_neurons[both[1]])
    masks: list[Any] = [None] * len(groups)
    for each, found, kept in ((of_heads, heads, best[0]), (of_neurons, neurons, best[1])):
        mask = np.zeros(len(found), bool)
        mask[np.argsort(-found, kind="stable")[:kept]] = True
        ends = np.cumsum([len(importance[i]) for i in each])[:-1]
        for i, part in zip(each, np.split(mask, ends), strict=True):
            masks[i] = part
    return masks


def rearranged(
    mask: Bool[np.ndarray, " units"], gradients: Float[np.ndarray, "examples units"]
) -> Bool[np.ndarray, " units"]:
    """As many units, those whose gradients together, not one by one, are small.

    Each unit that is kept, the least important first, is given in exchange for the one whose return helps most.
    """
    mask = mask.copy()
    gram = gradients.T @ gradients
    together = gram[:, ~mask].sum(axis=1)  # of each unit with the sum of those that are pruned
    own = np.diag(gram)
    if mask.all() or not mask.any():
        return mask
    for unit in [i for i in np.argsort(own, kind="stable") if mask[i]]:
        mask[unit] = False
        together += gram[:, unit]
        gone = np.flatnonzero(~mask)
        back = gone[np.argmin(own[gone] - 2 * together[gone])]
        mask[back] = True
        together -= gram[:, back]
    return mask


def tuned(dense: Model, batches: list[Batch], groups: list[Group], masks: list[Bool[np.ndarray, " units"]]) -> Model:
    """The masked model, its masks no longer of ones: each so that what leaves its layer is nearest to the dense state,
    given what the layers before make of it."""
    kernels = {group.path: np.asarray(by_path(dense.params)[f"{group.path}/kernel"]) for group in groups}
    current = dense
    for group, mask in zip(groups, masks, strict=True):
        current = with_mask(current, group, mask, kernels[group.path])
    before = states(dense, dense, batches, groups)
    for group, mask in zip(groups, masks, strict=True):
        if not mask.any():
            continue
        after = states(dense, current, batches, groups)
        (x, h), (r, y) = ((found[group.residual], found[group.path]) for found in (before, after))
        gram, across = normal_equations(x - r + h @ kernels[group.path], y, kernels[group.path], group.size)
        gram, across = gram[np.ix_(mask, mask)], across[mask]
        values = np.zeros(len(mask))
        values[mask] = 1 + np.linalg.solve(gram + DAMP**2 * np.eye(len(gram)), across - gram.sum(axis=1))
        if np.max(np.abs(values)) > FAR:
            break
        current = with_mask(current, group, values, kernels[group.path])
    return current


def with_mask(model: Model, group: Group, mask: np.ndarray, kernel: np.ndarray) -> Model:
    """The model with a unit's rows of the dense kernel times what the mask says."""
    rows = np.repeat(np.asarray(mask, np.float32), group.size)
    return with_leaves(model, {f"{group.path}/kernel": rows[:, None] * kernel})


def states(
    dense: Model, model: Model, batches: list[Batch], groups: list[Group]
) -> dict[str, Float[np.ndarray, "tokens in"]]:
    """By path, what enters the layers of all groups, of a model with the dense one's module; no padding."""
    program = entering(forward(dense), frozenset(path for group in groups for path in (group.path, group.residual)))
    params = jax.device_put(model.params)
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for path, rows in jax.device_get(program(params, batch)).items():
            seen = (np.asarray(batch["attention_mask"]) > 0) & counted(batch)[:, None]
            found.setdefault(path, []).append(rows[seen])
    return {path: np.concatenate(rows) for path, rows in found.items()}


@lru_cache
def entering(run: Any, paths: frozenset[str]) -> Callable[[Any, Batch], dict[str, Any]]:
    """The compiled function (params, batch) -> what enters the layers."""
    return jax.jit(lambda params, batch: capture(run, params, batch, paths).inputs)


def normal_equations(
    wanted: Float[np.ndarray, "tokens out"],
    entered: Float[np.ndarray, "tokens in"],
    kernel: Float[np.ndarray, "in out"],
    size: int,
) -> tuple[Float[np.ndarray, "units units"], Float[np.ndarray, " units"]]:
    """Those of the mask m for which the sum over units of m_i y_i W_i is nearest to what is wanted."""
    gram = (entered.T @ entered).astype(np.float64) * (kernel @ kernel.T)
    across = np.sum(entered * (wanted @ kernel.T), axis=0, dtype=np.float64)
    units = len(gram) // size
    blocks = gram.reshape(units, size, units, size).sum(axis=(1, 3))
    return blocks, across.reshape(units, size).sum(axis=1)
