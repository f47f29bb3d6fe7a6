"""Rows of batches, those of one shape together, to be dealt into batches of another size."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bert_adapter.batches import check_weights, unit_weights
from bert_adapter.importance.fingerprint import of_arrays
from bert_adapter.layers.capture import Batch

Pool = dict[str, np.ndarray]  # arrays (rows, ...); "weights" says how often each row counts


class Deal(NamedTuple):
    """A batch to be: rows of a pool, and which of them count. One that repeats others fills the batch up."""

    pool: int
    rows: Int[np.ndarray, " batch"]
    counts: Float[np.ndarray, " batch"]


def pools_of(batches: Iterable[Batch], leave_out: tuple[str, ...] = ()) -> list[Pool]:
    """The rows of all batches that count, those of one shape together, in the order in which they come."""
    found: dict[Any, list[Pool]] = {}
    for number, batch in enumerate(unit_weights(list(batches))):
        weights = check_weights(batch, f"batch {number}").astype(np.float32)
        arrays = {name: np.asarray(array) for name, array in batch.items() if name not in leave_out}
        arrays |= {"weights": weights}
        kind = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(arrays.items()))
        found.setdefault(kind, []).append({name: array[weights > 0] for name, array in arrays.items()})
    merged = [{name: np.concatenate([one[name] for one in each]) for name in each[0]} for each in found.values()]
    return [pool for pool in merged if count_of(pool)]


def count_of(pool: Pool) -> int:
    """How many rows it has."""
    return len(pool["weights"])


def held_out(pools: list[Pool], count: int) -> tuple[list[Pool], list[Pool]]:
    """The pools without `count` rows, and these rows. Which ones they are depends on what the rows hold alone.

    Rows that hold the same are neighbours, so that hardly any is on both sides.
    """
    prints = [
        (of_arrays({name: array[row] for name, array in pool.items()}), number, row)
        for number, pool in enumerate(pools)
        for row in range(count_of(pool))
    ]
    chosen = [np.zeros(count_of(pool), bool) for pool in pools]
    for _, number, row in sorted(prints)[:count]:
        chosen[number][row] = True
    return parts(pools, [~each for each in chosen]), parts(pools, chosen)


def parts(pools: list[Pool], chosen: list[Bool[np.ndarray, " rows"]]) -> list[Pool]:
    """The rows chosen of each pool that has any."""
    found = [{name: array[which] for name, array in pool.items()} for pool, which in zip(pools, chosen, strict=True)]
    return [pool for pool in found if count_of(pool)]


def dealt(pools: list[Pool], size: int, rng: np.random.Generator | None = None) -> list[Deal]:
    """Batches of all rows, each with rows of one pool: in their order, or in a random one.

    All batches of a pool are of one size, so that one program serves them.
    """
    deals = []
    for number, pool in enumerate(pools):
        count = count_of(pool)
        order = np.arange(count) if rng is None else rng.permutation(count)
        width = min(size, count)
        for begin in range(0, count, width):
            rows = order[begin : begin + width]
            counts = np.arange(width) < len(rows)
            deals.append(Deal(number, np.resize(rows, width), counts.astype(np.float32)))
    return deals if rng is None else [deals[i] for i in rng.permutation(len(deals))]


def batch_of(pools: list[Pool], deal: Deal) -> Pool:
    """The rows as a batch; what fills it up has weight 0."""
    batch = {name: array[deal.rows] for name, array in pools[deal.pool].items()}
    return batch | {"weights": batch["weights"] * deal.counts}


def epochs_of(pools: list[Pool], size: int, epochs: int, seed: int) -> Iterator[Deal]:
    """The batches of all epochs, each dealt anew."""
    for epoch in range(epochs):
        yield from dealt(pools, size, np.random.default_rng([seed, epoch]))
