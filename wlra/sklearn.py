"""Weighted low-rank approximation as a scikit-learn transformer. Needs scikit-learn, the extra `sklearn`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from wlra import checks
from wlra.api import solve
from wlra.linalg.batch import in_chunks
from wlra.linalg.decompose import balance, psd_roots
from wlra.options import MAX_ITERS, PATIENCE, TOL
from wlra.problem import Factors, Problem, loss
from wlra.result import Status
from wlra.units import to_unit

DTYPES: Any = (np.float64, np.float32)


CHUNK = 2**26  # numbers that the weighted components of a chunk of rows may take: 256 MiB in float32


class WLRA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Z @ components_, Z = fit_transform(X, weights), has the least weighted squared distance from X that is found.

    Minimises sum_ij weights_ij (X_ij - (Z @ components_)_ij)**2. Nothing is centred: with equal weights the components
    are those of `sklearn.decomposition.TruncatedSVD`. What is returned has the dtype of X, float64 or float32; but
    unless `jax_enable_x64` is on, float64 is solved in float32, and the result is no more accurate than that.

    `fit`, `fit_transform` and `transform` take weights as `wlra.solve` does: None (all equal), or non-negative and
    broadcasting to X. Where the weight is 0, X may be NaN, and whatever it holds is not looked at. To hand weights
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

        Warns with `sklearn.exceptions.ConvergenceWarning` if the solver still made progress after `max_iters`.
        """
        X = validate_data(self, X, dtype=DTYPES, ensure_all_finite=weights is None)
        rank = check_components(self.n_components, X.shape)
        target, weight = observed(X, weights)
        options = {"method": self.method, "start": self.start, "tol": self.tol}
        result = solve(target, weight, rank, **options, max_iters=self.max_iters, patience=self.patience)
        components, relative = canonical(target, weight, Factors(result.left, result.right))
        self.components_ = np.asarray(components, X.dtype)
        self.loss_, self.n_iter_ = float(relative), int(result.iterations)
        self.status_ = Status(int(result.status))
        if self.status_ == Status.MAX_ITERS:
            message = f"Not converged after {self.n_iter_} iterations. {self.status_.advice}"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    def fit_transform(self, X: Any, y: Any = None, weights: Any = None) -> Any:
        """What `fit(X, y, weights).transform(X, weights)` returns."""
        return self.fit(X, y, weights).transform(X, weights)

    def transform(self, X: Any, weights: Any = None) -> Any:
        """Row i of the result is the shortest z that minimises sum_j weights_ij (X_ij - (z @ components_)_j)**2.

        Rows that have fewer weights than there are components are underdetermined, hence "shortest"; rows without
        weight are zero.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=DTYPES, ensure_all_finite=weights is None, reset=False)
        if weights is None:
            return X @ self.components_.T.astype(X.dtype)
        target, weight = observed(X, weights)
        return np.asarray(coefficients(target, weight, jnp.asarray(self.components_, target.dtype)), X.dtype)

    def inverse_transform(self, Z: Any) -> Any:
        """Z @ components_, the approximation of the X whose coefficients are Z."""
        check_is_fitted(self)
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


def observed(X: Float[np.ndarray, "m n"], weights: Any) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """X, 0 where its weight is 0, and the weights, both finite and of one shape and dtype."""
    target = jnp.asarray(X)
    weight = checks.check_weights(None if weights is None else np.asarray(weights), X.shape)
    entries, shares = np.asarray(target), np.asarray(weight)  # on the host, where no operation has to be compiled
    weight_bad, target_bad = ~(np.isfinite(shares) & (shares >= 0)), ~np.isfinite(entries) & (shares > 0)
    checks.report("weights", weight, jnp.asarray(weight_bad), "NaN, infinite or negative", wanted="weights >= 0")
    wanted = "finite values, or weight 0 there"
    checks.report("X", target, jnp.asarray(target_bad), "NaN or infinite", wanted=wanted, where=checks.POSITIVE)
    return jnp.asarray(np.where(shares > 0, entries, 0)), jnp.asarray(shares.astype(entries.dtype))


@jax.jit
def canonical(
    target: Float[Array, "m n"], weight: Float[Array, "m n"], factors: Factors
) -> tuple[Float[Array, "k n"], Float[Array, ""]]:
    """Components that span the rows of `right`, in the gauge that `WLRA` promises, and the least loss they allow."""
    problem = Problem(to_unit(target)[0], to_unit(weight)[0])
    with jax.default_matmul_precision("highest"):
        span = ordered(Factors(to_unit(factors.left)[0], to_unit(factors.right)[0])).right
        best = ordered(Factors(coefficients(*problem[:2], span), span))
        return best.right, loss(problem, best)


def ordered(factors: Factors) -> Factors:
    """The singular value decomposition of the same product, (U S, V'), the largest entry of each row of V' positive.

    Where a singular value is 0 the row is orthonormal to the others all the same, and within the span of `right`.
    """
    left, right = balance(factors)
    peak = jnp.take_along_axis(right, jnp.argmax(jnp.abs(right), axis=1)[:, None], axis=1)[:, 0]
    size = jnp.linalg.norm(right, axis=1) * jnp.where(peak < 0, -1, 1).astype(right.dtype)
    return Factors(left * size[None, :], right / size[:, None])


@jax.jit
def coefficients(
    target: Float[Array, "m n"], weight: Float[Array, "m n"], components: Float[Array, "k n"]
) -> Float[Array, "m k"]:
    """Row i is the shortest z that minimises sum_j weight_ij (target_ij - (z @ components)_j)**2.

    By the pseudo-inverse of the row's Gram matrix, in which eigenvalues of the size of rounding errors count as 0. The
    normal equations square the condition number, and a second correction for the residual of the first makes up for it.
    `wlra.methods.sweeps.best_left` is faster, but rows with fewer weights than components get arbitrary coefficients
    from it, of the same loss.
    """
    largest = jnp.max(weight, axis=1, keepdims=True)
    weight = weight / jnp.where(largest > 0, largest, 1)

    def row(entries: tuple[Float[Array, " n"], Float[Array, " n"]]) -> Float[Array, " k"]:
        target, weight = entries
        basis = components * weight[None, :]
        root = psd_roots(basis @ components.T)[1]
        first = root @ (root @ (basis @ target))
        return first + root @ (root @ (basis @ (target - first @ components)))

    with jax.default_matmul_precision("highest"):
        chunk = max(1, CHUNK // components.size)
        return in_chunks(row, (target, weight), chunk)
