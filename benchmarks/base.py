"""How much of an embedder's use does each way to compress it keep, of 6 layers and of 12, down to 5 % of its kernels?

all-MiniLM-L6-v2 (6 layers, 384 wide), or the embedder in the directory after `--model`, as it comes, all kernels of its
encoder, importance from 512 texts of STS-B's train rows, without labels; Spearman's correlation on the whole of dev,
once each, so that differences below 0.003 are noise, and one less the mean cosine to the dense embeddings of some of
dev's texts. "Equal ranks": every kernel keeps the same share. "activation" weighs the inputs of a layer (DRONE,
SVD-LLM), "fwsvd" has a weight for each input; "layers" are as many as the share allows, as they are, the first or from
the first to the last. The floor is the model with every kernel of the encoder zero: what its embeddings of tokens are
worth alone.
"Of the bytes": the table of words, kernels and bits under one budget, and bits alone, rounded to the nearest.
A compression needs some 8 GB. Every score is a line of JSON when it is there: a run that was killed goes on where it
stopped.

all-mpnet-base-v2 (12 layers, 768 wide) is on the Hugging Face Hub; benchmarks/README.md says where else.
DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

import bert_adapter
from benchmarks.candidates import OWN, Context, compressed, name_of, prepared, with_leaves
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, read, row
from benchmarks.timing import Measured
from bert_adapter.checkpoint.bits import encoded, factorised_tables, layers_of
from bert_adapter.checkpoint.names import by_path
from bert_adapter.decompositions import Decompositions
from bert_adapter.families import module_for
from bert_adapter.importance.sums import Importance
from bert_adapter.model import Model

BUDGETS = (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)
NOISE = 0.003
OURS = "the default, planned"
WAYS = {  # by name, the signal and whether ranks are equal
    OURS: ("combined", False),
    "the default, equal ranks": ("combined", True),
    "shampoo, planned": ("shampoo", False),
    "kfac, planned": ("kfac", False),
    "activation, equal ranks": ("activation", True),
    "fwsvd, equal ranks": ("fwsvd", True),
}
DENSE, FLOOR = "dense", "floor"
FIRST, SPREAD = "the first layers", "layers, evenly spaced"
SHOWN = (*WAYS, FIRST, SPREAD)
EVERYTHING, BITS = "everything, of the bytes", ("int8", "int4")
BYTES = (0.25, 0.125, 0.08)


def without_kernels(dense: Model) -> Model:
    """The model with every kernel of the encoder zero."""
    shapes = bert_adapter.select_kernels(dense)
    return with_leaves(dense, {f"{path}/kernel": np.zeros(shape, np.float32) for path, shape in shapes.items()})


def with_layers(dense: Model, share: float, spread: bool) -> Model | None:
    """The model of so many of its layers, the first or from the first to the last; None where that is none."""
    count = dense.module.config.num_hidden_layers
    kept = int(share * count + 1e-9)
    if not kept:
        return None
    chosen = np.round(np.linspace(0, count - 1, kept)).astype(int) if spread else np.arange(kept)

    def cut(params: Any) -> Any:
        if not isinstance(params, dict):
            return params
        found = {name: cut(value) for name, value in params.items() if name != "layer"}
        if "layer" in params:
            found["layer"] = {str(place): params["layer"][str(layer)] for place, layer in enumerate(chosen)}
        return found

    config = dense.config | {"num_hidden_layers": kept}
    return dense._replace(module=module_for(config, dense.files), params=cut(dense.params), config=config)


def models(context: Context, budgets: Iterable[float]) -> Iterable[tuple[str, float, Callable[[], Model]]]:
    """By name and budget, a call that makes the model; what it measures and decomposes is kept for the rest."""
    dense = context.dense
    yield DENSE, 1.0, lambda: dense
    yield FLOOR, 0.0, partial(without_kernels, dense)

    @cache
    def importance() -> Importance:
        wanted = {name for signal, _ in WAYS.values() for name in bert_adapter.SIGNALS[signal].statistics}
        run, paths = bert_adapter.forward(dense), bert_adapter.select_kernels(dense, embeddings=True)
        return bert_adapter.measure_importance(run, dense.params, context.batches, paths, statistics=wanted)

    @cache
    def decomposed(signal: str) -> Decompositions:
        return bert_adapter.decompose(
            dense.params, importance(), signal=signal, kernels=bert_adapter.select_kernels(dense)
        )

    @cache
    def with_bits() -> Decompositions:
        return bert_adapter.decompose(dense.params, importance(), bits=True)

    def small(signal: str, budget: float, uniform: bool) -> Model:
        return merged(compressed(context, decomposed(signal), signal, budget=budget, uniform=uniform))

    for budget in budgets:
        for name, (signal, uniform) in WAYS.items():
            yield name, budget, partial(small, signal, budget, uniform)
        for name, spread in ((FIRST, False), (SPREAD, True)):
            if (model := with_layers(dense, budget, spread)) is not None:
                yield name, budget, lambda model=model: model
    for dtype in BITS:
        yield dtype, share_of_bytes(dense, dtype), partial(stored, dense, dtype)
    for share in BYTES:
        yield EVERYTHING, share, lambda share=share: merged(compressed(context, with_bits(), budget=share, of="bytes"))


def merged(model: Model) -> Model:
    """Multiplied out, all models run by one program."""
    return model._replace(params=bert_adapter.merge(model.params))


def share_of_bytes(dense: Model, dtype: str) -> float:
    """What all matrices take in that dtype, with all else, beside the model as it is."""
    params = {path: np.asarray(leaf) for path, leaf in by_path(dense.params).items()}
    small = encoded(params, dict.fromkeys(layers_of(params), dtype), factorised_tables(dense.params))
    return sum(array.nbytes for array in small.values()) / sum(array.nbytes for array in params.values())


def stored(dense: Model, dtype: str) -> Model:
    """As it is read again once its matrices were stored so."""
    with tempfile.TemporaryDirectory() as folder:
        bert_adapter.save(dense, folder, dtype=dtype)
        return bert_adapter.load(folder)


def scored(context: Context, name: str, budget: float, *, model: str, make: Callable[[], Model]) -> Row:
    """The row of a model: its seconds are those that it takes to make it."""
    began = time.perf_counter()
    small = make()
    cost = Measured(None, None, time.perf_counter() - began, None)
    score = bert_adapter.score(small, context.dev)["spearman"]
    loss = bert_adapter.loss_increase(context.dense, small, context.held)
    return row("STS-B", name, loss, "", cost, model=model, spearman=score, budget=budget)


def draw(rows: list[Row], path: Path) -> None:
    """A line for each way."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(line["model"] for line in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4), squeeze=False, layout="constrained")
    for ax, model in zip(axes[0], names, strict=True):
        of = [line for line in rows if line["model"] == model]
        for name in SHOWN:
            lines = sorted((line["budget"], line["spearman"]) for line in of if line["method"] == name)
            ax.plot(*np.reshape(lines, (-1, 2)).T, marker="o", linewidth=2.5 if name == OURS else 1.2, label=name)
        for line in of:
            if line["method"] in (DENSE, FLOOR):
                ax.axhline(line["spearman"], color="black", linewidth=0.8, linestyle="-" if line["budget"] else ":")
        ax.set(title=model, xlabel="share of the encoder kernels' parameters", ylabel="Spearman on STS-B's dev rows")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(rows: list[Row]) -> str:
    """The tables of each model."""
    parts = []
    for model in dict.fromkeys(line["model"] for line in rows):
        parts += [f"**{model}**", tables_of([line for line in rows if line["model"] == model])]
    return "\n\n".join(parts)


