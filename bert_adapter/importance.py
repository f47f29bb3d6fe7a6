"""How much each entry of a kernel matters: Fisher information, summed over the examples of all batches."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from bert_adapter.capture import Batch, Forward, capture
from bert_adapter.files import read_arrays, writing
from bert_adapter.progress import track

DISTRIBUTIONS = ("categorical", "gaussian")
Loss = Callable[[Any, Batch], Float[Array, " batch"]]
Gradients = Loss | str  # or one of DISTRIBUTIONS
Alike = Float[Array, "batch time time"] | None  # products of output gradients, if any statistic asks for them
SCHEMA = 1  # of the file
SAVE_EVERY = 60.0  # seconds between two states of a file that is measured into


class Sums(NamedTuple):
    """Sums over examples, for a kernel (in, out) with inputs x and output gradients delta; None if not measured.

    fisher: the squared gradient, sum_b (sum_t x_bt delta_bt')**2, over every other example and over the rest: how far
      the halves differ tells how far their sum can be trusted. In the eigenbasis, if there is one.
    rows: of the squared gradient, its sums over the outputs.
    inputs, outputs: sum_bt x_bt x_bt' and sum_bt delta_bt delta_bt', without padding: the Kronecker factors.
    row_gram, col_gram: sum_b G_b G_b' and sum_b G_b' G_b of the gradients G_b = sum_t x_bt delta_bt'.
    gram_squares: sum_b ||G_b G_b'||_F**2, which tells how far the Gram matrices can be trusted.
    Where an example has several gradients, what is squared here is summed over them first.

    While batches are added, symmetric matrices are in `strips`.
    """

    fisher: Float[Array, "2 in out"] | None = None
    rows: Float[Array, " in"] | None = None
    inputs: Float[Array, "in in"] | None = None
    outputs: Float[Array, "out out"] | None = None
    row_gram: Float[Array, "in in"] | None = None
    col_gram: Float[Array, "out out"] | None = None
    gram_squares: Float[Array, ""] | None = None


STATISTICS = Sums._fields
FROM_PRODUCTS = {"rows", "row_gram", "gram_squares"}  # of the time steps' output gradients
SYMMETRIC = ("inputs", "outputs", "row_gram", "col_gram")
STRIP = 384  # rows or columns of a symmetric matrix that are multiplied together


class Basis(NamedTuple):
    """Orthonormal columns: the coordinates of a kernel are inputs.T @ kernel @ outputs."""

    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sums", "bases"],
    meta_fields=["examples", "tokens", "batches", "gradients", "seed"],
)
@dataclass(frozen=True)
class Importance:
    """What was measured, by kernel, and on how much. `a + b` is what both together would have given.

    tokens: time steps that are no padding, if an attention mask tells; else as many as examples.
    gradients: of whose loss: "labels", or of the model's own "categorical" or "gaussian" predictive distribution.
    bases: by kernel, the coordinates that `fisher` is measured in; empty for those of the kernel.
    """

    sums: dict[str, Sums]
    examples: int
    tokens: int
    batches: int
    gradients: str
    seed: int
    bases: dict[str, Basis]

    def __getitem__(self, path: str) -> Sums:
        return self.sums[path]

    def __add__(self, other: "Importance") -> "Importance":
        if different := differences(self, other):
            raise ValueError(f"wanted two measurements of the same; got {different}")
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), self.bases, other.bases)
        if not all(jax.tree.leaves(same)):
            raise ValueError("wanted measurements in one eigenbasis; got two: measure both with the same `bases`")
        return replace(
            self,
            sums=jax.tree.map(jnp.add, self.sums, other.sums),
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            batches=self.batches + other.batches,
        )


def differences(a: Importance, b: Importance) -> str:
    """The first thing in which measurements differ that are to be added or continued; nothing if there is none."""
    found, wanted = (
        {"gradients": one.gradients, "in an eigenbasis": bool(one.bases)}
        | {path: {name: np.shape(array) for name, array in named(sums)} for path, sums in one.sums.items()}
        for one in (a, b)
    )
    both = {name: (found.get(name), wanted.get(name)) for name in found | wanted}
    return next((f"{name}: {x} and {y}" for name, (x, y) in both.items() if x != y), "")


def named(sums: Sums) -> list[tuple[str, Any]]:
    """What was measured of a kernel, with its name."""
    return [(name, array) for name, array in sums._asdict().items() if array is not None]


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


def batch_sums(
    forward: Forward,
    loss: Gradients,
    paths: frozenset[str],
    statistics: tuple[str, ...],
    params: Any,
    batch: Batch,
    key: Any,
    seen: Any,
    bases: Mapping[str, Basis],
) -> dict[str, Sums]:
    """The sums over the examples of one batch, which come after `seen` others."""
    with jax.default_matmul_precision("highest"):
        captured = capture(forward, params, batch, paths)
        mask = batch.get("attention_mask")
        inputs = {path: unpadded(array, mask) for path, array in captured.inputs.items()}
        root = jnp.sqrt(jnp.asarray(batch.get("weights", 1.0), jnp.float32)).reshape(-1, 1, 1)
        total = {path: Sums() for path in inputs}
        if "inputs" in statistics:
            counted = {path: x * root for path, x in inputs.items()}
            total = {path: Sums(inputs=upper_product(x, x)) for path, x in counted.items()}
        if not set(statistics) - {"inputs"}:
            return total
        turned = {path: x @ bases[path].inputs if path in bases else x for path, x in inputs.items()}

        def along(gradient: Any) -> dict[str, tuple[Sums, Alike]]:
            """The sums for one gradient of the output, an example's in each row."""
            deltas = {path: delta.astype(jnp.float32) * root for path, delta in captured.deltas(gradient).items()}
            return {
                path: gradient_sums(turned[path], delta, seen, bases.get(path), statistics)
                for path, delta in deltas.items()
            }

        def step(before: Any, gradient: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, before, along(gradient)), None

        gradients = output_gradients(loss, captured.output, batch, key)
        shapes = jax.eval_shape(along, jax.tree.map(lambda leaf: leaf[0], gradients))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        found, _ = jax.lax.scan(step, zeros, gradients)
        return {
            path: of_inputs(turned[path], alike, statistics, sums._replace(inputs=total[path].inputs))
            for path, (sums, alike) in found.items()
        }


def unpadded(inputs: Float[Array, "batch time in"], mask: Array | None) -> Float[Array, "batch time in"]:
    """float32, with zeros for padding. The gradients of padding are zero as they are."""
    inputs = inputs.astype(jnp.float32)
    if mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs * mask.astype(inputs.dtype)[:, :, None]
    return inputs


def gradient_sums(
    inputs: Float[Array, "batch time in"],
    deltas: Float[Array, "batch time out"],
    seen: Any,
    basis: Basis | None,
    statistics: tuple[str, ...],
) -> tuple[Sums, Alike]:
    """What needs one gradient of the output at a time, and the products of its time steps for what does not.

    The inputs are in the coordinates of the basis already.
    """
    fisher = outputs = col_gram = alike = None
    if "outputs" in statistics:
        outputs = upper_product(deltas, deltas)
    if basis is not None:
        deltas = deltas @ basis.outputs
    if "fisher" in statistics:
        gradients = jnp.einsum("bti,bto->bio", inputs, deltas)
        odd = (jnp.arange(len(inputs), dtype=jnp.int32) + seen) % 2
        halves = jnp.stack([1 - odd, odd]).astype(gradients.dtype)
        fisher = jnp.einsum("hb,bio->hio", halves, gradients**2)
    axis = time_axis(inputs)
    inputs, deltas = mean_first(inputs, axis), mean_first(deltas, axis)
    if "col_gram" in statistics:
        col_gram = upper_product(deltas, products(inputs) @ deltas)
    if FROM_PRODUCTS & set(statistics):
        alike = products(deltas)
    return Sums(fisher=fisher, outputs=outputs, col_gram=col_gram), alike


def of_inputs(inputs: Float[Array, "batch time in"], alike: Alike, statistics: tuple[str, ...], sums: Sums) -> Sums:
    """With what needs of the gradients G = inputs' deltas the products of their time steps alone, summed over all
    gradients of an example: no matrix (in, out) of an example is ever there."""
    if alike is None:
        return sums
    inputs = mean_first(inputs, time_axis(inputs))
    across = alike @ inputs
    if "rows" in statistics:
        sums = sums._replace(rows=jnp.sum(inputs * across, axis=(0, 1)))
    if "row_gram" in statistics:
        sums = sums._replace(row_gram=upper_product(inputs, across))
    if "gram_squares" in statistics:
        both = products(inputs) @ alike
        sums = sums._replace(gram_squares=jnp.sum(both * jnp.swapaxes(both, 1, 2)))
    return sums


def products(steps: Float[Array, "batch time n"]) -> Float[Array, "batch time time"]:
    """Of each step of an example with each other one."""
    return jnp.einsum("btn,bsn->bts", steps, steps)


def time_axis(inputs: Float[Array, "batch time in"]) -> Float[Array, "batch time"]:
    """What `mean_first` reflects along: the mean of the steps that are no padding, and the first step, halfway."""
    real = jnp.any(inputs != 0, axis=2).astype(inputs.dtype)
    axis = real / jnp.sqrt(jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1))
    return axis + jnp.eye(1, axis.shape[1], dtype=axis.dtype)


