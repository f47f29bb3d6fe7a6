"""How much each entry of a kernel matters: Fisher information, summed over the examples of all batches."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bert_adapter.capture import Batch, Captured, Forward, capture
from bert_adapter.progress import track

Loss = Callable[[Any, Batch], Float[Array, " batch"]]


class KernelImportance(NamedTuple):
    """Sums over examples, for a kernel (in, out) with inputs x and output gradients delta per time step.

    fisher: the squared gradient, sum_b (sum_t x_bt delta_bt')**2.
    inputs, outputs: sum_bt x_bt x_bt' and sum_bt delta_bt delta_bt', without padding: the Kronecker factors.
    """

    fisher: Float[Array, "in out"]
    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]


Importance = dict[str, KernelImportance]


def measure_importance(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Importance:
    """The exact per-example Fisher information of every kernel in `paths`, from one backward pass a batch.

    Per example, not per batch: the square of a sum of gradients is not the sum of their squares (Kunstner et al. 2019
    on which Fisher this is; Martens & Grosse 2015 on the Kronecker factors).

    Args:
      forward: (params, batch) -> output; no dropout.
      batches: mappings of arrays with a leading batch axis. A key "attention_mask" (batch, time) marks padding by 0.
      paths: dense layers, by the paths of their parameters ("encoder/layer/0/attention/self/query").
      loss: (output, batch) -> (batch,), each example's loss: the empirical Fisher of a task. If None, no labels are
        needed: the output (batch, width), an embedding, is projected on a random unit vector for each example, whose
        squared gradient is, in expectation, what a squared error of the output feels (Gauss-Newton).
      seed: of those vectors.

    Memory: the activations of one batch, batch * in * out numbers for the largest kernel, and the sums,
    in * out + in**2 + out**2 numbers per kernel, however many examples there are.

    Raises:
      ValueError: no batches, or paths that are no dense layers of the model.
    """
    sums, update = batch_functions(forward, loss, frozenset(paths))
    key = jax.random.key(seed)
    total: Importance | None = None
    for number, batch in enumerate(track(batches, "importance", progress)):
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        if total is None:
            shapes = jax.eval_shape(sums, params, arrays, key)
            total = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        total = update(total, params, arrays, jax.random.fold_in(key, number))
    if total is None:
        raise ValueError("no batches: wanted at least one to measure the importance of the kernels on")
    return total


@cache
def batch_functions(forward: Forward, loss: Loss | None, paths: frozenset[str]) -> tuple[Callable, Callable]:
    """The sums of one batch, and the compiled update of the total with them; compiled once for each model and loss."""
    sums = partial(batch_sums, forward, loss, paths)

    def update(total: Importance, params: Any, batch: Batch, key: Any) -> Importance:
        return jax.tree.map(jnp.add, total, sums(params, batch, key))

    return sums, jax.jit(update, donate_argnums=0)


def batch_sums(
    forward: Forward, loss: Loss | None, paths: frozenset[str], params: Any, batch: Batch, key: Any
) -> Importance:
    """The sums over the examples of one batch."""

    def objective(output: Any) -> Float[Array, ""]:
        return jnp.sum(random_projection(output, key) if loss is None else loss(output, batch))

    with jax.default_matmul_precision("highest"):
        captured = capture(forward, objective, params, batch, paths)
        mask = batch.get("attention_mask")
        return {path: kernel_importance(pair, mask) for path, pair in captured.items()}


def kernel_importance(captured: Captured, mask: Array | None) -> KernelImportance:
    """One batch's sums for one kernel. Padding has no gradient, so only the inputs' factor needs the mask."""
    inputs, deltas = (array.astype(jnp.float32) for array in captured)
    if mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs * mask.astype(inputs.dtype)[:, :, None]
    gradients = jnp.einsum("bti,bto->bio", inputs, deltas)
    return KernelImportance(
        fisher=jnp.sum(gradients**2, axis=0),
        inputs=jnp.einsum("bti,btj->ij", inputs, inputs),
        outputs=jnp.einsum("bto,btp->op", deltas, deltas),
    )


def random_projection(output: Any, key: Any) -> Float[Array, " batch"]:
    """Each row's component along a direction drawn evenly from the unit sphere."""
    if getattr(output, "ndim", None) != 2:
        raise ValueError(
            f"without a loss the model's output must be one array (batch, width); got {jax.tree.map(jnp.shape, output)}"
        )
    directions = jax.random.normal(key, output.shape, output.dtype)
    return jnp.sum(output * directions, axis=1) / jnp.linalg.norm(directions, axis=1)
