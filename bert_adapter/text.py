"""Texts and labelled rows, as batches of token ids."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bert_adapter.families import family_of
from bert_adapter.families.sentence import settings
from bert_adapter.labels import as_labels, row_number
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.vocabulary import longest_row, tokenizer_of
from wlra.checks import check_count

Texts = str | Iterable[Any]  # a text, or what holds texts or pairs of texts; see as_texts
Listed = list[str] | list[tuple[str, str]]
Tokenizer = Callable[[Texts], dict[str, np.ndarray]]


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
    found: Any = texts.to_numpy() if hasattr(texts, "to_numpy") else texts  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(found, str) or (isinstance(found, np.ndarray) and found.ndim == 0):
        found = [found if isinstance(found, str) else found.item()]
    if isinstance(found, bytes | Mapping | set | frozenset) or not isinstance(found, Iterable):
        raise ValueError(f"texts: got {type(texts).__name__}, wanted a list of str, or of pairs of str")
    rows: Any = [as_row(row, place, number) for number, row in enumerate(found)]
    if not rows:
        raise ValueError("texts: got none, wanted at least one")
    pair = isinstance(rows[0], tuple)
    for number, row in enumerate(rows):
        if isinstance(row, tuple) != pair:
            kinds = ("a single text", "a pair of texts")
            raise ValueError(f"{place(number)}: got {kinds[not pair]}, wanted {kinds[pair]}, as the first row is")
    return rows


def as_row(row: Any, place: Callable[[int], str], number: int) -> str | tuple[str, ...]:
    """A text, or a pair of them, of which UTF-8 can be made."""
    single = isinstance(row, str)
    several = isinstance(row, tuple | list) or (isinstance(row, np.ndarray) and row.ndim == 1)
    parts: Any = row if several else (row,)
    if len(parts) != (1 if single else 2) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{place(number)}: got {row!r:.80}, wanted a text (str) or a pair of texts")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place(number)}: got {row!r:.80}, which is no Unicode text: {error.reason}") from None
    return str(row) if single else tuple(map(str, parts))


def length_of(text: str | tuple[str, ...]) -> int:
    """How many characters a text, or a pair of them, has."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def tokenizer(model: Model, max_length: int | None = None, multiple_of: int = 16) -> Tokenizer:
    """A function from texts, or pairs of texts, to the int32 arrays that the model's module takes by name.

    Rows are cut where the model's files say ("max_seq_length" of sentence_bert_config.json, or else "model_max_length"
    of the tokenizer), at its last position, or at max_length, whichever comes first, and padded to the
    longest of them rounded up to a multiple of multiple_of: few lengths are few compilations. The lengths in
    tokenizer.json are overruled. A default prompt that the files declare is put before every text. There are no
    "token_type_ids" where the model, or "model_input_names" of the tokenizer, has none. A single text is a list of one;
    see `as_texts` for what else may hold texts.

    Raises:
      ValueError: no tokenizer, or one that does not fit the model; a declaration that cannot be honoured; lengths that
        leave no room for a token of text; or, when called, rows that are no texts.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> encode = bert_adapter.tokenizer(sample_model())
        >>> encode(["a red fox", "a dog runs far"])["attention_mask"].sum(axis=1)
        array([5, 6])
    """
    check_count("multiple_of", multiple_of, 1)
    if max_length is not None:
        check_count("max_length", max_length, 1)
    tokenize, prompt = tokenizer_of(model), settings(model.files).prompt
    declared = longest_row(model, tokenize)
    limit = declared if max_length is None else min(max_length, declared)
    check_room(tokenize, limit, prompt, pair=False)
    typed = "token_type_ids" in family_of(model.config).inputs and "token_type_ids" in tokenize.model_input_names
    padding = {"input_ids": tokenize.pad_token_id, "attention_mask": 0} | ({"token_type_ids": 0} if typed else {})

    def encode(texts: Texts) -> dict[str, np.ndarray]:
        listed = as_texts(texts)
        columns: Any = [listed] if isinstance(listed[0], str) else zip(*listed, strict=True)
        columns = [[prompt + text for text in column] for column in columns]
        check_room(tokenize, limit, prompt, pair=len(columns) == 2)
        rows = tokenize(*columns, truncation=True, max_length=limit, return_token_type_ids=typed)
        longest = max(map(len, rows["input_ids"]))
        length = min(-(-longest // multiple_of) * multiple_of, limit)
        return {
            name: np.array([row + [value] * (length - len(row)) for row in rows[name]], np.int32)
            for name, value in padding.items()
        }

    return encode


def check_room(tokenize: Any, limit: int, prompt: str, pair: bool) -> None:
    """A ValueError if special tokens, and a default prompt, leave no room for a token of each text."""
    texts = "a pair of texts" if pair else "a text"
    special, prompted = tokenize.num_special_tokens_to_add(pair), len(tokenize.tokenize(prompt)) * (1 + pair)
    if limit < (least := special + prompted + 1 + pair):
        taken = f"{special} tokens are special" + (f", {prompted} are the default prompt's" if prompt else "")
        raise ValueError(f"max_length: got {limit}, wanted at least {least} for {texts}: {taken}")


def text_batches(model: Model, texts: Texts, batch_size: int = 16, max_length: int | None = None) -> Sequence[Batch]:
    """The texts, or pairs of texts, as batches of about equal length, the longest first.

    The order of the texts is lost.

    Raises:
      ValueError: as `tokenizer`.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> batches = bert_adapter.text_batches(sample_model(), ["a dog", "it", "a red fox runs"], batch_size=2)
        >>> [batch["input_ids"].shape for batch in batches]
        [(2, 16), (1, 16)]
    """
    check_count("batch_size", batch_size, 1)
    encode = tokenizer(model, max_length)
    ordered: Any = sorted(as_texts(texts), key=length_of, reverse=True)
    return [encode(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]


class Source(NamedTuple):
    """The file that rows were read from, and the line of each."""

    file: str
    lines: Int[np.ndarray, " rows"]


class LabelledTexts(NamedTuple):
    """Texts, or pairs of texts, and a label for each: a class 0, 1, ... or its name, a value, or a row of these.

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


def checked_rows(model: Model, rows: LabelledTexts) -> tuple[Listed, np.ndarray]:
    """The texts in a list, and their labels as the model's head takes them.

    Raises:
      ValueError: a row that is no text, a label that is none of the head's, or not a label for each text.
    """
    texts, labels = as_texts(rows.texts, rows.place), as_labels(model, rows.labels, rows.place)
    if len(texts) != len(labels):
        raise ValueError(f"labels: got {len(labels)}, wanted one for each of {len(texts)} texts")
    return texts, labels


def labelled_batches(
    model: Model, rows: LabelledTexts, batch_size: int = 32, max_length: int | None = None
) -> Sequence[Batch]:
    """The rows as batches of `batch_size` rows of about equal length, with their "labels", the longest first.

    The last batch repeats rows of its own to be as large as the others, with "weights" of 0 for what is repeated.

    Raises:
      ValueError: rows that are no texts, or labels that are missing, not finite, or none of the head's; as `tokenizer`.

    Example:
        >>> import numpy as np, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> rows = bert_adapter.LabelledTexts(["a dog", "it", "a red fox runs"], np.array([0, 0, 1]))
        >>> batches = bert_adapter.labelled_batches(sample_model(), rows, batch_size=2)
        >>> [batch["weights"].tolist() for batch in batches]
        [[1.0, 1.0], [1.0, 0.0]]
    """
    check_count("batch_size", batch_size, 1)
    texts, labels = checked_rows(model, rows)
    encode = tokenizer(model, max_length)
    order = np.argsort([length_of(text) for text in texts], kind="stable")[::-1]
    batches = []
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        filled = np.resize(chosen, min(batch_size, len(order)))
        batch = encode([texts[i] for i in filled])  # pyright: ignore[reportArgumentType]
        weights = (np.arange(len(filled)) < len(chosen)).astype(np.float32)
        batches.append({**batch, "labels": labels[filled], "weights": weights})
    return batches
