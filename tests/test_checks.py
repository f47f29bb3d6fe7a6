"""What cannot be used is refused before work starts, with a message that says what and where."""

import decimal
import fractions
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO

from wlra import METHODS, Kronecker, Status, checks, select_rank, solve, solve_batch, solve_path
from wlra.api import on_device
from wlra.door import check_problem, in_units

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
    "restarts of a closed form": (
        {"restarts": 5, "method": "svd"},
        "restarts needs a method that iterates; got 'svd', which has one result",
    ),
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
        checks.check_start(start, (M, N), K)


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


def test_ranks_that_a_caller_traces_are_refused():
    with pytest.raises(ValueError, match="ranks must be known before a caller traces"):
        jax.eval_shape(lambda ranks: solve_batch(W[None], None, K, ranks=ranks, method="svd"), np.array([1]))


def test_advice_inside_jit_is_refused():
    with pytest.raises(TypeError, match="advice is text: read it outside of jit"):
        jax.eval_shape(lambda W: solve(W, None, K, method="svd").advice, W)


def test_a_start_that_cannot_be_is_refused_of_closed_forms_too():
    with pytest.raises(ValueError, match="start"):
        solve(W, None, K, method="svd", start=(np.full((M, K), np.nan, np.float32), RIGHT))


@pytest.mark.parametrize("method", ["svd", "em"])
def test_traced_weights_of_which_float32_loses_some_are_invalid(method):
    weights, target = np.full((M, N), np.float32(1e-20)), W.copy()
    weights[0], target[0] = 1e20, 0  # all that counts fits exactly
    found = jax.vmap(lambda weights: solve(target, weights, K, method=method))(np.stack([weights, WEIGHTS]))
    assert found.status[0] == Status.INVALID_WEIGHTS != found.status[1]
    assert solve(target, weights, K, method=method).loss > 0.1  # in float64, where values are known


@pytest.mark.parametrize(
    ("unit", "wrong"), [("ridge", -0.5), ("ridge", np.nan), ("ridge", 3), ("nuclear", -1), ("nuclear", np.inf)]
)
def test_a_traced_penalty_that_cannot_be_is_certified_no_minimum(unit, wrong):
    found = penalised_by(unit)(np.float32(wrong))
    assert (found.status, found.loss, found.gap) == (Status.INVALID_PENALTY, np.inf, np.inf)
    assert np.isfinite(found.left).all()
    assert penalised_by(unit)(np.float32(0.5)).gap < 1


@functools.cache
def penalised_by(unit):
    return jax.jit(lambda penalty: solve(W, WEIGHTS, K, method="em", **{unit: penalty}))


def test_derivatives_are_finite_where_a_row_has_no_weight():
    weights = WEIGHTS.copy()
    weights[0] = 0
    slopes = jax.grad(lambda weights: solve(W, weights, K, method="separable").loss)(weights)
    assert np.isfinite(slopes).all()
    assert np.abs(slopes[1:]).max() > 0


def test_an_array_on_an_explicit_mesh_needs_the_mesh():
    types = {"axis_types": (jax.sharding.AxisType.Explicit,)} if hasattr(jax.sharding, "AxisType") else {}
    mesh = jax.make_mesh((1,), ("x",), **types)
    placed = jax.device_put(W, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None)))
    if types:
        with pytest.raises(ValueError, match=r"W lies on an explicit mesh: wanted mesh=W\.sharding\.mesh too"):
            solve(placed, WEIGHTS, K)
    np.testing.assert_allclose(solve(placed, None, K, mesh=mesh).loss, solve(W, None, K).loss, rtol=1e-4)


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
    "subnormal target": (W * np.float32(1e-40), WEIGHTS, Status.INVALID_TARGET),
    "subnormal weights": (W, WEIGHTS * np.float32(1e-40), Status.INVALID_WEIGHTS),
    "some subnormal weights": (W, with_entry(WEIGHTS, 1e-40, (1, 1)), Status.INVALID_WEIGHTS),
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


