"""Without scaling, from the SVD and with an SVD in each step, the iterations are those of the literature."""

import functools

import jax
import numpy as np
import pytest
import reference

import wlra

K, STEPS = 2, 20
W = np.random.default_rng(0).normal(size=(9, 7))
WEIGHTS = np.exp(np.random.default_rng(100).normal(size=(9, 7)))  # slow enough that no loss rises in 20 steps


@jax.jit
def solve_all(W, weights):
    """The results of every published method."""
    solve = functools.partial(wlra.solve, W, weights, K, start="svd", scaling="none", projection="svd", tol=0.0)
    return {name: solve(method=name, max_iters=STEPS) for name in reference.PUBLISHED}


@jax.jit
def solve_penalised(W, weights, nuclear):
    """The same with a penalty."""
    options = {"start": "svd", "scaling": "none", "projection": "svd", "tol": 0.0, "max_iters": STEPS}
    return {
        name: wlra.solve(W, weights, 2 * K, method=name, nuclear=nuclear, **options) for name in reference.PUBLISHED
    }


@functools.cache
def results(dtype):
    return jax.tree.map(np.asarray, solve_all(W.astype(dtype), WEIGHTS.astype(dtype)))


@functools.cache
def twin(name):
    return reference.PUBLISHED[name](W, WEIGHTS, K, STEPS)


def losses(name):
    return np.array([reference.loss(W, WEIGHTS, X) for X in twin(name)])


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_every_step_has_the_loss_of_the_published_iteration(name, x64):
    # The twin solves for Anderson's weights without a shift, which loses some digits of the 16.
    np.testing.assert_allclose(results("float64")[name].history.loss, losses(name), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_the_factors_are_those_of_the_published_iteration(name, x64):
    result = results("float64")[name]
    np.testing.assert_allclose(result.left @ result.right, twin(name)[STEPS], rtol=0, atol=1e-10 * np.abs(W).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_float32_follows_the_first_steps_of_the_published_iteration(name):
    # 100 eps; later, Anderson's weights come from a Gram matrix of residuals whose condition float32 does not hold.
    np.testing.assert_allclose(results("float32")[name].history.loss[:6], losses(name)[:6], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_no_restart_is_due_in_these_steps(name):
    assert (np.diff(losses(name)) < 0).all()


NUCLEAR = 0.5  # slow enough, at this rank, that no objective rises in 20 steps


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.PUBLISHED)
def test_with_a_penalty_every_step_is_that_of_soft_impute_and_its_accelerations(name, x64):
    result = solve_penalised(W, WEIGHTS, NUCLEAR)[name]
    X = reference.PUBLISHED[name](W, WEIGHTS, 2 * K, STEPS, NUCLEAR)
    wanted = np.array([reference.objective(W, WEIGHTS, each, NUCLEAR) for each in X])
    assert (np.diff(wanted) < 0).all()  # no restart is due
    np.testing.assert_allclose(result.history.loss, wanted, rtol=1e-9)  # Anderson's weights lose some digits, as above
    np.testing.assert_allclose(result.left @ result.right, X[-1], rtol=0, atol=1e-8 * np.abs(W).max())
