"""The command line, on the real model."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny

import bert_adapter
import bert_adapter.demo
import wlra
from bert_adapter import checkpoint, cli, compressing, files, healing, latency, page, reading, training
from bert_adapter.cli import check_tokens, main, texts_for
from bert_adapter.compressing import Report
from bert_adapter.demo import sentences
from bert_adapter.evaluate import compare, embed, ranks, spearman
from bert_adapter.exporting import pytorch
from bert_adapter.factorisation import KernelReport
from bert_adapter.importance import measure
from bert_adapter.page import loss_figure, place, write_page
from bert_adapter.reading import read_texts
from bert_adapter.signals import SIGNALS

KEY = "encoder/layer/0/attention/self/key"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n\n".join(sentences("calibration")[:24]), "utf-8")
    return path


@pytest.mark.slow
def test_a_checkpoint_is_compressed_with_a_report_beside_it(minilm_path, text, tmp_path):
    output = tmp_path / "small"
    assert (
        main(["compress", str(minilm_path), "--rank", "16", "--include", KEY, "--text", str(text), "-o", str(output)])
        == 0
    )
    small = bert_adapter.load(output)
    assert small.config["low_rank"]["ranks"] == {KEY: 16}
    page = (tmp_path / "small.html").read_text("utf-8")
    assert KEY in page
    assert "<th>reliability</th>" in page
    assert page.count("<svg") == 1  # losses; a closed form has no iterations to show
    texts = sentences("heldout")[:10]
    fidelity = compare(embed(bert_adapter.load(minilm_path), texts), embed(small, texts))
    assert 0.8 < fidelity.cosine < 1 - 1e-6  # one kernel of 36 at rank 16 of 384: near, and not the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "16", "--text", "nowhere.txt"], "nowhere.txt"),
        (["--budget", "1.5", "--text", "TEXT"], "in (0, 1]; got 1.5"),
        (["--rank", "16", "--text", "TEXT", "--shrink", "1.5"], "in [0, 1]; got 1.5"),
        (["--rank", "16", "--text", "TEXT", "--include", "nothing"], "select none"),
        (["--rank", "16", "--text", "TEXT", "-o", "FOREIGN"], "wanted a new or empty directory"),
    ],
    ids=["no text", "bad share", "bad shrink", "nothing selected", "foreign files"],
)
def test_bad_input_is_one_line_and_status_2(options, message, minilm_path, text, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    places = {"TEXT": str(text), "FOREIGN": str(foreign)}
    options = ["-o", str(tmp_path / "out"), *(places.get(option, option) for option in options)]
    assert main(["compress", str(minilm_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A directory with a model that embeds, one with a head, and files that can be used or not."""
    folder = tmp_path_factory.mktemp("places")
    bert_adapter.save(tiny.model(), folder / "model")
    bert_adapter.save(tiny.model(tiny.CLASSIFIER, num_labels=2), folder / "classifier")
    three = [*tiny.WORDS[:5], *reversed(tiny.WORDS[5:])]
    files = tiny.FILES | {"vocab.txt": "\n".join(three).encode()}
    bert_adapter.save(tiny.model(tiny.CLASSIFIER, num_labels=2)._replace(files=files), folder / "other-words")
    (folder / "full").mkdir()
    files = {
        "text": b"a dog runs\nit\n",
        "utf16": "a dog\nit".encode("utf-16"),
        "latin1": "a dog\nna\u00efve".encode("latin-1"),
        "blank": b"\n \n",
        "rows": b"sentence\tlabel\na dog\t1\nit\t0\n",
        "pairs": b"sentence1\tsentence2\tlabel\na dog\tit\t1\nit\tred\t0\n",
        "heading": b"sentence\tlabel\n",
        "no-label": b"sentence\tlabels\na dog\t1\n",
        "withheld": b"sentence\tlabel\na dog\t-1\nit\t-1\n",
        "dev.tsv": b"sentence\tlabel\na dog\t1\nit\t2\n",
        "third": b"sentence\tlabel\na dog\t1\nit\t2\n",
        "missing": b"sentence\tlabel\na dog\t1\nit\t\n",
        "short": b"sentence\tlabel\na dog\t1\nit\n",
        "one": b"sentence\tlabel\na dog\t0\nit\t0\n",
        "words": b'{"STS-B": "good"}',
        "undefined": b'{"STS-B": NaN}',
        "names": b"sentence\tlabel\na dog\tyes\nit\tno\n",
        "names2": b"sentence\tlabel\na fox\tyes\nit\tno\n",
        "values": b"sentence\tlabel\na dog\t0.5\nit\t1.5\n",
        "same": b"sentence\tlabel\na dog\t0.5\nit\t0.5\n",
        "full/thesis.tex": b"years of work",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def refused(argv, capsys) -> str:
    """The one line that a command ends with, with status 2, and without a word before."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.err.startswith("bert-adapter: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refused(command, options, changed, message, *, folder, capsys):
    before = tree(folder)
    given = {name: value if isinstance(value, str) else str(value) for name, value in (options | changed).items()}
    flat = [part for name, value in given.items() if value != "-" for part in (name, value)]
    model = flat.pop(flat.index("DIR") + 1)
    flat.remove("DIR")
    assert re.search(message, refused([command, model, *flat], capsys))
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--include": "("}, r"--include: got '\(', which is no regular expression"),
        ({"--exclude": "[a"}, r"--exclude: got '\[a', which is no regular expression"),
        ({"--include": "nothing"}, "include='nothing' and exclude=None select none"),
        ({"--text": "utf16"}, "utf16: got UTF-16, wanted UTF-8"),
        ({"--text": "latin1"}, "latin1, line 2: got the byte 0xef, wanted UTF-8"),
        ({"--text": "blank"}, "blank holds no text"),
        ({"--text": "full"}, "--text: .*full is a directory, wanted a file"),
        ({"--text": "nowhere"}, "--text: .*nowhere is not there, wanted a file"),
        ({"--text": ""}, "--text: .* is a directory, wanted a file"),
        ({"--max-length": 1}, "--max-length: got 1, wanted at least 3"),
        ({"--max-length": 0}, "--max-length: got 0, wanted 1 to"),
        ({"--max-length": -(10**30)}, "--max-length: got -1"),
        ({"--max-length": "1.5"}, "argument --max-length: invalid int value: '1.5'"),
        ({"--batch-size": 0}, "--batch-size: got 0, wanted 1 to"),
        ({"--batch-size": 10**30}, "--batch-size: got 1"),
        ({"--rank": 0}, "--rank: got 0, wanted 1 to"),
        ({"--rank": "nan"}, "argument --rank: invalid int value: 'nan'"),
        ({"--rank": "-"}, "one of the arguments --budget --rank is required"),
        ({"--budget": 0.5}, "argument --budget: not allowed with argument --rank"),
        ({"--rank": "-", "--budget": "nan"}, r"--budget is the share .*, in \(0, 1\]; got nan"),
        ({"--rank": "-", "--budget": 0}, r"--budget is the share .*, in \(0, 1\]; got 0"),
        ({"--rank": "-", "--budget": 0.01}, "--budget: the smallest ranks take .* got 0.01"),
        ({"--multiple-of": 8}, "--uniform, multiple_of, of and flops say how a budget is spent; got a rank"),
        ({"--flops": 0.5}, "--uniform, multiple_of, of and flops say how a budget is spent; got a rank"),
        ({"--rank": "-", "--budget": 0.5, "--flops": 0}, r"--flops is the share .*, in \(0, 1\]; got 0"),
        (
            {"--rank": "-", "--budget": 0.5, "--flops": 0.01},
            "--flops: the smallest ranks take .* of the flops; got 0.01",
        ),
        ({"--multiple-of": 0}, "--multiple-of: got 0, wanted 1 to"),
        ({"--shrink": "nan"}, r"--shrink is how far .*, in \[0, 1\]; got nan"),
        ({"--shrink": "inf"}, r"--shrink is how far .*, in \[0, 1\]; got inf"),
        ({"--seed": -1}, "--seed: got -1, wanted 0 to"),
        ({"--seed": 2**32}, "--seed: got 4294967296, wanted 0 to"),
        ({"--method": "em"}, "--signal 'combined' needs a method for Kronecker weights"),
        ({"--signal": "hessian"}, "argument --signal: invalid choice: 'hessian'"),
        ({"--frobnicate": 1}, "unrecognized arguments: --frobnicate 1"),
        ({"-o": "full"}, "-o: .*full: wanted a new or empty directory"),
        ({"-o": "text"}, "-o: .*text: wanted a new or empty directory"),
        ({"-o": "text/small"}, "-o: .*text is a file, wanted a directory to write in"),
        ({"-o": "model"}, "-o: .*model lies in .*model, which DIR names"),
        ({"-o": "model/small"}, "-o: .*small lies in .*model, which DIR names"),
        ({"-o": ""}, "-o: .*: wanted a new or empty directory"),
        ({"--report": "full"}, "--report: .*full: got a directory, wanted the name of a file"),
        ({"--report": "text"}, "--report: .*text is --text's file too"),
        ({"--report": "out"}, "--report: .*out lies in the new checkpoint"),
        ({"--report": "text/page"}, "--report: .*text is a file, wanted a directory"),
        ({"--file": "full"}, "--file: .*full: got a directory, wanted the name of a file"),
        ({"--file": "text"}, "--file: .*text is --text's file too"),
        ({"--file": "blank"}, "blank: wanted a file of save_importance"),
        ({"--file": "out/sums"}, "--file: .*sums lies in the new checkpoint"),
        ({"--file": "out.html"}, "--report: .*out.html is --file's file too"),
        ({"--file": "model/model.safetensors"}, "--file: .* lies in .*model, which DIR names"),
        ({"--file": "sums", "--heal": "text", "-o": "sums.healing"}, "state of healing: .*lies in the new checkpoint"),
        ({"--file": "sums", "--heal": "text", "--report": "sums.healing"}, "sums.healing is .*healing's file too"),
        ({"--include": "pooler"}, "--include: got .'pooler/dense'., which the output does not depend on"),
        ({"--rank": "-", "--budget": 0.5, "--of": "latency", "--cell": "0x8"}, "argument --cell: got '0x8'"),
        ({"--rank": "-", "--budget": 0.5, "--of": "latency", "--cell": "1x21"}, "--cell: got 1x21, wanted at most 20"),
        ({"--rank": "-", "--budget": 0.5, "--of": "latency", "--heal": "utf16"}, "utf16: got UTF-16, wanted UTF-8"),
        ({"--report": "~no-such-user/page"}, "argument --report: got ~no-such-user/page: Could not"),
        ({"DIR": "text"}, "text"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k} {v}"[:40] for k, v in value.items()),
)
def test_compress_refuses_what_cannot_be_in_a_line_before_work(changed, message, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(measure, "empty", of_nothing)
    options = {"DIR": "model", "--rank": "4", "--text": "text", "-o": "out"}
    check_refused("compress", options, changed, message, folder=places, capsys=capsys)


def of_nothing(shapes, wanted, seed):
    """A measurement of no kernel, so that a file can be compared and nothing can be measured."""
    return bert_adapter.Importance({}, examples=0, tokens=0, batches=0, gradients="gaussian", seed=seed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--data": "utf16"}, "utf16: got UTF-16"),
        ({"--data": "latin1"}, "latin1, line 2: got the byte 0xef"),
        ({"--data": "nowhere"}, "--data: .*nowhere is not there"),
        ({"--data": "full"}, "--data: .*full is a directory"),
        ({"--data": "text"}, "text: wanted a heading of one or two columns of text and 'label'"),
        ({"--data": "no-label"}, "no-label: wanted a heading .* got .'sentence', 'labels'"),
        ({"--data": "heading"}, "heading: wanted rows below the heading"),
        ({"--data": "withheld"}, "withheld, line 2: got the label -1, wanted a class of the head"),
        ({"--data": "third"}, "third, line 3: got the label 2, wanted a class of the head, 0 to 1"),
        ({"--data": "missing"}, "missing, line 3: got '' in the column 'label'"),
        ({"--data": "short"}, "short, line 3: wanted 2 columns; got 1"),
        ({"--data": "names"}, "names, line 2: got the label 'yes', wanted a class of the head, 0 to 1"),
        ({"--data": "pairs", "--max-length": 4}, "--max-length: got 4, wanted at least 5 for a pair of texts"),
        ({"DIR": "model", "--data": "one"}, "labels: all are 0, wanted two classes or more"),
        ({"DIR": "model", "--data": "withheld"}, "withheld, line 2: got the label -1"),
        ({"--dev": "third"}, "third, line 3: got the label 2"),
        ({"--dev": "nowhere"}, "--dev: .*nowhere is not there"),
        ({"--dev": "dev.tsv"}, "error: dev.tsv, line 3: got the label 2"),
        ({"--dev": "blank"}, "blank: wanted a heading"),
        ({"--max-length": 2}, "--max-length: got 2, wanted at least 3"),
        ({"--batch-size": -3}, "--batch-size: got -3"),
        ({"--epochs": 0}, "--epochs: got 0, wanted 1 to"),
        ({"--learning-rate": "nan"}, "--learning-rate: got nan, wanted 0 to 1"),
        ({"--learning-rate": "1e30"}, "--learning-rate: got 1e.30, wanted 0 to 1"),
        ({"--seed": -1}, "--seed: got -1"),
        ({"--dev": "rows"}, "--dev: rows is --data's file too, wanted other rows than those that are trained on"),
        ({"DIR": "model", "--data": "values", "--dev": "same"}, "labels: got 0.5 for all of 2 rows"),
        ({"--distil": 0.5}, "--distil: got no --teacher"),
        ({"--distil": 2, "--teacher": "classifier"}, "--distil: got 2.0, wanted 0 to 1"),
        ({"--teacher": "model"}, "--teacher: got outputs of shape"),
        ({"--teacher": "other-words"}, "--teacher: got a model that cuts the texts of --data into other tokens"),
        ({"-o": "classifier"}, "-o: .*classifier lies in .*, which DIR names"),
        ({"-o": "model/out", "--teacher": "model"}, "-o: .*out lies in .*model, which --teacher names"),
        ({"-o": "full"}, "-o: .*full: wanted a new or empty directory"),
        ({"--file": "rows"}, "--file: .*rows is --data's file too"),
        ({"--file": "full"}, "--file: .*full: got a directory"),
        ({"--file": "text"}, "text: wanted the state of a training"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k} {v}"[:40] for k, v in value.items()),
)
def test_finetune_refuses_what_cannot_be_in_a_line_before_work(changed, message, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    monkeypatch.setattr(training, "step_function", lambda recipe: lambda *_, **__: pytest.fail("it trains"))
    options = {"DIR": "classifier", "--data": "rows", "-o": "out"}
    check_refused("finetune", options, changed, message, folder=places, capsys=capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "nan"], r"--budget is the share .*, in \(0, 1\]; got nan"),
        (["--budget", "2"], r"--budget is the share .*, in \(0, 1\]; got 2.0"),
        (["-o", "text"], "text"),
        (["-o", "full/report.html/x"], "report.html"),
    ],
)
def test_demo_refuses_what_cannot_be_in_a_line_before_work(options, message, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    (places / "full" / "report.html").write_text("")
    monkeypatch.setattr(bert_adapter.demo, "demo", lambda *_: pytest.fail("it begins"))
    assert re.search(message, refused(["demo", *options], capsys))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--to": "torch"}, "argument --to: invalid choice: 'torch'"),
        ({"--to": "-"}, "the following arguments are required: --to"),
        ({"--dtype": "int8"}, "--dtype: got 'int8' with to='transformers-dense', wanted none"),
        ({"--to": "transformers"}, "--to: got 'transformers' for a model without factors"),
        (
            {"--to": "sentence-transformers", "DIR": "classifier"},
            "for BertForSequenceClassification, wanted an encoder",
        ),
        ({"-o": "full"}, "-o: .*full: wanted a new or empty directory"),
        ({"-o": "model/out"}, "-o: .*out lies in .*model, which DIR names"),
        ({"--scores": "text"}, "text: wanted JSON"),
        ({"--scores": "words"}, "words: scores: got 'STS-B' of 'good', wanted a number"),
        ({"--scores": "nowhere"}, "--scores: .*nowhere is not there"),
        ({"--scores": "undefined"}, "undefined: scores: got 'STS-B' of nan, wanted a number"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k} {v}"[:40] for k, v in value.items()),
)
def test_export_refuses_what_cannot_be_in_a_line_before_work(changed, message, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    monkeypatch.setattr(pytorch, "write", lambda *_: pytest.fail("it writes"))
    options = {"DIR": "model", "--to": "transformers-dense", "-o": "out"}
    check_refused("export", options, changed, message, folder=places, capsys=capsys)


def test_export_writes_a_directory_and_says_where_to_look(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    (tmp_path / "scores").write_text('{"STS-B": 0.85}')
    argv = ["export", "classifier", "--to", "transformers-dense", "-o", str(tmp_path / "out")]
    assert main([*argv, "--scores", str(tmp_path / "scores")]) == 0
    assert "README.md says how to load it" in capsys.readouterr().out
    assert "| STS-B | 0.85 |" in (tmp_path / "out/README.md").read_text("utf-8")
    assert bert_adapter.load(tmp_path / "out").module == tiny.model(tiny.CLASSIFIER, num_labels=2).module


def test_help_of_export_says_what_each_target_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["export", "--help"])
    text = capsys.readouterr().out
    for name, target in bert_adapter.TARGETS.items():
        assert f"{name:21}  {target.about}" in text


def forbidden(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_pipes_and_devices_are_read_and_never_replaced(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for option in ("--report", "--file", "-o"):
        argv = ["compress", "model", "--rank", "4", "--text", "text", "-o", str(tmp_path / "out"), option, str(pipe)]
        assert f"{option}: {pipe}: " in refused(argv, capsys)
    with pytest.raises(ValueError, match=f"{pipe}: got a device or a pipe"):
        files.write_text(pipe, "a page")
    assert pipe.is_fifo()
    writer = threading.Thread(target=pipe.write_text, args=("a dog\n",))
    writer.start()
    assert read_texts(pipe) == ["a dog"]
    writer.join()


def enough(*_, **__):
    raise ValueError("enough")


def test_every_file_is_read_once(places, monkeypatch, tmp_path, capsys):
    """It may be a pipe."""
    monkeypatch.chdir(places)
    reads: list[str] = []
    lines = reading.read_lines
    monkeypatch.setattr(reading, "read_lines", lambda file: reads.append(Path(file).name) or lines(file))
    monkeypatch.setattr(healing, "heal", enough)
    monkeypatch.setattr(compressing, "compress", enough)
    out = ["-o", str(tmp_path / "out")]
    for argv, wanted in (
        (["heal", "model", "--teacher", "model", "--text", "text", "--heldout", "rows"], ["text", "rows"]),
        (["compress", "model", "--rank", "4", "--text", "text", "--heal", "rows"], ["text", "rows"]),
        (
            ["compress", "model", "--rank", "4", "--text", "pairs", "--trim", "rows", "--heal", "pairs"],
            ["pairs", "pairs", "rows"],
        ),
    ):
        reads.clear()
        assert main([*argv, *out]) == 2
        assert capsys.readouterr().err == "bert-adapter: error: enough\n"
        assert reads == wanted


OF_TIME = ["compress", "model", "--budget", "0.9", "--of", "latency", "--cell", "1x8", "--text", "text"]


def test_times_are_not_kept_where_nothing_can_be(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(latency, "measure_latency", lambda *_, file, **__: enough() if file is None else None)
    assert main([*OF_TIME, "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err == "bert-adapter: error: enough\n"
    assert f"times are not kept, for nothing can be written in {tmp_path}/file/bert-adapter" in printed.out


@pytest.mark.parametrize(("content", "said"), [("{", "wanted JSON: .*"), ('{"schema": 99}', "schema 99")])
def test_a_cache_of_times_that_cannot_be_read_is_to_be_deleted(content, said, places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    file = tmp_path / "bert-adapter/latency.json"
    file.parent.mkdir()
    file.write_text(content, "utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*OF_TIME, "-o", str(tmp_path / "out")]) == 2
    wanted = f"error: {file} holds no times of kernels, .*{said}: it is where --of latency keeps times, delete it\n"
    assert re.search(wanted, capsys.readouterr().err)


def test_a_place_without_permission_is_refused(places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    monkeypatch.setattr(files.tempfile, "TemporaryFile", forbidden)  # root may write everywhere
    line = refused(["compress", "model", "--rank", "4", "--text", "text", "-o", "out"], capsys)
    assert "-o: " in line
    assert f"cannot write in {places}: Permission denied" in line
    assert not (places / "out").exists()


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_what_was_measured_and_says_so(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    file, out = tmp_path / "sums", tmp_path / "out"
    argv = ["compress", "model", "--rank", "4", "--text", "text", "-o", str(out)]
    argv += ["--include", "query", "--signal", "activation"]  # one kernel, and no backward pass
    with monkeypatch.context() as on_full_disk:
        on_full_disk.setattr(checkpoint, "save_file", full)
        assert main([*argv, "--file", str(file)]) == 2
        assert f"No space left on device; what was measured is kept in {file}" in capsys.readouterr().err
        assert main(argv) == 2
        assert "what was measured is lost: --file FILE keeps it" in capsys.readouterr().err
    assert file.exists()
    assert not out.exists()
    monkeypatch.setattr(measure, "counted", lambda *_: pytest.fail("it measures again"))
    monkeypatch.setattr(page, "write_page", lambda *_: None)  # drawn by other tests
    assert main([*argv, "--file", str(file)]) == 0
    assert list(bert_adapter.load(out).config["low_rank"]["ranks"].values()) == [4]


def test_a_full_disk_keeps_what_was_trained_and_says_so(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    file, out = tmp_path / "state", tmp_path / "out"
    argv = ["finetune", "classifier", "--data", "rows", "--epochs", "1", "-o", str(out), "--file", str(file)]
    with monkeypatch.context() as on_full_disk:
        on_full_disk.setattr(checkpoint, "save_file", full)
        assert main(argv) == 2
    assert f"No space left on device; the state of the training is kept in {file}" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(training, "step_function", lambda recipe: lambda *_, **__: pytest.fail("it trains again"))
    assert main(argv) == 0
    assert bert_adapter.load(out).module.config.num_labels == 2
    assert not file.exists()


def test_names_of_classes_are_trained_on_and_saved(places, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(places)
    argv = ["finetune", "model", "--data", "names", "--dev", "names2", "--epochs", "1", "-o", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "after: accuracy" in capsys.readouterr().out
    assert bert_adapter.load(tmp_path / "out").config["label2id"] == {"no": 0, "yes": 1}


def test_an_embedder_reads_the_texts_of_a_pair_apart(places):
    """What is measured, and healed, is of rows that it will be given."""
    joined = [("a dog", "it"), ("it", "red")]
    assert texts_for(bert_adapter.load(places / "model"))(places / "pairs") == ["a dog", "it", "it", "red"]
    assert texts_for(bert_adapter.load(places / "model"))(places / "text") == ["a dog runs", "it"]
    assert texts_for(bert_adapter.load(places / "classifier"))(places / "pairs") == joined


class Closed(io.StringIO):
    """What nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("out", [Closed(), io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_what_is_done_is_saved_wherever_it_is_told(places, monkeypatch, tmp_path, out):
    monkeypatch.chdir(places)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(page, "write_page", lambda *_: None)  # drawn by other tests
    argv = [
        "compress",
        "model",
        "--rank",
        "4",
        "--signal",
        "svd",
        "--text",
        "text",
        "-o",
        str(tmp_path / "h\u00e4lfte"),
    ]
    assert main(argv) == 0
    assert bert_adapter.load(tmp_path / "h\u00e4lfte").config["low_rank"]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped: the same command goes on from text"),
        (RuntimeError("else"), None, ""),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), 2, "error: out of memory"),
    ],
)
def test_a_run_that_is_cut_off_ends_with_a_line(error, status, said, places, monkeypatch, capsys):
    def stop(options):
        raise error

    monkeypatch.chdir(places)
    monkeypatch.setitem(cli.COMMANDS, "heal", stop)
    argv = ["heal", "model", "--teacher", "model", "--text", "text", "-o", "out", "--file", "text"]
    if status == 130:
        monkeypatch.setitem(cli.COMMANDS, "heal", lambda options: setattr(options, "saved", True) or stop(options))
        assert main(argv) == 130
        assert "stopped: out is saved" in capsys.readouterr().err
        monkeypatch.setitem(cli.COMMANDS, "heal", stop)
    if status is None:  # a fault of ours
        with pytest.raises(RuntimeError, match="else"):
            main(argv)
        return
    assert main(argv) == status
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert wlra.__version__ in capsys.readouterr().out


