"""Texts and labelled rows, as batches of token ids."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert_adapter.families.sentence import settings
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.vocabulary import longest_row, tokenizer_of

Texts = Sequence[str] | Sequence[tuple[str, str]]
Tokenizer = Callable[[Texts], dict[str, np.ndarray]]


def tokenizer(model: Model, max_length: int = 128, multiple_of: int = 16) -> Tokenizer:
    """A function from texts, or pairs of texts, to the int32 arrays that the model's module takes by name.

    Rows are cut at max_length, at the model's last position, or where its files say ("max_seq_length" of
    sentence_bert_config.json, or else "model_max_length" of the tokenizer), whichever comes first, and padded to the
    longest of them rounded up to a multiple of multiple_of: few lengths are few compilations. The lengths in
    tokenizer.json are overruled. A default prompt that the files declare is put before every text.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> encode = bert_adapter.tokenizer(sample_model())
        >>> encode(["a red fox", "a dog runs far"])["attention_mask"].sum(axis=1)
        array([5, 6])
    """
    tokenize, prompt = tokenizer_of(model), settings(model.files).prompt
    limit = min(max_length, longest_row(model, tokenize))
    padding = {"input_ids": tokenize.pad_token_id, "attention_mask": 0, "token_type_ids": 0}

    def encode(texts: Texts) -> dict[str, np.ndarray]:
        columns: Any = [list(texts)] if isinstance(texts[0], str) else map(list, zip(*texts, strict=True))
        if prompt:
            columns = [[prompt + text for text in column] for column in columns]
        rows = tokenize(*columns, truncation=True, max_length=limit, return_token_type_ids=True)
        longest = max(map(len, rows["input_ids"]))
        length = min(-(-longest // multiple_of) * multiple_of, limit)
        return {
            name: np.array([row + [value] * (length - len(row)) for row in rows[name]], np.int32)
            for name, value in padding.items()
        }

    return encode


def text_batches(model: Model, texts: Texts, batch_size: int = 16, max_length: int = 128) -> Sequence[Batch]:
    """The texts, or pairs of texts, as batches of about equal length, the longest first.

    The order of the texts is lost.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> batches = bert_adapter.text_batches(sample_model(), ["a dog", "it", "a red fox runs"], batch_size=2)
        >>> [batch["input_ids"].shape for batch in batches]
        [(2, 16), (1, 16)]
    """
    encode = tokenizer(model, max_length)
    ordered: Any = sorted(
        texts, key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)), reverse=True
    )
    return [encode(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]


class LabelledTexts(NamedTuple):
    """Texts, or pairs of texts, and a number for each: a class 0, 1, ..., or a value.

    Example:
      >>> import numpy as np, bert_adapter
      >>> bert_adapter.LabelledTexts(["a fox", "a dog"], np.array([0, 1])).labels.tolist()
      [0, 1]
    """

    texts: Texts
    labels: np.ndarray


def read_rows(file: str | Path) -> LabelledTexts:
    """The rows of a tab-separated file with a heading, such as GLUE's: all columns but "label" are text, one or two.

    Nothing is quoted, as in GLUE. Labels are integers if all of them are.

    Raises:
      ValueError: no column "label", no text or more than two, a row of another length, a label that is no number.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "rows.tsv")
        ...     with open(file, "w") as text:
        ...         _ = text.write("sentence\\tlabel\\na red fox\\t1\\n")
        ...     bert_adapter.read_rows(file).texts
        ['a red fox']
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
    return LabelledTexts(columns, values.astype(np.int32) if whole else values.astype(np.float32))


def labelled_batches(model: Model, rows: LabelledTexts, batch_size: int = 32, max_length: int = 128) -> Sequence[Batch]:
    """The rows as batches of `batch_size` rows of about equal length, with their "labels", the longest first.

    The last batch repeats rows of its own to be as large as the others, with "weights" of 0 for what is repeated.

    Example:
        >>> import numpy as np, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> rows = bert_adapter.LabelledTexts(["a dog", "it", "a red fox runs"], np.array([0, 0, 1]))
        >>> batches = bert_adapter.labelled_batches(sample_model(), rows, batch_size=2)
        >>> [batch["weights"].tolist() for batch in batches]
        [[1.0, 1.0], [1.0, 0.0]]
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
