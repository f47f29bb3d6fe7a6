"""Figures that say how well predictions fit what is known, on the host."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's rank, from 0; equal values have the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


def check_varied(wanted: np.ndarray) -> None:
    """A ValueError for values that are all the same, which nothing correlates with."""
    if np.min(wanted) == np.max(wanted):
        raise ValueError(f"labels: got {np.min(wanted):g} for all of {len(wanted)} rows, wanted two values or more")


def of_values(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Pearson's correlation and that of the ranks; 0 where predictions are all the same.

    Raises:
      ValueError: what is wanted is all the same, which nothing correlates with.
    """
    check_varied(wanted)
    if np.min(predicted) == np.max(predicted):
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(np.corrcoef(predicted, wanted)[0, 1]), "spearman": spearman(predicted, wanted)}


def of_classes(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """The share that is right, and Matthews' correlation (Gorodkin 2004 for more than two classes)."""
    classes = np.union1d(predicted, wanted)
    a, b = ((values[:, None] == classes).astype(float) for values in (predicted, wanted))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return {"accuracy": float(np.mean(predicted == wanted)), "matthews": float(np.sum(a * b) / size) if size else 0.0}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The type, the first and the last place of each entity, as conlleval and seqeval count them.

    Of tags "B-type" and "I-type", and "E-", "S-" if there are any (Ramshaw & Marcus 1995; Tjong Kim Sang & De Meulder
    2003): "I" after "O" or another type begins one too.
    """
    found, begin, before, kind = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        here, _, of = tag.partition("-")
        goes_on = before in ("B", "I") and here in ("I", "E") and of == kind
        if before != "O" and not goes_on:
            found.add((kind, begin, place - 1))
        if not goes_on:
            begin = place
        before, kind = here, of
    return found


def of_entities(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and their harmonic mean F1 of whole entities, over all rows."""
    pairs = [(entities(a), entities(b)) for a, b in zip(predicted, wanted, strict=True)]
    right, said, there = (sum(map(len, sets)) for sets in ([a & b for a, b in pairs], *zip(*pairs, strict=True)))
    precision, recall = (right / count if count else 0.0 for count in (said, there))
    both = precision + recall
    return {"f1": 2 * precision * recall / both if both else 0.0, "precision": precision, "recall": recall}


def plain(answer: str) -> str:
    """An answer as SQuAD compares them: lower case, without punctuation, articles and surplus spaces."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap(predicted: str, wanted: str) -> float:
    """F1 of an answer's words; of no answer, whether there is none (Rajpurkar et al. 2016, 2018)."""
    said, there = plain(predicted).split(), plain(wanted).split()
    if not said or not there:
        return float(said == there)
    right = sum((Counter(said) & Counter(there)).values())
    return 2 * right / (len(said) + len(there))


def of_answers(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share that is one of the answers wanted, and the mean F1 with the nearest of them."""
    exact, near = [], []
    for said, answers in zip(predicted, wanted, strict=True):
        known = [answer for answer in answers if plain(answer)] or [""]
        exact.append(max(plain(said) == plain(answer) for answer in known))
        near.append(max(overlap(said, answer) for answer in known))
    return {"exact": float(np.mean(exact)), "f1": float(np.mean(near))}
