"""The Fisher information is the sum of the squares of each example's own gradient."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter.distributions.categorical import categorical
from bert_adapter.distributions.draw import Draw
from bert_adapter.distributions.gaussian import gaussian
from bert_adapter.families import module_for
from bert_adapter.families.bert import Bert
from bert_adapter.importance import batch, measure, storage, sums
from bert_adapter.importance.fingerprint import of_arrays, of_function
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import STATISTICS
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.running import apply
from bert_adapter.signals.reliability import gram_reliability
from bert_adapter.signals.weights import evidence_of

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "num_labels": 3,
}
DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(0, 50, (4, 8)),
    "attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 7 + [0]]),
    "labels": np.array([0, 2, 1, 0]),
}
LAYER = [
    "attention/self/query",
    "attention/self/key",
    "attention/self/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
]
PATHS = [f"bert/encoder/layer/0/{name}" for name in LAYER] + ["bert/pooler/dense", "classifier"]
PLAIN, MODULE = module_for(CONFIG), module_for(CONFIG | DROPOUT)
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(9)
X = np.random.default_rng(1).normal(size=(3, 2, 5)).astype(np.float32)


class Net(nn.Module):
    """One vector for every example, from a mean over the steps."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, name="last")(nn.tanh(nn.Dense(4, name="first")(x)).sum(axis=1))


NET: Any = Net()


# One function each, so that what is compiled for it once serves all tests.
def run(params, batch):
    return apply(MODULE, params, batch["input_ids"], batch["attention_mask"])


def run_net(params, batch):
    return apply(NET, params, batch["x"])


def cross_entropy(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)[:, 0]


def sines(output, _):
    return jnp.sum(jnp.sin(output), axis=1)


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


PARAMS = random_params(NET, X)
measured_bert = partial(measure_importance, run, paths=PATHS, gradients=cross_entropy, progress=False)
measured_net = partial(
    measure_importance, run_net, PARAMS, paths=["first"], gradients=sines, statistics=STATISTICS, progress=False
)


def fisher_of(sums):
    """Of both halves."""
    assert sums.fisher is not None
    return np.asarray(sums.fisher, np.float64).sum(axis=0)


def exact(array):
    return np.asarray(array, np.float64)


def whole(matrix):
    return np.asarray(sums.whole(matrix))


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def sum_of_squares(loss, params, batch):
    """The squares of the gradients of loss(params, batch of one) summed over the examples, in float64."""
    ones = {name: jnp.asarray(array)[:, None] for name, array in batch.items()}
    found = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, ones)
    return jax.tree.map(lambda leaf: np.sum(np.asarray(leaf, np.float64) ** 2, axis=0), found)


