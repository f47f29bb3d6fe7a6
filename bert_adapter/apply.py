"""Any Linen model runs on factorised parameters, unmodified."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array


@jax.tree_util.register_static
class Factorised:
    """What stands in the place of a kernel that was factorised: a pytree without leaves that is no array.

    A model that is run without the interceptor finds it where it wants a kernel, and says what to do.
    """

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "this kernel was factorised into 'left' and 'right': run the model inside "
            "`with bert_adapter.factorised():`, or call `bert_adapter.apply(module, params, ...)`, "
            "or get dense kernels back with `bert_adapter.merge(params)`"
        )

    __array__ = __jax_array__ = refuse
    dtype = shape = ndim = property(refuse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factorised)

    def __hash__(self) -> int:
        return hash(Factorised)

    def __repr__(self) -> str:
        return "FACTORISED"


FACTORISED = Factorised()


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


@contextmanager
def factorised() -> Iterator[None]:
    """Inside, every Linen model runs on dense and on factorised parameters alike: x @ left @ right + bias.

    Works for any module that calls `flax.linen.Dense`, transformers' Flax models among them. Under jit it is the trace
    that must happen inside.
    """
    with nn.intercept_methods(two_products):
        yield


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply({"params": params}, ...)` for parameters that may be factorised."""
    with factorised():
        return module.apply({"params": params}, *args, **kwargs)
