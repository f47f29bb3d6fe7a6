"""How much each entry of a kernel matters: Fisher information, summed over the examples of all batches."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.importance.batch import batch_sums
from bert_adapter.importance.gradients import DISTRIBUTIONS, Gradients
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import STATISTICS, Basis, Importance, differences, mirrored, strips, with_symmetric
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.progress import track

SAVE_EVERY = 60.0  # seconds between two states of a file that is measured into


def measure_importance(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    *,
    loss: Gradients = "gaussian",
    statistics: Iterable[str] = ("fisher", "inputs", "outputs"),
    bases: Mapping[str, Basis] | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """The exact per-example Fisher information of every kernel in `paths`, from one pass over the batches.

    Per example, not per batch: the square of a sum of gradients is not the sum of their squares (Kunstner et al. 2019
    on which Fisher this is; Martens & Grosse 2015 on the Kronecker factors).

    Args:
      forward: (params, batch) -> output; no dropout.
      batches: mappings of arrays with a leading batch axis. A key "attention_mask" (batch, time) marks padding by 0, a
        key "weights" (batch,) says how often each example counts.
      paths: dense layers, by the paths of their parameters ("encoder/layer/0/attention/self/query").
      loss: whose gradients. A function (output, batch) -> (batch,), each example's loss with its label: the empirical
        Fisher. Or the model's own predictive distribution, without labels: "categorical", the output (batch, classes)
        being logits, sums over all classes c the squared gradient of -log p_c, times p_c, in classes - 1 backward
        passes; "gaussian", the output (batch, width) being an embedding or the value of a regression, projects it on a
        random direction for each example, whose squared gradient is, in expectation, what half the squared error of the
        output feels (Gauss-Newton).
      statistics: which of those of `Sums`. "inputs" alone needs no backward pass.
      bases: by path, the coordinates for "fisher"; see `eigenbases`.
      seed: of the random directions.
      file: a safetensors file that holds what was measured so far, once a minute and in the end. If it is there
        already, as many batches are skipped as it has seen: a run that was killed goes on.

    Memory: the activations of one batch, for "fisher" batch * in * out numbers of the largest kernel, and the sums,
    2 in * out numbers per kernel for "fisher", in**2 and out**2 for the others, however many examples there are.

    Raises:
      ValueError: no batches, paths that are no dense layers of the model, unknown names, or a file of something else.
    """
    wanted = tuple(name for name in STATISTICS if name in set(statistics))
    if unknown := set(statistics) - set(STATISTICS):
        raise ValueError(f"statistics must be of {', '.join(map(repr, STATISTICS))}; got {sorted(unknown)}")
    if not (callable(loss) or loss in DISTRIBUTIONS):
        raise ValueError(f"loss must be a function or one of {', '.join(map(repr, DISTRIBUTIONS))}; got {loss!r}")
    fixed = dict(bases or {})
    gradients = "labels" if callable(loss) else loss
    sums, update = batch_functions(forward, loss, frozenset(paths), wanted)
    key = jax.random.key(seed)
    total: Importance | None = None
    saved = time.monotonic()
    for number, batch in enumerate(track(batches, "importance", progress)):
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        if total is None:
            shapes = jax.eval_shape(sums, params, arrays, key, 0, fixed)
            empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
            total = continued(Importance(empty, 0, 0, 0, gradients, seed, fixed), file)
        if number < total.batches:
            continue
        added = update(total.sums, params, arrays, jax.random.fold_in(key, number), total.examples, fixed)
        examples, tokens = counts(batch)
        total = replace(
            total,
            sums=added,
            examples=total.examples + examples,
            tokens=total.tokens + tokens,
            batches=number + 1,
        )
        if file is not None and time.monotonic() - saved > SAVE_EVERY:
            save_importance(mirrored(total), file)
            saved = time.monotonic()
    if total is None:
        raise ValueError("no batches: wanted at least one to measure the importance of the kernels on")
    measured = mirrored(total)
    if file is not None:
        save_importance(measured, file)
    return measured


def counts(batch: Batch) -> tuple[int, int]:
    """How many examples a batch holds, and how many tokens that are no padding."""
    weights = np.asarray(batch.get("weights", np.ones(len(next(iter(batch.values()))))), float)
    mask = np.asarray(batch.get("attention_mask", np.ones((len(weights), 1))), float)
    return round(weights.sum()), round(float(weights @ mask.sum(axis=1)))


def continued(fresh: Importance, file: str | Path | None) -> Importance:
    """What the file holds, if that is the beginning of what is to be measured; without a file, the fresh one."""
    if file is None or not Path(file).exists():
        return fresh
    found = load_importance(file)
    seeds = "" if found.seed == fresh.seed else f"seed: {found.seed} and {fresh.seed}"
    if different := differences(found, mirrored(fresh)) or seeds:
        raise ValueError(f"{file} holds another measurement than is wanted; {different}")
    return with_symmetric(found, strips)


@cache
def batch_functions(
    forward: Forward, loss: Gradients, paths: frozenset[str], statistics: tuple[str, ...]
) -> tuple[Callable, Callable]:
    """The sums of one batch, and the compiled update of the total with them; compiled once for each model and loss."""
    sums = partial(batch_sums, forward, loss, paths, statistics)

    def update(total: Any, params: Any, batch: Batch, key: Any, seen: Any, bases: Any) -> Any:
        return jax.tree.map(jnp.add, total, sums(params, batch, key, seen, bases))

    return sums, jax.jit(update, donate_argnums=0)


def eigenbases(importance: Importance) -> dict[str, Basis]:
    """By kernel, the eigenvectors of its Kronecker factors: the coordinates in which the Fisher is nearest diagonal.

    George et al. 2018, sec. 3 (EKFAC). A second pass of `measure_importance` with these as `bases` measures the
    diagonal there.

    Raises:
      ValueError: the factors "inputs" and "outputs" were not measured.
    """

    def vectors(path: str, gram: Any) -> Float[Array, "n n"]:
        if gram is None:
            raise ValueError(f"{path}: an eigenbasis needs the statistics 'inputs' and 'outputs'; measure them first")
        return jnp.asarray(np.linalg.eigh(np.asarray(gram))[1][:, ::-1])

    return {
        path: Basis(vectors(path, sums.inputs), vectors(path, sums.outputs)) for path, sums in importance.sums.items()
    }