def tables_of(rows: list[Row]) -> str:
    """Spearman and the loss for each way and budget, and whether the default is the best at each."""
    found = {(line["method"], line["budget"]): line for line in rows}
    budgets = sorted({line["budget"] for line in rows if line["method"] in WAYS}, reverse=True)

    def text(name: str, budget: float) -> str:
        line = found.get((name, budget))
        return "" if line is None else f"{line['spearman']:.4f} ({line['loss']:.3f})"

    cells = [
        [name, *(text(name, budget) for budget in budgets)]
        for name in SHOWN
        if name in {line["method"] for line in rows}
    ]
    cells += [[name, *[text(name, share)] * len(budgets)] for name, share in ((DENSE, 1.0), (FLOOR, 0.0))]
    table = markdown(["Spearman (loss)", *(f"{budget:.0%} kept" for budget in budgets)], cells)
    whole = [[name, f"{share:.1%}", text(name, share)] for name, share in found if name in (*BITS, EVERYTHING)]
    bytes_kept = [markdown(["", "of the bytes", "Spearman (loss)"], whole), ""] if whole else []
    return "\n".join([table, "", *bytes_kept, *(verdict(found, budget) for budget in budgets)])


def verdict(found: dict[tuple[str, float], Row], budget: float) -> str:
    """Whether the default keeps most."""
    scores = {name: found[name, budget]["spearman"] for name in SHOWN if (name, budget) in found}
    others = max((score for name, score in scores.items() if name != OURS), default=math.nan)
    gap = scores.get(OURS, math.nan) - others
    text = f"{budget:.0%}: the default, planned, at most {NOISE} below the best other way, above it by"
    return bar(text, gap, gap >= -NOISE)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("base", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"the directory of an embedder ({OWN})")
    shares = " ".join(map(str, BUDGETS))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help=f"shares kept ({shares})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no model after that many")
    options = parser.parse_args(argv)
    options.budget = max(BUDGETS)
    file, began, model = kept_in(options, "base"), time.monotonic(), name_of(options.model)
    context = prepared(options, options.model, pairs=256, held=64)
    done = {(line["method"], line["budget"]) for line in read(file) if line["model"] == model}
    for way, budget, make in models(context, options.budgets):
        if (way, budget) in done or time.monotonic() - began > 60 * options.minutes:
            continue
        line = scored(context, way, budget, model=model, make=make)
        keep(file, line)
        print(f"  {way}, {budget:.0%}: {line['spearman']:.4f}, {line['loss']:.4f}", flush=True)
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
