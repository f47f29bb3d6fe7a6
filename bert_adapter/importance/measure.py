"""How much each entry of a kernel matters: Fisher information, summed over the examples of all batches."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.batches import check_weights
from bert_adapter.files import check_writable
from bert_adapter.importance.batch import Position, Wanted, all_finite, batch_sums
from bert_adapter.importance.fingerprint import of_arrays, of_function, of_params
from bert_adapter.importance.gradients import Gradients, check_gradients
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import (
    STATISTICS,
    Basis,
    Importance,
    differences,
    same_bases,
    symmetrised,
    upper_blocks,
    with_symmetric,
)
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.model import check_batch
from bert_adapter.progress import track
from bert_adapter.values import check_finite

SAVE_EVERY = 60.0  # seconds between two states of a file that is measured into
CAUSES = "batches differ in their texts, order, labels, batch_size or max_length"
OTHER_FILE = ": name another file, or delete this one to measure anew"


def measure_importance(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    *,
    gradients: Gradients = "gaussian",
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
      paths: layers, by the paths of their parameters ("encoder/layer/0/attention/self/query").
      gradients: of which loss. A function (output, batch) -> (batch,), each example's loss with its label: the
        empirical Fisher. Or the model's own predictive distribution, without labels: "categorical", the output
        (batch, classes) being logits, sums over all classes c the squared gradient of -log p_c, times p_c, in
        classes - 1 backward passes; of logits (batch, time, classes) it sums that over all places that are visible,
        and whose label, if the batch has "labels", is not -100, in expectation over random signs, in one backward
        pass; "span", logits (batch, time, 2) of where an answer starts and ends, likewise; "bernoulli", the output
        (batch, labels) being logits of labels that may be there at once, sums over both values of each label, in as
        many backward passes; "gaussian", the output (batch, width) being an embedding or the values of a regression,
        projects it on a random direction for each example, whose squared gradient is, in expectation, what half the
        squared error of the output feels (Gauss-Newton).
      statistics: which of those of `Sums`. "inputs" alone needs no backward pass.
      bases: by path, the coordinates for "fisher"; see `eigenbases`.
      seed: of the random directions.
      file: a safetensors file that holds what was measured so far, once a minute and in the end. If it is there
        already, as many batches are skipped as it has seen: a run that was killed goes on. It knows the fingerprints
        of the parameters, the model's and the loss's programs, and every batch, and is refused for others.

    Memory: the activations of one batch, for "fisher" batch * in * out numbers of the largest kernel, and the sums,
    2 in * out numbers per kernel for "fisher", in**2 and out**2 for the others, however many examples there are.

    Raises:
      ValueError: no batches, token ids or weights that cannot be, paths that are no layers of the model, unknown names,
        a file of something else, or one that cannot be written.
      FloatingPointError: an output or a gradient that is not finite; the message names the batch.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, bert_adapter
      >>> net = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)])
      >>> batch = {"x": jnp.ones((4, 5))}
      >>> params = net.init(jax.random.key(0), batch["x"])["params"]
      >>> def forward(params, batch):
      ...     return net.apply({"params": params}, batch["x"])
      >>> importance = bert_adapter.measure_importance(forward, params, [batch], ["layers_0"])
      >>> importance.examples, importance["layers_0"].inputs.shape
      (4, (5, 5))
    """
    wanted = Wanted(forward, check_gradients(gradients), frozenset(paths), check_statistics(statistics))
    if file is not None:
        check_writable(Path(file))
    sums, update = batch_functions(wanted)
    key, fixed = jax.random.key(seed), dict(bases or {})
    total: Importance | None = None
    saved, number = time.monotonic(), -1
    for number, batch in enumerate(track(batches, "importance", progress)):
        check_batch(forward, batch, number)
        check_weights(batch, f"batch {number}")
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        text = of_arrays(batch)
        if total is None:
            shapes = jax.eval_shape(sums, params, arrays, Position(key, 0, fixed))
            fresh = replace(empty(shapes, wanted, seed, fixed), **fingerprints(wanted, params, arrays))
            total = continued(fresh, text, file)
        if number < total.batches:
            check_text(total, number, text, file)
            continue
        position = Position(jax.random.fold_in(key, number), total.examples, fixed)
        summed, finite = update(total.sums, params, arrays, position)
        check_sums(finite, number, lambda arrays=arrays: forward(params, arrays))
        total = counted(total, summed, batch, text)
        if file is not None and time.monotonic() - saved > SAVE_EVERY:
            save_importance(symmetrised(total), file)
            saved = time.monotonic()
    importance = symmetrised(check_all_read(total, number + 1, file))
    if file is not None:
        save_importance(importance, file)
    return importance


