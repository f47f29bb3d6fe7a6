"""Models are timed beside each other, in whatever engine is installed."""

import json
import math
import re
import time
from importlib.util import find_spec

import numpy as np
import pytest
import tiny

import bert_adapter
from bert_adapter import engines, latency, speed, timing
from bert_adapter.cli import main
from bert_adapter.speed_report import as_json, slow_kernels, table

QUERY = "encoder/layer/0/attention/self/query"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense and a factorised checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    bert_adapter.save(tiny.model(), folder / "dense")
    bert_adapter.save(tiny.with_factors(tiny.model(), {QUERY: 2}), folder / "small")
    return [str(folder / "dense"), str(folder / "small")]


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("which", [0, 1])
def test_every_engine_runs_the_model_on_the_batch_it_is_timed_on(engine, which, folders, tmp_path):
    for package in engines.ENGINES[engine].packages:
        pytest.importorskip(package)
    model = bert_adapter.load(folders[which])
    batch = engines.batch_for(model, 2, 5)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (2, 5))
    found = engines.ENGINES[engine].start(model, tmp_path, 1)(batch)
    wanted = np.asarray(bert_adapter.forward(model)(model.params, batch))
    states = found[0] if engine.startswith("onnx") else getattr(found, "last_hidden_state", None)
    if engine == "jax":
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    else:  # what follows the encoder: the mean of its tokens, scaled to length one
        mean = np.asarray(states).mean(axis=1)
        near = 0.2 if engine.endswith("int8") else 1e-5
        np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), wanted, rtol=0, atol=near)


def test_the_first_model_is_as_fast_as_itself_and_all_cells_are_timed(folders, monkeypatch):
    monkeypatch.setattr(speed, "peak_apart", lambda *key: 10**8)
    cells = [(1, 4), (2, 8)]
    found = speed.bench(folders, cells=cells, engines=["jax"], rounds=3, progress=False)
    assert [(each.model, each.batch, each.length) for each in found.timings] == [
        (name, *cell) for cell in cells for name in folders
    ]
    first = [each for each in found.timings if each.model == folders[0]]
    assert [each.speed for each in first] == [1, 1]
    assert all(each.seconds > 0 and each.speed > 0 for each in found.timings)
    assert first[1].texts_per_second == 2 / first[1].seconds
    assert [(each.path, each.shape, each.rank) for each in found.kernels] == [(QUERY, (16, 16), 2)]
    assert found.peaks == {(name, "jax"): 10**8 for name in folders}
    assert len(json.loads(as_json(found))["timings"]) == 4
    assert [len(line) for line in table(found)] == [2 + len(cells) + 2] * 3


def test_speed_is_the_median_of_the_rounds_ratios():
    seconds = {("dense", "jax"): [1.0, 8.0, 1.0], ("small", "jax"): [0.5, 2.0, 0.4]}
    found = speed.timing(("small", "jax"), seconds, first="dense", cell=(4, 16))
    assert (found.seconds, found.speed, found.texts_per_second) == (0.5, 2.5, 8.0)


def test_kernels_that_are_slower_with_factors_are_named():
    kernels = [
        timing.Kernel(path, (8, 8), 2, timing.Seconds(dense=1.0, low_rank=seconds))
        for path, seconds in {"fast": 0.5, "slow": 1.5, "slow too": 1.5}.items()
    ]
    text = slow_kernels(speed.Bench([], kernels, {}, 1))
    assert "slow, 8 by 8 at rank 2" in text
    assert "slow too, 8 by 8 at rank 2" in text
    assert "fast" not in text


def test_turns_are_taken_in_every_round():
    order = []
    found = timing.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    rounds = [name for name, before in zip(order, ["", *order], strict=False) if name != before]
    assert rounds == ["a", "b"] * 3  # the first is not counted


