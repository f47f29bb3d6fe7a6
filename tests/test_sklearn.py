"""The estimator is one that scikit-learn accepts, and its coefficients are weighted least squares."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from jax.experimental.sparse import BCOO
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from wlra import Status, solve
from wlra.leastsquares import coefficients
from wlra.sklearn import WLRA

M, N, K = 20, 5, 2
EPS = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
PLANTED = (RNG.normal(size=(M, K)) * [3, 1]) @ RNG.normal(size=(K, N))
X = PLANTED + 0.3 * RNG.normal(size=(M, N))
WEIGHTS = RNG.exponential(size=(M, N))
SEEN = RNG.random((M, N)) < 0.9
SEEN[0], SEEN[1] = [True, False, False, False, False], False  # one entry for two unknowns; no entry at all
HOLES = np.where(SEEN, PLANTED, np.nan)


def least_squares(X, weights, components):
    """The shortest weighted least-squares coefficients of every row, by LAPACK in float64."""
    roots = np.sqrt(np.asarray(weights, np.float64))
    rows = [np.linalg.lstsq((components * root).T, root * x, rcond=1e-6)[0] for root, x in zip(roots, X, strict=True)]
    return np.stack(rows)


@pytest.mark.slow
@parametrize_with_checks([WLRA(method="svd")])
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)  # whose data have a dozen shapes: a closed form compiles fastest


@pytest.mark.slow
@parametrize_with_checks([WLRA()])
def test_scikit_learn_accepts_it_with_its_defaults(estimator, check):
    check(estimator)


@pytest.mark.parametrize("weights", [None, 3.0, np.full((M, N), 0.1)], ids=["none", "scalar", "full"])
def test_equal_weights_give_the_truncated_svd(weights):
    ours, theirs = WLRA(K), TruncatedSVD(K, algorithm="arpack", random_state=0)
    Z = ours.fit_transform(X, weights=weights)
    wanted = theirs.fit_transform(X)
    rounding = 100 * EPS * theirs.singular_values_.max() / theirs.singular_values_.min()  # of singular vectors
    np.testing.assert_allclose(ours.components_, np.asarray(theirs.components_), atol=rounding)
    np.testing.assert_allclose(Z, wanted, atol=rounding * np.abs(wanted).max())


def test_components_are_orthonormal_and_scores_orthogonal_in_order_and_of_one_sign():
    model = WLRA(K)
    Z = model.fit_transform(X, weights=WEIGHTS)
    gram = Z.T @ Z
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(K), atol=16 * EPS)  # rounding
    assert gram[0, 0] > gram[1, 1]
    assert abs(gram[0, 1]) < 64 * EPS * gram[0, 0]  # rounding
    peaks = np.abs(model.components_).argmax(axis=1)
    assert (model.components_[np.arange(K), peaks] > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weights", [None, WEIGHTS, WEIGHTS[:, :1]], ids=["none", "full", "rows"])
def test_fit_transform_is_fit_then_transform(weights, dtype):
    data = X.astype(dtype)
    together = WLRA(K).fit_transform(data, weights=weights)
    apart = WLRA(K).fit(data, weights=weights).transform(data, weights=weights)
    assert together.dtype == apart.dtype == dtype
    np.testing.assert_array_equal(together, apart)


def test_fit_transform_is_fit_then_transform_with_holes():
    together = WLRA(K).fit_transform(HOLES, weights=SEEN)
    apart = WLRA(K).fit(HOLES, weights=SEEN).transform(HOLES, weights=SEEN)
    np.testing.assert_array_equal(together, apart)


def test_no_weights_are_weights_of_one():
    model = WLRA(K).fit(X)
    ones = model.transform(X, weights=np.ones_like(X))
    np.testing.assert_allclose(model.transform(X), ones, atol=32 * EPS * np.abs(ones).max())  # rounding


@pytest.mark.parametrize("masked", ["X", "weights", "list"])
def test_masked_entries_have_weight_zero(masked):
    mask, bad = ~SEEN, np.where(SEEN, PLANTED, 1e6)
    given = {
        "X": (np.ma.masked_array(bad, mask), None),
        "weights": (bad, np.ma.masked_array(np.ones((M, N)), mask)),
        "list": (list(np.ma.masked_array(bad, mask)), None),
    }
    models = [WLRA(K).fit(data, weights=weights) for data, weights in (given[masked], (HOLES, SEEN))]
    np.testing.assert_allclose(models[0].components_, models[1].components_, atol=1e-6)  # of one problem
    scores = [model.transform(*pair) for model, pair in zip(models, (given[masked], (HOLES, SEEN)), strict=True)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_integers_beyond_32_bits_and_units_beyond_float32_change_nothing():
    weights = np.ones((M, N))
    weights[0] = 2.0**32
    plain = WLRA(K).fit_transform(X, weights=weights)
    np.testing.assert_array_equal(WLRA(K).fit_transform(X, weights=weights.astype(np.int64)), plain)
    small = WLRA(K).fit_transform(2.0**-140 * X, weights=2.0**-140 * weights)
    np.testing.assert_allclose(small, 2.0**-140 * plain, rtol=1e-12)


def test_coefficients_are_exact_for_weights_of_many_decades():
    weights = 10.0 ** RNG.uniform(-20, 20, size=(M, N))
    model = WLRA(K).fit(X)
    np.testing.assert_array_equal(
        model.transform(X, weights=weights), coefficients(X, weights, model.components_.astype(np.float64))
    )  # which tests/test_leastsquares.py compares with exact arithmetic


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.astype(str), "X must hold numbers"),
        (X.astype(str).astype(object), "X must hold numbers; got '"),
        (X.astype("datetime64[s]"), "X must hold numbers"),
        (X.astype("timedelta64[s]"), "X must hold numbers"),
        (BCOO.fromdense(jnp.ones((M, N))), "X must be dense; got a BCOO"),
        (X * 1e-200, "too small for factors in float32"),
        (X.astype(np.longdouble) * np.longdouble("1e-400"), "X has 100 tiny or huge entries|too small"),
        (np.array([[np.timedelta64(5, "s"), 2.0]], object), "X must hold numbers; got np.timedelta64"),
        (np.array([[np.datetime64("2020-01-01"), 2.0]], object), "X must hold numbers; got np.datetime64"),
        (np.array([[1j, 2.0]], object), "X must hold numbers; got 1j"),
    ],
)
def test_what_holds_no_numbers_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        WLRA(K).fit(value)


def test_data_frames_of_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(X)
    with pytest.raises(ValueError, match="weights must have the index of W"):
        WLRA(K).fit(table, weights=table[::-1])


@pytest.mark.parametrize("weights", [WEIGHTS, SEEN, WEIGHTS * 10.0 ** -np.arange(M)[:, None]], ids=str)
def test_coefficients_are_the_shortest_weighted_least_squares(weights):
    model = WLRA(K).fit(X)
    wanted = least_squares(X, weights, model.components_.astype(np.float64))
    np.testing.assert_allclose(model.transform(X, weights=weights), wanted, atol=32 * EPS * np.abs(wanted).max())


def test_a_row_without_weight_has_zero_coefficients():
    Z = WLRA(K).fit_transform(HOLES, weights=SEEN)
    assert not SEEN[1].any()
    np.testing.assert_array_equal(Z[1], 0)


def test_all_rows_of_new_data_may_be_without_weight():
    Z = WLRA(K).fit(X).transform(np.full_like(X, np.nan), weights=0)
    np.testing.assert_array_equal(Z, np.zeros((M, K)))


def test_a_planted_matrix_comes_back_from_its_visible_entries():
    model = WLRA(K)
    Z = model.fit_transform(HOLES, weights=SEEN)
    known = SEEN.sum(axis=1) >= K
    error = np.abs(model.inverse_transform(Z) - PLANTED)[known].max()
    assert error < 1e-3 * np.abs(PLANTED).max()  # the worst row is determined less well than the loss


def test_what_stands_where_the_weight_is_zero_is_not_looked_at():
    wild = np.where(SEEN, PLANTED, 1e6 * WEIGHTS)
    models = [WLRA(K).fit(data, weights=SEEN) for data in (HOLES, wild)]
    np.testing.assert_array_equal(models[0].components_, models[1].components_)


def test_weights_lower_their_own_loss():
    weighted, plain = WLRA(K), WLRA(K).fit(X)
    approximation = weighted.inverse_transform(weighted.fit_transform(X, weights=WEIGHTS))
    other = plain.inverse_transform(plain.transform(X, weights=WEIGHTS))
    assert (WEIGHTS * (X - approximation) ** 2).sum() < 0.99 * (WEIGHTS * (X - other) ** 2).sum()


def test_loss_is_that_of_the_approximation_and_not_above_the_solvers():
    model = WLRA(K)
    approximation = model.inverse_transform(model.fit_transform(X, weights=WEIGHTS))
    wanted = (WEIGHTS * (X - approximation) ** 2).sum() / (WEIGHTS * X**2).sum()
    assert model.loss_ == pytest.approx(wanted, rel=64 * EPS / wanted)  # rounding
    assert model.loss_ <= float(solve(X, WEIGHTS, K).loss) * (1 + 64 * EPS)
    assert model.status_ == Status.CONVERGED
    assert model.n_iter_ > 0


@pytest.mark.parametrize("exponent", [-60, 60])
def test_units_of_the_data_do_not_matter(exponent):
    ours, other = WLRA(K).fit(X, weights=WEIGHTS), WLRA(K).fit(X * 2.0**exponent, weights=WEIGHTS * 2.0**exponent)
    np.testing.assert_array_equal(ours.components_, other.components_)
    assert ours.loss_ == other.loss_


@pytest.mark.parametrize("data", [np.zeros((M, N)), np.outer(X[:, 0], X[0])], ids=["zero", "rank 1"])
def test_data_of_lower_rank_have_orthonormal_components_and_no_loss(data):
    model = WLRA(K).fit(data, weights=WEIGHTS)
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(K), atol=16 * EPS)  # rounding
    assert model.loss_ < K * (8 * EPS) ** 2  # rounding


def test_float64_is_solved_in_float64_where_it_is_enabled(x64):
    model = WLRA(K, method="als")
    Z = model.fit_transform(X)
    u, s, vt = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(model.inverse_transform(Z), (u[:, :K] * s[:K]) @ vt[:K], atol=1e-12)
    np.testing.assert_allclose(model.transform(X, weights=np.ones_like(X, np.float32)), Z, atol=1e-12)


def test_a_fit_may_go_on_from_another():
    first = WLRA(K)
    Z = first.fit_transform(X, weights=WEIGHTS)
    second = WLRA(K, start=(Z, first.components_)).fit(X, weights=WEIGHTS)
    assert second.n_iter_ < first.n_iter_


def test_it_warns_where_it_has_not_converged():
    with pytest.warns(ConvergenceWarning, match="Not converged after 200 iterations. Still improving: raise `max_it"):
        model = WLRA(K, tol=0.0, patience=1000).fit(X, weights=WEIGHTS)
    assert model.status_ == Status.MAX_ITERS


def test_a_closed_form_does_not_warn():
    assert WLRA(K, method="separable").fit(X, weights=WEIGHTS).status_ == Status.CLOSED_FORM


def test_it_works_in_a_pipeline_that_is_searched():
    pipeline = make_pipeline(StandardScaler(with_mean=False), WLRA(K), Ridge())
    search = GridSearchCV(pipeline, {"wlra__tol": [1e-3, 1.0]}, cv=KFold(2))
    search.fit(X, PLANTED[:, 0], wlra__weights=WEIGHTS)
    assert len(search.cv_results_["params"]) == 2
    search.best_estimator_.set_params(wlra__tol=1e-3).fit(X, PLANTED[:, 0], wlra__weights=WEIGHTS)
    fitted = search.best_estimator_.named_steps["wlra"]
    direct = WLRA(K).fit(X / X.std(axis=0), weights=WEIGHTS)
    np.testing.assert_allclose(fitted.components_, direct.components_, atol=100 * EPS)  # the scaler divides otherwise


def test_a_copy_by_pickle_transforms_the_same():
    model = WLRA(K).fit(X, weights=WEIGHTS)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.transform(X, weights=WEIGHTS), model.transform(X, weights=WEIGHTS))
    assert copy.status_ is model.status_


def test_features_out_are_named_after_the_class():
    assert list(WLRA(K).fit(X).get_feature_names_out()) == ["wlra0", "wlra1"]


def test_weights_may_be_lists_or_jax_arrays():
    single = WEIGHTS.astype(np.float32)
    kinds = (WEIGHTS, WEIGHTS.tolist(), single, jnp.asarray(single))
    models = [WLRA(K).fit(X, weights=weights) for weights in kinds]
    np.testing.assert_array_equal(models[0].components_, models[1].components_)
    np.testing.assert_array_equal(models[2].components_, models[3].components_)


# A model, what it is fitted to, and what the message must hold.
REFUSED = {
    "NaN without weights": (
        WLRA(K),
        {"X": HOLES},
        r"X has \d+ NaN.*wanted finite values, or weights=np\.isfinite\(X\)",
    ),
    "NaN with weight": (
        WLRA(K),
        {"X": HOLES, "weights": WEIGHTS},
        r"X has \d+ NaN or infinite entries where the weight is positive, the first nan at \(0, 1\)",
    ),
    "negative weights": (WLRA(K), {"weights": -WEIGHTS}, r"weights has 100 NaN, infinite or negative entries"),
    "weights all zero": (WLRA(K), {"weights": 0 * WEIGHTS}, "weights are all zero"),
    "weights of another shape": (WLRA(K), {"weights": WEIGHTS.T}, r"must broadcast to \(20, 5\); got shape \(5, 20\)"),
    "weights with one axis": (WLRA(K), {"weights": WEIGHTS[:, 0]}, r"write weights\[:, None\]"),
    "too many components": (WLRA(6), {}, r"n_components must be in \[1, 5\] for X of shape \(20, 5\); got 6"),
    "no components": (WLRA(0), {}, "n_components must be at least 1; got 0"),
    "half a component": (WLRA(1.5), {}, "n_components must be an integer"),
    "unknown method": (WLRA(K, method="adam"), {}, "method must be one of .*; got 'adam'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused(name):
    model, arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        model.fit(**{"X": X} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X": HOLES}, r"wanted finite values, or weights=np\.isfinite\(X\)"),
        ({"X": HOLES, "weights": WEIGHTS}, "X has .* where the weight is positive"),
        ({"X": X, "weights": -WEIGHTS}, "weights has 100 NaN, infinite or negative entries"),
        ({"X": X[:, :3]}, "X has 3 features, but WLRA is expecting 5 features"),
    ],
    ids=["NaN without weights", "NaN with weight", "negative weights", "other features"],
)
def test_what_cannot_be_transformed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WLRA(K).fit(X).transform(**arguments)


def test_what_is_missing_among_objects_may_have_weight_zero():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([[1, pandas.NA], [2, 3.0]], columns=["a", "b"], dtype=object)
    weights, plain = [[1, 0], [1, 1]], [[1, 0], [2, 3.0]]
    for given in (table, table.to_numpy(), table.to_numpy().tolist()):
        model = WLRA(1).fit(given, weights=weights)
        np.testing.assert_array_equal(model.components_, WLRA(1).fit(plain, weights=weights).components_)
    assert list(getattr(WLRA(1).fit(table, weights=weights), "feature_names_in_", [])) == ["a", "b"]
    with pytest.raises(ValueError, match="NaN"):
        WLRA(1).fit(table)


def test_rows_of_any_size_are_transformed_each_by_itself():
    model = WLRA(1).fit(np.outer([1.0, 2.0], [1.0, 0.5, 2.0]))
    rows = np.outer([1e300, 1e-20, 1e-8], [1.0, 0.5, 2.0])
    np.testing.assert_allclose(model.transform(rows, weights=1.0), model.transform(rows), rtol=1e-12)


def test_masked_scores_are_refused_in_lists_too():
    masked = [np.ma.array([1.0, 1.0], mask=[True, False]), np.ma.array([2.0, 2.0], mask=[False, False])]
    with pytest.raises(ValueError, match="Z must not be masked"):
        WLRA(K).fit(X).inverse_transform(masked)


def test_scores_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"one column for each of 2 components; got shape \(20, 5\)"):
        WLRA(K).fit(X).inverse_transform(X)


def test_scores_are_not_turned_back_before_fit():
    with pytest.raises(NotFittedError):
        WLRA(K).inverse_transform(X[:, :K])
