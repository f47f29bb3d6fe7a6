"""NNX models: compressed in a copy, whose state is ordinary Params, and which runs, trains and is kept as before."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import EPS, assert_passed_on, at

import bert_adapter
from bert_adapter.model import training_forward

nnx = pytest.importorskip("flax.nnx")
rng = np.random.default_rng(0)
IDS = rng.integers(0, 11, size=(4, 3)).astype(np.int32)
BATCH = {"ids": IDS, "attention_mask": np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])}
compress = partial(bert_adapter.compress, progress=False)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False, dropout_rate=0.5)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.wide = nnx.Linear(8, 16, rngs=rngs)
        self.narrow = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x, mask):
        x = self.norm(x + self.attention(x, mask=mask))
        return x + self.narrow(nnx.gelu(self.wide(x)))


class Net(nnx.Module):
    """A transformer of two blocks; the last layer is called twice, and known by two names."""

    def __init__(self, rngs):
        self.table = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.last = nnx.Linear(8, 8, rngs=rngs)
        self.same = self.last

    def __call__(self, ids, attention_mask):
        x, mask = self.table(ids), attention_mask[:, None, None, :] > 0
        for block in self.blocks:
            x = block(x, mask)
        x = self.same(nnx.tanh(self.last(x)))
        weights = jnp.asarray(attention_mask, x.dtype)[:, :, None]
        return (x * weights).sum(axis=1)


PATHS = [
    *(
        f"blocks/{i}/{name}"
        for i in (0, 1)
        for name in (*(f"attention/{each}" for each in ("query", "key", "value", "out")), "wide", "narrow")
    ),
    "last",
]


@cache
def net():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Net(nnx.Rngs(0))
    model.eval()
    return model


@cache
def small():
    return compress(net(), [BATCH], rank=2, signal="svd")


def run(model, batch=BATCH):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return model(**batch)


def assert_near(got, wanted):
    """Ten layers in float32, with sums of some ten terms in two orders."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2000 * EPS * float(np.max(np.abs(wanted))))


def test_copy_of_the_model_runs_on_factors_as_on_their_products():
    made, report = small()
    assert sorted(kernel.path for kernel in report.kernels) == sorted(PATHS)
    assert type(made) is Net
    assert made.last is made.same
    assert isinstance(made.last, nnx.Linear)
    merged = bert_adapter.with_params(net(), bert_adapter.merge(bert_adapter.as_model(made).params))
    assert_near(run(made), run(merged))


def test_the_callers_model_is_left_as_it_was():
    before = run(net())
    small()
    assert not hasattr(net().last, "left")
    np.testing.assert_array_equal(run(net()), before)


def test_state_is_of_ordinary_params():
    made, _ = small()
    graph, state = nnx.split(made)
    factors = nnx.to_pure_dict(nnx.state(made, nnx.Param))["blocks"][1]["attention"]["out"]
    assert {name: leaf.shape for name, leaf in factors.items()} == {"bias": (8,), "left": (2, 4, 2), "right": (2, 8)}
    np.testing.assert_array_equal(run(nnx.merge(graph, state)), run(made))


def test_what_kernels_pass_on_is_the_product_with_them():
    model = bert_adapter.as_model(net())
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.params)  # biases of nnx begin at zero
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shapes = bert_adapter.select_kernels(model, include="blocks/1|last", batch=BATCH)
        assert_passed_on(bert_adapter.forward(model), params, BATCH, shapes)