def fingerprints(wanted: Wanted, params: Any, batch: Batch) -> dict[str, str]:
    """Of the parameters, and of what is computed from them."""

    def function(params: Any, batch: Batch) -> Any:
        output = wanted.forward(params, batch)
        return output, wanted.gradients(output, batch) if callable(wanted.gradients) else ()

    return {"model": of_params(params), "function": of_function(function, params, batch)}


def check_statistics(statistics: Iterable[str]) -> tuple[str, ...]:
    """The statistics in the order of `Sums`, once each."""
    names = set(statistics)
    if unknown := names - set(STATISTICS):
        raise ValueError(f"statistics must be of {', '.join(map(repr, STATISTICS))}; got {sorted(unknown)}")
    return tuple(name for name in STATISTICS if name in names)


def empty(shapes: Any, wanted: Wanted, seed: int, bases: dict[str, Basis]) -> Importance:
    """The measurement of no batch yet."""
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    gradients = wanted.gradients if isinstance(wanted.gradients, str) else "labels"
    return Importance(zeros, examples=0, tokens=0, batches=0, gradients=gradients, seed=seed, bases=bases)


def counted(total: Importance, sums: Any, batch: Batch, text: str) -> Importance:
    """The sums in place of the total's, which have seen one batch more."""
    examples, tokens = counts(batch)
    return replace(
        total,
        sums=sums,
        examples=total.examples + examples,
        tokens=total.tokens + tokens,
        batches=total.batches + 1,
        texts=(*total.texts, text),
    )


def counts(batch: Batch) -> tuple[int, int]:
    """How many examples a batch holds, and how many tokens that are no padding."""
    weights = check_weights(batch)
    mask = np.asarray(batch.get("attention_mask", np.ones((len(weights), 1))), float).reshape(len(weights), -1)
    return round(weights.sum()), round(float(weights @ mask.sum(axis=1)))


def continued(fresh: Importance, text: str, file: str | Path | None) -> Importance:
    """What the file holds, if that is the beginning of what is to be measured; without a file, the fresh one."""
    if file is None or not Path(file).exists():
        return fresh
    found = load_importance(file)
    if different := [*others(found, fresh, text), *differences(found, symmetrised(fresh))]:
        raise ValueError(f"{file} holds another measurement than is wanted: {', '.join(different)}{OTHER_FILE}")
    return with_symmetric(found, upper_blocks)


def others(found: Importance, fresh: Importance, text: str) -> list[str]:
    """What two measurements are of, where that differs; the second one begins with the text."""
    same = {
        "of another model (its parameters differ)": found.model == fresh.model,
        "of another module or loss (their programs differ)": found.function == fresh.function,
        f"of the seed {found.seed}, wanted {fresh.seed}": found.seed == fresh.seed,
        f"of other texts ({CAUSES})": found.texts[:1] == (text,),
        "in other eigenbases": not (found.bases and fresh.bases) or same_bases(found.bases, fresh.bases),
    }
    return [name for name, is_same in same.items() if not is_same]


def check_text(total: Importance, number: int, text: str, file: Any) -> None:
    """The file has seen this batch, and no other, in its place."""
    if total.texts[number : number + 1] != (text,):
        where = f"from batch {number} on, counted from 0"
        raise ValueError(f"{file} holds a measurement of other texts, {where} ({CAUSES}){OTHER_FILE}")


def check_all_read(total: Importance | None, count: int, file: Any) -> Importance:
    """The total, which has seen `count` batches and no others."""
    if total is None:
        raise ValueError("no batches: wanted at least one to measure the importance of the kernels on")
    if count < total.batches:
        raise ValueError(f"{file} holds a measurement of more texts: {total.batches} batches, got {count}{OTHER_FILE}")
    if not total.examples:
        raise ValueError("weights: got no example that counts, wanted some above 0")
    return total


def check_sums(finite: Any, number: int, run: Callable[[], Any]) -> None:
    """A FloatingPointError says what is not finite: the output for a batch, which `run` computes, or its sums."""
    of_output, of_sums = (bool(each) for each in jax.device_get(finite))
    if not of_output:
        for leaf in jax.tree.leaves(run()):
            check_finite(leaf, number)
    if not (of_output and of_sums):
        what = "its gradients or the inputs of its layers are" if of_output else "the model's output is"
        raise FloatingPointError(f"batch {number}: {what} NaN or infinite")


@lru_cache(maxsize=8)
def batch_functions(wanted: Wanted) -> tuple[Callable, Callable]:
    """The sums of one batch, and the update of the total with them, which is compiled once for what is wanted.

    With the updated total comes whether the batch's output and its sums are finite.
    """

    def sums(params: Any, batch: Batch, position: Position) -> Any:
        return batch_sums(wanted, params, batch, position)[0]

    def update(total: Any, params: Any, batch: Batch, position: Position) -> Any:
        added, finite = batch_sums(wanted, params, batch, position)
        good = finite, all_finite([jnp.sum(leaf) for leaf in jax.tree.leaves(added)])
        return jax.tree.map(jnp.add, total, added), good

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
