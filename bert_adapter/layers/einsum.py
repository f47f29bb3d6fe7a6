"""`flax.linen.Einsum` of one contraction: '...i,io->...o', and with more axes."""

from string import ascii_letters
from typing import Any

import flax.linen as nn

from bert_adapter.layers.layer import Layer, Order


def labels(module: Any) -> tuple[str, str, str]:
    """Of the input, the kernel and the result."""
    given, _, result = module.einsum_str.replace(" ", "").partition("->")
    inputs, _, kernel = given.partition(",")
    return inputs, kernel, result


def summed(module: Any) -> str:
    """The kernel's labels that the result has not."""
    _, kernel, result = labels(module)
    return "".join(label for label in kernel if label not in result)


def order(module: Any, ndim: int) -> Order:
    """The input's own labels first, in its order, then those that are summed over, or the kernel's."""
    inputs, kernel, result = labels(module)
    free = [letter for letter in ascii_letters if letter not in inputs + kernel]
    dots = "".join(free[: ndim - len(inputs.replace("...", ""))])
    inputs, result = (text.replace("...", dots) for text in (inputs, result))
    rows = summed(module)
    columns = kernel.removeprefix(rows)
    kept = [label for label in inputs if label not in rows]
    return Order(
        tuple(inputs.index(label) for label in (*kept, *rows)),
        tuple(result.index(label) for label in (*kept, *columns)),
    )


def refused(module: Any) -> str | None:
    """Why the equation is not the product of the input with one matrix; the bias lies along the kernel's columns."""
    if module.einsum_str is None:
        return "its equation comes with the call: give it to the constructor"
    inputs, kernel, result = labels(module)
    rows = summed(module)
    columns, kept = kernel.removeprefix(rows), inputs.replace("...", "")
    kept = "".join(label for label in kept if label not in rows)
    once = all(len(set(text.replace("...", ""))) == len(text.replace("...", "")) for text in (inputs, kernel, result))
    matrix = rows and columns and "." not in kernel and kernel == rows + columns and set(rows) <= set(inputs)
    plain = not set(columns) & set(inputs) and ("..." in inputs) == ("..." in result)
    same = "".join(label for label in result if label in columns) == columns
    whole = sorted(result.replace("...", "")) == sorted(kept + columns)
    if once and matrix and plain and same and whole:
        return None
    return (
        f"its equation {module.einsum_str!r} does not multiply by one matrix, the kernel's first axes by its last: "
        f"wanted one like '...i,io->...o'"
    )


EINSUM = Layer(nn.Einsum, input_axes=lambda module: len(summed(module)), order=order, refuses=refused)
