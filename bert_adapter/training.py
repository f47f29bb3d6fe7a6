"""Training on labelled rows, for dense and factorised parameters."""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.batches import check_weights, labelled, unit_weights
from bert_adapter.checkpoint.bits import Stored, stored_as
from bert_adapter.checkpoint.names import by_path, dtypes_of
from bert_adapter.families import output_of, predictive
from bert_adapter.families.sentence import activations, without_activation
from bert_adapter.files import check_writable, path_of
from bert_adapter.importance.fingerprint import of_arrays, of_function, of_params
from bert_adapter.importance.gradients import each_loss
from bert_adapter.labels import check_same_classes
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.layers.integers import check_floats
from bert_adapter.losses import TaskLoss, distillation, task_loss
from bert_adapter.model import Model, check_batch, check_same_tokens, forward, is_own, training_forward
from bert_adapter.progress import track
from bert_adapter.steps import (
    SAVE_EVERY,
    State,
    adamw,
    batch_order,
    learning_rates,
    resumed,
    save_state,
    step_function,
)
from bert_adapter.straight_through import as_kept, straight_through, widened
from wlra.checks import check_count, check_number

DISTIL = 0.5  # a teacher's share of the loss
TEMPERATURE = 2.0  # at which a teacher's classes are followed


class Recipe(NamedTuple):
    """What a step is compiled for. All else is its argument, the learning rate too.

    run: (params, batch, key) -> output.
    teach: (params, batch) -> the teacher's output, if there is one.
    apart: (output, teacher's output, batch) -> (batch,).
    stored: of the matrices that are rounded on the way, and how.
    """

    run: Callable[[Any, Batch, Any], Any]
    teach: Forward | None
    apart: Callable[..., Float[Array, " batch"]]
    loss: Callable[[Any, Batch], Float[Array, " batch"]]
    distil: float
    weight_decay: float
    stored: tuple[Stored, ...] = ()

    def __call__(self, params: Any, taught: Any, batch: Batch, key: Any) -> Float[Array, " batch"]:
        """The loss of each example, with the teacher's parameters beside."""
        output = self.run(straight_through(params, self.stored), batch, key)
        each = each_loss(self.loss, output, batch)
        if self.teach is None:
            return each
        wanted = widened(jax.lax.stop_gradient(self.teach(taught, batch)))
        return (1 - self.distil) * each + self.distil * self.apart(output, wanted, batch)


