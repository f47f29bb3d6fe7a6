"""How much each entry of a kernel matters: Fisher information, summed over the examples of all batches."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from bert_adapter.batches import check_weights
from bert_adapter.checkpoint.names import by_path
from bert_adapter.distributions.draw import Draw
from bert_adapter.files import check_writable, path_of
from bert_adapter.importance.batch import (
    AT_ONCE,
    AT_ONCE_ELSEWHERE,
    Leaving,
    Passed,
    Steps,
    Wanted,
    add_kernel,
    by_row,
    entering,
    no_sums,
    no_table_sums,
    passed,
)
from bert_adapter.importance.fingerprint import of_arrays, of_function, of_params
from bert_adapter.importance.gradients import Gradients, check_gradients
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import (
    STATISTICS,
    Importance,
    Sums,
    differences,
)
from bert_adapter.layers.capture import Batch, Forward, Lookup
from bert_adapter.layers.layer import real_steps
from bert_adapter.layers.places import kernel_path
from bert_adapter.layers.stacks import unstacked
from bert_adapter.layers.stacks import whole as whole_path
from bert_adapter.memory import give_back
from bert_adapter.model import Model, Run, check_batch
from bert_adapter.model import forward as function_of
from bert_adapter.own import Own, ways_to_call
from bert_adapter.progress import track
from bert_adapter.steps import SAVE_EVERY
from bert_adapter.values import check_finite
from wlra.checks import check_count

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
    whole: bool = True,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """The exact per-example Fisher information of every kernel and table in `paths`, from one pass over the batches.

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
      statistics: which of those of `Sums`. "inputs" alone needs no backward pass. Of a table they are those of its
        lookups; what a decoder that is tied to it makes of it is not measured.
      whole: if not, Gram matrices of a side that is at least twice as large as the other are measured as the kernel
        passes them on, W E[G'G] W' in place of E[G'G]: all that the closed forms need, fewer operations and far fewer
        numbers. Kernels of float64 have them whole, and all where "fisher" or "rows" are measured too.
      seed: of the random directions.
      file: a safetensors file that holds what was measured so far, once a minute and in the end. If it is there
        already, as many batches are skipped as it has seen: a run that was killed goes on. It knows the fingerprints
        of the parameters, the model's and the loss's programs, and every batch, and is refused for others.

    Memory: the parameters once more, unless they lie on the device or came from `load` and that is a CPU; what enters
    and leaves all layers, and what lies between, for some of a batch's examples, `AT_ONCE` tokens or at least one; for
    "fisher" in * out numbers for each of these, of the largest kernel; and the sums, 2 in * out numbers per kernel for
    "fisher", little more than half of in**2 and out**2 for the others, or of the smaller one's square where they are
    not whole, however many examples there are.

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
    seed = check_count("seed", seed, 0, 2**32 - 1)
    how = check_gradients(gradients), frozenset(paths), check_statistics(statistics)
    wanted = Wanted(forward, *how, whole=how[1] if whole else of_float64(params, how[1]))
    if file is not None:
        check_writable(file)
    run, key, there = program_for(wanted), jax.random.key(seed), jax.device_put(params)
    compiled: list[Any] = []  # for batches of these shapes
    total: Importance | None = None
    count = 1
    saved, number = time.monotonic(), -1
    for number, batch in enumerate(track(batches, "importance", progress)):
        check_batch(forward, batch, number)
        check_weights(batch, f"batch {number}")
        arrays, text = {name: np.asarray(array) for name, array in batch.items()}, of_arrays(batch)
        if total is None:
            layers = run.eval_shape(there, *next(pieces(arrays, key)))
            fresh = replace(empty(layers, wanted, seed), **fingerprints(wanted, params, arrays))
            total, count = continued(fresh, text, file), layers.gradients
        if number < total.batches:
            check_text(total, number, text, file)
            continue
        parts = pieces(arrays, jax.random.fold_in(key, number), count)
        seen = round(total.examples)
        is_new = (shapes := {name: array.shape for name, array in arrays.items()}) not in compiled
        finite = add_batch(total.sums, found_in(partial(run, there), parts, is_new), seen)
        check_sums(finite, number, lambda arrays=arrays: forward(params, arrays))
        total = counted(total, batch, text)
        if is_new:
            compiled.append(shapes)
            give_back()
        if file is not None and time.monotonic() - saved > SAVE_EVERY:
            save_importance(total, file)
            saved = time.monotonic()
    give_back()
    importance = check_all_read(total, number + 1, file)
    if file is not None:
        save_importance(importance, file)
    return importance


def fingerprints(wanted: Wanted, params: Any, batch: Batch) -> dict[str, Any]:
    """Of the parameters, and of what is computed from them for such a batch."""
    inputs = tuple((name, np.shape(array), np.asarray(array).dtype.name) for name, array in sorted(batch.items()))
    return {"model": of_params(params), "function": of_programs(wanted, params, batch), "inputs": inputs}


def check_reached(forward: Forward, params: Any, batch: Batch, paths: Iterable[str]) -> None:
    """A ValueError for layers whose parameters the output does not depend on, so that their gradients are zero."""
    program = jax.make_jaxpr(forward)(params, batch).jaxpr
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    reached = {name.rpartition("/")[0] for name, one in zip(names, used, strict=False) if one}
    if lost := sorted(path for path in paths if whole_path(path) not in reached):
        raise ValueError(f"include: got {lost}, which the output does not depend on: exclude them")


def of_programs(wanted: Any, params: Any, batch: Batch) -> str:
    """The fingerprint of the module and of the loss, if there is one."""

    def function(params: Any, batch: Batch) -> Any:
        output = wanted.forward(params, batch)
        return output, wanted.gradients(output, batch) if callable(wanted.gradients) else ()

    return of_function(function, params, batch)


def check_module(importance: Importance | None, model: Model) -> None:
    """A ValueError if the importance is of another module or function than the model's, with the same parameters.

    A loss of labels is not known here, and a family's model may have been measured by another function than its module.
    """
    if importance is None or not (importance.function and importance.inputs) or importance.gradients == "labels":
        return
    run = function_of(model)
    if not isinstance(run, Run | Own):
        return
    batch = {name: np.zeros(shape, dtype) for name, shape, dtype in importance.inputs}
    runs = ways_to_call(run, importance.gradients) if isinstance(run, Own) else [run]
    every = (Wanted(one, "gaussian", frozenset(), statistics=(), whole=frozenset()) for one in runs)
    if not any(of_programs(wanted, model.params, batch) == importance.function for wanted in every):
        raise ValueError(
            "importance: measured on another module, whose parameters are the same, but whose program differs: "
            "measure_signal(forward(model), model.params, batches, paths) measures this one. If it is to be used all "
            'the same: dataclasses.replace(importance, function=""), or known._replace(measured=None) of decompositions'
        )


def check_statistics(statistics: Iterable[str]) -> tuple[str, ...]:
    """The statistics in the order of `Sums`, once each."""
    names = set(statistics)
    if unknown := names - set(STATISTICS):
        raise ValueError(f"statistics must be of {', '.join(map(repr, STATISTICS))}; got {sorted(unknown)}")
    return tuple(name for name in STATISTICS if name in names)


def of_float64(params: Any, paths: frozenset[str]) -> frozenset[str]:
    """Those of the layers whose kernels have that dtype, on the host: a device may hold them otherwise."""
    flat = by_path(unstacked(params, paths))
    places = {path: kernel_path(flat, path) for path in paths}
    return frozenset(path for path, place in places.items() if place in flat and flat[place].dtype == np.float64)


def empty(shapes: Passed, wanted: Wanted, seed: int) -> Importance:
    """The measurement of no batch yet, of layers whose inputs and output gradients have these shapes."""
    sums, names = {}, wanted.statistics
    for paths, inputs in shapes.inputs.items():
        for path in paths:
            deltas = shapes.deltas.get(path)
            columns = 0 if deltas is None else deltas.width if isinstance(deltas, Leaving) else deltas.shape[-1]
            if isinstance(inputs, Lookup):
                sums[path] = no_table_sums(names, inputs.count, columns)
            elif isinstance(inputs, Steps):
                sums[path] = no_sums(names, inputs.width, inputs.values.shape[-1], through=0)
            else:
                side = 1 if isinstance(deltas, Leaving) else None
                sums[path] = no_sums(names, inputs.shape[-1], columns, through=side)
    gradients = wanted.gradients if isinstance(wanted.gradients, str) else "labels"
    sums = dict(sorted(sums.items()))
    return Importance(sums, examples=0, tokens=0, batches=0, gradients=gradients, seed=seed)


def counted(total: Importance, batch: Batch, text: str) -> Importance:
    """The total, whose sums have seen one batch more."""
    examples, tokens = counts(batch)
    weights = check_weights(batch)
    return replace(
        total,
        weight_squares=whole_if_it_is(total.squares + float(weights @ weights)),
        examples=whole_if_it_is(total.examples + examples),
        tokens=whole_if_it_is(total.tokens + tokens),
        batches=total.batches + 1,
        texts=(*total.texts, text),
    )


def whole_if_it_is(number: float) -> int | float:
    """The number, as an integer where it is one up to rounding. Weights may be far below one."""
    return round(number) if round(number) and abs(number - round(number)) < 1e-6 else number


def counts(batch: Batch) -> tuple[float, float]:
    """How many examples a batch holds, and how many tokens that are no padding; of weights, their sums."""
    weights = check_weights(batch)
    real = real_steps(batch.get("attention_mask", np.ones((len(weights), 1))), len(weights), -1)
    return float(weights.sum()), float(weights @ np.asarray(real).sum(axis=1))


def continued(fresh: Importance, text: str, file: str | Path | None) -> Importance:
    """What the file holds, if that is the beginning of what is to be measured; without a file, the fresh one."""
    if file is None or not path_of(file).exists():
        return fresh
    found = load_importance(file)
    if different := [*others(found, fresh, text), *differences(found, fresh)]:
        raise ValueError(f"{file} holds another measurement than is wanted: {', '.join(different)}{OTHER_FILE}")
    return found


def others(found: Importance, fresh: Importance, text: str) -> list[str]:
    """What two measurements are of, where that differs; the second one begins with the text."""
    same = {
        "of another model (its parameters differ)": found.model == fresh.model,
        "of another module or loss (their programs differ)": found.function == fresh.function,
        f"of the seed {found.seed}, wanted {fresh.seed}": found.seed == fresh.seed,
        f"of other texts ({CAUSES})": found.texts[:1] == (text,),
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
    of_output, of_sums = (bool(np.all(each)) for each in jax.device_get(finite))
    if not of_output:
        for leaf in jax.tree.leaves(run()):
            check_finite(leaf, number)
    if not (of_output and of_sums):
        what = "its gradients or the inputs of its layers are" if of_output else "the model's output is"
        raise FloatingPointError(f"batch {number}: {what} NaN or infinite")


@lru_cache(maxsize=8)
def program_for(wanted: Wanted) -> Any:
    """`passed` for what is wanted, which is compiled once for every shape of a batch."""
    return jax.jit(partial(passed, wanted))


def pieces(batch: Batch, key: Any, gradients: int = 1) -> Iterator[tuple[Batch, Draw]]:
    """The batch in pieces, with their random directions, which are those of the whole.

    They are as large as each other where that is no smaller than half of what may be held at once: every size is a
    program.
    """
    rows, mask = len(next(iter(batch.values()))), batch.get("attention_mask")
    most = AT_ONCE if jax.default_backend() == "cpu" else AT_ONCE_ELSEWHERE
    limit = min(rows, max(1, most // (gradients * (1 if mask is None else mask.size // rows))))
    size = next((size for size in range(limit, limit // 2, -1) if rows % size == 0), limit)
    for begin in range(0, rows, size):
        yield {name: array[begin : begin + size] for name, array in batch.items()}, Draw(key, begin)


def found_in(run: Callable[..., Passed], parts: Iterable[tuple[Batch, Draw]], is_new: bool) -> Iterator[Any]:
    """What a program finds in each part of a batch, and the part.

    is_new: the first one is compiled. What that took goes back before what is made of it needs room.
    """
    for number, part in enumerate(parts):
        found = run(*part)
        if is_new and number == 0:
            give_back()
        yield found, part[0]


def add_batch(sums: dict[str, Sums], parts: Iterable[tuple[Passed, Batch]], seen: int) -> tuple[Any, Any]:
    """The sums get a batch more, in place; whether its outputs are finite, and what was added for each kernel.

    What enters and leaves all layers is held for a few examples at a time; what is made of it, for one kernel.
    """
    outputs, added = [], []
    for found, piece in parts:
        outputs.append(found.finite)
        for paths in list(found.inputs):
            steps, mask = found.inputs.pop(paths), by_row(piece.get("attention_mask"))
            if not isinstance(steps, Steps):
                gram = all(sums[path].inputs is not None for path in paths)
                steps = entering(steps, mask, piece.get("weights"), gram=gram)
            for path in paths:
                before = sums[path].steps
                assert before is not None
                total = sums[path]._replace(steps=before + found.steps[path])
                sums[path], good = add_kernel(total, steps, found.deltas.pop(path, None), seen)
                added.append(good)
        seen += len(next(iter(piece.values())))
        jax.block_until_ready(added)  # or the next piece would be passed through the model before this one is gone
    return outputs, added
