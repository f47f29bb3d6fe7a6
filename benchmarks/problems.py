"""Real problems: kernels weighted with the Fisher information of real sentences, and structure from motion."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

LAYER_0 = ("attention/self/key", "attention/output/dense", "intermediate/dense", "output/dense")


class Case(NamedTuple):
    """A matrix, the weights of its entries, and the rank to reduce it to."""

    name: str
    W: np.ndarray
    weights: np.ndarray
    rank: int


def fisher_cases(rank: int = 75) -> list[Case]:
    """Four kernels of layer 0 of all-MiniLM-L6-v2, weighted label-free by the demo's calibration sentences."""
    import bert_adapter
    from bert_adapter.demo import minilm, sentences

    model = bert_adapter.load(minilm())
    batches = bert_adapter.text_batches(model, sentences("calibration"))
    paths = {f"encoder/layer/0/{name}": name for name in LAYER_0}
    run = bert_adapter.forward(model)
    measured = bert_adapter.measure_importance(run, model.params, batches, paths, statistics=["fisher"])
    layer = model.params["encoder"]["layer"]["0"]
    cases = []
    for path, name in paths.items():
        part = layer
        for key in name.split("/"):
            part = part[key]
        cases.append(Case(name, np.array(part["kernel"]), np.asarray(measured[path].fisher).sum(axis=0), rank))
    return cases


def motion(folder: Path) -> list[Case]:
    """Buchanan & Fitzgibbon's trimmed dinosaur and face, of rank 4; 0 where nothing was seen."""
    from scipy.io import loadmat

    cases = []
    for name in ("dino", "face"):
        data = loadmat(existing(folder / "lrmf" / f"{name}_trimmed.mat"))
        weights = data["W"].astype(float)
        cases.append(Case(name, np.where(weights > 0, data["M"], 0.0), weights, 4))
    return cases


def existing(path: Path) -> Path:
    """The path, or an end with one line that says what is missing."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: --data must name the folder that holds it (see benchmarks/README.md)")
    return path
