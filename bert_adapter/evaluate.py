"""How well a model does: on labelled rows, and against the dense model."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bert_adapter.batches import check_weights, labelled
from bert_adapter.families import output_of, predictive
from bert_adapter.importance.gradients import Loss, each_loss
from bert_adapter.labels import check_same_classes
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.losses import TaskLoss, distillation
from bert_adapter.model import Model, check_batch, check_model, check_same_tokens, forward
from bert_adapter.outputs import OUTPUTS
from bert_adapter.outputs.definition import Example, Output, Reader, Run
from bert_adapter.outputs.scores import check_varied, of_classes, of_values, ranks, spearman
from bert_adapter.outputs.sentences import unit_rows
from bert_adapter.progress import track
from bert_adapter.rows import LabelledTexts, Texts, row_number
from bert_adapter.straight_through import widened
from bert_adapter.text import check_labelled, checked_examples, reader_of
from bert_adapter.values import check_finite
from wlra.checks import check_count

__all__ = [
    "Fidelity",
    "compare",
    "embed",
    "loss_increase",
    "of_classes",
    "of_values",
    "ranks",
    "score",
    "spearman",
]


class Fidelity(NamedTuple):
    """cosine: the mean cosine of each text's embedding to its dense one. spearman: the rank correlation of the cosines
    of all pairs of texts with those of the dense embeddings. Both are 1 for a perfect copy."""

    cosine: float
    spearman: float


def embed(
    model: Model,
    texts: Texts,
    batch_size: int = 32,
    max_length: int | None = None,
    *,
    prompt_name: str | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Row i is the output for text i, of an embedder its embedding; (texts, width).

    prompt_name: of one of the prompts that the model's files declare, such as "query", in place of the default.
    progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: rows that are no texts; as `tokenizer`.
      FloatingPointError: an output that is not finite; the message names the batch.
    """
    reader = reader_of(model, max_length, prompt_name=prompt_name)
    examples = OUTPUTS["embedding"].examples(reader, texts, None, row_number)
    rows = runner(model, reader, batch_size, OUTPUTS["embedding"], progress=progress)(examples)
    if rows[0].ndim != 1:
        raise ValueError(
            f"the model: got an output of {rows[0].shape} for a text, wanted an embedding, or labels of it"
        )
    return np.stack(rows)


