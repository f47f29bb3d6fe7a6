"""Rows of a labelled text file, as batches of about equal length."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_adapter.capture import Batch
from bert_adapter.checkpoint import Model, Texts, tokenizer


class Rows(NamedTuple):
    """Texts, or pairs of texts, and a number for each: a class 0, 1, ..., or a value."""

    texts: Texts
    labels: np.ndarray


def read_rows(file: str | Path) -> Rows:
    """The rows of a tab-separated file with a heading, such as GLUE's: all columns but "label" are text, one or two.

    Nothing is quoted, as in GLUE. Labels are integers if all of them are.

    Raises:
      ValueError: no column "label", no text or more than two, a row of another length, a label that is no number.
    """
    lines = Path(file).read_text("utf-8").split("\n")
    heading = lines[0].split("\t")
    if "label" not in heading or not 2 <= len(heading) <= 3:
        raise ValueError(f"{file}: wanted a heading of one or two columns of text and 'label'; got {heading}")
    place = heading.index("label")
    cells = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines[1:], 2) if line.strip()]
    for number, row in cells:
        if len(row) != len(heading):
            raise ValueError(f"{file}, line {number}: wanted {len(heading)} columns; got {len(row)}")
    try:
        values = np.array([float(row[place]) for _, row in cells])
    except ValueError as error:
        raise ValueError(f"{file}: wanted a number in the column 'label': {error}") from None
    if not len(values):
        raise ValueError(f"{file}: wanted rows below the heading; got none")
    whole = all("." not in row[place] for _, row in cells)
    texts = [tuple(cell for i, cell in enumerate(row) if i != place) for _, row in cells]
    columns = [row[0] for row in texts] if len(heading) == 2 else [(row[0], row[1]) for row in texts]
    return Rows(columns, values.astype(np.int32) if whole else values.astype(np.float32))


def labelled_batches(model: Model, rows: Rows, batch_size: int = 32, max_length: int = 128) -> Sequence[Batch]:
    """The rows as batches of `batch_size` rows of about equal length, with their "labels", the longest first.

    The last batch repeats rows of its own to be as large as the others, with "weights" of 0 for what is repeated.
    """
    encode = tokenizer(model, max_length)
    texts: list = list(rows.texts)
    lengths = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]
    order = np.argsort(lengths, kind="stable")[::-1]
    batches = []
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        filled = np.resize(chosen, min(batch_size, len(order)))
        batch = encode([texts[i] for i in filled])
        weights = (np.arange(len(filled)) < len(chosen)).astype(np.float32)
        batches.append({**batch, "labels": rows.labels[filled], "weights": weights})
    return batches