KEYS = np.arange(4)  # stands for keys that are made in the test: none is at import


def through_the_door(W, weights=None):
    """Target and weights as the solver gets them, in the caller's units, in extended precision."""
    target, weight, units = in_units(check_problem(W, weights))
    assert target.dtype in (np.float32, jnp.bfloat16, np.float16)
    assert weight.dtype == np.float32
    return tuple(
        np.ldexp(np.float64(array).astype(np.longdouble), exponent)
        for array, exponent in zip((target, weight), units, strict=True)
    )


WHOLE = np.arange(1, 13).reshape(4, 3)
SEEN = WHOLE != 5
HALVES = [[fractions.Fraction(int(x), 2) for x in row] for row in WHOLE]
KINDS: dict[str, Any] = {  # an input, and the numbers in it
    "64 bits": (WHOLE * 2**40, WHOLE * 2.0**40),
    "64 bits, unsigned": (WHOLE.astype(np.uint64) + np.uint64(2**63), WHOLE + 2.0**63),
    "more than 64 bits": ((WHOLE.astype(object) * 2**70).tolist(), WHOLE * 2.0**70),
    "another byte order": (WHOLE.astype(">f8"), WHOLE),
    "integers of another byte order": (WHOLE.astype(">i2"), WHOLE),
    "extended precision": (WHOLE.astype(np.longdouble), WHOLE),
    "tiny": (WHOLE * 2.0**-140, WHOLE * 2.0**-140),
    "large": (WHOLE * 2.0**130, WHOLE * 2.0**130),
    "tiny in float32": ((WHOLE * 2.0**-145).astype(np.float32), WHOLE * 2.0**-145),
    "tiny, of JAX": (jnp.asarray((WHOLE * 2.0**-145).astype(np.float32)), WHOLE * 2.0**-145),
    "bfloat16": (jnp.asarray(WHOLE, jnp.bfloat16), WHOLE),
    "eight bits": (jnp.asarray(WHOLE, jnp.float8_e5m2), np.float32(jnp.asarray(WHOLE, jnp.float8_e5m2))),
    "four bits": (jnp.asarray(WHOLE % 8, jnp.int4), WHOLE % 8),
    "fractions": (HALVES, WHOLE / 2),
    "decimals": ([[decimal.Decimal(int(x)) / 4 for x in row] for row in WHOLE], WHOLE / 4),
    "objects": (WHOLE.astype(object), WHOLE),
    "booleans among floats": ([[True, 2.5]], [[1, 2.5]]),
    "backwards": (WHOLE[::-1, ::-1], WHOLE[::-1, ::-1]),
    "broadcast, read only": (np.broadcast_to(WHOLE[:1], (4, 3)), np.broadcast_to(WHOLE[:1], (4, 3))),
    "arrays of JAX in a list": ([jnp.asarray(row, jnp.float32) for row in WHOLE], WHOLE),
    "of JAX, of several integers": (
        [jnp.array([3_000_000_000, 1], jnp.uint32), jnp.array([1, 2], jnp.int32)],
        [[3e9, 1], [1, 2]],
    ),
    "of JAX, half and whole": ([jnp.array([1, 3], jnp.bfloat16), jnp.array([257, 771])], [[1, 3], [257, 771]]),
    "of JAX, half and large": ([jnp.array([1, 3], jnp.float16), jnp.array([10**5, 2])], [[1, 3], [10**5, 2]]),
}


@pytest.mark.parametrize(("value", "wanted"), KINDS.values(), ids=KINDS)
def test_numbers_arrive_as_they_are(value, wanted):
    # To the half unit in the last place of float32; all but 2**63 are exact.
    np.testing.assert_allclose(through_the_door(value)[0], np.asarray(wanted, np.longdouble), rtol=2**-24, atol=0)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-140, 1.0, 2.0**130, 2.0**1000])
def test_only_proportions_of_weights_matter(scale):
    target, weight = through_the_door(WHOLE, scale * WHOLE)
    np.testing.assert_array_equal(weight, np.longdouble(scale) * WHOLE)
    np.testing.assert_array_equal(target, WHOLE)


