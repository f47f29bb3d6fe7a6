"""An output for each text, or pair of texts: its embedding, or labels of it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bert_adapter.outputs.definition import (
    Arrays,
    Example,
    Head,
    Output,
    Reader,
    Run,
    as_they_are,
    check_room,
    tokenized,
)
from bert_adapter.outputs.label_values import as_array, labels_for, with_width
from bert_adapter.outputs.scores import of_classes, of_values
from bert_adapter.reading import read_rows, texts_in
from bert_adapter.rows import LabelledTexts, Place, as_texts, length_of
from wlra.checks import check_name

PROBLEMS = {  # by config.json's "problem_type", the distributions that a head's output stands for
    "regression": "gaussian",
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
}


def distribution(config: Any) -> str:
    """As the problem's type says; where none is declared, several outputs are those of classes."""
    problem, count = getattr(config, "problem_type", None), config.num_labels
    if problem is None:
        return "categorical" if count > 1 else "gaussian"
    kind = PROBLEMS[check_name("problem_type", problem, PROBLEMS)]
    if kind == "categorical" and count == 1:
        raise ValueError(f"problem_type: got {problem!r} with one label, whose softmax is always 1; wanted two or more")
    return kind


def entries(labels: int | None) -> dict[str, Any]:
    """So many labels."""
    if labels is None:
        raise ValueError("labels: got None, wanted how many classes there are, or 1 for a value")
    return {"num_labels": labels}


def no_entries(labels: int | None) -> dict[str, Any]:
    """There is no head to be made."""
    raise ValueError("head: got 'embedding', which is no head: without_head(model) is the encoder")


def examples(reader: Reader, texts: Any, labels: Any, place: Place) -> list[Example]:
    """One for each text, with the label that the head takes."""
    listed = as_texts(texts, place)
    known = [None] * len(listed) if labels is None else labels_for(reader.head, labels, place)
    if len(listed) != len(known):
        raise ValueError(f"labels: got {len(known)}, wanted one for each of {len(listed)} texts")
    return [Example(row, length_of(text), text, known[row]) for row, text in enumerate(listed)]


def arrays(reader: Reader, examples: list[Example]) -> Arrays:
    """The texts as the model's inputs, and their labels."""
    batch = encoded(reader, [example.fields for example in examples])
    if examples[0].known is None:
        return batch
    return {**batch, "labels": np.stack([example.known for example in examples])}


def encoded(reader: Reader, texts: Any) -> Arrays:
    """The texts, or pairs, padded to the longest of them rounded up to a multiple of `multiple_of`.

    A prompt is put before the first text of a pair alone, as sentence-transformers does.
    """
    first, *second = [texts] if isinstance(texts[0], str) else zip(*texts, strict=True)
    columns = [[reader.prompt + text for text in first], *map(list, second)]
    check_room(reader, pair=len(columns) == 2)
    rows = tokenized(reader, *columns)
    longest = max(map(len, rows["input_ids"]))
    length = min(-(-longest // reader.multiple_of) * reader.multiple_of, reader.limit)
    padding = {"input_ids": reader.tokenize.pad_token_id}
    return {
        name: np.array([row + [padding.get(name, 0)] * (length - len(row)) for row in rows[name]], np.int32)
        for name in reader.inputs
    }


def check(head: Head, batch: Any, where: str) -> None:
    """The labels are some that the head can have, one for each row."""
    labels = labels_for(head, batch["labels"], lambda row: f"{where}, row {row}")
    if len(labels) != (count := len(next(iter(batch.values())))):
        raise ValueError(f"{where}: got {len(labels)} labels, wanted one for each of {count} rows")


def score(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """Accuracy and Matthews' correlation of classes; Pearson's and Spearman's correlation of values."""
    found = examples(reader, rows.texts, rows.labels, rows.place)
    outputs, labels = np.stack(run(found)), np.stack([example.known for example in found])
    if reader.head.distribution == "categorical":
        return of_classes(outputs.argmax(axis=1), labels)
    labels = labels.reshape(outputs.shape)
    if reader.head.distribution == "bernoulli":
        return of_classes((outputs > 0).ravel(), labels.ravel())
    each = [of_values(*both) for both in zip(outputs.T, labels.T, strict=True)]
    return {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}


def score_pairs(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """Pearson's and Spearman's correlation of the similarities of pairs of texts."""
    found = examples(reader, rows.texts, rows.labels, rows.place)
    if isinstance(found[0].fields, str):
        raise ValueError("an embedder is scored by the cosines of pairs of texts; got single ones: give it a head")
    similarities = similarity_of(reader.similarity)
    first, second = (
        np.stack(run([each._replace(fields=each.fields[i], size=len(each.fields[i]), known=None) for each in found]))
        for i in (0, 1)
    )
    return of_values(similarities(first, second), np.array([each.known for each in found]))


def similarity_of(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from two arrays to the similarities of their rows: the cosine, or the dot product if declared."""
    if name not in SIMILARITIES:
        known, file = ", ".join(map(repr, SIMILARITIES)), "config_sentence_transformers.json"
        raise ValueError(f"{file}: got similarity_fn_name {name!r}, supported: {known}")
    return SIMILARITIES[name]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows scaled to length one, in 32 bits at least; zeros stay zeros."""
    rows = np.asarray(rows, np.promote_types(rows.dtype, np.float32))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": lambda first, second: np.sum(unit_rows(first) * unit_rows(second), axis=1),
    "dot": lambda first, second: np.einsum("ij,ij->i", np.asarray(first, np.float64), np.asarray(second, np.float64)),
}


def classes(labels: Any) -> list[str] | int:
    """Integers are classes, and so are names, in their alphabetical order; numbers with a fraction are values."""
    labels = with_width(as_array(labels), None)
    if not len(labels):
        raise ValueError("labels: got none, wanted one for each row")
    if labels.dtype.kind == "O":
        labels = plain(labels)
    if labels.dtype.kind == "f":
        return 1
    names = sorted(set(labels.tolist()))
    if len(names) < 2 and names != [-1]:  # which is refused as a label, with its row
        raise ValueError(f"labels: all are {names[0]!r}, wanted two classes or more; values are written as 0.0")
    if labels.dtype.kind == "U":
        return names
    if names[0] > 0:
        raise ValueError(
            f"labels: got the classes {names[0]} to {names[-1]}, wanted them from 0; values are written as 0.0"
        )
    if (count := max(2, names[-1] + 1)) > max(2, len(labels)):
        raise ValueError(f"labels: got the class {names[-1]} in {len(labels)} rows; values are written as 0.0")
    return count


def plain(labels: np.ndarray) -> np.ndarray:
    """Labels that are objects as an array of names, or of numbers."""
    found = labels.reshape(-1).tolist()
    names = isinstance(found[0], str) if found else False
    kinds = str if names else int | float | np.number
    if odd := [label for label in found if not isinstance(label, kinds)]:
        raise ValueError(f"labels: got {odd[0]!r} beside {found[0]!r}, wanted names of classes, or numbers")
    return np.array(found).reshape(labels.shape)


LABELS = Output(
    about="labels of each text",
    distribution=distribution,
    entries=entries,
    examples=examples,
    arrays=arrays,
    check=check,
    predict=as_they_are,
    score=score,
    classes=classes,
    read=read_rows,
    texts=texts_in,
    files="tab-separated with a heading: one or two columns of text and 'label', a class 0, 1, ... or a value",
)
EMBEDDING = LABELS._replace(
    about="an embedding of each text", distribution=lambda config: "gaussian", entries=no_entries, score=score_pairs
)
