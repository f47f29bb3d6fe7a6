"""Paths of ranks and penalties reach what single solves reach; hidden entries choose the planted rank."""

import functools
import warnings

import jax
import numpy as np
import pytest
import reference

import wlra
import wlra.plot
from wlra import checks

M, N, K = 24, 18, 2
RNG = np.random.default_rng(0)
PLANTED = RNG.normal(size=(M, K)) @ RNG.normal(size=(K, N))
W = (PLANTED + 0.1 * RNG.normal(size=(M, N))).astype(np.float32)
WEIGHTS = (np.exp(RNG.normal(size=(M, N))) * (RNG.uniform(size=(M, N)) < 0.9)).astype(np.float32)
RANKS = [1, 3, 2]
SHARES = [0.05, 0.5, 1.0]
CANDIDATES = [1, K]  # of a selection


@functools.cache
def of_ranks():
    return jax.tree.map(np.asarray, wlra.solve_path(W, WEIGHTS, RANKS, tol=1e-4))


@functools.cache
def of_penalties():
    return jax.tree.map(np.asarray, wlra.solve_path(W, WEIGHTS, rank=5, ridge=SHARES, method="lbfgs", tol=1e-4))


@functools.cache
def selection(seed):
    return wlra.select_rank(W, WEIGHTS, CANDIDATES, key=jax.random.key(seed), folds=3)


def test_a_path_of_ranks_ends_where_single_solves_end():
    # At the end of exact least squares in float64. Above the planted rank, where noise is fitted for longer than
    # max_iters, it is lower than below.
    losses = dict(zip(RANKS, of_ranks().loss, strict=True))
    assert losses[3] < losses[K]
    for rank in (1, K):
        left, right = RNG.normal(size=(M, rank)), RNG.normal(size=(rank, N))
        for _ in range(500):
            left, right = reference.als(W, WEIGHTS, left, right)
        # tol**2 over the curvature
        np.testing.assert_allclose(losses[rank], reference.loss(W, WEIGHTS, left @ right), rtol=1e-4)


def test_factors_of_a_path_are_padded_with_zeros_to_the_largest_rank():
    result = of_ranks()
    assert result.left.shape == (3, M, 3)
    assert result.right.shape == (3, 3, N)
    for place, rank in enumerate(RANKS):
        assert not result.left[place, :, rank:].any()
        assert not result.right[place, rank:].any()


def test_the_loss_of_each_entry_of_a_path_is_that_of_its_factors():
    for loss, left, right in zip(*of_ranks()[2:3], *of_ranks()[:2], strict=True):
        np.testing.assert_allclose(loss, reference.loss(W, WEIGHTS, left @ right), rtol=1e-4)  # float32 sums


@pytest.mark.slow
def test_a_path_of_penalties_is_certified_and_ends_at_zero():
    result = of_penalties()
    assert (result.gap <= 5e-3).all()  # tol = 1e-4 of the gradient, over the smallest penalty's share
    assert (np.diff(result.loss) > 0).all()
    np.testing.assert_allclose(result.loss[-1], 1, rtol=1e-4)
    assert np.abs(result.left[-1] @ result.right[-1]).max() <= 1e-2 * np.abs(W).max()  # zero is reached in the limit


def test_the_planted_rank_is_selected():
    assert selection(0).rank == K
    assert list(selection(0).ranks) == CANDIDATES
    assert selection(0).error.shape == (2, 3)


def test_a_closed_form_that_looks_at_what_weighs_nothing_is_not_shown_it():
    found = [wlra.select_rank(W, None, [1, K, 6], key=jax.random.key(0), method=name) for name in ("svd", "separable")]
    assert [each.rank for each in found] == [K, K]
    np.testing.assert_allclose(found[0].error, found[1].error, rtol=1e-4)  # of equal weights, both see zeros there


