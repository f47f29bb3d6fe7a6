"""The words behind masks: 15 of 100 tokens are to be predicted.

Devlin et al. 2019, sec. 3.1: of these, 80 % are masked, 10 % replaced by a random token, 10 % left as they are. Differs
from that: at least one token of each text, and the same ones whenever the same rows are read.
"""

from typing import Any, NamedTuple

import jax
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
    check_no_prompt,
    check_room,
    padded,
    tokenized,
)
from bert_adapter.reading import texts_in
from bert_adapter.rows import LabelledTexts, Place, as_texts

SHARE, MASKED, REPLACED = 0.15, 0.8, 0.1
ABOUT = "the words behind masks"


class Scored(NamedTuple):
    """Of the places that are to be predicted in each row: the loss, and how many there are and are right."""

    loss: Any
    right: Any
    count: Any


def no_entries(labels: int | None) -> dict[str, Any]:
    """A head that has learnt nothing predicts no words."""
    raise ValueError("head: got 'words', wanted a checkpoint that has it (…ForMaskedLM): a new one predicts nothing")


def examples(reader: Reader, texts: Any, labels: Any, place: Place) -> list[Example]:
    """The tokens of each text, some of them masked; "labels" are what stood there."""
    if labels is not None:
        raise ValueError(f"labels: got {type(labels).__name__}, wanted None: {ABOUT} are the texts' own")
    if reader.tokenize.mask_token_id is None:
        raise ValueError("the tokenizer has no token for masks: wanted 'mask_token' in tokenizer_config.json")
    listed = as_texts(texts, place)
    pair = not isinstance(listed[0], str)
    check_room(reader, pair)
    check_no_prompt(reader, ABOUT)
    columns: Any = zip(*listed, strict=True) if pair else [listed]
    rows = tokenized(reader, *map(list, columns), return_special_tokens_mask=True)
    special = set(reader.tokenize.all_special_ids)
    ordinary = np.array(sorted(set(reader.tokenize.get_vocab().values()) - special), np.int32)
    found = []
    for row, ids in enumerate(rows["input_ids"]):
        hidden, wanted = masked(reader, np.array(ids), np.array(rows["special_tokens_mask"][row]), ordinary, row=row)
        fields = {name: rows[name][row] for name in reader.inputs} | {"input_ids": hidden, "labels": wanted}
        found.append(Example(row, len(ids), fields))
    return found


def masked(
    reader: Reader, ids: np.ndarray, special: np.ndarray, ordinary: np.ndarray, *, row: int
) -> tuple[list[int], list[int]]:
    """The tokens as the model sees them, and the labels, -100 where nothing is to be predicted."""
    rng = np.random.default_rng([0, row])
    places = rng.permutation(np.flatnonzero(special == 0))
    places = places[: max(1, round(SHARE * len(places)))]
    fate, labels, seen = rng.uniform(size=len(places)), np.full(len(ids), IGNORED), ids.copy()
    labels[places] = ids[places]
    seen[places[fate < MASKED]] = reader.tokenize.mask_token_id
    others = places[(fate >= MASKED) & (fate < MASKED + REPLACED)]
    seen[others] = rng.choice(ordinary, size=len(others))
    return seen.tolist(), labels.tolist()


def check(head: Head, batch: Any, where: str) -> None:
    """A token for each place, or -100."""
    check_classes(batch["labels"], batch["input_ids"].shape, head.count, where)


def predict(output: Any, batch: Any) -> Scored:
    """How likely the words are that stood there, added up."""
    labels, wide = jnp.asarray(batch["labels"]), output.astype(jnp.promote_types(output.dtype, jnp.float32))
    counts = labels != IGNORED
    safe = jnp.where(counts, labels, 0)
    at = jnp.take_along_axis(jax.nn.log_softmax(wide), safe[:, :, None], axis=2)[:, :, 0]
    right = counts & (jnp.argmax(output, axis=2) == safe)
    return Scored(-jnp.sum(jnp.where(counts, at, 0), axis=1), jnp.sum(right, axis=1), jnp.sum(counts, axis=1))


def score(reader: Reader, run: Run, rows: LabelledTexts) -> dict[str, float]:
    """The perplexity of the tokens to be predicted, and the share of them that is predicted."""
    found = run(examples(reader, rows.texts, rows.labels, rows.place))
    loss, right, count = (float(np.sum([np.float64(each[i]) for each in found])) for i in range(3))
    if not count:
        raise ValueError("texts: got no token that is not special, wanted some to be masked")
    return {"perplexity": float(np.exp(loss / count)), "accuracy": right / count}


def read(file: Any) -> LabelledTexts:
    """The texts of a file, without labels."""
    return LabelledTexts(texts_in(file), None)


WORDS = Output(
    about=ABOUT,
    distribution=lambda config: "categorical",
    entries=no_entries,
    examples=examples,
    arrays=padded,
    check=check,
    predict=predict,
    score=score,
    classes=lambda labels: None,
    read=read,
    texts=texts_in,
    files="a sentence a line, or rows as for labels; what is masked is random, and the same for the same file",
    pretraining=True,
)
