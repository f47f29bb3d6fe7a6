"""CONVERGED is true: no lower minimum is near, whatever the weights and wherever the solve began."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import reference
from contract import ITERATIONS, cases
from reference import product

import wlra
from wlra.certificate import WITHIN

M, N, K = 12, 10, 2
COUNT = 300  # problems


def problem(seed):
    """A target and weights of one of twelve kinds."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(M, K)) @ rng.normal(size=(K, N)) + 10.0 ** rng.uniform(-2, 0) * rng.normal(size=(M, N))
    weights = np.exp(rng.uniform(0, 2) * rng.normal(size=(M, N)))
    within = blocks(rng, 2)  # of the target: a start that lies in one of them has no gradient in the other
    kinds = [
        lambda: (W, weights * (rng.uniform(size=(M, N)) < 0.6)),
        lambda: (W, 10.0 ** rng.uniform(-6, 0, size=(M, N))),
        lambda: (W, np.where(rng.uniform(size=(M, N)) < 0.1, 1e6, 1.0)),
        lambda: (W, blocks(rng, 2)),
        lambda: (W, blocks(rng, 3) * weights),
        lambda: (np.repeat(W[::2], 2, axis=0), np.repeat(weights[::2], 2, axis=0)),
        lambda: (np.eye(M, N) * rng.uniform(0.5, 2), weights),
        lambda: (np.ones((M, N)) * rng.normal(), weights),
        lambda: (W, np.exp(3 * rng.standard_cauchy(size=(M, N)).clip(-6, 6))),
        lambda: (W, np.maximum(blocks(rng, 2), 1e-6)),
        lambda: (W * within, np.where(within > 0, 10.0 ** rng.uniform(-1, 0, size=(M, N)), 0.05)),
        lambda: (rng.normal(size=(M, N)) * halves(), np.where(halves() > 0, weights.clip(0.3, 3), 0.1)),
    ]
    return kinds[seed % len(kinds)]()


def blocks(rng, count):
    """Weights of 1 where the row's group is the column's."""
    return (rng.integers(count, size=(M, 1)) == rng.integers(count, size=(1, N))).astype(float)


def halves():
    """Ones in two blocks, one after the other."""
    return np.kron(np.eye(2), np.ones((M // 2, N // 2)))


@functools.cache
def problems():
    targets, weights = zip(*map(problem, range(COUNT)), strict=True)
    weights = np.stack(weights)
    weights[~weights.any(axis=(1, 2))] = 1
    return np.stack(targets).astype(np.float32), weights.astype(np.float32)


@functools.cache
def results(name):
    options: dict[str, Any] = {"max_iters": 100, **ITERATIONS[name]}
    return jax.tree.map(np.asarray, wlra.solve_batch(*problems(), K, **options))


@functools.lru_cache
def local_minimum(name, i):
    W, weights = (array[i].astype(float) for array in problems())
    return reference.descend(W, weights, *(part[i].astype(float) for part in results(name)[:2]))


@pytest.mark.parametrize("name", cases(ITERATIONS, ["anderson"]))
def test_what_has_converged_is_within_a_hundredth_of_a_local_minimum(name):
    result = results(name)
    converged = np.flatnonzero(result.status == wlra.Status.CONVERGED)
    assert len(converged) > len(result.status) / 4
    wrong = {}
    for i in converged:
        W, weights = (array[i].astype(float) for array in problems())
        loss = reference.loss(W, weights, product((result.left[i], result.right[i])))
        lowest = local_minimum(name, i)
        if loss > lowest * (1 + WITHIN) + 1e-10:
            wrong[int(i)] = (loss, lowest)
    # On what is seen of a few directions, and in float32: one of each hundred begun may be a little further away. Of
    # the 1,952 that all methods call converged at XLA's full optimisation, three are: 1.3 % twice, and 5.4 %.
    assert len(wrong) <= math.ceil(len(converged) / 100), wrong
