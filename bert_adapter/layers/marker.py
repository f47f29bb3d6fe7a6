"""What stands in the place of a kernel that was factorised."""

from typing import Any, NoReturn

import jax


@jax.tree_util.register_static
class Factorised:
    """What stands in the place of a kernel that was factorised: a pytree without leaves that is no array.

    A model that is run without the interceptor finds it where it wants a kernel, and says what to do.

    stacked: how many leading axes the factors have, one pair at each index.
    """

    def __init__(self, stacked: int = 0) -> None:
        self.stacked = stacked

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "this kernel was factorised into 'left' and 'right': run the model inside "
            "`with bert_adapter.factorised():`, or call `bert_adapter.apply(module, params, ...)`, "
            "or get dense kernels back with `bert_adapter.merge(params)`"
        )

    __array__ = __jax_array__ = refuse
    dtype = shape = ndim = T = property(refuse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factorised) and other.stacked == self.stacked

    def __hash__(self) -> int:
        return hash((Factorised, self.stacked))

    def __repr__(self) -> str:
        return "FACTORISED"


FACTORISED = Factorised()
