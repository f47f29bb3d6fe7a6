"""What a kind of output says of itself: all that the rest of the package knows of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert_adapter.distributions.categorical import IGNORED
from bert_adapter.rows import NO_ROWS, LabelledTexts, Place

Arrays = dict[str, np.ndarray]


class Head(NamedTuple):
    """What labels a model can have.

    count: of its outputs' numbers; 0 for an embedding.
    distribution: a name in `DISTRIBUTIONS`.
    config: the entries of config.json.
    """

    count: int
    distribution: str
    config: Mapping[str, Any]


class Reader(NamedTuple):
    """How a model reads texts.

    tokenize: the tokenizer of transformers.
    limit: the most tokens of a row.
    inputs: the names of what the tokenizer gives the model.
    multiple_of: rows are padded to a multiple of it.
    prompt: what is put before every text, of a pair before the first.
    similarity: how embeddings are compared.
    """

    head: Head
    tokenize: Any
    limit: int
    inputs: tuple[str, ...]
    multiple_of: int = 16
    prompt: str = ""
    similarity: str = "cosine"


class Example(NamedTuple):
    """One row of a batch to be.

    row: the number of the row that it comes from.
    size: about how long it is; a batch has examples of about one size.
    fields: the input of a model by name, and its labels, before they are padded; or a text.
    known: what its prediction is compared with.
    """

    row: int
    size: int
    fields: Any
    known: Any = None


Run = Callable[[list[Example]], list[Any]]  # what a model predicts for each of the examples


class Output(NamedTuple):
    """What a model's output is for.

    about: what it is, in a few words.
    distribution: (config of the module) -> what it stands for, a name in `DISTRIBUTIONS`.
    entries: (number of labels, or None) -> the entries of config.json that a new head has; a ValueError if a head
      cannot have that number.
    examples: (reader, texts, labels or None, name of a row) -> the examples; a ValueError names the row that is wrong.
    arrays: (reader, examples) -> a batch of them.
    check: (head, batch, where) -> nothing, or a ValueError for labels that the head cannot have.
    predict: (output, batch) -> what is kept of an output to be scored, (batch, ...).
    score: (reader, run, rows) -> figures by name.
    classes: (labels) -> the names of classes in rows, or their number, which a new head is made for; None if it needs
      none.
    read: (file) -> rows with labels.
    texts: (file) -> texts that need no labels.
    files: what these files are, for --help.
    pretraining: whether its labels are the texts' own. A head for it is what a model begins with, and gives way.
    """

    about: str
    distribution: Callable[[Any], str]
    entries: Callable[[int | None], dict[str, Any]]
    examples: Callable[[Reader, Any, Any, Place], list[Example]]
    arrays: Callable[[Reader, list[Example]], Arrays]
    check: Callable[[Head, Mapping[str, Any], str], None]
    predict: Callable[[Any, Any], Any]
    score: Callable[[Reader, Run, LabelledTexts], dict[str, float]]
    classes: Callable[[Any], list[Any] | int | None]
    read: Callable[[str | Path], LabelledTexts]
    texts: Callable[[str | Path], Any]
    files: str
    pretraining: bool = False


def tokenized(reader: Reader, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts, or pairs of them, cut to the longest row unless the options say how."""
    how = {"truncation": True, "max_length": reader.limit, "return_token_type_ids": "token_type_ids" in reader.inputs}
    return reader.tokenize(*texts, **how | options)


def as_they_are(output: Any, batch: Any) -> Any:
    """All of the output is kept."""
    return output


def padded(reader: Reader, examples: list[Example]) -> Arrays:
    """The fields as arrays, padded to the longest of them, rounded up to a multiple of `multiple_of`."""
    padding = {"input_ids": reader.tokenize.pad_token_id, "labels": IGNORED}
    longest = max(deepest(example.fields["input_ids"]) for example in examples)
    length = min(-(-longest // reader.multiple_of) * reader.multiple_of, reader.limit)
    return {
        name: np.array([filled(each.fields[name], length, padding.get(name, 0)) for each in examples], np.int32)
        for name in examples[0].fields
    }


def deepest(row: Any) -> int:
    """The length of a list of numbers, or of the longest of the lists in it."""
    return max(map(deepest, row)) if row and isinstance(row[0], list) else len(row)


def filled(row: Any, length: int, value: int) -> Any:
    """A list of numbers, or each of the lists in it, made that long; what is no list of the row's length stays."""
    if not isinstance(row, list):
        return row
    nested = bool(row) and isinstance(row[0], list)
    return [filled(one, length, value) for one in row] if nested else row + [value] * (length - len(row))


def check_room(reader: Reader, pair: bool) -> None:
    """A ValueError if special tokens, and a default prompt, leave no room for a token of each text."""
    tokenize, prompt, limit = reader.tokenize, reader.prompt, reader.limit
    texts = "a pair of texts" if pair else "a text"
    special, prompted = tokenize.num_special_tokens_to_add(pair), len(tokenize.tokenize(prompt))
    if limit < (least := special + prompted + 1 + pair):
        taken = f"{special} tokens are special" + (f", {prompted} are the default prompt's" if prompt else "")
        raise ValueError(f"max_length: got {limit}, wanted at least {least} for {texts}: {taken}")


def one_for_each(labels: Any, count: int, wanted: str) -> list[Any]:
    """The labels of `count` rows as a list; a ValueError says what was wanted."""
    found = list(labels) if hasattr(labels, "__iter__") and not isinstance(labels, NO_ROWS) else None
    if found is None or len(found) != count:
        raise ValueError(f"labels: got {f'{labels!r:.80}' if found is None else len(found)}, wanted {wanted}")
    return found


def check_no_prompt(reader: Reader, about: str) -> None:
    """A ValueError for a default prompt, which is for texts that are embedded or labelled as a whole."""
    if reader.prompt:
        name = "config_sentence_transformers.json"
        raise ValueError(f"{name}: got the default prompt {reader.prompt!r}, supported: none, for {about}")


def check_fast(reader: Reader, about: str) -> None:
    """A ValueError unless the tokenizer knows where in a text its tokens lie."""
    if not reader.tokenize.is_fast:
        raise ValueError(
            f"{type(reader.tokenize).__name__}: got a tokenizer that does not know where its tokens lie in a text, "
            f"wanted a fast one (tokenizer.json) for {about}"
        )


def check_classes(labels: Any, shape: tuple[int, ...], count: int, where: str) -> None:
    """A ValueError unless the labels are integers of that shape, of 0 to count - 1, or -100."""
    found = np.asarray(labels)
    if found.shape != shape or found.dtype.kind not in "iu":
        raise ValueError(f"{where}: got labels of {found.dtype} and shape {found.shape}, wanted integers of {shape}")
    wrong = np.argwhere((found != IGNORED) & ((found < 0) | (found >= count)))
    if len(wrong):
        row, *place = (int(i) for i in wrong[0])
        token = f", place {place[0]}" if place else ""
        got = found[tuple(wrong[0])].item()
        raise ValueError(f"{where}, row {row}{token}: got the label {got}, wanted 0 to {count - 1}, or {IGNORED}")
