"""Newton's method and damped Gauss-Newton have the derivatives of the reduced objective, and their rates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import wlra
from wlra.methods import newton, varpro
from wlra.problem import Factors, Problem

M, N, K = 10, 14, 2
EPS = float(np.finfo(np.float64).eps)
rng = np.random.default_rng(0)
W, STEP = rng.normal(size=(M, N)), rng.normal(size=(M, K))
LEFT = np.linalg.qr(rng.normal(size=(M, K)))[0]
WEIGHTS = np.exp(rng.normal(size=(M, N)))
HOLES = WEIGHTS * (rng.uniform(size=(M, N)) < 0.5)
HOLES[:, 3] = np.eye(M)[4]  # a column with fewer observations than unknowns
HOLES[:, 5] = 0


def reduced(left):
    """Half the objective as a function of `left` alone, by one dense least-squares solution a column."""

    def column(weight, target):
        side = left.T @ (weight * target)
        return (target @ (weight * target) - side @ jnp.linalg.solve(left.T @ (weight[:, None] * left), side)) / 2

    return jnp.sum(jax.vmap(column)(jnp.asarray(WEIGHTS.T), jnp.asarray(W.T)))


@jax.jit
def model_at(left):
    problem = Problem(jnp.asarray(W), jnp.asarray(WEIGHTS))
    around = newton.model(problem, newton.at_best(problem, Factors(left, jnp.zeros((K, N)))))
    return around.factors.left, newton.curvature(around, newton.horizontal(around, jnp.asarray(STEP)))


@jax.jit
def gauss_newton(left, weight, ridge):
    problem = Problem(jnp.asarray(W), weight)
    factors, inverses = varpro.eliminate(problem, left, ridge)
    return factors, varpro.hessian(problem, factors, inverses)


@functools.cache
def solved(method):
    return jax.tree.map(np.asarray, wlra.solve(W, WEIGHTS, K, method=method, tol=1e-13, max_iters=60))


def test_the_hessian_is_summed_a_few_columns_at_a_time(monkeypatch, x64):
    rng = np.random.default_rng(3)
    problem = Problem(jnp.asarray(rng.normal(size=(M, N))), jnp.asarray(rng.exponential(size=(M, N))))
    factors, inverses = varpro.eliminate(problem, jnp.asarray(rng.normal(size=(M, K))))
    whole = varpro.hessian(problem, factors, inverses)
    monkeypatch.setattr(varpro, "NUMBERS", 4 * M * M)  # four columns at a time, the last time two
    assert N % 4
    np.testing.assert_allclose(
        varpro.hessian(problem, factors, inverses), whole, rtol=0, atol=1e-13 * np.abs(whole).max()
    )


def test_varpro_returns_nothing_worse_than_its_start():
    left = np.vstack([[[1.0, 0], [1, 1e-3], [0, 1]], STEP[:7]]).astype(np.float32)
    right = np.vstack([np.ones(N), W[0]]).astype(np.float32)
    right[1, 0], weights = 1e3, np.ones((M, N))
    weights[:2, 0], weights[2:, 0] = 1e4, 0  # a column in which the factors need what a pseudo-inverse leaves out
    how = {"start": (left, right), "scaling": "none", "max_iters": 1}
    result = wlra.solve((left.astype(float) @ right).astype(np.float32), weights, K, method="varpro", **how)
    assert result.loss < 1e-6


@functools.cache
def minimum(method):
    """The loss where exact alternating least squares ends that begins with the factors of the method."""
    left, right = solved(method)[:2]
    for _ in range(100):
        left, right = reference.als(W, WEIGHTS, left, right)
    return reference.loss(W, WEIGHTS, left @ right)


def test_curvature_is_the_derivative_of_the_gradient_of_the_reduced_objective(x64):
    left, got = model_at(LEFT)
    across = jnp.eye(M) - left @ left.T
    bent = jax.jvp(jax.grad(reduced), (left,), (across @ STEP,))[1]
    # Gram matrices of condition 10, in two solutions; the reduced gradient has no part within the span of `left`.
    np.testing.assert_allclose(got, across @ bent, rtol=0, atol=1e4 * EPS * np.abs(bent).max())


def test_newton_converges_quadratically(x64):
    result = solved("newton")
    shares = result.history.stationarity[: result.iterations + 1]
    assert result.status == wlra.Status.CONVERGED
    assert result.iterations < 20
    assert shares[-1] <= 1e-13
    small = np.flatnonzero(shares[:-1] <= 1e-2)
    # Near the minimum each share is at most a constant, of the size of the conditions, times the square of the last.
    assert (shares[small + 1] <= np.maximum(100 * shares[small] ** 2, 1e-13)).all()


# Gauss-Newton judges its steps by the loss, whose rounding errors are those of a stationarity of sqrt(eps).
@pytest.mark.parametrize(("method", "share"), [("newton", 1e-12), ("varpro", 1e-7)])
def test_second_order_methods_end_in_a_minimum(method, share, x64):
    result = solved(method)
    assert reference.stationarity(W, WEIGHTS, *result[:2]) <= share
    assert result.loss == pytest.approx(minimum(method), rel=1e3 * EPS)  # flat to second order, and sums of 140 terms


@functools.cache
def crawled(method):
    """What the method makes in 250 iterations of weights over many orders of magnitude that no scaling evens out."""
    weights = np.exp(3 * np.random.default_rng(5).normal(size=(M, N)))
    return jax.tree.map(np.asarray, wlra.solve(W, weights, K, method=method, tol=1e-11, max_iters=250))


@pytest.mark.slow
def test_auto_begins_as_anderson_and_ends_as_newton_where_that_crawls(x64):
    auto, first_order = crawled("auto"), crawled("anderson")
    # Until it crawls it is the same iteration, in another program: rounding, which the first steps do not yet amplify.
    np.testing.assert_allclose(auto.history.loss[:5], first_order.history.loss[:5], rtol=1e-9)
    assert auto.status == wlra.Status.CONVERGED
    assert auto.iterations > 12 + 100  # both first-order stages have had their pause
    assert first_order.status != wlra.Status.CONVERGED
    assert auto.loss <= first_order.loss * (1 + 64 * EPS)  # sums of 140 terms


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_hessian_is_the_schur_complement_of_the_gauss_newton_matrix_of_both_factors(ridge, x64):
    (left, right), got = gauss_newton(LEFT, jnp.asarray(HOLES), ridge)

    def residual(left, right):
        return jnp.concatenate([(jnp.sqrt(HOLES) * (W - left @ right)).ravel(), ridge**0.5 * right.ravel()])

    by_left, by_right = (np.asarray(part) for part in jax.jacobian(residual, (0, 1))(left, right))
    by_left, by_right = by_left.reshape(-1, M * K), by_right.reshape(-1, K * N)
    across = np.eye(len(by_right)) - by_right @ np.linalg.pinv(by_right)
    wanted = by_left.T @ across @ by_left
    # Steps within the span of `left` change nothing; what the Hessian holds for them is the method's own affair.
    free = np.kron(np.eye(M) - np.asarray(left @ left.T), np.eye(K))
    np.testing.assert_allclose(free @ got @ free, free @ wanted @ free, rtol=0, atol=1e-12 * np.abs(wanted).max())
    if not ridge:
        np.testing.assert_allclose(free @ wanted @ free, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())  # rounding


def test_columns_with_fewer_observations_than_unknowns_get_the_solution_of_least_norm(x64):
    left, right = gauss_newton(LEFT, jnp.asarray(HOLES), 0.0)[0]
    root = np.sqrt(HOLES)
    for j in range(N):
        wanted = np.linalg.lstsq(root[:, j, None] * left, root[:, j] * W[:, j], rcond=None)[0]
        # Gram matrices square a condition of 100 or less.
        np.testing.assert_allclose(right[:, j], wanted, rtol=0, atol=1e5 * EPS * max(1, float(np.linalg.norm(wanted))))
