"""Sums over examples, for each kernel, and measurements that add up."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.importance.fingerprint import of_arrays
from bert_adapter.importance.through import Through


class Sums(NamedTuple):
    """Sums over examples, for a kernel (in, out) with inputs x and output gradients delta; None if not measured.

    fisher: the squared gradient, sum_b (sum_t x_bt delta_bt')**2, over every other example and over the rest: how far
      the halves differ tells how far their sum can be trusted.
    rows: of the squared gradient, its sums over the outputs.
    inputs, outputs: sum_bt x_bt x_bt' and sum_bt delta_bt delta_bt', without padding: the Kronecker factors.
    row_gram, col_gram: sum_b G_b G_b' and sum_b G_b' G_b of the gradients G_b = sum_t x_bt delta_bt'.
    gram_squares: sum_b ||G_b G_b'||_F**2, which tells how far the Gram matrices can be trusted.
    token_counts, token_squares: of a table (vocabulary, out), whose inputs are rows of the identity, the diagonals of
      `inputs` and of `row_gram`: how often each row is looked up, and its squared gradient; over every other example
      and over the rest. What a text looks up several times has one gradient, their sum.
    steps: how many time steps enter the kernel, those of all its calls, without padding.
    Where an example has several gradients, what is squared here is summed over them first.

    Symmetric matrices are whole, or `Upper` where they are held in numbers. Those of a kernel's larger side may be
    `Through` it.
    """

    fisher: Float[Array, "2 in out"] | None = None
    rows: Float[Array, " in"] | None = None
    inputs: Float[Array, "in in"] | None = None
    outputs: Float[Array, "out out"] | None = None
    row_gram: Float[Array, "in in"] | None = None
    col_gram: Float[Array, "out out"] | None = None
    gram_squares: Float[Array, ""] | None = None
    token_counts: Float[Array, "2 in"] | None = None
    token_squares: Float[Array, "2 in"] | None = None
    steps: Float[Array, ""] | None = None


OF_TABLES = {"inputs": "token_counts", "rows": "token_squares", "row_gram": "token_squares"}  # what is measured instead
ALWAYS = ("steps",)  # measured whatever is asked for
STATISTICS = tuple(name for name in Sums._fields if name not in (*OF_TABLES.values(), *ALWAYS))
SYMMETRIC = ("inputs", "outputs", "row_gram", "col_gram")
BLOCK = 192  # symmetric matrices of more rows are held as `Upper`


class Upper(NamedTuple):
    """A symmetric matrix, halved: [[first, across], [across', last]].

    first, last: whole, or `Upper` again.
    """

    across: Float[Array, "_ _"]
    first: Any
    last: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sums"],
    meta_fields=[
        *("examples", "tokens", "batches", "gradients", "seed", "model", "function", "inputs", "texts"),
        "weight_squares",
    ],
)
@dataclass(frozen=True)
class Importance:
    """What was measured, by kernel, and on how much. `a + b` is what both together would have given.

    `importance[path]` has whole matrices, made when asked for; `sums` holds symmetric ones as `Upper`, half as large.
    Those of a long side may be `Through` the kernel: see `measure_signal`.

    tokens: time steps that are no padding, if an attention mask tells; else as many as examples.
    gradients: of whose loss: "labels", or of the model's own predictive distribution, a name in `DISTRIBUTIONS`.
    model, function, texts: fingerprints of the parameters, of the model's and the loss's programs, and of each batch.
      With another model what was measured is refused. "" is not known, and fits all, if it was measured whole:
      `dataclasses.replace(importance, model="")`.
    inputs: the names, shapes and dtypes of the batch that the programs are for.
    weight_squares: the sum of the squares of how often examples count, whose sum is `examples`; None: each once.

    Example:
      >>> import jax.numpy as jnp, bert_adapter
      >>> from bert_adapter.importance.sums import Sums
      >>> one = bert_adapter.Importance({"head": Sums(rows=jnp.ones(3))}, 8, 8, 1, gradients="labels", seed=0)
      >>> (one + one).examples, (one + one)["head"].rows.tolist()
      (16, [2.0, 2.0, 2.0])
    """

    sums: dict[str, Sums]
    examples: int | float
    tokens: int | float
    batches: int
    gradients: str
    seed: int
    model: str = ""
    function: str = ""
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    texts: tuple[str, ...] = ()
    weight_squares: int | float | None = None

    @property
    def effective(self) -> float:
        """How many examples that count alike tell as much (Kish 1965), whatever the unit of their weights."""
        return self.examples**2 / self.squares if self.squares else 0.0

    @property
    def squares(self) -> int | float:
        """The sum of the squares of how often examples count."""
        return self.examples if self.weight_squares is None else self.weight_squares

    def __getitem__(self, path: str) -> Sums:
        return with_symmetric(self.sums[path], whole)

    def __add__(self, other: "Importance") -> "Importance":
        if different := differences(self, other):
            raise ValueError(f"wanted two measurements of the same; got {different[0]}")
        if self.model != other.model:
            raise ValueError("wanted measurements of one model; got two, whose parameters differ")
        if self.inputs == other.inputs and self.inputs and self.function != other.function:
            raise ValueError("wanted measurements of one module and loss; got two, whose programs differ")
        if twice := set(self.texts) & set(other.texts):
            raise ValueError(
                f"wanted measurements of other texts; got {len(twice)} batches in both, which say no more when counted "
                f"twice: if they are to be, dataclasses.replace(importance, texts=())"
            )
        ours, theirs = ({path: halved(sums) for path, sums in one.sums.items()} for one in (self, other))
        return replace(
            self,
            sums=jax.tree.map(jnp.add, ours, theirs),
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            batches=self.batches + other.batches,
            texts=self.texts + other.texts,
            weight_squares=self.squares + other.squares,
        )


def halved(sums: Sums) -> Sums:
    """The sums with symmetric matrices as `Upper`."""
    return with_symmetric(sums, upper)


def check_model(importance: Importance, model: str) -> None:
    """A ValueError if something was measured on a model of another fingerprint."""
    if importance.model not in ("", model):
        raise ValueError(
            f"importance: measured on another model, whose parameters have the fingerprint {importance.model}; those "
            f"of this one have {model}: measure_signal(forward(model), model.params, batches, paths) measures it. If "
            f'it is to be used all the same, measured with whole=True: dataclasses.replace(importance, model="")'
        )


def check_texts(importance: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """A ValueError if an importance was measured on other batches than these, where there are any."""
    if not isinstance(importance, Importance) or not importance.texts:
        return
    given = tuple(map(of_arrays, batches))
    if given and given != importance.texts:
        raise ValueError(
            f"importance: measured on {len(importance.texts)} batches which are not the {len(given)} given: wanted the "
            f"same ones, or none, batches=()"
        )


def differences(a: Importance, b: Importance) -> list[str]:
    """The first thing in which measurements differ that are to be added or continued, if there is any."""
    found, wanted = (
        {"gradients": one.gradients}
        | {path: {name: shape_of(array) for name, array in named(sums)} for path, sums in one.sums.items()}
        for one in (a, b)
    )
    both = {name: (found.get(name), wanted.get(name)) for name in found | wanted}
    return [f"{name}: {x} and {y}" for name, (x, y) in both.items() if x != y][:1]


def shape_of(array: Any) -> tuple[Any, ...]:
    """Of an array, or of the matrix that an `Upper` is; marked where that is `Through` a kernel."""
    if isinstance(array, Through):
        return ("through", *shape_of(array.matrix))
    return (sum(array.across.shape),) * 2 if isinstance(array, Upper) else np.shape(array)


def named(sums: Sums) -> list[tuple[str, Any]]:
    """What was measured of a kernel, with its name."""
    return [(name, array) for name, array in sums._asdict().items() if array is not None]


def upper_product(a: Float[Array, "*steps n"], b: Float[Array, "*steps n"]) -> Any:
    """The `upper` of sum_t outer(a_t, b_t), which must be symmetric: little more than half the operations."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    half = a.shape[1] // 2
    if a.shape[1] <= BLOCK:
        product = a.T @ b
        return jnp.triu(product) + jnp.triu(product, 1).T
    first, last = (upper_product(a[:, part], b[:, part]) for part in (slice(half), slice(half, None)))
    return Upper(a[:, :half].T @ b[:, half:], first, last)


def upper(matrix: Any) -> Any:
    """A symmetric matrix without most of its lower triangle; small ones stay whole."""
    half = len(matrix) // 2
    if isinstance(matrix, Upper) or len(matrix) <= BLOCK:
        return matrix
    return Upper(matrix[:half, half:], upper(matrix[:half, :half]), upper(matrix[half:, half:]))


def zero_upper(size: int) -> Any:
    """The `upper` of zeros (size, size)."""
    half = size // 2
    if size <= BLOCK:
        return zeros(size, size)
    return Upper(zeros(half, size - half), zero_upper(half), zero_upper(size - half))


def zeros(*shape: int) -> Array:
    """Nothing yet, without a program for every shape."""
    return jnp.asarray(np.zeros(shape, np.float32))


def whole(matrix: Any) -> Float[Any, "n n"]:
    """The symmetric matrix of which that is the `upper`; an `Upper` is put together on the host."""
    if not isinstance(matrix, Upper):
        return matrix
    joined = np.empty(shape_of(matrix), matrix.across.dtype)
    put_together(matrix, joined)
    return joined


def put_together(part: Any, out: Float[np.ndarray, "n n"]) -> None:
    """The view becomes the matrix of which the part is the `upper`; each entry is written once."""
    if not isinstance(part, Upper):
        out[...] = part
        return
    half, across = len(part.across), np.asarray(part.across)
    out[:half, half:] = across
    out[half:, :half] = across.T
    put_together(part.first, out[:half, :half])
    put_together(part.last, out[half:, half:])


def corners(matrix: Any) -> list[Any]:
    """The blocks on the diagonal: where a Gram matrix is finite there, it is finite. All else of a `Through`."""
    if isinstance(matrix, Through):
        return [*corners(matrix.matrix), *(part for part in matrix[1:] if part is not None)]
    return [*corners(matrix.first), *corners(matrix.last)] if isinstance(matrix, Upper) else [matrix]


def packed(matrix: Any) -> list[np.ndarray]:
    """A symmetric matrix's entries on and above the diagonal, once each, in flat pieces to be put end to end."""
    matrix = upper(matrix)
    if isinstance(matrix, Upper):
        return [np.asarray(matrix.across).reshape(-1), *packed(matrix.first), *packed(matrix.last)]
    return [np.asarray(matrix)[np.triu_indices(len(matrix))]]


def unpacked(entries: Float[np.ndarray, " entries"]) -> Any:
    """The `upper` of what `packed` gives, end to end."""
    size = (math.isqrt(8 * len(entries) + 1) - 1) // 2
    half, place = size // 2, np.triu_indices(min(size, BLOCK))
    if size <= BLOCK:
        block = np.empty((size, size), entries.dtype)
        block[place] = block.T[place] = entries
        return jnp.asarray(block)
    ends = np.cumsum([half * (size - half), half * (half + 1) // 2])
    across, first, last = np.split(entries, ends)
    return Upper(jnp.asarray(across.reshape(half, size - half)), unpacked(first), unpacked(last))


def with_symmetric(sums: Sums, function: Callable[[Any], Any]) -> Sums:
    """The function's values in place of symmetric matrices."""

    def of(found: Any) -> Any:
        return found._replace(matrix=function(found.matrix)) if isinstance(found, Through) else function(found)

    return sums._replace(**{name: of(found) for name, found in named(sums) if name in SYMMETRIC})
