"""Texts and labelled rows, as batches of token ids."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bert_adapter.families import family_of, output_of
from bert_adapter.families.sentence import prompt_named, settings
from bert_adapter.labels import head_of
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model
from bert_adapter.outputs import OUTPUTS
from bert_adapter.outputs.definition import Example, Output, Reader, check_room
from bert_adapter.outputs.sentences import encoded
from bert_adapter.rows import LabelledTexts, Texts, as_texts, row_number
from bert_adapter.vocabulary import longest_row, tokenizer_of
from wlra.checks import check_count

Tokenizer = Callable[[Texts], dict[str, np.ndarray]]
PROGRAM = 512  # time steps that take about as long as it takes to compile a program for one more length


def tokenizer(
    model: Model, max_length: int | None = None, multiple_of: int = 16, *, prompt_name: str | None = None
) -> Tokenizer:
    """A function from texts, or pairs of texts, to the int32 arrays that the model's module takes by name.

    Rows are cut where the model's files say ("max_seq_length" of sentence_bert_config.json, or else "model_max_length"
    of the tokenizer), at its last position, or at max_length, whichever comes first, and padded to the
    longest of them rounded up to a multiple of multiple_of: few lengths are few compilations. The lengths in
    tokenizer.json are overruled. A default prompt that the files declare is put before every text, or the one of their
    prompts that has the name `prompt_name`. There are no "token_type_ids" where the model, or "model_input_names" of
    the tokenizer, has none. A single text is a list of one; see `as_texts` for what else may hold texts.

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
    reader = reader_of(model, max_length, multiple_of, prompt_name)
    check_room(reader, pair=False)
    return lambda texts: encoded(reader, as_texts(texts))


def reader_of(model: Model, max_length: int | None, multiple_of: int = 16, prompt_name: str | None = None) -> Reader:
    """How the model reads texts: its tokenizer, and what its files say."""
    check_count("multiple_of", multiple_of, 1)
    if max_length is not None:
        check_count("max_length", max_length, 1)
    tokenize, said = tokenizer_of(model), settings(model.files)
    declared = longest_row(model, tokenize)
    limit = declared if max_length is None else min(max_length, declared)
    typed = "token_type_ids" in family_of(model.config).inputs and "token_type_ids" in tokenize.model_input_names
    inputs = ("input_ids", "attention_mask", *(["token_type_ids"] if typed else []))
    prompt = said.prompt if prompt_name is None else prompt_named(model.files, prompt_name)
    how = {"multiple_of": multiple_of, "prompt": prompt, "similarity": said.similarity}
    return Reader(head_of(model), tokenize, limit, inputs, **how)


def text_batches(
    model: Model,
    texts: Texts,
    batch_size: int = 16,
    max_length: int | None = None,
    *,
    prompt_name: str | None = None,
) -> Sequence[Batch]:
    """The texts, or pairs of texts, as batches of about equal length, the longest first.

    Lengths are multiples of 16, or the model's longest; one that few texts have is padded to the next, so that few
    programs are compiled. What a text is depends on what the model's output is for: see `LabelledTexts`. The order of
    the texts is lost. A masked LM's batches have tokens to be predicted, and "labels" that say which.

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
    return in_batches(model, reader_of(model, max_length, prompt_name=prompt_name), texts, batch_size)


def in_batches(model: Model, reader: Reader, texts: Texts, batch_size: int) -> list[Batch]:
    """The same as the reader reads the texts."""
    output = OUTPUTS[output_of(model.module)]
    ordered = sorted(output.examples(reader, texts, None, row_number), key=lambda each: each.size, reverse=True)
    return of_few_lengths(reader, output, [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)])


def of_few_lengths(reader: Reader, output: Output, groups: list[list[Example]]) -> list[Batch]:
    """A batch of each group of examples, padded to as few lengths as `few_lengths` says."""
    batches: list[Batch] = [output.arrays(reader, group) for group in groups]
    lengths = [batch["input_ids"].shape[-1] for batch in batches]
    rows = Counter[int]()
    for batch, length in zip(batches, lengths, strict=True):
        rows[length] += batch["input_ids"].size // length
    for place, to in enumerate(map(few_lengths(rows).get, lengths)):
        if to != lengths[place]:
            batches[place] = output.arrays(reader._replace(multiple_of=to), groups[place])
    return batches


def few_lengths(rows: Mapping[int, int]) -> dict[int, int]:
    """By length, the one to pad it to, so that time steps are fewest, if each length that is left costs PROGRAM more.

    rows: how many there are of each length.

    Example:
        >>> from bert_adapter.text import few_lengths
        >>> few_lengths({16: 100, 32: 400, 48: 16, 64: 16})
        {16: 16, 32: 32, 48: 64, 64: 64}
    """
    lengths = sorted(rows)
    counts = np.cumsum([0, *(rows[each] for each in lengths)])
    steps = np.cumsum([0, *(rows[each] * each for each in lengths)])
    best: list[tuple[int, list[int]]] = [(0, [])]  # of the shortest ones: the least cost, and which lengths are left
    for end, longest in enumerate(lengths, 1):
        padding = longest * (counts[end] - counts[:end]) - (steps[end] - steps[:end])
        costs = padding + [before for before, _ in best]
        first = int(np.argmin(costs))
        best.append((int(costs[first]) + PROGRAM, [*best[first][1], longest]))
    left = best[-1][1]
    return {each: left[int(np.searchsorted(left, each))] for each in lengths}


def checked_examples(model: Model, rows: LabelledTexts, max_length: int | None = None) -> tuple[Reader, list[Example]]:
    """How the model reads texts, and the rows as examples.

    Raises:
      ValueError: a row that is no text, a label that is none of the head's, or not a label for each text.
    """
    check_labelled(model, rows)
    reader = reader_of(model, max_length)
    return reader, OUTPUTS[output_of(model.module)].examples(reader, rows.texts, rows.labels, rows.place)


def check_labelled(model: Model, rows: Any) -> None:
    """A ValueError for rows without labels, unless the texts are enough."""
    if not isinstance(rows, LabelledTexts):
        made = "LabelledTexts(texts, labels), or read_rows(file), makes some"
        raise ValueError(f"rows: got {type(rows).__name__}, wanted texts with their labels: {made}")
    if rows.labels is None and not OUTPUTS[output_of(model.module)].pretraining:
        raise ValueError("labels: got NoneType, wanted one for each row, as a list or an array")


def labelled_batches(
    model: Model, rows: LabelledTexts, batch_size: int = 32, max_length: int | None = None
) -> Sequence[Batch]:
    """The rows as batches of `batch_size` rows of about equal length, with their "labels", the longest first.

    A label that does not count is -100.

    The last batch repeats rows of its own to be as large as the others, with "weights" of 0 for what is repeated.
    Lengths are those of `text_batches`.

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
    reader, examples = checked_examples(model, rows, max_length)
    order = np.argsort([example.size for example in examples], kind="stable")[::-1]
    size = min(batch_size, len(examples))
    groups = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    filled = [[examples[i] for i in np.resize(group, size)] for group in groups]
    batches = of_few_lengths(reader, OUTPUTS[output_of(model.module)], filled)
    counts = [(np.arange(size) < len(group)).astype(np.float32) for group in groups]
    return [{**batch, "weights": weights} for batch, weights in zip(batches, counts, strict=True)]
