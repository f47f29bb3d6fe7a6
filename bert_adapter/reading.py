"""Texts and labelled rows from files."""

import codecs
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bert_adapter.files import path_of
from bert_adapter.json_files import parsed, shown
from bert_adapter.rows import LabelledTexts, Listed, Source

MARKS = {  # of encodings that are not ours; those of UTF-32 begin as those of UTF-16 do
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_lines(file: str | Path) -> list[str]:
    """The lines of a text in UTF-8, whatever ends them; a byte-order mark is skipped.

    Raises:
      OSError: it cannot be read.
      ValueError: it is in another encoding; the message names the line.
    """
    data = path_of(file).read_bytes()
    if name := next((name for mark, name in MARKS.items() if data.startswith(mark)), None):
        raise ValueError(f"{file}: got {name}, wanted UTF-8: iconv -f {name} -t UTF-8 converts it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{file}, line {line}: got the byte 0x{data[error.start]:02x}, wanted UTF-8; from "
            f"Latin-1, iconv -f LATIN1 -t UTF-8 converts it"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{file}, line {line}: got a NUL, wanted UTF-8: this is UTF-16, or no text")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_texts(file: str | Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
      OSError: it cannot be read.
      ValueError: it is in another encoding than UTF-8, or all blank, or a table or JSON: no text a line.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "sentences.txt")
        ...     with open(file, "w") as text:
        ...         _ = text.write("a red fox\\n\\na dog\\n")
        ...     bert_adapter.read_texts(file)
        ['a red fox', 'a dog']
    """
    return plain(file, read_lines(file))


def texts_in(file: str | Path) -> Listed:
    """The texts of a file that need no labels: a text a line, or those of `read_rows` where a heading has 'label'."""
    lines = read_lines(file)
    return rows_from(file, lines, labelled=False).texts if "label" in columns_of(lines[0]) else plain(file, lines)


def columns_of(line: str) -> list[str]:
    """What stands between the tabs of a line; nothing where it has none."""
    return line.split("\t") if "\t" in line else []


def plain(file: str | Path, lines: list[str]) -> list[str]:
    """The lines that are not blank, if they are texts."""
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{file} holds no text; wanted a sentence a line")
    if "label" in columns_of(texts[0]) and not lines[0].strip():
        raise ValueError(
            f"{file}: got a blank line before the heading, wanted the heading first: `sed '/./,$!d'` drops it"
        )
    if "label" in columns_of(texts[0]):
        raise ValueError(f"{file}: got a heading with 'label', wanted a text a line: read_rows reads such a file")
    if has_commas(texts[0]):
        raise ValueError(
            f"{file}: got a heading with commas, {texts[0]!r:.80}, wanted a text a line, or tabs for commas: "
            f"pandas writes them with to_csv(file, sep='\\t', index=False)"
        )
    tabs = {line.count("\t") for line in texts}
    if len(texts) > 1 and tabs != {0} and len(tabs) == 1:
        raise ValueError(
            f"{file}: got {tabs.pop() + 1} columns in every line, wanted a text a line, or a heading with 'label': "
            f"`cut -f 1` writes the first column; pairs have a third column, 'label', empty if there are none"
        )
    if is_json(texts[0]):
        raise ValueError(
            f"{file}: got JSON, {texts[0]!r:.60}, wanted a text a line: `jq -r .text` writes the entry 'text'"
        )
    return texts


COLUMNS = {"text", "sentence", "label", "labels", "score", "target", "class", "idx", "id", "premise", "query"}


def has_commas(line: str) -> bool:
    """Whether it is the heading of a file whose columns stand between commas."""
    names = [name.strip().strip('"').lower() for name in re.split("[,;]", line)]
    known = COLUMNS & set(names)
    return all(re.fullmatch(r"\w+", name) for name in names) and (len(known) > 1 or bool({"label", "labels"} & known))


def is_json(line: str) -> bool:
    """Whether a file that begins so holds JSON."""
    try:
        return isinstance(json.loads(line), dict) if line.lstrip().startswith("{") else line.strip() == "["
    except ValueError:
        return line.strip() == "{"


def read_rows(file: str | Path) -> LabelledTexts:
    """The rows of a tab-separated file with a heading, such as GLUE's: all columns but "label" are text, one or two.

    In UTF-8. Nothing is quoted, as in GLUE; a warning says where a cell looks as if it were. Labels are integers if all
    of them are, or all numbers, or all names.

    Raises:
      OSError: it cannot be read.
      ValueError: another encoding, no column "label", no text or more than two, an index in place of a text, a row of
        another length, a text that is missing, or a label that is missing, not finite, or not of the kind of the
        others. The message names the line.

    Example:
        >>> import os, tempfile, bert_adapter
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "rows.tsv")
        ...     with open(file, "w") as text:
        ...         _ = text.write("sentence\\tlabel\\na red fox\\t1\\n")
        ...     bert_adapter.read_rows(file).texts
        ['a red fox']
    """
    return rows_from(file, read_lines(file))


def rows_from(file: str | Path, given: list[str], labelled: bool = True) -> LabelledTexts:
    """The rows of a file that holds these lines; without labels, which may then be anything, if none are wanted."""
    heading, *lines = (line.split("\t") for line in given)
    if heading.count("label") != 1 or not 2 <= len(heading) <= 3:
        raise ValueError(f"{file}: wanted a heading of one or two columns of text and 'label'; got {heading}")
    check_heading(file, heading)
    place = heading.index("label")
    cells = [(number, row) for number, row in enumerate(lines, 2) if len(row) > 1 or row[0].strip()]
    for number, row in cells:
        if len(row) != len(heading):
            raise ValueError(f"{file}, line {number}: wanted {len(heading)} columns; got {len(row)}")
    if not cells:
        raise ValueError(f"{file}: wanted rows below the heading; got none")
    source = Source(str(file), np.array([number for number, _ in cells]))
    texts = [tuple(cell for i, cell in enumerate(row) if i != place) for _, row in cells]
    check_cells(texts, [name for name in heading if name != "label"], source)
    columns = [row[0] for row in texts] if len(heading) == 2 else [(row[0], row[1]) for row in texts]
    labels = labels_in([row[place] for _, row in cells], source) if labelled else None
    return LabelledTexts(columns, labels, source)


NO_INDEX = "wanted texts: pandas writes no index with to_csv(file, sep='\\t', index=False)"


def check_heading(file: str | Path, heading: list[str]) -> None:
    """A ValueError for a column that by its name is an index, and no text."""
    for name in heading:
        if name.strip().lower() in ("", "idx", "index", "id") or name.startswith("Unnamed: "):
            raise ValueError(f"{file}: got a column called {name!r} in the heading {heading}, {NO_INDEX}")


def check_cells(rows: list[tuple[str, ...]], names: list[str], source: Source) -> None:
    """A ValueError for a text that is missing, or a column of integers; a warning for one that looks quoted."""
    for row, line in zip(rows, source.lines, strict=True):
        for name, cell in zip(names, row, strict=True):
            if not cell.strip():
                raise ValueError(f"{source.file}, line {line}: got {cell!r} in the column {name!r}, wanted a text")
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        if all(re.fullmatch(r"\s*[+-]?[0-9]+\s*", cell) for cell in column):
            raise ValueError(f"{source.file}: got an integer in every row of the column {name!r}, {NO_INDEX}")
        quoted = (cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] for cell in column)
        if line := next((line for line, each in zip(source.lines, quoted, strict=True) if each), None):
            said = "got a quoted cell, whose quotes are read as text: pandas writes none with quoting=csv.QUOTE_NONE"
            warnings.warn(f"{source.file}, line {line}: {said}", stacklevel=4)


KINDS = {"an integer": np.int32, "a number": np.float32, "a name": np.str_}


def labels_in(cells: list[str], source: Source) -> np.ndarray:
    """The column's labels: of the kind of the first, where an integer is a number too."""
    kinds = [kind_of(cell.strip()) for cell in cells]
    names = kinds[0] == "a name"
    for cell, kind, line in zip(cells, kinds, source.lines, strict=True):
        if not kind or (kind == "a name") != names:
            wanted = "a name, as in the first row" if names else "a finite number"
            raise ValueError(f"{source.file}, line {line}: got {cell!r} in the column 'label', wanted {wanted}")
    kind = next((name for name in ("a name", "a number") if name in kinds), "an integer")
    return np.array([cell.strip() for cell in cells]).astype(KINDS[kind])


