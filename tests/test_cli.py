"""The command line, on the real model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bert_adapter
from bert_adapter.cli import main
from bert_adapter.demo import sentences
from bert_adapter.evaluate import compare, embed, ranks, spearman

KEY = "encoder/layer/0/attention/self/key"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n\n".join(sentences("calibration")[:24]), "utf-8")
    return path


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


def test_help_shows_how_to_go_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "bert_adapter.load" in capsys.readouterr().out


def test_the_solver_needs_no_flax():
    code = "import sys, wlra, wlra.plot; assert not {'flax', 'transformers', 'matplotlib'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calibration_and_heldout_sentences_have_none_in_common():
    assert not {s.lower() for s in sentences("calibration")} & {s.lower() for s in sentences("heldout")}


def test_equal_values_share_the_mean_of_their_ranks():
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0, 2.5, 1])


def test_spearman_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 9, (2, 50)).astype(float)
    np.testing.assert_allclose(spearman(a, b), stats.spearmanr(a, b).statistic, rtol=1e-12)  # float64
