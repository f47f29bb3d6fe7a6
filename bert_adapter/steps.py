"""Steps of an optimiser, and the file that a training which was stopped goes on from."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from bert_adapter.files import path_of, read_arrays, read_metadata, write_arrays
from bert_adapter.layers.capture import Batch

SAVE_EVERY = 60.0  # seconds between two states of a training that may be killed


class State(NamedTuple):
    """Everything that the next step depends on.

    run: by name, fingerprints of what is the same in all steps.
    """

    params: Any
    moments: Any  # the optimiser's
    step: int
    run: Mapping[str, str] = {}


def batch_order(seed: int, epochs: int, count: int) -> Int[np.ndarray, " steps"]:
    """The batch of each step: every epoch has all of them, in an order of its own."""
    return np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in range(epochs)])


def learning_rates(highest: float, warmup: int, total: int) -> Float[np.ndarray, " steps"]:
    """The rate of each step: from zero up to the highest in `warmup` steps, then down to zero in the others."""
    step = np.arange(total)
    share = np.where(step < warmup, step / max(warmup, 1), (total - step) / max(total - warmup, 1))
    return (highest * share).astype(np.float32)


def adamw(weight_decay: float) -> optax.GradientTransformation:
    """The direction of a step of AdamW: `optax.adamw` without its learning rate, of gradients that are cut to 1."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    decay = optax.add_decayed_weights(weight_decay, matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), decay)


@lru_cache(maxsize=16)
def step_function(recipe: Any) -> Callable:
    """The compiled step: ((params, moments), beside, batch, key, rate) -> ((params, moments), loss).

    recipe: a hashable (params, beside, batch, key) -> the loss of each example, with a `weight_decay`. What lies beside
      the parameters is not trained: those of a teacher, say.
    """
    optimiser = adamw(recipe.weight_decay)

    def objective(params: Any, beside: Any, batch: Batch, key: Array) -> Float[Array, ""]:
        each = recipe(params, beside, batch, key)
        weights = batch.get("weights", jnp.ones(each.shape, each.dtype))
        counted = (weights > 0).astype(each.dtype)  # a mean over batches weighs as one over all rows
        return jnp.sum(weights * each) / jnp.sum(counted)

    def step(learnt: tuple[Any, Any], beside: Any, batch: Batch, key: Array, rate: Any) -> tuple[Any, Any]:
        params, moments = learnt
        value, gradients = jax.value_and_grad(objective)(params, beside, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            directions, moments = optimiser.update(gradients, moments, params)
        updates = jax.tree.map(lambda direction: -rate.astype(direction.dtype) * direction, directions)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(step, donate_argnums=0)


def save_state(state: State, history: np.ndarray, file: Path) -> None:
    """The file holds the state as `resumed` reads it, or what it held before."""
    leaves = jax.device_get(jax.tree.leaves((state.params, state.moments)))
    arrays = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
    about = {"step": str(state.step), "run": json.dumps(dict(state.run))}
    write_arrays(file, arrays | {"history": history}, about)


def resumed(fresh: State, history: np.ndarray, file: str | Path | None) -> tuple[State, np.ndarray]:
    """The state and the losses that the file holds, if there is one; else the fresh ones."""
    check_run(fresh.run, file)
    if file is None or not path_of(file).exists():
        return fresh, history
    leaves, structure = jax.tree.flatten((fresh.params, fresh.moments))
    metadata, _ = read_metadata(file, "the state of a training")
    arrays = read_arrays(file, "the state of a training")
    losses = arrays.pop("history")
    found = [arrays[name] for name in sorted(arrays)]
    if [leaf.shape for leaf in found] != [np.shape(leaf) for leaf in leaves] or losses.shape != history.shape:
        raise ValueError(another(file, "other shapes"))
    params, moments = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in found])
    return State(params, moments, int(metadata["step"]), fresh.run), losses


def check_run(run: Mapping[str, str], file: str | Path | None) -> None:
    """A ValueError if the file is there, and does not hold a state of this run."""
    if file is None or not path_of(file).exists():
        return
    metadata, names = read_metadata(file, "the state of a training")
    if not {"step", "run"} <= metadata.keys():
        raise ValueError(f"{file}: wanted the state of a training; got {names[:3]}")
    found = json.loads(metadata["run"])
    if others := [f"another {name}" for name, value in run.items() if found.get(name) != value]:
        raise ValueError(another(file, ", ".join(others)))


def another(file: str | Path, how: str) -> str:
    """What is wrong with a file of another training."""
    return f"{file} holds the state of another training ({how}): name another file, or delete this one"
