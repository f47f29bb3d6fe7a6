"""Which of several continuations fits a text."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from bert_adapter.outputs.definition import (
    Example,
    Head,
    Output,
    Reader,
    Run,
    check_classes,
    check_no_prompt,
    check_room,
    padded,
    tokenized,
)
from bert_adapter.outputs.label_values import labels_for
from bert_adapter.reading import read_choices
from bert_adapter.rows import LabelledTexts, Place, check_unicode, rows_in

ABOUT = "which of several choices fits a text"


def entries(labels: int | None) -> dict[str, Any]:
    """One number for each choice, of which there may be any number."""
    if labels is not None:
        raise ValueError(f"labels: got {labels}, wanted None: a batch says how many choices there are")
    return {}


def as_choices(texts: Any, place: Place) -> list[tuple[str, list[str]]]:
    """A text, and what may follow it, as many for each row."""
    rows = rows_in(texts, "rows of a text and a list of choices")
    found = [(row[0], list(row[1])) if is_choice(row) else None for row in rows]
    count = next((len(each[1]) for each in found if each), 2)
    for row, each in enumerate(found):
        if each is None or len(each[1]) != count or count < 2:
            wanted = f"a text and a list of {'two or more' if count < 2 else count} choices"
            raise ValueError(f"{place(row)}: got {rows[row]!r:.80}, wanted {wanted}, as the first row has")
        check_unicode([each[0], *each[1]], place, row)
    return [each for each in found if each]


def is_choice(row: Any) -> bool:
    """Whether it is a text and a list of texts."""
    two = isinstance(row, tuple | list) and len(row) == 2 and isinstance(row[0], str)
    return two and isinstance(row[1], tuple | list) and all(isinstance(choice, str) for choice in row[1])


def examples(reader: Reader, texts: Any, labels: Any, place: Place) -> list[Example]:
    """The tokens of each text with each of its choices."""
    check_room(reader, pair=True)
    check_no_prompt(reader, ABOUT)
    rows = as_choices(texts, place)
    width = len(rows[0][1])
    chosen = None if labels is None else labels_for(reader.head._replace(count=width, config={}), labels, place)
    if chosen is not None and len(chosen) != len(rows):
        raise ValueError(f"labels: got {len(chosen)}, wanted one for each of {len(rows)} texts")
    first, second = [text for text, _ in rows for _ in range(width)], [choice for _, each in rows for choice in each]
    tokens = tokenized(reader, first, second)
    found = []
    for row in range(len(rows)):
        fields: dict[str, Any] = {name: tokens[name][row * width : (row + 1) * width] for name in reader.inputs}
        size, known = max(map(len, fields["input_ids"])), None if chosen is None else int(chosen[row])
        found.append(Example(row, size, fields if known is None else {**fields, "labels": known}, known))
    return found


def check(head: Head, batch: Any, where: str) -> None:
    """One of the choices for each row."""
    check_classes(batch["labels"], batch["input_ids"].shape[:1], batch["input_ids"].shape[1], where)


def predict(output: Any, batch: Any) -> Any:
    """The likeliest choice."""
    return jnp.argmax(output, axis=1)


def score(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """The share of rows whose choice is right."""
    found = examples(reader, rows.texts, rows.labels, rows.place)
    return {"accuracy": float(np.mean(np.array(run(found)) == [example.known for example in found]))}


CHOICE = Output(
    about=ABOUT,
    distribution=lambda config: "categorical",
    entries=entries,
    examples=examples,
    arrays=padded,
    check=check,
    predict=predict,
    score=score,
    classes=lambda labels: None,
    read=read_choices,
    texts=lambda file: read_choices(file).texts,
    files='a JSON object a line: "text", "choices" (a list), "label" (the number of the right one)',
)
