"""Any Linen model goes the whole way: its kernels are found, measured, factorised, run, kept and trained."""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import EPS, assert_passed_on, at, random_params

import bert_adapter
import wlra
from bert_adapter.exactness import with_exact_factors
from bert_adapter.factorisation import method_for
from bert_adapter.layers.capture import capture
from bert_adapter.layers.finding import find_kernels
from bert_adapter.layers.marker import FACTORISED
from bert_adapter.layers.stacks import unstacked
from bert_adapter.own import counted

rng = np.random.default_rng(0)
BATCH = {"x": rng.normal(size=(4, 3, 8)).astype(np.float32)}
compress = partial(bert_adapter.compress, progress=False)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


class Net(nn.Module):
    """Layers of all kinds: attention's kernels of three axes, scanned and rematerialised blocks, one called twice."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x, x)
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="layers")(x, None)
        tied = nn.Dense(8, name="tied")
        x = tied(nn.tanh(tied(x)))
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        x = nn.Einsum((8, 2, 4), "btd,dhk->bhtk", name="heads")(x)
        return nn.DenseGeneral(5, axis=(3, 1), name="general")(x).sum(axis=1)


NET = Net()
SHAPES = {
    **{f"attention/{name}": (8, 8) for name in ("query", "key", "value", "out")},
    **{f"layers/dense[{i}]": (8, 8) for i in (0, 1)},
    "tied": (8, 8),
    "heads": (8, 8),
    "general": (8, 5),
}


class Tripled(nn.Dense):
    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


class Inner(nn.Module):
    """What cannot be factorised, beside two kernels and a table that can."""

    @nn.compact
    def __call__(self, ids, x):
        x = x + nn.Embed(7, 8, name="table")(ids)
        x = x + nn.Conv(8, (3,), name="conv")(x)
        x = x + Tripled(8, name="tripled")(x)
        bias = nn.Dense(8, name="positions")(jnp.ones((3, 8)))
        x = x + bias[None]
        x = nn.Einsum((4, 3, 8), "btd,ntd->bnt", use_bias=False, name="odd")(x)
        return nn.remat(nn.Dense)(4, name="last")(nn.Dense(9, name="first")(x).sum(axis=1))


@cache
def params() -> Any:
    return random_params(NET, BATCH["x"], size=0.4)


def run(params, batch) -> Any:
    return NET.apply({"params": params}, batch["x"])


@cache
def halved():
    """With what is measured by default, at half of the parameters."""
    return compress((NET, params()), [BATCH], budget=0.6)


def outputs(model):
    return bert_adapter.forward(model)(model.params, BATCH)


def assert_near(got, wanted):
    """Ten layers in float32, with sums of some ten terms in two orders."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2000 * EPS * float(np.max(np.abs(wanted))))


def each_gradient():
    """By kernel, as matrices: every example's gradient of the loss."""

    def value(params, x):
        return jnp.sum(jnp.sin(run(params, {"x": x[None]})))

    found = jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0)))(params(), BATCH["x"])
    stacked = jax.tree.map(lambda leaf: np.moveaxis(np.asarray(leaf, np.float64), 0, -1), found)
    return {
        path: np.moveaxis(at(unstacked(stacked, SHAPES), path)["kernel"].reshape(*shape, -1), -1, 0)
        for path, shape in SHAPES.items()
    }


def test_kernels_of_all_kinds_of_layers_are_found_as_matrices():
    found = find_kernels(run, params(), BATCH)
    assert (found.shapes(), found.refused) == (SHAPES, {})


