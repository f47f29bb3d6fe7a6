"""What the solver is asked for, and which options go together."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wlra import checks
from wlra.door import Given, in_units
from wlra.methods import METHODS
from wlra.methods.method import Method
from wlra.problem import Factors, Kronecker
from wlra.scaling import SCALINGS
from wlra.units import Units, start_in_units

PROJECTIONS = ("subspace", "svd")
TOL, MAX_ITERS, PATIENCE = 1e-3, 200, 30


class Options(NamedTuple):
    """What a program is compiled for; hashable, a method by its value.

    start: a method whose closed form iterations start from; None for the factors in `Inputs`.
    unit: of the penalty: "ridge", "nuclear", or "" if there is none.
    examined: whether the values are known to be fit: else the program looks, and its status says so.
    """

    rank: int
    method: Method
    start: Method | None
    scaling: str
    projection: str
    max_iters: int
    unit: str
    examined: bool


class Inputs(NamedTuple):
    """What a compiled program is given: arrays, and numbers that may change from call to call.

    start: factors to go on from, or None. ranks: a rank beyond which factors are zero, or None.
    units: the powers of two by which the caller's target and start, and weights over penalty, are larger.
    """

    target: Any
    weights: Any
    start: Factors | None
    ranks: Any
    units: Units
    tol: Any
    patience: Any
    penalty: Any


def split(inputs: Inputs) -> tuple[tuple, tuple]:
    """What has the axis of a batch, and what all problems share."""
    return tuple(inputs[:5]), tuple(inputs[5:])


def join(arrays: tuple, shared: tuple) -> Inputs:
    """The inputs that `split` has cut in two."""
    return Inputs(*arrays, *shared)  # pyright: ignore[reportCallIssue]


class Request(NamedTuple):
    """The options of `wlra.solve`, as given."""

    method: Any = "anderson"
    start: Any = "separable"
    scaling: Any = "separable"
    projection: Any = "subspace"
    tol: Any = TOL
    max_iters: Any = MAX_ITERS
    patience: Any = PATIENCE
    ridge: Any = None
    nuclear: Any = None


def check_options(method: Any, **options: Any) -> Request:
    """The options of `wlra.solve`, once each is known to be usable, the method and the start by their values.

    Raises:
      ValueError: a name is unknown, a number is out of range, or two options do not go together.
    """
    if unknown := options.keys() - set(Request._fields):
        raise ValueError(f"options must be of {', '.join(map(repr, Request._fields))}; got {sorted(unknown)}")
    request = Request(method, **options)
    method = as_method(request.method)
    checks.check_name("scaling", request.scaling, SCALINGS)
    checks.check_name("projection", request.projection, PROJECTIONS)
    if method.stages and request.projection == "svd" and not method.svd_stages:
        raise ValueError(f"method {method.name!r} projects nothing: projection must be 'subspace'; got 'svd'")
    start = request.start
    if isinstance(start, str):
        checks.check_name("start", start, able(lambda method: method.equalise is not None))
    if method.stages and isinstance(start, str | Method):
        start = as_method(start)
        if start.equalise is None:
            raise ValueError(f"start must be a closed form for weights of entries, with `equalise`; got {start.name!r}")
    patience = request.patience
    if not checks.is_traced(patience):
        patience = min(checks.check_count("patience", patience, 1), checks.MOST)
    _, unit = checks.check_penalty(request.ridge, request.nuclear)
    if unit and not method.penalty:
        raise ValueError(f"{unit} needs one of the methods {listed('penalty')}; got {method.name!r}")
    max_iters = checks.check_count("max_iters", request.max_iters, 1, most=checks.MOST)
    return request._replace(
        method=method, start=start, tol=checks.check_tol(request.tol), max_iters=max_iters, patience=patience
    )


def is_known(request: Request) -> bool:
    """Whether no number or factor of the request is traced by a caller."""
    start = request.start if isinstance(request.start, list | tuple) and not isinstance(request.start, Method) else ()
    return not any(map(checks.is_traced, (*start, request.tol, request.patience, request.ridge, request.nuclear)))


def as_method(method: Any) -> Method:
    """The method of that name, or the method itself.

    Raises:
      ValueError: the name is unknown, or a method has neither or both of stages and a closed form.
    """
    if not isinstance(method, Method):
        return METHODS[checks.check_name("method", method, METHODS)]
    if bool(method.stages) == (method.closed_form is not None):
        raise ValueError(f"method {method.name!r} must have stages or a closed form, and not both")
    return method._replace(stages=tuple(method.stages), svd_stages=tuple(method.svd_stages))


def able(capable: Callable[[Method], bool]) -> list[str]:
    """The names of the methods that are capable of something."""
    return [name for name, method in METHODS.items() if capable(method)]


def listed(capability: str) -> str:
    """The names of the methods that have a capability, for an error."""
    return ", ".join(map(repr, able(lambda method: getattr(method, capability))))


def prepare(
    given: Given, rank: Any, request: Request, *, ranks: Any = None, at_hand: bool = False
) -> tuple[Inputs, Options]:
    """The traced and the static arguments of the solver, checked; of a request that `check_options` has made.

    What was on the host still is. at_hand: the closed form on the host checks Kronecker weights on its way.
    """
    rank, method = checks.check_rank(rank, given.shape), request.method
    check_kind(given, method)
    if ranks is not None:
        ranks = checks.check_ranks(check_keeps_zeros(request, ranks), given.shape[0], rank)
    target, weights, units = in_units(given)
    start, factors = request.start if isinstance(request.start, Method) else None, None
    if not isinstance(request.start, str | Method):
        factors = start_in_units(checks.check_start(request.start, given.shape, rank), units.target)
    if not method.stages:  # a closed form is its own start
        start = factors = None
    examined = given.examined
    if isinstance(weights, Kronecker) and not at_hand:
        examined = checks.check_kronecker_values(target, weights)
    penalty, unit = checks.check_penalty(request.ridge, request.nuclear)
    if unit == "nuclear" and not checks.is_traced(penalty):
        penalty, power = math.frexp(penalty)
        units = units._replace(weights=units.weights - np.int32(power))
    options = Options(
        rank=rank,
        method=method,
        start=start,
        scaling=request.scaling,
        projection=request.projection,
        max_iters=request.max_iters,
        unit=unit,
        examined=examined,
    )
    inputs = Inputs(
        target=target,
        weights=weights,
        start=factors,
        ranks=ranks,
        units=units,
        tol=request.tol,
        patience=jnp.asarray(request.patience, jnp.int32),
        penalty=penalty,
    )
    return inputs, options


def check_kind(given: Given, method: Method) -> None:
    """The method is one for the kind of weights, and for the kind of target."""
    kronecker = isinstance(given.weights, Kronecker)
    if kronecker and not method.kronecker:
        raise ValueError(
            f"Kronecker weights have a closed form only: write method='kronecker'; got method={method.name!r}"
        )
    if method.kronecker and not kronecker:
        raise ValueError(f"method {method.name!r} needs weights=wlra.Kronecker(row, col); got weights of entries")


def check_keeps_zeros(request: Request, ranks: Any) -> Any:
    """The ranks, if the method leaves components of zero as they are."""
    if not request.method.keeps_zeros or (request.method.stages and request.projection != "subspace"):
        raise ValueError(
            f"ranks needs projection='subspace' and one of the methods {listed('keeps_zeros')}; got "
            f"{request.projection!r} and {request.method.name!r}"
        )
    return ranks


def refuse_whole(request: Request, weights: Any, restarts: Any) -> None:
    """A mesh is not given with options that need the whole matrix on one device."""
    needs = {
        f"method={request.method.name!r}": request.method.closed_form is not None,
        f"projection={request.projection!r}": request.projection == "svd",
        "ridge or nuclear": request.ridge is not None or request.nuclear is not None,
        "restarts": restarts is not None,
        "Kronecker weights": isinstance(weights, Kronecker),
    }
    for name, needed in needs.items():
        if needed:
            raise ValueError(f"{name} needs the whole matrix on one device: it cannot be cut over a mesh")


def refuse_filled(request: Request, restarts: Any = None, mesh: Any = None) -> None:
    """A sparse W is not given with options that need every entry."""
    if not request.method.sparse:
        raise ValueError(f"method must be one of {listed('sparse')} for a sparse W; got {request.method.name!r}")
    needs = {
        f"projection={request.projection!r}": request.projection != "subspace",
        "ridge, a share of a singular value,": request.ridge is not None,
        "restarts": restarts is not None,
        "a mesh": mesh is not None,
    }
    for name, given in needs.items():
        if given:
            raise ValueError(f"{name} needs a dense W; got a sparse one")
