"""What was tried for the default of `compress`, and how much of a real model's use does each of it keep?

all-MiniLM-L6-v2 as it comes, all kernels of its encoder, importance from 512 pairs of STS-B's train rows without their
labels. Spearman's correlation on the whole of dev, once each, so that differences below 0.003 are noise; and half the
squared distance to the dense embeddings of dev's texts, which is what the plan predicts and less noisy.
DIR holds STS-B's train.tsv and dev.tsv, as GLUE has them.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import bert_adapter
import wlra
from benchmarks.study import chosen, rows_of, summed
from benchmarks.tables import Row, arguments, markdown, row, write
from benchmarks.timing import Measured
from bert_adapter.checkpoint.names import by_path
from bert_adapter.decompositions import Decompositions, restricted
from bert_adapter.distributions.draw import Draw
from bert_adapter.distributions.gaussian import gaussian
from bert_adapter.importance.batch import time_products
from bert_adapter.importance.sums import Importance
from bert_adapter.layers.capture import Batch, capture, unpadded
from bert_adapter.model import Model
from bert_adapter.signals import DEFAULT
from bert_adapter.text import LabelledTexts

OWN = "all-MiniLM-L6-v2"


class Context(NamedTuple):
    """What every candidate begins with."""

    dense: Model
    pairs: LabelledTexts
    batches: list[Batch]
    dev: LabelledTexts
    held: list[Batch]
    budget: float


def prepared(options: argparse.Namespace, model: Path | None = None, *, pairs: int = 512, held: int = 256) -> Context:
    """The model in a directory, or all-MiniLM-L6-v2, and its batches of so many pairs."""
    from bert_adapter.demo import minilm

    dense = bert_adapter.load(model or minilm())
    train = chosen(rows_of("STS-B", "train", options.data), 8 if options.quick else pairs, 0)
    dev = chosen(rows_of("STS-B", "dev", options.data), 64 if options.quick else None, 0)
    batches, others = (bert_adapter.text_batches(dense, separate(rows)) for rows in (train, chosen(dev, held, 0)))
    return Context(dense, train, list(batches), dev, list(others), options.budget)


def name_of(model: Path | None) -> str:
    """What the model in a directory is called, or all-MiniLM-L6-v2."""
    return OWN if model is None else model.resolve().name


def separate(rows: LabelledTexts) -> list[str]:
    """The texts of all pairs."""
    return [text for pair in rows.texts for text in pair]


def others_of(context: Context, options: argparse.Namespace) -> list[Batch]:
    """Batches of 256 pairs of train rows on which nothing was measured."""
    rows, used = rows_of("STS-B", "train", options.data), set(separate(context.pairs))
    free = [pair for pair in rows.texts if not used & set(pair)]
    picked = np.random.default_rng(1).permutation(len(free))[: 8 if options.quick else 256]
    return list(bert_adapter.text_batches(context.dense, [text for i in picked for text in free[i]]))


def measured(dense: Model, batches: Iterable[Batch], signal: str, seed: int = 0, whole: bool = False) -> Importance:
    """What a signal needs to know of the kernels, with one random direction for a text."""
    params, paths = jax.device_put(dense.params), bert_adapter.select_kernels(dense)
    how: dict[str, Any] = {"signal": signal, "whole": whole, "seed": seed, "progress": False}
    return bert_adapter.measure_signal(bert_adapter.forward(dense), params, batches, paths, **how)


def without_identities(known: Decompositions, dense: Model) -> Decompositions:
    """What was decomposed of a model with identities, of the dense model's kernels alone."""
    return restricted(known, bert_adapter.select_kernels(dense))._replace(model="", measured=None)


def compressed(context: Context, importance: Any, signal: str = DEFAULT, **options: Any) -> Model:
    """The model with the kernels that `compress` makes of it."""
    options = {"signal": signal, "budget": context.budget, "progress": False} | options
    return bert_adapter.compress(context.dense, (), importance=importance, **options)[0]


def with_leaves(model: Model, leaves: Mapping[str, Any]) -> Model:
    """The model with other parameters under these paths."""
    flat = {tuple(path.split("/")): leaf for path, leaf in (by_path(model.params) | dict(leaves)).items()}
    return model._replace(params=unflatten_dict(flat))


