"""A label for each word of a text, predicted at the word's first token.

Devlin et al. 2019, sec. 5.3: other tokens of a word have no label.
"""

import re
import warnings
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bert_adapter.outputs.definition import (
    IGNORED,
    Example,
    Head,
    Output,
    Reader,
    Run,
    check_classes,
    check_fast,
    check_no_prompt,
    check_room,
    one_for_each,
    padded,
    tokenized,
)
from bert_adapter.outputs.label_values import labels_for, names_of
from bert_adapter.outputs.scores import of_entities
from bert_adapter.rows import NO_ROWS, LabelledTexts, Place, check_unicode, rows_in
from bert_adapter.tagged import read_tagged, words_in

ABOUT = "a label for each word"


def entries(labels: int | None) -> dict[str, Any]:
    """So many classes."""
    if labels is None or labels < 2:
        raise ValueError(f"labels: got {labels}, wanted how many classes a word can have, 2 or more")
    return {"num_labels": labels}


def as_words(texts: Any, place: Place) -> list[list[str]]:
    """Lists of words; a text is cut where it has spaces."""
    rows = rows_in(texts, "a list of texts, or of lists of words")
    found = [row.split() if isinstance(row, str) else list(row) if is_listed(row) else [] for row in rows]
    for row, words in enumerate(found):
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{place(row)}: got {rows[row]!r:.80}, wanted a text (str) or a list of words")
        check_unicode(words, place, row)
    return found


def is_listed(row: Any) -> bool:
    """Whether it holds words, or labels of them, in an order."""
    return isinstance(row, Iterable) and not isinstance(row, NO_ROWS)


def as_tags(head: Head, labels: Any, words: list[list[str]], place: Place) -> list[list[int]]:
    """A class for each word, or -100 where there is none."""
    found = one_for_each(labels, len(words), f"a list for each of {len(words)} texts")
    result = []
    for row, (tags, text) in enumerate(zip(found, words, strict=True)):
        tags = list(tags) if is_listed(tags) else []
        if len(tags) != len(text):
            raise ValueError(f"{place(row)}: got {len(tags)} labels, wanted one for each of {len(text)} words")
        counted = [tag for tag in tags if not is_none(tag)]
        numbers = iter(labels_for(head, counted, lambda word, row=row: place(row)).tolist() if counted else [])
        result.append([IGNORED if is_none(tag) else next(numbers) for tag in tags])
    return result


def is_none(tag: Any) -> bool:
    """Whether it says that a word has no label."""
    return isinstance(tag, int | float | np.number) and tag == IGNORED


def examples(reader: Reader, texts: Any, labels: Any, place: Place) -> list[Example]:
    """The tokens of each text, with the label of a word at the first of its tokens.

    known: for each word, the place of its first token, or None if the row is cut before it or it has no token; and its
    label.
    """
    check_fast(reader, ABOUT)
    check_room(reader, pair=False)
    check_no_prompt(reader, ABOUT)
    words = as_words(texts, place)
    tags = None if labels is None else as_tags(reader.head, labels, words, place)
    rows = tokens_of(reader, words)
    found = []
    for row, text in enumerate(words):
        fields = {name: rows[name][row] for name in reader.inputs}
        owners = rows.word_ids(row)
        first = [owners.index(word) if word in owners else None for word in range(len(text))]
        if tags is not None:
            at = {place: tag for place, tag in zip(first, tags[row], strict=True) if place is not None}
            fields["labels"] = [at.get(token, IGNORED) for token in range(len(owners))]
        found.append(Example(row, len(owners), fields, (first, tags and tags[row])))
    return found


def tokens_of(reader: Reader, words: list[list[str]]) -> Any:
    """What the tokenizer makes of words; some need to be told that they have spaces between them."""
    name, spaces = type(reader.tokenize).__name__, '"add_prefix_space": true in tokenizer_config.json'
    try:
        rows = tokenized(reader, words, is_split_into_words=True)
    except AssertionError:
        raise ValueError(f"{name}: wanted {spaces}, for words have spaces between them") from None
    before = reader.tokenize.backend_tokenizer.pre_tokenizer
    if before is not None and [piece for piece, _ in before.pre_tokenize_str("a")] == ["a"] != [
        piece for piece, _ in before.pre_tokenize_str(" a")
    ]:
        warnings.warn(f"{name}: words are read without the spaces between them; {spaces} keeps them", stacklevel=2)
    return rows


def check(head: Head, batch: Any, where: str) -> None:
    """A class for each token, or -100."""
    check_classes(batch["labels"], batch["input_ids"].shape, head.count, where)


def predict(output: Any, batch: Any) -> Any:
    """The likeliest class of each token."""
    return jnp.argmax(output, axis=-1)


def score(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """The share of words whose class is right; of tags, F1, precision and recall of whole entities.

    A word beyond the longest row is predicted to be of no entity, and counts as wrong unless that is its label.
    """
    found = examples(reader, rows.texts, rows.labels, rows.place)
    names = names_of(reader.head.config)
    outside = next((number for number, name in names.items() if name == "O"), IGNORED)
    said, there = [], []
    for example, classes in zip(found, run(found), strict=True):
        both = [
            (outside if place is None else int(classes[place]), tag)
            for place, tag in zip(*example.known, strict=True)
            if tag != IGNORED
        ]
        said.append([one for one, _ in both])
        there.append([one for _, one in both])
    flat = [[number for row in rows for number in row] for rows in (said, there)]
    if not flat[0]:
        raise ValueError("labels: got none but -100, wanted some to be scored by")
    accuracy = {"accuracy": sum(a == b for a, b in zip(*flat, strict=True)) / len(flat[0])}
    if not are_tags(list(names.values())):
        return accuracy
    return of_entities(*([[names.get(one, "O") for one in row] for row in rows] for rows in (said, there))) | accuracy


def are_tags(names: list[str]) -> bool:
    """Whether the classes are the tags of entities."""
    return any(name != "O" for name in names) and all(re.fullmatch(r"O|[BIES]-.+", name) for name in names)


def classes(labels: Any) -> list[str] | int:
    """The names of all words' labels, "O" first, the others in alphabetical order; or the number of classes."""
    found = {tag for row in labels for tag in row if not is_none(tag)}
    if not found:
        raise ValueError(f"labels: got none but {IGNORED}, wanted some to be trained on")
    if all(isinstance(tag, str) for tag in found):
        return sorted(found, key=lambda name: (name != "O", name))
    if odd := [tag for tag in found if not isinstance(tag, int | np.integer)]:
        raise ValueError(f"labels: got {odd[0]!r} among others, wanted names, or numbers of classes")
    return max(2, max(map(int, found)) + 1)


TOKENS = Output(
    about=ABOUT,
    distribution=lambda config: "categorical",
    entries=entries,
    examples=examples,
    arrays=padded,
    check=check,
    predict=predict,
    score=score,
    classes=classes,
    read=read_tagged,
    texts=words_in,
    files="a word and its label a line, a blank line between sentences, as CoNLL-2003's",
)