def test_importance_is_that_of_the_examples_gradients():
    """Of every kind of layer: folded, stacked, rematerialised, and summed over two calls."""

    def loss(output, batch):
        return jnp.sum(jnp.sin(output), axis=1)

    wanted = {"statistics": ("fisher", "row_gram", "col_gram"), "gradients": loss, "progress": False}
    importance = bert_adapter.measure_importance(run, params(), [BATCH], SHAPES, **wanted)
    for path, gradients in each_gradient().items():
        sums: Any = importance[path]
        assert_near(np.sum(sums.fisher, axis=0), np.sum(gradients**2, axis=0))
        assert_near(sums.row_gram, np.einsum("bij,bkj->ik", gradients, gradients))
        assert_near(sums.col_gram, np.einsum("bij,bik->jk", gradients, gradients))


def test_what_kernels_pass_on_is_the_product_with_them():
    """Of every kind of layer, those whose arrays are lifted out of a scan too."""
    assert_passed_on(run, params(), BATCH, SHAPES)


def test_any_module_is_compressed_to_a_budget():
    small, report = halved()
    assert isinstance(small, bert_adapter.Model)
    assert [kernel.path for kernel in report.kernels] == list(SHAPES)
    assert report.parameters_after <= 0.6 * report.parameters_before
    assert outputs(small).shape == (4, 5)


def test_kernels_of_a_scan_have_one_rank():
    _, report = halved()
    assert len({kernel.rank for kernel in report.kernels if kernel.path.startswith("layers/")}) == 1


def test_all_kinds_of_layers_run_on_factors_as_on_their_products():
    small, report = compress((NET, params()), [BATCH], rank=2, signal="svd")
    assert report.dense == []
    factors = small.params["layers"]["dense"]
    assert (factors["left"].shape, factors["right"].shape) == ((2, 8, 2), (2, 2, 8))
    assert small.params["attention"]["out"]["left"].shape == (2, 4, 2)
    assert small.config["low_rank"]["ranks"]["layers/dense"] == 2
    merged = bert_adapter.merge(small.params)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, params())
    assert_near(outputs(small), run(merged, BATCH))


def test_a_merged_model_is_saved_as_a_dense_one(tmp_path):
    small, _ = compress((NET, params()), [BATCH], rank=2, signal="svd")
    merged = bert_adapter.with_params(small, bert_adapter.merge(small.params))
    assert "low_rank" not in merged.config
    bert_adapter.save(merged, tmp_path)
    again = bert_adapter.load_into(tmp_path, (NET, params()))
    assert_near(outputs(again), outputs(small))


def test_factors_of_a_stack_are_those_of_each_of_its_kernels():
    small, _ = compress((NET, params()), [BATCH], rank=2, signal="svd", include="layers")
    merged = bert_adapter.merge(small.params)["layers"]["dense"]["kernel"]
    for got, kernel in zip(merged, params()["layers"]["dense"]["kernel"], strict=True):
        left, values, right = np.linalg.svd(kernel)
        assert_near(got, (left[:, :2] * values[:2]) @ right[:2])


def test_stacks_are_planned_with_one_rank():
    shapes = bert_adapter.select_kernels(bert_adapter.as_model((NET, params())), batch=BATCH)
    planned = bert_adapter.plan(params(), None, budget=0.5, signal="svd", kernels=shapes)
    assert planned.ranks.keys() == SHAPES.keys()
    assert planned.ranks["layers/dense[0]"] == planned.ranks["layers/dense[1]"]
    small, _ = bert_adapter.factorise(
        params(), dict.fromkeys(SHAPES), planned.ranks, shapes=shapes, method="svd", progress=False
    )
    kept = sum(
        planned.ranks[path] * sum(shape) if planned.ranks[path] < np.prod(shape) / sum(shape) else np.prod(shape)
        for path, shape in SHAPES.items()
    )
    assert planned.share == pytest.approx(kept / sum(np.prod(shape) for shape in SHAPES.values()))
    assert bert_adapter.apply(NET, small, BATCH["x"]).shape == (4, 5)


