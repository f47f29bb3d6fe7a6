"""How well a model does on labelled rows, in the measures that GLUE reports."""

import numpy as np

from bert_adapter.checkpoint import Model
from bert_adapter.fidelity import embed, spearman
from bert_adapter.model import SequenceClassifier
from bert_adapter.rows import Rows


def score(model: Model, rows: Rows, batch_size: int = 32, max_length: int = 128) -> dict[str, float]:
    """Accuracy and Matthews' correlation of the classes predicted; Pearson's and Spearman's of values.

    The value that a regression predicts is its output; that of an embedder, for pairs of texts, the cosine of theirs.

    Raises:
      ValueError: an embedder is given single texts.
    """
    if isinstance(model.module, SequenceClassifier):
        outputs = embed(model, rows.texts, batch_size, max_length)
        if outputs.shape[1] > 1:
            return of_classes(outputs.argmax(axis=1), rows.labels)
        return of_values(outputs[:, 0], rows.labels)
    if isinstance(rows.texts[0], str):
        raise ValueError("an embedder is scored by the cosines of pairs of texts; got single ones: give it a head")
    first, second = (embed(model, [pair[i] for pair in rows.texts], batch_size, max_length) for i in (0, 1))
    return of_values(np.sum(first * second, axis=1), rows.labels)


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