def test_what_comes_first_in_a_turn_does_not_count():
    """Threads that still spin for the model before slow it."""
    calls = []

    def slow_at_first():
        calls.append("slow")
        time.sleep(0.05 if "other" in calls[-3:] else 0.001)

    found = timing.in_turns({"slow": slow_at_first, "other": lambda: calls.append("other")}, 3, settle=0.1)
    assert max(found["slow"]) < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": [(0, 4)]}, "cells must be at least 1"),
        ({"cells": [(1, 21)]}, "at most 20, the positions of"),
        ({"cells": []}, "cells"),
        ({"engines": ["tensorflow"]}, "engines must be one of .*tensorflow"),
        ({"engines": []}, "engines: got none"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_refused_before(options, message, folders):
    with pytest.raises(ValueError, match=message):
        speed.bench(folders[:1], **{"cells": [(1, 4)], "engines": ["jax"], "progress": False, **options})


def test_an_engine_that_is_not_installed_is_refused(monkeypatch, folders):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engines: .*'pytorch': \['torch', 'transformers'\].* not installed"):
        speed.bench(folders[:1], cells=[(1, 4)], engines=["pytorch"])


def test_a_model_twice_is_refused(folders):
    with pytest.raises(ValueError, match="no model twice"):
        speed.bench([folders[0]] * 2, cells=[(1, 4)])


@pytest.mark.slow  # a process for each model
def test_the_command_line_times_checkpoints(folders, tmp_path, capsys):
    figure = [f"--figure={tmp_path / 'speed.svg'}"] if find_spec("matplotlib") else []
    options = ["--cell", "1x4", "--engine", "jax", "--rounds", "1", "--json", str(tmp_path / "speed.json"), *figure]
    assert main(["bench", *folders, *options]) == 0
    out = capsys.readouterr().out
    assert "1 x 4" in out
    assert folders[1] in out
    found = json.loads((tmp_path / "speed.json").read_text("utf-8"))
    assert found["timings"][0]["speed"] == 1
    assert all(peak["bytes"] > 10**7 for peak in found["peak_bytes"])
    assert not figure or (tmp_path / "speed.svg").read_text("utf-8").count("<svg") == 1


def test_what_the_command_line_cannot_mean_is_said(folders, capsys):
    assert main(["bench", folders[0], "--threads", "0"]) == 2
    assert "--threads: got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", folders[0], "--cell", "8"])
    assert "wanted texts by tokens, such as 8x128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--figure", "{}/a.txt"], "--figure: got .*a.txt, wanted a name that ends in one of .png"),
        (["--json", "{}/a.png", "--figure", "{}/a.png"], "--json: .*a.png is --figure's file too"),
        (["--json", "{}/dense/a.json"], "--json: .* lies in .*dense, which DIR 1 names"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_work(files, message, tmp_path, capsys):
    if "--figure" in files:
        pytest.importorskip("matplotlib")
    (tmp_path / "dense").mkdir()
    assert main(["bench", str(tmp_path / "dense"), *(file.format(tmp_path) for file in files)]) == 2
    assert re.search(message, capsys.readouterr().err)


# Plans of time.


@pytest.fixture(scope="module")
def times():
    """Of kernels whose time is that of their operations, and of 100 for the rest."""

    def costs(shape):
        ranks = tuple(range(1, -(-math.prod(shape) // sum(shape))))
        return latency.Costs(ranks, tuple(rank * float(sum(shape)) for rank in ranks), float(math.prod(shape)))

    shapes = [(16, 16), (16, 24), (24, 16)]
    return latency.Latency(1, 8, 4 * 256.0 + 2 * 384.0 + 100, {shape: costs(shape) for shape in shapes})


def test_a_budget_of_time_is_one_of_operations_where_these_take_the_time(times):
    model = tiny.model()
    known = bert_adapter.decompose(model.params, None, signal="svd", kernels=bert_adapter.select_kernels(model))
    whole = times.seconds - 100
    for share in (0.3, 0.6, 0.9):
        found = bert_adapter.plan(model.params, known, share, of=times)
        same = bert_adapter.plan(model.params, known, (share * times.seconds - 100) / whole, of="kernels")
        assert found.ranks == same.ranks
        assert share - 40 / whole < found.share <= share * (1 + 1e-6)  # a rank takes at most 40


def test_a_kernel_that_is_slower_at_every_rank_stays_dense(times):
    model = tiny.model()
    slow = times.kernels[16, 16]._replace(dense=1.0)
    slower = times._replace(seconds=900.0, kernels={**times.kernels, (16, 16): slow})
    found = bert_adapter.plan(
        model.params, None, 0.6, signal="svd", of=slower, kernels=bert_adapter.select_kernels(model)
    )
    assert {rank for path, rank in found.ranks.items() if "attention" in path} == {8}
    assert min(found.ranks.values()) < 8


def test_a_budget_below_what_the_rest_takes_is_refused(times):
    model = tiny.model()
    with pytest.raises(ValueError, match=r"smallest ranks take 0\.\d+ of the time for 1 x 8 tokens"):
        bert_adapter.compress(model, [], budget=0.05, of=times, signal="svd")


def test_times_of_other_shapes_are_refused(times):
    few = times._replace(kernels={(16, 16): times.kernels[16, 16]})
    with pytest.raises(ValueError, match="wanted those of encoder/layer/0/intermediate/dense too"):
        bert_adapter.compress(tiny.model(), [], budget=0.5, of=few, signal="svd")


def test_times_of_another_model_are_refused(times):
    """Its shapes may be the same, and its layers more."""
    model, other = tiny.model(), tiny.model(num_hidden_layers=2)
    measured = times._replace(numbers=latency.numbers_in(model.params))
    assert measured.numbers == 4 * 256 + 2 * 384
    for same in (bert_adapter.with_head(model, 3), bert_adapter.with_identities(model)):
        assert latency.numbers_in(same.params) == measured.numbers
    _, report = bert_adapter.compress(model, [], budget=0.9, of=measured, signal="svd")
    assert report.kernels
    with pytest.raises(ValueError, match=r"of: got times of a model with 1,792 numbers .*, with 3,584: measure_lat"):
        bert_adapter.compress(other, [], budget=0.9, of=measured, signal="svd")


def test_times_never_fall_with_the_rank():
    costs = latency.Costs((2, 4, 8), (3.0, 2.0, 6.0), 5.0)
    np.testing.assert_array_equal(costs.at(np.array([1, 2, 3, 4, 6, 8])), [3, 3, 3, 3, 4.5, 6])


def test_a_rank_takes_the_time_of_the_next_multiple_and_so_multiples_are_planned():
    costs = latency.Costs((16, 80), (1.0, 5.0), 5.0, step=16)
    np.testing.assert_allclose(costs.at(np.array([1, 16, 17, 32, 33, 63, 64])), [1, 1, 2, 2, 3, 4, 4])
    kernel = np.random.default_rng(0).normal(size=(160, 160)).astype("f4")
    params = {name: {"kernel": size * kernel} for size, name in enumerate("abcd", 1)}
    found = bert_adapter.plan(params, None, 0.45, signal="svd", of=latency.Latency(1, 8, 20.0, {(160, 160): costs}))
    assert {rank % 16 for rank in found.ranks.values()} == {0}
    assert len(set(found.ranks.values())) > 1


def test_a_rank_that_is_padded_to_break_even_is_not_planned():
    costs = latency.Costs((16, 80), (1.0, 4.0), 9.0, step=16)
    kernel = np.random.default_rng(0).normal(size=(160, 160)).astype("f4")
    times = latency.Latency(1, 8, 9.0, {(160, 160): costs})
    found = [
        bert_adapter.plan({"a": {"kernel": kernel}}, None, share, signal="svd", of=times).ranks["a"]
        for share in np.linspace(0.12, 1, 23)
    ]
    assert set(found) == {16, 32, 48, 64, 80}


def test_time_and_operations_are_both_kept_to():
    """Lower ranks of the same time take fewer operations."""
    costs = latency.Costs((32, 80), (1.0, 9.0), 9.0, step=16)
    kernel = np.random.default_rng(0).normal(size=(160, 160)).astype("f4")
    times = latency.Latency(1, 8, 10.0, {(160, 160): costs})
    found = bert_adapter.plan({"a": {"kernel": kernel}}, None, 0.9, signal="svd", of=times, flops=0.1)
    assert found.ranks["a"] == 8


def test_all_is_kept_where_nothing_saves_time():
    nothing = latency.Latency(1, 8, 10.0, {(8, 8): latency.Costs((1,), (1.0,), 0.0)})
    for uniform in (False, True):
        found = bert_adapter.plan({"a": {"kernel": np.eye(8)}}, None, 1.0, signal="svd", of=nothing, uniform=uniform)
        assert found.ranks == {"a": 4}


def test_other_work_while_one_shape_is_timed_changes_nothing(monkeypatch):
    def in_turns(calls, rounds):
        load = 3.0 if 9 in calls else 1.0
        return {rank: [load * (1.0 if rank is None else 0.8)] for rank in calls}

    monkeypatch.setattr(latency, "in_turns", in_turns)
    found = bert_adapter.measure_latency(tiny.model(), 1, 4, kernels=bert_adapter.select_kernels(tiny.model()))
    many = {(16, 16): 4, (16, 24): 1, (24, 16): 1}
    np.testing.assert_allclose(
        [count * found.kernels[shape].dense for shape, count in many.items()], 0.2 * found.seconds
    )


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"embeddings/word_embeddings": (20, 16)}, "some that are no tables"),
        ({"query": (16, 16)}, "got 'query', wanted dense ones of the model"),
    ],
)
def test_kernels_that_cannot_be_timed_are_refused(kernels, message):
    with pytest.raises(ValueError, match=message):
        bert_adapter.measure_latency(tiny.model(), 1, 4, kernels=kernels)


