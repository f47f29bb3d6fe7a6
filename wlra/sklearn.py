"""Weighted low-rank approximation as a scikit-learn transformer. Needs scikit-learn, the extra `sklearn`."""

import datetime
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from wlra import checks
from wlra.api import solve
from wlra.convert import as_numpy, check_aligned, is_scipy, is_sparse_matrix, joined, real
from wlra.leastsquares import at_least_double, coefficients
from wlra.options import MAX_ITERS, PATIENCE, TOL
from wlra.result import Status

DTYPES: Any = (np.float64, np.float32)
DATES = (datetime.date, datetime.timedelta, np.datetime64, np.timedelta64)
WORDS = (str, bytes, complex, *DATES)  # objects that scikit-learn reads as numbers, or fails on


class WLRA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Z @ components_, Z = fit_transform(X, weights), has the least weighted squared distance from X that is found.

    Minimises sum_ij weights_ij (X_ij - (Z @ components_)_ij)**2. Nothing is centred: with equal weights the components
    are those of `sklearn.decomposition.TruncatedSVD`. What is returned has the dtype of X, float64 or float32; but
    unless `jax_enable_x64` is on, float64 is solved in float32, and the result is no more accurate than that.

    `fit`, `fit_transform` and `transform` take weights as `wlra.solve` does: None (all equal), or non-negative and
    broadcasting to X. Where the weight is 0, X may be NaN, and whatever it holds is not looked at; entries that a
    `numpy.ma.MaskedArray` masks have weight 0. Sparse X is refused: its zeros would be unknown here, and are not to
    scikit-learn. To hand weights
    through a pipeline write `pipeline.fit(X, wlra__weights=weights)`, or enable scikit-learn's metadata routing.

    Args:
      n_components: the rank, in [1, min(n_samples, n_features)].
      method, start, tol, max_iters, patience: as in `wlra.solve`, for weights of entries. A pair (left, right) as start
        goes on from (Z, components_).

    Attributes:
      components_: (n_components, n_features), orthonormal rows, ordered by the norms of the columns of Z, which are
        orthogonal; the largest entry of each component is positive.
      loss_: sum weights (X - Z @ components_)**2 / sum weights X**2.
      n_iter_: the number of iterations, 0 for a closed form.
      status_: a `wlra.Status`, how the solver ended; `status_.advice` says in a sentence what to do.
      n_features_in_, feature_names_in_: of the X seen in `fit`; names only if it had any.

    Example:
      >>> import numpy as np
      >>> from wlra.sklearn import WLRA
      >>> X = np.outer([1.0, 2.0, 3.0], [1.0, 0.5])
      >>> X[0, 1] = np.nan
      >>> model = WLRA(n_components=1)
      >>> Z = model.fit_transform(X, weights=np.isfinite(X))
      >>> round(float(model.inverse_transform(Z)[0, 1]), 3)
      0.5
    """

    def __init__(
        self,
        n_components: Any = 2,
        *,
        method: Any = "anderson",
        start: Any = "separable",
        tol: Any = TOL,
        max_iters: Any = MAX_ITERS,
        patience: Any = PATIENCE,
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.start = start
        self.tol = tol
        self.max_iters = max_iters
        self.patience = patience

    def fit(self, X: Any, y: Any = None, weights: Any = None) -> "WLRA":
        """The estimator itself, with the components of X. `y` is not used.

        Warns with `sklearn.exceptions.ConvergenceWarning` if the solver ended before it had converged.

        Example:
          >>> import numpy as np
          >>> from wlra.sklearn import WLRA
          >>> WLRA(n_components=1).fit(np.outer([1.0, 2.0, 3.0], [2.0, 1.0])).components_.shape
          (1, 2)
        """
        X, weights = validated(self, X, weights, reset=True)
        rank = check_components(self.n_components, X.shape)
        options = {"method": self.method, "start": self.start, "tol": self.tol}
        result = solve(X, weights, rank, **options, max_iters=self.max_iters, patience=self.patience)
        weights = np.ones_like(X) if weights is None else weights
        components, relative = canonical(X, weights, np.asarray(result.right))
        self.components_ = components.astype(X.dtype)
        self.loss_, self.n_iter_ = float(relative), int(result.iterations)
        self.status_ = Status(int(result.status))
        if self.status_ in (Status.MAX_ITERS, Status.STALLED, Status.NONFINITE):
            message = f"Not converged after {self.n_iter_} iterations. {self.status_.advice}"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    def fit_transform(self, X: Any, y: Any = None, weights: Any = None) -> Any:
        """What `fit(X, y, weights).transform(X, weights)` returns.

        Example:
          >>> import numpy as np
          >>> from wlra.sklearn import WLRA
          >>> WLRA(n_components=1).fit_transform(np.outer([1.0, 2.0, 3.0], [3.0, 4.0])).round(3).ravel().tolist()
          [5.0, 10.0, 15.0]
        """
        return self.fit(X, y, weights).transform(X, weights)

    def transform(self, X: Any, weights: Any = None) -> Any:
        """Row i of the result is the shortest z that minimises sum_j weights_ij (X_ij - (z @ components_)_j)**2.

        Rows that have fewer weights than there are components are underdetermined, hence "shortest"; rows without
        weight are zero.

        Example:
          >>> import numpy as np
          >>> from wlra.sklearn import WLRA
          >>> model = WLRA(n_components=1).fit(np.outer([1.0, 2.0, 3.0], [3.0, 4.0]))
          >>> model.transform([[6.0, np.nan]], weights=[[1.0, 0.0]]).round(3).tolist()
          [[10.0]]
        """
        check_is_fitted(self)
        X, weights = validated(self, X, weights, reset=False)
        if weights is None:
            return X @ self.components_.T.astype(X.dtype)
        target, power = in_units(X, axis=1)
        scores = coefficients(target, weights, self.components_.astype(np.float64))
        return np.ldexp(scores, power).astype(X.dtype)

    def inverse_transform(self, Z: Any) -> Any:
        """Z @ components_, the approximation of the X whose coefficients are Z.

        Example:
          >>> import numpy as np
          >>> from wlra.sklearn import WLRA
          >>> model = WLRA(n_components=1).fit(np.outer([1.0, 2.0, 3.0], [3.0, 4.0]))
          >>> model.inverse_transform([[10.0]]).round(3).tolist()
          [[6.0, 8.0]]
        """
        check_is_fitted(self)
        Z = as_numbers("Z", joined(Z, "Z"))
        if isinstance(Z, np.ma.MaskedArray):
            raise ValueError("Z must not be masked: every coefficient is needed")
        Z, wanted = check_array(Z, dtype=DTYPES, input_name="Z"), len(self.components_)
        if Z.shape[1] != wanted:
            raise ValueError(f"Z must have one column for each of {wanted} components; got shape {Z.shape}")
        return Z @ self.components_.astype(Z.dtype)

    def __sklearn_tags__(self) -> Tags:
        """What scikit-learn may expect. NaN is allowed with weights only, which it does not pass: hence not here."""
        tags = super().__sklearn_tags__()
        assert tags.transformer_tags is not None  # it is a transformer
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        """What `get_feature_names_out` asks for."""
        return len(self.components_)


def check_components(n_components: Any, shape: tuple[int, ...]) -> int:
    """`n_components` as an int in [1, min(n_samples, n_features)]."""
    count, limit = checks.check_count("n_components", n_components, 1), min(shape)
    if count > limit:
        raise ValueError(f"n_components must be in [1, {limit}] for X of shape {shape}; got {count}")
    return count


def validated(model: WLRA, X: Any, weights: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """X, 0 where its weight is 0, and the weights at its shape or None, once both are known to be fit.

    The mask of a `numpy.ma.MaskedArray` becomes weights of 0, which scikit-learn would drop.
    """
    check_aligned(X, weights)
    if not is_scipy(X):  # else scikit-learn refuses it
        X = as_numbers("X", joined(X, "X"))
    if isinstance(X, np.ma.MaskedArray):
        weights = checks.hide(X, checks.check_weights(weights, X.shape))
        X = real(X, "X", masked=0.0)
    X = validate_data(model, X, dtype=DTYPES, ensure_all_finite=False, reset=reset)
    if weights is None:
        checks.report("X", X, ~np.isfinite(X), "NaN or infinite", wanted="finite values, or weights=np.isfinite(X)")
        return X, None
    weights = np.asarray(checks.check_weights(weights, X.shape))
    weights_bad, target_bad = ~(np.isfinite(weights) & (weights >= 0)), ~np.isfinite(X) & (weights > 0)
    checks.report("weights", weights, weights_bad, "NaN, infinite or negative", wanted="weights >= 0")
    wanted = "finite values, or weight 0 there"
    checks.report("X", X, target_bad, "NaN or infinite", wanted=wanted, where=checks.POSITIVE)
    return np.where(weights > 0, X, 0), weights


def as_numbers(name: str, value: Any) -> Any:
    """What scikit-learn can read: of objects their numbers, NaN where one is missing, under the same labels.

    Text and dates, which it would read as numbers, are refused, and so is what becomes zero or infinite in float64.
    """
    if is_sparse_matrix(value):
        raise ValueError(f"{name} must be dense; got a {type(value).__name__} of shape {value.shape}")
    array = np.ma.getdata(value) if isinstance(value, np.ma.MaskedArray) else as_numpy(value, name)
    words = [entry for entry in array.ravel() if isinstance(entry, WORDS)] if array.dtype == object else []
    if array.dtype.kind in "USTmMc" or words:
        raise ValueError(f"{name} must hold numbers; got {words[0] if words else array.dtype!r}")
    if array.dtype == object and not isinstance(value, np.ma.MaskedArray):
        array = real(array, name)
        return type(value)(array, columns=value.columns, index=value.index) if hasattr(value, "columns") else array
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        with np.errstate(over="ignore", under="ignore"):
            rounded = array.astype(np.float64)
        lost = ((rounded == 0) & (array != 0)) | (np.isinf(rounded) & np.isfinite(array))
        checks.report(name, rounded, lost, "tiny or huge", wanted=f"{name} in units in which float64 holds it")
    return value


def canonical(
    X: Float[np.ndarray, "m n"], weights: np.ndarray, right: Float[np.ndarray, "k n"]
) -> tuple[Float[np.ndarray, "k n"], float]:
    """Components that span the rows of `right`, in the gauge that `WLRA` promises, and the least loss they allow."""
    target, weights = in_units(X)[0], at_least_double(weights) / np.max(weights)
    span = np.linalg.qr(right.astype(np.float64).T)[0].T
    scores = coefficients(target, weights, span)
    components = np.linalg.svd(scores, full_matrices=False)[2] @ span
    peaks = np.take_along_axis(components, np.argmax(np.abs(components), axis=1)[:, None], axis=1)
    error, zero = (np.sum(weights * rest**2) for rest in (target - scores @ span, target))
    return np.where(peaks < 0, -components, components), error / (zero if zero > 0 else 1)


def in_units(X: Float[np.ndarray, "m n"], axis: int | None = None) -> tuple[Float[np.ndarray, "m n"], Any]:
    """X over the power of two of its largest entry, or of each row's, in float64, and that power.

    So squares neither overflow nor vanish.
    """
    power = np.frexp(np.max(np.abs(X), axis=axis, keepdims=True))[1]
    return np.ldexp(X.astype(np.float64), -power), power
