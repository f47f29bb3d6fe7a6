"""Heads of attention that keep fewer dimensions: the same outputs where nothing is lost, in every family."""

import functools
import json
import re
from typing import Any

import jax
import numpy as np
import pytest
import test_families
import tiny
from flax.traverse_util import unflatten_dict

import bert_adapter
from bert_adapter import head_sizes, latency
from bert_adapter.checkpoint.names import by_path
from bert_adapter.choices import choices_of
from bert_adapter.cli import main
from bert_adapter.decompositions import predicted_losses
from bert_adapter.head_sizes import SIDES, paths_in, sizes_of, whole_sizes, widened, with_factors_between
from bert_adapter.pairs import in_pairs, narrowed

CASES = ["BERT", "RoBERTa", "DistilBERT", "ELECTRA", "MPNet"]
TEXTS = ["a red fox runs", "a dog runs far from it .", "red dogs", "it runs from a fox"] * 4


def outputs(model: bert_adapter.Model, batch: Any = None) -> np.ndarray:
    """What the model makes of a batch."""
    return np.asarray(bert_adapter.apply(model.module, model.params, **(tiny.BATCH if batch is None else batch)))


@functools.cache
def factors(case: str, classifier: bool = False) -> Any:
    """A model, and random factors for the heads of its first layer: 3 dimensions of queries, 5 of values."""
    model, rng = test_families.model_of(case, classifier), np.random.default_rng(1)
    config: Any = model.module.config
    heads, (size, _) = config.num_attention_heads, whole_sizes(model)[0]
    return model, {
        (0, side): (rng.normal(size=(heads, size, kept)), rng.normal(size=(heads, size, kept)))
        for side, kept in enumerate((3, 5))
    }


def through_products(model: bert_adapter.Model, between: Any) -> bert_adapter.Model:
    """The model with identities, of which those that have factors are the products of these."""
    probe = bert_adapter.with_identities(model)
    flat = dict(by_path(probe.params))
    for (layer, side), (left, right) in between.items():
        path = paths_in(model, layer)[SIDES[side][0]]
        for head, product in enumerate(left @ np.swapaxes(right, 1, 2)):
            flat[f"{path}_{head}/kernel"] = product.astype(np.float32)
    return probe._replace(params=unflatten_dict(flat, sep="/"))


@functools.cache
def compressed(budget: float = 0.5, **options: Any) -> Any:
    """The tiny model of two layers, and the report."""
    model = tiny.model(num_hidden_layers=2)
    batches = bert_adapter.text_batches(model, TEXTS)
    return bert_adapter.compress(model, batches, budget=budget, pairs=True, progress=False, **options)


def decomposed(model: bert_adapter.Model) -> bert_adapter.Decompositions:
    """What the default signal says of the model's kernels, and identities."""
    batches, kernels = bert_adapter.text_batches(model, TEXTS), bert_adapter.select_kernels(model)
    run = bert_adapter.forward(model)
    importance = bert_adapter.measure_signal(run, model.params, batches, kernels, progress=False)
    return bert_adapter.decompose(model.params, importance, progress=False)