def with_biases(dense: Model, small: Model, batches: Iterable[Batch]) -> Model:
    """The small model, each layer's bias corrected by the mean input times what its kernel lost."""
    paths, forward = frozenset(bert_adapter.select_kernels(dense)), bert_adapter.forward(dense)

    @jax.jit
    def inputs(params: Any, batch: Batch) -> dict[str, Any]:
        found = capture(forward, params, batch, paths).inputs
        return {path: unpadded(x, batch["attention_mask"]).sum(axis=(0, 1)) for path, x in found.items()}

    tokens = sum(float(np.sum(batch["attention_mask"])) for batch in batches)
    sums = summed(inputs(dense.params, batch) for batch in batches)
    whole = small._replace(params=bert_adapter.merge(small.params))
    before, after = by_path(dense.params), by_path(whole.params)
    return with_leaves(
        whole,
        {
            f"{path}/bias": after[f"{path}/bias"]
            + sums[path] / tokens @ (before[f"{path}/kernel"] - after[f"{path}/kernel"])
            for path in paths
        },
    )


def fed_back(
    dense: Model,
    small: Model,
    batches: list[Batch],
    importance: Importance,
    *,
    groups: list[list[str]],
    tokens: bool = False,
    ridge: float = 1e-2,
) -> Model:
    """Kernels of the small model's ranks that best map what enters them once those of the groups before are compressed
    to what they made of the dense model's inputs.

    The target is W + (Y'KY + ridge)^-1 Y'K(X - Y) W, with X what enters in the dense model and Y in the other; K says
    which steps of an example go together: the products of their output gradients, or, for `tokens`, none. A model that
    is compressed already stands in for the dense one's kernels, if a single group is all.
    """
    ranks = {
        path.removesuffix("/left"): leaf.shape[1] for path, leaf in by_path(small.params).items() if "/left" in path
    }
    forward = bert_adapter.forward(dense)
    current = small if len(groups) == 1 else dense
    current = current._replace(params=bert_adapter.merge(current.params))
    kernels = by_path(dense.params)
    for group in groups:

        @jax.jit
        def crossed(before: Any, after: Any, batch: Batch, key: Any, paths: frozenset[str] = frozenset(group)) -> Any:
            with jax.default_matmul_precision("highest"):
                x, y = (capture(forward, params, batch, paths) for params in (before, after))
                deltas, _ = x.deltas(gaussian(x.output, Draw(key, 0))[0])
                found = {}
                for path in paths:
                    old, new = (unpadded(one.inputs[path], batch["attention_mask"]) for one in (x, y))
                    both = [old, new] if tokens else [time_products(deltas[path]) @ one for one in (old, new)]
                    found[path] = [jnp.einsum("bti,btj->ij", new, other) for other in both]
            return found

        keys = jax.random.split(jax.random.key(0), len(batches))
        sums = summed(crossed(dense.params, current.params, *both) for both in zip(batches, keys, strict=True))
        refitted = {}
        for path in set(group) & ranks.keys():
            kernel = np.asarray(kernels[f"{path}/kernel"], np.float64)
            across, gram = (np.asarray(array, np.float64) for array in sums[path])
            little = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
            gram = (gram + gram.T) / 2 + little
            target = np.linalg.solve(gram, (across + little) @ kernel).astype(np.float32)
            weights = wlra.Kronecker(jnp.asarray(gram, jnp.float32), importance[path].col_gram)
            result = wlra.solve(target, weights, ranks[path], method="kronecker")
            refitted[f"{path}/kernel"] = np.asarray(result.left) @ np.asarray(result.right)
        current = with_leaves(current, refitted)
    return current


def by_layer(dense: Model) -> list[list[str]]:
    """The kernels of each layer, from below."""
    groups: dict[int, list[str]] = {}
    for path in bert_adapter.select_kernels(dense):
        groups.setdefault(int(path.split("layer/")[1].split("/")[0]), []).append(path)
    return [groups[number] for number in sorted(groups)]


def distilled(context: Context, small: Model, epochs: int) -> Model:
    """All parameters trained to the dense model's outputs on the same texts."""
    return bert_adapter.finetune(
        small, context.batches, loss=no_loss, teacher=context.dense, distil=1.0, epochs=epochs, progress=False
    )[0]


