"""Any Linen model runs on factors as on the kernel that they multiply out to, and says so where it cannot."""

import copy
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import ARCHITECTURES, BATCH, CLASSIFIER, EPS, random_params, split

from bert_adapter.layers.marker import FACTORISED, Factorised
from bert_adapter.layers.running import apply, factorised, kernel_shapes

ADVICE = r"with bert_adapter.factorised\(\).*bert_adapter.apply\(module, params.*bert_adapter.merge\(params\)"


class Inner(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(5, dtype=self.dtype, name="middle")(x))


class Net(nn.Module):
    """Nothing of BERT: dense layers of three widths, the last without a bias, one below another module."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, dtype=self.dtype, name="first")(x))
        x = Inner(self.dtype, name="inner")(x)
        return nn.Dense(4, use_bias=False, dtype=self.dtype, name="last")(x)


class ByKeyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(inputs=x)


class Twice(nn.Dense):
    """A foreign kind of dense layer."""


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ jnp.asarray(self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4)))


NET, FLOAT32 = Net(), Net(jnp.float32)
X = np.random.default_rng(1).normal(size=(3, 2, 7)).astype(np.float32)


def run_flax_bert(model, params):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(lambda params: model(**BATCH, params=params)[0])(params)


def dense_output(module, params) -> Any:
    return module.apply({"params": params}, X)


def assert_same_but_for_rounding(got, wanted):
    """Some ten layers in float32, each with a hundred roundings at most, that two orders of products make differ."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1000 * EPS * float(np.max(np.abs(wanted))))


@pytest.fixture(scope="module")
def net():
    return split(random_params(NET, X))


def test_our_modules_run_on_factors():
    """The classifier, whose kernels are those of the embedder and one more."""
    module = tiny.module(CLASSIFIER)
    small, dense = split(tiny.params(CLASSIFIER))
    got = jax.jit(partial(apply, module))(small, **BATCH)
    assert_same_but_for_rounding(got, jax.jit(module.apply)({"params": dense}, **BATCH))


def test_models_of_transformers_run_on_factors():
    model = tiny.flax_bert(CLASSIFIER)
    small, dense = split(tiny.params(CLASSIFIER))
    with factorised():
        got = run_flax_bert(model, small)
    assert_same_but_for_rounding(got, run_flax_bert(model, dense))


def test_other_linen_modules_run_on_factors(net):
    small, dense = net
    assert_same_but_for_rounding(apply(NET, small, X), NET.apply({"params": dense}, X))


def test_dense_layer_without_bias_is_two_products():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    got = apply(nn.Dense(4, use_bias=False), {"kernel": FACTORISED, "left": left, "right": right}, X)
    assert_same_but_for_rounding(got, X.astype(np.float64) @ left @ right)


def test_dense_layer_with_bias_adds_it_to_two_products():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 2)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    got = apply(nn.Dense(4), {"kernel": FACTORISED, "left": left, "right": right, "bias": bias}, X)
    assert_same_but_for_rounding(got, X.astype(np.float64) @ left @ right + bias)


def test_input_may_be_given_by_keyword():
    small, dense = split(random_params(ByKeyword(), X))
    assert_same_but_for_rounding(apply(ByKeyword(), small, X), ByKeyword().apply({"params": dense}, X))


def test_rematerialised_modules_run_on_factors():
    small, dense = split(random_params(nn.remat(Net)(), X))
    module = nn.remat(Net)()
    assert_same_but_for_rounding(apply(module, small, X), module.apply({"params": dense}, X))


def test_compiled_function_equals_the_function(net):
    small, _ = net
    assert_same_but_for_rounding(jax.jit(partial(apply, NET))(small, X), apply(NET, small, X))


def test_trace_made_inside_runs_outside(net):
    small, _ = net
    run = jax.jit(NET.apply)
    with factorised():
        inside = run({"params": small}, X)
    np.testing.assert_array_equal(run({"params": small}, X), inside)


def test_gradients_flow_to_both_factors_by_the_chain_rule(net):
    small, dense = net
    got = jax.grad(lambda params: jnp.sum(apply(NET, params, X) ** 2))(small)
    kernels = jax.grad(lambda params: jnp.sum(dense_output(NET, params) ** 2))(dense)
    for path in (("first",), ("inner", "middle"), ("last",)):
        ours, theirs, factors = got, kernels, small
        for name in path:
            ours, theirs, factors = ours[name], theirs[name], factors[name]
        assert_same_but_for_rounding(ours["left"], theirs["kernel"] @ factors["right"].T)
        assert_same_but_for_rounding(ours["right"], factors["left"].T @ theirs["kernel"])


def test_gradients_of_all_else_are_those_of_the_dense_model(net):
    small, dense = net
    got = jax.grad(lambda params: jnp.sum(apply(NET, params, X) ** 2))(small)
    wanted = jax.grad(lambda params: jnp.sum(dense_output(NET, params) ** 2))(dense)
    assert_same_but_for_rounding(got["first"]["bias"], wanted["first"]["bias"])


def test_bfloat16_factors_are_multiplied_in_the_layers_dtype():
    small, dense = split(random_params(NET, X), dtype=jnp.bfloat16)
    got = apply(FLOAT32, small, X)
    assert_same_but_for_rounding(got, FLOAT32.apply({"params": dense}, X))


def test_bfloat16_layers_return_bfloat16():
    module = tiny.module().clone(dtype=jnp.bfloat16)
    small, _ = split(tiny.params(), dtype=jnp.bfloat16)
    got = jax.eval_shape(partial(apply, module), small, **BATCH)
    assert got.dtype == jnp.bfloat16