def test_each_problem_of_a_batch_has_its_own_scale():
    scale = np.array([2.0**-140, 1.0, 2.0**130])
    target, _, units = in_units(check_problem(scale[:, None, None] * WHOLE, None, batched=True))
    np.testing.assert_array_equal(
        np.ldexp(np.float64(target), units.target[:, None, None]), scale[:, None, None] * WHOLE
    )


def test_what_has_weight_zero_does_not_set_the_scale():
    target, _ = through_the_door(np.where(SEEN, WHOLE * 2.0**-140, 1e300), SEEN)
    np.testing.assert_array_equal(target[SEEN], (WHOLE * 2.0**-140)[SEEN])


MASKED = np.ma.masked_array(np.where(SEEN, WHOLE, -7), ~SEEN)
HIDING = {
    "target": (MASKED, None),
    "target, weights of JAX": (MASKED, jnp.ones((4, 3))),
    "target, in a list": (list(MASKED), 2.0),
    "target of objects": (np.ma.masked_array(np.where(SEEN, WHOLE.astype(object), "?"), ~SEEN), None),
    "weights": (WHOLE, np.ma.masked_array(np.ones((4, 3)), ~SEEN)),
    "both": (MASKED, np.ma.masked_array(WHOLE, ~SEEN)),
}


@pytest.mark.parametrize(("W", "weights"), HIDING.values(), ids=HIDING)
def test_a_masked_entry_has_weight_zero(W, weights):
    target, weight = through_the_door(W, weights)
    np.testing.assert_array_equal(weight > 0, SEEN)
    np.testing.assert_array_equal(target[SEEN], WHOLE[SEEN])


def test_no_positive_weight_becomes_zero():
    weight = np.where(SEEN, 1.0, 1e-300)
    given = check_problem(WHOLE, weight)
    assert (in_units(given)[1] > 0).all()


def test_data_frames_are_taken_by_position_or_not_at_all():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(WHOLE).astype("Int64")
    target, weight = through_the_door(table, pandas.DataFrame(WHOLE / 2, columns=list("abc")))
    np.testing.assert_array_equal(target, WHOLE)
    np.testing.assert_array_equal(weight, WHOLE / 2)
    with pytest.raises(ValueError, match=r"weights must have the index of W in its order: write weights.reindex_like"):
        check_problem(table, table[::-1])
    with pytest.raises(ValueError, match="weights must have the columns of W in its order"):
        check_problem(table, table[[1, 0, 2]])
    with pytest.raises(ValueError, match="weights must have the index of W in its order"):
        solve_batch([table], [table[::-1]], 1)
    table.iloc[1, 2] = pandas.NA
    with pytest.raises(ValueError, match=r"W has 1 NaN .*, the first nan at \(1, 2\)"):
        check_problem(table, None)
    np.testing.assert_array_equal(through_the_door(table, SEEN * [[1.0], [0.0], [1.0], [1.0]])[0][2:], WHOLE[2:])


