"""A compressed model follows the dense one's outputs on texts, and is never further from them on those held out."""

import functools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import bert_adapter
from bert_adapter import compressing, healing
from bert_adapter.checkpoint import load, save
from bert_adapter.checkpoint.bits import FEWER, Stored, as_stored, rounded, stored_as
from bert_adapter.checkpoint.names import by_path, dtypes_of
from bert_adapter.cli import main
from bert_adapter.evaluate import loss_increase
from bert_adapter.families import module_for
from bert_adapter.heads import with_head
from bert_adapter.healing import balanced, best_of, divided, joined
from bert_adapter.kinds import as_model
from bert_adapter.layers.following import leaving, mean_apart
from bert_adapter.layers.marker import FACTORISED, Factorised
from bert_adapter.model import forward
from bert_adapter.pools import batch_of, count_of, dealt, held_out, pools_of, text_of, unmasked_text_of
from bert_adapter.straight_through import nearest, straight_through

TEXTS = tiny.rows().texts[:32]
heal = partial(bert_adapter.heal, progress=False, batch_size=8, learning_rate=2e-2)


@functools.cache
def dense():
    return tiny.model(size=0.3)


@functools.cache
def batches():
    return bert_adapter.text_batches(dense(), TEXTS, batch_size=5)


@functools.cache
def others():
    return bert_adapter.text_batches(dense(), tiny.rows().texts[32:], batch_size=8)


@functools.cache
def small():
    return bert_adapter.compress(dense(), [], rank=4, signal="svd", progress=False)[0]


@functools.cache
def healed():
    return heal(small(), dense(), batches(), heldout=others(), epochs=4)


def test_the_loss_falls_on_texts_that_it_does_not_see():
    model, gained = healed()
    before, after = (loss_increase(dense(), one, others(), progress=False) for one in (small(), model))
    np.testing.assert_allclose([gained.before, gained.after], [before, after], rtol=1e-4)
    assert gained.after < 0.9 * gained.before
    assert gained.kept in gained.losses
    assert gained.losses[gained.kept] == gained.after == min(gained.losses.values())
    assert (gained.texts, gained.heldout) == (32, 8)
    assert f"{gained.after:.4g} on 8 texts held out" in repr(gained)


def test_all_but_tables_moves_and_nothing_that_was_given():
    given = bert_adapter.compress(dense(), [], rank=4, signal="svd", progress=False)[0]
    for (path, leaf), (_, before), (_, same) in zip(
        *(jax.tree_util.tree_leaves_with_path(one.params) for one in (healed()[0], small(), given)), strict=True
    ):
        np.testing.assert_array_equal(before, same)
        table, pooler = "embedding'" in str(path[-1]), "pooler" in str(path)  # the pooler's output is not used
        assert np.array_equal(leaf, before) == (table or pooler), path


def test_parameters_come_back_bit_for_bit_if_nothing_is_gained():
    model, gained = heal(dense(), dense(), batches(), heldout=others(), epochs=8, learning_rate=1.0)
    assert model is dense()
    assert (gained.kept, gained.after) == (0, gained.before)
    assert gained.steps == 32  # lower rates might have brought it back
    assert "nothing gained" in repr(gained)


def test_the_same_seed_gives_the_same_and_another_does_not():
    again, other = (heal(small(), dense(), batches(), heldout=others(), epochs=4, seed=seed) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again[0].params, healed()[0].params)
    assert again[1].losses == healed()[1].losses != other[1].losses


def distance(model):
    """How far what leaves the compressed layers is from what leaves the dense ones, on the texts held out."""
    (batch,) = others()
    paths = healing.compressed_layers(small().params, {})

    def apart(params, theirs):
        found = [leaving(forward(one), each, batch, paths)[1] for one, each in ((model, params), (dense(), theirs))]
        assert [{path for path, _ in each} for each in found] == [paths, paths]
        return jnp.mean(mean_apart(found[0], found[1], batch))

    return float(jax.jit(apart)(model.params, dense().params))


