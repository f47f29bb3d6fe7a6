"""Where a model can go, and what that takes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bert_adapter.checkpoint.names import low_rank
from bert_adapter.model import Model


def any_model(model: Model, dtype: str | None) -> None:
    """Nothing is refused."""


def all_ranks(model: Model) -> dict[str, int]:
    """Every factor is written."""
    return low_rank(model.config)


def no_layers(model: Model) -> dict[str, str]:
    """None is written as integers because the config says so."""
    return {}


class Target(NamedTuple):
    """A kind of directory that another library loads.

    about: what it is, in a line.
    write: (model, directory, dtype) -> None; the directory is empty, and vanishes if it fails.
    load: Python that loads it from the directory "OUT", for the model's card.
    ranks: (model) -> by path, the ranks of the kernels that have factors in what is written.
    integers: (model) -> by path, of the layers that the config has in 8 or 4 bits, which stay so, the dtype.
    check: (model, dtype) -> None, or a ValueError for a model that cannot go there.
    dtypes: the numbers that it can compute with, its own first; none if these are the model's.
    packages: what has to be importable.
    library: the Hub's name of what loads it.
    heads: whether heads of fewer dimensions stay so.
    reads: whether what loads it reads texts as sentence-transformers' files declare.
    """

    about: str
    write: Callable[[Model, Path, str | None], None]
    load: Callable[[Model], str]
    ranks: Callable[[Model], dict[str, int]] = all_ranks
    integers: Callable[[Model], dict[str, str]] = no_layers
    check: Callable[[Model, str | None], None] = any_model
    dtypes: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    library: str | None = None
    heads: bool = True
    reads: bool = False
