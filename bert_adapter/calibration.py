"""Batches to measure on: texts as they are given, and short spans of every other one that is long.

What is measured on long texts alone does not hold for short ones: a quarter of all-MiniLM-L6-v2 loses three times as
much of its score so. Half of both is good for both (`python -m benchmarks.calibration`).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.rows import Texts, check_unicode, row_number, rows_in
from bert_adapter.text import in_batches, reader_of
from wlra.checks import check_count

LONG = 32  # tokens, from which on a text may be cut
SPANS = (8, 32)  # how long spans are, in tokens: the shortest and the longest


def calibration_batches(
    model: Model,
    texts: Texts,
    batch_size: int = 16,
    max_length: int | None = None,
    *,
    prompt_name: str | None = None,
    seed: int = 0,
) -> Sequence[Batch]:
    """The texts as `text_batches` makes batches of them, but every other one of more than 32 tokens is cut to a span.

    A span is of about 8 to 32 tokens, whole words, anywhere in its text: so what is measured holds for short texts too
    where the ones given are long. The first long text stays, the second is cut, and so on; shorter texts, pairs of
    texts, and words stay as they are. Give some hundreds, of the domain and of the lengths that are to come.

    Args are those of `text_batches`, and the seed of the lengths and places.

    Raises:
      ValueError: as `text_batches`.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model(max_position_embeddings=128)
        >>> batches = bert_adapter.calibration_batches(model, ["a dog runs far " * 20, "a red fox runs " * 20])
        >>> [row["attention_mask"].sum(axis=1).tolist() for row in batches]
        [[82, 31]]
    """
    check_count("batch_size", batch_size, 1)
    reader = reader_of(model, max_length, prompt_name=prompt_name)
    return in_batches(model, reader, of_mixed_lengths(reader.tokenize, texts, seed), batch_size)


def of_mixed_lengths(tokenize: Any, texts: Texts, seed: int) -> Any:
    """The texts, every other long one cut; rows that are no single texts stay as they are."""
    if isinstance(texts, Iterator):
        texts = list(texts)  # what it raises is not ours
    try:
        rows = rows_in(texts, "a list of str, or of pairs of str")
    except ValueError:  # what follows says what the model takes
        return texts
    single = [number for number, row in enumerate(rows) if isinstance(row, str)]
    for number in single:
        check_unicode([rows[number]], row_number, number)
    places = dict(zip(single, tokens_of(tokenize, [str(rows[number]) for number in single]), strict=True))
    long = [number for number in single if len(places[number]) > LONG]
    rng = np.random.default_rng(seed)
    for number in long[1::2]:
        rows[number] = span_of(str(rows[number]), places[number], rng)
    return rows


class Token(NamedTuple):
    """Where a token begins and ends in its text, and whether a word begins with it."""

    begin: int
    end: int
    leads: bool


def tokens_of(tokenize: Any, texts: list[str]) -> list[list[Token]]:
    """Those of each text; its words, where the tokenizer cannot tell."""
    if not texts or not getattr(tokenize, "is_fast", False):
        return [[Token(*word.span(), True) for word in re.finditer(r"\S+", text)] for text in texts]
    found = tokenize(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = []
    for number, places in enumerate(found["offset_mapping"]):
        words = found.word_ids(number)
        leads = [first is None or first != before for before, first in zip([None, *words], words, strict=False)]
        tokens.append([Token(*place, leads=lead) for place, lead in zip(places, leads, strict=True)])
    return tokens


def span_of(text: str, tokens: list[Token], rng: np.random.Generator) -> str:
    """Whole words of a text that follow each other, about as many tokens as `SPANS` says."""
    length = int(rng.integers(SPANS[0], SPANS[1] + 1))
    begin = int(rng.integers(len(tokens) - length + 1))
    end = begin + length
    words = [*(place for place, token in enumerate(tokens) if token.leads), len(tokens)]
    first = max((place for place in words if place <= begin), default=begin)
    last = max((place for place in words if first < place <= end), default=end)
    if last - first > SPANS[1]:  # one word without a space in it
        first, last = begin, end
    return text[tokens[first].begin : tokens[last - 1].end]