def test_what_leaves_the_layers_comes_nearer_too(monkeypatch):
    both = distance(healed()[0])
    monkeypatch.setattr(healing, "with_layers", lambda recipe, beside, *_, **__: (recipe._replace(teach=None), beside))
    alone, _ = heal(small(), dense(), batches(), heldout=others(), epochs=4)
    assert both < 0.9 * distance(alone)
    assert both < distance(small())


def test_layers_count_as_much_as_the_output_at_the_start(monkeypatch):
    shares = []
    found = healing.with_layers

    def noted(*arguments, **options):
        recipe, beside = found(*arguments, **options)
        shares.append(float(beside.share))
        return recipe, beside

    monkeypatch.setattr(healing, "with_layers", noted)
    _, gained = heal(small(), dense(), batches(), heldout=others(), epochs=1)
    np.testing.assert_allclose(shares[0] * distance(small()), gained.before, rtol=1e-4)


def test_a_model_without_compressed_layers_follows_the_output_alone():
    assert healing.compressed_layers(dense().params, {}) == frozenset()
    assert healing.compressed_layers(dense().params, {"pooler/dense": "int8"}) == {"pooler/dense"}
    nudged = dense()._replace(params=jax.tree.map(lambda leaf: leaf * 1.01, dense().params))
    _, gained = heal(nudged, dense(), batches(), heldout=others(), epochs=1)
    assert gained.after <= gained.before


@pytest.mark.parametrize("masked", [True, False])
def test_distances_of_layers_are_relative_and_do_not_see_padding(masked):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 4, 2, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], np.int32)
    batch = {"input_ids": mask, **({"attention_mask": mask} if masked else {})}
    seen = (mask if masked else np.ones_like(mask))[:, :, None, None]
    wanted = (seen * (one - other) ** 2).sum(axis=(1, 2, 3)) / (seen * other**2).sum(axis=(1, 2, 3))
    one, other = map(jnp.asarray, (one, other))
    ours, theirs = {("a", 0): one, ("a", 1): other}, {("a", 0): other, ("a", 1): other, ("b", 0): other}
    got = mean_apart(ours, theirs, batch)
    np.testing.assert_allclose(got, wanted / 2, rtol=1e-5)


def test_what_is_computed_again_is_not_followed():
    class Looped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(4, name="inside")(nn.Dense(4, name="before")(x))

    net, x = Looped(), np.ones((2, 3), np.float32)
    params = net.init(jax.random.key(0), x)["params"]

    def run(params, batch):
        return net.apply({"params": params}, batch["x"])

    def total(params):
        output, found = leaving(run, params, {"x": x}, frozenset({"before", "inside"}))
        assert list(found) == [("before", 0)]
        return jnp.sum(output) + sum(map(jnp.sum, found.values()))

    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), jax.jit(jax.grad(total))(params)))


def with_relu(model):
    """Another module with the same parameters."""
    entries = model.config | {"hidden_act": "relu"}
    return model._replace(module=module_for(entries, model.files), config=entries)


