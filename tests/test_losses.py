"""What a head's output stands for decides its losses, its Fisher information, its scores and its training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import CLASSIFIER, rows

from bert_adapter.compressing import compress
from bert_adapter.distributions import DISTRIBUTIONS
from bert_adapter.distributions.bernoulli import bernoulli
from bert_adapter.distributions.draw import Draw
from bert_adapter.evaluate import embed, loss_increase, score
from bert_adapter.families import label_count, predictive
from bert_adapter.heads import with_head
from bert_adapter.importance import gradients
from bert_adapter.layers.running import apply
from bert_adapter.losses import distillation, task_loss
from bert_adapter.text import LabelledTexts, labelled_batches, text_batches
from bert_adapter.training import finetune

RNG = np.random.default_rng(0)
OUTPUT, OTHER = RNG.normal(0, 2, (2, 5, 3)).astype(np.float32)
SETS, CLASSES, VALUES = "multi_label_classification", "single_label_classification", "regression"
EPS = float(np.finfo(np.float32).eps)


def module(num_labels, problem_type=None):
    return tiny.module(CLASSIFIER, num_labels=num_labels, problem_type=problem_type)


@functools.cache
def several():
    """A model with a head for two labels at once, by chance correlated."""
    model = with_head(tiny.model(size=0.2), 2, problem_type=SETS)
    rng = np.random.default_rng(1)
    kernel = 4 * rng.normal(size=(16, 1)) + 2 * rng.normal(size=(16, 2))
    head = {"kernel": kernel.astype(np.float32), "bias": np.array([-1, 1], np.float32)}
    return model._replace(params=model.params | {"classifier": head})


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def likelihoods(logits):
    """By the labels that there can be, how likely the sigmoids hold each, in float64."""
    p = sigmoid(logits)
    return {
        labels: np.prod(np.where(labels, p, 1 - p), axis=1) for labels in itertools.product((0, 1), repeat=p.shape[1])
    }


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "kind"),
    [
        (1, None, "gaussian"),
        (3, None, "categorical"),
        (1, SETS, "bernoulli"),
        (3, SETS, "bernoulli"),
        (1, VALUES, "gaussian"),
        (3, VALUES, "gaussian"),
        (3, CLASSES, "categorical"),
    ],
)
def test_the_problem_type_says_what_the_output_stands_for(num_labels, problem_type, kind):
    assert predictive(module(num_labels, problem_type)) == kind


def test_a_softmax_of_one_class_is_refused():
    for use in (predictive, task_loss, lambda module: distillation(module, 1.0)):
        with pytest.raises(ValueError, match="with one label, whose softmax is always 1; wanted two or more"):
            use(module(1, CLASSES))


@pytest.mark.parametrize("problem_type", [None, CLASSES])
def test_loss_of_classes_is_the_softmax_of_the_label(problem_type):
    labels = np.array([0, 2, 1, 1, 0], np.int32)
    p = np.exp(OUTPUT.astype(np.float64))
    wanted = -np.log(p[np.arange(5), labels] / p.sum(axis=1))
    got = task_loss(module(3, problem_type))(jnp.asarray(OUTPUT), {"labels": labels})
    np.testing.assert_allclose(got, wanted, rtol=20 * EPS)


def test_loss_of_labels_at_once_is_the_likelihood_of_all():
    labels = RNG.integers(0, 2, (5, 3))
    wanted = [-np.log(likelihoods(OUTPUT)[tuple(row)][i]) for i, row in enumerate(labels.tolist())]
    got = task_loss(module(3, SETS))(jnp.asarray(OUTPUT), {"labels": labels.astype(np.float32)})
    np.testing.assert_allclose(got, wanted, rtol=20 * EPS)


def test_labels_at_once_may_be_integers_where_that_is_declared():
    labels, loss = RNG.integers(0, 2, (5, 3)).astype(np.int32), task_loss(module(3, SETS))
    got, wanted = (loss(jnp.asarray(OUTPUT), {"labels": labels.astype(dtype)}) for dtype in (np.int32, np.float32))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("problem_type", [None, VALUES, SETS])
def test_one_label_may_have_an_axis_of_its_own(problem_type):
    labels, loss = np.array([0, 1, 1, 0, 1], np.float32), task_loss(module(1, problem_type))
    got, wanted = (loss(jnp.asarray(OUTPUT[:, :1]), {"labels": given}) for given in (labels, labels[:, None]))
    np.testing.assert_array_equal(got, wanted)


def test_loss_of_values_is_half_the_squared_error():
    got = task_loss(module(3, VALUES))(jnp.asarray(OUTPUT), {"labels": OTHER})
    np.testing.assert_allclose(got, 0.5 * np.sum((np.float64(OUTPUT) - OTHER) ** 2, axis=1), rtol=20 * EPS)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "batch", "message"),
    [
        (3, None, {"labels": np.zeros(5, np.float32)}, r"got float32 of shape \(5,\), wanted integers of shape \(5,\)"),
        (3, CLASSES, {"labels": np.zeros((5, 3), np.float32)}, r"got float32 of shape \(5, 3\), wanted integers"),
        (3, None, {"labels": np.zeros((5, 3), np.float32)}, '"multi_label_classification" in config.json declares'),
        (3, SETS, {"labels": np.zeros(5, np.int32)}, r"got shape \(5,\), wanted that of the output, \(5, 3\)"),
        (3, VALUES, {"labels": np.zeros((5, 2), np.float32)}, r"got shape \(5, 2\), wanted that of the output"),
        (3, None, {"input_ids": 1}, r"got \['input_ids'\], wanted 'labels' too"),
    ],
)
def test_labels_that_the_head_cannot_have_are_refused(num_labels, problem_type, batch, message):
    with pytest.raises(ValueError, match=message):
        task_loss(module(num_labels, problem_type))(jnp.asarray(OUTPUT), batch)


def test_divergence_of_labels_at_once_is_the_loss_of_labels_drawn():
    wanted = 0.0
    for labels, share in likelihoods(OTHER).items():
        both = (-np.log(likelihoods(output)[labels]) for output in (OUTPUT, OTHER))
        wanted = wanted + share * (next(both) - next(both))
    got = distillation(module(3, SETS), 1.0)(jnp.asarray(OUTPUT), jnp.asarray(OTHER))
    np.testing.assert_allclose(got, wanted, rtol=100 * EPS)  # differences of logarithms


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "bernoulli"])
def test_gradients_are_those_of_the_divergences_curvature(kind):
    """Summed over the stack, g g' is its Hessian where there is none: what a plan predicts is what is measured."""
    output = jnp.asarray(OUTPUT[:, :1] if kind == "gaussian" else OUTPUT)  # a random direction of one is exact
    stacked = np.asarray(gradients.output_gradients(kind, output, {}, Draw(jax.random.key(0), 0)), np.float64)
    direction = RNG.normal(size=output.shape).astype(np.float32)
    both = [DISTRIBUTIONS[kind].apart(output + sign * np.float32(0.1) * direction, output, {}) for sign in (1, -1)]
    wanted = np.einsum("pbi,bi->pb", stacked, direction) ** 2
    # To fourth order, of steps of about 0.1.
    np.testing.assert_allclose(np.float64(both[0] + both[1]) / 0.1**2, wanted.sum(axis=0), rtol=0.05)


