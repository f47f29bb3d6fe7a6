"""Whether a model of the caller's own runs on factors as on the kernels that they multiply out to."""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.kernels import Shapes, split_axes
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.marker import Factorised
from bert_adapter.layers.places import is_table, kernel_path
from bert_adapter.layers.stacks import index_in, whole
from bert_adapter.model import Model, forward

NEAR, NEAR_NARROW = 1e-3, 0.05  # how far two ways to round may be apart, in 32 bits and in 16, through many layers


def check_runs_on_factors(model: Model, shapes: Shapes, batch: Batch) -> None:
    """A ValueError for kernels that the model does something else with than multiply by, or look up.

    In their place exact factors, one of them the identity, give another output: what `nnx.WeightNorm` makes of a kernel
    before it is multiplied by is not made of factors. Outputs that differ from run to run tell nothing.
    """
    one = {name: np.asarray(array)[:1] for name, array in batch.items()}
    if (found := apart(model, shapes, (), one)) is None:  # it may take batches of one size alone
        one, found = dict(batch), apart(model, shapes, (), batch)
    places = list(dict.fromkeys(map(whole, shapes)))
    near = NEAR_NARROW if is_narrow(model, one) else NEAR
    if found is None or found > near or is_near(apart(model, shapes, places, one), near):
        return
    wrong = [place for place in places if not is_near(apart(model, shapes, [place], one), near)] or places
    raise ValueError(
        f"model: got another output where exact factors of {wrong} stand in their place, wanted kernels that are "
        f"multiplied by as they are, not after something else is made of them, as nnx.WeightNorm does: "
        f"exclude={'|'.join(map(re.escape, wrong))!r} keeps them dense"
    )


def is_near(apart: float | None, near: float) -> bool:
    """Whether outputs that are so far apart are the same but for rounding; if there is none, they are not."""
    return apart is not None and not apart > near


def apart(model: Model, shapes: Shapes, places: Iterable[str], batch: Batch) -> float | None:
    """How far the output on exact factors is from that on kernels, over the size of that; None if one fails."""
    run = forward(model)

    def both(params: Any, batch: Batch) -> tuple[Any, Any]:
        return run(params, batch), run(with_exact_factors(params, shapes, places), batch)

    try:
        with jax.default_matmul_precision("highest"):
            dense, exact = (np.asarray(each, np.float64) for each in jax.jit(both)(model.params, dict(batch)))
    except (FlaxError, TypeError, ValueError, KeyError, AttributeError):  # what layers and the caller's code say
        return None
    return float(np.linalg.norm(exact - dense) / (np.linalg.norm(dense) or math.inf))


def with_exact_factors(params: Any, shapes: Shapes, places: Iterable[str]) -> Any:
    """The parameters with factors in the place of these kernels: they and an identity, so that nothing is rounded.

    The identity is of the smaller side: one of a vocabulary would be larger than all else.
    """
    flat: dict[str, Any] = dict(flatten_dict(params, keep_empty_nodes=True, sep="/"))
    for place in places:
        path = next(path for path in shapes if whole(path) == place)
        name, depth, (m, n) = kernel_path(flat, place), len(index_in(path)), shapes[path]
        kernel = jnp.asarray(flat[name])
        stack, (inputs, outputs) = kernel.shape[:depth], split_axes(path, kernel.shape[depth:], shapes[path])
        first = m <= n and not is_table(name)
        size = m if first else n
        one = jnp.broadcast_to(jnp.eye(size, dtype=kernel.dtype), (*stack, size, size))
        left, right = (one, kernel) if first else (kernel, one)
        flat[f"{place}/left"] = left.reshape(*stack, *inputs, size)
        flat[f"{place}/right"] = right.reshape(*stack, size, *outputs)
        flat[name] = Factorised(depth)
    return unflatten_dict(flat, sep="/")


def is_narrow(model: Model, batch: Batch) -> bool:
    """Whether the model computes in fewer bits than 32."""
    return bool(re.search(r"\bb?f(16|8)", str(jax.make_jaxpr(forward(model))(model.params, batch))))