def kind_of(cell: str) -> str:
    """What a cell holds; nothing if it is empty, or no number that is finite in its type."""
    if re.fullmatch(r"[+-]?[0-9]{1,12}", cell) and abs(int(cell)) <= np.iinfo(np.int32).max:
        return "an integer"
    try:
        value = float(cell)
    except ValueError:
        return "a name" if cell else ""
    return "a number" if "_" not in cell and abs(value) <= float(np.finfo(np.float32).max) else ""


def read_questions(file: str | Path) -> LabelledTexts:
    """The questions of a file with a JSON object a line: "question", "context", and "answers" as in SQuAD's rows.

    The answers are an object of two lists, "text" and "answer_start", the place of each answer's first letter in the
    context; both are empty for a question that has none.

    Raises:
      OSError: it cannot be read.
      ValueError: another encoding, no rows, no JSON, or an entry that is missing or of another type. The message names
        the line.

    Example:
        >>> import json, os, tempfile, bert_adapter
        >>> answers = {"text": ["A fox"], "answer_start": [0]}
        >>> row = {"question": "Who runs?", "context": "A fox runs.", "answers": answers}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "questions.jsonl")
        ...     with open(file, "w") as text:
        ...         _ = text.write(json.dumps(row))
        ...     bert_adapter.read_questions(file).texts
        [('Who runs?', 'A fox runs.')]
    """
    rows, source = read_objects(file, {"question": str, "context": str, "answers": dict})
    return LabelledTexts([(row["question"], row["context"]) for row in rows], [row["answers"] for row in rows], source)