def mean_first(steps: Float[Array, "batch time n"], axis: Float[Array, "batch time"]) -> Float[Array, "batch time n"]:
    """Reflected along time, so that the first step holds the mean over all of them: as long as inputs and output
    gradients both are, no gradient changes.

    The output gradients of keys sum to zero over time, as softmax ignores what all its arguments have in common, while
    inputs have a large mean: without this, sums of many large terms would have to cancel.
    """
    twice = 2 * axis / jnp.sum(axis**2, axis=1, keepdims=True)
    return steps - twice[:, :, None] * jnp.einsum("bt,btn->bn", axis, steps)[:, None, :]


def upper_product(a: Float[Array, "batch time n"], b: Float[Array, "batch time n"]) -> Any:
    """The `strips` of sum_bt outer(a_bt, b_bt), which must be symmetric: little more than half the operations, and half
    the memory to add the next batch to."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return [a[:, begin : begin + STRIP].T @ b[:, begin:] for begin in range(0, a.shape[1], STRIP)]


def strips(matrix: Float[Array, "n n"]) -> list[Float[Array, "_ _"]]:
    """A symmetric matrix as sums over batches have it: some rows at a time, from their diagonal block on."""
    return [matrix[begin : begin + STRIP, begin:] for begin in range(0, len(matrix), STRIP)]


@jax.jit
def reflect(strips: list[Float[Array, "_ _"]]) -> Float[Array, "n n"]:
    """The whole matrix, symmetric whatever rounding did to its diagonal blocks."""
    upper = jnp.concatenate([jnp.pad(strip, ((0, 0), (strips[0].shape[1] - strip.shape[1], 0))) for strip in strips])
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def with_symmetric(importance: Importance, function: Callable[[Any], Any]) -> Importance:
    """The function's values in place of symmetric matrices, or of their strips."""

    def changed(sums: Sums) -> Sums:
        return sums._replace(**{name: function(found) for name, found in named(sums) if name in SYMMETRIC})

    return replace(importance, sums={path: changed(sums) for path, sums in importance.sums.items()})