def test_a_path_of_numbers_whose_squares_overflow_is_that_of_small_ones():
    larger = np.float32(2.0**63 / np.abs(W).max())
    large = wlra.solve_path(larger * W, WEIGHTS, RANKS, tol=1e-4)
    np.testing.assert_allclose(large.loss, of_ranks().loss, rtol=5e-3)  # other roundings, other last iterates


def test_the_error_of_a_selection_is_that_of_entries_not_seen():
    worst = selection(0).error.mean(axis=1)
    # Noise of 0.1 on a target of variance 2: hidden entries cannot be predicted better than that, nor much worse.
    assert 0.1**2 / K / 3 <= worst[K - 1] <= 10 * 0.1**2 / K


@pytest.mark.slow
def test_the_same_key_deals_the_same_folds():
    again = wlra.select_rank(W, WEIGHTS, CANDIDATES, key=jax.random.key(0), folds=3)
    np.testing.assert_array_equal(again.error, selection(0).error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of ranks, nuclear and ridge; got none of them"),
        ({"ranks": [1], "nuclear": [1.0]}, "got ranks and nuclear"),
        ({"ranks": []}, "ranks is empty"),
        ({"ranks": [1], "rank": 2}, "no rank next to ranks; got rank=2"),
        ({"nuclear": [1.0]}, "bound of the rank, next to nuclear; got rank=None"),
        ({"ranks": [99]}, r"rank must be in \[1, 18\]"),
        ({"ranks": [1], "start": "svd"}, "start cannot be given"),
        ({"rank": 2, "nuclear": [np.nan]}, "nuclear must be a finite number >= 0; got nan"),
        ({"ranks": [1], "speed": 2}, r"options must be of .*; got \['speed'\]"),
    ],
)
def test_a_path_that_cannot_be_followed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        wlra.solve_path(W, WEIGHTS, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"folds": 1}, "folds must be at least 2; got 1"), ({"folds": 10**6}, "need as many entries of positive weight")],
)
def test_folds_that_cannot_be_dealt_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wlra.select_rank(W, WEIGHTS, RANKS, key=jax.random.key(0), **options)


def test_a_fold_whose_hidden_entries_are_zero_has_a_finite_error():
    counts = np.zeros_like(W)
    counts[2, 3], counts[4, 5] = 5, 7  # of three folds, one at least hides neither
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ranks tie
        result = wlra.select_rank(counts, np.ones_like(W), CANDIDATES, key=jax.random.key(0), folds=3)
    assert np.isfinite(result.error).all()
    assert result.rank in CANDIDATES


def test_of_ranks_that_tie_the_smallest_is_selected_and_a_warning_says_so():
    spike = np.zeros_like(W)
    spike[2, 3] = 5  # hidden, it cannot be predicted; seen, one component fits it
    with pytest.warns(UserWarning, match="all ranks predict the hidden entries equally well; the smallest, 1, is"):
        result = wlra.select_rank(spike, np.ones_like(W), CANDIDATES, key=jax.random.key(0), folds=3)
    assert result.rank == 1
    assert list(result.tied) == CANDIDATES


def test_ranks_tie_where_only_rounding_tells_them_apart():
    table = np.array([[3.0, 3.0], [1.0, 2.0], [1.0 - 1e-7, 2.0], [2.0, 2.0]])
    assert list(wlra.Selection(2, np.arange(1, 5), table).tied) == [2, 3]
    assert list(wlra.Selection(1, np.arange(1, 5), table * [[1], [0], [1e-14], [1e-20]]).tied) == [2, 3, 4]


