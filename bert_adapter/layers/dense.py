"""`flax.linen.Dense`, whose kernel is (in, out), and `DenseGeneral`, whose kernel has any axes of both."""

from typing import Any

import flax.linen as nn

from bert_adapter.layers.layer import Layer, Order, product_of_its_own


def summed_axes(module: Any) -> tuple[int, ...]:
    """The axes of the input that a DenseGeneral sums over, as it was given them."""
    return (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)


def summed_last(module: Any, ndim: int) -> Order:
    """The kernel's first axes are those of the input that are summed over, in ascending order."""
    summed = sorted(axis % ndim for axis in summed_axes(module))
    kept = [axis for axis in range(ndim) if axis not in summed]
    order = (*kept, *summed)
    return Order(None if order == tuple(range(ndim)) else order)


def of_batches(module: Any) -> str | None:
    """A kernel for each index along a batch axis is no single matrix."""
    batch = getattr(module, "batch_dims", None) or getattr(module, "batch_axis", None)
    return "it has a kernel for each index of its batch axes" if batch else product_of_its_own(module)


DENSE = Layer(nn.Dense, input_axes=lambda module: 1)
DENSE_GENERAL = Layer(
    nn.DenseGeneral,
    input_axes=lambda module: len(summed_axes(module)),
    order=summed_last,
    refuses=of_batches,
)