def mirrored(importance: Importance) -> Importance:
    """What sums over batches have in strips, in whole symmetric matrices."""
    return with_symmetric(importance, reflect)


def output_gradients(loss: Gradients, output: Any, batch: Batch, key: Any) -> Any:
    """Gradients with respect to the output, stacked: the squares of what they reach are summed over the stack."""
    if callable(loss):
        return jax.tree.map(lambda leaf: leaf[None], jax.grad(lambda output: jnp.sum(loss(output, batch)))(output))
    if getattr(output, "ndim", None) != 2:
        raise ValueError(
            f"without a loss the model's output must be one array (batch, width); got {jax.tree.map(jnp.shape, output)}"
        )
    return categorical(output) if loss == "categorical" else gaussian(output, key)


def categorical(logits: Float[Array, "batch classes"]) -> Float[Array, "gradients batch classes"]:
    """Their outer products sum to diag(p) - p p', the expectation over labels that the model would draw.

    So do those of the gradients sqrt(p_c) (e_c - p) for all C classes c. As sqrt(p) combines them to 0, a reflection
    that takes the last axis to sqrt(p) leaves C - 1 of them: two classes take one backward pass.
    """
    p = jax.nn.softmax(logits)
    half, eye = jnp.sqrt(p), jnp.eye(logits.shape[1], dtype=p.dtype)
    each = half[:, :, None] * (eye[None] - p[:, None, :])
    axis = half + eye[-1][None]
    reflected = each - axis[:, :, None] * (jnp.einsum("bc,bcd->bd", axis, each) / (1 + half[:, -1:]))[:, None, :]
    return jnp.swapaxes(reflected[:, :-1], 0, 1)


def gaussian(output: Float[Array, "batch width"], key: Any) -> Float[Array, "1 batch width"]:
    """Each row v is drawn evenly from the sphere of radius sqrt(width): v v' is the identity in expectation."""
    directions = jax.random.normal(key, output.shape, output.dtype)
    radius = jnp.sqrt(jnp.array(output.shape[1], output.dtype))
    return (radius * directions / jnp.linalg.norm(directions, axis=1, keepdims=True))[None]


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


def save_importance(importance: Importance, file: str | Path) -> None:
    """The file, in safetensors, holds what `load_importance` reads, or, if anything fails, what it held before."""
    arrays = {f"{path}:{name}": array for path, sums in importance.sums.items() for name, array in named(sums)}
    for path, basis in importance.bases.items():
        arrays |= {f"{path}:basis_{name}": array for name, array in basis._asdict().items()}
    fields = {name: getattr(importance, name) for name in ("examples", "tokens", "batches", "gradients", "seed")}
    about = {"schema": SCHEMA, "paths": list(importance.sums), **fields}
    with writing(Path(file)) as temporary:
        contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
        save_file(contiguous, temporary, metadata={"importance": json.dumps(about)})


def load_importance(file: str | Path) -> Importance:
    """What `save_importance` wrote.

    Raises:
      ValueError: the file is no safetensors file, or holds something else.
    """
    metadata, arrays = read_arrays(file, "a file of save_importance")
    about = json.loads(metadata.get("importance", "{}"))
    if about.pop("schema", None) != SCHEMA:
        raise ValueError(f"{file}: wanted a file of save_importance, of schema {SCHEMA}; got {sorted(arrays)[:3]}")
    paths = about.pop("paths")
    sums = {path: Sums(*(arrays.get(f"{path}:{name}") for name in STATISTICS)) for path in paths}
    bases = {
        path: Basis(*(arrays[f"{path}:basis_{name}"] for name in Basis._fields))
        for path in paths
        if f"{path}:basis_inputs" in arrays
    }
    return Importance(jax.tree.map(jnp.asarray, sums), bases=jax.tree.map(jnp.asarray, bases), **about)