def test_integers_in_memory_are_not_timed(tmp_path):
    bert_adapter.save(tiny.model(), tmp_path / "small", dtype="int8")
    model = bert_adapter.load(tmp_path / "small", integers=True)
    with pytest.raises(ValueError, match="model: got a model with integers in memory"):
        bert_adapter.measure_latency(model, 1, 4)


def test_large_kernels_are_timed_at_multiples_beyond_break_even(turns):
    params = {"a": {"kernel": np.ones((160, 160), "f4")}}
    turn, costs = latency.timed_in(lambda params, inputs: 0, params, {}, paths=["a"], shape=(160, 160))
    assert turns == [[None, 16, 32, 48, 64, 80]]
    assert (turn, costs.step) == (1.0, 16)


@pytest.fixture
def turns(monkeypatch):
    """Seconds, one round, of a model that takes 1 dense, and .25 less a rank below 8 of the query and its like."""
    seen = []

    def in_turns(calls, rounds):
        seen.append(list(calls))
        return {rank: [1.0 if rank is None else 1.0 - 0.25 * (8 - rank)] for rank in calls}

    monkeypatch.setattr(latency, "in_turns", in_turns)
    return seen


def test_what_a_model_saves_is_shared_out_among_its_kernels(turns):
    found = bert_adapter.measure_latency(tiny.model(), 1, 4, progress=False)
    assert sorted(found.kernels) == [(16, 16), (16, 24), (24, 16)]
    assert (turns[0], turns[1]) == ([None, 1, 2, 4, 6, 7], [None, 1, 2, 3, 5, 7, 9])  # 8 is break-even, and 9.6
    assert found.seconds == 1.0
    ranks, seconds, dense, _ = found.kernels[16, 16]
    np.testing.assert_allclose(dense, 0.25 * 7 / 4)  # at rank 1, of four kernels
    np.testing.assert_allclose(dense - np.array(seconds), [0.25 * (8 - rank) / 4 for rank in ranks])


