"""Training moves dense and factorised parameters alike, and goes on where it was stopped."""

import functools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import WORDS, row_batches, rows

import bert_adapter
from bert_adapter import training
from bert_adapter.batches import unit_weights
from bert_adapter.checkpoint import load, save
from bert_adapter.checkpoint.names import by_path
from bert_adapter.cli import main
from bert_adapter.evaluate import compare, loss_increase, of_classes, of_values, score
from bert_adapter.factorisation import factorise
from bert_adapter.families import module_for, predictive
from bert_adapter.families.sentence import OLDER_ACTIVATION, activations
from bert_adapter.heads import with_head
from bert_adapter.importance.measure import measure_importance
from bert_adapter.layers.running import apply
from bert_adapter.losses import distillation, task_loss
from bert_adapter.model import forward
from bert_adapter.reading import read_rows
from bert_adapter.text import LabelledTexts, labelled_batches
from bert_adapter.training import finetune

KEY = "bert/encoder/layer/0/attention/self/key"
RNG = np.random.default_rng(0)
train = partial(finetune, progress=False, learning_rate=2e-2)


@functools.cache
def embedder():
    return tiny.model(size=0.2)


@functools.cache
def headed():
    return with_head(embedder(), 2)


@functools.cache
def small():
    params, _ = factorise(headed().params, {KEY: None}, {KEY: 4}, method="svd", progress=False)
    return headed()._replace(params=params, config=headed().config | {"low_rank": {"schema": 1, "ranks": {KEY: 4}}})


