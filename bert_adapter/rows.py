"""Texts, and labels for them, from whatever holds them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

Texts = str | Iterable[Any]  # a text, or what holds texts or pairs of texts; see as_texts
Listed = list[str] | list[tuple[str, str]]
NO_ROWS = str | bytes | Mapping | set | frozenset  # what holds no rows, or none in an order, and can be iterated
Place = Callable[[int], str]  # what an error calls a row, by its number


def row_number(row: int) -> str:
    """What a row is called that comes from no file."""
    return f"row {row}, counted from 0"


class Source(NamedTuple):
    """The file that rows were read from, and the line of each."""

    file: str
    lines: Int[np.ndarray, " rows"]


class LabelledTexts(NamedTuple):
    """Texts, or pairs of texts, and a label for each: a class 0, 1, ... or its name, a value, or a row of these.

    For labels of words: lists of words, and a class for each word, or -100 for none. For answers: pairs of a question
    and a text, and {"text": [...], "answer_start": [...]}, parts of the text and where they start, as SQuAD has them.
    For a masked LM: texts and None. For choices: a text and a list of choices, and the number of the right one.

    What a model's head takes is known, and checked, when the rows are used. `source` says where they come from.

    Example:
      >>> import numpy as np, bert_adapter
      >>> bert_adapter.LabelledTexts(["a fox", "a dog"], np.array([0, 1])).labels.tolist()
      [0, 1]
    """

    texts: Any
    labels: Any
    source: Source | None = None

    def place(self, row: int) -> str:
        """What an error calls a row."""
        return row_number(row) if self.source is None else f"{self.source.file}, line {self.source.lines[row]}"


def as_texts(texts: Texts, place: Callable[[int], str] = row_number) -> Listed:
    """A list of texts, or of pairs of texts, from whatever holds them; a single text is a list of one.

    Args:
      texts: a list, a tuple, an array, a pandas Series, a generator; pairs also as an array or a DataFrame of two
        columns. An empty text is a text.
      place: (number of a row) -> what an error calls it.

    Raises:
      ValueError: no texts, or a row that is no text and no pair of them, or that is not what the others are. The
        message names the row.
    """
    wanted = "a list of str, or of pairs of str"
    check_no_file(texts, wanted)
    given = rows_in([texts] if isinstance(texts, str) else texts, wanted)
    rows: Any = [as_row(row, place, number) for number, row in enumerate(given)]
    pair = isinstance(rows[0], tuple)
    for number, row in enumerate(rows):
        if isinstance(row, tuple) != pair:
            kinds = ("a single text", "a pair of texts")
            raise ValueError(f"{place(number)}: got {kinds[not pair]}, wanted {kinds[pair]}, as the first row is")
    return rows


def rows_in(texts: Any, wanted: str) -> list[Any]:
    """The rows of whatever holds some in an order; a ValueError says what was wanted."""
    found = texts.to_numpy() if hasattr(texts, "to_numpy") else texts
    if isinstance(found, np.ndarray) and found.ndim == 0:
        found = [found.item()]
    if isinstance(found, NO_ROWS) or not isinstance(found, Iterable):
        raise ValueError(f"texts: got {type(texts).__name__}, wanted {wanted}")
    rows = list(found)
    if not rows:
        raise ValueError(f"texts: got none, wanted at least one: {wanted}")
    return rows


def check_no_file(texts: Any, wanted: str) -> None:
    """A ValueError for the name of a file that is there, in place of what it holds."""
    is_file = False
    with suppress(OSError, ValueError):  # no text is too long, or holds what names cannot
        is_file = isinstance(texts, str | Path) and Path(texts).is_file()
    if is_file:
        name = str(texts)
        raise ValueError(f"texts: got {name!r}, the name of a file, wanted {wanted}: read_texts({name!r}) reads them")


def as_row(row: Any, place: Callable[[int], str], number: int) -> str | tuple[str, ...]:
    """A text, or a pair of them, of which UTF-8 can be made."""
    single = isinstance(row, str)
    several = isinstance(row, tuple | list) or (isinstance(row, np.ndarray) and row.ndim == 1)
    parts: Any = row if several else (row,)
    if len(parts) != (1 if single else 2) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{place(number)}: got {row!r:.80}, wanted a text (str) or a pair of texts")
    check_unicode(parts, place, number)
    return str(row) if single else tuple(map(str, parts))


def check_unicode(parts: Iterable[str], place: Callable[[int], str], number: int) -> None:
    """A ValueError for parts of a row of which UTF-8 cannot be made."""
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        text = str(error.object)
        raise ValueError(f"{place(number)}: got {text!r:.80}, which is no Unicode text: {error.reason}") from None


def length_of(text: str | tuple[str, ...]) -> int:
    """How many characters a text, or a pair of them, has."""
    return len(text) if isinstance(text, str) else sum(map(len, text))