NO_NUMBERS = {
    "text": (WHOLE.astype(str), "must hold numbers"),
    "text among numbers": (np.where(SEEN, WHOLE.astype(object), "5"), "must hold numbers"),
    "bytes": (WHOLE.astype(bytes), "must hold numbers"),
    "complex": (WHOLE + 0j, "must be real|Complex data not supported"),
    "dates": (WHOLE.astype("datetime64[D]"), "must hold numbers"),
    "spans of time": (WHOLE.astype("timedelta64[D]"), "must hold numbers"),
    "None": (None, "must be an array of numbers; got (a )?None"),
    "nothing known": (np.full((4, 3), None), "NaN"),
    "a dictionary": ({1: 2}, "must be an array of numbers; got a dict"),
    "rows of unequal length": ([[1, 2], [3]], "must be an array of numbers; got a list"),
    "records": (np.zeros((4, 3), [("a", "f4")]), "must hold numbers|structured|void"),
    "a number": (3.0, r"got shape \(\)|scalar array"),
    "one axis": (WHOLE[0], "got shape|1D array"),
    "four axes": (WHOLE[None, None], "got shape|dim 4"),
    "empty": (WHOLE[:0], "empty axes|0 sample"),
    "beyond float64": ([[10**400, 1], [1, 1]], "must hold numbers that float64 holds|too large"),
    "too small for float64": ([[decimal.Decimal("1e-400"), 1], [1, 1]], "must hold numbers that float64 holds"),
    "a signal among decimals": ([[decimal.Decimal("sNaN"), 1], [1, 1]], "must hold numbers that float64 holds"),
    "a span of time among objects": (np.array([[np.timedelta64(5, "ns"), 2.0]], object), "must hold numbers"),
    "a span of seconds among objects": (np.array([[np.timedelta64(5, "s"), 2.0]], object), "must hold numbers"),
    "a date among objects": (np.array([[np.datetime64("2020-01-01"), 2.0]], object), "must hold numbers"),
    "sparse, in a list": ([scipy.sparse.csr_array(WHOLE)], "must be dense here; got a list of csr_array"),
    "beyond the factors": (WHOLE * 1e80, "too large for factors in float32: give W in other units, or enable float64"),
    "sparse": (scipy.sparse.csr_array(WHOLE), "must be one of .* for a sparse W|must be dense"),
    "sparse, of JAX": (BCOO.fromdense(jnp.asarray(WHOLE)), "must be one of .* for a sparse W|must be dense"),
}


def test_a_start_that_is_none_is_refused_of_closed_forms_too():
    with pytest.raises(ValueError, match=r"start must be one of .*; got 'nonsense'"):
        solve(WHOLE, None, 1, method="svd", start="nonsense")


