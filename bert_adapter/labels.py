"""Labels as a model's head takes them: one door for training, for scores and for files."""

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Num

from bert_adapter.families import label_count, output_of, predictive
from bert_adapter.heads import with_head
from bert_adapter.model import Model
from bert_adapter.outputs import OUTPUTS
from bert_adapter.outputs.definition import Head
from bert_adapter.outputs.label_values import labels_for, names_of
from bert_adapter.rows import Place, row_number

NAMED = ("labels", "tokens")  # heads whose classes have names


def head_of(model: Model) -> Head:
    """What labels the model can have."""
    return Head(label_count(model.module) or 0, predictive(model.module), model.config)


def as_labels(model: Model, labels: Any, place: Place = row_number) -> Num[np.ndarray, "rows *width"]:
    """The labels as the model's head takes them.

    Classes are int32 numbers 0, 1, ..., given as such or by the names in the config. Values are float32. A
    head of several labels at once takes rows of 0 and 1 as wide as it is, one of several values rows of values. For a
    model without a head all finite numbers will do, and integers stay int32 where they fit.

    Args:
      labels: one for each row: a list, an array, a pandas Series, or what can be iterated.
      place: (number of a row) -> what an error calls it.

    Raises:
      ValueError: a label that is missing, not finite, or none of the head's. The message names the row.
    """
    return labels_for(head_of(model), labels, place)


def head_wanted(model: Model, head: str | None) -> str:
    """The head that is named, or else the model's, or "labels" where it has none but a pretraining one."""
    has = output_of(model.module)
    bare = label_count(model.module) is None or OUTPUTS[has].pretraining
    return head or ("labels" if bare else has)


def check_same_classes(model: Model, other: Model, name: str) -> None:
    """A ValueError if a class of the model's has another number in the other, by their names in config.json.

    Names that differ in capitals alone are one, and say nothing where one model has both.
    """
    if any(output_of(one.module) not in NAMED or predictive(one.module) == "gaussian" for one in (model, other)):
        return  # what an earlier head has left in the config
    known = [names_of(one.config) for one in (model, other)]
    folded = [Counter(told.casefold() for told in names.values()) for names in known]
    ours, theirs = (
        {told.casefold(): number for number, told in names.items() if counts[told.casefold()] == 1}
        for names, counts in zip(known, folded, strict=True)
    )
    if odd := [number for told, number in ours.items() if theirs.get(told, number) != number]:
        place, got, wanted = odd[0], *([names[number] for number in sorted(names)] for names in known[::-1])
        raise ValueError(
            f"{name}: got a model whose 'id2label' is {got}, wanted {wanted} as the model's is: "
            f"{known[0][place]!r} has another number there, and outputs are compared by number"
        )


def with_head_for(
    model: Model, labels: Any, *, head: str | None = None, seed: int = 0, like: Model | None = None
) -> Model:
    """The model, with a new head for the labels if it has none: for their classes, or for the value of a regression.

    A pretraining head gives way unless it is the one wanted.

    Args:
      labels: as rows have them; of texts, integers are classes, and so are names, in their alphabetical order; numbers
        with a fraction are values.
      head: a name in `OUTPUTS`; see `head_wanted`.
      like: a model whose order of the same names is taken in place of the alphabetical one.

    Raises:
      ValueError: labels that leave open how many classes there are, or a head that cannot be new.
    """
    wanted = head_wanted(model, head)
    if wanted == output_of(model.module):
        return model
    found = OUTPUTS[wanted].classes(labels)
    if not isinstance(found, list):
        return with_head(model, found, head=wanted, seed=seed)
    headed = with_head(model, len(found), head=wanted, seed=seed)
    known = [] if like is None else [name for _, name in sorted(names_of(like.config).items())]
    order = known if sorted(known) == sorted(found) else found
    numbers = {name: number for number, name in enumerate(order)}
    known = {"label2id": numbers, "id2label": {str(number): name for name, number in numbers.items()}}
    return headed._replace(config=headed.config | known)
