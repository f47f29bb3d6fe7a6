"""Training on labelled rows, for dense and factorised parameters alike."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from bert_adapter.files import read_arrays, writing
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.running import apply
from bert_adapter.losses import distillation, task_loss
from bert_adapter.model import Model
from bert_adapter.progress import track

SAVE_EVERY = 60.0  # seconds between two states of a training that may be killed


INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class State(NamedTuple):
    """Everything that the next step depends on."""

    params: Any
    optimiser: Any
    step: int


def finetune(
    model: Model,
    batches: Sequence[Batch],
    loss: Callable[[Any, Batch], Float[Array, " batch"]] = task_loss,
    *,
    teacher: Model | None = None,
    distil: float = 0.5,
    temperature: float = 2.0,
    epochs: int = 3,
    learning_rate: float = 5e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> tuple[Model, list[float]]:
    """The model after training all its parameters, factors among them, and the mean loss of each epoch's batches.

    AdamW (Loshchilov & Hutter 2019) with a rate that rises linearly, then falls linearly to zero; gradients longer than
    1 are cut to that; weight decay for matrices alone; dropout as the model's config says.

    Args:
      model: dense or factorised.
      batches: mappings of arrays (batch, ...), see `labelled_batches`; "weights", if any, weigh the examples. Each
        epoch has its own order of them.
      loss: (output, batch) -> (batch,).
      teacher: a model whose outputs the model is drawn to: the loss is then (1 - distil) loss + distil `distillation`,
        at that temperature. The dense model for a compressed one.
      warmup: the share of the steps in which the rate rises.
      seed: of the order of the batches and of dropout.
      file: holds the state once a minute and after each epoch; if it is there already, training goes on from it. It is
        deleted in the end.

    Raises:
      ValueError: no batches, a number that cannot be, or a file of another training.
      FloatingPointError: the loss of an epoch is not finite.
    """
    if not batches:
        raise ValueError("no batches: wanted at least one to train on")
    for name, value, least, most in (
        ("epochs", epochs, 1, 10**6),
        ("learning_rate", learning_rate, 0, 1),
        ("warmup", warmup, 0, 1),
        ("distil", distil, 0, 1),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} must be in [{least}, {most}]; got {value}")
    steps = epochs * len(batches)
    optimiser = adamw(learning_rate, round(warmup * steps), steps, weight_decay)
    above = None if teacher is None else teacher.module
    advance = step_function(model.module, above, loss, distil, temperature, optimiser)
    params = jax.tree.map(jnp.array, model.params)  # copies: a step reuses the memory of the last one's
    state, history = resumed(State(params, optimiser.init(params), 0), np.zeros(steps, np.float32), file)
    taught = None if teacher is None else jax.device_put(teacher.params)
    saved = time.monotonic()
    order = np.concatenate([np.random.default_rng([seed, i]).permutation(len(batches)) for i in range(epochs)])
    for number in track(range(state.step, steps), "finetune", progress):
        key = jax.random.fold_in(jax.random.key(seed), number)
        arrays = {name: jnp.asarray(array) for name, array in batches[order[number]].items()}
        params, inner, value = advance(state.params, state.optimiser, taught, arrays, key)
        state, history[number] = State(params, inner, number + 1), float(value)
        if not np.isfinite(history[number]):
            raise FloatingPointError(f"the loss is {history[number]} in step {number + 1}: try a lower learning_rate")
        if file is not None and (time.monotonic() - saved > SAVE_EVERY or (number + 1) % len(batches) == 0):
            save_state(state, history, Path(file))
            saved = time.monotonic()
    if file is not None:
        Path(file).unlink(missing_ok=True)
    means = history.reshape(epochs, -1).mean(axis=1)
    return model._replace(params=jax.device_get(state.params)), [float(mean) for mean in means]


@functools.cache
def adamw(rate: float, warmup: int, steps: int, weight_decay: float) -> optax.GradientTransformation:
    """The optimiser; the same one for the same numbers, so that what is compiled for it once serves again."""
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, max(warmup, 1)), optax.linear_schedule(rate, 0.0, max(steps - warmup, 1))],
        [warmup],
    )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay, mask=matrices))


@functools.cache
def step_function(
    module: nn.Module,
    teacher: nn.Module | None,
    loss: Callable,
    distil: float,
    temperature: float,
    optimiser: optax.GradientTransformation,
) -> Callable:
    """The compiled step: (params, optimiser's state, teacher's params, batch, key) -> (params, state, loss)."""

    def run(module: nn.Module, params: Any, batch: Batch, **options: Any) -> Any:
        return apply(module, params, **{name: batch[name] for name in INPUTS if name in batch}, **options)

    def objective(params: Any, taught: Any, batch: Batch, key: Array) -> Float[Array, ""]:
        output = run(module, params, batch, deterministic=False, rngs={"dropout": key})
        each = loss(output, batch)
        if teacher is not None:
            wanted = jax.lax.stop_gradient(run(teacher, taught, batch))
            each = (1 - distil) * each + distil * distillation(module, temperature)(output, wanted)
        weights = batch.get("weights", jnp.ones(each.shape, each.dtype))
        return jnp.sum(weights * each) / jnp.sum(weights)

    def step(params: Any, inner: Any, taught: Any, batch: Batch, key: Array) -> tuple[Any, Any, Float[Array, ""]]:
        value, gradients = jax.value_and_grad(objective)(params, taught, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, inner = optimiser.update(gradients, inner, params)
        return optax.apply_updates(params, updates), inner, value

    return jax.jit(step, donate_argnums=(0, 1))


def save_state(state: State, history: np.ndarray, file: Path) -> None:
    """The file holds the state as `resumed` reads it, or what it held before."""
    leaves = jax.device_get(jax.tree.leaves((state.params, state.optimiser)))
    arrays = {f"{i:05d}": np.array(leaf, order="C") for i, leaf in enumerate(leaves)}
    with writing(file) as temporary:
        save_file(arrays | {"history": history}, temporary, metadata={"step": str(state.step)})


def resumed(fresh: State, history: np.ndarray, file: str | Path | None) -> tuple[State, np.ndarray]:
    """The state and the losses that the file holds, if there is one; else the fresh ones."""
    if file is None or not Path(file).exists():
        return fresh, history
    leaves, structure = jax.tree.flatten((fresh.params, fresh.optimiser))
    metadata, arrays = read_arrays(file, "the state of a training")
    if "step" not in metadata:
        raise ValueError(f"{file}: wanted the state of a training; got {sorted(arrays)[:3]}")
    losses = arrays.pop("history")
    found = [arrays[name] for name in sorted(arrays)]
    if [leaf.shape for leaf in found] != [np.shape(leaf) for leaf in leaves] or losses.shape != history.shape:
        raise ValueError(f"{file} holds the state of another training, of {len(losses)} steps: name another file")
    params, inner = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in found])
    return State(params, inner, int(metadata["step"])), losses
