"""`flax.linen.Dense` on factors."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array


def is_dense(context: nn.module.InterceptorContext) -> bool:
    """Whether the intercepted call is that of a dense layer."""
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__"


def dense_inputs(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a dense layer is called with."""
    return args[0] if args else kwargs["inputs"]


def two_products(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """A dense layer whose parameters hold factors returns inputs @ left @ right + bias."""
    dense = context.module
    if not (is_dense(context) and dense.has_variable("params", "left")):
        return next_fun(*args, **kwargs)

    def product(inputs: Array, left: Array, right: Array, bias: Array | None) -> Array:
        outputs = jnp.matmul(jnp.matmul(inputs, left, precision=dense.precision), right, precision=dense.precision)
        return outputs if bias is None else outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))

    bias = dense.get_variable("params", "bias") if dense.use_bias else None
    left, right = (dense.get_variable("params", name) for name in ("left", "right"))
    return product(*promote_dtype(dense_inputs(args, kwargs), left, right, bias, dtype=dense.dtype))
