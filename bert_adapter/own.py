"""Models of the caller's own: a function (params, batch) -> output, of which one array counts."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from bert_adapter.layers.capture import Batch
from bert_adapter.layers.running import apply, factorised

NO_INPUTS = ("labels", "weights")  # of a batch, what **kwargs are not given
SWITCHES = {"deterministic": True, "train": False, "training": False, "is_training": False}  # without dropout


@dataclass(frozen=True)
class Own:
    """(params, batch) -> the array of the output that counts, on dense and on factorised parameters.

    Of an output (batch, time, ...) the steps that batch["attention_mask"] (batch, time) marks as padding are zero.

    run: (params, batch) -> output; one that takes a third argument gets the key of dropout in training, and else None.
    output: the index, the entry or the attribute that counts, where an output holds several arrays.
    """

    run: Callable[..., Any]
    output: int | str | None = None

    def __call__(self, params: Any, batch: Batch, key: Any = None) -> Any:
        """The output, in training if there is a key."""
        with factorised():
            found = self.run(params, batch, key) if takes_key(self.run) else self.run(params, batch)
        array, mask = counted(found, self.output), batch.get("attention_mask")
        if mask is None or array.ndim < 3 or array.shape[:2] != mask.shape:
            return array
        return jnp.where(jnp.reshape(jnp.asarray(mask) != 0, (*mask.shape, *[1] * (array.ndim - 2))), array, 0)


@dataclass(frozen=True)
class Called:
    """(params, batch, key) -> what the Linen module returns for the entries of the batch that its call takes by name.

    Its switches of dropout are on in training, where there is a key.
    """

    module: Any

    def __call__(self, params: Any, batch: Batch, key: Any = None) -> Any:
        """The output."""
        given = arguments(type(self.module).__call__, batch, key is not None)
        return apply(self.module, params, **given, **({} if key is None else {"rngs": {"dropout": key}}))


def arguments(call: Callable, batch: Batch, training: bool = False) -> dict[str, Any]:
    """The entries of the batch that a call takes by name, and its switches of dropout.

    Raises:
      ValueError: the batch holds too little for the call.
    """
    taken = dict(list(inspect.signature(call).parameters.items())[1:])
    open_ended = any(each.kind == each.VAR_KEYWORD for each in taken.values())
    given = {name: array for name, array in batch.items() if name in taken or (open_ended and name not in NO_INPUTS)}
    given |= {name: value != training for name, value in SWITCHES.items() if name in taken}
    named = {name: each for name, each in taken.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if missing := [name for name, each in named.items() if each.default is each.empty and name not in given]:
        raise ValueError(
            f"batch: got {sorted(batch)}, wanted {missing} too, which the model is called with: name them so, or say "
            f"how it is called with forward=, a function (params, batch) -> output"
        )
    return given


@lru_cache(maxsize=256)
def takes_key(run: Callable) -> bool:
    """Whether the function has a third argument for the key of dropout."""
    named = inspect.signature(run).parameters.values()
    return sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in named) > 2


def counted(output: Any, which: int | str | None) -> Any:
    """The array that counts: the only one, or the one named, or else "logits".

    Raises:
      ValueError: it is not clear which, or there is none of that name.
    """
    if which is None and hasattr(output, "ndim"):
        return output
    names = parts(output)
    if which is None:
        which = "logits" if "logits" in names else names[-1] if len(names) == 1 else None
    if which not in names:
        got = f"{type(output).__name__} of {names}" if names else type(output).__name__
        raise ValueError(f"output: got {which!r} and a model that returns a {got}: output= says which of them counts")
    found = output[which] if isinstance(output, Mapping) or isinstance(which, int) else getattr(output, str(which))
    return counted(found, None)


def parts(output: Any) -> list[Any]:
    """What `output=` may be: the keys, fields or indices of what a model returns."""
    if isinstance(output, Mapping):
        return list(output)
    if isinstance(output, tuple | list):
        return [*getattr(output, "_fields", ()), *range(len(output))]
    return [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]


@dataclass(frozen=True)
class Rows:
    """(params, batch) -> an output (batch, time, ...) as rows (batch, width); its padding is zero already."""

    run: Own

    def __call__(self, params: Any, batch: Batch) -> Any:
        """The rows."""
        output = self.run(params, batch)
        return output if output.ndim == 2 else output.reshape(len(output), -1)


def as_rows(run: Any, gradients: Any) -> Any:
    """The caller's own function with rows as outputs, where all their numbers count alike: see `gaussian`."""
    return Rows(run) if isinstance(run, Own) and gradients == "gaussian" else run


def ways_to_call(run: Own, gradients: Any) -> list[Any]:
    """The functions by which a model of the caller's own may have been measured: with rows or not, and as it is."""
    return [run, as_rows(run, gradients), *([] if takes_key(run.run) else [run.run])]