@pytest.mark.parametrize("pattern", [{"include": r"layers/dense\[0\]"}, {"exclude": r"\[1\]"}])
def test_a_stack_is_selected_whole(pattern):
    """The other matrices would be lost."""
    with pytest.raises(ValueError, match=r"got 'layers/dense\[0\]' without 'layers/dense\[1\]'.*'layers/dense' finds"):
        compress((NET, params()), [BATCH], rank=2, signal="svd", **pattern)
    ranks, how = {"layers/dense[0]": 2}, {"shapes": SHAPES, "method": "svd"}
    with pytest.raises(ValueError, match=r"ranks: got 'layers/dense\[0\]' without"):
        bert_adapter.factorise(params(), {"layers/dense[0]": None}, ranks, **how)


def test_ranks_may_be_given_for_a_stack_by_its_path():
    ranks = {"layers/dense": 3, "tied": 2}
    assert bert_adapter.choose_ranks({"layers/dense[0]": (8, 8), "layers/dense[1]": (8, 8), "tied": (8, 8)}, ranks) == {
        "layers/dense[0]": 3,
        "layers/dense[1]": 3,
        "tied": 2,
    }


@pytest.mark.parametrize("options", [{"budget": 0.6}, {"rank": 1}, {"budget": 0.6, "of": "bytes"}])
def test_kernels_of_one_output_stay_dense(options):
    net = nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(1), nn.Dense(2), nn.Dense(2)])
    dense = net, random_params(net, np.zeros((1, 12), np.float32))
    batches = [{"x": np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)}]

    def forward(params, batch):
        return net.apply({"params": params}, batch["x"])

    _, report = compress(dense, batches, forward=forward, gradients="gaussian", **options)
    assert {kernel.shape for kernel in report.kernels if kernel.status == "DENSE"} >= {(12, 1), (1, 2), (2, 2)}
    how = {"forward": forward, "gradients": "gaussian"}
    model = bert_adapter.as_model(dense, forward=forward)
    shapes = bert_adapter.select_kernels(model, batch=batches[0])
    importance = bert_adapter.measure_signal(
        bert_adapter.forward(model), model.params, batches, shapes, gradients="gaussian", progress=False
    )
    known = bert_adapter.decompose(model.params, importance, kernels=shapes, progress=False)
    again, _ = compress(dense, batches, forward=how["forward"], importance=known, budget=0.6)
    assert "left" in again.params["layers_0"]


def test_parameters_are_kept_and_loaded_into_the_callers_module(tmp_path):
    small, _ = compress((NET, params()), [BATCH], rank=2, signal="svd")
    bert_adapter.save(small, tmp_path / "small")
    again = bert_adapter.load_into(tmp_path / "small", (NET, params()))
    assert jax.tree.structure(again.params) == jax.tree.structure(small.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    np.testing.assert_array_equal(outputs(again), outputs(small))
    bert_adapter.save(again, tmp_path / "small")  # a checkpoint, so that it may be replaced


def test_factors_are_trained_with_the_callers_loss():
    small, _ = compress((NET, params()), [BATCH], rank=2, signal="svd")

    def loss(output, batch):
        return jnp.sum((output - batch["y"]) ** 2, axis=1)

    rows = [BATCH | {"y": np.ones((4, 5), np.float32)}]
    tuned, losses = bert_adapter.finetune(small, rows, loss=loss, epochs=2, learning_rate=1e-3, progress=False)
    assert len(losses) == 2
    assert not np.array_equal(tuned.params["layers"]["dense"]["left"], small.params["layers"]["dense"]["left"])


def test_dropout_is_drawn_in_training_alone():
    """By the switch of the module's call, or by the third argument of the caller's function."""
    from bert_adapter.model import training_forward

    def mine(params, batch, key=None):
        return NET.apply({"params": params}, batch["x"], key is None, rngs={} if key is None else {"dropout": key})

    for model in (bert_adapter.as_model((NET, params())), bert_adapter.as_model((NET, params()), forward=mine)):
        drawn = [training_forward(model)(params(), BATCH, jax.random.key(i)) for i in (0, 0, 1)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])
        np.testing.assert_array_equal(outputs(model), run(params(), BATCH))


