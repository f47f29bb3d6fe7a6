"""Predicted losses that are corrected by what cutting the kernels of a kind is measured to lose."""

import functools
import re
from typing import Any

import numpy as np
import pytest
import tiny

import bert_adapter
from bert_adapter.checkpoint.names import by_path
from bert_adapter.cli import main
from bert_adapter.correcting import cuts, mean_of
from bert_adapter.decompositions import predicted_losses
from bert_adapter.head_sizes import identities_in, selected_pairs
from bert_adapter.kernels import break_even

TEXTS = ["a red fox runs", "a dog runs far from it .", "red dogs", "it runs from a fox"] * 4
OTHERS = tiny.rows().texts


@functools.cache
def model() -> bert_adapter.Model:
    return tiny.model(num_hidden_layers=2)


@functools.cache
def known(signal: str = "combined") -> bert_adapter.Decompositions:
    """What a signal says of the model's kernels."""
    batches, kernels = bert_adapter.text_batches(model(), TEXTS), bert_adapter.select_kernels(model())
    how: dict[str, Any] = {"signal": signal, "progress": False}
    importance = bert_adapter.measure_signal(bert_adapter.forward(model()), model().params, batches, kernels, **how)
    return bert_adapter.decompose(model().params, importance, **how)


def others() -> Any:
    return bert_adapter.text_batches(model(), OTHERS)


def share_of(path: str, planned: bert_adapter.Plan) -> float:
    """To what share of its numbers a plan cuts a kernel, or three quarters if it leaves it whole."""
    return min(0.75, planned.ranks[path] / break_even(known().shapes[path]))


def test_each_kind_is_corrected_by_what_the_cuts_of_the_plan_lose():
    kinds: dict[str, list[str]] = {}
    for path in known().kernels:
        kinds.setdefault(re.sub(r"\d", "#", path), []).append(path)
    assert {len(paths) for paths in kinds.values()} == {2}
    expected = known()
    for _ in range(2):
        planned, ratios = bert_adapter.plan(model().params, expected, 0.4), {}
        for paths in kinds.values():
            ranks = {path: max(1, round(share_of(path, planned) * break_even(known().shapes[path]))) for path in paths}
            losses = {path: predicted_losses(known().squares[path]) / known().examples[path] for path in paths}
            predicted = sum(losses[path][rank] for path, rank in ranks.items())
            params, _ = bert_adapter.factorise(
                model().params, known().kernels, ranks, method="kronecker", progress=False
            )
            small = model()._replace(params=bert_adapter.merge(params))
            measured = bert_adapter.loss_increase(model(), small, others(), progress=False)
            ratios |= dict.fromkeys(paths, measured / predicted)
        counts = {path: known().examples[path] / ratio for path, ratio in ratios.items()}
        expected = known()._replace(examples=counts)
    found = bert_adapter.corrected(model(), known(), others(), 0.4, progress=False)
    assert found.examples == pytest.approx(expected.examples, rel=1e-3)


