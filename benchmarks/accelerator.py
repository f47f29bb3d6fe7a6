"""How fast is a base-size encoder in bfloat16 on a GPU, dense, with factors and with heads of fewer dimensions?

all-mpnet-base-v2 (12 layers, 768 wide: BERT-base's kernels), parameters and products in bfloat16, in JAX, 32 texts of
128 tokens and 128 texts of 512 at once. Half and a quarter of its encoder kernels' parameters are kept, planned by the
default signal on 512 pairs of STS-B's train rows, ranks multiples of 64; "heads": with `pairs=True`. A speed is that
beside the dense model, the median over rounds in which all models take their turns; "of" is followed by what the
operations allow, attention's own products with them. TFLOP/s count two operations a multiplication; the ceiling is that
of a square product of 8,192. Scores are Spearman's on the whole of STS-B's dev rows and the mean cosine to the dense
embeddings in float32, of the very models that are timed, in bfloat16.

MODEL is the directory of the embedder. DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bert_adapter
from benchmarks.candidates import Context, measured, prepared, separate, without_identities
from benchmarks.speed import kept_of, operations
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, row
from benchmarks.timing import environment, median_of
from bert_adapter.engines import batch_for
from bert_adapter.evaluate import embed
from bert_adapter.latency import compiled
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.timing import in_turns

CELLS = ((32, 128), (128, 512))
BUDGETS = (0.5, 0.25)
DENSE, HEADS = "dense", "heads"
STEP, ROUNDS, SQUARE = 64, 9, 8192


def in_bfloat16(model: Model) -> Model:
    """The model with parameters of 16 bits, that computes in them."""
    module: Any = model.module
    module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return model._replace(module=module, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, "bfloat16"), model.params))


def models_of(context: Context) -> dict[str, Model]:
    """The dense model and those that are smaller, by name."""
    dense, found = context.dense, {DENSE: context.dense}
    probe = bert_adapter.with_identities(dense)
    known = bert_adapter.decompose(probe.params, measured(probe, context.batches, DEFAULT), progress=False)
    plain = without_identities(known, dense)
    for budget in BUDGETS:
        how: dict[str, Any] = {"budget": budget, "multiple_of": STEP, "progress": False}
        found[f"{budget:.0%}"], _ = bert_adapter.compress(dense, (), importance=plain, **how)
        found[f"{budget:.0%}, {HEADS}"], _ = bert_adapter.compress(dense, (), importance=known, pairs=True, **how)
    return found


def scored(context: Context, models: dict[str, Model]) -> list[Row]:
    """Spearman and the mean cosine of each, and of the dense model in float32."""
    texts, rows = separate(context.dev), []
    wanted = embed(context.dense, texts)
    for name, model in ({f"{DENSE}, float32": context.dense} | models).items():
        kept = kept_of(embed(model, texts), wanted, context.dev.labels)
        rows.append(row("score", name, None, "") | kept)
        print(f"  {name}: {kept['spearman']:.4f}, {kept['cosine']:.4f}", flush=True)
    return rows


def ceiling(size: int) -> float:
    """Operations a second of a square product in bfloat16."""
    one, other = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(one, other))
    return 2.0 * size**3 / median_of(lambda: product(one, other), 9)


def timed(models: dict[str, Model], quick: bool) -> list[Row]:
    """The rows of all models and cells."""
    highest, rows, dense = ceiling(256 if quick else SQUARE), [], models[DENSE]
    for batch, length in [(2, 16)] if quick else CELLS:
        inputs = batch_for(dense, batch, length)
        calls = {name: compiled(model, inputs) for name, model in models.items()}
        with ThreadPoolExecutor() as pool:  # programs are compiled side by side
            list(pool.map(lambda call: jax.block_until_ready(call()), calls.values()))
        found = in_turns(calls, 2 if quick else ROUNDS)
        for name, model in models.items():
            speed = median(one / other for one, other in zip(found[DENSE], found[name], strict=True))
            limit = operations(dense, length) / operations(model, length)
            rate = 2.0 * operations(model, length) * batch * length / median(found[name])
            about = {"batch": batch, "length": length, "run_seconds": median(found[name]), "speed": speed}
            about |= {"limit": limit, "tflops": rate / 1e12, "ceiling_tflops": highest / 1e12}
            rows.append(row("speed", name, None, "") | about | environment())
    return rows


def report(rows: list[Row]) -> str:
    """The table, and whether what is smaller is faster."""
    times = [line for line in rows if line["problem"] == "speed"]
    cells = sorted({(line["batch"], line["length"]) for line in times})
    found = {(line["method"], line["batch"], line["length"]): line for line in times}
    lines = []
    for line in (line for line in rows if line["problem"] == "score"):
        of = [found.get((line["method"], *cell)) for cell in cells]
        texts = [
            ""
            if each is None
            else f"{1e3 * each['run_seconds']:.2f} ms, {each['speed']:.2f} of {each['limit']:.2f}, "
            f"{each['tflops']:.0f} TFLOP/s"
            for each in of
        ]
        lines.append([line["method"], f"{line['spearman']:.4f}", f"{line['cosine']:.4f}", *texts])
    table = markdown(["model", "Spearman", "cosine", *(f"{batch} x {length}" for batch, length in cells)], lines)
    about = (
        f"{times[0]['device']}, jax {times[0]['jax']}: {times[0]['ceiling_tflops']:.0f} TFLOP/s in a square product."
    )
    verdicts = [
        bar(
            f"{line['method']} at {line['batch']} x {line['length']}, faster than dense: times",
            line["speed"],
            line["speed"] > 1,
        )
        for line in times
        if line["method"] != DENSE
    ]
    return "\n\n".join([table, about, "\n".join(verdicts)])


def draw(rows: list[Row], path: Path) -> None:
    """Spearman against the speed, a panel for each number of texts and tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scores = {line["method"]: line["spearman"] for line in rows if line["problem"] == "score"}
    times = [line for line in rows if line["problem"] == "speed"]
    cells = sorted({(line["batch"], line["length"]) for line in times})
    figure, axes = plt.subplots(1, len(cells), figsize=(5.5 * len(cells), 4), squeeze=False, layout="constrained")
    for ax, cell in zip(axes[0], cells, strict=True):
        of = [line for line in times if (line["batch"], line["length"]) == cell]
        for way, wanted in (("factors", False), ("factors and heads", True)):
            points = [
                (line["speed"], scores[line["method"]])
                for line in of
                if line["method"] == DENSE or (HEADS in line["method"]) == wanted
            ]
            ax.plot(*np.transpose(points), "o-", label=way, markersize=4)
        ax.set(title="{} texts of {} tokens".format(*cell), xlabel="times as fast as dense", ylabel="Spearman on STS-B")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("accelerator", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, metavar="MODEL", help="the directory of an embedder (all-MiniLM-L6-v2)")
    options: argparse.Namespace = parser.parse_args(argv)
    options.budget = max(BUDGETS)
    file, context = kept_in(options, "accelerator"), prepared(options, options.model)
    models = {name: in_bfloat16(model) for name, model in models_of(context).items()}
    print("  timing", flush=True)
    keep(file, *timed(models, options.quick))
    print("  timed", flush=True)
    keep(file, *scored(context, models))
    conclude(file, report, draw, __doc__)


if __name__ == "__main__":
    main()