def test_a_path_may_begin_with_the_users_home(places, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(places)
    assert main(["export", "model", "--to", "transformers-dense", "-o=~/out"]) == 0
    assert (tmp_path / "out/config.json").is_file()


def test_a_teacher_of_other_words_is_refused_wherever_they_are(places, tmp_path, capsys):
    rows = "sentence\tlabel\n" + "[MASK]\t1\n" * 120
    (tmp_path / "rows").write_text(rows + "it runs\t0\n")
    options = ["--data", str(tmp_path / "rows"), "-o", str(tmp_path / "out")]
    assert main(["finetune", str(places / "classifier"), *options, "--teacher", str(places / "other-words")]) == 2
    assert "--teacher: got a model that cuts the texts of --data into other tokens" in capsys.readouterr().err


def test_a_teacher_may_declare_another_length_and_need_no_types():
    """The model's batches are what it is given."""
    texts = ["a red fox runs far from it", "a dog"]
    short = {"tokenizer_config.json": b'{"model_max_length": 5, "model_input_names": ["input_ids", "attention_mask"]}'}
    teacher = tiny.model()._replace(files=tiny.model().files | short)
    check_tokens(tiny.model(), teacher, texts, None, of="--text")
    words = "\n".join([*tiny.WORDS[:5], *reversed(tiny.WORDS[5:])]).encode()
    other = teacher._replace(files=teacher.files | {"vocab.txt": words})
    with pytest.raises(ValueError, match="cuts the texts of --text into other tokens"):
        check_tokens(tiny.model(), other, texts, None, of="--text")


def test_help_shows_how_to_go_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "bert_adapter.load" in capsys.readouterr().out


def test_help_of_compress_says_what_each_signal_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    text = capsys.readouterr().out
    for name, signal in SIGNALS.items():
        assert (f"{name:10}  {signal.about}" in text) == (not signal.needs_labels)


def test_a_signal_that_needs_labels_is_not_offered(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compress", "model", "--rank", "4", "--text", "texts", "-o", "out", "--signal", "fisher"])
    assert "invalid choice: 'fisher'" in capsys.readouterr().err


def kernel(layer, name, losses):
    return KernelReport(
        path=f"encoder/layer/{layer}/{name}",
        shape=(384, 1536),
        rank=96,
        parameters_before=589824,
        parameters_after=184320,
        loss=losses,
        iterations=2,
        status="CONVERGED",
        seconds=0.5,
        history=[0.25, 0.125],
    )


def test_tables_of_the_page_scroll_and_do_not_wrap(tmp_path):
    kernels = [kernel(0, "output/dense", {"em": 0.125}), kernel(1, "output/dense", {"em": 0.5})]
    seconds = {"load": 1.0, "importance": 2.0, "plan": 3.0, "solve": 4.0}
    write_page(tmp_path / "page.html", "a & b", Report(kernels, method="em", signal="exact", seconds=seconds))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<title>a &amp; b</title>" in page
    assert "<td>384 by 1536</td>" in page
    assert "td, th { white-space: nowrap; }" in page
    assert ".scroll { overflow-x: auto;" in page
    assert page.count("<table>") == page.count('<div class="scroll kernels"><table>') + page.count(
        '<div class="scroll"><table>'
    )
    assert page.count("<svg") == page.count('<div class="scroll figure"><svg') == 2  # losses, and convergence


def test_losses_are_drawn_by_layer_in_a_panel_for_each_kind_of_kernel():
    with matplotlib.rc_context({"backend": "agg"}):
        kernels = [kernel(i, name, {"em": 0.1 * (i + 1)}) for i in (0, 1) for name in ("intermediate/dense", "a/key")]
        figure = loss_figure(kernels)
    panels = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert set(panels) == {"intermediate/dense", "a/key"}
    for ax in panels.values():
        (line,) = ax.get_lines()
        assert np.asarray(line.get_xydata()).tolist() == [[0, 0.1], [1, 0.2]]
        assert ax.get_ylim()[1] > 0.2
        assert float(ax.title.get_fontsize()) >= 11
    assert place("layers_12/kind/of") == (12, "kind/of")
    assert place("pooler/dense") == (0, "pooler/dense")


def test_the_solver_needs_no_flax():
    code = "import sys, wlra; assert 'wlra.plot' not in sys.modules; assert wlra.plot.convergence and wlra.plot.path; "
    code += "assert not {'flax', 'transformers', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calibration_and_heldout_sentences_have_none_in_common():
    assert not {s.lower() for s in sentences("calibration")} & {s.lower() for s in sentences("heldout")}


def test_equal_values_share_the_mean_of_their_ranks():
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0, 2.5, 1])


