"""Problems to solve: real kernels with the Fisher information of real sentences as weights."""

from typing import NamedTuple

import numpy as np

import bert_adapter
from bert_adapter.demo import minilm, sentences

LAYER_0 = ("attention/self/key", "attention/output/dense", "intermediate/dense", "output/dense")


class Case(NamedTuple):
    """A kernel, the weights of its entries, and the rank to reduce it to."""

    name: str
    W: np.ndarray
    weights: np.ndarray
    rank: int


def fisher_cases(rank: int = 75) -> list[Case]:
    """Four kernels of layer 0 of all-MiniLM-L6-v2, weighted label-free by the demo's calibration sentences."""
    model = bert_adapter.load(minilm())
    batches = bert_adapter.text_batches(model, sentences("calibration"))
    paths = {f"encoder/layer/0/{name}": name for name in LAYER_0}
    measured = bert_adapter.measure_importance(bert_adapter.forward(model), model.params, batches, paths)
    layer = model.params["encoder"]["layer"]["0"]
    cases = []
    for path, name in paths.items():
        part = layer
        for key in name.split("/"):
            part = part[key]
        cases.append(Case(name, np.array(part["kernel"]), np.asarray(measured[path].fisher), rank))
    return cases
