"""Signals become the weights of the solver, shrunk towards what is simpler as far as they are noise."""

import jax.numpy as jnp
import numpy as np
import pytest

import bert_adapter
import wlra
from bert_adapter.importance.sums import Importance, Sums
from bert_adapter.signals import SIGNALS
from bert_adapter.signals.definition import Evidence
from bert_adapter.signals.diagonal import separable_fit
from bert_adapter.signals.reliability import gram_reliability, reliability
from bert_adapter.signals.weights import solver_weights

RNG = np.random.default_rng(0)
SHAPE = (30, 20)
HALVES = jnp.asarray(RNG.gamma(1.0, size=(2, *SHAPE)), jnp.float32)
SUMS = Sums(
    fisher=HALVES,
    rows=jnp.arange(1.0, 31.0),
    inputs=jnp.eye(30),
    outputs=jnp.eye(20),
    row_gram=3 * jnp.eye(30),
    col_gram=4 * jnp.eye(20),
    gram_squares=jnp.float32(5),
)


def importance(sums=SUMS):
    return Importance({"a": sums}, examples=10, tokens=10, batches=1, gradients="labels", seed=0)


def weights(signal, shrink: float | None = 0.0, **options):
    return solver_weights(importance(**options), signal, {"a": SHAPE}, shrink)["a"]


def noisy(truth, examples):
    """Two halves of an estimate of the truth: means of exponential variables, whose variance is the square."""
    return jnp.asarray(truth * RNG.gamma(examples / 2, 2 / examples, size=(2, *truth.shape)) / 2, jnp.float32)


def test_separable_fit_has_the_sums_of_rows_and_columns():
    fisher = np.asarray(HALVES[0], np.float64)
    fit = np.asarray(separable_fit(HALVES[0]), np.float64)
    np.testing.assert_allclose(fit.sum(axis=0), fisher.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.sum(axis=1), fisher.sum(axis=1), rtol=1e-5)
    assert np.linalg.matrix_rank(fit, tol=1e-4) == 1


@pytest.mark.parametrize("examples", [4, 32, 256])
def test_reliability_is_the_share_of_the_deviation_that_is_real(examples):
    """Truth and noise are known: a lognormal field of spread 0.5 around row and column effects."""
    rows, cols = np.exp(RNG.normal(size=200)), np.exp(RNG.normal(size=300))
    truth = np.outer(rows, cols) * np.exp(0.5 * RNG.normal(size=(200, 300)))
    halves = noisy(truth, examples)
    fit = np.asarray(separable_fit(halves[0] + halves[1]), np.float64)
    real, all_of_it = np.sum((truth / fit - 1) ** 2), np.sum((np.asarray(halves.sum(axis=0)) / fit - 1) ** 2)
    np.testing.assert_allclose(reliability(halves), real / all_of_it, atol=0.03)  # 60000 entries


def test_what_is_separable_but_for_noise_has_no_reliability():
    truth = np.outer(np.exp(RNG.normal(size=200)), np.exp(RNG.normal(size=300)))
    assert reliability(noisy(truth, 16)) < 0.03
    assert reliability(jnp.asarray(np.stack([truth, truth]), jnp.float32)) <= 1


@pytest.mark.parametrize("examples", [8, 32, 256])
def test_reliability_of_grams_is_the_share_of_their_deviation_from_the_identity_that_is_real(examples):
    """Of gradients whose expectation is known; the mean over many draws of the estimate."""
    rows, got, real = np.exp(RNG.normal(size=8)), [], []
    for _ in range(200):
        gradients = np.sqrt(rows)[:, None] * RNG.normal(size=(examples, 8, 5))
        products = gradients @ np.swapaxes(gradients, 1, 2)
        gram, squares = products.sum(axis=0), np.sum(products**2)
        deviation = np.sum(gram**2) - np.trace(gram) ** 2 / 8
        got.append(gram_reliability(evidence(gram, squares, examples))[0] * deviation)
        real.append(deviation - np.sum((gram - 5 * examples * np.diag(rows)) ** 2))
    assert np.mean(got) == pytest.approx(np.mean(real), rel=0.1)


def evidence(gram, squares, examples):
    both = jnp.asarray(gram, jnp.float32)
    return Evidence(Sums(row_gram=both, col_gram=both, gram_squares=jnp.float32(squares)), examples, (8, 8))


def test_grams_of_one_example_or_of_the_identity_have_no_reliability():
    assert gram_reliability(evidence(np.diag([1.0, 2.0]), 5.0, 1)) == (0, 0)
    assert gram_reliability(evidence(np.eye(2), 1.0, 8)) == (0, 0)


def test_more_examples_are_more_reliable():
    truth = np.exp(RNG.normal(size=(100, 100)))
    values = [reliability(noisy(truth, examples)) for examples in (2, 8, 32, 128)]
    assert values == sorted(values)


@pytest.mark.parametrize("signal", ["fisher", "exact"])
def test_diagonal_is_the_sum_of_both_halves(signal):
    np.testing.assert_allclose(weights(signal), HALVES[0] + HALVES[1], rtol=1e-6)


def test_shrink_blends_with_the_separable_fit():
    fisher = HALVES[0] + HALVES[1]
    np.testing.assert_allclose(weights("fisher", 1.0), separable_fit(fisher), rtol=1e-5)
    np.testing.assert_allclose(weights("fisher", 0.25), 0.75 * fisher + 0.25 * separable_fit(fisher), rtol=1e-5)


