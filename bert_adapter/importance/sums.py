"""Sums over examples, for each kernel, and measurements that add up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Sums(NamedTuple):
    """Sums over examples, for a kernel (in, out) with inputs x and output gradients delta; None if not measured.

    fisher: the squared gradient, sum_b (sum_t x_bt delta_bt')**2, over every other example and over the rest: how far
      the halves differ tells how far their sum can be trusted. In the eigenbasis, if there is one.
    rows: of the squared gradient, its sums over the outputs.
    inputs, outputs: sum_bt x_bt x_bt' and sum_bt delta_bt delta_bt', without padding: the Kronecker factors.
    row_gram, col_gram: sum_b G_b G_b' and sum_b G_b' G_b of the gradients G_b = sum_t x_bt delta_bt'.
    gram_squares: sum_b ||G_b G_b'||_F**2, which tells how far the Gram matrices can be trusted.
    Where an example has several gradients, what is squared here is summed over them first.

    While batches are added, symmetric matrices are in `upper_blocks`.
    """

    fisher: Float[Array, "2 in out"] | None = None
    rows: Float[Array, " in"] | None = None
    inputs: Float[Array, "in in"] | None = None
    outputs: Float[Array, "out out"] | None = None
    row_gram: Float[Array, "in in"] | None = None
    col_gram: Float[Array, "out out"] | None = None
    gram_squares: Float[Array, ""] | None = None


STATISTICS = Sums._fields
FROM_TIME_GRAM = {"rows", "row_gram", "gram_squares"}  # what needs the products of the time steps' output gradients
SYMMETRIC = ("inputs", "outputs", "row_gram", "col_gram")
BLOCK = 384  # rows or columns of a symmetric matrix that are multiplied together


class Basis(NamedTuple):
    """Orthonormal columns: the coordinates of a kernel are inputs.T @ kernel @ outputs."""

    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sums", "bases"],
    meta_fields=["examples", "tokens", "batches", "gradients", "seed", "model", "function", "texts"],
)
@dataclass(frozen=True)
class Importance:
    """What was measured, by kernel, and on how much. `a + b` is what both together would have given.

    tokens: time steps that are no padding, if an attention mask tells; else as many as examples.
    gradients: of whose loss: "labels", or of the model's own predictive distribution, a name in `DISTRIBUTIONS`.
    bases: by kernel, the coordinates that `fisher` is measured in; empty for those of the kernel.
    model, function, texts: fingerprints of the parameters, of the model's and the loss's programs, and of each batch.
      With another model what was measured is refused. "" is not known, and fits all:
      `dataclasses.replace(importance, model="")`.

    Example:
      >>> import jax.numpy as jnp, bert_adapter
      >>> from bert_adapter.importance.sums import Sums
      >>> one = bert_adapter.Importance({"head": Sums(rows=jnp.ones(3))}, 8, 8, 1, gradients="labels", seed=0, bases={})
      >>> (one + one).examples, (one + one)["head"].rows.tolist()
      (16, [2.0, 2.0, 2.0])
    """

    sums: dict[str, Sums]
    examples: int
    tokens: int
    batches: int
    gradients: str
    seed: int
    bases: dict[str, Basis]
    model: str = ""
    function: str = ""
    texts: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> Sums:
        return self.sums[path]

    def __add__(self, other: "Importance") -> "Importance":
        if different := differences(self, other):
            raise ValueError(f"wanted two measurements of the same; got {different[0]}")
        if self.model != other.model:
            raise ValueError("wanted measurements of one model; got two, whose parameters differ")
        if not same_bases(self.bases, other.bases):
            raise ValueError("wanted measurements in one eigenbasis; got two: measure both with the same `bases`")
        return replace(
            self,
            sums=jax.tree.map(jnp.add, self.sums, other.sums),
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            batches=self.batches + other.batches,
            texts=self.texts + other.texts,
        )


def check_model(importance: Importance, model: str) -> None:
    """A ValueError if something was measured on a model of another fingerprint."""
    if importance.model not in ("", model):
        raise ValueError(
            f"importance: measured on another model, whose parameters have the fingerprint {importance.model}; those "
            f"of this one have {model}: measure_signal(forward(model), model.params, batches, paths) measures it. If "
            f'it is to be used all the same: dataclasses.replace(importance, model="")'
        )


def same_bases(a: dict[str, Basis], b: dict[str, Basis]) -> bool:
    """Whether the kernels have the same bases, to the last bit."""
    if a.keys() != b.keys():
        return False
    return all(np.array_equal(x, y) for path in a for x, y in zip(a[path], b[path], strict=True))


def differences(a: Importance, b: Importance) -> list[str]:
    """The first thing in which measurements differ that are to be added or continued, if there is any."""
    found, wanted = (
        {"gradients": one.gradients, "in an eigenbasis": bool(one.bases)}
        | {path: {name: np.shape(array) for name, array in named(sums)} for path, sums in one.sums.items()}
        for one in (a, b)
    )
    both = {name: (found.get(name), wanted.get(name)) for name in found | wanted}
    return [f"{name}: {x} and {y}" for name, (x, y) in both.items() if x != y][:1]


def named(sums: Sums) -> list[tuple[str, Any]]:
    """What was measured of a kernel, with its name."""
    return [(name, array) for name, array in sums._asdict().items() if array is not None]


def upper_product(a: Float[Array, "batch time n"], b: Float[Array, "batch time n"]) -> Any:
    """The `upper_blocks` of sum_bt outer(a_bt, b_bt), which must be symmetric.

    Little more than half the operations, and half the memory to add the next batch to.
    """
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return [a[:, begin : begin + BLOCK].T @ b[:, begin:] for begin in range(0, a.shape[1], BLOCK)]


def upper_blocks(matrix: Float[Array, "n n"]) -> list[Float[Array, "_ _"]]:
    """A symmetric matrix without most of its lower triangle: BLOCK rows at a time, from their diagonal block on."""
    return [matrix[begin : begin + BLOCK, begin:] for begin in range(0, len(matrix), BLOCK)]


@jax.jit
def symmetrise(blocks: list[Float[Array, "_ _"]]) -> Float[Array, "n n"]:
    """The whole matrix of `upper_blocks`, symmetric whatever rounding did to its diagonal blocks."""
    width = blocks[0].shape[1]
    upper = jnp.concatenate([jnp.pad(block, ((0, 0), (width - block.shape[1], 0))) for block in blocks])
    return jnp.triu(upper) + jnp.triu(upper, 1).T


def with_symmetric(importance: Importance, function: Callable[[Any], Any]) -> Importance:
    """The function's values in place of symmetric matrices, or of their upper blocks."""

    def changed(sums: Sums) -> Sums:
        return sums._replace(**{name: function(found) for name, found in named(sums) if name in SYMMETRIC})

    return replace(importance, sums={path: changed(sums) for path, sums in importance.sums.items()})


def symmetrised(importance: Importance) -> Importance:
    """Whole symmetric matrices in place of their upper blocks."""
    return with_symmetric(importance, symmetrise)
