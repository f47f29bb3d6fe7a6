"""Rows of batches, those of one shape together, to be dealt into batches of another size."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bert_adapter.batches import check_weights, unit_weights
from bert_adapter.importance.fingerprint import of_arrays
from bert_adapter.layers.capture import Batch
from bert_adapter.outputs.definition import IGNORED

Pool = dict[str, np.ndarray]  # arrays (rows, ...); "weights" says how often each row counts
Said = Callable[[Pool], Pool]  # what a row, an array for each name, says


class Deal(NamedTuple):
    """A batch to be: rows of a pool, and which of them count. One that repeats others fills the batch up."""

    pool: int
    rows: Int[np.ndarray, " batch"]
    counts: Float[np.ndarray, " batch"]


def pools_of(batches: Iterable[Batch]) -> list[Pool]:
    """The rows of all batches that count, those of one shape together, in the order in which they come."""
    found = []
    for number, batch in enumerate(unit_weights(list(batches))):
        weights = check_weights(batch, f"batch {number}").astype(np.float32)
        arrays = {name: np.asarray(array) for name, array in batch.items()} | {"weights": weights}
        found.append({name: array[weights > 0] for name, array in arrays.items()})
    return together(found)


def together(pools: list[Pool]) -> list[Pool]:
    """The rows of one shape in one pool, in the order in which they come."""
    found: dict[Any, list[Pool]] = {}
    for pool in pools:
        kind = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(pool.items()))
        found.setdefault(kind, []).append(pool)
    merged = [{name: np.concatenate([one[name] for one in each]) for name in each[0]} for each in found.values()]
    return [pool for pool in merged if count_of(pool)]


def count_of(pool: Pool) -> int:
    """How many rows it has."""
    return len(pool["weights"])


def all_of(row: Pool) -> Pool:
    """What a row says, where nothing is known of it: all that it holds."""
    return row


def text_of(row: Pool) -> Pool:
    """What a row of tokens says, however long its padding is and whatever its labels are."""
    seen = row.get("attention_mask", np.ones_like(row["input_ids"])) > 0
    return {name: row[name][seen] for name in row if name != "labels" and np.shape(row[name]) == seen.shape}


def unmasked_text_of(row: Pool) -> Pool:
    """The same, with the tokens that were replaced by masks, which are its labels."""
    hidden = row["labels"] if "labels" in row else np.full_like(row["input_ids"], IGNORED)
    return text_of(row | {"input_ids": np.where(hidden == IGNORED, row["input_ids"], hidden)})


def prints_of(pools: list[Pool], said: Said) -> list[list[str]]:
    """For each row a fingerprint of what it says; its weight is no part of that."""

    def told(pool: Pool, row: int) -> str:
        return of_arrays(said({name: array[row] for name, array in pool.items() if name != "weights"}))

    return [[told(pool, row) for row in range(count_of(pool))] for pool in pools]


def held_out(pools: list[Pool], count: int, said: Said = all_of) -> tuple[list[Pool], list[Pool]]:
    """The pools without some `count` rows, and these rows. Which ones they are depends on what the rows say alone.

    Rows that say the same are on one side: where they are many, fewer rows than `count` may be held out, or more if
    there are no fewer, but never all.
    """
    alike: dict[str, list[tuple[int, int]]] = {}
    for number, told in enumerate(prints_of(pools, said)):
        for row, text in enumerate(told):
            alike.setdefault(text, []).append((number, row))
    chosen, left = [np.zeros(count_of(pool), bool) for pool in pools], count
    smallest = min(map(len, alike.values()), default=0)
    for text in sorted(alike) if len(alike) > 1 else ():
        if len(alike[text]) <= left or (left == count and len(alike[text]) == smallest):
            left -= len(alike[text])
            for number, row in alike[text]:
                chosen[number][row] = True
    return parts(pools, [~each for each in chosen]), parts(pools, chosen)


def unlike(pools: list[Pool], others: list[Pool], said: Said) -> list[Pool]:
    """The rows of pools that say what none of the others does."""
    known = {text for told in prints_of(others, said) for text in told}
    return parts(pools, [np.array([text not in known for text in told]) for told in prints_of(pools, said)])


def without(pools: list[Pool], names: Collection[str]) -> list[Pool]:
    """The pools without the arrays of these names."""
    return [{name: array for name, array in pool.items() if name not in names} for pool in pools]


def parts(pools: list[Pool], chosen: list[Bool[np.ndarray, " _rows"]]) -> list[Pool]:
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