def test_a_run_that_was_killed_ends_where_another_one_does(tmp_path, monkeypatch):
    file = tmp_path / "state"
    monkeypatch.setattr(healing, "SAVE_EVERY", 0.0)
    saved = healing.save_state

    def killed(state, losses, file):
        saved(state, losses, file)
        if state.step == 7:
            raise KeyboardInterrupt

    run = partial(heal, dense=dense(), batches=batches(), heldout=others(), file=file)
    monkeypatch.setattr(healing, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(small(), epochs=4)
    monkeypatch.setattr(healing, "save_state", saved)
    again, gained = run(small(), epochs=4)
    jax.tree.map(np.testing.assert_array_equal, again.params, healed()[0].params)
    assert gained.losses == healed()[1].losses
    monkeypatch.setattr(healing, "step_function", lambda recipe: lambda *_, **__: pytest.fail("it goes on"))
    ended, _ = run(small(), epochs=4)
    jax.tree.map(np.testing.assert_array_equal, ended.params, healed()[0].params)
    differs: dict[str, Any] = {
        "model": {"small": healed()[0]},
        "texts": {"batches": batches()[1:]},
        "options": {"seed": 1},
        "dense module": {"dense": with_relu(dense())},
    }
    for name, options in differs.items():
        with pytest.raises(ValueError, match=f"the state of another training .*another {name}"):
            run(**{"small": small(), "epochs": 4} | options)


def test_a_default_rate_that_proves_too_high_is_lowered(tmp_path, monkeypatch):
    """A run that is killed at the second rate goes on there, and a rate that was given is kept."""
    tried, rates, saved, file = [], healing.learning_rates, healing.save_state, tmp_path / "state"

    def noted(highest, *rest):
        tried.append(highest)
        return rates(highest, *rest)

    def killed(state, losses, file):
        saved(state, losses, file)
        if len(tried) == 2 and state.step == 5:
            raise KeyboardInterrupt

    for name, value in {"RATE": 30.0, "LOWER": 1e-4, "SAVE_EVERY": 0.0, "learning_rates": noted}.items():
        monkeypatch.setattr(healing, name, value)
    how: dict[str, Any] = {"heldout": others(), "epochs": 4, "batch_size": 8, "progress": False}
    run = partial(bert_adapter.heal, small(), dense(), batches(), **how)
    model, gained = run()
    assert tried[1] == pytest.approx(1e-4 * tried[0])
    assert len(tried) == 2
    assert gained.after < gained.before
    assert gained.steps == 16
    tried.clear()
    monkeypatch.setattr(healing, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(file=file)
    monkeypatch.setattr(healing, "save_state", saved)
    again, same = run(file=file)
    assert len(tried) == 3
    assert same.losses == gained.losses
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    tried.clear()
    run(learning_rate=1.0)
    assert tried == [1.0]


def test_what_was_healed_says_so_and_is_saved_and_loaded(tmp_path):
    save(healed()[0], tmp_path / "healed")
    found = load(tmp_path / "healed")
    jax.tree.map(np.testing.assert_array_equal, found.params, healed()[0].params)
    assert found.config["low_rank"]["healed"]["after"] == pytest.approx(healed()[1].after)
    assert "healed" not in small().config["low_rank"]


def test_compress_heals_what_it_made():
    more = {"rank": 4, "signal": "svd", "progress": False}
    texts = bert_adapter.text_batches(dense(), tiny.rows().texts)
    model, report = bert_adapter.compress(dense(), [], heal=texts, **more)
    alone, gained = bert_adapter.heal(small(), dense(), texts, progress=False)
    jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)
    assert report.healed is not None
    assert report.healed.losses == gained.losses
    assert report.seconds["heal"] == report.healed.seconds
    with pytest.raises(ValueError, match="batches: got 3 texts that count beside those held out"):
        bert_adapter.compress(dense(), [], heal=bert_adapter.text_batches(dense(), TEXTS[:4]), **more)


def test_rows_that_weigh_nothing_and_labels_do_not_matter():
    spoilt = [
        {name: np.concatenate([array, array[:1]]) for name, array in batch.items()}
        | {"weights": np.append(np.ones(len(batch["input_ids"])), 0), "labels": np.zeros(len(batch["input_ids"]) + 1)}
        for batch in batches()
    ]
    got, _ = heal(small(), dense(), spoilt, heldout=others(), epochs=4)
    jax.tree.map(np.testing.assert_array_equal, got.params, healed()[0].params)


def test_balanced_factors_have_the_same_products_and_equal_gram_matrices():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(7, 3)) * [1e-3, 1, 1e3], rng.normal(size=(3, 5))
    layer = {"kernel": FACTORISED, "left": left.astype("f4"), "right": right.astype("f4"), "bias": np.ones(5)}
    found = balanced({"layer": layer, "left": np.ones((2, 2))})
    assert (found["left"] == 1).all()
    assert found["layer"]["bias"] is layer["bias"]
    ours, theirs = (np.float64(one["left"]) @ one["right"] for one in (found["layer"], layer))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=100 * tiny.EPS * np.abs(theirs).max())
    grams = found["layer"]["left"].T @ found["layer"]["left"], found["layer"]["right"] @ found["layer"]["right"].T
    np.testing.assert_allclose(*grams, rtol=0, atol=100 * tiny.EPS * np.abs(grams[0]).max())