def test_a_layer_that_rounds_what_it_multiplies_is_multiplied_anew():
    """Its outputs are of float32 nevertheless."""
    how: dict[str, Any] = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    model = bert_adapter.as_model(
        nnx.Sequential(nnx.Linear(16, 4, rngs=nnx.Rngs(0), **how)), forward=lambda m, b: m(b["x"])
    )
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.params)
    batch = {"x": rng.normal(size=(4, 3, 16)).astype(np.float32)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_passed_on(bert_adapter.forward(model), params, batch, {"layers/0": (16, 4)})


def test_importance_is_that_of_the_examples_gradients():
    """Of attention's kernels of three axes, and of a layer that is called twice under two names."""

    def loss(output, batch):
        return jnp.sum(jnp.sin(output), axis=1)

    model = bert_adapter.as_model(net())
    forward = bert_adapter.forward(model)
    shapes = bert_adapter.select_kernels(model, include="blocks/1|last", batch=BATCH)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        importance = bert_adapter.measure_importance(
            forward, model.params, [BATCH], shapes, statistics=("fisher",), gradients=loss, progress=False
        )

        def value(params, ids, mask):
            return loss(forward(params, {"ids": ids[None], "attention_mask": mask[None]}), {})[0]

        one = jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0, 0)))
        gradients = one(model.params, IDS, BATCH["attention_mask"])
    for path, shape in shapes.items():
        squared = np.sum(np.square(at(gradients, path)["kernel"], dtype=np.float64), axis=0).reshape(shape)
        fisher: Any = importance[path].fisher
        got = np.sum(fisher, axis=0)
        np.testing.assert_allclose(got, squared, rtol=0, atol=2000 * EPS * max(squared.max(), 1e-6), err_msg=path)


@pytest.mark.slow
def test_model_is_compressed_to_a_budget():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made, report = compress(net(), [BATCH], budget=0.5, forward=lambda model, batch: model(**batch))
    assert report.parameters_after <= 0.5 * report.parameters_before
    assert run(made).shape == (4, 8)


