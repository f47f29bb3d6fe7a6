"""A method of one's own is one object: it inherits scaling, stopping, batches, devices and programs of its own."""

import jax
import numpy as np
import pytest
import reference
from contract import cases
from jax.experimental.sparse import BCOO
from reference import product

import bert_adapter
import wlra
from bert_adapter.sample import sample_model
from wlra.door import check_problem
from wlra.linalg.decompose import balance
from wlra.methods.method import Evaluated
from wlra.options import check_options, prepare
from wlra.pipeline import solve_inputs
from wlra.problem import gradient_left, gradient_right

M, N, K = 10, 8, 2
RNG = np.random.default_rng(0)
W = RNG.normal(size=(M, N)).astype(np.float32)
WEIGHTS = np.exp(RNG.normal(size=(M, N))).astype(np.float32)


def descent(name, length):
    """Steepest descent on both factors, balanced before each step so that one length suits both."""

    def step(problem, factors, aux):
        factors = balance(factors)
        left, right = gradient_left(problem, factors), gradient_right(problem, factors)
        size = jax.numpy.linalg.norm(factors.right) ** 2
        return wlra.Factors(factors.left + length / size * left, factors.right + length / size * right), aux

    return wlra.Method(name, (wlra.Stage(lambda problem, factors: (factors, ()), step),), sparse=True)


TOY = descent("steepest descent", 0.5)


def solve(method, **options):
    return wlra.solve(W, WEIGHTS, K, method=method, max_iters=60, **options)


def test_a_method_of_ones_own_lowers_the_loss_of_its_start():
    result = solve(TOY)
    assert result.iterations > 0
    assert result.loss < result.history.loss[0]
    np.testing.assert_allclose(result.loss, reference.loss(W, WEIGHTS, product(result)), rtol=1e-5)


def test_a_batch_of_it_has_the_results_of_its_members():
    batch = wlra.solve_batch(np.stack([W, 2 * W]), WEIGHTS[None], K, method=TOY, max_iters=60)
    np.testing.assert_allclose(batch.loss, solve(TOY).loss, rtol=1e-5)
    assert batch.advice == [solve(TOY).advice] * 2


def test_a_model_is_compressed_by_it_saved_and_loaded(tmp_path):
    model = sample_model()
    batches = list(bert_adapter.text_batches(model, ["a red fox runs", "a dog", "far", "the fox"]))
    options = {
        "rank": 2,
        "include": "query",
        "signal": "exact",
        "method": TOY,
        "solver": {"start": "svd", "tol": 0.0, "max_iters": 20},
    }
    small, report = bert_adapter.compress(model, batches, **options)
    (kernel,) = report.kernels
    assert kernel.loss[TOY.name] < next(iter(kernel.loss.values()))
    bert_adapter.save(small, tmp_path)
    again = bert_adapter.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, small.params, again.params)


def test_it_solves_what_it_says_it_can_and_is_refused_what_it_cannot():
    start, (target, weights) = (W[:, :K], W[:K]), map(BCOO.fromdense, map(jax.numpy.asarray, (W, WEIGHTS)))
    stored = wlra.solve(target, weights, K, method=TOY, start=start, max_iters=60)
    assert stored.loss < stored.history.loss[0]
    np.testing.assert_allclose(stored.loss, reference.loss(W, WEIGHTS, product(stored)), rtol=1e-5)
    with pytest.raises(ValueError, match="ridge needs one of the methods 'em'"):
        solve(TOY, ridge=0.1)
    with pytest.raises(ValueError, match="projection must be 'subspace'"):
        solve(TOY, projection="svd")


def test_programs_are_those_of_a_methods_value_not_of_its_name():
    first, second = solve(TOY), solve(descent(TOY.name, 0.1))
    assert (first.history.loss[:5] != second.history.loss[:5]).any()


def test_a_closed_form_of_ones_own_is_a_method_too():
    def zeros(problem, rank, ranks):
        m, n = problem.target.shape
        none = wlra.Factors(jax.numpy.zeros((m, rank)), jax.numpy.zeros((rank, n)))
        return Evaluated(none, jax.numpy.float32(1), jax.numpy.float32(1))

    result = solve(wlra.Method("nothing", closed_form=zeros))
    assert (float(result.loss), int(result.status)) == (1.0, wlra.Status.CLOSED_FORM)


def test_a_method_without_an_algorithm_is_refused():
    with pytest.raises(ValueError, match="'empty' must have stages or a closed form"):
        solve(wlra.Method("empty"))


@pytest.mark.parametrize("method", cases(["svd", "fwsvd", "separable", "kronecker"], ["separable"]))
def test_a_closed_form_compiles_no_iterations(method):
    """With a driver that ran for no iteration, the program of "svd" had 3,909 lines, and that of "anderson" 4,785.

    The program is the one that XLA is given: the one that it makes of it is another on every kind of processor.
    """
    sides = wlra.Kronecker(np.eye(M, dtype=np.float32), np.eye(N, dtype=np.float32))
    weights = sides if wlra.METHODS[method].kronecker else WEIGHTS
    inputs, options = prepare(check_problem(W, weights), K, check_options(method))
    program = solve_inputs.lower(inputs, options).as_text(dialect="hlo")
    assert 0 < program.count("\n") <= 3909 / 2
