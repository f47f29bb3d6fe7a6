"""What runs a model here: JAX, and other libraries where they are installed."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bert_adapter.checkpoint import load
from bert_adapter.checkpoint.names import with_dtypes
from bert_adapter.exporting import export
from bert_adapter.exporting.program import has_choices, inputs_of
from bert_adapter.exporting.pytorch import needs_code, task_of
from bert_adapter.families import family_of
from bert_adapter.model import Batch, Model, forward

Step = Callable[[Batch], Any]  # the model's output for a batch, once it is there
TASK = "task"  # the file with the end of the name of transformers' Auto class


class Engine(NamedTuple):
    """A library that runs models.

    about: what it is, in a line.
    packages: what has to be importable.
    write: (model, directory) -> nothing; the directory holds what is opened, or there is a ValueError before work.
    open: (model, directory, threads) -> the function that runs a batch; only JAX looks at the model.

    Example:
      >>> import bert_adapter
      >>> bert_adapter.ENGINES["jax"].packages
      ()
    """

    about: str
    packages: tuple[str, ...]
    write: Callable[[Model, Path], None]
    open: Callable[[Model | str, Path, int], Step]

    def start(self, model: Model, directory: Path, threads: int) -> Step:
        """The function that runs a batch, of a model whose files go into an empty directory."""
        self.write(model, directory)
        return self.open(model, directory, threads)


def write_nothing(model: Model, directory: Path) -> None:
    """JAX runs the model itself."""


def in_jax(model: Model | str, directory: Path, threads: int) -> Step:
    """The model's own module, compiled for each shape of a batch. Its threads are those that the process may use."""
    dense = load(model) if isinstance(model, str) else model
    run, params = jax.jit(forward(dense)), jax.device_put(dense.params)
    return lambda batch: jax.block_until_ready(run(params, batch))


def write_graph(dtype: str, model: Model, directory: Path) -> None:
    """The graph that `export` writes, in this dtype."""
    export(model, directory / "onnx", to="onnx", dtype=dtype)


def in_onnxruntime(model: Model | str, directory: Path, threads: int) -> Step:
    """A session on the graph."""
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(directory / "onnx/model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: np.asarray(array, np.int64) for name, array in batch.items()})


def write_torch(model: Model, directory: Path) -> None:
    """What `export` writes for transformers, in floats."""
    floats = model._replace(config=with_dtypes(model.config, {}))
    try:
        export(floats, directory / "torch", to="transformers" if needs_code(floats) else "transformers-dense")
    except ValueError as error:
        raise ValueError(f"engines: pytorch has no such model, wanted others: {error}") from error
    (directory / TASK).write_text(task_of(model), "utf-8")


def in_pytorch(model: Model | str, directory: Path, threads: int) -> Step:
    """transformers' model."""
    torch, transformers = import_module("torch"), import_module("transformers")
    kind = getattr(transformers, f"Auto{(directory / TASK).read_text('utf-8')}")
    theirs = kind.from_pretrained(directory / "torch", trust_remote_code=True).eval().float()
    torch.set_num_threads(threads)

    def step(batch: Batch) -> Any:
        with torch.inference_mode():
            return theirs(**{name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in batch.items()})

    return step


ENGINES: dict[str, Engine] = {
    "jax": Engine("this package's module, compiled by XLA", (), write_nothing, in_jax),
    "onnxruntime": Engine(
        "the graph of `export`, float32", ("onnx", "onnxruntime"), partial(write_graph, "float32"), in_onnxruntime
    ),
    "onnxruntime-int8": Engine(
        "the graph of `export`, its kernels and tables in 8 bits",
        ("onnx", "onnxruntime"),
        partial(write_graph, "int8"),
        in_onnxruntime,
    ),
    "pytorch": Engine("transformers' model, float32", ("torch", "transformers"), write_torch, in_pytorch),
}


def missing(name: str) -> list[str]:
    """The packages that the engine needs and that are not installed."""
    return [package for package in ENGINES[name].packages if find_spec(package) is None]


def threads_here() -> int:
    """How many threads the process may run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """The process, and those that it begins, run at most so many threads at once, from now on.

    Raises:
      ValueError: more than there are, or a system that cannot be told.
    """
    here = threads_here()
    if count > here:
        raise ValueError(f"threads: got {count}, wanted at most {here}, which this process may run at once")
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("threads: this system cannot be told how many, wanted none")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def batch_for(model: Model, batch: int, length: int) -> Mapping[str, np.ndarray]:
    """Texts of `length` tokens without padding, drawn from the whole vocabulary."""
    sizes = family_of(model.config).sizes(model.module.config)
    shape = (batch, *([1] if has_choices(model) else []), length)  # of choices, one for each text
    ids = np.random.default_rng(0).integers(sizes["input_ids"], size=shape)
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: values[name].astype(np.int32) for name in inputs_of(model)}
