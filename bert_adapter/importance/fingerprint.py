"""Fingerprints: short texts that tell apart what a measurement or a training is of."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from bert_adapter.checkpoint.names import by_path


def of_arrays(arrays: Mapping[str, Any]) -> str:
    """Of all that the arrays hold, with their names, shapes and dtypes; integers count the same in every width.

    A gigabyte takes about a second.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.kind in "biu":
            array = array.astype(np.int64)
        digest.update(f"{name} {array.dtype.name} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def of_params(params: Any) -> str:
    """Of a model's parameters, by their paths."""
    return of_arrays(by_path(params))


def of_function(function: Callable, *arguments: Any) -> str:
    """Of what the function computes from arguments of such shapes: of its program, and of the arrays in that.

    Not of what Python does when it runs: of callbacks, and of the backward rules of `jax.custom_vjp`.
    """
    program = jax.make_jaxpr(function)(*arguments)
    constants = {str(i): array for i, array in enumerate(constants_in(program))}
    text = re.sub(r"0x[0-9a-f]+", "", str(program))  # addresses, which differ from run to run
    return of_arrays(constants | {"program": np.frombuffer(text.encode(), np.uint8)})


def constants_in(program: Any) -> Iterator[Any]:
    """The arrays in a program and in those that it calls, which are printed by their shapes alone."""
    if isinstance(program, ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        yield from (one.val for one in equation.invars if isinstance(one, Literal) and np.ndim(one.val))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from constants_in(inner)


def is_program(value: Any) -> bool:
    """Whether an equation calls it."""
    return isinstance(value, ClosedJaxpr | Jaxpr)