class PerStep(nn.Module):
    """An output for each step, and a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="twice")
        return nn.Dense(6, name="last")(layer(nn.tanh(layer(x))))


def test_steps_of_padding_do_not_count():
    """Whatever they hold, in outputs (batch, time, width) and in layers called twice; all others count once."""
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]])
    filled = np.where(mask[:, :, None] > 0, BATCH["x"], np.float32(7))
    made = random_params(PerStep(), BATCH["x"])
    found = []
    for x, numbers in ((BATCH["x"], 1), (filled, np.array([[1], [2], [3], [1]]))):
        batch = {"x": x, "attention_mask": numbers * mask}
        small, report = compress((PerStep(), made), [batch], rank=2, signal="kfac")
        found.append((small.params, report.kernels[0].loss, outputs_of(small, batch)))
    for ours, theirs in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        assert_near(ours, theirs)
    np.testing.assert_array_equal(found[0][2][mask == 0], 0)


class Pooled(nn.Module):
    """Layers that see every step twice, every step, and one for each example."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(8, name="twice")
        x = nn.Dense(8, name="once")(nn.tanh(twice(nn.tanh(twice(x)))))
        return nn.Dense(6, name="pooled")(x.sum(axis=1))


def test_errors_are_divided_by_the_steps_that_enter_each_kernel():
    """What is summed over steps apart is as many times too large as there are, which differs from kernel to kernel."""
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]])
    made, batch = random_params(Pooled(), BATCH["x"]), BATCH | {"attention_mask": mask, "weights": np.full(4, 0.5)}
    model = bert_adapter.as_model((Pooled(), made))
    shapes, forward = bert_adapter.select_kernels(model, batch=batch), bert_adapter.forward(model)
    importance = bert_adapter.measure_signal(forward, made, [batch], shapes, signal="kfac", progress=False)
    known = bert_adapter.decompose(made, importance, signal="kfac", progress=False)
    assert known.examples == {"once": 2 * 4, "pooled": 2 * 2, "twice": 2 * 8}


def test_an_importance_of_something_else_is_refused():
    """Of another function with the same parameters, or of other batches, decomposed or not."""
    how: dict[str, Any] = {"signal": "activation", "rank": 2, "include": "tied", "forward": run}
    for forward in (run, bert_adapter.forward(bert_adapter.as_model((NET, params()), forward=run))):
        measured = partial(bert_adapter.measure_signal, params=params(), paths=["tied"], signal="activation")
        importance = measured(forward, batches=[BATCH], progress=False)
        _, report = compress((NET, params()), [BATCH], importance=importance, **how)
        assert [kernel.path for kernel in report.kernels] == ["tied"]
    how["importance"] = importance
    with pytest.raises(ValueError, match="importance: measured on another module, whose parameters are the same"):
        compress((NET, params()), [BATCH], **{**how, "forward": lambda params, batch: 2 * run(params, batch)})
    how["importance"] = bert_adapter.decompose(params(), importance, signal="activation", progress=False)
    compress((NET, params()), [BATCH], **how)
    with pytest.raises(ValueError, match="importance: measured on 1 batches which are not the 2 given"):
        compress((NET, params()), [BATCH, BATCH], **how)


def outputs_of(model, batch):
    return np.asarray(bert_adapter.forward(model)(model.params, batch))


def test_outputs_per_step_are_followed_in_every_direction():
    """E[vv'] is the identity over all steps that count: two batches of one text twice as long have the same mean."""
    made = random_params(PerStep(), BATCH["x"])
    small, report = compress((PerStep(), made), [BATCH], budget=0.8)
    assert report.predicted is not None
    assert np.isfinite(report.predicted)
    assert bert_adapter.loss_increase(bert_adapter.as_model((PerStep(), made)), small, [BATCH]) >= 0


@flax.struct.dataclass
class Result:
    hidden: Any
    logits: Any