def test_bfloat16_computation_is_near_that_in_float64():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 2)).astype(jnp.bfloat16), rng.normal(size=(2, 4)).astype(jnp.bfloat16)
    inputs = X.astype(jnp.bfloat16)
    got = apply(nn.Dense(4, use_bias=False), {"kernel": FACTORISED, "left": left, "right": right}, inputs)
    exact = [np.abs(array.astype(np.float64)) for array in (inputs, left, right)]
    wanted = inputs.astype(np.float64) @ left.astype(np.float64) @ right.astype(np.float64)
    bound = 4 * 2**-8 * (exact[0] @ exact[1] @ exact[2])  # both products are rounded, to 8 bits, sums maybe once more
    assert np.all(np.abs(np.asarray(got, np.float64) - wanted) <= bound)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_modules_say_what_to_do_outside(architecture):
    module = tiny.module(architecture)
    small, _ = split(tiny.params(architecture))
    with pytest.raises(TypeError, match=ADVICE):
        jax.eval_shape(module.apply, {"params": small}, **BATCH)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_transformers_say_what_to_do_outside(architecture):
    model = tiny.flax_bert(architecture)
    small, _ = split(tiny.params(architecture))
    with pytest.raises(TypeError, match=ADVICE):
        run_flax_bert(model, small)


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit, jax.grad], ids=["call", "jit", "grad"])
@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=["free", "float32"])
def test_other_linen_modules_say_what_to_do_outside(net, transform, dtype):
    with pytest.raises(TypeError, match=ADVICE):
        transform(lambda params: jnp.sum(dense_output(Net(dtype), params)))(net[0])


def test_subclass_of_a_layer_runs_on_factors():
    left, right = tiny.factors((7, 4), 2)
    got = apply(Twice(4, use_bias=False), {"kernel": FACTORISED, "left": left, "right": right}, X)
    assert_same_but_for_rounding(got, X.astype(np.float64) @ left @ right)


def test_kernels_are_listed_with_their_shapes_without_running_the_model():
    layer = "encoder/layer/0"
    rows = {"word": 20, "position": 20, "token_type": 2}
    assert kernel_shapes(tiny.module()) == {
        **{f"embeddings/{name}_embeddings": (count, 16) for name, count in rows.items()},
        **{f"{layer}/attention/self/{name}": (16, 16) for name in ("query", "key", "value")},
        f"{layer}/attention/output/dense": (16, 16),
        f"{layer}/intermediate/dense": (16, 24),
        f"{layer}/output/dense": (24, 16),
        "pooler/dense": (16, 16),
    }


def test_layer_that_is_no_dense_refuses_factors_even_inside():
    small, _ = split(random_params(Own(), X))
    with pytest.raises(TypeError, match="this kernel was factorised"):
        apply(Own(), small, X)


def test_context_ends_when_its_block_fails(net):
    with pytest.raises(ZeroDivisionError), factorised():
        raise ZeroDivisionError
    with pytest.raises(TypeError, match=ADVICE):
        NET.apply({"params": net[0]}, X)


def test_contexts_may_be_nested(net):
    small, _ = net
    with factorised():
        np.testing.assert_array_equal(apply(NET, small, X), NET.apply({"params": small}, X))


def test_dense_parameters_run_unchanged_inside(net):
    _, dense = net
    np.testing.assert_array_equal(apply(NET, dense, X), NET.apply({"params": dense}, X))


def test_parameters_made_inside_are_dense():
    with factorised():
        made = NET.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, made, NET.init(jax.random.key(0), X))


def test_marker_has_no_leaves():
    assert jax.tree.leaves({"kernel": FACTORISED}) == []


def test_marker_survives_a_map_over_the_tree():
    assert jax.tree.map(lambda leaf: 2 * leaf, {"kernel": FACTORISED, "left": 1}) == {"kernel": FACTORISED, "left": 2}


@pytest.mark.parametrize("twin", [Factorised(), copy.deepcopy(FACTORISED)], ids=["new", "copy"])
def test_all_markers_are_equal_and_have_one_hash(twin):
    assert {FACTORISED, twin} == {twin}


def test_marker_equals_nothing_else():
    assert FACTORISED != "FACTORISED"


@pytest.mark.parametrize("use", [np.asarray, jnp.asarray, jnp.sin, np.shape], ids=["numpy", "jax", "sin", "shape"])
def test_marker_is_no_array_and_says_what_to_do(use):
    with pytest.raises(TypeError, match=ADVICE):
        use(FACTORISED)


def test_optimizer_steps_on_factors(net):
    small, _ = net
    gradients = jax.grad(lambda params: jnp.sum(apply(NET, params, X) ** 2))(small)
    optimizer = optax.sgd(0.5)
    updates, _ = optimizer.update(gradients, optimizer.init(small), small)
    wanted = jax.tree.map(lambda leaf, gradient: leaf - np.float32(0.5) * np.asarray(gradient), small, gradients)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(small, updates), wanted)  # halves are exact


def test_training_with_adamw_lowers_the_loss(net):
    params, _ = net
    optimizer = optax.adamw(1e-2)
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(lambda params: jnp.sum(apply(NET, params, X) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    with jax.numpy_dtype_promotion("standard"):  # optax mixes numbers of steps and floats
        for _ in range(10):
            params, state, value = step(params, state)
            losses.append(float(value))
    assert losses[-1] < losses[0]