def test_shrink_is_by_default_what_is_not_reliable():
    np.testing.assert_allclose(weights("fisher", None), weights("fisher", 1 - reliability(HALVES)), rtol=1e-5)


@pytest.mark.parametrize(("signal", "rows"), [("shampoo", "row_gram"), ("kfac", "inputs"), ("activation", "inputs")])
def test_grams_are_shrunk_towards_the_identity_of_the_same_trace(signal, rows):
    gram = np.diag(np.arange(1.0, 31.0)) + 0.5
    got = weights(signal, 0.25, sums=SUMS._replace(**{rows: jnp.asarray(gram, jnp.float32)})).row
    np.testing.assert_allclose(got, 0.75 * gram + 0.25 * 16 * np.eye(30), rtol=1e-6)  # the mean of 1.5, ..., 30.5


def test_grams_are_by_default_shrunk_as_far_as_they_are_noise():
    gram = jnp.asarray(np.diag(np.arange(1.0, 31.0)), jnp.float32)
    sums = SUMS._replace(row_gram=gram, gram_squares=jnp.sum(gram**2) / 4)
    share = 1 - gram_reliability(Evidence(sums, 10, SHAPE))[0]
    assert 0 < share < 1
    got, wanted = (weights("shampoo", shrink, sums=sums).row for shrink in (None, share))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_other_signals_are_what_the_solver_takes():
    np.testing.assert_array_equal(weights("fwsvd"), np.arange(1.0, 31.0)[:, None])
    assert weights("svd") is None
    for signal in ("kfac", "activation", "shampoo", "combined"):
        got = weights(signal)
        assert isinstance(got, wlra.Kronecker)
        assert (got.row.shape, got.col.shape) == ((30, 30), (20, 20))


def test_shampoo_is_the_fisher_information_where_that_is_a_kronecker_product():
    """Gradients G = L Z R for every Z of one entry 1: their outer products sum to the product of L L' and R' R."""
    left, right = RNG.normal(size=(3, 3)), RNG.normal(size=(4, 4))
    gradients = [np.outer(left[:, i], right[j]) for i in range(3) for j in range(4)]
    grams = [np.sum([g @ g.T for g in gradients], axis=0), np.sum([g.T @ g for g in gradients], axis=0)]
    sums = Sums(
        row_gram=jnp.asarray(grams[0], jnp.float32),
        col_gram=jnp.asarray(grams[1], jnp.float32),
        gram_squares=jnp.float32(1),
    )
    got = weights("shampoo", sums=sums)
    fisher = np.sum([np.outer(g.ravel(), g.ravel()) for g in gradients], axis=0)
    np.testing.assert_allclose(np.kron(got.row, got.col), fisher, rtol=1e-4, atol=1e-5)


def test_half_of_the_default_along_inputs_is_what_enters():
    """Scaled to the same trace; nothing enters a layer whose inputs are zero."""
    for inputs, share in ((np.diag(np.arange(2.0, 32.0)), 0.5), (np.zeros((30, 30)), 0.0)):
        sums = SUMS._replace(inputs=jnp.asarray(inputs, jnp.float32))
        got, marginals = (weights(signal, sums=sums) for signal in ("combined", "shampoo"))
        wanted = 0.5 * np.asarray(marginals.row) + share * inputs * 90 / max(np.trace(inputs), 1)
        np.testing.assert_allclose(got.row, wanted, rtol=1e-5)
        np.testing.assert_array_equal(got.col, marginals.col)


def test_the_default_keeps_what_enters_where_gradients_see_nothing():
    """The first input is large, and the loss flat in it; its row of the kernel would be lost at a small rank."""
    kernel, gram, inputs = RNG.normal(size=SHAPE).astype(np.float32), np.eye(30), np.eye(30)
    gram[0, 0], inputs[0, 0] = 0, 900
    sums = SUMS._replace(row_gram=jnp.asarray(gram, jnp.float32), inputs=jnp.asarray(inputs, jnp.float32))
    lost = {}
    for signal in ("combined", "shampoo"):
        result = wlra.solve(kernel, weights(signal, sums=sums), 3, method="kronecker")
        row = kernel[0] - np.asarray(result.left)[0] @ np.asarray(result.right)
        lost[signal] = np.sum(row**2) / np.sum(kernel[0] ** 2)
    assert lost["combined"] < 0.05  # it weighs 15 times all other rows
    assert lost["shampoo"] > 0.5


@pytest.mark.parametrize("signal", [name for name, signal in SIGNALS.items() if signal.statistics])
def test_what_was_not_measured_is_named(signal):
    with pytest.raises(ValueError, match=f"signal '{signal}' needs .* of a, which were not measured: measure_signal"):
        weights(signal, sums=Sums())


def test_registry_and_signals_agree_on_their_names():
    assert [signal.name for signal in SIGNALS.values()] == list(SIGNALS)


def test_a_signal_may_be_passed_as_itself():
    np.testing.assert_array_equal(weights(SIGNALS["fwsvd"]), weights("fwsvd"))


def test_reliability_is_known_where_the_signal_can_tell():
    params = {"a": {"kernel": np.ones(SHAPE, np.float32)}}
    known = {name: bert_adapter.decompose(params, importance(), signal=name).reliability for name in SIGNALS}
    assert known["combined"] == known["shampoo"] == {"a": min(gram_reliability(Evidence(SUMS, 10, SHAPE)))}
    assert known["exact"] == known["fisher"] == {"a": reliability(HALVES)}
    assert {name for name, found in known.items() if not found} == {"kfac", "activation", "fwsvd", "svd"}
