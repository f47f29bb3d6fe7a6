"""Sentences from files with a word a line."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_adapter.reading import plain, read_lines
from bert_adapter.rows import LabelledTexts, Source

TAG = r"O|[A-Z]-.+"  # of entities, in any of the usual schemes
NUMBER, NO_LABEL = "-?[0-9]{1,9}", "-100"  # of classes; and what marks a word that has none
HEADINGS = ("word", "words", "token", "tokens", "form", "id")  # what a first column is called


class Line(NamedTuple):
    """A word with its label, and where it stands."""

    word: str
    tag: str
    number: int
    columns: int


def read_tagged(file: str | Path) -> LabelledTexts:
    """The sentences of a file with a word a line, as CoNLL-2003's: the first column is the word, the last its label.

    In UTF-8, with columns between spaces or tabs, and blank lines between sentences. Lines that begin with "-DOCSTART-"
    are skipped. Labels that are all integers are numbers of classes, and -100 is none.

    Raises:
      OSError: it cannot be read.
      ValueError: another encoding, no sentence, a line of one column, a comment, a heading, a first column that counts
        words, or a label that is none of an entity among such. The message names the line.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "tags.txt")
        ...     with open(file, "w") as text:
        ...         _ = text.write("Ada B-PER\\nruns O\\n\\nFar O\\n")
        ...     bert_adapter.read_tagged(file).labels
        [['B-PER', 'O'], ['O']]
    """
    return tagged_from(file, read_lines(file))


def tagged_from(file: str | Path, lines: list[str]) -> LabelledTexts:
    """The sentences of a file that holds these lines."""
    sentences: list[list[Line]] = []
    inside = False
    for number, line in enumerate(lines, 1):
        cells = cells_of(line)
        if not cells or cells[0] == "-DOCSTART-":
            inside = False
            continue
        if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise ValueError(f"{file}, line {number}: got {line!r:.80}, wanted a word and its label")
        sentences += [] if inside else [[]]
        sentences[-1].append(Line(cells[0], cells[-1].strip(), number, len(cells)))
        inside = True
    if not sentences:
        raise ValueError(f"{file} holds no sentence; wanted a word and its label a line")
    check_sentences(file, sentences)
    words = [[line.word for line in sentence] for sentence in sentences]
    numbers = all(re.fullmatch(NUMBER, line.tag) for sentence in sentences for line in sentence)
    tags = [[int(line.tag) if numbers or line.tag == NO_LABEL else line.tag for line in each] for each in sentences]
    return LabelledTexts(words, tags, Source(str(file), np.array([sentence[0].number for sentence in sentences])))


def cells_of(line: str) -> list[str]:
    """The columns of a line; none of a blank one."""
    return [] if not line.strip() else line.split("\t") if "\t" in line else line.split()


def check_sentences(file: str | Path, sentences: list[list[Line]]) -> None:
    """A ValueError for lines that are no word with its label, as far as that shows."""
    lines = [line for sentence in sentences for line in sentence]
    tags, widths = Counter(line.tag for line in lines), Counter(line.columns for line in lines)
    tagged, usual = any(re.fullmatch("[BIES]-.+", tag) for tag in tags), widths.most_common(1)[0][0]
    wanted = "a word and its label"
    of_words = {line.tag for line in lines if line.word != "#"}
    for line in lines:
        got, named = "", not tagged and line.word == "#" and line.tag not in of_words
        if named or line.word.startswith("# ") or (line.word.startswith("#") and line.columns != usual):
            got, wanted = "a comment", "none: `grep -v '^# '` leaves them out"
        elif (
            line is lines[0] and line.word.lower() in HEADINGS and tags[line.tag] == 1 < len(lines) and not is_tag(line)
        ):
            got = f"a heading, {line.word!r} and {line.tag!r}"
        elif tagged and not is_tag(line) and line.tag != NO_LABEL:
            got = f"the label {line.tag!r}"
            wanted = "O, or B-, I- and so on before a type, as other labels here are"
        if got:
            raise ValueError(f"{file}, line {line.number}: got {got}, wanted {wanted}")
    if max(map(len, sentences)) > 1 and all(map(counts_words, sentences)):
        got = "a first column that counts words, wanted the words: `cut -f 2-` leaves it out"
        raise ValueError(f"{file}, line {lines[0].number}: got {got}")


def is_tag(line: Line) -> bool:
    """Whether its label is that of an entity, or of none."""
    return bool(re.fullmatch(TAG, line.tag))


def counts_words(sentence: list[Line]) -> bool:
    """Whether what should be words are 1, 2, 3, or 0, 1, 2, with ranges between as CoNLL-U has them."""
    numbers = [int(line.word) for line in sentence if re.fullmatch("[0-9]{1,6}", line.word)]
    others = [line.word for line in sentence if not re.fullmatch("[0-9]{1,6}([-.][0-9]+)?", line.word)]
    return not others and numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def words_in(file: str | Path) -> list[str] | list[list[str]]:
    """The texts of a file that need no labels: a text a line, or those of `read_tagged` where lines are words."""
    lines = read_lines(file)
    return tagged_from(file, lines).texts if are_words(lines) else plain(file, lines)


def are_words(lines: list[str]) -> bool:
    """Whether each line is a word and its label: one of an entity, or in as many columns, with blank lines between."""
    cells = [cells_of(line) for line in lines]
    filled = [row for row, each in enumerate(cells) if each]
    tagged = [len(cells[row]) > 1 and bool(re.fullmatch(TAG, cells[row][-1].strip())) for row in filled]
    steps, widths = {int(step) for step in np.diff(filled)}, {len(cells[row]) for row in filled}
    return bool(tagged) and (all(tagged) or (1 in steps and len(steps) > 1 and len(widths) == 1 and min(widths) > 1))
