"""What batches must hold before work is done on them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from bert_adapter.families import output_of
from bert_adapter.labels import head_of
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.outputs import OUTPUTS


def check_weights(batch: Batch, where: str = "a batch") -> Float[np.ndarray, " batch"]:
    """How often each example counts: its "weights", or 1.

    Raises:
      ValueError: weights that are negative or not finite, or not one for each example.
    """
    count = len(next(iter(batch.values())))
    weights = np.asarray(batch.get("weights", np.ones(count)), float)
    if weights.shape != (count,):
        raise ValueError(f"{where}: got weights of shape {weights.shape}, wanted one for each of {count} examples")
    if not np.all((weights >= 0) & np.isfinite(weights)):
        place = int(np.argmin((weights >= 0) & np.isfinite(weights)))
        raise ValueError(f"{where}, row {place}: got the weight {weights[place]}, wanted a finite one, 0 or more")
    return weights


def unit_weights(batches: Sequence[Batch]) -> list[Batch]:
    """The batches with weights whose mean, over all examples that count, is 1; as they are if none has any.

    Only their proportions mean something, and float32 may not hold them as they are.
    """
    if not any("weights" in batch for batch in batches):
        return list(batches)
    weights = [check_weights(batch, f"batch {number}") for number, batch in enumerate(batches)]
    largest = max((np.max(each, initial=0) for each in weights), default=0)
    shares = [each / (largest or 1) for each in weights]
    counted = np.concatenate([each[each > 0] for each in shares]) if shares else np.ones(0)
    mean = float(np.mean(counted)) if len(counted) else 1.0
    return [{**batch, "weights": (each / mean).astype(np.float32)} for batch, each in zip(batches, shares, strict=True)]


def labelled(model: Model, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, once it is known that each has labels which the model's head can have, and rows that count.

    Raises:
      ValueError: it has not; the message names the batch and the row, both counted from 0.
    """
    for number, batch in enumerate(batches):
        where = f"batch {number}"
        if "labels" not in batch:
            raise ValueError(
                f"{where}: got {sorted(batch)}, wanted 'labels' too: labelled_batches(model, rows) has them"
            )
        if not check_weights(batch, where).any():
            raise ValueError(f"{where}: got no row that counts, wanted some of weight above 0")
        OUTPUTS[output_of(model.module)].check(head_of(model), batch, where)
        yield batch