@functools.cache
def still():
    """Without dropout."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return headed()._replace(module=module_for(headed().config | rates))


@functools.cache
def gradients():
    """The compiled gradient of the mean loss of a batch, of the model without dropout."""

    loss = task_loss(still().module)

    def objective(params, batch):
        weights = batch["weights"]
        output = apply(still().module, params, *(batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")))
        return jnp.sum(weights * loss(output, batch)) / jnp.sum(weights)

    return jax.jit(jax.grad(objective))


@pytest.mark.parametrize("begin", [pytest.param(headed, marks=pytest.mark.slow), small], ids=["dense", "factorised"])
def test_a_rule_is_learnt(begin):
    trained, losses = train(begin(), row_batches(), epochs=20)
    assert losses[-1] < 0.3 < losses[0]
    assert score(trained, rows())["accuracy"] > 0.9
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained.params, jax.device_get(begin().params))
    assert all(jax.tree.leaves(moved))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(trained.params))


def test_factors_that_were_trained_are_saved_and_loaded(tmp_path):
    trained, _ = train(small(), row_batches(), epochs=1)
    save(trained, tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "small").params, trained.params)


def test_the_command_line_trains_scores_and_saves(tmp_path, capsys):
    save(embedder(), tmp_path / "dense")
    lines = [f"{text}\t{label}" for text, label in zip(rows().texts, rows().labels, strict=True)]
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(lines), "utf-8")
    (tmp_path / "dev.tsv").write_text((tmp_path / "rows.tsv").read_text("utf-8"), "utf-8")
    common = ["--data", str(tmp_path / "rows.tsv"), "--dev", str(tmp_path / "dev.tsv"), "--batch-size", "8"]
    assert main(["finetune", str(tmp_path / "dense"), *common, "--epochs", "1", "-o", str(tmp_path / "once")]) == 0
    again = ["--teacher", str(tmp_path / "once"), "--distil", "1.0", "-o", str(tmp_path / "twice")]
    again += ["--file", str(tmp_path / "state")]
    assert main(["finetune", str(tmp_path / "once"), *common, "--epochs", "1", *again]) == 0
    printed = capsys.readouterr().out
    assert "a new head of 2 outputs" in printed
    assert printed.count("after: accuracy 0.") + printed.count("after: accuracy 1.") == 2
    assert printed.count("before: ") == 1  # a new head has nothing to say yet
    assert load(tmp_path / "twice").module.config.num_labels == 2
    assert main(["finetune", str(tmp_path / "once"), "--data", "nowhere.tsv", "-o", str(tmp_path / "x")]) == 2


def test_model_given_is_left_alone():
    before = jax.tree.map(np.array, headed().params)
    train(headed(), row_batches(), epochs=1)
    jax.tree.map(np.testing.assert_array_equal, headed().params, before)


def test_a_run_that_was_killed_ends_where_another_one_does(tmp_path, monkeypatch):
    file = tmp_path / "state.safetensors"
    whole, losses = train(headed(), row_batches(), epochs=2)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    saved = training.save_state

    def killed(state, history, file):
        saved(state, history, file)
        if state.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(headed(), row_batches(), epochs=2, file=file)
    assert file.exists()
    again, later = train(headed(), row_batches(), epochs=2, file=file)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    assert later == losses
    monkeypatch.setattr(training, "step_function", lambda recipe: lambda *_, **__: pytest.fail("it goes on"))
    ended, _ = train(headed(), row_batches(), epochs=2, file=file)
    jax.tree.map(np.testing.assert_array_equal, ended.params, whole.params)
    others = {
        "another model": {"model": with_head(embedder(), 2, seed=9)},
        "another module or loss": {"loss": halved},
        "another texts or labels": {"batches": [{**batch, "labels": 1 - batch["labels"]} for batch in row_batches()]},
        "another options": {"seed": 1},
        "another teacher": {"teacher": headed()},
    }
    for message, options in others.items():
        with pytest.raises(ValueError, match=f"the state of another training .*{message}"):
            train(**{"model": headed(), "batches": row_batches(), "epochs": 2, "file": file} | options)


def test_state_of_another_teacher_with_the_same_parameters_is_refused(tmp_path):
    file, options = tmp_path / "state.safetensors", {"epochs": 1, "file": tmp_path / "state.safetensors"}
    train(headed(), row_batches(), teacher=headed(), **options)
    entries = headed().config | {"hidden_act": "relu"}
    other = headed()._replace(module=module_for(entries, headed().files), config=entries)
    with pytest.raises(ValueError, match=f"{file} holds the state of another training.*another teacher's module"):
        train(headed(), row_batches(), teacher=other, **options)


def halved(output, batch):
    return 0.5 * task_loss(headed().module)(output, batch)


def test_state_of_another_training_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    params = jax.tree.map(jnp.asarray, headed().params)
    state = training.State(params, training.adamw(0.01).init(params), 3)
    training.save_state(state, np.zeros(5, np.float32), file)
    with pytest.raises(ValueError, match="the state of another training"):
        train(headed(), row_batches(), epochs=2, file=file)
    file.write_text("no tensors")
    with pytest.raises(ValueError, match="wanted the state of a training"):
        train(headed(), row_batches(), epochs=2, file=file)


def test_seed_decides():
    first, second, other = (train(headed(), row_batches(), epochs=1, seed=seed)[1] for seed in (0, 0, 1))
    assert first == second != other


def test_one_step_is_adamws():
    """The first rate of a warm-up of one step is 0, the second the whole."""
    batch = row_batches()[0]
    options: Any = {"warmup": 0.5, "learning_rate": 1e-3, "weight_decay": 0.1}
    trained, _ = finetune(still(), [batch], epochs=2, progress=False, **options)
    found = gradients()(still().params, batch)
    norm = float(np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(found))))
    for path, gradient in by_path(found).items():
        g = np.asarray(gradient, np.float64) * min(1, 1 / norm)  # twice the same: means without bias are g and g**2
        start = np.asarray(by_path(still().params)[path], np.float64)
        decay = 0.1 * start if start.ndim > 1 else 0.0
        wanted = start - 1e-3 * (g / (np.abs(g) + 1e-8) + decay)
        clear = np.abs(g) > 1e-5  # where rounding does not decide the sign
        np.testing.assert_allclose(by_path(trained.params)[path][clear], wanted[clear], rtol=0, atol=2e-5)


def test_rates_are_those_of_optax():
    for warmup, total in ((0, 5), (1, 1), (2, 7), (6, 6)):
        up, down = max(warmup, 1), max(total - warmup, 1)
        parts = [optax.linear_schedule(0.0, 3e-4, up), optax.linear_schedule(3e-4, 0.0, down)]
        schedule = optax.join_schedules(parts, [warmup])
        wanted = np.array([np.asarray(schedule(step)) for step in range(total)])
        np.testing.assert_allclose(training.learning_rates(3e-4, warmup, total), wanted, rtol=1e-6, atol=1e-10)


def test_steps_are_those_of_optax_with_the_schedule_inside():
    """The rate is an argument of our step; optax has the whole schedule in its own."""
    wanted: Any = jax.tree.map(jnp.asarray, still().params)
    schedule = optax.join_schedules([optax.linear_schedule(0, 1e-3, 2), optax.linear_schedule(1e-3, 0, 2)], [2])
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, wanted)
    adamw = optax.adamw(schedule, weight_decay=0.1, mask=matrices)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state, batch = optimiser.init(wanted), row_batches()[0]
    update = jax.jit(optimiser.update)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        for _ in range(4):
            updates, state = update(gradients()(wanted, batch), state, wanted)
            wanted = jax.tree.map(lambda leaf, change: leaf + change, wanted, updates)
    options: Any = {"warmup": 0.5, "learning_rate": 1e-3, "weight_decay": 0.1}
    got, _ = finetune(still(), [batch], epochs=4, progress=False, **options)
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)  # of steps of 1e-3, some of a gradient near nothing
    jax.tree.map(close, got.params, jax.device_get(wanted))


def test_one_program_serves_all_epochs_and_rates():
    recipe = training.recipe_for(headed(), None, loss=task_loss(headed().module), distil=0.5, weight_decay=0.01)
    step = training.step_function(recipe)
    counts = []
    for epochs, rate in ((1, 1e-3), (2, 1e-4)):
        finetune(headed(), row_batches(), epochs=epochs, learning_rate=rate, progress=False)
        counts.append(step._cache_size())
    assert training.step_function(recipe) is step
    assert counts[0] == counts[1]


def test_a_teacher_alone_is_followed():
    teacher, _ = train(headed(), row_batches(), epochs=20)
    other = with_head(embedder(), 2, seed=5)
    labels = [{**batch, "labels": 1 - batch["labels"]} for batch in row_batches()]  # which count for nothing
    taught, _ = train(other, labels, teacher=teacher, distil=1.0, epochs=20)
    assert score(taught, rows())["accuracy"] > 0.9


def test_distillation_is_zero_for_a_copy_and_its_gradient_that_of_soft_labels():
    logits, wanted = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    apart = distillation(headed().module, 2.0)
    np.testing.assert_allclose(apart(jnp.asarray(wanted), jnp.asarray(wanted)), 0, atol=1e-6)
    got = jax.grad(lambda logits: jnp.sum(apart(logits, jnp.asarray(wanted))))(jnp.asarray(logits))
    soft = np.asarray(jax.nn.softmax(logits / 2) - jax.nn.softmax(wanted / 2), np.float64)
    np.testing.assert_allclose(got, 2 * soft, atol=1e-6)


def test_embeddings_and_values_are_distilled_by_half_the_squared_distance():
    value = with_head(embedder(), 1)
    for model, width in ((embedder(), 16), (value, 1)):
        got = distillation(model.module, 2.0)(jnp.ones((2, width)), jnp.zeros((2, width)))
        np.testing.assert_allclose(got, [width / 2] * 2)


def test_regression_has_half_the_squared_error():
    loss = task_loss(with_head(embedder(), 1).module)
    got = loss(jnp.asarray([[1.0], [3.0]]), {"labels": np.array([2.0, 3.0], np.float32)})
    np.testing.assert_allclose(got, [0.5, 0.0])


def test_head_keeps_the_encoder_and_its_pooler():
    jax.tree.map(np.testing.assert_array_equal, headed().params["bert"], embedder().params)
    assert headed().params["classifier"]["kernel"].shape == (16, 2)
    with pytest.raises(ValueError, match="a head already, of 2 labels"):
        with_head(headed(), 3)


def test_head_on_an_encoder_without_a_pooler_gets_a_new_one(tmp_path):
    bare = embedder()
    params = {name: part for name, part in bare.params.items() if name != "pooler"}
    got = with_head(bare._replace(module=bare.module.clone(add_pooling_layer=False), params=params), 1)
    save(got, tmp_path / "headed")
    assert load(tmp_path / "headed").params["bert"]["pooler"]["dense"]["kernel"].shape == (16, 16)


def changed(**arrays):
    """The batches, the second one with other arrays."""
    first, second, *_ = row_batches()
    return [first, {**second, **{name: np.array(array) for name, array in arrays.items()}}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no batches: wanted at least one"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be in"),
        ({"distil": 2.0}, "distil must be in"),
        ({"distil": 0.5}, "distil: got 0.5 without a teacher"),
        ({"weight_decay": float("nan")}, "weight_decay must be in"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"file": f"{__file__}/state"}, f"{__file__} is a file, wanted a directory"),
        ({"teacher": lambda: embedder()}, r"teacher: got outputs of shape \(8, 16\), wanted those .*\(8, 2\)"),
        (
            {"batches": lambda: changed(labels=[0, -1] * 4)},
            "batch 1, row 1: got the label -1, wanted a class .*GLUE",
        ),
        ({"batches": lambda: changed(labels=[0.5] * 8)}, "batch 1, row 0: got the label 0.5, wanted a class"),
        ({"batches": lambda: changed(labels=[0, 2] * 4)}, "batch 1, row 1: got the label 2, wanted a class"),
        ({"batches": lambda: changed(labels=[0, 1])}, "batch 1, 'labels': got 2 rows, wanted 8, one for each example"),
        ({"batches": [{"input_ids": np.ones((8, 4), np.int32)}]}, "batch 0: got .*, wanted 'labels' too"),
        ({"batches": lambda: changed(weights=[1, np.nan] * 4)}, "batch 1, row 1: got the weight nan"),
        ({"batches": lambda: changed(weights=[1, -1] * 4)}, "batch 1, row 1: got the weight -1"),
        ({"batches": lambda: changed(weights=[0] * 8)}, "batch 1: got no row that counts"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    given: Any = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        train(headed(), **{"batches": row_batches()} | given)


def test_rows_are_read_as_they_stand(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text('sentence1\tsentence2\tlabel\na "red\tfox\t2.5\r\nit\tdog\t0\n', "utf-8")
    found = read_rows(file)
    assert list(found.texts) == [('a "red', "fox"), ("it", "dog")]
    np.testing.assert_array_equal(found.labels, np.array([2.5, 0], np.float32))
    file.write_text("label\tsentence\n1\ta fox\n0\tit\n", "utf-8")
    found = read_rows(file)
    assert (list(found.texts), found.labels.tolist(), found.labels.dtype) == (["a fox", "it"], [1, 0], np.int32)


def test_names_of_classes_may_have_underscores(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("sentence\tlabel\nfox\tnot_entailment\ndog\tentailment\nit\tLABEL_0\n", "utf-8")
    assert read_rows(file).labels.tolist() == ["not_entailment", "entailment", "LABEL_0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n1\t2\n", r"wanted a heading of one or two columns of text and 'label'; got \['a', 'b'\]"),
        ("sentence\tlabel\nfox\n", "line 2: wanted 2 columns; got 1"),
        ("sentence\tlabel\nfox\t1\ndog\tyes\n", "line 3: got 'yes' in the column 'label', wanted a finite number"),
        ("sentence\tlabel\nfox\tyes\ndog\t1\n", "line 3: got '1' in the column 'label', wanted a name"),
        ("sentence\tlabel\n\nfox\t1\ndog\t\n", "line 4: got '' in the column 'label'"),
        ("sentence\tlabel\nfox\tnan\n", "line 2: got 'nan' in the column 'label', wanted a finite number"),
        ("sentence\tlabel\nfox\t1e300\n", "line 2: got '1e300' in the column 'label', wanted a finite number"),
        ("sentence\tlabel\nfox\t1_0\n", "line 2: got '1_0' in the column 'label', wanted a finite number"),
        ("\nsentence\tlabel\nfox\t1\n", "wanted a heading of one or two columns"),
        ("label\tlabel\n1\t2\n", "wanted a heading of one or two columns"),
        ("sentence\tlabel\n", "wanted rows below the heading"),
        ("sentence\tlabel\tidx\nfox\t1\t0\n", "got a column called 'idx' in the heading .*wanted texts: pandas writes"),
        ("\tsentence\tlabel\n0\tfox\t1\n", "got a column called '' in the heading"),
        ("sentence\tlabel\t\nfox\t1\t\n", "got a column called '' in the heading"),
        ("Unnamed: 0\tsentence\tlabel\n0\tfox\t1\n", "got a column called 'Unnamed: 0' in the heading"),
        ("number\tsentence\tlabel\n4\tfox\t1\n9\tit\t0\n", "got an integer in every row of the column 'number'"),
        ("sentence\tlabel\nfox\t1\n \t0\n", "line 3: got ' ' in the column 'sentence', wanted a text"),
    ],
)
def test_rows_that_cannot_be_read_are_named(text, message, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_quotes_are_read_as_text_and_that_is_said(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text('sentence\tlabel\n"a" fox ""\t1\n"a ""red"" fox"\t0\n', "utf-8")
    with pytest.warns(UserWarning, match="line 3: got a quoted cell, whose quotes are read as text"):
        assert read_rows(file).texts == ['"a" fox ""', '"a ""red"" fox"']


def test_batches_hold_every_row_once_with_its_label():
    batches = labelled_batches(headed(), LabelledTexts(rows().texts[:11], rows().labels[:11]), batch_size=4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 4]
    assert sum(batch["weights"].sum() for batch in batches) == 11
    red = WORDS.index("red")
    for batch in batches:
        np.testing.assert_array_equal((batch["input_ids"] == red).any(axis=1), batch["labels"] == 1)


def test_scores_are_those_of_scikit_learn():
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    for classes in (2, 4):
        a, b = RNG.integers(0, classes, (2, 60))
        got = of_classes(a, b)
        assert got["accuracy"] == pytest.approx(metrics.accuracy_score(b, a))
        assert got["matthews"] == pytest.approx(metrics.matthews_corrcoef(b, a))
    assert of_classes(np.ones(5, int), np.array([1, 0, 1, 1, 0])) == {"accuracy": 0.6, "matthews": 0.0}
    x, y = RNG.normal(size=(2, 40))
    assert of_values(x, y)["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert of_values(x, y)["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_embedder_is_scored_by_cosines_of_pairs():
    pairs = LabelledTexts(
        [("a red fox", "a red fox"), ("a dog", "it runs far"), ("far", "far")], np.array([1, 0, 1], np.float32)
    )
    assert score(embedder(), pairs)["pearson"] > 0.9
    with pytest.raises(ValueError, match="scored by the cosines of pairs"):
        score(embedder(), rows())


@pytest.mark.parametrize(
    "problem_type",
    [
        "single_label_classification",
        pytest.param("multi_label_classification", marks=pytest.mark.slow),
        pytest.param("regression", marks=pytest.mark.slow),
    ],
)
def test_loss_rises_by_what_the_fisher_information_predicts(problem_type):
    """To second order; the diagonal alone is right on average over the signs of the errors."""
    model = with_head(embedder(), 2, problem_type=problem_type)
    kind = predictive(model.module)
    measured = measure_importance(
        forward(model), model.params, row_batches(), ["classifier"], gradients=kind, statistics=["fisher"]
    )
    fisher = measured["classifier"].fisher
    assert fisher is not None
    predicted = 0.5 * 0.1**2 * float(np.sum(fisher)) / measured.examples
    rng, ratios = np.random.default_rng(1), []
    for _ in range(40):
        moved = model.params["classifier"]["kernel"] + np.float32(0.1) * rng.choice([-1, 1], (16, 2)).astype(np.float32)
        head = model.params["classifier"] | {"kernel": moved}
        other = model._replace(params=model.params | {"classifier": head})
        ratios.append(loss_increase(model, other, row_batches()) / predicted)
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1) < 4 * error + 0.02
    assert loss_increase(model, model, row_batches()) == pytest.approx(0, abs=1e-6)


def test_loss_of_labels_rises_by_the_difference_of_the_means():
    other = with_head(embedder(), 2, seed=9)
    loss = task_loss(headed().module)
    got = loss_increase(headed(), other, row_batches(), loss)
    means = []
    for model in (headed(), other):
        each = [(np.asarray(loss(forward(model)(model.params, b), b)), b["weights"]) for b in row_batches()]
        means.append(sum(float(np.sum(a * w)) for a, w in each) / sum(float(np.sum(w)) for _, w in each))
    assert got == pytest.approx(means[1] - means[0], abs=1e-5)
    with pytest.raises(ValueError, match="batches: got none, wanted at least one row"):
        loss_increase(headed(), other, [])


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16"])
def test_what_is_stored_in_fewer_bits_is_trained_so(tmp_path, dtype):
    """Else saving rounds most steps away, and scores are not those of what is saved."""
    save(small(), tmp_path / "few", dtype=dtype)
    given = load(tmp_path / "few")
    got, losses = train(given, row_batches(), epochs=4)
    save(got, tmp_path / "tuned")
    jax.tree.map(np.testing.assert_array_equal, got.params, load(tmp_path / "tuned").params)
    assert losses[-1] < losses[0]
    assert not np.array_equal(by_path(got.params)[f"{KEY}/left"], by_path(given.params)[f"{KEY}/left"])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_models_in_16_bits_are_trained_in_32_and_come_back_in_16(dtype):
    given = headed()._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), headed().params))
    got, losses = train(given, row_batches(), epochs=4, teacher=given)
    assert losses[-1] < losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(got.params)} == {np.dtype(dtype)}
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(got.params))


def test_a_teacher_of_other_tokens_is_refused():
    other = with_head(tiny.model(vocab_size=21), 2)
    with pytest.raises(ValueError, match="teacher: got a model of 21 tokens, wanted 20"):
        train(headed(), row_batches(), teacher=other)
    with pytest.raises(ValueError, match="small: got a model of 21 tokens, wanted 20"):
        loss_increase(headed(), other, row_batches(), progress=False)


def named(*names):
    known = {"id2label": {str(number): name for number, name in enumerate(names)}}
    return headed()._replace(config=headed().config | known)


@pytest.mark.parametrize("names", [("yes", "no"), ("Yes", "maybe")])
def test_a_model_whose_classes_are_in_another_order_is_no_teacher_and_not_compared(names):
    """Else the labels are learnt swapped, or a model is far from itself."""
    model, other = named("no", "yes"), named(*names)
    message = re.escape(f"got a model whose 'id2label' is {list(names)}, wanted ['no', 'yes'] as the model's is")
    for call in (
        lambda: train(model, row_batches(), teacher=other),
        lambda: bert_adapter.heal(model, other, row_batches()),
        lambda: loss_increase(model, other, row_batches(), progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_classes_that_are_called_otherwise_may_be_the_same():
    for names in (("No", "YES"), ("LABEL_0", "LABEL_1")):
        assert loss_increase(named("no", "yes"), named(*names), row_batches(), progress=False) < 1e-6


def test_names_that_an_earlier_head_has_left_behind_say_nothing():
    pairs = [("no", "yes"), ("yes", "no")]
    first, second = (embedder()._replace(config=embedder().config | named(*names).config) for names in pairs)
    first, second = (one._replace(config=one.config | {"architectures": ["BertModel"]}) for one in (first, second))
    assert loss_increase(first, second, [without_labels(batch) for batch in row_batches()], progress=False) == 0
    model, other = named("neg", "NEG"), named("NEG", "neg")
    assert loss_increase(model, other, row_batches(), progress=False) < 1e-6


def without_labels(batch):
    return {name: array for name, array in batch.items() if name != "labels"}


def test_a_sigmoid_that_is_declared_gives_way_where_outputs_are_fitted_to_labels():
    """Else what is predicted is the sigmoid of the label."""
    value, told = tiny.model(tiny.CLASSIFIER, num_labels=1), "config_sentence_transformers.json"
    declared = {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}, OLDER_ACTIVATION: "torch.nn.Sigmoid"}
    files = value.files | {told: b'{"activation_fn": "torch.nn.Sigmoid", "prompts": {}}'}
    model = value._replace(config=value.config | declared, files=files)
    batches = [{**batch, "labels": batch["labels"].astype(np.float32)} for batch in row_batches()]
    with pytest.warns(UserWarning, match="Sigmoid gives way to Identity"):
        tuned, _ = train(model, batches, epochs=1)
    assert not activations(tuned.config, tuned.files)
    assert b"prompts" in tuned.files[told]
    follower, _ = train(model, batches, epochs=1, teacher=model, distil=1.0)
    assert activations(follower.config, follower.files) == activations(model.config, model.files)


def test_a_model_without_a_head_has_no_loss_of_its_own():
    with pytest.raises(ValueError, match=r"loss: got none for an encoder without a head, .* wanted with_head"):
        train(embedder(), row_batches())


def test_a_teacher_that_knows_fewer_types_is_refused():
    batches = [{**batch, "token_type_ids": np.ones_like(batch["token_type_ids"])} for batch in row_batches()]
    other = with_head(tiny.model(type_vocab_size=1), 2)
    with pytest.raises(ValueError, match="token_type_ids: got 1"):
        train(headed(), batches, teacher=other)
    with pytest.raises(ValueError, match="token_type_ids: got 1"):
        loss_increase(headed(), other, batches, progress=False)


def test_weights_count_between_batches_too():
    light = [row_batches()[0], {**row_batches()[1], "weights": np.full(8, 1e-4)}]
    found = [train(still(), batches, epochs=1)[0].params for batches in (row_batches()[:2], light, light[:1])]
    moved = [by_path(params)[f"{KEY}/kernel"] - by_path(still().params)[f"{KEY}/kernel"] for params in found]
    assert np.abs(moved[1] - moved[0]).max() > 0.1 * np.abs(moved[0]).max()


@pytest.mark.parametrize("size", [1e38, 1e39, 1e-40, 1e-46])
def test_weights_may_be_of_any_size(size):
    batches = [{**batch, "weights": np.full(8, size)} for batch in row_batches()[:2]]
    same = unit_weights([{**batch, "weights": np.ones(8)} for batch in row_batches()[:2]])
    for found, wanted in zip(unit_weights(batches), same, strict=True):
        np.testing.assert_allclose(found["weights"], wanted["weights"], rtol=1e-6)


def test_parameters_that_the_last_step_spoils_are_refused(tmp_path):
    def loss(output, batch):  # whose value is finite, and gradient none
        return jnp.sqrt(jnp.sum((output - jax.lax.stop_gradient(output)) ** 2, axis=1)) + jnp.sum(output, axis=1)

    with pytest.raises(FloatingPointError, match="is not finite after step 1: try a lower"):
        train(still(), row_batches()[:1], epochs=1, loss=loss, file=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"small: got outputs of shape \(8, 2\) .* wanted \(8, 16\) and gaussian"):
        loss_increase(embedder(), headed(), row_batches()[:1], progress=False)


def test_similarities_that_are_all_the_same_correlate_with_none():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    assert compare(rows, np.ones((4, 3))).spearman == 0
    with pytest.raises(ValueError, match="got embeddings of 2 texts, wanted 3 or more"):
        compare(rows[:2], rows[:2])
