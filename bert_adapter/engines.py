"""What runs a model here: JAX, and other libraries where they are installed."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bert_adapter.checkpoint.names import low_rank
from bert_adapter.exporting import export
from bert_adapter.exporting.program import INPUTS
from bert_adapter.families import family_of
from bert_adapter.model import Batch, Model, forward

Step = Callable[[Batch], Any]  # the model's output for a batch, once it is there


class Engine(NamedTuple):
    """A library that runs models.

    about: what it is, in a line.
    packages: what has to be importable.
    start: (model, an empty directory, threads) -> the function that runs a batch.

    Example:
      >>> import bert_adapter
      >>> bert_adapter.ENGINES["jax"].packages
      ()
    """

    about: str
    packages: tuple[str, ...]
    start: Callable[[Model, Path, int], Step]


def in_jax(model: Model, directory: Path, threads: int) -> Step:
    """The model's own module, compiled for each shape of a batch. Its threads are those that the process may use."""
    run, params = jax.jit(forward(model)), jax.device_put(model.params)
    return lambda batch: jax.block_until_ready(run(params, batch))


def in_onnxruntime(dtype: str) -> Callable[[Model, Path, int], Step]:
    """What makes a session on the graph that `export` writes, in this dtype."""

    def start(model: Model, directory: Path, threads: int) -> Step:
        runtime: Any = import_module("onnxruntime")
        export(model, directory / "onnx", to="onnx", dtype=dtype)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.InferenceSession(directory / "onnx/model.onnx", options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {name: np.asarray(array, np.int64) for name, array in batch.items()})

    return start


def in_pytorch(model: Model, directory: Path, threads: int) -> Step:
    """transformers' model on what `export` writes."""
    from bert_adapter.exporting.pytorch import task_of

    torch, transformers = import_module("torch"), import_module("transformers")
    export(model, directory / "torch", to="transformers" if low_rank(model.config) else "transformers-dense")
    kind = getattr(transformers, f"Auto{task_of(model)}")
    theirs = kind.from_pretrained(directory / "torch", trust_remote_code=True).eval()
    torch.set_num_threads(threads)

    def step(batch: Batch) -> Any:
        with torch.inference_mode():
            return theirs(**{name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in batch.items()})

    return step


ENGINES: dict[str, Engine] = {
    "jax": Engine("this package's module, compiled by XLA", (), in_jax),
    "onnxruntime": Engine("the graph of `export`, float32", ("onnx", "onnxruntime"), in_onnxruntime("float32")),
    "onnxruntime-int8": Engine(
        "the graph of `export`, its kernels and tables in 8 bits", ("onnx", "onnxruntime"), in_onnxruntime("int8")
    ),
    "pytorch": Engine("transformers' model, float32", ("torch", "transformers"), in_pytorch),
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
    family, sizes = family_of(model.config), family_of(model.config).sizes(model.module.config)
    ids = np.random.default_rng(0).integers(sizes["input_ids"], size=(batch, length))
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: values[name].astype(np.int32) for name in INPUTS if name in family.inputs}