ONE, TWO = np.zeros((1, 2)), np.ones((1, 2))


@pytest.mark.parametrize(
    ("output", "which"),
    [
        (TWO, None),
        ((TWO,), None),
        ((ONE, TWO), 1),
        ({"a": ONE, "b": TWO}, "b"),
        ({"a": ONE, "logits": TWO}, None),
        (Result(ONE, TWO), None),
        (Result(TWO, ONE), "hidden"),
        (((ONE, {"logits": TWO})), 1),
    ],
)
def test_output_that_counts(output, which):
    np.testing.assert_array_equal(counted(output, which), TWO)


@pytest.mark.parametrize(
    ("output", "which", "names"),
    [
        ((ONE, TWO), None, r"tuple of \[0, 1\]"),
        ({"a": ONE, "b": TWO}, None, r"dict of \['a', 'b'\]"),
        ({"a": ONE}, "b", r"got 'b'.*dict of \['a'\]"),
        (Result(ONE, TWO), "pooled", r"Result of \['hidden', 'logits'\]"),
        (None, None, "NoneType"),
    ],
)
def test_output_that_is_not_clear_is_named(output, which, names):
    with pytest.raises(ValueError, match=f"{names}.*output= says which"):
        counted(output, which)


def test_forward_and_output_say_how_a_model_is_called():
    def forward(params, batch):
        return {"hidden": batch["x"], "mean": run(params, batch)}

    small, _ = compress((NET, params()), [BATCH], rank=2, signal="svd", forward=forward, output="mean")
    assert outputs(small).shape == (4, 5)


class Shared(nn.Module):
    """One block's kernel in every step of a scan."""

    @nn.compact
    def __call__(self, x):
        many = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return nn.Dense(4, name="last")(many(name="layers")(x, None)[0].sum(axis=1))


class Lanes(nn.Module):
    """One kernel in every lane of a vmap."""

    @nn.compact
    def __call__(self, x):
        lift = {"variable_axes": {"params": None}, "split_rngs": {"params": False}, "in_axes": (1, None), "out_axes": 1}
        many = nn.vmap(Block, **lift)
        return nn.Dense(4, name="last")(many(name="layers")(x, None)[0].sum(axis=1))


@pytest.mark.parametrize("net", [Shared(), Lanes()])
def test_kernels_whose_uses_cannot_be_told_apart_stay_dense(net):
    made, why = random_params(net, BATCH["x"]), "is called 3 times with one kernel by nn.scan or nn.vmap"
    model = bert_adapter.as_model((net, made))
    assert bert_adapter.select_kernels(model, batch=BATCH) == {"last": (8, 4)}
    with pytest.raises(ValueError, match=f"'layers/dense', which cannot be factorised: it {why}"):
        bert_adapter.select_kernels(model, include="dense", batch=BATCH)
    with pytest.raises(ValueError, match=rf"the layer 'layers/dense' {why}.*loop over them in Python"):
        capture(bert_adapter.forward(model), made, BATCH, frozenset({"layers/dense"}))


MORE = {"ids": np.zeros((4, 3), np.int32), "x": BATCH["x"]}


@cache
def mixed():
    return Inner(), random_params(Inner(), MORE["ids"], MORE["x"])


def test_what_cannot_be_factorised_stays_unless_it_is_selected():
    small, report = compress(mixed(), [MORE], rank=2, signal="svd")
    assert [kernel.path for kernel in report.kernels] == ["first", "last"]
    assert outputs_of(small, MORE).shape == (4, 4)


def test_a_kernel_that_is_not_multiplied_by_as_it_is_is_refused():
    """On factors, both would be halved."""

    def halved(params, batch):
        return run(params | {"tied": jax.tree.map(lambda leaf: leaf / 2, params["tied"])}, batch)

    how: dict[str, Any] = {"rank": 2, "signal": "svd", "include": "tied|general", "forward": halved}
    with pytest.raises(ValueError, match=r"exact factors of \['tied'\] stand in their place.*: exclude='tied' keeps"):
        compress((NET, params()), [BATCH], **how)
    _, report = compress((NET, params()), [BATCH], **how, exclude="tied")
    assert [kernel.path for kernel in report.kernels] == ["general"]


