"""The Fisher information is the sum of the squares of each example's own gradient."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert_adapter.families import module_for
from bert_adapter.families.bert import Bert, config_from_dict
from bert_adapter.importance import batch, sums
from bert_adapter.importance import measure as importance
from bert_adapter.importance.measure import eigenbases, measure_importance
from bert_adapter.importance.storage import load_importance, save_importance
from bert_adapter.importance.sums import Basis
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.running import apply

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "num_labels": 3,
}
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
PATHS = [f"bert/encoder/layer/{i}/{name}" for i in (0, 1) for name in LAYER] + ["bert/pooler/dense", "classifier"]
MODULE = module_for(CONFIG)
EPS = float(np.finfo(np.float32).eps)
measure = partial(measure_importance, progress=False)


class Net(nn.Module):
    """One vector for every example, from a mean over the steps."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, name="last")(nn.tanh(nn.Dense(4, name="first")(x)).sum(axis=1))


RNG = np.random.default_rng(9)
X = np.random.default_rng(1).normal(size=(3, 2, 5)).astype(np.float32)


def net(width=3) -> Any:
    return Net(width)


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def run(module, params, batch):
    return apply(module, params, batch["input_ids"], batch["attention_mask"])


def run_net(module, params, batch):
    return apply(module, params, batch["x"])


def cross_entropy(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)[:, 0]


def fisher_of(sums):
    """Of both halves."""
    assert sums.fisher is not None
    return np.asarray(sums.fisher, np.float64).sum(axis=0)


def exact(array):
    return np.asarray(array, np.float64)


def whole(strips):
    return np.asarray(sums.reflect(strips))


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def sum_of_squares(loss, params, batch):
    """The squares of the gradients of loss(params, batch of one) summed over the examples, in float64."""
    ones = {name: jnp.asarray(array)[:, None] for name, array in batch.items()}
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, ones)
    return jax.tree.map(lambda leaf: np.sum(np.asarray(leaf, np.float64) ** 2, axis=0), gradients)