def test_a_model_that_is_slower_with_factors_of_any_rank_saves_nothing(monkeypatch):
    monkeypatch.setattr(latency, "in_turns", lambda calls, rounds: {rank: [2.0 - (rank is None)] for rank in calls})
    found = bert_adapter.measure_latency(tiny.model(), 1, 4, progress=False)
    assert {costs.dense for costs in found.kernels.values()} == {0.0}
    model = tiny.model()
    known = bert_adapter.decompose(model.params, None, signal="svd", kernels=bert_adapter.select_kernels(model))
    with pytest.raises(ValueError, match="smallest ranks take 1 of the time"):
        bert_adapter.plan(model.params, known, 0.9, of=found)


def test_tables_are_not_timed(turns):
    model = tiny.model()
    found = bert_adapter.measure_latency(
        model, 1, 4, kernels=bert_adapter.select_kernels(model, embeddings=True), progress=False
    )
    assert len(found.kernels) == len(turns) == 3


def test_times_are_kept_for_their_place(turns, tmp_path):
    model, file = tiny.model(), tmp_path / "latency.json"
    first = bert_adapter.measure_latency(model, 1, 4, file=file, progress=False)
    assert len(turns) == 3
    assert bert_adapter.measure_latency(model, 1, 4, file=file, progress=False) == first
    assert len(turns) == 3
    other = bert_adapter.select_kernels(model, "query")
    assert list(bert_adapter.measure_latency(model, 1, 4, kernels=other, file=file, progress=False).kernels) == [
        (16, 16)
    ]
    bert_adapter.measure_latency(model, 2, 4, kernels=other, file=file, progress=False)
    bert_adapter.measure_latency(tiny.model(num_hidden_layers=2), 1, 4, kernels=other, file=file, progress=False)
    assert len(turns) == 6
    assert bert_adapter.measure_latency(model, 1, 4, file=file, progress=False) == first
    assert len(turns) == 6