def test_every_row_is_dealt_once_an_epoch():
    pools = pools_of([{"x": np.arange(7)}, {"x": np.arange(6).reshape(3, 2)}, {"x": np.arange(7, 10)}])
    assert [count_of(pool) for pool in pools] == [10, 3]
    for rng in (None, np.random.default_rng(0)):
        made = [batch_of(pools, deal) for deal in dealt(pools, 4, rng)]
        assert sorted(batch["x"].shape for batch in made) == [(3, 2), (4,), (4,), (4,)]
        seen = np.concatenate([np.ravel(batch["x"][batch["weights"] > 0]) for batch in made if batch["x"].ndim == 1])
        assert sorted(seen) == list(range(10))


def test_what_is_held_out_depends_on_what_rows_hold():
    values = np.random.default_rng(0).normal(size=(40, 3))
    found = []
    for order in (np.arange(40), np.random.default_rng(1).permutation(40)):
        rest, held = held_out(pools_of([{"x": values[order]}]), 5)
        assert (count_of(rest[0]), count_of(held[0])) == (35, 5)
        found.append({tuple(row) for row in held[0]["x"]})
    assert found[0] == found[1]
    twice = pools_of([{"x": np.concatenate([values, values])}])
    rest, held = held_out(twice, 8)
    assert not {tuple(row) for row in rest[0]["x"]} & {tuple(row) for row in held[0]["x"]}


def wider(batch):
    """The same rows with more padding."""
    return {name: np.pad(array, [(0, 0), (0, 4)]) for name, array in batch.items()}


def texts_in(pools, said):
    """What the rows say, and how many there are."""
    rows = [{name: array[row] for name, array in pool.items()} for pool in pools for row in range(count_of(pool))]
    return {tuple(said(row)["input_ids"]) for row in rows}, len(rows)


@pytest.mark.parametrize(("architecture", "said"), [("BertModel", text_of), ("BertForMaskedLM", unmasked_text_of)])
def test_a_text_that_is_repeated_is_on_one_side_however_it_is_padded_and_masked(architecture, said):
    """Else what is held out has been trained on."""
    found = bert_adapter.text_batches(tiny.model(architecture), TEXTS * 2)
    if said is text_of:  # the other's labels are padded with -100
        found = [*found[::2], *map(wider, found[1::2])]
    rest, held = (texts_in(pools, said) for pools in held_out(pools_of(found), 6, said))
    assert not rest[0] & held[0]
    assert (len(rest[0] | held[0]), rest[1] + held[1]) == (len(set(TEXTS)), 2 * len(TEXTS))
    assert held[1] == 6


def test_texts_that_are_trained_on_are_not_held_out():
    both = [*others(), *batches()]
    _, gained = heal(small(), dense(), batches(), heldout=both, epochs=1)
    assert (gained.texts, gained.heldout) == (32, 8)
    for heldout, message in (
        (batches(), "heldout: got the texts that are trained on, wanted others"),
        (None, "batches: got one text, wanted others too"),
    ):
        with pytest.raises(ValueError, match=message):
            heal(
                small(),
                dense(),
                bert_adapter.text_batches(dense(), ["a fox"] * 64) if heldout is None else batches(),
                heldout=heldout,
            )


