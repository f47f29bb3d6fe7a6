"""Which tokens of a text answer a question.

Devlin et al. 2019, sec. 4.2 and 4.3. A text that is too long for a row is cut into rows that overlap by a third, each
an example; where the answer is not whole in one of them, its label is the first token, which stands for no answer.
"""

from typing import Any, NamedTuple

import numpy as np

from bert_adapter.outputs.definition import (
    Example,
    Head,
    Output,
    Reader,
    Run,
    as_they_are,
    check_classes,
    check_fast,
    check_no_prompt,
    check_room,
    one_for_each,
    padded,
    tokenized,
)
from bert_adapter.outputs.scores import of_answers
from bert_adapter.reading import read_questions
from bert_adapter.rows import LabelledTexts, Place, as_texts

ABOUT = "the answer to a question in a text"
LONGEST = 30  # tokens of an answer


class Window(NamedTuple):
    """Where the tokens of a row lie in the text: the first and the last letter's end; None for what is not of it."""

    text: str
    places: list[tuple[int, int] | None]


def entries(labels: int | None) -> dict[str, Any]:
    """A number for the start and one for the end."""
    if labels not in (None, 2):
        raise ValueError(f"labels: got {labels}, wanted None: an answer has a start and an end")
    return {"num_labels": 2}


def as_pairs(texts: Any, place: Place) -> list[tuple[str, str]]:
    """Questions, each with a text."""
    pairs: Any = as_texts(texts, place)
    if isinstance(pairs[0], str):
        raise ValueError(f"{place(0)}: got a single text, wanted a question and a text that has the answer")
    return pairs


def listed(part: Any) -> list[Any]:
    """A list, a tuple or an array as a list; else one of nothing, which fits no answer."""
    return list(part) if isinstance(part, list | tuple | np.ndarray) else [None]


def as_answers(labels: Any, texts: list[tuple[str, str]], place: Place) -> list[list[tuple[int, str]]]:
    """For each row, where its answers start in the text, and the answers; none if there is none."""
    found = one_for_each(labels, len(texts), f"the answers to each of {len(texts)} questions")
    result = []
    for row, (answers, (_, text)) in enumerate(zip(found, texts, strict=True)):
        given = answers if isinstance(answers, dict) else {}
        starts, said = (listed(given.get(name)) for name in ("answer_start", "text"))
        fits = len(starts) == len(said) and all(
            isinstance(start, int | np.integer) and isinstance(one, str) and one and text[start:].startswith(one)
            for start, one in zip(starts, said, strict=False)
        )
        if not fits or any(start < 0 for start in starts):
            raise ValueError(
                f"{place(row)}: got the answers {answers!r:.80}, wanted an object with 'text', a list of parts of the "
                f"text, and 'answer_start', the place of the first letter of each"
            )
        result.append(list(zip(map(int, starts), said, strict=True)))
    return result


def examples(reader: Reader, texts: Any, labels: Any, place: Place) -> list[Example]:
    """The tokens of each question and text, in as many rows as it takes."""
    check_fast(reader, ABOUT)
    check_room(reader, pair=True)
    check_no_prompt(reader, ABOUT)
    pairs = as_pairs(texts, place)
    answers = None if labels is None else as_answers(labels, pairs, place)
    found = []
    for row, (question, text) in enumerate(pairs):
        tokens = windows(reader, question, text, place(row))
        for number in range(len(tokens["input_ids"])):
            at = zip(tokens["offset_mapping"][number], tokens.sequence_ids(number), strict=True)
            places = [tuple(place) if part == 1 else None for place, part in at]
            fields: dict[str, Any] = {name: tokens[name][number] for name in reader.inputs}
            if answers is not None:
                fields["labels"] = tokens_of(places, answers[row])  # no list, which would be padded
            found.append(Example(row, len(places), fields, Window(text, places)))
    return found


def windows(reader: Reader, question: str, text: str, where: str) -> Any:
    """The rows of a question and a text, which have room for eight tokens of the text or all of it."""
    tokenize = reader.tokenize
    asked = len(tokenize.tokenize(question)) + tokenize.num_special_tokens_to_add(pair=True)
    room = reader.limit - asked
    if room < 8 and room < len(tokenize.tokenize(text)):
        most = f"{reader.limit - 8}, to leave room for the text: a larger max_length has more"
        raise ValueError(f"{where}: got a question of {asked} tokens, wanted at most {most}")
    how = {"truncation": "only_second", "return_overflowing_tokens": True, "return_offsets_mapping": True}
    return tokenized(reader, [question], [text], stride=max(room, 0) // 3, **how)


def tokens_of(places: list[tuple[int, int] | None], answers: list[tuple[int, str]]) -> tuple[int, int]:
    """The first and the last token of the first answer; the row's first token twice if it is not whole in the row."""
    for start, said in answers[:1]:
        start, end = start + len(said) - len(said.lstrip()), start + len(said.rstrip())  # no token covers a space
        inside = [token for token, at in enumerate(places) if at and at[0] < end and at[1] > start]
        if inside and (places[inside[0]] or (0, 0))[0] <= start and (places[inside[-1]] or (0, 0))[1] >= end:
            return inside[0], inside[-1]
    return 0, 0


def check(head: Head, batch: Any, where: str) -> None:
    """The numbers of two tokens for each row, or -100."""
    rows, length = batch["input_ids"].shape
    check_classes(batch["labels"], (rows, 2), length, where)


def best(window: Window, logits: np.ndarray) -> tuple[float, str]:
    """The answer of at most `LONGEST` tokens with the largest sum of logits, and the sum."""
    here = [token for token, at in enumerate(window.places) if at and at[1] > at[0]]
    if not here:
        return -np.inf, ""
    starts, ends = logits[here, 0], logits[here, 1]
    length = np.array(here)[None, :] - np.array(here)[:, None]
    sums = np.where((length >= 0) & (length < LONGEST), starts[:, None] + ends[None, :], -np.inf)
    first, last = np.unravel_index(np.argmax(sums), sums.shape)
    begin, end = window.places[here[first]], window.places[here[last]]
    assert begin is not None
    assert end is not None
    return float(sums[first, last]), window.text[begin[0] : end[1]]


def score(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """The share of answers that are exact, and the mean F1 of their words, as SQuAD counts them.

    If some question has no answer, none is given where the first token's logits are higher.
    """
    pairs = as_pairs(rows.texts, rows.place)
    known = as_answers(rows.labels, pairs, rows.place)
    may_be_none = not all(known)
    found = examples(reader, pairs, None, rows.place)
    answers: list[tuple[float, str]] = [(-np.inf, "")] * len(pairs)
    none = np.full(len(pairs), np.inf)
    for example, logits in zip(found, run(found), strict=True):
        answers[example.row] = max(answers[example.row], best(example.known, logits), key=lambda each: each[0])
        none[example.row] = min(none[example.row], float(logits[0].sum()))
    said = ["" if may_be_none and none[row] >= value else text for row, (value, text) in enumerate(answers)]
    return of_answers(said, [[text for _, text in each] for each in known])


ANSWER = Output(
    about=ABOUT,
    distribution=lambda config: "span",
    entries=entries,
    examples=examples,
    arrays=padded,
    check=check,
    predict=as_they_are,
    score=score,
    classes=lambda labels: None,
    read=read_questions,
    texts=lambda file: read_questions(file).texts,
    files='a JSON object a line, as SQuAD\'s rows: "question", "context", "answers" ("text", "answer_start")',
)