def test_kernels_and_identities_of_a_pair_are_cut_to_one_share():
    shapes = bert_adapter.select_kernels(model())
    pairs = selected_pairs(model(), shapes)
    every = shapes | identities_in(pairs)
    first, second = pairs[0], pairs[1]
    ranks = {path: round(break_even(shape)) for path, shape in shapes.items()}
    ranks |= dict.fromkeys(second.kernels, 2)
    planned = bert_adapter.Plan(ranks, 0.5, 0.0, curve=None, heads={first.kernels[0]: first.size // 2})  # pyright: ignore[reportArgumentType]
    found = cuts(planned, every, pairs)
    assert {found[path] for path in first.identities} == {first.size // 2}
    assert {found[path] for path in first.kernels} == {round(break_even(shapes[first.kernels[0]]) / 2)}
    share = float(np.mean([2 / break_even(shapes[path]) for path in second.kernels]))
    assert {found[path] for path in second.identities} == {max(1, round(min(0.75, share) * second.size))}


def test_a_plan_goes_by_corrected_losses():
    batches = bert_adapter.text_batches(model(), TEXTS)
    how: dict[str, Any] = {"budget": 0.5, "progress": False}
    small, report = bert_adapter.compress(model(), batches, correct=others(), **how)
    found = bert_adapter.corrected(model(), known(), others(), 0.5, progress=False)
    again, same = bert_adapter.compress(model(), (), importance=found, **how)
    assert [kernel.rank for kernel in report.kernels] == [kernel.rank for kernel in same.kernels]
    assert report.predicted == pytest.approx(same.predicted, rel=1e-3)  # the order of sums
    for path, leaf in by_path(small.params).items():
        np.testing.assert_allclose(leaf, by_path(again.params)[path], atol=1e-3)
    rising = bert_adapter.plan(model().params, known(), 0.5).predicted
    assert report.predicted != pytest.approx(rising, rel=0.1)


def test_what_few_texts_tell_corrects_nothing():
    """One of them may lose nine tenths of all: a plan that went by it lost .08 of a classifier's accuracy."""
    few = bert_adapter.text_batches(model(), OTHERS[:1])
    with pytest.warns(
        UserWarning, match="correct: got too few texts: what cuts of .* standard error of inf, wanted 0.5"
    ):
        found = bert_adapter.corrected(model(), known(), few, 0.5, progress=False)
    assert found.examples == known().examples


def test_the_error_of_a_mean_is_that_of_its_rows():
    each = np.random.default_rng(0).exponential(size=400)
    mean, error = mean_of(np.full(400, 1 / 400), each)
    assert mean == pytest.approx(each.mean())
    assert error == pytest.approx(each.std(ddof=1) / 20)
    shares = np.where(np.arange(400) < 100, 0.01, 0.0)
    assert mean_of(shares, each) == pytest.approx((each[:100].mean(), each[:100].std(ddof=1) / 10))


def test_heads_are_corrected_beside_factors():
    batches = bert_adapter.text_batches(model(), TEXTS)
    small, report = bert_adapter.compress(model(), batches, correct=others(), pairs=True, budget=0.5, progress=False)
    assert report.parameters_after <= 0.5 * report.parameters_before
    assert np.isfinite(np.asarray(bert_adapter.forward(small)(small.params, next(iter(others()))))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bert_adapter.corrected(model(), known(), [], 0.5), "batches: got none, wanted texts on which losses"),
        (
            lambda: bert_adapter.corrected(model(), known(), bert_adapter.text_batches(model(), TEXTS), 0.5),
            "batches: got some that importance was measured on, wanted other texts",
        ),
        (
            lambda: bert_adapter.corrected(model(), known("activation"), others(), 0.5),
            "known: got signal 'activation', in units of its own, wanted one of the loss",
        ),
        (
            lambda: bert_adapter.corrected(tiny.model(num_hidden_layers=1), known(), others(), 0.5),
            "importance: decomposed for another model",
        ),
        (
            lambda: bert_adapter.compress(model(), [], rank=2, correct=others()),
            "correct: got a rank, wanted a budget",
        ),
        (
            lambda: bert_adapter.compress(model(), [], budget=0.5, signal="svd", correct=others()),
            "correct: got signal 'svd' and method 'svd', wanted a signal in units of the loss",
        ),
    ],
)
def test_what_cannot_be_corrected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_line_corrects(tmp_path, capsys):
    bert_adapter.save(model(), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "others.txt").write_text("\n".join(OTHERS))
    dense, texts, other, out = (str(tmp_path / name) for name in ("dense", "texts.txt", "others.txt", "small"))
    command = ["compress", dense, "--text", texts, "--correct", other, "-o", out]
    assert main([*command, "--budget", "0.5"]) == 0
    assert "predicted to rise by" in capsys.readouterr().out
    assert main([*command, "--rank", "2"]) == 2
    assert "correct: got a rank, wanted a budget" in capsys.readouterr().err