def test_rows_of_other_names_are_known_by_all_that_they_hold():
    """A caller's own `forward` may call them as it likes."""

    def run(params, batch):
        return bert_adapter.apply(dense().module, params, input_ids=batch["a"], attention_mask=batch["b"])

    given = [{"a": batch["input_ids"], "b": batch["attention_mask"]} for batch in batches()]
    _, gained = heal(small(), dense(), given, forward=run, epochs=1)
    assert (gained.texts, gained.heldout) == (30, 2)


def test_rows_with_labels_and_without_are_dealt_together():
    some = [{**batch, "labels": np.zeros(len(batch["input_ids"]), np.int32)} for batch in batches()[::2]]
    assert len(healing.healing_plan(dense(), dense(), [*some, *batches()[1::2]]).pools) == 1


def test_tables_are_set_apart_and_put_back():
    trained, frozen = divided(small().params)
    assert [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(frozen)] == ["embedding"] * 3
    whole = joined(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(small().params)
    jax.tree.map(np.testing.assert_array_equal, whole, small().params)


def test_factorised_tables_are_set_apart_too():
    model = tiny.with_factors(dense(), {"embeddings/word_embeddings": 3})
    trained, frozen = divided(model.params)
    assert set(by_path(frozen)) >= {f"embeddings/word_embeddings/{side}" for side in ("left", "right")}
    assert not [path for path in by_path(trained) if "word_embeddings" in path]
    jax.tree.map(np.testing.assert_array_equal, joined(trained, frozen), model.params)


@functools.cache
def healed_as(dtype):
    """The compressed model, to be stored so, before and after healing; and what that gained."""
    dtypes = dict.fromkeys(small().config["low_rank"]["ranks"], dtype)
    section = small().config["low_rank"] | {"schema": 2, "dtypes": dtypes}
    given = small()._replace(config=small().config | {"low_rank": section})
    return given, *heal(given, dense(), batches(), heldout=others(), epochs=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_what_was_gained_is_that_of_the_matrices_as_they_are_stored(dtype):
    given, model, gained = healed_as(dtype)
    for one, loss in ((given, gained.before), (model, gained.after)):
        stored = one._replace(params=as_stored(one.params, dtypes_of(one.config)))
        np.testing.assert_allclose(loss_increase(dense(), stored, others(), progress=False), loss, rtol=1e-4)
    assert gained.after < gained.before


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_what_is_returned_is_what_is_stored(dtype):
    _, model, _ = healed_as(dtype)
    jax.tree.map(np.testing.assert_array_equal, as_stored(model.params, dtypes_of(model.config)), model.params)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", FEWER)
@pytest.mark.parametrize("shape", [(130, 67), (2, 5, 64)], ids=str)
def test_the_nearest_that_is_stored_is_that_of_the_file(dtype, by_rows, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32) ** 3
    array[..., :3] = 0
    array[..., 3:9] *= 1e-6  # of float16 subnormal
    array[..., 9:12] *= 1e-9
    run = jax.jit(nearest, static_argnames=("dtype", "by_rows"))
    got = np.asarray(run(jnp.asarray(array), dtype=dtype, by_rows=by_rows))
    for one, its in zip(array, got, strict=True) if array.ndim == 3 else [(array, got)]:
        np.testing.assert_allclose(its, rounded(one, dtype, by_rows), rtol=1e-6)
    np.testing.assert_allclose(nearest(jnp.asarray(got), dtype, by_rows), got, rtol=1e-6)


def test_gradients_pass_through_rounding():
    params = {"layer": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)}}
    stored = stored_as(params, {"layer": "int4"})
    assert stored == (Stored("layer/kernel", "int4", False),)
    used, pull = jax.vjp(lambda params: straight_through(params, stored), params)
    np.testing.assert_allclose(used["layer"]["kernel"], rounded(params["layer"]["kernel"], "int4", False), rtol=1e-6)
    (back,) = pull(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_best_step_is_the_first_with_the_lowest_loss():
    nan = np.nan
    assert best_of(1.0, np.array([nan, 0.5, nan, 0.6])) == (2, 0.5)
    assert best_of(1.0, np.array([nan, 1.0])) == (0, 1.0)


def test_what_high_rates_cost_low_ones_bring_back():
    """A model that is nearly healed is worse at first than it was, and better in the end."""
    nearly, before = heal(small(), dense(), batches(), heldout=others(), epochs=40, learning_rate=3e-3)
    _, gained = heal(nearly, dense(), batches(), heldout=others(), epochs=40, learning_rate=2e-2)
    losses = [gained.losses[step] for step in sorted(gained.losses)]
    assert losses[0] == pytest.approx(before.after, rel=1e-5)
    assert max(losses[1:5]) > 1.5 * losses[0]
    assert gained.after < before.after
    assert gained.kept > gained.steps / 2


def test_few_texts_are_seen_more_often_than_many():
    chosen = {count: healing.defaults(count) for count in (0, 30, 1000, 10_000, 10**6)}
    assert [each["epochs"] for each in chosen.values()] == [20, 20, 20, 4, 1]
    assert {each["batch_size"] for each in chosen.values()} == {16}


def test_rates_are_lower_where_factors_have_more_numbers():
    pair = {"left": np.ones((8, 2)), "right": np.ones((2, 6)), "kernel": Factorised()}
    stack = {"left": np.ones((3, 8, 2)), "right": np.ones((3, 2, 6)), "kernel": Factorised(1)}
    table = {"left": np.ones((50, 2)), "right": np.ones((2, 6)), "embedding": Factorised()}
    params = {"a": pair, "b": {"c": stack}, "table": table, "dense": {"kernel": np.ones((4, 4))}}
    assert healing.share_of(params) == pytest.approx(4 * 28 / (4 * 48))
    assert healing.share_of({"dense": {"kernel": np.ones((4, 4))}}) == 1
    assert [healing.rate_for(share) for share in (0.1, 0.25, 0.5, 1.0)] == [1e-3, 1e-3, 5e-4, 2.5e-4]


def test_predictions_of_classes_are_followed():
    teacher = with_head(dense(), 3)
    follower = bert_adapter.compress(teacher, [], rank=2, signal="svd", progress=False)[0]
    got, gained = heal(follower, teacher, batches(), heldout=others(), epochs=4)
    assert gained.after < 0.9 * gained.before
    wanted = loss_increase(teacher, got, others(), progress=False)
    np.testing.assert_allclose(gained.after, wanted, rtol=1e-3, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.tanh(nn.Dense(16, name="first")(x)))


def test_a_module_of_ones_own_is_healed():
    rng = np.random.default_rng(0)
    teacher = Net(), jax.tree.map(lambda leaf: leaf * 3, Net().init(jax.random.key(0), jnp.ones((1, 12)))["params"])
    own = [{"x": rng.normal(size=(16, 12)).astype(np.float32)} for _ in range(8)]
    follower, report = bert_adapter.compress(teacher, own, rank=2, signal="svd", heal=own, progress=False)
    assert report.healed is not None
    assert report.healed.after < report.healed.before
    got, gained = heal(follower, teacher, own)
    assert gained.before == pytest.approx(report.healed.after, rel=1e-5)
    assert gained.after <= gained.before
    assert bert_adapter.forward(got)(got.params, own[0]).shape == (16, 4)


class Steep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.exp(nn.Dense(4, name="last")(nn.Dense(16, name="first")(x)))


def test_a_run_ends_where_the_loss_is_not_finite():
    teacher = Steep(), Steep().init(jax.random.key(0), jnp.ones((1, 12)))["params"]
    own = [{"x": np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)} for _ in range(8)]
    follower, _ = bert_adapter.compress(teacher, own, rank=2, signal="svd", progress=False)
    got, gained = heal(follower, teacher, own, learning_rate=1.0, epochs=40)
    last = max(gained.losses)
    assert np.isinf(gained.losses[last])
    assert gained.steps == last < 40 * gained.texts // 16
    assert np.isfinite(gained.after)
    assert gained.after <= gained.before
    assert np.isfinite(bert_adapter.forward(got)(got.params, own[0])).all()