def assert_near(got, wanted, relative):
    """Relative to the largest entry: small ones are sums of gradients that cancel."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=relative * float(np.max(np.abs(wanted))))


def assert_same_but_for_rounding(got, wanted):
    assert got.sums.keys() == wanted.sums.keys()
    for path, of_kernel in wanted.sums.items():
        for ours, theirs in zip(jax.tree.leaves(got[path]), jax.tree.leaves(of_kernel), strict=True):
            assert_near(ours, theirs, relative=100 * EPS)  # other sums of some ten layers in float32


@pytest.fixture(scope="module")
def params():
    return random_params(MODULE, np.zeros((1, 1), np.int32))


@pytest.fixture(scope="module")
def measured(params):
    return measured_bert(params, [BATCH])


@pytest.fixture(scope="module")
def halves(params):
    """What two halves of the batch have, with longer padding, one after the other, and each measured alone."""
    longer = {name: array if array.ndim == 1 else np.pad(array, ((0, 0), (0, 3))) for name, array in BATCH.items()}
    longer["input_ids"][:, 8:] = 7
    first, second = ({name: array[half] for name, array in longer.items()} for half in (slice(0, 2), slice(2, 4)))
    return measured_bert(params, iter((first, second))), measured_bert(params, [first]), measured_bert(params, [second])


def test_fisher_is_the_sum_of_squared_gradients_of_the_examples_without_dropout(params, measured):
    def loss(params, batch):
        return cross_entropy(PLAIN.apply({"params": params}, batch["input_ids"], batch["attention_mask"]), batch)[0]

    truth = sum_of_squares(loss, params, BATCH)
    for path in PATHS:
        wanted = at(truth, path)["kernel"]
        assert_near(fisher_of(measured[path]), wanted, relative=1e-5)  # some hundred roundings in float32


def test_exactly_the_paths_asked_for_are_measured(measured):
    assert set(measured.sums) == set(PATHS)


def test_inputs_factor_sums_over_the_tokens_that_are_no_padding(params, measured):
    bert: Any = jax.jit(Bert(PLAIN.config).apply)
    output = bert({"params": params["bert"]}, BATCH["input_ids"], BATCH["attention_mask"])
    tokens = np.asarray(output.hidden_states[0], np.float64)[BATCH["attention_mask"] == 1]
    for name in LAYER[:3]:
        got = measured[f"bert/encoder/layer/0/{name}"].inputs
        assert_near(got, tokens.T @ tokens, relative=100 * EPS)  # sums of 22 terms behind some layers in float32


def test_outputs_factor_sums_over_the_gradients_of_the_logits(params, measured):
    logits = jax.jit(run)(params, BATCH)
    deltas = np.asarray(jax.nn.softmax(logits), np.float64) - np.eye(3)[BATCH["labels"]]
    assert_near(measured["classifier"].outputs, deltas.T @ deltas, relative=100 * EPS)  # as above


def test_factors_of_a_net_are_those_written_out_in_numpy():
    first, last = (jax.tree.map(np.float64, PARAMS[name]) for name in ("first", "last"))
    hidden = np.tanh(X @ first["kernel"] + first["bias"])
    output = hidden.sum(axis=1) @ last["kernel"] + last["bias"]
    deltas = (1 - hidden**2) * (np.cos(output) @ last["kernel"].T)[:, None, :]  # of the sum of the sines
    got = measured_net([{"x": X}])["first"]
    tokens, deltas = X.reshape(-1, 5).astype(np.float64), deltas.reshape(-1, 4)
    assert_near(got.inputs, tokens.T @ tokens, relative=20 * EPS)  # six terms
    assert_near(got.outputs, deltas.T @ deltas, relative=100 * EPS)  # two layers, there and back


def test_cut_of_the_batches_and_longer_padding_change_nothing(measured, halves):
    assert_same_but_for_rounding(halves[0], measured)


def test_two_measurements_add_up_to_that_of_both(measured, halves):
    both = halves[1] + halves[2]
    assert_same_but_for_rounding(both, measured)
    assert (both.examples, both.tokens, both.batches) == (4, 22, 2)


def test_kernels_that_stayed_dense_are_measured_beside_factors():
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    bias = PARAMS["first"]["bias"]
    small = PARAMS | {"first": {"kernel": FACTORISED, "left": left, "right": right, "bias": bias}}
    dense = PARAMS | {"first": {"kernel": left @ right, "bias": bias}}
    got, wanted = (
        measure_importance(run_net, tree, [{"x": X}], ["last"], statistics=["fisher", "inputs"], progress=False)
        for tree in (small, dense)
    )
    assert_same_but_for_rounding(got, wanted)


def test_sums_of_a_bfloat16_model_are_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    batches = [{"x": X.astype(jnp.bfloat16)}]
    got = measure_importance(run_net, params, batches, ["first"], progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(got.sums)} == {jnp.dtype(jnp.float32)}


def test_without_labels_an_output_of_one_number_gives_its_own_squared_gradient():
    module: Any = Net(width=1)
    params = random_params(module, X)  # the only directions are 1 and -1

    def value(params, batch):
        return module.apply({"params": params}, batch["x"])[0, 0]

    got = measure_importance(
        lambda params, batch: apply(module, params, batch["x"]), params, [{"x": X}], ["first"], progress=False
    )
    wanted = sum_of_squares(value, params, {"x": X})["first"]["kernel"]
    assert_near(fisher_of(got["first"]), wanted, relative=100 * EPS)  # two layers in float32


def test_without_labels_the_expectation_is_the_sum_over_the_coordinates_of_the_output():
    copies = 20_000
    directions = jnp.broadcast_to(jnp.eye(3)[:, None], (3, 3, 3))  # for each example, one coordinate after the other
    wanted = np.sum(gradients_along(PARAMS, directions) ** 2, axis=(0, 1))
    batch = {"x": np.concatenate([X] * copies)}
    got = measured_net([batch], gradients="gaussian", statistics=["fisher"])
    # A squared projection's deviation is below sqrt(2) of its mean; five deviations of the mean of 20000.
    np.testing.assert_allclose(fisher_of(got["first"]) / copies, wanted, rtol=5 * np.sqrt(2 / copies))


def test_without_labels_the_seed_decides():
    first, same, other = (
        np.asarray(measured_net([{"x": X}], gradients="gaussian", seed=seed)["first"].fisher) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_without_labels_each_batch_has_its_own_directions():
    one, two = (np.asarray(measured_net([{"x": X}] * times, gradients="gaussian")["first"].fisher) for times in (1, 2))
    assert not np.allclose(two, 2 * one, rtol=1e-3)  # rounding is a thousand times smaller


def test_with_a_loss_the_seed_does_not_matter():
    first, second = (measured_net([{"x": X}], seed=seed) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first.sums, second.sums)


def test_without_labels_an_output_that_is_no_embedding_is_refused():
    def both(params, batch):
        output = run_net(params, batch)
        return {"first": output, "again": output}

    with pytest.raises(ValueError, match=r"whose output is one array \(batch, width\); got"):
        measure_importance(both, PARAMS, [{"x": X}], ["last"], progress=False)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches: wanted at least one"):
        measured_net([])


def test_path_of_no_layer_is_named():
    with pytest.raises(ValueError, match=r"\['second'\]"):
        measured_net([{"x": X}], paths=["first", "second"])


@pytest.mark.parametrize("loss", ["gaussian", "categorical", sines], ids=["gaussian", "categorical", "labels"])
def test_rows_are_the_sums_of_the_squared_gradients_over_the_outputs(loss):
    got = measured_net([{"x": X}], gradients=loss)["first"]
    assert_near(got.rows, np.asarray(got.fisher).sum(axis=(0, 2)), relative=100 * EPS)  # two ways to add


def vector(params, x, direction):
    """What the output of one example is, in a direction."""
    return run_net(params, {"x": x[None]})[0] @ direction


PULL = jax.jit(jax.vmap(jax.vmap(jax.grad(vector), in_axes=(None, 0, 0)), in_axes=(None, None, 0)))


def gradients_along(params, directions):
    """(gradients, examples, in, out), in float64, of the outputs in directions (gradients, examples, width)."""
    return np.asarray(PULL(params, jnp.asarray(X), directions)["first"]["kernel"], np.float64)


@pytest.mark.parametrize("loss", ["labels", "categorical", "gaussian"])
def test_grams_are_those_of_each_examples_gradients(loss):
    key = jax.random.fold_in(jax.random.key(0), 0)
    output = run_net(PARAMS, {"x": X})
    directions = {
        "labels": lambda: jnp.cos(output)[None],
        "categorical": lambda: categorical(output),
        "gaussian": lambda: gaussian(output, Draw(key, 0)),
    }[loss]()
    got = measured_net([{"x": X}], gradients=sines if loss == "labels" else loss)["first"]
    found = gradients_along(PARAMS, directions)
    rows = np.einsum("pbio,pbjo->bij", found, found)
    assert_near(got.row_gram, rows.sum(axis=0), relative=100 * EPS)  # two layers in float32
    assert_near(got.col_gram, np.einsum("pbio,pbiq->oq", found, found), relative=100 * EPS)
    assert_near(got.gram_squares, np.sum(rows**2), relative=100 * EPS)


def test_reflection_along_time_keeps_every_gradient_and_puts_the_mean_first():
    inputs, deltas = (jnp.asarray(RNG.normal(size=(3, 6, n)) + 5, jnp.float32) for n in (4, 5))
    inputs = inputs.at[1, 4:].set(0)  # padding
    deltas = deltas.at[1, 4:].set(0).at[2].add(-jnp.mean(deltas[2], axis=0, keepdims=True))
    axis = batch.time_axis(inputs)
    of_inputs, of_outputs = batch.mean_first(inputs, axis), batch.mean_first(deltas, axis)
    for i in range(3):
        wanted = exact(inputs[i]).T @ exact(deltas[i])
        assert_near(exact(of_inputs[i]).T @ exact(of_outputs[i]), wanted, relative=20 * EPS)  # six terms
    assert_near(of_inputs[1, 0], -np.sum(np.asarray(inputs[1]), axis=0) / 2, relative=20 * EPS)  # of four steps
    np.testing.assert_allclose(of_outputs[2, 0], 0, atol=20 * EPS)


def test_gradients_that_are_left_of_sums_that_cancel_have_accurate_grams():
    """As those of keys are: outputs whose gradients sum to zero over time, inputs with a large mean."""
    inputs, deltas = 1000 + RNG.normal(size=(2, 6, 4)), RNG.normal(size=(2, 6, 5))
    deltas -= deltas.mean(axis=1, keepdims=True)
    inputs, deltas = jnp.asarray(inputs, jnp.float32), jnp.asarray(deltas, jnp.float32)
    wanted = ("row_gram", "col_gram")
    steps = batch.entering(inputs, None, None)
    total, _ = batch.add_kernel(batch.no_sums(wanted, 4, 5), steps, deltas[None], 0)
    found = [exact(x).T @ exact(d) for x, d in zip(inputs, deltas, strict=True)]
    # The first step holds sums of rounding errors, eps times as large as the terms, times the mean: 1e-4 of the rest.
    assert_near(whole(total.row_gram), np.sum([g @ g.T for g in found], axis=0), relative=2e-3)
    assert_near(whole(total.col_gram), np.sum([g.T @ g for g in found], axis=0), relative=2e-3)


def test_squares_that_round_below_zero_are_zero():
    """Inputs at right angles to the output gradients, so that nothing but rounding errors is left."""
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(4, 8, 1)).astype(np.float32)
    inputs = rng.normal(size=(4, 8, 16)).astype(np.float32)
    along = np.einsum("bto,bti->boi", deltas, inputs) / np.sum(deltas**2, axis=1, keepdims=True)
    across, gradients = jnp.asarray(inputs - deltas * along), jnp.asarray(deltas)
    steps = batch.entering(across, None, None)
    total, _ = batch.add_kernel(batch.no_sums(("rows",), 16, 1), steps, gradients[None], 0)
    rows: Any = total.rows
    assert np.all(rows >= 0)
    np.testing.assert_allclose(rows, 0, atol=1e-4)  # of 4 sums of 64 products of about 1, in float32


@pytest.mark.parametrize("width", [1, sums.BLOCK, 2 * sums.BLOCK + 5])
def test_products_are_whole_and_symmetric_and_lie_in_half_the_room(width):
    a = RNG.normal(size=(2, 3, width)).astype(np.float32)
    kept = sums.upper_product(jnp.asarray(a), jnp.asarray(a))
    got = whole(kept)
    np.testing.assert_array_equal(got, got.T)
    flat = a.reshape(6, -1).astype(np.float64)
    assert_near(got, flat.T @ flat, relative=10 * EPS)  # sums of six terms
    entries = np.concatenate(sums.packed(kept))
    assert len(entries) == width * (width + 1) // 2
    for again in (
        sums.unpacked(entries),
        sums.upper(jnp.asarray(got)),
        sums.unpacked(np.concatenate(sums.packed(got))),
    ):
        jax.tree.map(np.testing.assert_array_equal, again, kept)
    assert sums.shape_of(kept) == (width, width)


@pytest.mark.parametrize("loss", [sines, "categorical", "gaussian"], ids=["labels", "categorical", "gaussian"])
def test_a_batch_in_pieces_has_the_sums_and_the_directions_of_the_whole(loss, monkeypatch):
    weighted = {"x": X, "weights": np.array([1, 2, 1], np.float32)}
    wanted = measured_net([weighted], gradients=loss)
    monkeypatch.setattr(measure, "AT_ONCE", 1)
    assert_same_but_for_rounding(measured_net([weighted], gradients=loss), wanted)


SIZES = [(16, 1, [8, 8]), (13, 1, [8, 5]), (20, 1, [5] * 4), (16, 3, [2] * 8), (2, 99, [1, 1])]


@pytest.mark.parametrize(("rows", "gradients", "sizes"), SIZES)
def test_pieces_hold_few_steps_and_at_least_an_example(rows, gradients, sizes, monkeypatch):
    monkeypatch.setattr(measure, "AT_ONCE", 512)
    whole_batch = {"input_ids": np.arange(rows * 64).reshape(rows, 64), "attention_mask": np.ones((rows, 64))}
    found = list(measure.pieces(whole_batch, "key", gradients))
    assert [len(part["input_ids"]) for part, _ in found] == sizes
    assert [draw.begin for _, draw in found] == list(np.cumsum([0, *sizes[:-1]]))
    np.testing.assert_array_equal(np.concatenate([part["input_ids"] for part, _ in found]), whole_batch["input_ids"])
    assert {draw.key for _, draw in found} == {"key"}


def test_categorical_is_the_expectation_over_the_labels_that_the_model_would_draw():
    p = np.asarray(jax.nn.softmax(run_net(PARAMS, {"x": X})), np.float64)
    surprises = jnp.asarray(p[None] - np.eye(3)[:, None], jnp.float32)  # the gradient of -log p_c, for each c
    wanted = np.einsum("bc,cbio->io", p, gradients_along(PARAMS, surprises) ** 2)
    got = measured_net([{"x": X}], gradients="categorical")["first"]
    assert_near(fisher_of(got), wanted, relative=100 * EPS)  # two layers in float32


def test_measurements_of_two_models_do_not_add_up():
    one = measured_net([{"x": X}])
    with pytest.raises(ValueError, match="wanted measurements of one model"):
        _ = one + replace(one, model="another")


def test_halves_are_every_other_example_across_batches():
    singles = gradients_along(PARAMS, jnp.cos(run_net(PARAMS, {"x": X}))[None])[0] ** 2
    got: Any = measured_net([{"x": X}, {"x": X}])["first"].fisher  # the examples 0, 1, 2, and again as 3, 4, 5
    for half in (0, 1):
        assert_near(got[half], singles.sum(axis=0), relative=100 * EPS)
    once: Any = measured_net([{"x": X}])["first"].fisher
    assert_near(once[0], singles[0] + singles[2], relative=100 * EPS)
    assert_near(once[1], singles[1], relative=100 * EPS)


def test_an_example_counts_as_often_as_its_weight_says():
    weighted = {"x": X, "weights": np.array([1, 0, 2], np.float32)}
    got, wanted = measured_net([weighted]), measured_net([{"x": X[[0, 2, 2]]}])
    assert (got.examples, got.tokens) == (wanted.examples, wanted.tokens) == (3, 3)
    for name in ("rows", "inputs", "outputs", "row_gram", "col_gram"):
        assert_near(getattr(got["first"], name), getattr(wanted["first"], name), relative=100 * EPS)
    assert_near(fisher_of(got["first"]), fisher_of(wanted["first"]), relative=100 * EPS)


def test_reliability_does_not_depend_on_the_unit_of_weights():
    """As many examples of equal weight tell as much; of others, fewer do."""
    how: dict[str, Any] = {"gradients": "gaussian", "statistics": ["row_gram", "col_gram", "gram_squares"]}
    weights = {"none": np.ones(64), "equal": np.full(64, 1 / 64), "one alone": 2 * np.eye(64)[7]}
    x = (RNG.normal(size=(64, *X.shape[1:])) * [1, 2, 3, 4, 5]).astype(np.float32)
    batches = {name: {"x": x, "weights": each} for name, each in weights.items()}
    found = {name: measured_net([batch], **how) for name, batch in batches.items()}
    shares = {name: gram_reliability(evidence_of(each, "first", (5, 4))) for name, each in found.items()}
    assert max(shares["none"]) > 0.1
    assert shares["equal"] == pytest.approx(shares["none"], rel=1e-3)
    assert (shares["one alone"], found["one alone"].effective) == ((0, 0), 1)
    both = found["none"] + replace(found["equal"], texts=())
    assert both.effective == pytest.approx((64 + 1) ** 2 / (64 + 1 / 64))


def test_texts_that_are_in_both_do_not_add_up():
    once = measured_net([{"x": X}])
    with pytest.raises(ValueError, match="wanted measurements of other texts; got 1 batches in both"):
        _ = once + once


def test_tokens_are_counted_without_padding_as_often_as_their_example():
    assert measure.counts(BATCH | {"weights": np.array([1, 1, 0, 2])}) == (4, 27)


def test_fractions_of_examples_add_up():
    part = BATCH | {"weights": np.full(len(BATCH["attention_mask"]), 0.125)}
    total = sums.Importance({}, examples=0, tokens=0, batches=0, gradients="labels", seed=0)
    for _ in range(4):
        total = measure.counted(total, part, "")
    assert total.examples == 0.5 * len(BATCH["attention_mask"])


def test_measurements_of_something_else_do_not_add_up(measured):
    with pytest.raises(ValueError, match="wanted two measurements of the same"):
        _ = measured + measured_net([{"x": X}])


def test_file_gives_back_what_was_measured(measured, tmp_path):
    save_importance(measured, tmp_path / "sums.safetensors")
    again = load_importance(tmp_path / "sums.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, measured)


@pytest.fixture
def small_blocks(monkeypatch):
    """Of three rows: five inputs take two of them. What was compiled with blocks of another size is not used."""
    monkeypatch.setattr(sums, "BLOCK", 3)
    cast(Any, batch.entering).clear_cache()
    yield
    cast(Any, batch.entering).clear_cache()


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch, small_blocks):
    file = tmp_path / "sums.safetensors"
    monkeypatch.setattr(measure, "SAVE_EVERY", 0.0)
    batches = [{"x": X}, {"x": X + 1}, {"x": X - 1}]
    of = partial(measured_net, paths=["first", "last"])  # which no other test measures

    def killed():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(killed(), file=file)
    assert load_importance(file).batches == 2
    got = of(batches, file=file)
    jax.tree.map(np.testing.assert_array_equal, got, of(batches))
    jax.tree.map(np.testing.assert_array_equal, load_importance(file), got)


def halved(output, batch):
    return 0.5 * sines(output, batch)


CALLED = {
    "by itself": lambda function: function,
    "in a program": jax.jit,
    "in a program of a program": lambda function: jax.jit(lambda x: jax.jit(function)(x)),
    "in a loop": lambda function: lambda x: jax.lax.scan(lambda y, _: (function(y), None), x, None, length=2)[0],
    "where it is wanted": lambda function: lambda x: jax.lax.cond(x[0, 0] > 0, function, lambda x: x, x),
    "computed again": jax.checkpoint,
}


@pytest.mark.parametrize("call", CALLED.values(), ids=CALLED)
def test_fingerprint_of_a_function_sees_the_arrays_that_it_holds(call):
    def function(seed):
        held = np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32)
        return call(lambda x: jnp.tanh(x @ held))

    one, again, other = (of_function(function(seed), np.ones((2, 3), np.float32)) for seed in (0, 0, 1))
    assert one == again != other


def run_twice(params, batch):
    return 2 * run_net(params, batch)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("first: ", {"statistics": ["fisher"]}),
        ("of another model ", {"params": PARAMS | {"last": PARAMS["last"] | {"bias": PARAMS["last"]["bias"] + 1}}}),
        ("of another module or loss ", {"gradients": halved}),
        ("of another module or loss ", {"forward": run_twice}),
        ("gradients: labels and gaussian", {"gradients": "gaussian"}),
        ("of the seed 0, wanted 1", {"seed": 1}),
        ("last: ", {"paths": ["first", "last"]}),
        ("of other texts ", {"batches": [{"x": X - 1}, {"x": X + 1}]}),
        ("of other texts ", {"batches": [{"x": X + 1}, {"x": X}]}),
        ("of other texts ", {"batches": [{"x": X, "weights": np.array([1.0, 2.0, 1.0])}, {"x": X + 1}]}),
        ("of other texts, from batch 1 on", {"batches": [{"x": X}, {"x": X - 1}]}),
        ("of more texts: 2 batches, got 1", {"batches": [{"x": X}]}),
    ],
)
def test_file_of_another_measurement_is_refused_and_kept(message, changed, tmp_path):
    file = tmp_path / "sums.safetensors"
    wanted = {"forward": run_net, "params": PARAMS, "paths": ["first"], "gradients": sines, "statistics": STATISTICS}
    wanted |= {"batches": [{"x": X}, {"x": X + 1}]}
    measure_importance(**wanted, file=file, progress=False)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file} holds .*{message}.*: name another file, or delete this one"):
        measure_importance(**wanted | changed, file=file, progress=False)
    assert file.read_bytes() == before


def test_file_of_the_same_measurement_is_read_instead_of_measuring(tmp_path):
    """From an iterator, with other containers of the same numbers, and then with more batches."""
    file = tmp_path / "sums.safetensors"
    first = measured_net([{"x": X}], file=file)
    arrays = jax.tree.map(jnp.asarray, PARAMS), iter([{"x": jnp.asarray(X)}])
    again = measure_importance(
        run_net, *arrays, ["first"], gradients=sines, statistics=STATISTICS, file=file, progress=False
    )
    jax.tree.map(np.testing.assert_array_equal, again, first)
    more = measured_net([{"x": X}, {"x": X + 1}], file=file)
    jax.tree.map(np.testing.assert_array_equal, more, measured_net([{"x": X}, {"x": X + 1}]))


def test_fingerprints_tell_a_changed_bit_a_swapped_name_and_another_shape():
    arrays = {"a": np.arange(6.0), "b": np.zeros(6)}
    same = {"b": jnp.zeros(6, jnp.float32), "a": jnp.arange(6, dtype=jnp.float32)}
    assert of_arrays({name: array.astype("f4") for name, array in arrays.items()}) == of_arrays(same)
    assert of_arrays({"i": np.arange(3, dtype=np.int64)}) == of_arrays({"i": np.arange(3, dtype=np.int32)})
    nearly = arrays | {"a": np.nextafter(arrays["a"], 9)}
    swapped = {"a": arrays["b"], "b": arrays["a"]}
    shaped = arrays | {"a": arrays["a"].reshape(2, 3)}
    found = [of_arrays(each) for each in (arrays, nearly, swapped, shaped, {"a": arrays["a"]})]
    assert len(set(found)) == 5


def test_small_weights_count_as_large_ones_do():
    """Those that add up to one over thousands of texts: sums of their squares are not rounded to nothing."""
    ones = [np.ones(3, np.float32), np.array([1, 2, 1], np.float32)]
    found = [
        measured_net([{"x": X, "weights": np.float32(unit) * each} for each in ones]).effective
        for unit in (1.0, 2.0**-12, 2.0**-26)
    ]
    np.testing.assert_allclose(found, (3 + 4) ** 2 / (3 + 6), rtol=1e-6)


def test_weights_that_cannot_be_are_refused():
    for weights, message in ([1, np.nan, 1], "row 1: got the weight nan"), ([0, 0, 0], "no example that counts"):
        with pytest.raises(ValueError, match=message):
            measured_net([{"x": X, "weights": np.array(weights, np.float32)}])


def test_place_of_no_file_is_refused_before_a_batch_is_read(tmp_path):
    (tmp_path / "text").write_text("")
    for file in (tmp_path, tmp_path / "text" / "sums"):
        with pytest.raises(ValueError, match=r"wanted the name of a file|is a file, wanted a directory"):
            measured_net(iter(()), file=file)


def test_a_disk_that_is_full_is_an_os_error_and_leaves_what_was_there(measured, tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "sums.safetensors"
    save_importance(measured, file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(file)):
            save_importance(measured, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_symmetric_matrices_are_in_the_file_once(tmp_path):
    kept = {"a": sums.Sums(row_gram=jnp.eye(300), col_gram=sums.upper(jnp.ones((700, 700))), rows=jnp.ones(300))}
    save_importance(measure.Importance(kept, 1, 1, 1, gradients="labels", seed=0), tmp_path / "sums")
    numbers = (300 * 301 + 700 * 701) // 2 + 300
    assert (tmp_path / "sums").stat().st_size < 4 * numbers + 1000
    again = load_importance(tmp_path / "sums")["a"]
    np.testing.assert_array_equal(again.row_gram, np.eye(300))
    np.testing.assert_array_equal(again.col_gram, np.ones((700, 700)))
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "sums")["a:row_gram"].shape == (300 * 301 // 2,)


def test_file_of_an_older_schema_is_refused_in_a_sentence(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SCHEMA", 2)
    save_importance(measured, tmp_path / "sums")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="wanted a file of save_importance, of schema 6; got schema 2: measure again"):
        load_importance(tmp_path / "sums")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda about: about.pop("examples"), r"of the entries \[.*examples.*; got \["),
        (lambda about: about.pop("texts"), r"of the entries \["),
        (lambda about: about.pop("paths"), "paths"),
        (lambda about: about.update(inputs=[1]), "wanted a file of save_importance"),
        (lambda about: about.update(more=1), r"of the entries \["),
    ],
)
def test_file_whose_entries_are_odd_is_refused_in_a_sentence(spoil, message, measured, tmp_path, monkeypatch):
    def dumps(about):
        spoil(about)
        return json.dumps(about)

    monkeypatch.setattr(storage, "json", SimpleNamespace(dumps=dumps))
    save_importance(measured, tmp_path / "sums")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"sums: (?=wanted a file of save_importance).*{message}"):
        load_importance(tmp_path / "sums")


def test_whole_matrices_and_halves_of_them_add_up():
    wide = jnp.asarray(RNG.normal(size=(3, 400)), jnp.float32)
    one, two = (
        measure.Importance({"a": sums.Sums(inputs=each)}, 1, 1, 1, gradients="labels", seed=0)
        for each in (sums.upper_product(wide, wide), wide.T @ wide)
    )
    both = one + two
    assert_near(both["a"].inputs, 2 * exact(wide).T @ exact(wide), relative=20 * EPS)  # sums of three terms, twice
    assert isinstance(both.sums["a"].inputs, sums.Upper)


def test_file_that_is_none_of_ours_is_refused(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("no tensors")
    with pytest.raises(ValueError, match="wanted a file of save_importance"):
        load_importance(file)


def test_inputs_alone_need_no_backward_pass():
    def forward(params, batch):
        return jax.lax.stop_gradient(run_net(params, batch)).astype(jnp.int32)  # nothing to go back from

    got = measure_importance(forward, PARAMS, [{"x": X}], ["first"], statistics=["inputs"], progress=False)["first"]
    tokens = X.reshape(-1, 5).astype(np.float64)
    assert_near(got.inputs, tokens.T @ tokens, relative=20 * EPS)  # six terms
    assert (got.fisher, got.rows, got.outputs) == (None, None, None)


def test_programs_of_few_models_are_kept():
    assert measure.program_for.cache_info().maxsize == 8


@pytest.mark.parametrize("loss", [lambda output, _: jnp.mean(output**2), lambda output, _: output**2])
def test_a_loss_that_is_not_one_number_for_each_example_is_refused(loss):
    """Gradients of a mean are those of an example over the number of these."""
    with pytest.raises(ValueError, match=r"loss: got an array \(.*\) for \d examples, wanted \(\d,\)"):
        measured_net([{"x": X}], gradients=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ["hessian"]}, r"statistics must be of 'fisher', .*; got \['hessian'\]"),
        ({"gradients": "poisson"}, "gradients must be a function .* 'categorical', 'gaussian', .*; got 'poisson'"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measured_net([{"x": X}], **options)