def read_choices(file: str | Path) -> LabelledTexts:
    """The rows of a file with a JSON object a line: a "text", what may follow it ("choices"), and a "label".

    The label is the number of the right choice, from 0.

    Raises:
      OSError: it cannot be read.
      ValueError: another encoding, no rows, no JSON, or an entry that is missing or of another type. The message names
        the line.

    Example:
        >>> import json, os, tempfile, bert_adapter
        >>> row = {"text": "A fox", "choices": ["runs.", "reads."], "label": 0}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = os.path.join(directory, "choices.jsonl")
        ...     with open(file, "w") as text:
        ...         _ = text.write(json.dumps(row))
        ...     bert_adapter.read_choices(file).texts
        [('A fox', ['runs.', 'reads.'])]
    """
    rows, source = read_objects(file, {"text": str, "choices": list, "label": int})
    return LabelledTexts([(row["text"], row["choices"]) for row in rows], [row["label"] for row in rows], source)


def read_objects(file: str | Path, wanted: dict[str, type]) -> tuple[list[dict[str, Any]], Source]:
    """The objects of a file, a line each, which have what is wanted, and their lines."""
    rows, lines = [], []
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            row = parsed(line.encode(), f"{file}, line {number}")
            for name, kind in wanted.items():
                if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                    got = shown(row[name]) if name in row else f"no {name!r}"
                    kinds = {str: "a text", dict: "an object", list: "a list", int: "an integer"}
                    raise ValueError(f"{file}, line {number}: got {got}, wanted {name!r}, {kinds[kind]}")
            rows.append(row)
            lines.append(number)
    if not rows:
        raise ValueError(f"{file} holds no rows; wanted a JSON object a line, with {', '.join(map(repr, wanted))}")
    return rows, Source(str(file), np.array(lines))
