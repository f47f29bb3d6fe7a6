"""The repeated study goes on where it stopped, and its verdicts follow from its lines."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from benchmarks import study
from benchmarks.study import OURS, Cell, Scores, grid, recovered, verdicts
from bert_adapter import demo
from bert_adapter.checkpoint import save
from bert_adapter.checkpoint.names import by_path
from bert_adapter.heads import with_head
from bert_adapter.losses import task_loss
from bert_adapter.model import forward

KEY = "bert/encoder/layer/0/attention/self/key"


def line(value, method, ranks, size=0.5, seed=0, epochs=0, task="SST-2"):
    return Cell(task, "all", size, method, ranks, seed, epochs)._asdict() | {study.TASKS[task].metric: value}


LINES = [
    line(0.9, "dense", "uniform", size=1.0),
    line(0.5, "fwsvd", "uniform"),
    line(0.84, OURS, "planned"),
    line(0.86, OURS, "planned", seed=1),
    line(0.6, "em, published", "uniform"),
]


def test_every_model_of_the_grid_is_made_once():
    cells = grid(list(study.TASKS), 3, [1, 3])
    assert len(set(cells)) == len(cells)
    assert {cell.method for cell in cells} == set(study.METHODS)
    assert {cell.seed for cell in cells if cell.method == OURS and cell.size == 0.25} == {0, 1, 2}


def test_what_is_recovered_is_the_part_of_what_fwsvd_loses():
    assert recovered(Scores(LINES), "SST-2", 0.5) == pytest.approx((0.85 - 0.5) / (0.9 - 0.5))
    assert recovered(Scores(LINES), "CoLA", 0.5) is None


def test_means_have_the_standard_error_of_their_seeds():
    scores = Scores(LINES)
    key = ("SST-2", "all", 0.5, OURS, "planned", 0)
    assert scores.error(*key) == pytest.approx(0.01)
    assert scores.text(*key) == "0.850 ± 0.010"
    assert scores.text("CoLA", *key[1:]) == ""


def test_verdicts_follow_from_the_lines():
    found = verdicts(Scores(LINES))
    assert "bar: SST-2, 50%: recovered at least 0.8: met (0.875)" in found
    assert "bar: SST-2, 50%: at least 0.99 of dense: NOT met (0.944)" in found
    assert "bar: SST-2, all, 0.5: above every published iteration, by: met (0.25)" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "content", "texts", "labels"),
    [
        ("CoLA", "gj04\t1\t\ta fox\ngj04\t0\t*\tfox a\n", ["a fox", "fox a"], [1, 0]),
        ("CoLA", "sentence\tlabel\na fox\t1\nfox a\t0\n", ["a fox", "fox a"], [1, 0]),
        (
            "STS-B",
            "\t".join("abcdefghij") + "\n" + "\t".join("0123456") + "\ta fox\tit\t2.5\n",
            [("a fox", "it")],
            [2.5],
        ),
        ("SST-2", "sentence\tlabel\na fox\t1\nfox a\t0\n", ["a fox", "fox a"], [1, 0]),
    ],
)
def test_glue_is_read_as_it_is_downloaded(task, content, texts, labels, tmp_path):
    (tmp_path / task).mkdir()
    (tmp_path / task / "dev.tsv").write_text(content, "utf-8")
    rows = study.rows_of(task, "dev", tmp_path)
    assert (rows.texts, rows.labels.tolist()) == (texts, labels)


def test_weights_of_the_study_are_squared_gradients_of_batches_over_their_maximum(tmp_path):
    model = with_head(tiny.model(intermediate_size=16), 2)
    bench = study.Bench("SST-2", model, tiny.rows(), tiny.rows(), calibration=64, folder=tmp_path)
    batches = study.calibration(bench, 0)
    wanted, loss = 0.0, task_loss(model.module)
    for batch in batches:
        gradient = jax.grad(lambda p, batch=batch: loss(forward(model)(p, batch), batch).mean())(model.params)
        wanted = wanted + np.asarray(by_path(gradient)[f"{KEY}/kernel"], np.float64) ** 2
    fresh: Any = study.measured(bench, "batches", 0)
    again: Any = study.measured(bench, "batches", 0)  # from the file
    np.testing.assert_allclose(np.sum(fresh[KEY].fisher, axis=0), wanted / np.max(wanted), atol=1e-4)
    np.testing.assert_array_equal(fresh[KEY].fisher, again[KEY].fisher)


def test_rank_in_every_kernel_takes_its_share():
    shapes = {"a": (4, 4), "b": (4, 12)}
    assert study.share(shapes, 0.3) == 0.3
    assert study.share(shapes, 2) == pytest.approx((2 * 8 + 2 * 16) / 64)
    assert study.share(shapes, 3) == pytest.approx((16 + 48) / 64)  # both are dense from there on


def test_online_rows_are_those_of_the_dataset(monkeypatch):
    class Dataset(dict):
        column_names = ("sentence1", "sentence2", "label")

    def load_dataset(name, task, split):
        assert (name, task, split) == ("nyu-mll/glue", "stsb", "validation")
        return Dataset(sentence1=["a", "b"], sentence2=["c", "d"], label=[0.5, 4.0])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    study.rows_of.cache_clear()
    rows = study.rows_of("STS-B", "dev", None)
    assert rows.texts == [("a", "c"), ("b", "d")]
    np.testing.assert_array_equal(rows.labels, [0.5, 4.0])


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    """On a tiny model, from the training to the figure."""
    save(tiny.model(intermediate_size=16), tmp_path / "tiny")
    monkeypatch.setattr(demo, "minilm", lambda: tmp_path / "tiny")
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rows = [f"{text}\t{label}" for text, label in zip(*tiny.rows()[:2], strict=True)]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    study.rows_of.cache_clear()
    options = ["--quick", "--tasks", "SST-2", "--data", str(tmp_path / "glue"), "--cache", str(tmp_path / "cache")]
    study.main([*options, "--output", str(tmp_path)])
    file = tmp_path / "study-quick.jsonl"
    first = file.read_text()
    lines = [json.loads(text) for text in first.splitlines()]
    assert [(found["method"], found["ranks"]) for found in lines] == [
        ("dense", "uniform"),
        (OURS, "planned"),
        ("svd", "uniform"),
        ("svd", "planned"),
        (OURS, "uniform"),
    ]
    assert lines[1]["predicted"] > 0
    assert (tmp_path / "study-quick.png").exists()
    assert "**SST-2**, accuracy, all encoder kernels, as compressed; dense" in capsys.readouterr().out

    whole = first.splitlines(keepends=True)
    file.write_text("".join(whole[:-1]) + whole[-1][:20])  # killed while it wrote the last line
    study.main([*options, "--output", str(tmp_path)])
    again = [json.loads(text) for text in file.read_text().splitlines()]
    assert [found | {"compress_seconds": 0} for found in again] == [found | {"compress_seconds": 0} for found in lines]


def test_help_shows_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        study.main(["--help"])
    assert "Hugging Face" in capsys.readouterr().out


def test_without_data_and_datasets_it_says_what_is_wanted(monkeypatch, capsys):
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        study.main([])
    assert "wanted --data DIR, or Hugging Face's datasets" in capsys.readouterr().err


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(Path("SST-2") / "train.tsv")):
        study.rows_of("SST-2", "train", tmp_path)