def test_spearman_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 9, (2, 50)).astype(float)
    np.testing.assert_allclose(spearman(a, b), stats.spearmanr(a, b).statistic, rtol=1e-12)  # float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0.5", "--cell", "1x8"], "--cell: got it with --of kernels, wanted --of latency"),
        (["--rank", "2", "--of", "latency"], "--of latency: wanted --budget"),
        (["--budget", "0.5", "--of", "latency", "--embeddings"], "no --embeddings"),
    ],
)
def test_budgets_of_time_that_cannot_be_are_refused(options, message, tmp_path, text, capsys):
    assert main(["compress", "nowhere", *options, "--text", str(text), "-o", str(tmp_path / "small")]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_keeps_to_a_budget_of_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    costs = latency.Costs((1, 4), (1e-9, 2e-9), 1 / 6)
    monkeypatch.setattr(
        latency, "timed_in", lambda run, params, inputs, paths, shape: (6.0, costs)
    )  # kernels take all of it
    checkpoint.save(tiny.model(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("a red fox\nit runs far", "utf-8")
    options = ["--budget", "0.5", "--of", "latency", "--cell", "1x8", "--signal", "svd"]
    places = ["--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "small")]
    assert main(["compress", str(tmp_path / "dense"), *options, *places]) == 0
    assert "the dense model takes" in capsys.readouterr().out
    assert max(bert_adapter.load(tmp_path / "small").config["low_rank"]["ranks"].values()) <= 9
    assert (tmp_path / "cache/bert-adapter/latency.json").exists()
