"""Is a compressed model faster, in which engine, and at what price? Does it take the time that its plan says?

all-MiniLM-L6-v2 at 50 and 25 % of its encoder kernels' parameters, planned by the default signal on 512 pairs of
STS-B's train rows. Every engine that is installed takes its turn in every round: JAX, onnxruntime (float32 and int8)
and PyTorch, on as many threads. A speed is that beside the dense model in the same engine, the median over rounds.
"Limit" is what the operations allow: those of the dense model over those of the compressed one, attention's own
products with them. Scores are Spearman's on dev and the mean cosine to the dense embeddings, of the models timed.

Then ten plans for a budget of time, at 8 texts of 128 tokens: the share of the dense model's time that each was
predicted to take, from times of single kernels, and the share that it takes.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import jax

import bert_adapter
from benchmarks.candidates import compressed, measured, prepared, separate
from benchmarks.tables import Row, arguments, at_most, bar, markdown, row, write
from bert_adapter.engines import batch_for
from bert_adapter.evaluate import compare, embed
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.speed import CELLS
from bert_adapter.timing import in_turns

BUDGETS = (0.5, 0.25)
WANTED = {0.5: (1.5, 1.3), 0.25: (2.4, 2.0)}  # speeds at 8 x 128, and at every other size
AGAINST = 1.1  # the most that the dense model may take in JAX, in times of the best other engine
PLANS, NEAR = 10, 0.1
ROUNDS = 5


def operations(model: Model, length: int) -> float:
    """Multiplications for a token: those with kernels or factors, and attention's own products."""
    config = model.module.config
    leaves = jax.tree_util.tree_leaves_with_path(bert_adapter.without_head(model).params["encoder"])
    return (
        sum(leaf.size for _, leaf in leaves if leaf.ndim == 2)
        + config.num_hidden_layers * 2 * length * config.hidden_size
    )


def timed(options: argparse.Namespace, models: dict[str, Model]) -> list[Row]:
    """The rows of all models, engines and cells."""
    cells = [(1, 16)] if options.quick else CELLS
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            bert_adapter.save(model, Path(folder) / name)
        names = {str(Path(folder) / name): name for name in models}
        found = bert_adapter.bench(list(names), cells=cells, rounds=2 if options.quick else ROUNDS)
    rows = []
    for each in found.timings:
        name, dense = names[each.model], models["dense"]
        limit = operations(dense, each.length) / operations(models[name], each.length)
        more = {"engine": each.engine, "batch": each.batch, "length": each.length, "speed": each.speed, "limit": limit}
        peak = found.peaks[each.model, each.engine]
        more |= {"run_seconds": each.seconds, "peak_bytes": peak, "threads": found.threads}
        rows.append(row("speed", name, None, "", **more))
    return rows


def scored(models: dict[str, Model], dev: Any) -> list[Row]:
    """Spearman and the mean cosine of each."""
    texts = separate(dev)
    wanted, rows = embed(models["dense"], texts), []
    for name, model in models.items():
        spearman = bert_adapter.score(model, dev)["spearman"]
        cosine = compare(wanted[:2000], embed(model, texts)[:2000]).cosine
        rows.append(row("score", name, None, "", spearman=spearman, cosine=cosine))
    return rows


def planned(options: argparse.Namespace, dense: Model, known: Any) -> list[Row]:
    """The rows of plans: what each was predicted to take, and takes."""
    batch, length = (1, 16) if options.quick else (8, 128)
    latency = bert_adapter.measure_latency(dense, batch, length)
    run, inputs = jax.jit(bert_adapter.forward(dense)), batch_for(dense, batch, length)
    rows = []
    for number in range(2 if options.quick else PLANS):
        budget = 0.95 - 0.065 * number
        try:
            small, _ = bert_adapter.compress(dense, (), importance=known, budget=budget, of=latency, progress=False)
        except ValueError as error:
            print(f"  {budget:.0%}: {error}", flush=True)
            continue
        share = bert_adapter.plan(dense.params, known, budget, of=latency).share
        both = {name: jax.device_put(model.params) for name, model in {"dense": dense, "small": small}.items()}
        seconds = in_turns({name: lambda params=params: run(params, inputs) for name, params in both.items()}, ROUNDS)
        found = median(one / other for one, other in zip(seconds["small"], seconds["dense"], strict=True))
        rows.append(row("plan", f"{budget:.0%}", None, "", budget=budget, predicted=share, measured=found))
        print(f"  predicted {share:.3f} of the dense model's time, measured {found:.3f}", flush=True)
    return rows


