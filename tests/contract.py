"""What every method is asked: the methods by what they can do, small problems, and their results, solved once.

A method added to the registry takes part without a line here.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import reference

import wlra
from wlra.options import able

# By what they can do.
STARTS = able(lambda method: method.equalise is not None)
CLOSED_FORMS = {name: {"method": name} for name in STARTS}  # for weights of entries
PUBLISHED = able(lambda method: bool(method.svd_stages))
BY_SVD = {f"{name} by svd": {"method": name, "projection": "svd"} for name in PUBLISHED}
ITERATIONS = {name: {"method": name} for name in able(lambda method: bool(method.stages))} | BY_SVD
TABLE: dict[str, Any] = CLOSED_FORMS | ITERATIONS
PENALISED = {name: {"method": name} for name in able(lambda method: method.penalty)} | BY_SVD
SWEEPS = able(lambda method: bool(method.stages) and method.keeps_zeros)
SPARSE = able(lambda method: method.sparse)
SINGLE = tuple(name for name in TABLE if name != "auto")  # which compiles three of the others once more
KINDS = (*CLOSED_FORMS, "anderson", "als")  # what quick tests solve by
STEPS = (*KINDS, "lbfgs", "newton", "varpro", "em by svd")  # one of each kind of step

M, N, K = 16, 12, 2
EPS = float(np.finfo(np.float32).eps)
TOL = 1e-4


def cases(names, quick=KINDS):
    """Parameters of a test: all but the `quick` ones are slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


class Results(dict):
    """Results by name, of one program for the `quick` ones, and of another for the rest once one of them is wanted.

    A program of many methods compiles in half the time of one for each.
    """

    def __init__(self, solve, names, quick=KINDS):
        self.solve, self.rest = solve, tuple(name for name in names if name not in quick)
        super().__init__(solve(tuple(name for name in names if name in quick)))

    def __missing__(self, name):
        self.update(self.solve(self.rest))
        return self[name]


@functools.partial(jax.jit, static_argnames=("rank", "names"))
def solve_all(W, weights, start, rank, names):
    return {name: wlra.solve(W, weights, rank, start=start, tol=TOL, **TABLE[name]) for name in names}


def results(W, weights, start: Any = "separable", rank=K, names=tuple(TABLE), quick=KINDS):
    """The result of every method, from the factors of a closed form or from a pair."""
    if isinstance(start, str):
        blank = np.zeros((len(W), rank), W.dtype), np.zeros((rank, W.shape[1]), W.dtype)
        start = results(W, weights, blank, rank, names=names, quick=quick)[start][:2]
    return Results(lambda names: jax.tree.map(np.asarray, solve_all(W, weights, start, rank, names)), names, quick)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, WEIGHTS = normal(0, M, N), np.exp(normal(1, M, N))
PAIR = normal(2, M, K), normal(3, K, N)
PLANTED = normal(4, M, K) @ normal(5, K, N)
MASK = (np.random.default_rng(6).uniform(size=(M, N)) < 0.6).astype(np.float32)
P, Q = np.exp(normal(7, M)), np.exp(normal(8, N))
ROWS, COLUMNS = np.random.default_rng(9).permutation(M), np.random.default_rng(10).permutation(N)


@functools.cache
def example(start="separable"):
    return results(W, WEIGHTS, PAIR if start == "pair" else start)


@functools.cache
def minimum():
    """The loss at the end of exact alternating least squares in float64."""
    left, right = PAIR
    for _ in range(300):
        left, right = reference.als(W, WEIGHTS, left, right)
    return reference.loss(W, WEIGHTS, left @ right)


def assert_same_loss(got, wanted, ulps=32):
    """The root of the loss is a relative distance: rounding in sums of a few terms moves it by some eps."""
    np.testing.assert_allclose(np.sqrt(np.float64(got)), np.sqrt(np.float64(wanted)), rtol=0, atol=ulps * EPS)