def cut(names):
    return [{name: batch[name][:, :1] if name in names else batch[name] for name in batch} for batch in batches()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "batches: got none"),
        ({"heldout": []}, "heldout: got none"),
        ({"batch_size": 40}, "got 30 texts that count beside those held out, wanted at least 40, a batch"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be in"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"file": f"{__file__}/state"}, "is a file, wanted a directory"),
        ({"dense": lambda: with_head(dense(), 2)}, r"dense: got outputs of shape \(5, 2\), wanted .*\(5, 16\)"),
        (
            {"dense": lambda: with_head(dense(), 16)},
            "dense: got outputs that are categorical, wanted gaussian as the model's are",
        ),
        ({"dense": lambda: tiny.model(vocab_size=21)}, "dense: got a model of 21 tokens, wanted 20"),
        ({"dense": 3}, "wanted a Model, a directory"),
        (
            {"batches": lambda: [{"input_ids": np.full((2, 4), 99), "attention_mask": np.ones((2, 4), int)}]},
            "batch 0: input_ids: got 99 in row 0",
        ),
        ({"batches": lambda: [{**batches()[0], "weights": np.full(5, -1.0)}]}, "batch 0, row 0: got the weight -1"),
        ({"batches": lambda: [{**batches()[0], "weights": np.zeros(5)}]}, "got 0 texts that count"),
    ],
)
def test_what_cannot_be_is_refused_before_work(options, message):
    given: Any = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        heal(**{"small": small(), "dense": dense(), "batches": batches()} | given)