def test_gradients_of_sure_sigmoids_are_tiny_and_not_lost():
    got = bernoulli(jnp.asarray([[-60.0, 60.0]]))
    np.testing.assert_allclose(np.diagonal(got[:, 0]), np.exp(-30), rtol=100 * EPS)


@pytest.mark.slow
def test_a_head_for_labels_at_once_is_compressed_by_what_its_sigmoids_feel():
    model, texts = several(), rows().texts
    batches = text_batches(model, texts, batch_size=8)
    small, report = compress(model, batches, budget=0.6, include="classifier", shrink=0.0, progress=False)
    p, q = (sigmoid(embed(each, texts)) for each in (model, small))
    wanted = np.mean(np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), axis=1))
    increase = loss_increase(model, small, batches)
    assert increase == pytest.approx(wanted, rel=1e-3, abs=EPS)  # logarithms of about 1 in float32
    assert report.predicted is not None
    assert wanted / 2 < report.predicted < 2 * wanted  # to second order


def test_scores_count_each_label_and_each_value():
    texts = rows().texts[:8]
    outputs = embed(several(), texts, batch_size=8)
    labels = (outputs > 0).astype(np.int32)
    assert score(several(), LabelledTexts(texts, labels), batch_size=8)["accuracy"] == 1
    labels[0, 0] = 1 - labels[0, 0]
    assert score(several(), LabelledTexts(texts, labels), batch_size=8)["accuracy"] == 1 - 1 / 16
    values = with_head(tiny.model(size=0.2), 2, problem_type=VALUES)
    outputs = embed(values, texts, batch_size=8)
    got = score(values, LabelledTexts(texts, outputs * np.array([1, -2], np.float32)), batch_size=8)
    assert got == pytest.approx({"pearson": 0, "spearman": 0}, abs=1e-5)  # the means of 1 and -1


def test_a_new_head_is_of_the_problem_that_is_named():
    assert several().config["problem_type"] == SETS
    encoder = tiny.model(size=0.2)._replace(config=several().config | {"architectures": ["BertModel"]})
    assert "problem_type" not in with_head(encoder, 3).config  # what the config said of another head
    assert label_count(several().module) == 2


@pytest.mark.slow
def test_labels_at_once_are_learnt_and_a_teacher_of_another_kind_refused():
    texts = rows().texts
    labels = np.array([["red" in text, "dog" in text] for text in texts], np.float32)
    model = with_head(tiny.model(size=0.2), 2, problem_type=SETS)
    data = LabelledTexts(texts, labels)
    batches = labelled_batches(model, data, batch_size=8)
    trained, losses = finetune(model, batches, epochs=20, learning_rate=2e-2, progress=False)
    assert losses[-1] < 0.8 < losses[0]
    assert score(trained, data)["accuracy"] > 0.7  # half of them are there
    with pytest.raises(ValueError, match="teacher: got outputs that are categorical, wanted bernoulli"):
        finetune(model, batches, teacher=with_head(tiny.model(size=0.2), 2), progress=False)
    assert apply(trained.module, trained.params, **{"input_ids": batches[0]["input_ids"]}).shape == (8, 2)


def test_classes_that_cannot_be_are_not_apart():
    logits = jnp.array([[0.0, 1.0, -np.inf]])
    np.testing.assert_allclose(DISTRIBUTIONS["categorical"].apart(logits, logits, {}), 0, atol=1e-6)
