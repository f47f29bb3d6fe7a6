"""What cannot be used is refused before work starts, with a message that says what and where."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlra import METHODS, Kronecker, Status, checks, solve, solve_batch

M, N, K = 5, 4, 2
W = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).exponential(size=(M, N)).astype(np.float32)
LEFT, RIGHT = np.ones((M, K), np.float32), np.ones((K, N), np.float32)
SPD = Kronecker(np.eye(M, dtype=np.float32), np.eye(N, dtype=np.float32))


def with_entry(array, value, *indices):
    array = array.copy()
    for index in indices:
        array[index] = value
    return array


# Arguments that differ from W, WEIGHTS, rank=K, and what the message must hold.
REFUSED = {
    "target with one axis": ({"W": W[0]}, "W must be a (m, n) array without empty axes; got shape (4,)"),
    "target with three axes": ({"W": W[None]}, "W must be a (m, n) array without empty axes; got shape (1, 5, 4)"),
    "target without rows": ({"W": W[:0]}, "without empty axes; got shape (0, 4)"),
    "complex target": ({"W": W.astype(np.complex64)}, "W must be real; got dtype complex64"),
    "complex weights": ({"weights": W.astype(np.complex64)}, "weights must be real; got dtype complex64"),
    "weights with one axis, rows": ({"weights": WEIGHTS[:, 0]}, "write weights[:, None] for one weight per row"),
    "weights with one axis, columns": ({"weights": WEIGHTS[0]}, "or weights[None, :] for one per column"),
    "weights of another shape": ({"weights": WEIGHTS.T}, "weights must broadcast to (5, 4); got shape (4, 5)"),
    "weights with three axes": ({"weights": WEIGHTS[None]}, "weights must broadcast to (5, 4); got shape (1, 5, 4)"),
    "negative weights": (
        {"weights": with_entry(WEIGHTS, -2, (1, 3), (2, 0), (4, 1))},
        "weights has 3 NaN, infinite or negative entries, the first -2.0 at (1, 3); wanted weights >= 0",
    ),
    "infinite weights": (
        {"weights": with_entry(WEIGHTS, np.inf, (1, 3))},
        "weights has 1 NaN, infinite or negative entries, the first inf at (1, 3)",
    ),
    "NaN weights": (
        {"weights": with_entry(WEIGHTS, np.nan, (4, 0))},
        "weights has 1 NaN, infinite or negative entries, the first nan at (4, 0)",
    ),
    "weights all zero": ({"weights": 0 * WEIGHTS}, "weights are all zero; wanted at least one positive weight"),
    "NaN in the target": (
        {"W": with_entry(W, np.nan, (0, 2), (3, 1))},
        "W has 2 NaN or infinite entries where the weight is positive, the first nan at (0, 2)",
    ),
    "infinity in the target": (
        {"W": with_entry(W, -np.inf, (3, 1))},
        "W has 1 NaN or infinite entries where the weight is positive, the first -inf at (3, 1)",
    ),
    "rank 0": ({"rank": 0}, "rank must be at least 1; got 0"),
    "rank above both axes": ({"rank": 5}, "rank must be in [1, 4] for W of shape (5, 4); got 5"),
    "unknown method": (
        {"method": "adam"},
        f"method must be one of {', '.join(map(repr, METHODS))}; got 'adam'",
    ),
    "unknown start": ({"start": "random"}, "start must be one of 'svd', 'fwsvd', 'separable'; got 'random'"),
    "unknown scaling": ({"scaling": "max"}, "scaling must be one of 'separable', 'none'; got 'max'"),
    "unknown projection": ({"projection": "qr"}, "projection must be one of 'subspace', 'svd'; got 'qr'"),
    "als with projection": (
        {"method": "als", "projection": "svd"},
        "method 'als' projects nothing: projection must be 'subspace'; got 'svd'",
    ),
    "Kronecker weights for an iteration": (
        {"weights": SPD},
        "Kronecker weights have a closed form only: write method='kronecker'; got method='anderson'",
    ),
    "Kronecker weights for another closed form": ({"weights": SPD, "method": "svd"}, "write method='kronecker'"),
    "method kronecker without Kronecker weights": (
        {"method": "kronecker"},
        "method 'kronecker' needs weights=wlra.Kronecker(row, col); got weights of entries",
    ),
    "left of another shape": (
        {"start": (LEFT[1:], RIGHT)},
        "start's left must have shape (5, 2); got (4, 2)",
    ),
    "right of another rank": ({"start": (LEFT, RIGHT[:1])}, "start's right must have shape (2, 4); got (1, 4)"),
    "NaN in left": (
        {"start": (with_entry(LEFT, np.nan, (2, 1)), RIGHT)},
        "start's left has 1 NaN or infinite entries, the first nan at (2, 1); wanted finite values",
    ),
    "infinity in right": (
        {"start": (LEFT, with_entry(RIGHT, np.inf, (1, 0)))},
        "start's right has 1 NaN or infinite entries, the first inf at (1, 0)",
    ),
    "complex left": ({"start": (LEFT.astype(np.complex64), RIGHT)}, "start's left must be real"),
    "negative tol": ({"tol": -0.1}, "tol bounds the stationarity, a number in [0, 1]; got -0.1"),
    "tol above one": ({"tol": 2.0}, "tol bounds the stationarity, a number in [0, 1]; got 2.0"),
    "NaN tol": ({"tol": float("nan")}, "tol bounds the stationarity, a number in [0, 1]; got nan"),
    "max_iters 0": ({"max_iters": 0}, "max_iters must be at least 1; got 0"),
    "patience 0": ({"patience": 0}, "patience must be at least 1; got 0"),
    "a penalty in both units": (
        {"ridge": 0.1, "nuclear": 2.0},
        "ridge and nuclear are one penalty in two units: give one; got 0.1 and 2.0",
    ),
    "negative ridge": ({"ridge": -0.1}, "ridge must be a finite number in [0, 1]; got -0.1"),
    "ridge above one": ({"ridge": 1.5}, "ridge must be a finite number in [0, 1]; got 1.5"),
    "negative nuclear": ({"nuclear": -1.0}, "nuclear must be a finite number >= 0; got -1.0"),
    "infinite nuclear": ({"nuclear": np.inf}, "nuclear must be a finite number >= 0; got inf"),
    "a penalty for a method without": (
        {"nuclear": 1.0, "method": "newton"},
        "nuclear needs one of the methods 'em', 'nesterov', 'anderson', 'als', 'als-anderson', 'lbfgs'; got 'newton'",
    ),
    "a penalty for a closed form": ({"ridge": 0.1, "method": "svd"}, "ridge needs one of the methods 'em', "),
    "restarts 0": ({"restarts": 0}, "restarts must be at least 1; got 0"),
    "restarts without a key": ({"restarts": 5}, "restarts are random: give key=jax.random.key(seed)"),
    "a Hessian too large": (
        {"W": np.ones((70, 65), np.float32), "weights": None, "rank": 64, "method": "varpro"},
        "method 'varpro' needs min(m, n) * rank <= 4096, for its dense Hessian; got 65 * 64 = 4160: use 'newton'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_solve_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(**{"W": W, "weights": WEIGHTS, "rank": K} | changes)


BATCH, BATCH_WEIGHTS = np.stack([W, W]), np.stack([WEIGHTS, WEIGHTS])
BATCH_REFUSED = {
    "target without batch": ({"W": W}, "W must be a (batch, m, n) array without empty axes; got shape (5, 4)"),
    "empty batch": ({"W": BATCH[:0]}, "without empty axes; got shape (0, 5, 4)"),
    "weights without batch": (
        {"weights": WEIGHTS},
        "got shape (5, 4): write all 3 axes, of length 1 where it is the same",
    ),
    "another number of weights": (
        {"weights": np.stack([WEIGHTS] * 3)},
        "weights must broadcast to (2, 5, 4); got shape (3, 5, 4)",
    ),
    "one problem without weights": (
        {"weights": BATCH_WEIGHTS * np.array([1, 0], np.float32)[:, None, None]},
        "weights are all zero in problem 1 of the batch",
    ),
    "NaN in the target": (
        {"W": with_entry(BATCH, np.nan, (1, 0, 2))},
        "W has 1 NaN or infinite entries where the weight is positive, the first nan at (1, 0, 2)",
    ),
    "start without batch": ({"start": (LEFT, RIGHT)}, "start's left must have shape (2, 5, 2); got (5, 2)"),
    "chunk 0": ({"chunk": 0}, "chunk must be at least 1; got 0"),
}


@pytest.mark.parametrize(("changes", "message"), BATCH_REFUSED.values(), ids=BATCH_REFUSED)
def test_solve_batch_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solve_batch(**{"W": BATCH, "weights": BATCH_WEIGHTS, "rank": K} | changes)


@pytest.mark.parametrize("start", [(LEFT, RIGHT, RIGHT), None, LEFT])
def test_a_start_that_is_neither_name_nor_pair_is_refused(start):
    with pytest.raises(ValueError, match=r"start must be the name of a closed form or a pair \(left, right\); got "):
        checks.check_pair(start, (M, N), K)


@pytest.mark.parametrize("name", ["rank", "max_iters", "patience"])
def test_a_count_that_is_not_an_integer_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer known before tracing; got 2.5"):
        checks.check_count(name, 2.5, 1)


def test_a_rank_that_a_caller_traces_is_refused():
    with pytest.raises(ValueError, match="rank must be an integer known before tracing"):
        jax.jit(lambda rank: checks.check_rank(rank, (M, N)))(2)


def test_a_name_that_is_not_a_string_is_refused():
    with pytest.raises(ValueError, match=re.escape("method must be one of 'em'; got ['em']")):
        checks.check_name("method", ["em"], ["em"])


def test_restarts_under_jit_are_refused():
    with pytest.raises(ValueError, match="restarts stop at a loss found twice, which needs values: call outside of"):
        jax.jit(lambda W: solve(W, WEIGHTS, K, restarts=5, key=jax.random.key(0)))(W)


BAD = {
    "NaN target": (with_entry(W, np.nan, (1, 1)), WEIGHTS, Status.INVALID_TARGET),
    "infinite target": (with_entry(W, np.inf, (1, 1)), WEIGHTS, Status.INVALID_TARGET),
    "NaN weights": (W, with_entry(WEIGHTS, np.nan, (1, 1)), Status.INVALID_WEIGHTS),
    "infinite weights": (W, with_entry(WEIGHTS, np.inf, (1, 1)), Status.INVALID_WEIGHTS),
    "negative weights": (W, with_entry(WEIGHTS, -1, (1, 1)), Status.INVALID_WEIGHTS),
    "weights all zero": (W, 0 * WEIGHTS, Status.INVALID_WEIGHTS),
    "all NaN": (W * np.nan, WEIGHTS * np.nan, Status.INVALID_WEIGHTS),
}


@jax.jit
def solve_both(W, weights):
    return {method: solve(W, weights, K, method=method) for method in ("anderson", "separable")}


def traced(W, weights, method):
    return solve_both(W, weights)[method]


@pytest.mark.parametrize("method", ["anderson", "separable"])
@pytest.mark.parametrize(("W", "weights", "status"), BAD.values(), ids=BAD)
def test_under_jit_a_status_says_the_same(W, weights, status, method):
    assert traced(W, weights, method).status == status


@pytest.mark.parametrize("method", ["anderson", "separable"])
@pytest.mark.parametrize(("W", "weights", "status"), BAD.values(), ids=BAD)
def test_under_jit_bad_values_give_finite_factors(W, weights, status, method):
    result = traced(W, weights, method)
    assert np.isfinite(result.left).all()
    assert np.isfinite(result.right).all()


@pytest.mark.parametrize("method", ["anderson", "separable"])
def test_nothing_is_solved_of_a_problem_that_is_invalid(method):
    result = traced(with_entry(W, np.nan, (1, 1)), WEIGHTS, method)
    assert result.iterations == 0
    assert result.loss == np.inf
    assert (np.asarray(result.history.loss) == np.inf).all()


def test_nan_in_the_target_where_the_weight_is_zero_is_no_fault():
    result = traced(with_entry(W, np.nan, (1, 1)), with_entry(WEIGHTS, 0, (1, 1)), "anderson")
    assert result.status not in (Status.INVALID_TARGET, Status.INVALID_WEIGHTS)


def test_lists_and_integers_are_taken():
    result = solve([[1, 2], [2, 4], [3, 6]], [[True, True]] * 3, 1, method="svd")
    np.testing.assert_allclose(result.left @ result.right, [[1, 2], [2, 4], [3, 6]], rtol=1e-6)  # some eps of float32


@pytest.mark.parametrize("shape", [(), (1, 1), (M, 1), (1, N), (M, N)])
def test_weights_broadcast(shape):
    weights = np.full(shape, 3, np.float32)
    np.testing.assert_array_equal(checks.check_weights(weights, (M, N)), np.full((M, N), 3))


def test_no_weights_are_equal_weights():
    np.testing.assert_array_equal(checks.check_weights(None, (M, N)), np.ones((M, N)))


def test_half_precision_is_solved_in_single_and_cast_back():
    half = jnp.asarray(W, jnp.bfloat16)
    got, wanted = solve(half, WEIGHTS, K, method="separable"), solve(np.float32(half), WEIGHTS, K, method="separable")
    np.testing.assert_array_equal(got.left, jnp.asarray(wanted.left, jnp.bfloat16))
    np.testing.assert_array_equal(got.right, jnp.asarray(wanted.right, jnp.bfloat16))
    assert got.loss == wanted.loss


PAIR, BAD_PAIR = (jnp.asarray(LEFT), jnp.asarray(RIGHT)), (jnp.asarray(LEFT) * np.nan, jnp.asarray(RIGHT))
ROOTS = Kronecker(jnp.eye(M), jnp.eye(N))
KNOWN = {
    "all": lambda: solve(jnp.asarray(W), WEIGHTS, K, start=PAIR),
    "the start": lambda W: solve(W, WEIGHTS, K, start=PAIR),
    "the factors of Kronecker weights": lambda W: solve(W, ROOTS, K, method="kronecker"),
}


@pytest.mark.parametrize("call", KNOWN.values(), ids=KNOWN)
def test_arrays_may_be_known_under_jit(call):
    arrays = () if call is KNOWN["all"] else (W,)
    assert jax.eval_shape(call, *arrays).loss.shape == ()  # where they cannot be looked at, tracing fails


def test_known_arrays_are_looked_at_under_jit():
    with pytest.raises(ValueError, match="start's left has 10 NaN or infinite entries"):
        jax.jit(lambda W: solve(W, WEIGHTS, K, start=BAD_PAIR))(W)