def finetune(
    model: Model,
    batches: Sequence[Batch],
    *,
    loss: Callable[[Any, Batch], Float[Array, " batch"]] | None = None,
    teacher: Model | None = None,
    distil: float | None = None,
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
    1 are cut to that; weight decay for matrices alone; dropout as the model's config says. Matrices that are stored in
    fewer bits are rounded in every step, and gradients pass through that: what is returned is what is stored. A model
    in 16 bits is trained in float32, and returned in 16 bits.

    Args:
      model: dense or factorised.
      batches: mappings of arrays (batch, ...), see `labelled_batches`; "weights", if any, weigh the examples. Each
        epoch has its own order of them.
      loss: (output, batch) -> (batch,); by default `task_loss`, that of the model's head. A model of your own needs
        one; its dropout gets a key if its module's `__call__` has a switch for it, or its `forward` a third argument.
      teacher: a model whose outputs are followed too: the loss is then (1 - distil) loss + distil `distillation`, at
        the temperature `TEMPERATURE`, where distil is a half by default. The dense model for a compressed one.
      warmup: the fraction of the steps in which the rate rises.
      seed: of the order of the batches and of dropout.
      file: holds the state once a minute and after each epoch; if it is there already, training goes on from it, or has
        ended with it. Delete it once the result is saved.

    Raises:
      ValueError: no batches, token ids, weights or a number that cannot be, for `task_loss` a label that is none of the
        head's, a teacher with outputs of another shape, other tokens or the classes in another order, a file of another
        training, or one that cannot be written.
      FloatingPointError: the loss of a step, or what it makes of a parameter, is not finite.

    Example:
        >>> import numpy as np, bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> model = bert_adapter.with_head(sample_model(), 2)
        >>> rows = bert_adapter.LabelledTexts(["a red fox", "a dog"], np.array([1, 0]))
        >>> trained, losses = bert_adapter.finetune(model, bert_adapter.labelled_batches(model, rows), epochs=2)
        >>> len(losses)
        2
    """
    batches = batches if isinstance(batches, Sequence) else list(batches)
    if not batches:
        raise ValueError("no batches: wanted at least one to train on")
    if file is not None:
        check_writable(file)
    share = DISTIL if distil is None else distil
    options = {"learning_rate": learning_rate, "warmup": warmup, "distil": share, "weight_decay": weight_decay}
    for name, value in options.items():
        check_number(value, 1.0, f"{name} must be in [0, 1]")
    if distil is not None and teacher is None:
        raise ValueError(f"distil: got {distil} without a teacher, whose share of the loss it is")
    epochs, seed = check_count("epochs", epochs, 1, 10**6), check_count("seed", seed, 0, 2**32 - 1)
    loss = loss_for(model) if loss is None else loss
    check_floats(model.params, "model")
    check_batches(model, teacher, batches, loss)
    model, batches = fitted(model, loss if teacher is None or share < 1 else None), unit_weights(batches)
    total = epochs * len(batches)
    recipe = recipe_for(model, teacher, loss=loss, distil=share, weight_decay=weight_decay)
    advance = step_function(recipe)
    order, rates = batch_order(seed, epochs, len(batches)), learning_rates(learning_rate, round(warmup * total), total)
    params = jax.tree.map(jnp.array, widened(model.params))  # copies: a step reuses the memory of the last one's
    run = {} if file is None else fingerprints(recipe, model, teacher, batches, options=options | {"seed": seed})
    fresh = State(params, adamw(weight_decay).init(params), 0, run)
    state, history = resumed(fresh, np.zeros(total, np.float32), file)
    taught = None if teacher is None else jax.device_put(teacher.params)
    saved = time.monotonic()
    for number in track(range(state.step, total), "finetune", progress):
        batch = {name: jnp.asarray(array) for name, array in batches[order[number]].items()}
        key = jax.random.fold_in(jax.random.key(seed), number)
        learnt = state.params, state.moments
        (params, moments), value = advance(learnt, beside=taught, batch=batch, key=key, rate=rates[number])
        state, history[number] = State(params, moments, number + 1, run), float(value)
        if not np.isfinite(history[number]):
            raise FloatingPointError(f"the loss is {history[number]} in step {number + 1}: try a lower learning_rate")
        if file is not None and (time.monotonic() - saved > SAVE_EVERY or (number + 1) % len(batches) == 0):
            check_learnt(state.params, number)
            save_state(state, history, path_of(file))
            saved = time.monotonic()
    means = history.reshape(epochs, -1).mean(axis=1)
    return learnt_by(model, state), [float(mean) for mean in means]


def learnt_by(model: Model, state: State) -> Model:
    """The model with what was learnt, in the dtypes that it had and as it is stored."""
    check_learnt(state.params, state.step - 1)
    with np.errstate(over="ignore"):  # it is said below
        params = as_kept(jax.device_get(state.params), model.params, dtypes_of(model.config))
    check_learnt(params, state.step - 1)
    return model._replace(params=params)


def check_learnt(params: Any, number: int) -> None:
    """A FloatingPointError for parameters that a step has made no numbers, or that their dtype does not hold."""
    for path, leaf in by_path(jax.device_get(params)).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            raise FloatingPointError(
                f"{path}, of {leaf.dtype}, is not finite after step {number + 1}: try a lower learning_rate, or "
                f"parameters of float32"
            )


def loss_for(model: Model) -> TaskLoss:
    """That of the model's head; a module of the caller's own has none that we know."""
    if is_own(model):
        kind = type(model.module).__name__
        raise ValueError(
            f"loss: got none for {kind}, a model of your own: wanted a function (output, batch) -> (batch,)"
        )
    if output_of(model.module) == "embedding":
        raise ValueError(
            "loss: got none for an encoder without a head, whose labels would be embeddings: wanted with_head(model, "
            "labels), or a function (output, batch) -> (batch,); heal(model, dense, texts) needs no labels"
        )
    return task_loss(model.module)


def fitted(model: Model, loss: Callable | None) -> Model:
    """The model, without what a cross-encoder declares to apply to its outputs if the loss makes values of these."""
    values = isinstance(loss, TaskLoss) and predictive(model.module) == "gaussian"
    declared = activations(model.config, model.files) if values else {}
    if not declared:
        return model
    for entry, kind in declared.items():
        warnings.warn(
            f"{entry}: {kind} gives way to Identity, for outputs are fitted to labels as they are", stacklevel=3
        )
    config, files = without_activation(model.config, model.files)
    return model._replace(config=config, files=files)


def check_batches(model: Model, teacher: Model | None, batches: Sequence[Batch], loss: Callable) -> None:
    """A ValueError for batches, or a teacher, that the model cannot be trained with."""
    for number, batch in enumerate(batches):
        check_batch(forward(model), batch, number)
    for number, batch in enumerate(labelled(model, batches) if isinstance(loss, TaskLoss) else batches):
        if not check_weights(batch, f"batch {number}").any():
            raise ValueError(f"batch {number}: got no row that counts, wanted some of weight above 0")
    if teacher is not None:
        check_same_tokens(model, teacher, name="teacher")
        for number, batch in enumerate(batches):
            check_batch(forward(teacher), batch, number)
        check_teacher(model, teacher, batches[0])


def check_teacher(model: Model, teacher: Model, batch: Batch, name: str = "teacher") -> None:
    """A ValueError if the outputs of a teacher are not of the shape, or do not mean what the model's do."""
    kinds = [predictive(one.module) for one in (model, teacher)]
    shapes = [jax.eval_shape(forward(one), one.params, batch).shape for one in (model, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: got outputs of shape {shapes[1]}, wanted those of the model, {shapes[0]}")
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name}: got outputs that are {kinds[1]}, wanted {kinds[0]} as the model's are")
    check_same_classes(model, teacher, name)


def fingerprints(
    recipe: Recipe, model: Model, teacher: Model | None, batches: Sequence[Batch], *, options: Mapping[str, float]
) -> dict[str, str]:
    """Of all that a training depends on, by the words for what differs."""

    def function(params: Any, batch: Batch, key: Any) -> Any:
        return recipe.loss(recipe.run(params, batch, key), batch)

    first = {name: jnp.asarray(array) for name, array in batches[0].items()}
    return {
        "model": of_params(model.params),
        "module or loss": of_function(function, model.params, first, jax.random.key(0)),
        "teacher": "" if teacher is None else of_params(teacher.params),
        "teacher's module": "" if teacher is None else of_function(forward(teacher), teacher.params, first),
        "texts or labels": " ".join(map(of_arrays, batches)),
        "options": json.dumps([options, recipe.stored], default=lambda number: number.item()),
    }


def recipe_for(model: Model, teacher: Model | None, *, loss: Callable, distil: float, weight_decay: float) -> Recipe:
    """The same recipe for the same modules and numbers, so that what is compiled for it once serves again."""
    return Recipe(
        run=training_forward(model),
        teach=None if teacher is None else forward(teacher),
        apart=distillation(model.module, TEMPERATURE),
        loss=loss,
        distil=0.0 if teacher is None else distil,
        weight_decay=weight_decay,
        stored=stored_as(model.params, dtypes_of(model.config)),
    )