def report(rows: list[Row]) -> str:
    """The tables, and the bars."""
    speeds = [line for line in rows if line["problem"] == "speed"]
    scores = {line["method"]: line for line in rows if line["problem"] == "score"}
    plans = [line for line in rows if line["problem"] == "plan"]
    cells = sorted({(line["batch"], line["length"]) for line in speeds})
    by_key: dict[tuple[str, str], dict[tuple[int, int], Row]] = {}
    for line in speeds:
        by_key.setdefault((line["method"], line["engine"]), {})[line["batch"], line["length"]] = line
    head = ["model", "engine", "Spearman", "cosine", *(f"{batch} x {length}" for batch, length in cells), "peak MB"]
    lines = []
    for (name, engine), found in by_key.items():
        score = scores[name]
        texts = [
            f"{1e3 * found[cell]['run_seconds']:.1f} ms, {found[cell]['speed']:.2f} of {found[cell]['limit']:.2f}"
            for cell in cells
        ]
        peak = f"{found[cells[0]]['peak_bytes'] / 1e6:.0f}"
        lines.append([name, engine, f"{score['spearman']:.4f}", f"{score['cosine']:.3f}", *texts, peak])
    shares = [[line["method"], f"{line['predicted']:.3f}", f"{line['measured']:.3f}"] for line in plans]
    table = markdown(["budget of time", "predicted", "measured"], shares)
    return "\n\n".join([markdown(head, lines), table, "\n".join(verdicts(by_key, plans))])


def verdicts(by_key: dict[tuple[str, str], dict[tuple[int, int], Row]], plans: list[Row]) -> list[str]:
    """The lines of the bars."""
    found = []
    for budget, (large, every) in WANTED.items():
        for engine in ("jax", "onnxruntime"):
            speeds = {cell: line["speed"] for cell, line in by_key.get((f"{budget:.0%}", engine), {}).items()}
            if (8, 128) in speeds:
                text = f"{budget:.0%} of the kernels in {engine}, at least {large} times as fast at 8 x 128"
                found.append(bar(text, speeds[8, 128], speeds[8, 128] >= large))
            if speeds:
                least = min(speeds.values())
                found.append(bar(f"{budget:.0%} in {engine}, at least {every} everywhere", least, least >= every))
    small, theirs = (by_key.get(key, {}).get((1, 32)) for key in (("25%", "onnxruntime-int8"), ("dense", "pytorch")))
    if small and theirs:
        speed = theirs["run_seconds"] / small["run_seconds"]
        found.append(bar("25 % in int8 at 1 x 32, at least 5 times as fast as dense PyTorch", speed, speed >= 5))
    others = [by_key[key] for key in (("dense", "onnxruntime"), ("dense", "pytorch")) if key in by_key]
    if others:
        ours = by_key["dense", "jax"]
        worst = max(
            line["run_seconds"] / min(other[cell]["run_seconds"] for other in others) for cell, line in ours.items()
        )
        found.append(at_most("the dense model in JAX, in times of the fastest other engine,", worst, AGAINST))
    if plans:
        apart = max(abs(line["predicted"] / line["measured"] - 1) for line in plans)
        found.append(at_most(f"{len(plans)} plans of time: predicted apart from measured, by", apart, NEAR))
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Spearman against the time of a text, at 8 texts of 128 tokens, a line for each engine."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scores = {line["method"]: line["spearman"] for line in rows if line["problem"] == "score"}
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    for line in rows:
        if line["problem"] == "speed" and (line["batch"], line["length"]) == (8, 128):
            points.setdefault(line["engine"], []).append((1e3 * line["run_seconds"] / 8, scores[line["method"]]))
    for engine, found in points.items():
        ax.plot(*zip(*sorted(found), strict=True), marker="o", label=engine)
    ax.set(xlabel="milliseconds for a text of 128 tokens, of 8 at once", ylabel="Spearman on STS-B's dev rows")
    if points:
        ax.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    options = arguments("speed", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv").parse_args(argv)
    options.budget = max(BUDGETS)
    context = prepared(options)
    dense, importance = context.dense, measured(context.dense, context.batches, DEFAULT)
    models = {"dense": dense} | {f"{share:.0%}": compressed(context, importance, budget=share) for share in BUDGETS}
    known = bert_adapter.decompose(dense.params, importance, progress=False)
    rows = [*scored(models, context.dev), *timed(options, models), *planned(options, dense, known)]
    text = report(rows)
    print("\n" + text)
    write(options, "speed", rows, draw, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