def test_optimiser_trains_factors():
    made = nnx.clone(small()[0])

    def loss(model):
        return jnp.mean(model(**BATCH) ** 2)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimiser = nnx.Optimizer(made, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimiser):
            value, gradients = nnx.value_and_grad(loss)(model)
            optimiser.update(model, gradients)
            return value

        before = np.asarray(made.last.left[...])
        losses = [float(step(made, optimiser)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not np.array_equal(before, made.last.left[...])


def test_orbax_keeps_factors(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    made, _ = small()
    graph, state = nnx.split(made)
    with orbax.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "state", state)
        keeper.wait_until_finished()
        again = keeper.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(run(nnx.merge(graph, again)), run(made))


def test_parameters_are_kept_and_loaded_into_the_callers_model(tmp_path):
    made, _ = small()
    bert_adapter.save(bert_adapter.as_model(made), tmp_path / "small")
    again = bert_adapter.load_into(tmp_path / "small", net())
    assert type(again) is Net
    np.testing.assert_array_equal(run(again), run(made))


def test_factors_become_kernels_again():
    made, _ = small()
    merged = bert_adapter.with_params(made, bert_adapter.merge(bert_adapter.as_model(made).params))
    assert type(merged.last) is nnx.Linear
    assert_near(run(merged), run(made))


def test_parameters_that_are_missing_or_left_over_are_named():
    params = bert_adapter.as_model(net()).params
    with pytest.raises(ValueError, match=r"missing or left over: \['last/bias', 'other'\]"):
        bert_adapter.with_params(net(), params | {"last": {"kernel": params["last"]["kernel"]}, "other": np.ones(3)})


class Words(nnx.Module):
    """A table that what is found in it is compared with."""

    def __init__(self, rngs, table=nnx.Embed):
        self.table, self.layer = table(11, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.table.attend(self.layer(self.table(ids))).mean(axis=1)


def words(**how):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Words(nnx.Rngs(0), **how)


def test_table_runs_on_factors_and_stays_tied():
    ids = {"ids": IDS}
    model = words()
    made, report = compress(model, [ids], rank=2, signal="svd", include="table")
    assert [kernel.path for kernel in report.kernels] == ["table"]
    assert isinstance(made.table, nnx.Embed)
    assert {name: leaf.shape for name, leaf in nnx.to_pure_dict(nnx.state(made, nnx.Param))["table"].items()} == {
        "left": (11, 2),
        "right": (2, 8),
    }
    merged = bert_adapter.with_params(made, bert_adapter.merge(bert_adapter.as_model(made).params))
    assert type(merged.table) is nnx.Embed
    assert_near(run(made, ids), run(merged, ids))
    assert not np.allclose(run(made, ids), run(model, ids))


def test_a_table_is_measured_by_its_lookups():
    model = bert_adapter.as_model(words())
    shapes = bert_adapter.select_kernels(model, include="table", batch={"ids": IDS})
    importance = bert_adapter.measure_importance(
        bert_adapter.forward(model),
        model.params,
        [{"ids": IDS}],
        shapes,
        statistics=("inputs",),
        progress=False,
    )
    counts: Any = importance["table"].token_counts  # of every other example, and of the rest
    np.testing.assert_array_equal(counts.sum(axis=0), np.bincount(IDS.ravel(), minlength=11))


class Doubled(nnx.Embed):
    def attend(self, query):
        return 2 * super().attend(query)


def test_table_with_an_attend_of_its_own_is_refused():
    with pytest.raises(ValueError, match="Doubled: its class has its own attend"):
        compress(words(table=Doubled), [{"ids": IDS}], rank=2, signal="svd", include="table")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's
def test_vision_encoder_of_a_public_package_is_compressed():
    """SigLIP of google-tunix, with random parameters."""
    vision = pytest.importorskip("tunix.models.gemma3.vision", exc_type=ImportError)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        size = {"patch_size": (8, 8), "image_height": 32, "image_width": 32, "width": 48, "depth": 2, "mlp_dim": 96}
        encoder = vision.ViTModel(**size, num_heads=4, rngs=nnx.Rngs(0))
        image = {"image": np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)}
        made, report = compress(encoder, [image], budget=0.5)
        assert {kernel.path for kernel in report.kernels} == {
            f"transformer/blocks/{i}/{name}"
            for i in (0, 1)
            for name in ("mlp/fc1", "mlp/fc2", *(f"attn/{one}_proj" for one in ("query", "key", "value", "out")))
        }
        assert type(made) is vision.ViTModel
        merged = bert_adapter.with_params(made, bert_adapter.merge(bert_adapter.as_model(made).params))
        assert_near(made(**image), merged(**image))


def test_what_cannot_be_factorised_is_refused_by_name():
    with pytest.raises(ValueError, match="select none of"):
        compress(net(), [BATCH], rank=2, signal="svd", include="norm")


def test_what_is_compressed_already_is_refused():
    with pytest.raises(ValueError, match="factorised already"):
        compress(small()[0], [BATCH], rank=2, signal="svd")


class Scaled(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Own(nnx.Module):
    def __init__(self, rngs):
        self.scaled = Scaled(8, 8, rngs=rngs)
        self.first = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.first(self.scaled(x))


def test_layer_with_a_call_of_its_own_is_refused():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Own(nnx.Rngs(0))
    batch = {"x": np.ones((2, 8), np.float32)}
    with pytest.raises(ValueError, match="Scaled: its class has a call of its own"):
        compress(model, [batch], rank=2, signal="svd", include="scaled")
    _, report = compress(model, [batch], rank=2, signal="svd")
    assert [kernel.path for kernel in report.kernels] == ["first"]


class Start(nnx.Module):
    """Called with nothing."""

    def __init__(self):
        self.embedding = nnx.Param(np.ones((3, 8), np.float32))

    def __call__(self):
        return self.embedding[...]


class Named(nnx.Module):
    """Modules called as parameters are, and two layers with one Param."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(11, 8, rngs=rngs)
        self.start, self.dropout = Start(), nnx.Dropout(0.5, rngs=rngs)
        self.left, self.right, self.one, self.two = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.two.kernel = self.one.kernel

    def __call__(self, ids, deterministic=False):
        x = self.dropout(self.embedding(ids) + self.start()[None], deterministic=deterministic)
        return self.two(self.one(self.left(x) * self.right(x))).sum(axis=1)


def test_modules_may_be_called_as_parameters_are():
    made, report = compress(Named(nnx.Rngs(0)), [BATCH], rank=2, signal="svd")
    assert [kernel.path for kernel in report.kernels] == ["left", "right"]
    found = bert_adapter.select_kernels(bert_adapter.as_model(made), include="^embedding", batch=BATCH)
    assert found == {"embedding": (11, 8)}


@pytest.mark.parametrize(("path", "other"), [("one", "two"), ("two", "one")])
def test_a_kernel_that_two_layers_share_is_refused(path, other):
    """One of them would run on factors, and the other on nothing."""
    with pytest.raises(ValueError, match=f"'{path}', which cannot.*Linear: its kernel is that of '{other}/kernel'"):
        compress(Named(nnx.Rngs(0)), [BATCH], rank=2, signal="svd", include=path)


def test_a_kernel_that_is_not_multiplied_by_as_it_is_is_refused():
    net = nnx.Sequential(nnx.WeightNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    batch = {"x": np.ones((2, 8), np.float32)}
    with pytest.raises(ValueError, match=r"exact factors of \['layers/0/layer_instance'\].*nnx.WeightNorm"):
        compress(net, [batch], rank=2, signal="svd", forward=lambda model, batch: model(batch["x"]))


def test_forward_may_take_the_key_of_dropout():
    def forward(model, batch, key):
        return model.dropout(batch["x"], rngs=key)

    model = bert_adapter.as_model(Named(nnx.Rngs(0)), forward=forward)
    run, batch = bert_adapter.forward(model), {"x": np.ones((2, 8), np.float32)}
    assert (run(model.params, batch) == 1).all()
    assert set(np.ravel(training_forward(model)(model.params, batch, jax.random.key(0)))) == {0, 2}


class Stacked(nnx.Module):
    """Three layers as one, with a leading axis on their kernel, run by nnx.scan, and rematerialised."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def step(x, layer):
            return x + nnx.tanh(layer(x))

        return step(x, self.layers)


def test_scanned_layers_have_a_kernel_at_each_index():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Stacked(nnx.Rngs(0))
        batch = {"x": rng.normal(size=(4, 8)).astype(np.float32)}
        made, report = compress(model, [batch], rank=2, signal="shampoo")
        assert [kernel.path for kernel in report.kernels] == [f"layers[{i}]" for i in range(3)]
        assert made.layers.left.shape == (3, 8, 2)
        merged = bert_adapter.with_params(model, bert_adapter.merge(bert_adapter.as_model(made).params))
        assert_near(run(made, batch), run(merged, batch))


def test_how_matrices_are_stored_is_known_of_what_comes_back(tmp_path):
    wide = nnx.Sequential(nnx.Linear(32, 128, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(128, 32, rngs=nnx.Rngs(1)))
    batches = [{"x": rng.normal(size=(16, 32)).astype(np.float32)}]
    how: dict[str, Any] = {"forward": lambda model, batch: model(batch["x"])}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made, report = compress(wide, batches, budget=0.2, of="bytes", **how)
        bert_adapter.save(bert_adapter.as_model(made, **how), tmp_path / "made")
        again = bert_adapter.load_into(tmp_path / "made", wide)
    assert report.dtypes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(wide, nnx.Param)))
    assert (tmp_path / "made/parameters.safetensors").stat().st_size < 0.2 * whole + 2000  # its names
    for model in (made, again):
        assert bert_adapter.as_model(model, **how).config["low_rank"]["dtypes"] == report.dtypes
    dense = bert_adapter.with_params(made, bert_adapter.merge(bert_adapter.as_model(made).params))
    assert "low_rank" not in bert_adapter.as_model(dense).config


class Flagged(nnx.Module):
    """One whose attributes have names that might be ours."""

    def __init__(self, rngs):
        self.low_rank, self.shared_with, self.announced_at = False, 1.0, 2.0
        self.layer, self.other = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return 100 * x if self.low_rank else self.other(nnx.tanh(self.layer(x))) * self.shared_with + self.announced_at


def test_attributes_of_the_users_keep_their_values():
    model, batch = Flagged(nnx.Rngs(0)), {"x": rng.normal(size=(16, 8)).astype(np.float32)}
    small, _ = compress(model, [batch], budget=0.75, dtype="int8")
    for one in (small, bert_adapter.with_params(small, bert_adapter.merge(bert_adapter.as_model(small).params))):
        assert (one.low_rank, one.shared_with, one.announced_at) == (False, 1.0, 2.0)
    assert np.abs(small(batch["x"]) - model(batch["x"])).mean() < 1