@pytest.mark.parametrize("shape", [(2, 6), (6, 2)])
def test_exact_factors_are_the_kernel_and_the_identity_of_its_smaller_side(shape):
    kernel = np.arange(12.0, dtype=np.float32).reshape(shape)
    layer = with_exact_factors({"layer": {"kernel": kernel}}, {"layer": shape}, ["layer"])["layer"]
    np.testing.assert_array_equal(layer["left"] @ layer["right"], kernel)
    assert min(layer["left"].size, layer["right"].size) == 4


def test_an_output_that_is_random_tells_nothing():
    def noisy(params, batch):
        return run(params, {"x": batch["x"] + np.random.default_rng().normal(size=(1, 1, 1)).astype(np.float32)})

    _, report = compress((NET, params()), [BATCH], rank=2, signal="svd", include="tied", forward=noisy)
    assert [kernel.path for kernel in report.kernels] == ["tied"]


def test_names_with_a_slash_are_refused():
    net = nn.Sequential([nn.WeightNorm(nn.Dense(8)), nn.Dense(2)])
    made = net.init(jax.random.key(0), BATCH["x"])["params"]
    with pytest.raises(ValueError, match=r"got the name '.*/kernel/scale', as nn\.WeightNorm makes it, wanted names"):
        compress((net, made), [BATCH], rank=2, signal="svd", forward=run)


def test_heads_of_one_number_run_on_factors():
    """Of (heads, 1, width), the matrix does not tell whether the axis of 1 is one of inputs."""
    net = nn.MultiHeadDotProductAttention(8)
    net = nn.Sequential([lambda x: (x, x), net])
    made = random_params(net, BATCH["x"])
    small, _ = compress((net, made), [BATCH], rank=2, signal="svd", forward=lambda p, batch: forward_of(net, p, batch))
    assert_near(outputs(small), forward_of(net, bert_adapter.merge(small.params), BATCH))


def forward_of(net, params, batch):
    return net.apply({"params": params}, batch["x"]).sum(axis=1)


class Start(nn.Module):
    """Called with nothing."""

    @nn.compact
    def __call__(self):
        return self.param("embedding", nn.initializers.ones, (3, 8))


class Named(nn.Module):
    """Modules called as parameters are."""

    @nn.compact
    def __call__(self, x):
        x = x + Start(name="start")()[None]
        return nn.Dense(5, name="kernel")(nn.Dense(8, name="embedding")(x)).sum(axis=1)


def test_modules_may_be_called_as_parameters_are():
    model = bert_adapter.as_model((Named(), random_params(Named(), BATCH["x"])))
    assert bert_adapter.select_kernels(model, include="kernel", batch=BATCH) == {"kernel": (8, 5)}
    assert list(bert_adapter.select_kernels(model, batch=BATCH)) == ["embedding", "kernel"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("conv", "Conv: its kernel slides over neighbours"),
        ("tripled", "Tripled: its class has a call of its own"),
        ("positions", "the first axis of its input is not that of the examples"),
        ("odd", "Einsum: its equation 'btd,ntd->bnt' does not multiply by one matrix"),
    ],
)
def test_what_cannot_be_factorised_is_refused_by_name(path, why):
    with pytest.raises(ValueError, match=f"include='{path}' selects '{path}', which cannot be factorised: {why}"):
        compress(mixed(), [MORE], rank=2, signal="svd", include=path)