@pytest.mark.parametrize("case", CASES)
def test_identities_change_no_output(case):
    for classifier in (False, True):
        model, _ = factors(case, classifier)
        probe, batch = bert_adapter.with_identities(model), test_families.batch_of(case)
        np.testing.assert_allclose(outputs(probe, batch), outputs(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_factors_between_kernels_are_multiplied_into_both(case):
    for classifier in (False, True):
        model, between = factors(case, classifier)
        batch = test_families.batch_of(case)
        small = with_factors_between(model, between)
        assert sizes_of(small)[0] == (3, 5)
        assert sizes_of(small)[1:] == whole_sizes(model)[1:]
        wanted = outputs(through_products(model, between), batch)
        np.testing.assert_allclose(outputs(small, batch), wanted, rtol=1e-4, atol=1e-5)
        assert np.abs(wanted - outputs(model, batch)).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_has_whole_heads_and_the_same_outputs(case):
    model, between = factors(case)
    batch, small = test_families.batch_of(case), with_factors_between(model, between)
    merged = bert_adapter.merge(small)
    assert merged.module == model.module
    assert "low_rank" not in merged.config
    assert {path: leaf.shape for path, leaf in by_path(merged.params).items()} == {
        path: leaf.shape for path, leaf in by_path(model.params).items()
    }
    np.testing.assert_allclose(outputs(merged, batch), outputs(small, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_read_as_it_was(case, tmp_path):
    model, between = factors(case)
    small = with_factors_between(model, between)
    bert_adapter.save(small, tmp_path)
    again = bert_adapter.load(tmp_path)
    assert again.module == small.module
    assert again.config["low_rank"]["heads"][0] == [3, 5]
    np.testing.assert_array_equal(
        outputs(again, test_families.batch_of(case)), outputs(small, test_families.batch_of(case))
    )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"low_rank_{model.config['model_type']}"


@pytest.mark.parametrize(
    "heads",
    [[[8, 1]], "8", [[8, 9], [8, 8]], [[8, 0], [8, 8]], [[8], [8, 8]], [[8, True], [8, 8]], [[8, 2.0], [8, 8]], {}],
)
def test_sizes_that_cannot_be_are_refused_by_name(heads, tmp_path):
    small, _ = compressed()
    bert_adapter.save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["low_rank"]["heads"] = heads
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config low_rank heads: got .*, wanted two numbers from 1 to 8 for each of 2"
    ):
        bert_adapter.load(tmp_path)
    changed = small._replace(config=small.config | {"low_rank": small.config["low_rank"] | {"heads": [[8, 8]] * 2}})
    with pytest.raises(ValueError, match=r"config low_rank heads: got \(\(8, 8\), \(8, 8\)\), wanted those of the mod"):
        bert_adapter.save(changed, tmp_path / "other")


def test_heads_are_cut_where_that_loses_nothing():
    model = tiny.model(num_hidden_layers=2)
    flat = dict(by_path(model.params))
    for layer in range(2):
        for name, rows in (("key", False), ("output", True)):
            path = f"{paths_in(model, layer)[name]}/kernel"
            kernel = np.array(flat[path])
            used = kernel.reshape(2, 8, 16) if rows else kernel.reshape(16, 2, 8)
            used[(slice(None), slice(2, None)) if rows else (..., slice(2, None))] = 0  # of 8 dimensions, 2 count
            flat[path] = used.reshape(16, 16)
            if not rows:
                bias = np.array(flat[path.replace("kernel", "bias")]).reshape(2, 8)
                bias[:, 2:] = 0
                flat[path.replace("kernel", "bias")] = bias.reshape(16)
    model = model._replace(params=unflatten_dict(flat, sep="/"))
    batches = bert_adapter.text_batches(model, TEXTS)
    how: dict[str, Any] = {"include": "attention", "budget": 0.26, "shrink": 0.0, "progress": False}
    small, report = bert_adapter.compress(model, batches, pairs=True, **how)
    assert sizes_of(small) == ((2, 2), (2, 2))
    assert report.parameters_after == 0.25 * report.parameters_before
    assert {kernel.status for kernel in report.kernels} == {"NARROW"}
    assert report.dense == []
    factorised, _ = bert_adapter.compress(model, batches, **how)
    error, other = (np.abs(outputs(each) - outputs(model)).max() for each in (small, factorised))
    assert error < 1e-4 < other / 10


def test_the_plan_loses_no_more_with_pairs_and_keeps_to_its_budget():
    model = tiny.model(num_hidden_layers=2)
    known, plain = decomposed(bert_adapter.with_identities(model)), decomposed(model)
    cut = 0
    for budget in (0.3, 0.45, 0.6, 0.8):
        for of in ("kernels", "parameters", "flops"):
            how: dict[str, Any] = {"budget": max(budget, 0.6) if of == "parameters" else budget, "of": of}
            small, report = bert_adapter.compress(model, (), importance=known, pairs=True, progress=False, **how)
            _, alone = bert_adapter.compress(model, (), importance=plain, progress=False, **how)
            assert report.predicted is not None
            assert alone.predicted is not None
            assert report.predicted <= alone.predicted * (1 + 1e-3)
            counted = sum(np.size(leaf) for leaf in jax.tree.leaves(small.params))
            whole = sum(np.size(leaf) for leaf in jax.tree.leaves(model.params))
            saved = report.parameters_before - report.parameters_after
            biases = counted - whole + saved  # those of queries, keys and values are narrower too
            assert -2 * 3 * 16 <= biases <= 0
            if of == "kernels":
                assert report.parameters_after <= budget * report.parameters_before
            cut += sizes_of(small) != whole_sizes(small)
    assert cut > 3
    with pytest.raises(ValueError, match=r"importance: got one without identities.*with_identities\(mod"):
        bert_adapter.compress(model, (), importance=plain, budget=0.5, pairs=True)


def test_heads_of_every_size_keep_that_many_dimensions():
    model = tiny.model(num_hidden_layers=2)
    known, pairs = decomposed(bert_adapter.with_identities(model)), head_sizes.pairs_of(model)
    for size in (1, 4, 7):
        small = narrowed(model, pairs, {pair.kernels[0]: size for pair in pairs}, known.kernels)
        for layer in range(2):
            for name, path in paths_in(small, layer).items():
                kernel = by_path(small.params)[f"{path}/kernel"]
                heads = (kernel.T if name == "output" else kernel).reshape(16, 2, size)
                assert [np.linalg.matrix_rank(heads[:, head]) for head in range(2)] == [size, size]
    again = bert_adapter.with_identities(narrowed(model, pairs, {pairs[0].kernels[0]: 1}, known.kernels))
    assert outputs(again).shape == (3, 16)  # of heads of one dimension nothing can be taken


def test_a_head_that_the_output_does_not_see_loses_nothing():
    model = tiny.model(num_hidden_layers=2)
    flat, paths = dict(by_path(model.params)), paths_in(model, 1)
    for name in ("kernel", "bias"):
        leaf = np.array(flat[f"{paths['key']}/{name}"])
        leaf[..., :8] = 0
        flat[f"{paths['key']}/{name}"] = leaf
    rows = np.array(flat[f"{paths['output']}/kernel"])
    rows[:8] = 0
    flat[f"{paths['output']}/kernel"] = rows
    masked = model._replace(params=unflatten_dict(flat, sep="/"))
    known = decomposed(bert_adapter.with_identities(masked))
    for path in (f"{paths['query']}_0", f"{paths['value']}_0"):
        np.testing.assert_array_equal(known.squares[path], np.zeros(8))
    small, _ = bert_adapter.compress(masked, (), importance=known, budget=0.3, pairs=True, progress=False)
    assert np.isfinite(outputs(small)).all()


def test_each_option_of_a_pair_is_priced_and_predicted_by_itself():
    model = tiny.model(num_hidden_layers=2)
    known = decomposed(bert_adapter.with_identities(model))
    losses = {path: predicted_losses(squares) / known.examples[path] for path, squares in known.squares.items()}
    pairs = head_sizes.pairs_of(model)
    choices = {path: choices_of((16, 16), 1, losses[path], range(1, 10**9)) for pair in pairs for path in pair.kernels}
    found, options = in_pairs(choices, pairs, losses)
    for pair in pairs:
        mine, first = found[pair.kernels[0]], pair.kernels[0]
        assert pair.kernels[1] not in found
        assert len(options[first]) == len(mine.rank)
        for number, option in enumerate(options[first]):
            if option.size is None:
                dense = [rank == 8 for rank in option.ranks]
                cost = sum(256 if whole else rank * 32 for rank, whole in zip(option.ranks, dense, strict=True))
                ranked = zip(pair.kernels, option.ranks, dense, strict=True)
                loss = sum(0 if whole else losses[path][rank] for path, rank, whole in ranked)
            else:
                cost = 512 * option.size / 8
                loss = sum(losses[path][option.size] for path in pair.identities)
            assert (mine.cost[number], mine.flops[number]) == (cost, 2 * cost)
            np.testing.assert_allclose(mine.loss[number], loss, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "budget": None}, "pairs: got a rank, wanted a budget"),
        ({"uniform": True}, "pairs: got uniform, wanted a budget"),
        ({"of": "bytes"}, "pairs: got a budget of bytes, wanted one of kernels"),
        (
            {"signal": "svd"},
            "pairs: got signal 'svd' and method 'svd', wanted a signal in units of the loss.*'combined'",
        ),
        ({"include": "intermediate"}, "pairs: got 2 selected kernels, .*, wanted query and key, or value and output"),
        ({"of": latency.Latency(1, 8, 9.0, {})}, r"pairs: got times without those of heads, wanted of=measure_latency"),
        ({"forward": lambda params, batch: None}, r"pairs: got a model that is called by forward= or output="),
    ],
)
def test_what_pairs_cannot_do_is_refused_before_work(options, message):
    model = tiny.model(num_hidden_layers=2)
    with pytest.raises(ValueError, match=message):
        bert_adapter.compress(model, [], pairs=True, **({"budget": 0.5} | options))


