"""How well a model does: on labelled rows as GLUE reports it, and against the dense model."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from bert_adapter.batches import check_weights, labelled
from bert_adapter.families import label_count, predictive
from bert_adapter.families.sentence import PROMPTS, settings
from bert_adapter.importance.gradients import Loss
from bert_adapter.layers.capture import Batch
from bert_adapter.losses import TaskLoss, distillation
from bert_adapter.model import Model, check_batch, forward
from bert_adapter.progress import track
from bert_adapter.text import LabelledTexts, Texts, as_texts, checked_rows, length_of, tokenizer
from bert_adapter.values import check_finite
from wlra.checks import check_count


class Fidelity(NamedTuple):
    """cosine: the mean cosine of each text's embedding to its dense one. spearman: the rank correlation of the cosines
    of all pairs of texts with those of the dense embeddings. Both are 1 for a perfect copy."""

    cosine: float
    spearman: float


def embed(
    model: Model, texts: Texts, batch_size: int = 32, max_length: int | None = None, *, progress: bool = True
) -> np.ndarray:
    """Row i is the output for text i, of an embedder its embedding; (texts, width).

    progress: whether there is a bar on a terminal.

    Raises:
      ValueError: rows that are no texts; as `tokenizer`.
      FloatingPointError: an output that is not finite; the message names the batch.
    """
    check_count("batch_size", batch_size, 1)
    encode, run, texts = tokenizer(model, max_length), jax.jit(forward(model)), as_texts(texts)
    params = jax.device_put(model.params)
    order = sorted(range(len(texts)), key=lambda i: length_of(texts[i]))
    rows: list[np.ndarray | None] = [None] * len(texts)
    for begin in track(range(0, len(order), batch_size), "evaluate", progress):
        chosen = order[begin : begin + batch_size]
        # The last batch is filled up, so that it has the shape of the others.
        filled = chosen + [chosen[0]] * (min(batch_size, len(texts)) - len(chosen))
        batch = encode([texts[i] for i in filled])  # pyright: ignore[reportArgumentType]
        check_batch(forward(model), batch, begin // batch_size)
        outputs = np.asarray(run(params, batch))
        check_finite(outputs, begin // batch_size)
        for i, row in zip(chosen, outputs, strict=False):
            rows[i] = row
    return np.stack([row for row in rows if row is not None])


def compare(dense: np.ndarray, other: np.ndarray) -> Fidelity:
    """The fidelity of embeddings to the dense ones of the same texts."""
    if dense.shape != other.shape:
        raise ValueError(f"wanted embeddings of the same texts; got shapes {dense.shape} and {other.shape}")
    dense, other = unit_rows(dense), unit_rows(other)
    pairs = np.triu_indices(len(dense), 1)
    return Fidelity(
        cosine=float(np.mean(np.sum(dense * other, axis=1))),
        spearman=spearman((dense @ dense.T)[pairs], (other @ other.T)[pairs]),
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows scaled to length one; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def loss_increase(
    dense: Model, small: Model, batches: Iterable[Batch], loss: Loss | None = None, *, progress: bool = True
) -> float:
    """How much higher the small model's mean loss is: what `plan` predicts, measured on rows of one's own.

    (output, batch) -> (batch,) is the loss of labelled rows. If None, it is the expected one if labels were drawn from
    what the dense model predicts: between classes, or labels at once, the divergence of the predictions; else half
    the squared distance of the outputs. "weights", if a batch has any, weigh its examples. `progress` says whether
    there is a bar on a terminal.

    Raises:
      ValueError: no batches, token ids or weights that cannot be, or, for `task_loss`, labels that are none of the
        head's.
      FloatingPointError: an output of either model is not finite; the message names the batch.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model()
        >>> batches = bert_adapter.text_batches(model, ["a red fox runs", "a dog"])
        >>> bert_adapter.loss_increase(model, model, batches)
        0.0
    """
    runs = [(jax.jit(forward(model)), jax.device_put(model.params)) for model in (dense, small)]
    apart = distillation(dense.module, temperature=1.0)
    total = count = 0.0
    rows = labelled(dense, batches) if isinstance(loss, TaskLoss) else batches
    for number, batch in enumerate(track(rows, "evaluate", progress)):
        check_batch(forward(dense), batch, number)
        weights = check_weights(batch, f"batch {number}")
        before, after = (run(params, batch) for run, params in runs)
        for whose, output in (("the dense model", before), ("the small model", after)):
            check_finite(output, number, whose)
        each = apart(after, before) if loss is None else loss(after, batch) - loss(before, batch)
        total, count = total + float(np.sum(weights * np.asarray(each))), count + float(np.sum(weights))
    if not count:
        raise ValueError("no batches: wanted at least one to measure the loss on")
    return total / count


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank, from 0; equal values have the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


def score(
    model: Model, rows: LabelledTexts, batch_size: int = 32, max_length: int | None = None, *, progress: bool = True
) -> dict[str, float]:
    """Accuracy and Matthews' correlation of the classes predicted; Pearson's and Spearman's of values.

    Of a head of several labels at once, each label of each row counts, as there or not; of several values, their
    correlations' means.

    The value that a regression predicts is its output; that of an embedder, for pairs of texts, the cosine of theirs,
    or their dot product if its files declare that. `progress` says whether there is a bar on a terminal.

    Raises:
      ValueError: an embedder is given single texts, or declares a similarity that is not supported; rows that are no
        texts, or labels that are missing, not finite, or none of the head's.
      FloatingPointError: an output is not finite; the message names the batch.

    Example:
        >>> import numpy as np, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> pairs = [("a red fox", "a red fox"), ("a dog", "it runs far")]
        >>> scores = bert_adapter.score(sample_model(), bert_adapter.LabelledTexts(pairs, np.array([1.0, 0.0])))
        >>> round(scores["spearman"], 6)
        1.0
    """
    texts, labels = checked_rows(model, rows)
    if label_count(model.module) is not None:
        outputs, kind = embed(model, texts, batch_size, max_length, progress=progress), predictive(model.module)
        if kind == "categorical":
            return of_classes(outputs.argmax(axis=1), labels)
        labels = labels.reshape(outputs.shape)
        if kind == "bernoulli":
            return of_classes((outputs > 0).ravel(), labels.ravel())
        each = [of_values(*both) for both in zip(outputs.T, labels.T, strict=True)]
        return {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    if isinstance(texts[0], str):
        raise ValueError("an embedder is scored by the cosines of pairs of texts; got single ones: give it a head")
    similarities = similarity_of(model)
    sides = ([pair[i] for pair in texts] for i in (0, 1))
    first, second = (embed(model, side, batch_size, max_length, progress=progress) for side in sides)
    return of_values(similarities(first, second), labels)


def similarity_of(model: Model) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The function from two arrays to the similarities of their rows: the cosine, or the dot product if declared."""
    kind = settings(model.files).similarity
    if kind not in SIMILARITIES:
        raise ValueError(f"{PROMPTS}: got similarity_fn_name {kind!r}, supported: {', '.join(map(repr, SIMILARITIES))}")
    return SIMILARITIES[kind]


SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": lambda first, second: np.sum(unit_rows(first) * unit_rows(second), axis=1),
    "dot": lambda first, second: np.sum(first * second, axis=1),
}


def of_values(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson's correlation and that of the ranks."""
    return {"pearson": float(np.corrcoef(predicted, wanted)[0, 1]), "spearman": spearman(predicted, wanted)}


def of_classes(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """The share that is right, and Matthews' correlation (Gorodkin 2004 for more than two classes)."""
    classes = np.union1d(predicted, wanted)
    a, b = ((values[:, None] == classes).astype(float) for values in (predicted, wanted))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return {"accuracy": float(np.mean(predicted == wanted)), "matthews": float(np.sum(a * b) / size) if size else 0.0}
