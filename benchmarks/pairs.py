"""Is attention better made smaller by fewer dimensions a head than by factors of each of its kernels?

Query and key meet in products of a head's dimensions only, and so do value and output. A factorised identity between
the two, of rank r, multiplied into both of them, leaves r dimensions a head: dense kernels that are narrower, and
attention's own products with them, in place of a second product for each kernel. The identities are weighed as kernels
are, by the default signal, and all heads of a layer keep as many dimensions, a multiple of 4.

all-MiniLM-L6-v2, importance from 512 pairs of STS-B's train rows without their labels; shares are of the encoder
kernels' parameters, planned by the predicted loss: "kernels", ranks of all kernels, multiples of 16, which is what
`compress` makes; "heads", those of feed-forward kernels, and heads' dimensions; "either", for each pair of kernels of a
layer whichever is predicted to lose less. Scores are Spearman's on the whole of dev and the mean cosine to the dense
embeddings. A speed is that beside the dense model in JAX, the median over rounds in which all take turns, "of" what the
operations allow; scores in the same time are those between two budgets of "kernels", at 8 texts of 128 tokens.

DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import itertools
import math
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen

import bert_adapter
from benchmarks.candidates import Context, measured, prepared, separate, with_leaves
from benchmarks.speed import kept_of, operations
from benchmarks.tables import Row, arguments, bar, conclude, keep, kept_in, markdown, row
from bert_adapter.checkpoint.names import by_path
from bert_adapter.decompositions import Decompositions, predicted_losses, sides
from bert_adapter.engines import batch_for
from bert_adapter.evaluate import embed
from bert_adapter.families import bert
from bert_adapter.families.parts import Scope, attend, dense, filled, split_heads, visible
from bert_adapter.kernels import break_even
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT, as_signal
from bert_adapter.signals.weights import evidence_of
from bert_adapter.speed import CELLS
from bert_adapter.timing import in_turns
from wlra import components

BUDGETS, ROUNDS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15), 9
AT = (8, 128)  # texts and tokens
WAYS = ("kernels", "heads", "either")
PAIRS = {"query": ("query", "key"), "value": ("value", "output")}  # by where the identity is: what it stands between
HEADS, RANKS = 4, 16  # what dimensions and ranks are multiples of
SELF = "encoder/layer/{}/attention/self/{}"

Widths = tuple[Mapping[str, int], ...]  # for each layer, a head's dimensions of "query" and of "value"


def self_attention(widths: Widths | None, number: int, context: Any, x: Any, seen: Any) -> Any:
    """BERT's with heads of other widths; without any, an identity for each head after query and value."""
    heads, hidden = context.config.num_attention_heads, context.config.hidden_size
    sides = {"query": "query", "key": "query", "value": "value"}
    sizes = {name: hidden if widths is None else heads * widths[number][side] for name, side in sides.items()}
    states = {name: split_heads(context, dense(context, size, name)(x)) for name, size in sizes.items()}
    for name in PAIRS if widths is None else ():
        ones = [linen.Dense(hidden // heads, use_bias=False, name=f"{name}_{head}") for head in range(heads)]
        states[name] = jax.numpy.stack([one(states[name][:, :, head]) for head, one in enumerate(ones)], axis=2)
    return attend(context, *states.values(), visible=seen)


def layer(widths: Widths | None, number: int, context: Any, x: Any, seen: Any) -> Any:
    def attention(context: Any, x: Any) -> Any:
        mixed = Scope(partial(self_attention, widths, number), name="self")(context, x, seen)
        return Scope(bert.output, name="output")(context, mixed, x)

    x = Scope(attention, name="attention")(context, x)
    return Scope(bert.output, name="output")(context, Scope(bert.intermediate, name="intermediate")(context, x), x)


def encode(widths: Widths | None, context: Any, inputs: Any) -> Any:
    """BERT's states, from heads of these widths."""
    config, inputs = context.config, filled(inputs, bert.sizes(context.config), context.config.max_position_embeddings)
    seen = visible(inputs.attention_mask)

    def layers(context: Any, x: Any) -> Any:
        def step(x: Any, i: int) -> Any:
            return Scope(partial(layer, widths, i), name=str(i))(context, x, seen)

        return tuple(accumulate(range(config.num_hidden_layers), step, initial=x))

    def encoder(context: Any, x: Any) -> Any:
        return Scope(layers, name="layer")(context, x)

    x = Scope(bert.embeddings, name="embeddings")(context, inputs, config.hidden_size)
    return Scope(encoder, name="encoder")(context, x)


def with_heads(dense: Model, widths: Widths | None, params: Any) -> Model:
    """The embedder with heads of these widths, or with identities; parameters that fit."""
    kind = type("Heads", (bert.BertEmbedder,), {"encode": staticmethod(partial(encode, widths))})
    module: Any = dense.module
    return dense._replace(module=kind(module.config, module.add_pooling_layer, module.stages), params=params)


def with_identities(dense: Model) -> Model:
    """The same model, with an identity for each head after query and value."""
    config: Any = dense.module.config
    heads, eye = config.num_attention_heads, np.eye(config.hidden_size // config.num_attention_heads, dtype=np.float32)
    places = itertools.product(range(config.num_hidden_layers), PAIRS, range(heads))
    ones = {f"{SELF.format(i, f'{name}_{head}')}/kernel": eye for i, name, head in places}
    return with_heads(dense, None, with_leaves(dense, ones).params)


class Known(NamedTuple):
    """The dense model, what is known of its kernels and identities, and the importance that was measured of these."""

    dense: Model
    kernels: Decompositions
    importance: Any


class Options(NamedTuple):
    """What a kernel, or a pair's identities, can be: parameters, predicted loss, and rank or dimensions."""

    cost: np.ndarray
    loss: np.ndarray
    rank: np.ndarray

    def best(self, price: float) -> int:
        """The place of what costs least, a parameter at this price."""
        return int(np.argmin(self.loss + price * self.cost))


def of_kernel(known: Decompositions, path: str) -> Options:
    """Ranks below break-even, and dense."""
    m, n = known.shapes[path]
    ranks = np.array(range(RANKS, math.ceil(break_even((m, n))), RANKS))
    loss = predicted_losses(known.squares[path]) / known.examples[path]
    whole = min(m, n)
    return Options(np.append(ranks * (m + n), m * n), np.append(loss[ranks], 0.0), np.append(ranks, whole))


def of_pair(known: Decompositions, config: Any, number: int, name: str) -> Options:
    """Dimensions that all heads keep, up to all."""
    heads = config.num_attention_heads
    kept = np.arange(HEADS, config.hidden_size // heads + 1, HEADS)
    squares = np.sum([known.squares[SELF.format(number, f"{name}_{head}")] for head in range(heads)], axis=0)
    return Options(
        2 * config.hidden_size * heads * kept,
        predicted_losses(squares)[kept] / known.examples[SELF.format(number, f"{name}_0")],
        kept,
    )


class Plan(NamedTuple):
    """Ranks by path, widths by layer, and what is predicted to be lost."""

    ranks: dict[str, int]
    widths: Widths
    cost: float
    loss: float


def path_of(number: int, name: str) -> str:
    """Where a kernel of attention is."""
    return SELF.format(number, name) if name != "output" else f"encoder/layer/{number}/attention/output/dense"


def plan_at(known: Known, way: str, price: float) -> Plan:
    """What is best where a parameter has this price."""
    config: Any = known.dense.module.config
    ranks, widths, cost, loss = {}, [], 0.0, 0.0
    whole = config.hidden_size // config.num_attention_heads
    for number in range(config.num_hidden_layers):
        kept = {}
        for name, pair in PAIRS.items():
            each = {path_of(number, one): of_kernel(known.kernels, path_of(number, one)) for one in pair}
            chosen = {path: options.best(price) for path, options in each.items()}
            apart = [sum(each[path][k][place] for path, place in chosen.items()) for k in (0, 1)]
            heads = of_pair(known.kernels, config, number, name)
            place = heads.best(price)
            cut = [heads.cost[place], heads.loss[place]]
            by_heads = way == "heads" or (way == "either" and cut[1] + price * cut[0] < apart[1] + price * apart[0])
            cost, loss = (total + more for total, more in zip((cost, loss), cut if by_heads else apart, strict=True))
            kept[name] = int(heads.rank[place]) if by_heads else whole
            ranks |= {} if by_heads else {path: int(each[path].rank[place]) for path, place in chosen.items()}
        widths.append(kept)
        for name in ("intermediate/dense", "output/dense"):
            path = f"encoder/layer/{number}/{name}"
            options = of_kernel(known.kernels, path)
            place = options.best(price)
            ranks[path] = int(options.rank[place])
            cost, loss = cost + options.cost[place], loss + options.loss[place]
    return Plan(ranks, tuple(widths), cost, loss)


def planned(known: Known, way: str, budget: float) -> Plan:
    """The plan of the lowest price that keeps to a share of the kernels' parameters."""
    paths = bert_adapter.select_kernels(known.dense)
    most, low, high = budget * sum(m * n for m, n in paths.values()), -40.0, 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if plan_at(known, way, np.exp(middle)).cost <= most else (middle, high)
    return plan_at(known, way, np.exp(high))


def factors_of(known: Known, number: int, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(heads, size, width) and (heads, width, size): the identities of a layer, factorised."""
    heads, found = known.dense.module.config.num_attention_heads, []
    for head in range(heads):
        path = SELF.format(number, f"{name}_{head}")
        size = known.kernels.shapes[path][0]
        evidence = evidence_of(known.importance, path, (size, size), np.eye(size, dtype=np.float32))
        made = components.decompose(
            np.eye(size), *sides(np.eye(size), as_signal(DEFAULT).weights(evidence, None)), size
        )
        found.append(components.cut(made, width))
    lefts, rights = zip(*found, strict=True)
    return np.stack(lefts), np.stack(rights)


def narrowed(known: Known, number: int, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """By path, the kernels and biases of a layer's attention with heads of these widths."""
    flat, found, config = by_path(known.dense.params), {}, known.dense.module.config
    size = config.hidden_size // config.num_attention_heads
    for name, (one, other) in PAIRS.items():
        if (width := widths[name]) == size:
            continue
        left, right = factors_of(known, number, name, width)
        if name == "query":
            left = left * np.sqrt(width / size)  # scores are divided by the root of the dimensions
        for place, factor in ((one, left), (other, np.swapaxes(right, 1, 2))):
            path = path_of(number, place)
            kernel = flat[f"{path}/kernel"]
            if place == "output":
                rows = np.einsum("hsr,hsn->hrn", factor, kernel.reshape(-1, size, kernel.shape[1]))
                found[f"{path}/kernel"] = rows.reshape(-1, kernel.shape[1])
                continue
            for end in ("kernel", "bias"):
                leaf = flat[f"{path}/{end}"]
                columns = np.einsum("...hs,hsr->...hr", leaf.reshape(*leaf.shape[:-1], -1, size), factor)
                found[f"{path}/{end}"] = columns.reshape(*leaf.shape[:-1], -1)
    return {path: leaf.astype(np.float32) for path, leaf in found.items()}


def smaller(known: Known, plan: Plan) -> Model:
    """The model of a plan."""
    small, _ = bert_adapter.factorise(
        known.dense.params, known.kernels.kernels, plan.ranks, method="kronecker", progress=False
    )
    leaves: dict[str, Any] = {}
    for number, widths in enumerate(plan.widths):
        leaves |= narrowed(known, number, widths)
    return with_heads(known.dense, plan.widths, with_leaves(known.dense._replace(params=small), leaves).params)


def multiplications(model: Model, widths: Widths | None, length: int) -> float:
    """Those for a token: of all dimensions of heads, less those that are not there."""
    config: Any = model.module.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    gone = sum(size - width for each in widths or () for width in each.values())
    return operations(model, length) - length * heads * gone


def scored(context: Context, model: Model, wanted: np.ndarray) -> dict[str, float]:
    """Spearman and the mean cosine to what is wanted."""
    return kept_of(embed(model, separate(context.dev)), wanted, context.dev.labels)


def speeds(models: Mapping[Any, Model], cell: tuple[int, int], rounds: int) -> dict[Any, float]:
    """Seconds of each, by turns."""
    calls, batch = {}, batch_for(models[None], *cell)
    for key, model in models.items():
        run, params = jax.jit(bert_adapter.forward(model)), jax.device_put(model.params)
        calls[key] = lambda run=run, params=params: run(params, batch)
    return {key: median(found) for key, found in in_turns(calls, rounds).items()}


def report(rows: list[Row]) -> str:
    """The table, and whether heads win."""
    cells = sorted({(line["batch"], line["length"]) for line in rows if line["problem"] == "speed"})
    times = {(line["budget"], line["method"], line["batch"], line["length"]): line for line in rows if "batch" in line}
    lines = []
    for line in rows:
        if line["problem"] != "score":
            continue
        found = [times[line["budget"], line["method"], *cell] for cell in cells]
        speed = [f"{each['speed']:.2f} of {each['limit']:.2f}" for each in found]
        about = [f"{line['kept']:.1%}", line["method"], f"{line['loss']:.4g}" if line["loss"] is not None else ""]
        lines.append([*about, f"{line['spearman']:.4f}", f"{line['cosine']:.4f}", *speed])
    head = ["kept", "by", "predicted loss", "Spearman", "cosine", *(f"{batch} x {length}" for batch, length in cells)]
    return "\n\n".join([markdown(head, lines), "\n".join(verdicts(rows))])


def verdicts(rows: list[Row]) -> list[str]:
    """What other ways keep beside kernels of any budget at the time that they take."""
    points = {way: curve(rows, way) for way in WAYS}
    found = []
    for way in WAYS[1:]:
        for budget, (seconds, *scores) in points[way].items():
            for place, (name, score) in enumerate(zip(("Spearman", "cosine"), scores, strict=True), 1):
                theirs = sorted((each[0], each[place]) for each in points["kernels"].values())
                if theirs and theirs[0][0] <= seconds <= theirs[-1][0]:
                    times, kept = np.array(theirs).T
                    gap = score - float(np.interp(seconds, times, kept))
                    found.append(
                        bar(f"{budget:.0%} by {way}, {name} above that of kernels in its time, by", gap, gap > 0)
                    )
    return found


def curve(rows: list[Row], way: str) -> dict[float, tuple[float, float, float]]:
    """By budget, the seconds for a batch of AT, Spearman and the mean cosine."""
    scores = {line["budget"]: line for line in rows if (line["problem"], line["method"]) == ("score", way)}
    times = {line["budget"]: line["run_seconds"] for line in rows if is_timed(line, way)}
    return {
        budget: (times[budget], line["spearman"], line["cosine"]) for budget, line in scores.items() if budget in times
    }


def is_timed(line: Row, way: str) -> bool:
    """Whether it is the time of this way for a batch of AT."""
    return line["method"] == way and (line.get("batch"), line.get("length")) == AT


def draw(rows: list[Row], path: Path) -> None:
    """Scores against the time for a batch, a line for each way."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for place, (ax, name) in enumerate(
        zip(axes, ("Spearman on STS-B's dev rows", "mean cosine to dense"), strict=True), 1
    ):
        for way in WAYS:
            points = sorted((1e3 * each[0], each[place]) for each in curve(rows, way).values())
            ax.plot(*np.reshape(points, (-1, 2)).T, "o-", label=way, markersize=4)
        ax.set(xlabel="milliseconds for {} texts of {} tokens".format(*AT), ylabel=name)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("pairs", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is timed (%(default)s)")
    options = parser.parse_args(argv)
    options.budget = max(BUDGETS)
    file = kept_in(options, "pairs")
    context = prepared(options)
    importance = measured(with_identities(context.dense), context.batches, DEFAULT, whole=True)
    params = with_identities(context.dense).params
    known = Known(context.dense, bert_adapter.decompose(params, importance, progress=False), importance)
    rows, models = run(context, known)
    keep(file, *rows, *timed(options, models))
    conclude(file, report, draw, __doc__)


def run(context: Context, known: Known) -> tuple[list[Row], dict[Any, tuple[Model, Widths | None]]]:
    """The rows of scores, and the models, the dense one by None."""
    models: dict[Any, tuple[Model, Widths | None]] = {None: (context.dense, None)}
    wanted = embed(context.dense, separate(context.dev))
    about: Row = {"budget": 1.0, "kept": 1.0}
    rows = [row("score", "dense", None, "") | about | scored(context, context.dense, wanted)]
    total = sum(m * n for m, n in bert_adapter.select_kernels(context.dense).values())
    for budget, way in itertools.product(BUDGETS, WAYS):
        plan = planned(known, way, budget)
        models[budget, way] = smaller(known, plan), plan.widths
        about = {"budget": budget, "kept": plan.cost / total, "widths": [dict(each) for each in plan.widths]}
        rows.append(row("score", way, plan.loss, "") | about | scored(context, models[budget, way][0], wanted))
        print(f"  {budget:.0%}, {way}: {rows[-1]['spearman']:.4f}, {rows[-1]['cosine']:.4f}", flush=True)
    return rows, models


def timed(options: argparse.Namespace, models: dict[Any, tuple[Model, Widths | None]]) -> list[Row]:
    """The rows of times."""
    rows = []
    for batch, length in [(1, 16)] if options.quick else CELLS:
        seconds = speeds({key: model for key, (model, _) in models.items()}, (batch, length), options.rounds)
        whole = multiplications(*models[None], length)
        for key, (model, widths) in models.items():
            budget, way = (1.0, "dense") if key is None else key
            limit, speed = whole / multiplications(model, widths, length), seconds[None] / seconds[key]
            about: Row = {"batch": batch, "length": length, "speed": speed, "limit": limit, "run_seconds": seconds[key]}
            rows.append(row("speed", way, None, "") | {"budget": budget} | about)
    return rows


if __name__ == "__main__":
    main()