EQUATIONS = {
    "...i,io->...o": None,
    "btd,dhk->bthk": None,
    "bthk,hkd->btd": None,
    "bhtk,hkd->btd": None,
    "btd,dhk->bhtk": None,
    "btd,hdk->bhtk": "does not multiply by one matrix",
    "btd,td->bt": "does not multiply by one matrix",
    "btd,dhk->btkh": "does not multiply by one matrix",
    "...d,bdk->b...k": "does not multiply by one matrix",
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_of_one_contraction_is_a_layer(equation):
    from bert_adapter.layers.einsum import EINSUM

    refused = EINSUM.refuses(nn.Einsum((2, 3, 4), equation))
    assert (refused is None) == (EQUATIONS[equation] is None)
    assert EQUATIONS[equation] is None or EQUATIONS[equation] in refused


def test_einsum_may_put_another_axis_before_that_of_the_examples():
    layer, x = nn.Einsum((8, 5), "bti,io->tbo", use_bias=False, name="turned"), BATCH["x"][:3]  # as many as steps
    net = nn.Sequential([layer, lambda y: y.sum(axis=0)])
    made = {"layers_0": {"kernel": rng.normal(size=(8, 5)).astype(np.float32)}}

    def loss(output, batch):
        return jnp.sum(jnp.sin(output), axis=1)

    def forward(params, batch):
        return bert_adapter.apply(net, params, batch["x"])

    how: dict[str, Any] = {"gradients": loss, "statistics": ("row_gram",), "progress": False}
    importance = bert_adapter.measure_importance(forward, made, [{"x": x}], ["layers_0"], **how)
    steps, output = x.sum(axis=1), forward(made, {"x": x})
    assert_near(importance["layers_0"].row_gram, np.einsum("bi,bj,bo->ij", steps, steps, np.cos(output) ** 2))
    factors = {"layers_0": {"kernel": FACTORISED, "left": made["layers_0"]["kernel"], "right": np.eye(5, dtype="f4")}}
    assert_near(forward(factors, {"x": x}), output)


def mpnet():
    """A model as users bring it: of no family, with a config of its own or none."""
    return NET, params()


class Three(nn.Module):
    @nn.compact
    def __call__(self, input_ids, attention_mask):
        return nn.Dense(2)(input_ids)


WRONG: dict[str, tuple[Any, str]] = {
    "a module alone": (lambda: compress(NET, [BATCH], budget=0.5), r"got the module Net without parameters.*\(Net\("),
    "all variables": (lambda: compress((NET, {"params": params()}), [BATCH], rank=2), r"wanted variables\['params'\]"),
    "no batch": (
        lambda: compress(mpnet(), [], rank=2, signal="svd"),
        "batch: got none, wanted one to find the kernels",
    ),
    "other names": (
        lambda: compress(mpnet(), [{"y": BATCH["x"]}], rank=2),
        r"got \['y'\], wanted \['x'\] too.*forward=",
    ),
    "no mask": (
        lambda: compress((Three(), {}), [{"input_ids": BATCH["x"]}], rank=2),
        r"got \['input_ids'\], wanted \['attention_mask'\] too",
    ),
    "a tokenizer": (
        lambda: bert_adapter.tokenizer(bert_adapter.as_model(mpnet())),
        "a model of your own, Net, which has no",
    ),
    "texts": (
        lambda: bert_adapter.text_batches(bert_adapter.as_model(mpnet()), ["a"]),
        "has no tokenizer: make batches",
    ),
    "a head": (lambda: bert_adapter.with_head(bert_adapter.as_model(mpnet()), 2), "put one into your module"),
    "training without a loss": (
        lambda: bert_adapter.finetune(bert_adapter.as_model(mpnet()), [BATCH]),
        r"loss: got none for Net, a model of your own: wanted a function \(output, batch\)",
    ),
    "a score": (
        lambda: bert_adapter.score(bert_adapter.as_model(mpnet()), bert_adapter.LabelledTexts([("a", "b")], [1.0])),
        "a model of your own, Net, which has no tokenizer",
    ),
    "an int": (lambda: compress(3, [BATCH], rank=2), r"wanted a Model, a directory, \(module, params\).*got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_in_a_sentence(name):
    call, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_module_of_a_family_without_a_config_is_a_model_of_ones_own():
    """All its kernels are selected that the output depends on, as the pooler's is not."""
    from bert_adapter.sample import sample_model

    model = sample_model()
    batch = {"input_ids": np.ones((2, 4), np.int32), "attention_mask": np.ones((2, 4), np.int32)}
    _, report = compress((model.module, model.params), [batch], rank=2, signal="svd")
    _, wanted = compress(model, [], rank=2, signal="svd")
    with pytest.raises(ValueError, match="'pooler/dense', which cannot be factorised: the output that counts does not"):
        compress((model.module, model.params), [batch], rank=2, signal="svd", include="pooler")
    assert {kernel.path for kernel in wanted.kernels} == {kernel.path for kernel in report.kernels}


def test_model_without_config_and_files_is_a_model_of_ones_own(tmp_path):
    """A `Model` of a module that no family knows, as (module, params) are."""
    small, _ = compress(bert_adapter.Model(*mpnet(), {}, {}), [BATCH], rank=2, signal="svd")
    bert_adapter.save(small, tmp_path / "small")
    with pytest.raises(
        ValueError, match=r"holds parameters alone: load_into\(directory, \(module, params\)\) reads them"
    ):
        bert_adapter.load(tmp_path / "small")


def test_parameters_of_another_module_are_not_loaded(tmp_path):
    small, _ = compress(mixed(), [MORE], rank=2, signal="svd")
    bert_adapter.save(small, tmp_path / "small")
    with pytest.raises(ValueError, match="the parameters do not fit the model"):
        bert_adapter.load_into(tmp_path / "small", mpnet())


def test_default_method_fits_the_weights():
    kernel, eye = np.diag(np.arange(9.0, 1, -1)).astype(np.float32), np.eye(8, dtype=np.float32)
    both = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}
    kinds = {"kronecker": wlra.Kronecker(eye, eye), "svd": None, "anderson": np.ones((8, 8), np.float32)}
    assert [method_for({"a": weights}, ["a"]) for weights in kinds.values()] == list(kinds)
    _, (report,) = bert_adapter.factorise(both, {"a": kinds["kronecker"]}, {"a": 2}, progress=False)
    assert "kronecker" in report.loss
    with pytest.raises(ValueError, match=r"got wlra\.Kronecker for some kernels"):
        bert_adapter.factorise(both, {"a": kinds["kronecker"], "b": None}, {"a": 2, "b": 2})


def test_plan_knows_the_signal_that_measures_nothing():
    planned = bert_adapter.plan(params(), None, budget=0.9, signal="svd", kernels={"tied": (8, 8)})
    assert planned.ranks["tied"] <= 4


class Warm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name="layer")(x) * self.param("temperature", nn.initializers.ones, ())


def test_parameters_without_an_axis_are_kept(tmp_path):
    given = Warm(), {"layer": {"kernel": np.eye(8, dtype=np.float32)}, "temperature": np.array(2, np.float32)}
    small, _ = compress(given, [{"x": np.ones((2, 8), np.float32)}], rank=2, signal="svd")
    bert_adapter.save(small, tmp_path)
    assert np.shape(bert_adapter.load_into(tmp_path, given).params["temperature"]) == ()


class Dead(nn.Module):
    """A layer whose output counts nothing, as those that begin at zero do."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="live")(x) + 0.0 * nn.Dense(8, name="dead")(x)


@pytest.mark.parametrize("signal", ["combined", "kfac", "exact"])
def test_a_kernel_that_counts_nothing_is_named(signal):
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    model = Dead(), random_params(Dead(), x)
    with pytest.raises(ValueError, match=r"dead: .*zero.*exclude='dead' keeps it dense"):
        bert_adapter.compress(model, [{"x": x}], budget=0.75, signal=signal, progress=False)
