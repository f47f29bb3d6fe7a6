"""What is captured multiplies out to the gradients of the kernels."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import BATCH, CLASSIFIER, EPS, assert_passed_on, random_params

from bert_adapter.layers import LAYERS
from bert_adapter.layers import capture as module
from bert_adapter.layers.layer import Layer
from bert_adapter.layers.marker import FACTORISED

X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 7)), jnp.float32)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(6, name="first")(x))


class Net(nn.Module):
    """A dense layer below another module, one for every step, and one for the whole."""

    noise: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = Inner(name="inner")(x)
        x = nn.Dropout(self.noise, deterministic=deterministic)(x)
        x = nn.tanh(nn.Dense(5, use_bias=False, name="steps")(x))
        return nn.Dense(4, name="whole")(x.sum(axis=1))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        tied = nn.Dense(7, name="tied")
        return nn.Dense(4, name="once")(tied(nn.tanh(tied(x))))


class Once(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, dtype=self.dtype, name="once")(x)


class ByKeyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="once")(inputs=x)


NET, PATHS = Net(), frozenset({"inner/first", "steps", "whole"})


def forward_of(module):
    return lambda params, batch: module.apply({"params": params}, **batch)


class Pair(NamedTuple):
    inputs: Any
    deltas: Any


def capture(forward, objective, params, batch, paths):
    """What enters each layer, and the gradients of the objective of the output with respect to what leaves it."""
    captured = module.capture(forward, params, batch, paths)
    deltas, _ = captured.deltas(jax.grad(objective)(captured.output))
    return {path: Pair(captured.inputs[path], deltas[path]) for path in deltas}


def objective(output):
    return jnp.sum(jnp.sin(output))


def kernel_at(params, path, name="kernel"):
    for key in path.split("/"):
        params = params[key]
    return params[name]


def assert_products_are_gradients(captured, gradients):
    """Sums of at most 24 terms in float32, in two orders, behind some ten layers."""
    for path, (inputs, deltas) in captured.items():
        wanted = kernel_at(gradients, path)
        got = np.einsum("bti,bto->io", np.asarray(inputs, np.float64), np.asarray(deltas, np.float64))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1000 * EPS * np.max(np.abs(wanted)), err_msg=path)


@pytest.fixture(scope="module")
def params():
    return random_params(NET, X)


@pytest.fixture(scope="module")
def captured(params):
    return capture(forward_of(NET), objective, params, {"x": X}, PATHS)


def test_inputs_times_deltas_are_the_gradients_of_all_kernels(params, captured):
    gradients = jax.grad(lambda params: objective(NET.apply({"params": params}, X)))(params)
    assert set(captured) == PATHS
    assert_products_are_gradients(captured, gradients)


def test_inputs_are_what_enters_the_layer(captured):
    np.testing.assert_array_equal(captured["inner/first"].inputs, X)


def test_deltas_are_gradients_of_what_leaves_the_layer(params, captured):
    output = np.asarray(NET.apply({"params": params}, X), np.float64)
    wanted = np.cos(output)[:, None, :]  # the last layer's output is the model's
    np.testing.assert_allclose(captured["whole"].deltas, wanted, rtol=0, atol=8 * EPS)  # one cosine of a few units


def test_layer_that_sees_one_vector_per_example_has_one_time_step(captured):
    assert (captured["whole"].inputs.shape, captured["whole"].deltas.shape) == ((3, 1, 5), (3, 1, 4))


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4, name="one")(x)) + nn.Dense(4, name="two")(x) + nn.Dense(4, name="three")(x + 0)


def test_layers_that_the_same_array_enters_share_it():
    def shared(params):
        found = module.capture(forward_of(Branches()), params, {"x": X}, frozenset({"one", "two", "three"})).inputs
        return found["one"] is found["two"], found["one"] is found["three"]

    params = random_params(Branches(), X)
    assert shared(params) == (True, False)
    gradients = jax.grad(lambda params: objective(Branches().apply({"params": params}, X)))(params)
    got = capture(forward_of(Branches()), objective, params, {"x": X}, frozenset({"one", "two", "three"}))
    assert_products_are_gradients(got, gradients)


def test_only_the_layers_asked_for_are_captured(params, captured):
    got = capture(forward_of(NET), objective, params, {"x": X}, frozenset({"steps"}))
    assert set(got) == {"steps"}
    jax.tree.map(np.testing.assert_array_equal, got["steps"], captured["steps"])


def test_capture_can_be_compiled(params, captured):
    got = jax.jit(lambda params, batch: capture(forward_of(NET), objective, params, batch, PATHS))(params, {"x": X})
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(captured), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=100 * EPS)  # numbers of about one, fused otherwise


def test_dropout_is_off_unless_asked_for(params, captured):
    got = capture(forward_of(Net(noise=0.9)), objective, params, {"x": X}, PATHS)
    jax.tree.map(np.testing.assert_array_equal, got, captured)


def test_kernels_that_stayed_dense_are_captured_beside_factors(params):
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    small = params | {"steps": {"kernel": FACTORISED, "left": left, "right": right}}
    dense = params | {"steps": {"kernel": left @ right}}
    gradients = jax.grad(lambda params: objective(NET.apply({"params": params}, X)))(dense)
    got = capture(forward_of(NET), objective, small, {"x": X}, PATHS - {"steps"})
    assert_products_are_gradients(got, gradients)


@pytest.mark.parametrize("path", ["inner", "steps/kernel", "nothing"])
def test_path_of_no_layer_is_named(params, path):
    with pytest.raises(ValueError, match=rf"no layer that can be factorised is called under \['{path}'\]"):
        capture(forward_of(NET), objective, params, {"x": X}, PATHS | {path})


def test_layer_called_twice_has_the_steps_of_both_calls():
    params = random_params(Tied(), X)
    gradients = jax.grad(lambda params: objective(Tied().apply({"params": params}, X)))(params)
    got = capture(forward_of(Tied()), objective, params, {"x": X}, frozenset({"tied"}))
    assert got["tied"].inputs.shape == (3, 4, 7)
    assert_products_are_gradients(got, gradients)


def test_layer_called_twice_is_no_obstacle_to_others():
    params = random_params(Tied(), X)
    gradients = jax.grad(lambda params: objective(Tied().apply({"params": params}, X)))(params)
    got = capture(forward_of(Tied()), objective, params, {"x": X}, frozenset({"once"}))
    assert_products_are_gradients(got, gradients)


def test_input_may_be_given_by_keyword():
    params = random_params(ByKeyword(), X)
    gradients = jax.grad(lambda params: objective(ByKeyword().apply({"params": params}, X)))(params)
    got = capture(forward_of(ByKeyword()), objective, params, {"x": X}, frozenset({"once"}))
    assert_products_are_gradients(got, gradients)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_passed_on_is_of_float32_whatever_a_layer_computes_in(dtype):
    """A layer that rounds its outputs is no help: what it passes on is multiplied anew."""
    net = Once(dtype)
    assert_passed_on(forward_of(net), random_params(net, X), {"x": X}, {"once": (7, 4)})


class Twice(nn.Dense):
    def __call__(self, inputs):
        return super().__call__(inputs)


class Scaled(nn.Dense):
    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


class Biased(nn.Dense):
    def __call__(self, inputs):
        return super().__call__(inputs) + 1


class Of(nn.Module):
    kind: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="last")(self.kind(4, dtype=jnp.float32, name="once")(x))


@pytest.mark.parametrize("kind", [nn.Dense, Twice, Scaled, Biased])
@pytest.mark.parametrize("bias", [1.0, 1e3, 1e6])
def test_what_is_passed_on_is_the_product_whatever_else_a_layer_does(kind, bias, monkeypatch):
    """The model's own outputs and gradients count where they are that, and no further."""
    monkeypatch.setitem(LAYERS, "once", Layer(kind, input_axes=lambda module: 1))
    params = random_params(Of(kind), X)
    params["once"]["bias"] = jnp.asarray(bias * params["once"]["bias"], jnp.bfloat16)
    assert_passed_on(forward_of(Of(kind)), params, {"x": X}, {"once": (7, 4)}, near=bias)


def test_an_interceptor_of_the_models_own_does_not_count():
    def triple(call, args, kwargs, context):
        return 3 * call(*args, **kwargs) if context.module.name == "once" else call(*args, **kwargs)

    def forward(params, batch):
        with nn.intercept_methods(triple):
            return Of(nn.Dense).apply({"params": params}, batch["x"])

    assert_passed_on(forward, random_params(Of(nn.Dense), X), {"x": X}, {"once": (7, 4)})


def test_models_of_transformers_are_captured():
    model, params = tiny.flax_bert(CLASSIFIER), tiny.params(CLASSIFIER)
    layer = "bert/encoder/layer/0"
    paths = frozenset({f"{layer}/attention/self/key", f"{layer}/output/dense", "bert/pooler/dense", "classifier"})

    def forward(params, batch):
        return model(**batch, params=params).logits

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = jax.jit(lambda params: capture(forward, objective, params, BATCH, paths))(params)
        gradients = jax.jit(jax.grad(lambda params: objective(forward(params, BATCH))))(params)
    assert_products_are_gradients(got, gradients)