def assert_near(got, wanted, relative):
    """Relative to the largest entry: small ones are sums of gradients that cancel."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=relative * float(np.max(np.abs(wanted))))


def assert_same_but_for_rounding(got, wanted):
    assert got.sums.keys() == wanted.sums.keys()
    for path, sums in wanted.sums.items():
        for ours, theirs in zip(jax.tree.leaves(got[path]), jax.tree.leaves(sums), strict=True):
            assert_near(ours, theirs, relative=100 * EPS)  # other sums of some ten layers in float32


@pytest.fixture(scope="module")
def params():
    return random_params(MODULE, np.zeros((1, 1), np.int32))


@pytest.fixture(scope="module")
def measured(params):
    return measure(partial(run, MODULE), params, [BATCH], PATHS, loss=cross_entropy)


@pytest.fixture(scope="module")
def truth(params):
    def loss(params, batch):
        return cross_entropy(MODULE.apply({"params": params}, batch["input_ids"], batch["attention_mask"]), batch)[0]

    return sum_of_squares(loss, params, BATCH)


@pytest.fixture(scope="module")
def states(params):
    """What enters the first layer, the second, and the pooler."""
    output: Any = jax.jit(partial(run, Bert(config_from_dict(CONFIG))))(params["bert"], BATCH)
    return output.hidden_states


@pytest.mark.parametrize("path", PATHS)
def test_fisher_is_the_sum_of_squared_gradients_of_the_examples(measured, truth, path):
    assert_near(
        fisher_of(measured[path]), at(truth, path)["kernel"], relative=1e-5
    )  # some hundred roundings in float32


def test_exactly_the_paths_asked_for_are_measured(measured):
    assert set(measured.sums) == set(PATHS)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", LAYER[:3])
def test_inputs_factor_sums_over_the_tokens_that_are_no_padding(states, measured, layer, name):
    tokens = np.asarray(states[layer], np.float64)[BATCH["attention_mask"] == 1]
    got = measured[f"bert/encoder/layer/{layer}/{name}"].inputs
    assert_near(got, tokens.T @ tokens, relative=100 * EPS)  # sums of 22 terms behind some ten layers in float32


def test_outputs_factor_sums_over_the_gradients_of_the_logits(params, measured):
    logits = run(MODULE, params, BATCH)
    deltas = np.asarray(jax.nn.softmax(logits), np.float64) - np.eye(3)[BATCH["labels"]]
    assert_near(measured["classifier"].outputs, deltas.T @ deltas, relative=100 * EPS)  # as above


def test_factors_of_a_net_are_those_written_out_in_numpy():
    params = random_params(Net(), X)
    first, last = (jax.tree.map(np.float64, params[name]) for name in ("first", "last"))
    hidden = np.tanh(X @ first["kernel"] + first["bias"])
    output = hidden.sum(axis=1) @ last["kernel"] + last["bias"]
    deltas = (1 - hidden**2) * (output @ last["kernel"].T)[:, None, :]  # of half the squared output
    got = measure(
        partial(run_net, Net()), params, [{"x": X}], ["first"], loss=lambda output, _: 0.5 * jnp.sum(output**2, axis=1)
    )["first"]
    tokens, deltas = X.reshape(-1, 5).astype(np.float64), deltas.reshape(-1, 4)
    assert_near(got.inputs, tokens.T @ tokens, relative=20 * EPS)  # six terms
    assert_near(got.outputs, deltas.T @ deltas, relative=100 * EPS)  # two layers, there and back


def test_longer_padding_changes_nothing(params, measured):
    longer = {name: array if array.ndim == 1 else np.pad(array, ((0, 0), (0, 3))) for name, array in BATCH.items()}
    longer["input_ids"][:, 8:] = 7
    got = measure(partial(run, MODULE), params, [longer], PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_cut_of_the_batches_changes_nothing(params, measured):
    halves = ({name: array[half] for name, array in BATCH.items()} for half in (slice(0, 2), slice(2, 4)))
    got = measure(partial(run, MODULE), params, halves, PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_dropout_is_off(params, measured):
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    got = measure(partial(run, module_for(CONFIG | rates)), params, [BATCH], PATHS, loss=cross_entropy)
    assert_same_but_for_rounding(got, measured)


def test_kernels_that_stayed_dense_are_measured_beside_factors():
    params, rng = random_params(Net(), X), np.random.default_rng(2)
    left, right = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    bias = params["first"]["bias"]
    small = params | {"first": {"kernel": FACTORISED, "left": left, "right": right, "bias": bias}}
    dense = params | {"first": {"kernel": left @ right, "bias": bias}}
    got, wanted = (measure(partial(run_net, Net()), tree, [{"x": X}], ["last"]) for tree in (small, dense))
    assert_same_but_for_rounding(got, wanted)


def test_sums_of_a_bfloat16_model_are_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(Net(), X))
    got = measure(partial(run_net, Net()), params, [{"x": X.astype(jnp.bfloat16)}], ["first"])
    assert {leaf.dtype for leaf in jax.tree.leaves(got.sums)} == {jnp.dtype(jnp.float32)}


def test_without_labels_an_output_of_one_number_gives_its_own_squared_gradient():
    params = random_params(net(width=1), X)  # the only directions are 1 and -1
    module = net(width=1)
    wanted = sum_of_squares(lambda params, batch: module.apply({"params": params}, **batch)[0, 0], params, {"x": X})
    got = measure(partial(run_net, module), params, [{"x": X}], ["first"])
    assert_near(fisher_of(got["first"]), wanted["first"]["kernel"], relative=100 * EPS)  # two layers in float32


def test_without_labels_the_expectation_is_the_sum_over_the_coordinates_of_the_output():
    copies, params = 20_000, random_params(Net(), X)
    exact = [
        sum_of_squares(lambda params, batch, i=i: net().apply({"params": params}, **batch)[0, i], params, {"x": X})
        for i in range(3)
    ]
    wanted = np.sum([tree["first"]["kernel"] for tree in exact], axis=0)
    batch = {"x": np.concatenate([X] * copies)}
    got = fisher_of(measure(partial(run_net, Net()), params, [batch], ["first"])["first"]) / copies
    # A squared projection's deviation is below sqrt(2) of its mean; five deviations of the mean of 20000.
    np.testing.assert_allclose(got, wanted, rtol=5 * np.sqrt(2 / copies))


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["same", "other"])
def test_without_labels_the_seed_decides(seeds):
    params = random_params(Net(), X)
    first, second = (
        np.asarray(measure(partial(run_net, Net()), params, [{"x": X}], ["first"], seed=seed)["first"].fisher)
        for seed in seeds
    )
    assert np.array_equal(first, second) == (seeds[0] == seeds[1])


def test_without_labels_each_batch_has_its_own_directions():
    params = random_params(Net(), X)
    once, twice = (
        np.asarray(measure(partial(run_net, Net()), params, [{"x": X}] * times, ["first"])["first"].fisher)
        for times in (1, 2)
    )
    assert not np.allclose(twice, 2 * once, rtol=1e-3)  # rounding is a thousand times smaller


def test_with_a_loss_the_seed_does_not_matter():
    params = random_params(Net(), X)
    first, second = (
        measure(partial(run_net, Net()), params, [{"x": X}], ["first"], loss=lambda output, _: output[:, 0], seed=seed)
        for seed in (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first.sums, second.sums)


def test_without_labels_an_output_that_is_no_embedding_is_refused():
    module = Bert(config_from_dict(CONFIG))
    params = random_params(module, np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match=r"without a loss the model's output must be one array \(batch, width\); got"):
        measure(partial(run, module), params, [BATCH], ["pooler/dense"])


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches: wanted at least one"):
        measure(partial(run_net, Net()), random_params(Net(), X), [], ["first"])


def test_path_of_no_dense_layer_is_named():
    with pytest.raises(ValueError, match=r"no dense layer is called under \['second'\]"):
        measure(partial(run_net, Net()), random_params(Net(), X), [{"x": X}], ["first", "second"])


def of_three_classes(loss):
    return partial(measure, partial(run_net, Net()), loss=loss)


def test_rows_are_the_sums_of_the_squared_gradients_over_the_outputs():
    params = random_params(Net(), X)
    for loss in ("gaussian", "categorical", lambda output, _: jnp.sum(jnp.sin(output), axis=1)):
        got = of_three_classes(loss)(params, [{"x": X}], ["first"], statistics=("rows", "fisher"))["first"]
        assert_near(got.rows, np.asarray(got.fisher).sum(axis=(0, 2)), relative=100 * EPS)  # two ways to add


def vector(params, x, direction):
    """What the output of one example is, in a direction."""
    return run_net(Net(), params, {"x": x[None]})[0] @ direction


def gradients_along(params, directions):
    """(gradients, examples, in, out), in float64, of the outputs in directions (gradients, examples, width)."""
    of_one = jax.jit(jax.vmap(jax.vmap(jax.grad(vector), in_axes=(None, 0, 0)), in_axes=(None, None, 0)))
    return np.asarray(of_one(params, jnp.asarray(X), directions)["first"]["kernel"], np.float64)


@pytest.mark.parametrize("loss", ["labels", "categorical", "gaussian"])
def test_grams_are_those_of_each_examples_gradients(loss):
    params, key = random_params(Net(), X), jax.random.fold_in(jax.random.key(0), 0)
    output = run_net(Net(), params, {"x": X})
    directions = {
        "labels": lambda: jnp.cos(output)[None],
        "categorical": lambda: gradients.categorical(output),
        "gaussian": lambda: gradients.gaussian(output, key),
    }[loss]()
    chosen: Any = (lambda output, _: jnp.sum(jnp.sin(output), axis=1)) if loss == "labels" else loss
    statistics = ("row_gram", "col_gram", "gram_squares")
    got = of_three_classes(chosen)(params, [{"x": X}], ["first"], statistics=statistics)["first"]
    gradients = gradients_along(params, directions)
    rows = np.einsum("pbio,pbjo->bij", gradients, gradients)
    assert_near(got.row_gram, rows.sum(axis=0), relative=100 * EPS)  # two layers in float32
    assert_near(got.col_gram, np.einsum("pbio,pbiq->oq", gradients, gradients), relative=100 * EPS)
    assert_near(got.gram_squares, np.sum(rows**2), relative=100 * EPS)


def test_reflection_along_time_keeps_every_gradient_and_puts_the_mean_first():
    inputs, deltas = (jnp.asarray(RNG.normal(size=(3, 6, n)) + 5, jnp.float32) for n in (4, 5))
    inputs = inputs.at[1, 4:].set(0)  # padding
    deltas = deltas.at[1, 4:].set(0).at[2].add(-jnp.mean(deltas[2], axis=0, keepdims=True))
    axis = batch.time_axis(inputs)
    turned, of_outputs = batch.mean_first(inputs, axis), batch.mean_first(deltas, axis)
    for i in range(3):
        wanted = exact(inputs[i]).T @ exact(deltas[i])
        assert_near(exact(turned[i]).T @ exact(of_outputs[i]), wanted, relative=20 * EPS)  # six terms
    assert_near(turned[1, 0], -np.sum(np.asarray(inputs[1]), axis=0) / 2, relative=20 * EPS)  # of four steps
    np.testing.assert_allclose(of_outputs[2, 0], 0, atol=20 * EPS)


def test_gradients_that_are_left_of_sums_that_cancel_have_accurate_grams():
    """As those of keys are: outputs whose gradients sum to zero over time, inputs with a large mean."""
    inputs, deltas = 1000 + RNG.normal(size=(2, 6, 4)), RNG.normal(size=(2, 6, 5))
    deltas -= deltas.mean(axis=1, keepdims=True)
    inputs, deltas = jnp.asarray(inputs, jnp.float32), jnp.asarray(deltas, jnp.float32)
    wanted = ("row_gram", "col_gram")
    sums, alike = batch.gradient_sums(inputs, deltas, 0, None, wanted)
    sums = batch.of_inputs(inputs, alike, wanted, sums)
    gradients = [exact(x).T @ exact(d) for x, d in zip(inputs, deltas, strict=True)]
    # The first step holds sums of rounding errors, eps times as large as the terms, times the mean: 1e-4 of the rest.
    assert_near(whole(sums.row_gram), np.sum([g @ g.T for g in gradients], axis=0), relative=2e-3)
    assert_near(whole(sums.col_gram), np.sum([g.T @ g for g in gradients], axis=0), relative=2e-3)


def test_wide_products_are_whole_and_symmetric():
    a = RNG.normal(size=(2, 3, 2 * sums.STRIP + 5)).astype(np.float32)
    got = whole(sums.upper_product(jnp.asarray(a), jnp.asarray(a)))
    np.testing.assert_array_equal(got, got.T)
    flat = a.reshape(6, -1).astype(np.float64)
    assert_near(got, flat.T @ flat, relative=10 * EPS)  # sums of six terms


def test_categorical_is_the_expectation_over_the_labels_that_the_model_would_draw():
    params = random_params(Net(), X)
    p = np.asarray(jax.nn.softmax(run_net(Net(), params, {"x": X})), np.float64)
    wanted = 0.0
    for c in range(3):

        def surprise(params, batch, c=c):
            return -jax.nn.log_softmax(run_net(Net(), params, batch))[0, c]

        ones = jax.vmap(jax.grad(surprise), in_axes=(None, 0))(params, {"x": jnp.asarray(X)[:, None]})
        wanted = wanted + np.einsum("b,bio->io", p[:, c], np.asarray(ones["first"]["kernel"], np.float64) ** 2)
    got = of_three_classes("categorical")(params, [{"x": X}], ["first"])["first"]
    assert_near(fisher_of(got), wanted, relative=100 * EPS)  # two layers in float32


def test_fisher_in_a_basis_is_that_of_the_turned_gradients():
    params = random_params(Net(), X)
    rng = np.random.default_rng(3)
    bases = {"first": Basis(*(jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0], jnp.float32) for n in (5, 4)))}
    loss = of_three_classes(lambda output, _: jnp.sum(jnp.sin(output), axis=1))
    plain = partial(loss, params, paths=["first"], statistics=("fisher",))
    got = fisher_of(plain([{"x": X[:1]}], bases=bases)["first"])
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(run_net(Net(), params, {"x": X[:1]}))))(params)
    turned = bases["first"].inputs.T @ gradient["first"]["kernel"] @ bases["first"].outputs
    assert_near(got, np.square(np.float64(turned)), relative=100 * EPS)  # products of five in float32


def test_eigenbases_diagonalise_the_factors(measured):
    bases = eigenbases(measured)
    for path, basis in bases.items():
        for vectors, factor in zip(basis, (measured[path].inputs, measured[path].outputs), strict=True):
            turned = np.linalg.multi_dot([np.asarray(array, np.float64) for array in (vectors.T, factor, vectors)])
            scale = np.max(np.abs(turned))
            np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=100 * EPS * scale)
            assert np.all(np.diff(np.diag(turned)) <= 100 * EPS * scale)  # the largest first


def test_halves_are_every_other_example_across_batches():
    params = random_params(Net(), X)
    of = partial(of_three_classes(lambda output, _: output[:, 0]), params, paths=["first"], statistics=("fisher",))
    singles = [fisher_of(of([{"x": X[i : i + 1]}])["first"]) for i in range(3)]
    got: Any = of([{"x": X[:1]}, {"x": X[1:]}])["first"].fisher
    assert_near(got[0], singles[0] + singles[2], relative=20 * EPS)
    assert_near(got[1], singles[1], relative=20 * EPS)


def test_an_example_counts_as_often_as_its_weight_says(params):
    weighted = {**BATCH, "weights": np.array([1, 1, 0, 2], np.float32)}
    again = {name: array[[0, 1, 3, 3]] for name, array in BATCH.items()}
    got, wanted = (
        measure(partial(run, MODULE), params, [batch], PATHS, loss=cross_entropy) for batch in (weighted, again)
    )
    assert (got.examples, got.tokens) == (wanted.examples, wanted.tokens) == (4, 27)
    for path, sums in wanted.sums.items():
        assert_near(fisher_of(got[path]), fisher_of(sums), relative=100 * EPS)  # as above
        assert_near(got[path].inputs, sums.inputs, relative=100 * EPS)
        assert_near(got[path].outputs, sums.outputs, relative=100 * EPS)


def test_two_measurements_add_up_to_that_of_both(params, measured):
    first, second = (
        measure(partial(run, MODULE), params, [{n: a[half] for n, a in BATCH.items()}], PATHS, loss=cross_entropy)
        for half in (slice(0, 2), slice(2, 4))
    )
    both = first + second
    assert_same_but_for_rounding(both, measured)
    assert (both.examples, both.tokens, both.batches) == (4, 22, 2)


def test_measurements_of_something_else_do_not_add_up(params, measured):
    other = measure(partial(run, MODULE), params, [BATCH], PATHS[:1], loss=cross_entropy)
    with pytest.raises(ValueError, match="wanted two measurements of the same"):
        _ = measured + other


def test_measurements_in_two_bases_do_not_add_up():
    params = random_params(Net(), X)
    eye = Basis(jnp.eye(5), jnp.eye(4))
    one, two = (
        measure(partial(run_net, Net()), params, [{"x": X}], ["first"], bases={"first": basis}, statistics=["fisher"])
        for basis in (eye, Basis(eye.inputs[::-1], eye.outputs))
    )
    with pytest.raises(ValueError, match="in one eigenbasis"):
        _ = one + two


def test_file_gives_back_what_was_measured(measured, tmp_path):
    save_importance(measured, tmp_path / "sums.safetensors")
    again = load_importance(tmp_path / "sums.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, measured)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    params, file = random_params(Net(), X), tmp_path / "sums.safetensors"
    monkeypatch.setattr(importance, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(sums, "STRIP", 3)  # 5 inputs and 4 outputs take two
    batches = [{"x": X}, {"x": X + 1}, {"x": X - 1}]

    def killed():
        yield from batches[:2]
        raise KeyboardInterrupt

    of = partial(measure, partial(run_net, Net()), params, paths=["first"], statistics=importance.STATISTICS)
    with pytest.raises(KeyboardInterrupt):
        of(killed(), file=file)
    assert load_importance(file).batches == 2
    got = of(batches, file=file)
    jax.tree.map(np.testing.assert_array_equal, got, of(batches))
    jax.tree.map(np.testing.assert_array_equal, load_importance(file), got)


def test_file_of_another_measurement_is_refused(tmp_path):
    params, file = random_params(Net(), X), tmp_path / "sums.safetensors"
    of = partial(measure, partial(run_net, Net()), params, [{"x": X}])
    of(["first"], file=file)
    with pytest.raises(ValueError, match="holds another measurement"):
        of(["last"], file=file)


def test_file_that_is_none_of_ours_is_refused(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("no tensors")
    with pytest.raises(ValueError, match="wanted a file of save_importance"):
        load_importance(file)


def test_inputs_alone_need_no_backward_pass():
    def forward(params, batch):
        return jax.lax.stop_gradient(run_net(Net(), params, batch)).astype(jnp.int32)  # nothing to go back from

    got = measure(forward, random_params(Net(), X), [{"x": X}], ["first"], statistics=["inputs"])["first"]
    tokens = X.reshape(-1, 5).astype(np.float64)
    assert_near(got.inputs, tokens.T @ tokens, relative=20 * EPS)  # six terms
    assert (got.fisher, got.rows, got.outputs) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ["hessian"]}, r"statistics must be of 'fisher', .*; got \['hessian'\]"),
        ({"loss": "poisson"}, "loss must be a function or one of 'categorical', 'gaussian'; got 'poisson'"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(partial(run_net, Net()), random_params(Net(), X), [{"x": X}], ["first"], **options)