DOORS: dict[str, Any] = {
    "solve": lambda W, weights: solve(W, weights, 1, method="svd"),
    "solve_batch": lambda W, weights: solve_batch(W, weights, 1, method="svd"),
    "solve_path": lambda W, weights: solve_path(W, weights, [1], method="svd"),
    "select_rank": lambda W, weights: select_rank(W, weights, [1], key=jax.random.key(0), method="svd"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("value", "message"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_target_is_refused_at_every_door(value, message, door):
    if door == "solve_batch" and isinstance(value, np.ndarray):
        value = value[None]
    with pytest.raises(ValueError, match=message):
        DOORS[door](value, None)


@pytest.mark.parametrize(
    "kind", ["text", "complex", "dates", "spans of time", "sparse", "sparse, of JAX", "nothing known"]
)
@pytest.mark.parametrize("door", DOORS)
def test_what_are_no_weights_is_refused_at_every_door(kind, door):
    value, message = NO_NUMBERS[kind]
    target = WHOLE[None] if door == "solve_batch" else WHOLE
    with pytest.raises(ValueError, match=message):
        DOORS[door](target, value[None] if door == "solve_batch" and isinstance(value, np.ndarray) else value)


NO_OPTIONS: dict[str, Any] = {
    "rank that is true": ({"rank": True}, "rank must be an integer known before tracing; got True"),
    "masked start": (
        {"start": (np.ma.masked_array(LEFT, LEFT > 0), RIGHT)},
        "start's left must not be masked: fill it, or give W or weights as the masked array",
    ),
    "sparse start": (
        {"start": (scipy.sparse.csr_array(LEFT), RIGHT)},
        "start's left must be dense here; got a csr_array",
    ),
    "sparse factor of Kronecker weights": (
        {"weights": Kronecker(scipy.sparse.eye_array(M), np.eye(N)), "method": "kronecker"},
        "weights.row must be dense here",
    ),
    "masked target of Kronecker weights": (
        {"W": np.ma.masked_array(W, W > 1), "weights": SPD, "method": "kronecker"},
        "W must not be masked: Kronecker weights skip no entry",
    ),
}


@pytest.mark.parametrize(
    "value",
    [
        *("0.1", None, 1j, True, np.ma.masked, [0.1], np.datetime64("2020-01-01"), np.nan),
        *(np.timedelta64(0, "s"), np.timedelta64(0, "ns"), decimal.Decimal("sNaN")),
    ],
)
def test_what_is_no_number_is_no_tolerance_and_no_penalty(value):
    with pytest.raises(ValueError, match=r"tol bounds the stationarity, a number in \[0, 1\]; got "):
        checks.check_tol(value)
    with pytest.raises(ValueError, match="nuclear must be a finite number >= 0; got "):
        checks.check_penalty(None, "none" if value is None else value)


@pytest.mark.parametrize("value", [1, np.int64(1), np.float32(1), np.array(1.0), jnp.array(1), decimal.Decimal(1)])
def test_numbers_of_any_kind_are_taken(value):
    assert checks.check_tol(value) == 1.0


@pytest.mark.parametrize(
    "key", [None, 0, np.ones(2), "key", np.zeros(3, np.uint32), np.zeros((2, 2), np.uint32), KEYS], ids=str
)
def test_what_is_no_key_is_refused(key):
    key = jax.random.split(jax.random.key(0)) if key is KEYS else key
    with pytest.raises(ValueError, match=r"key must be one of jax.random, such as jax.random.key\(0\); got "):
        checks.check_key(key)


def test_keys_of_both_kinds_are_taken():
    assert checks.check_key(jax.random.key(0)).shape == ()
    assert checks.check_key(jax.random.PRNGKey(0)).shape == (2,)


def test_counts_beyond_32_bits_are_never_and_refused():
    assert solve(W, WEIGHTS, K, method="em", patience=2**63 - 1, max_iters=3).iterations == 3
    with pytest.raises(ValueError, match="max_iters must be at most 2147483646; got 2147483647"):
        solve(W, None, K, max_iters=2**31 - 1)
    with pytest.raises(ValueError, match=r"tol bounds the stationarity, a number in \[0, 1\]; got 1"):
        checks.check_tol(2**2000)


@pytest.mark.parametrize(("changes", "message"), NO_OPTIONS.values(), ids=NO_OPTIONS)
def test_what_is_no_option_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(**{"W": W, "weights": WEIGHTS, "rank": K, "method": "als"} | changes)


@pytest.mark.parametrize(
    ("unit", "heavy"), [(2.0**-140, 1.0), (2.0**130, 2.0**-140), (1.0, 2.0**140), (2.0**-62, 2.0**70)]
)
def test_units_beyond_float32_change_nothing(unit, heavy):
    target, weights = W.astype(np.float64), WEIGHTS.astype(np.float64)
    plain = solve(W, WEIGHTS, K, method="separable")
    result = solve(unit * target, heavy * weights, K, method="separable")
    products = [np.asarray(each.left, np.float64) @ np.asarray(each.right, np.float64) for each in (plain, result)]
    np.testing.assert_allclose(products[1], unit * products[0], rtol=1e-12)
    assert result.loss == plain.loss


def test_a_penalty_is_in_the_callers_units_beyond_float32():
    plain = solve(W, WEIGHTS, K, method="als", nuclear=1.0)
    unit, heavy = 2.0**-140, 2.0**-60
    result = solve(unit * np.float64(W), heavy * np.float64(WEIGHTS), K, method="als", nuclear=unit * heavy)
    products = [np.asarray(each.left, np.float64) @ np.asarray(each.right, np.float64) for each in (plain, result)]
    np.testing.assert_allclose(products[1], unit * products[0], rtol=1e-12)


def test_weights_too_far_apart_for_float32_are_solved_in_float64_and_cast_back():
    weights = 10.0 ** np.linspace(-8, 8, M)[:, None] * 10.0 ** np.linspace(15, -15, N)[None, :]
    result = solve(W, weights, K, method="separable")  # exact for weights of rank one
    assert result.left.dtype == result.loss.dtype == np.float32
    scaled = np.sqrt(weights) * W
    values = np.linalg.svd(scaled, compute_uv=False)
    lowest = (values[K:] ** 2).sum() / (values**2).sum()  # of a graded matrix
    assert lowest <= result.loss <= lowest + np.finfo(np.float32).eps ** 2  # what rounding the factors leaves


def test_the_loss_is_that_of_the_factors_as_they_are_cast_back():
    """In float32 the product is not as near zero as it has to be where weights are 1e30: what is returned says so."""
    rng = np.random.default_rng(0)
    W, weights = rng.poisson(0.3, size=(6, 15)).astype(np.float32), 10.0 ** rng.uniform(-30, 30, size=(6, 15))
    weights = weights.astype(np.float32)
    for method in ("fwsvd", "newton"):
        result = solve(W, weights, 2, method=method)
        left, right = (np.asarray(factor, np.float64) for factor in result[:2])
        shares = weights.astype(np.float64) / weights.max()
        true = np.sum(shares * (W - left @ right) ** 2) / np.sum(shares * W**2)
        np.testing.assert_allclose(result.loss, true, rtol=1e-5)
        assert result.loss <= 1
        assert result.loss < 1e-8 or not result.converged


def test_where_all_that_counts_is_zero_nothing_else_is_looked_at():
    W, weights = np.array([[0, 3], [2, 5]], np.float32), np.array([[1, 0], [0, 0]], np.float32)
    for unit in (1e-3, 1, 1e6):
        for method in ("svd", "fwsvd", "separable"):
            result = solve(unit * W, weights, 1, method=method)
            assert not np.any(result.left @ result.right)
            assert result.loss == 0


def test_weights_too_far_apart_are_refused_where_values_are_traced():
    weights = np.full((M, N), 1e-60)
    weights[0, 0] = 1
    with pytest.raises(ValueError, match="weights are too far apart for float32, from 1e-60 to 1:"):
        jax.eval_shape(lambda W: solve(W, weights, K), W)


FAR = 10.0 ** np.linspace(-30, 30, M * N).reshape(M, N)


@pytest.mark.parametrize("name", ["tol", "nuclear"])
def test_weights_too_far_apart_are_refused_where_options_are_traced(name):
    with pytest.raises(ValueError, match="weights are too far apart for float32, from 1e-30 to 1e"):
        jax.eval_shape(lambda value: solve(W, FAR, K, **{name: value}), 0.1)


def test_a_tolerance_may_be_traced_where_all_else_is_known():
    given = solve_batch(W[None], None, K, method="svd").loss
    tolerances = jnp.array([0.1, 0.2])
    one = jax.vmap(lambda tol: solve(W, None, K, method="svd", tol=tol).loss)(tolerances)
    several = jax.jit(lambda tol: solve_batch(W[None], None, K, method="svd", tol=tol).loss)(0.1)
    np.testing.assert_allclose(one, np.repeat(given, 2), rtol=1e-5)
    np.testing.assert_allclose(several, given, rtol=1e-5)


def test_a_path_of_traced_penalties_is_refused():
    with pytest.raises(ValueError, match="nuclear is put in order, and must be known"):
        jax.eval_shape(lambda value: solve_path(W, None, rank=K, nuclear=[value, 2 * value]), 1.0)


@pytest.mark.parametrize("weights", ["1e400", "1e-400"])
def test_weights_that_no_float64_holds_are_refused(weights):
    if np.finfo(np.longdouble).maxexp < 2000:
        pytest.skip("no extended precision here")
    some = np.ones((M, N), np.longdouble)
    some[0] = np.longdouble(weights)
    for call in (solve, lambda W, weights, rank: select_rank(W, weights, [rank], key=jax.random.key(0))):
        with pytest.raises(ValueError, match="weights must be numbers that float64 holds, or in other units"):
            call(W, some, K)


def test_columns_of_a_start_may_be_of_any_size():
    """The product of each with its row is an ordinary matrix."""
    left, right = np.float64(LEFT + W[:, :K]), np.float64(RIGHT + W[:K])
    size = np.array([1e-90, 1e90])
    near = solve(W, WEIGHTS, K, start=(left, right), method="em", max_iters=3)
    far = solve(W, WEIGHTS, K, start=(left * size, right / size[:, None]), method="em", max_iters=3)
    np.testing.assert_allclose(far.left @ far.right, near.left @ near.right, rtol=1e-3, atol=1e-4)


def test_what_the_caller_changes_afterwards_is_not_read():
    mine, theirs = W.copy(), WEIGHTS.copy()
    given = check_problem(mine, theirs)
    target, weights, _ = jax.tree.map(on_device, in_units(given))
    mine[:], theirs[:] = np.nan, -1
    np.testing.assert_array_equal(target, W)
    np.testing.assert_array_equal(weights, WEIGHTS)


def test_the_loss_is_that_of_the_factors_in_the_targets_dtype_where_float64_is_enabled(x64):
    rng = np.random.default_rng(0)
    W, weights = rng.poisson(0.3, size=(6, 15)).astype(np.float32), 10.0 ** rng.uniform(-30, 30, size=(6, 15))
    for method in ("fwsvd", "newton"):
        result = solve(W, weights, 2, method=method)
        left, right = (np.asarray(factor, np.float64) for factor in result[:2])
        true = np.sum(weights * (W - left @ right) ** 2) / np.sum(weights * W**2)
        assert result.left.dtype == np.float32
        np.testing.assert_allclose(result.loss, true, rtol=1e-5)


def test_half_precision_comes_back_from_float64_too():
    weights = 10.0 ** np.linspace(-30, 30, 20).reshape(5, 4)
    result = solve(jnp.ones((5, 4), jnp.bfloat16), weights, 1, method="separable")
    assert result.left.dtype == result.right.dtype == jnp.bfloat16
    left, right = (np.asarray(factor, np.float64) for factor in result[:2])
    true = np.sum(weights * (1 - left @ right) ** 2) / np.sum(weights)
    np.testing.assert_allclose(result.loss, true, rtol=1e-5)


@pytest.mark.parametrize(("fill", "dtype"), [(3e38, np.float32), (7.0, np.float64), (3e38, np.float64)])
def test_what_traced_weights_hide_does_not_set_the_scale(fill, dtype):
    target, seen = np.outer([1.0, 2, 3, 4], [1.0, 0.5, 2]), np.ones((4, 3), np.float32)
    seen[0, 1] = 0
    hidden = np.where(seen > 0, target, fill).astype(dtype)
    result = jax.jit(lambda seen: solve(hidden, seen, 1))(seen)
    assert result.converged
    np.testing.assert_allclose((result.left @ result.right)[seen > 0], target[seen > 0], rtol=1e-5)


def test_what_traced_weights_may_hide_is_refused_where_it_wipes_out_the_rest():
    with pytest.raises(ValueError, match="W has entries from 1 to 1e\\+50, too far apart for float32: hide entries by"):
        jax.jit(lambda seen: solve(np.array([[1, 1e50], [1, 1]]), seen, 1))(np.ones((2, 2), np.float32))


def test_sides_of_data_frames_in_another_order_are_refused():
    pandas = pytest.importorskip("pandas")
    names, side = list("abcd"), np.diag([1.0, 2, 3, 4])
    frame = pandas.DataFrame(np.ones((4, 5)), index=names)
    row = pandas.DataFrame(side, index=names, columns=names)
    solve(frame, Kronecker(row, np.eye(5)), 1, method="kronecker")
    for given in (row.loc[names[::-1], names[::-1]], row.loc[names, names[::-1]]):
        with pytest.raises(ValueError, match=r"weights\.row must have the index of W along both axes"):
            solve(frame, Kronecker(given, np.eye(5)), 1, method="kronecker")
    with pytest.raises(ValueError, match=r"weights\.row must have its index along both axes"):
        solve(np.ones((4, 5)), Kronecker(row.loc[names, names[::-1]], np.eye(5)), 1, method="kronecker")