def test_models_are_really_timed(monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "SHARES", (0.5, 1))
    found = bert_adapter.measure_latency(tiny.model(), 1, 4, progress=False)
    assert found.seconds > 0
    assert all(np.all(np.array(costs.seconds) >= 0) and costs.ranks[-1] < 12 for costs in found.kernels.values())


BROKEN = [
    {},
    [],
    {"schema": 9},
    {"schema": True},
    {"schema": 4, "models": [{"kernels": []}]},
    {"schema": 4, "models": [{"kernels": [{}]}]},
    *(
        {"schema": 4, "models": [wrong]}
        for wrong in (
            dict.fromkeys(latency.PLACE, 1) | {"seconds": 1.0, "kernels": [kernel], "heads": []}
            for kernel in (
                {"shape": [2, 2], "ranks": [], "seconds": [], "dense": 1.0, "step": 1},
                {"shape": [2, 2], "ranks": [1], "seconds": [0.5], "dense": 1.0, "step": 0},
                {"shape": [2, 2], "ranks": [2, 1], "seconds": [0.5, 0.6], "dense": 1.0, "step": 1},
                {"shape": [2], "ranks": [1], "seconds": [0.5], "dense": 1.0, "step": 1},
                {"shape": [2, 2], "ranks": [1], "seconds": [-0.5], "dense": 1.0, "step": 1},
            )
        )
    ),
]


@pytest.mark.parametrize("content", [json.dumps(each) for each in BROKEN])
def test_another_file_is_no_times(content, tmp_path):
    (tmp_path / "file.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=r"file: .* holds no times of kernels"):
        bert_adapter.measure_latency(tiny.model(), 1, 4, file=tmp_path / "file.json")
    assert (tmp_path / "file.json").read_text("utf-8") == content


def test_times_of_an_earlier_version_are_replaced(turns, tmp_path):
    file = tmp_path / "latency.json"
    file.write_text('{"schema": 3, "kernels": []}', "utf-8")
    found = bert_adapter.measure_latency(tiny.model(), 1, 4, file=file, progress=False)
    assert bert_adapter.measure_latency(tiny.model(), 1, 4, file=file, progress=False) == found
    assert len(turns) == 3


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_text_with_choices_is_timed_with_one(engine, tmp_path):
    for package in engines.ENGINES[engine].packages:
        pytest.importorskip(package)
    model = bert_adapter.with_head(tiny.model(), head="choice")
    batch = engines.batch_for(model, 2, 5)
    assert batch["input_ids"].shape == (2, 1, 5)
    engines.ENGINES[engine].start(model, tmp_path, 1)(batch)


def test_the_table_of_words_is_timed_as_no_product():
    small = tiny.with_factors(tiny.model(), {QUERY: 2, "embeddings/word_embeddings": 3})
    assert [kernel.path for kernel in timing.kernels_of(small)] == [QUERY]


def test_pytorch_runs_floats_and_says_so_where_it_cannot(tmp_path):
    pytest.importorskip("torch")
    bert_adapter.save(tiny.with_factors(tiny.model(), {QUERY: 2}), tmp_path / "few", dtype="int8")
    engines.ENGINES["pytorch"].write(bert_adapter.load(tmp_path / "few"), tmp_path / "floats")
    assert json.loads((tmp_path / "floats/torch/config.json").read_text("utf-8"))["low_rank"]["integers"] == {}
    words = tiny.model("BertForMaskedLM")
    small, _ = bert_adapter.compress(words, [], rank=2, signal="svd", embeddings=True, progress=False)
    with pytest.raises(ValueError, match=r"engines: pytorch has no such model, wanted others: .*tied"):
        engines.ENGINES["pytorch"].write(small, tmp_path / "tied")
