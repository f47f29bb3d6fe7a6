"""Which options go together, and what the solver takes."""

from typing import Any

from jax.experimental.sparse import BCOO
from jaxtyping import Array

from wlra import checks
from wlra.methods import METHODS, PENALISED, PUBLISHED, SPARSE, SWEEPS
from wlra.methods.closed import STARTS
from wlra.problem import Kronecker
from wlra.scaling import SCALINGS
from wlra.sparse import Sparse, is_sparse

PROJECTIONS = {"subspace": METHODS, "svd": PUBLISHED}


TOL, MAX_ITERS, PATIENCE = 1e-3, 200, 30


def prepare(
    W: Array | Sparse,
    weights: Any,
    rank: Any,
    method: Any,
    start: Any,
    scaling: Any,
    projection: Any,
    tol: Any,
    max_iters: Any,
    patience: Any,
    ridge: Any = None,
    nuclear: Any = None,
    ranks: Any = None,
) -> tuple[tuple, dict[str, Any]]:
    """The traced and the static arguments of the solver, checked."""
    rank = checks.check_rank(rank, W.shape)
    tol, max_iters, patience = check_options(method, start, scaling, projection, tol, max_iters, patience)
    if isinstance(weights, Kronecker) != (method == "kronecker"):
        raise ValueError(
            f"Kronecker weights have a closed form only: write method='kronecker'; got method={method!r}"
            if isinstance(weights, Kronecker)
            else f"method 'kronecker' needs weights=wlra.Kronecker(row, col); got {type(weights).__name__}"
        )
    if isinstance(weights, Kronecker):
        weights = checks.check_kronecker(weights, W.shape)
        checks.check_kronecker_values(W, weights)  # pyright: ignore[reportArgumentType] a BCOO was refused
    else:
        sparse = is_sparse(W)
        weights = checks.check_sparse_weights(weights, W) if sparse else checks.check_weights(weights, W.shape)
        checks.check_values(W, weights)
    penalty, unit = checks.check_penalty(ridge, nuclear)
    if unit and method not in PENALISED:
        raise ValueError(f"{unit} needs one of the methods {', '.join(map(repr, PENALISED))}; got {method!r}")
    if ranks is not None:
        if method not in (*STARTS, "kronecker", *SWEEPS) or projection != "subspace":
            able = ", ".join(map(repr, (*STARTS, "kronecker", *SWEEPS)))
            raise ValueError(
                f"ranks needs projection='subspace' and one of the methods {able}; got {projection!r} and {method!r}"
            )
        ranks = checks.check_ranks(ranks, W.shape[0], rank)
    pair = None
    if method in STARTS:
        start = method
    elif method in METHODS and not isinstance(start, str):
        pair, start = checks.check_pair(start, W.shape, rank), "pair"
    static = {"rank": rank, "method": method, "start": start, "scaling": scaling, "projection": projection}
    return (W, weights, pair, ranks, tol, patience, penalty), static | {"max_iters": max_iters, "penalty_unit": unit}


def check_options(
    method: Any,
    start: Any = "separable",
    scaling: Any = "separable",
    projection: Any = "subspace",
    tol: Any = TOL,
    max_iters: Any = MAX_ITERS,
    patience: Any = PATIENCE,
) -> tuple[Any, int, Any]:
    """tol, max_iters and patience as the solver takes them, once every option is known to be usable."""
    checks.check_name("method", method, (*METHODS, *STARTS, "kronecker"))
    checks.check_name("scaling", scaling, SCALINGS)
    checks.check_name("projection", projection, PROJECTIONS)
    if method in METHODS and method not in PROJECTIONS[projection]:
        raise ValueError(f"method {method!r} projects nothing: projection must be 'subspace'; got {projection!r}")
    if method in METHODS and isinstance(start, str):
        checks.check_name("start", start, STARTS)
    if not checks.is_traced(patience):
        patience = checks.check_count("patience", patience, 1)
    return checks.check_tol(tol), checks.check_count("max_iters", max_iters, 1), patience


def refuse_whole(method: Any, projection: Any, ridge: Any, nuclear: Any, restarts: Any, weights: Any) -> None:
    """A mesh is not given with options that need the whole matrix on one device."""
    needs = {
        f"method={method!r}": method in (*STARTS, "kronecker"),
        f"projection={projection!r}": projection == "svd",
        "ridge or nuclear": ridge is not None or nuclear is not None,
        "restarts": restarts is not None,
        "Kronecker weights": isinstance(weights, Kronecker),
    }
    for name, needed in needs.items():
        if needed:
            raise ValueError(f"{name} needs the whole matrix on one device: it cannot be cut over a mesh")


def refuse_filled(weights: Any, method: Any, projection: Any, ridge: Any, restarts: Any, mesh: Any) -> None:
    """A sparse W is not given with dense weights, nor with options that need every entry."""
    if weights is not None and not isinstance(weights, BCOO):
        raise ValueError(f"weights of a sparse W must be None or a BCOO like it; got {type(weights).__name__}")
    if method not in SPARSE:
        raise ValueError(f"method must be one of {', '.join(map(repr, SPARSE))} for a sparse W; got {method!r}")
    needs = {
        f"projection={projection!r}": projection != "subspace",
        "ridge, a share of a singular value,": ridge is not None,
        "restarts": restarts is not None,
        "a mesh": mesh is not None,
    }
    for name, given in needs.items():
        if given:
            raise ValueError(f"{name} needs a dense W; got a BCOO")
