"""Values that a model has no meaning for are found before they run, and values that are no numbers where they arise."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny import BATCH, CLASSIFIER, EMBEDDER

import bert_adapter
from bert_adapter.model import check_model
from bert_adapter.text import check_labelled
from bert_adapter.values import check_finite, check_listed, check_values

QUERY = frozenset({"encoder/layer/0/attention/self/query"})
POSITIONS = {"position_ids": np.broadcast_to(np.arange(8), (3, 8))}


def no_loss(output, batch):
    return jax.numpy.sum(output, axis=1)


def spoilt(name, value, place=(1, 2)):
    """The batch with another value at one place."""
    batch = BATCH | POSITIONS
    array = np.array(batch[name], float if isinstance(value, float) else None)
    array[place] = value
    return batch | {name: array}


WRONG = [("input_ids", 20), ("input_ids", -1), ("token_type_ids", 2), ("position_ids", 20), ("attention_mask", -3)]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("attention_mask", 0.5), ("attention_mask", np.nan)])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_value_out_of_range_is_an_error_that_names_its_row_and_token(architecture, name, value):
    model = tiny.model(architecture)
    with pytest.raises(ValueError, match=f"{name}: got {value} in row 1, token 2, wanted 0 to"):
        bert_adapter.apply(model.module, model.params, **spoilt(name, value))


def test_values_of_a_module_that_is_called_itself_are_checked():
    with pytest.raises(ValueError, match="input_ids: got 20 in row 1"):
        tiny.module().apply({"params": tiny.params()}, **spoilt("input_ids", 20))


@pytest.mark.parametrize(
    "take",
    [
        lambda model, batches: bert_adapter.forward(model)(model.params, batches[1]),
        lambda model, batches: bert_adapter.loss_increase(model, model, batches[1:]),
        lambda model, batches: bert_adapter.finetune(model, batches, loss=no_loss, progress=False),
        lambda model, batches: bert_adapter.measure_signal(
            bert_adapter.forward(model), model.params, batches[1:], QUERY, progress=False
        ),
        lambda model, batches: bert_adapter.compress(model, batches[1:], budget=0.5, progress=False),
    ],
    ids=["forward", "loss_increase", "finetune", "measure_signal", "compress"],
)
def test_all_that_takes_batches_checks_them_before_they_are_compiled(take):
    with pytest.raises(ValueError, match="input_ids: got 99 in row 2"):
        take(tiny.model(), [BATCH, spoilt("input_ids", 99, (2, 3))])


IDS = BATCH["input_ids"]
NO_BATCHES = {
    "texts": (["a red fox", "a dog"], "batch 0: got 'a red fox', wanted a mapping of arrays, in a list .*makes some"),
    "one batch": (BATCH, "batch 0: got 'input_ids', wanted a mapping of arrays, in a list even if it is one"),
    "an array": ([IDS], "batch 0: got ndarray, wanted a mapping"),
    "nothing": ([BATCH, {}], "batch 1: got {}, wanted a mapping"),
    "lists": ([{name: array.tolist() for name, array in BATCH.items()}], "'input_ids': got list, wanted an array"),
    "no rows": ([{name: array[:0] for name, array in BATCH.items()}], "'input_ids': got 0 rows, wanted some"),
    "shared": (
        [BATCH | {"token_type_ids": IDS[:1]}],
        "'token_type_ids': got 1 rows, wanted 3, one for each example, as in 'input_ids'",
    ),
    "a number": (
        [BATCH | {"scale": np.float32(2)}],
        "'scale': got 0 rows, wanted 3, one for each .*belongs into forward=",
    ),
}
small = functools.partial(bert_adapter.compress, budget=0.5, progress=False)
TAKERS: dict[str, Any] = {
    "compress": small,
    "correct": lambda model, batches: small(model, [BATCH], correct=batches),
    "heal=": lambda model, batches: small(model, [BATCH], heal=batches),
    "heal": lambda model, batches: bert_adapter.heal(model, model, batches, progress=False),
    "loss_increase": lambda model, batches: bert_adapter.loss_increase(model, model, batches, progress=False),
    "measure": lambda model, batches: bert_adapter.measure_signal(
        bert_adapter.forward(model), model.params, batches, QUERY, progress=False
    ),
}


@pytest.mark.parametrize("given", NO_BATCHES)
def test_what_is_no_list_of_batches_is_refused_by_name(given):
    batches, message = NO_BATCHES[given]
    with pytest.raises(ValueError, match=message):
        check_listed(batches=batches)
    with pytest.raises(ValueError, match=f"heal: .*{message}"):
        check_listed(batches=[BATCH], heal=batches)


@pytest.mark.parametrize("given", ["texts", "shared"])
@pytest.mark.parametrize("taker", TAKERS)
def test_all_that_takes_batches_refuses_what_is_none(taker, given):
    batches, message = NO_BATCHES[given]
    with pytest.raises(ValueError, match=message):
        TAKERS[taker](tiny.model(), iter(batches))


def test_what_is_no_model_and_no_labelled_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model: got str, wanted a Model: bert_adapter\.load"):
        check_model("model")
    with pytest.raises(ValueError, match="rows: got list, wanted texts with their labels: LabelledTexts"):
        check_labelled(tiny.model(CLASSIFIER), ["a dog"])


def test_batches_of_token_ids_are_known_by_their_number():
    with pytest.raises(ValueError, match="batch 1: input_ids: got 99 in row 0"):
        bert_adapter.finetune(tiny.model(), [BATCH, spoilt("input_ids", 99, (0, 0))], loss=no_loss, progress=False)


def test_values_under_jit_are_not_known():
    sizes = {"input_ids": 20}
    shape = jax.eval_shape(lambda ids: [check_values(sizes, {"input_ids": ids}), ids][1], BATCH["input_ids"])
    assert shape.shape == (3, 8)


@pytest.mark.parametrize("mask", [BATCH["attention_mask"].astype(kind) for kind in (bool, np.float32, np.int8)])
def test_masks_of_any_type_are_taken(mask):
    check_values({"attention_mask": 2}, {"attention_mask": mask})
    check_values({"attention_mask": 2}, {"attention_mask": jax.numpy.asarray(mask)})


def not_finite(architecture) -> Any:
    """A model whose output has NaN for every row."""
    model = tiny.model(architecture)
    head = "encoder" if architecture == EMBEDDER else "classifier"
    params = model.params | {head: jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params[head])}
    return model._replace(params=params)


def test_output_that_is_not_finite_is_named_with_its_batch_before_anything_is_made_of_it():
    """The gradients of the encoder are NaN then, and a decomposition of their sums would fail."""
    good, bad = tiny.model(CLASSIFIER), not_finite(CLASSIFIER)
    paths = frozenset(f"bert/{path}" for path in QUERY)
    forward = bert_adapter.forward(good)
    given: Any = {"gradients": "categorical", "progress": False}
    bert_adapter.measure_signal(forward, good.params, [BATCH], paths, **given)
    with pytest.raises(FloatingPointError, match="batch 0: the output of the model is NaN or infinite in 3 of 3 rows"):
        bert_adapter.measure_signal(forward, bad.params, [BATCH], paths, **given)


def test_gradient_that_is_not_finite_is_named_as_one():
    model = tiny.model(CLASSIFIER)
    paths = [f"bert/{path}" for path in QUERY]

    def loss(output, batch):
        return 0 * output[:, 0] * np.inf

    with pytest.raises(FloatingPointError, match="batch 0: its gradients"):
        bert_adapter.measure_importance(
            bert_adapter.forward(model), model.params, [BATCH], paths, gradients=loss, progress=False
        )


def test_losses_of_outputs_that_are_not_finite_are_not_averaged():
    good, bad = tiny.model(CLASSIFIER), not_finite(CLASSIFIER)
    with pytest.raises(FloatingPointError, match="batch 0: the output of the small model is NaN or infinite"):
        bert_adapter.loss_increase(good, bad, [BATCH])


def test_row_that_is_not_finite_is_counted():
    with pytest.raises(
        FloatingPointError, match="batch 7: the output of it is NaN or infinite in 1 of 3 rows, first in row 2"
    ):
        check_finite(np.array([[1, 2], [3, 4], [np.inf, 5]]), 7, "it")