def test_outputs_that_are_not_finite_are_refused():
    broken = dense()._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, dense().params))
    with pytest.raises(FloatingPointError, match="the output of the dense model is NaN"):
        heal(small(), broken, batches())
    with pytest.raises(FloatingPointError, match="the held-out loss is nan to begin with"):
        heal(broken, dense(), batches())


def test_the_command_line_compresses_heals_and_saves(tmp_path, capsys):
    save(dense(), tmp_path / "dense")
    (tmp_path / "texts").write_text("\n".join(tiny.rows().texts), "utf-8")
    text = ["--text", str(tmp_path / "texts")]
    options = ["--rank", "4", "--signal", "svd", "--heal", text[1], "-o", str(tmp_path / "small")]
    options += ["--file", str(tmp_path / "measured")]
    assert main(["compress", str(tmp_path / "dense"), *text, *options]) == 0, capsys.readouterr()
    assert "texts held out" in capsys.readouterr().out
    assert not (tmp_path / "measured.healing").exists()
    (tmp_path / "others").write_text("\n".join(f"it {text}" for text in tiny.rows().texts[:8]), "utf-8")
    held = str(tmp_path / "others")
    more = ["--teacher", str(tmp_path / "dense"), "--heldout", held, "--epochs", "1", "--batch-size", "8"]
    more += ["--file", str(tmp_path / "state"), "-o", str(tmp_path / "healed")]
    assert main(["heal", str(tmp_path / "small"), *text, *more]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "healing on 40 texts" in printed
    assert "on 8 texts held out" in printed
    assert not (tmp_path / "state").exists()
    losses = [loss_increase(dense(), load(tmp_path / name), batches(), progress=False) for name in ("small", "healed")]
    assert losses[1] <= losses[0]
    wrong = ["--teacher", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x")]
    assert main(["heal", str(tmp_path / "small"), *text, *wrong]) == 2
    assert main(["heal", str(tmp_path / "small"), *text, *more[:-1], str(tmp_path / "small" / "in")]) == 2


@functools.cache
def in_half(dtype):
    return dense()._replace(params=jax.tree.map(lambda leaf: leaf.astype(dtype), dense().params))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_models_in_16_bits_are_trained_in_32_and_come_back_in_16(dtype):
    """AdamW's moments underflow in 16 bits, and its steps are lost beside the parameters."""
    given, _ = bert_adapter.compress(in_half(dtype), [], rank=4, signal="svd", progress=False)
    got, gained = heal(given, in_half(dtype), batches(), heldout=others(), epochs=4)
    assert gained.after < 0.9 * gained.before
    assert {leaf.dtype for leaf in jax.tree.leaves(got.params)} == {np.dtype(dtype)}
    wanted = loss_increase(in_half(dtype), got, others(), progress=False)
    np.testing.assert_allclose(gained.after, wanted, rtol=3e-2)


def test_a_directory_comes_back_as_a_model_even_where_nothing_is_gained(tmp_path):
    save(dense(), tmp_path / "dense")
    got, gained = heal(tmp_path / "dense", tmp_path / "dense", batches(), heldout=others(), epochs=1)
    assert gained.kept == 0
    save(got, tmp_path / "again")


def test_the_file_of_another_run_is_refused_before_the_dense_model_runs(tmp_path, monkeypatch):
    run = partial(heal, small(), dense(), batches(), heldout=others(), file=tmp_path / "state", epochs=1)
    run()
    monkeypatch.setattr(healing, "taught", lambda *_: pytest.fail("the dense model has run"))
    with pytest.raises(ValueError, match="another options"):
        run(seed=1)


def test_a_state_of_healing_on_other_texts_is_refused_before_work(tmp_path, monkeypatch):
    how: dict[str, Any] = {"rank": 4, "signal": "svd", "file": tmp_path / "measured", "progress": False}
    bert_adapter.compress(dense(), [], heal=batches(), **how)
    assert (tmp_path / "measured.healing").exists()
    monkeypatch.setattr(compressing, "decomposed", lambda *_, **__: pytest.fail("it works"))
    with pytest.raises(ValueError, match=r"measured\.healing holds the state of another training \(another texts\)"):
        bert_adapter.compress(dense(), [], heal=[*batches(), *others()], **how)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_what_is_to_be_stored_in_fewer_bits_is_healed_so(tmp_path, dtype):
    got, report = bert_adapter.compress(
        dense(), [], rank=4, signal="svd", heal=[*batches()] * 4, dtype=dtype, progress=False
    )
    save(got, tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert set(dtypes_of(loaded.config).values()) == {dtype}
    jax.tree.map(np.testing.assert_array_equal, got.params, loaded.params)
    assert report.healed is not None


def test_a_dtype_is_chosen_once():
    with pytest.raises(ValueError, match="dtype: got one with of='bytes'"):
        bert_adapter.compress(dense(), [], budget=0.5, of="bytes", dtype="int8")
    with pytest.raises(ValueError, match="dtype must be one of"):
        bert_adapter.compress(dense(), [], budget=0.5, dtype="int2")


def test_tables_that_are_not_trained_are_as_they_were_given():
    wide = small()._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) / 3, small().params))
    tables = divided(wide.params)[1]
    for path, leaf in by_path(healing.as_given(wide.params, {}, None)).items():
        if leaf is not None:
            assert leaf.dtype == np.float64
            np.testing.assert_array_equal(leaf, by_path(tables)[path])


def test_a_module_that_has_no_hash_is_healed():
    class Net(nn.Module):
        table: Any

        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(x @ self.table)

    net = Net(np.eye(8, dtype=np.float32))
    rows = [{"x": np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)}]
    params = net.init(jax.random.key(0), rows[0]["x"])["params"]

    def run(params, batch):
        return nn.Dense(6).apply({"params": params["Dense_0"]}, batch["x"])

    model = as_model((net, params), forward=run)
    assert bert_adapter.loss_increase(model, model, rows, progress=False) == 0