def runner(model: Model, reader: Reader, batch_size: int, output: Output, *, progress: bool = True) -> Run:
    """The function from examples to what the model predicts for each, in their order."""
    check_count("batch_size", batch_size, 1)
    run, params = predictor(forward(model), output.predict), jax.device_put(model.params)

    def predictions(examples: list[Example]) -> list[Any]:
        order = sorted(range(len(examples)), key=lambda i: examples[i].size)
        found: list[Any] = [None] * len(examples)
        for begin in track(range(0, len(order), batch_size), "evaluate", progress):
            chosen = order[begin : begin + batch_size]
            # The last batch is filled up, so that it has the shape of the others.
            filled = chosen + [chosen[0]] * (min(batch_size, len(examples)) - len(chosen))
            batch = output.arrays(reader, [examples[i] for i in filled])
            check_batch(forward(model), batch, begin // batch_size)
            predicted, finite = jax.device_get(run(params, batch))
            check_finite(np.where(finite, 0, np.nan), begin // batch_size)
            for row, i in enumerate(chosen):
                found[i] = jax.tree.map(lambda leaf, row=row: leaf[row], predicted)
        return found

    return predictions


@lru_cache(maxsize=32)
def predictor(forward: Forward, predict: Callable[[Any, Any], Any]) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The compiled function (params, batch) -> what is predicted, and whether each row's output is finite."""

    def run(params: Any, batch: Batch) -> tuple[Any, Any]:
        output = forward(params, batch)
        return predict(output, batch), jnp.isfinite(output).reshape(len(output), -1).all(axis=1)

    return jax.jit(run)


def compare(dense: np.ndarray, other: np.ndarray) -> Fidelity:
    """The fidelity of embeddings to the dense ones of the same texts."""
    if dense.shape != other.shape:
        raise ValueError(f"wanted embeddings of the same texts; got shapes {dense.shape} and {other.shape}")
    if len(dense) < 3:
        raise ValueError(f"got embeddings of {len(dense)} texts, wanted 3 or more, whose similarities are compared")
    dense, other = (unit_rows(np.asarray(each, np.float64)) for each in (dense, other))
    pairs = np.triu_indices(len(dense), 1)
    return Fidelity(
        cosine=float(np.mean(np.sum(dense * other, axis=1))),
        spearman=correlation((dense @ dense.T)[pairs], (other @ other.T)[pairs]),
    )


def correlation(wanted: Float[np.ndarray, " pairs"], got: Float[np.ndarray, " pairs"]) -> float:
    """Spearman's; 0 where either is all the same."""
    return 0.0 if min(np.ptp(wanted), np.ptp(got)) == 0 else spearman(got, wanted)


def loss_increase(
    dense: Model, small: Model, batches: Iterable[Batch], loss: Loss | None = None, *, progress: bool = True
) -> float:
    """How much higher the small model's mean loss is: what `plan` predicts, measured on rows of one's own.

    (output, batch) -> (batch,) is the loss of labelled rows. If None, it is the expected one if labels were drawn from
    what the dense model predicts: the divergence of the predictions of labels, added up over the places of an example;
    else half the squared distance of the outputs. "weights", if a batch has any, weigh its examples. `progress` says
    whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: no batches, models with other tokens or the classes in another order, token ids or weights that cannot
        be, or, for `task_loss`, labels that are none of the head's.
      FloatingPointError: an output of either model is not finite; the message names the batch.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = sample_model()
        >>> batches = bert_adapter.text_batches(model, ["a red fox runs", "a dog"])
        >>> bert_adapter.loss_increase(model, model, batches)
        0.0
    """
    weights, each = increases(dense, small, batches, loss, progress=progress)
    return float(np.sum(weights * each) / np.sum(weights))


def increases(
    dense: Model, small: Model, batches: Iterable[Batch], loss: Loss | None = None, *, progress: bool = True
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """The weight of each row, and how much higher its loss is; see `loss_increase`."""
    check_same_tokens(dense, small, name="small")
    check_same_classes(dense, small, name="small")
    runs = [(jax.jit(forward(model)), jax.device_put(model.params)) for model in (dense, small)]
    apart = distillation(dense.module, temperature=1.0)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    rows = labelled(dense, batches) if isinstance(loss, TaskLoss) else batches
    for number, batch in enumerate(track(rows, "evaluate", progress)):
        for model in (dense, small):
            check_batch(forward(model), batch, number)
        weights = check_weights(batch, f"batch {number}")
        before, after = (widened(run(params, batch)) for run, params in runs)
        if loss is None:
            check_comparable(dense, small, before.shape, after.shape)
        for whose, output in (("the dense model", before), ("the small model", after)):
            check_finite(output, number, whose)
        if loss is None:
            each = apart(after, before, batch)
        else:
            risen, first = (each_loss(loss, output, batch) for output in (after, before))
            each = risen - first
        found.append((np.asarray(weights, np.float64), np.asarray(each, np.float64)))
    if not any(np.any(weights) for weights, _ in found):
        got = f"no row of weight above 0 in {len(found)}" if found else "none"
        raise ValueError(f"batches: got {got}, wanted at least one row to measure the loss on")
    weights, each = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return weights, each


def check_comparable(dense: Model, small: Model, wanted: tuple[int, ...], got: tuple[int, ...]) -> None:
    """A ValueError for outputs of another shape or meaning than the dense model's."""
    kinds = [predictive(model.module) for model in (dense, small)]
    if (got, kinds[1]) != (wanted, kinds[0]):
        raise ValueError(
            f"small: got outputs of shape {got} that are {kinds[1]}, wanted {wanted} and {kinds[0]} as the dense "
            f"model's are, or a loss"
        )


def check_scorable(model: Model, rows: LabelledTexts, max_length: int | None = None) -> None:
    """A ValueError for rows that `score` will refuse once it has run the model on them, and before."""
    _, examples = checked_examples(model, rows, max_length)
    if predictive(model.module) == "gaussian" and examples and examples[0].known is not None:
        for column in np.stack([example.known for example in examples]).reshape(len(examples), -1).T:
            check_varied(column)


def score(
    model: Model, rows: LabelledTexts, batch_size: int = 32, max_length: int | None = None, *, progress: bool = True
) -> dict[str, float]:
    """Figures that are usual for what the model's output is for.

    Of labels of texts: accuracy and Matthews' correlation of the classes predicted; Pearson's and Spearman's of values.
    Of a head of several labels at once, each label of each row counts, as there or not; of several values, their
    correlations' means.

    Of labels of words: accuracy, and if they are tags of entities ("B-...", "I-...", "O"), F1, precision and recall of
    whole entities, as seqeval counts them. A word beyond `max_length` tokens counts as "O". Of answers: "exact" matches
    and "f1" of words, as SQuAD counts them. Of words behind masks: their perplexity, and the share that is predicted.
    Of choices: accuracy.

    The value that a regression predicts is its output; that of an embedder, for pairs of texts, the cosine of theirs,
    or their dot product if its files declare that. `progress` says whether there is a bar on a terminal, or a
    line a minute elsewhere.

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
    check_model(model)
    check_labelled(model, rows)
    output, reader = OUTPUTS[output_of(model.module)], reader_of(model, max_length)
    return output.score(reader, runner(model, reader, batch_size, output, progress=progress), rows)