@pytest.mark.parametrize(
    ("W", "weights", "options", "message"),
    [
        (0 * W, None, {}, "W is 0 wherever the weight is positive: there is nothing to predict"),
        (W, None, {"start": "svd"}, "start cannot be given"),
        (W, wlra.Kronecker(np.eye(M), np.eye(N)), {"method": "kronecker"}, "Kronecker weights hide no entry"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(W, weights, options, message):
    with pytest.raises(ValueError, match=message):
        wlra.select_rank(W, weights, **{"ranks": RANKS, "key": jax.random.key(0)} | options)


@pytest.mark.parametrize("values", [5, "12", None])
def test_what_is_no_list_of_ranks_is_refused(values):
    with pytest.raises(ValueError, match=f"ranks must be a list; got {values!r}"):
        checks.check_list("ranks", values)


def test_a_path_of_a_closed_form_takes_kronecker_weights():
    weights = wlra.Kronecker(np.eye(M, dtype=np.float32), np.eye(N, dtype=np.float32))
    assert (np.diff(wlra.solve_path(W, weights, [1, 2], method="kronecker").loss) < 0).all()


def test_a_path_is_drawn_in_the_order_of_its_values():
    pytest.importorskip("matplotlib").use("Agg")
    axes = wlra.plot.path(RANKS, of_ranks().loss)
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), sorted(RANKS))
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), of_ranks().loss[np.argsort(RANKS)])


def test_a_selection_is_drawn_as_means_over_folds():
    pytest.importorskip("matplotlib").use("Agg")
    axes = wlra.plot.path(selection(0).ranks, {"hidden": selection(0).error}, ylabel="error")
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), selection(0).error.mean(axis=1))
    assert axes.get_ylabel() == "error"


def test_a_path_of_penalties_starts_from_the_one_before():
    target = np.random.default_rng(0).normal(size=(20, 15))
    largest = np.linalg.norm(target, 2)
    found = wlra.solve_path(target, None, rank=15, nuclear=[0.99 * largest, 0.95 * largest])
    assert found.history.loss[1, 0] <= 1.001  # as zero is, near which the one before ends


def test_courses_that_reach_zero_are_drawn_as_they_are():
    pytest.importorskip("matplotlib").use("Agg")
    axes = wlra.plot.convergence({"a": [0.3, 0.1, 0.0]})
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), [0.3, 0.1, 1e-7])
    assert axes.get_ylabel() == "loss"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "losses: got dict, wanted courses by name"),
        ({"batch": np.ones((2, 3))}, r"losses\['batch'\]: got shape \(2, 3\), wanted one problem's"),
        ({"a": [np.inf]}, r"losses\['a'\]: got no loss that is finite"),
    ],
)
def test_what_is_no_course_is_refused(losses, message):
    pytest.importorskip("matplotlib").use("Agg")
    with pytest.raises(ValueError, match=message):
        wlra.plot.convergence(losses)


def test_a_course_ends_where_it_is_not_finite():
    pytest.importorskip("matplotlib").use("Agg")
    axes = wlra.plot.convergence({"a": [0.3, 0.1, np.nan, 0.2]})
    assert np.asarray(axes.lines[0].get_ydata()).shape == (2,)


def test_losses_along_a_path_are_one_for_each_value():
    pytest.importorskip("matplotlib").use("Agg")
    with pytest.raises(ValueError, match=r"losses: got shape \(2,\) for values of shape \(3,\)"):
        wlra.plot.path([1, 2, 3], [0.1, 0.2])
    assert wlra.plot.path([1, 2], np.ones((2, 1))).get_ylabel() == "loss"  # of one fold there is no error


def test_penalties_may_be_unsigned():
    found = wlra.solve_path(W, WEIGHTS, rank=5, ridge=list(np.array([0, 1], np.uint8)), method="lbfgs", tol=1e-4)
    assert found.loss[0] < found.loss[1]  # minus one of them is 255, and NumPy warns of it


def test_errors_that_are_no_number_count_as_infinite():
    target, weights = W.astype(np.float64), np.ones((M, N))
    given = wlra.door.check_problem(target, weights)
    hidden = np.zeros((1, M, N), bool)
    hidden[0, 0, 0] = True
    left = np.full((1, M, K), np.nan)
    result = wlra.solve(target, weights, K, max_iters=1)._replace(left=left, right=np.zeros((1, K, N)))
    assert wlra.selection.hidden_error(given, hidden, result).tolist() == [np.inf]