def no_loss(output: Any, batch: Batch) -> Any:
    """Labels do not matter."""
    return jnp.zeros(len(output))


def of_signals(context: Context) -> Iterable[tuple[str, Callable[[], Model]]]:
    """The signals: by name, a call that makes the compressed model."""
    dense, batches = context.dense, context.batches
    yield "dense", lambda: dense
    yield "FWSVD, equal ranks", lambda: compressed(context, measured(dense, batches, "fwsvd"), "fwsvd", uniform=True)
    for name, signal in (("diagonal Fisher information", "exact"), ("E[xx'], E[delta delta']", "kfac")):
        found = measured(dense, batches, signal)
        yield f"{name}, planned", lambda found=found, signal=signal: compressed(context, found, signal)


def of_the_default(context: Context) -> Iterable[tuple[str, Callable[[], Model]]]:
    """Variations of the default, and what may be done after it."""
    dense, batches = context.dense, context.batches
    marginals, *others = (measured(dense, batches, DEFAULT, seed) for seed in range(4))
    for name, uniform in (("planned", False), ("equal ranks", True)):
        yield f"E[GG'], E[G'G], {name}", partial(compressed, context, marginals, "shampoo", uniform=uniform)
    default = compressed(context, marginals)
    yield "the default: ranks by these, factors by half of E[xx'] in place of half of E[GG']", lambda: default
    for count in (16, 64, 256):
        texts = separate(chosen(context.pairs, count // 2, 1))
        few = measured(dense, bert_adapter.text_batches(dense, texts), DEFAULT)
        for name, shrink in (("", None), (", not shrunk towards the identity", 0.0)):
            yield (
                f"the default, {few.examples} texts{name}",
                lambda few=few, shrink=shrink: compressed(context, few, shrink=shrink),
            )
    more = sum(others, marginals)
    yield "the default, four random directions for a text", lambda: compressed(context, more)
    for share in (0.0, 0.001, 0.01, 0.1):
        yield (
            f"the default, {share:.1%} towards the identity, whatever is noise",
            lambda share=share: compressed(context, marginals, shrink=share),
        )
    yield "the default, biases corrected by E[x] (W - left right)", lambda: with_biases(dense, default, batches)
    known = measured(dense, batches, DEFAULT, whole=True)
    together, layers = [list(bert_adapter.select_kernels(dense))], by_layer(dense)
    for order, groups in (("all kernels at once", together), ("layer after layer", layers)):
        for name, tokens in (("steps apart", True), ("steps as gradients tie them", False)):
            yield (
                f"error feedback, {order}, {name}",
                partial(fed_back, dense, default, batches, importance=known, groups=groups, tokens=tokens),
            )
    yield "the default, then two epochs of Adam to the dense embeddings", lambda: distilled(context, default, 2)


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    bars = ax.barh([line["method"] for line in rows], [line["spearman"] for line in rows])
    ax.bar_label(bars, fmt="%.4f", padding=3)
    ax.set(xlabel="Spearman on STS-B's dev rows", xlim=(min(line["spearman"] for line in rows) - 0.02, None))
    ax.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("candidates", __doc__, data="GLUE: STS-B/train.tsv and dev.tsv")
    parser.add_argument("--budget", type=float, default=0.25, help="share of parameters kept (%(default)s)")
    options = parser.parse_args(argv)
    context, rows = prepared(options), []
    for name, make in chain(of_signals(context), of_the_default(context)):
        began = time.perf_counter()
        model = make()
        cost = Measured(None, None, time.perf_counter() - began, None)
        score = bert_adapter.score(model, context.dev)["spearman"]
        loss = bert_adapter.loss_increase(context.dense, model, context.held)
        rows.append(row("STS-B", name, loss, "", cost, spearman=score, budget=options.budget))
        print(f"  {name}: {score:.4f}, {loss:.4f}", flush=True)
    text = report(rows)
    print("\n" + text)
    write(options, "candidates", rows, draw, doc=__doc__, text=text)


def report(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    head = [f"tried, {rows[0]['budget']:.0%} kept", "Spearman", "loss"]
    cells = [[line["method"], f"{line['spearman']:.4f}", f"{line['loss']:.4f}"] for line in rows]
    return markdown(head, cells)


if __name__ == "__main__":
    main()