def test_times_of_one_side_do_for_pairs_of_that_side(monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    model = tiny.model()
    kernels = bert_adapter.select_kernels(model, "query|key")
    times = bert_adapter.measure_latency(model, 1, 8, kernels=kernels, pairs=True, progress=False)
    assert list(times.heads) == [0]
    with pytest.raises(ValueError, match=r"of: got times without those of the heads of .*value, wanted them too"):
        bert_adapter.compress(model, [], budget=0.9, of=times, pairs=True, include="attention")


def test_a_model_with_identities_is_for_measuring_alone(tmp_path):
    probe, message = (
        bert_adapter.with_identities(tiny.model()),
        r"got what with_identities\(model\) returned, wanted the",
    )
    calls = (
        lambda: bert_adapter.save(probe, tmp_path / "out"),
        lambda: bert_adapter.with_identities(probe),
        lambda: bert_adapter.compress(probe, [], budget=0.5, signal="svd"),
        lambda: bert_adapter.compress(probe, [], budget=0.5, pairs=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_object_of_transformers_has_whole_heads(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxBertModel"):
        pytest.skip("transformers has no Flax classes any more")
    small, _ = compressed()
    bert_adapter.save(small, tmp_path)
    theirs = bert_adapter.load_into(tmp_path, transformers.FlaxBertModel)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        states = theirs(**tiny.BATCH).last_hidden_state
    wanted = test_families.states_of(bert_adapter.merge(small), **tiny.BATCH).last_hidden_state
    np.testing.assert_allclose(states, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="pairs: got an object of FlaxBertModel, whose heads are all of one size"):
        bert_adapter.compress(theirs, [], budget=0.5, pairs=True)


def test_models_whose_heads_keep_their_dimensions_are_refused():
    with pytest.raises(ValueError, match="pairs: got a model of 'modernbert', whose heads keep all their dimensions"):
        bert_adapter.compress(test_families.model_of("ModernBERT"), [], budget=0.5, pairs=True)
    modern = test_families.model_of("ModernBERT").config
    with pytest.raises(ValueError, match="config low_rank heads: got sizes of heads, wanted none"):
        bert_adapter.FAMILIES["modernbert"].config(modern | {"low_rank": {"schema": 3, "heads": [[4, 4]] * 2}})
    own = tiny.model().module
    with pytest.raises(ValueError, match="has no heads that are known: leave pairs out"):
        bert_adapter.compress((own, tiny.model().params), [tiny.BATCH], budget=0.5, pairs=True)


def test_what_follows_keeps_the_heads(tmp_path):
    small, _ = compressed()
    dense = tiny.model(num_hidden_layers=2)
    sizes = sizes_of(small)
    assert sizes != whole_sizes(small)
    batches = bert_adapter.text_batches(dense, TEXTS * 4)
    healed, _ = bert_adapter.heal(small, dense, batches, epochs=1, progress=False)
    headed = bert_adapter.with_head(small, 2)
    tuned, _ = bert_adapter.finetune(headed, tiny.row_batches(), epochs=1, progress=False)
    trimmed, _ = bert_adapter.trim(small, TEXTS)
    cut = {"healed": healed, "headed": headed, "tuned": tuned, "trimmed": trimmed}
    cut["bare"] = bert_adapter.without_head(headed)
    for name, model in cut.items():
        assert sizes_of(model) == sizes, name
        bert_adapter.save(model, tmp_path / name, dtype="int8" if name == "healed" else None)
        assert sizes_of(bert_adapter.load(tmp_path / name)) == sizes, name
    bare = outputs(cut["bare"])  # of what is not declared, a mean
    np.testing.assert_allclose(bare / np.linalg.norm(bare, axis=1, keepdims=True), outputs(small), atol=1e-6)


def test_a_model_of_narrow_heads_is_compressed_again():
    small, _first = compressed(0.7, include="attention")
    batches = bert_adapter.text_batches(small, TEXTS)
    again, report = bert_adapter.compress(
        small, batches, budget=0.6, include="intermediate|output/dense$", exclude="att"
    )
    assert sizes_of(again) == sizes_of(small)
    assert report.parameters_after < report.parameters_before
    assert again.config["low_rank"]["heads"] == small.config["low_rank"]["heads"]
    wide = widened(again, whole_sizes(again))
    assert wide.module.config.head_sizes == ()  # pyright: ignore[reportAttributeAccessIssue]
    assert wide.config["low_rank"]["ranks"] == again.config["low_rank"]["ranks"]
    np.testing.assert_allclose(outputs(wide), outputs(again), rtol=1e-4, atol=1e-5)


def test_heads_are_timed_and_their_times_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    model, file = tiny.model(), tmp_path / "times.json"
    how: dict[str, Any] = {"batch": 1, "length": 8, "file": file, "progress": False}
    plain = bert_adapter.measure_latency(model, **how)
    found = bert_adapter.measure_latency(model, pairs=True, **how)
    assert plain.heads == {}
    assert len(found.heads) == 2
    for costs in found.heads.values():
        assert costs.ranks == (1, 2, 4, 6, 8)
        assert costs.at(np.array([8])) == max(costs.seconds)
        assert costs.step == 1
    monkeypatch.setattr(latency, "in_turns", None)
    assert bert_adapter.measure_latency(model, pairs=True, **how) == found
    assert bert_adapter.measure_latency(model, **how) == plain


def test_a_plan_of_time_cuts_heads_where_they_are_faster():
    model = tiny.model()
    batches = bert_adapter.text_batches(model, TEXTS)
    ranks = (1, 4, 7)
    slow = {shape: latency.Costs(ranks, (9.0, 9.5, 9.9), 10.0) for shape in ((16, 16), (16, 24), (24, 16))}
    fast = latency.Costs((1, 4, 7), (0.0, 6.0, 12.0), 14.0)
    times = latency.Latency(1, 8, 100.0, slow, heads={0: fast, 1: fast})
    small, report = bert_adapter.compress(model, batches, budget=0.85, of=times, pairs=True, progress=False)
    assert all(size < 8 for size in sizes_of(small)[0])
    assert {kernel.status for kernel in report.kernels[:4]} == {"NARROW"}


def test_the_command_line_cuts_heads(tmp_path, capsys):
    bert_adapter.save(tiny.model(num_hidden_layers=2), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = [
        "compress",
        str(tmp_path / "dense"),
        "--text",
        str(tmp_path / "texts.txt"),
        "-o",
        str(tmp_path / "small"),
    ]
    assert main([*command, "--budget", "0.45", "--pairs"]) == 0
    said = capsys.readouterr().out
    assert "NARROW" in said
    assert bert_adapter.load(tmp_path / "small").config["low_rank"]["heads"]
    assert main([*command, "--rank", "2", "--pairs"]) == 2
    assert "pairs: got a rank, wanted a budget" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("case", ["BERT", "DistilBERT", "MPNet"])
def test_pytorch_computes_the_same(case, dtype, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, between = factors(case)
    small = with_factors_between(model, between)
    bert_adapter.save(small, tmp_path / "ours", dtype=dtype)
    small, batch = bert_adapter.load(tmp_path / "ours"), test_families.batch_of(case)
    bert_adapter.export(small, tmp_path / "out", to="transformers")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        states = theirs(**{name: torch.tensor(np.asarray(array)).long() for name, array in batch.items()})[0]
    wanted = test_families.states_of(small, **batch).last_hidden_state
    np.testing.assert_allclose(states.numpy(), wanted, atol=2e-5)
    query = re.sub("/", ".", paths_in(model, 0)["query"])
    narrow = [name for name in theirs.state_dict() if name.startswith(f"{query}.narrow")]
    assert narrow


def test_a_model_card_says_how_many_dimensions_heads_kept(tmp_path):
    small, _ = compressed()
    bert_adapter.export(small, tmp_path / "out", to="stablehlo")
    compared, mixed = (", ".join(str(each[side]) for each in sizes_of(small)) for side in (0, 1))
    told = f"Of 8 dimensions of a head, by layer, queries and keys kept {compared}, values {mixed}."
    assert told in (tmp_path / "out/README.md").read_text()
    model, between = factors("BERT")
    for to, heading in (("transformers", "low-rank"), ("transformers-dense", "dense")):
        bert_adapter.export(with_factors_between(model, between), tmp_path / to, to=to)
        card = (tmp_path / to / "README.md").read_text()
        assert f", {heading}\n" in card
        assert "queries and keys kept 3, 8, values 5, 8." in card
        assert ("The others are zeros here." in card) == (heading == "dense")
