"""The command line, on the real model."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import bert_adapter
from bert_adapter.cli import main
from bert_adapter.compressing import Report
from bert_adapter.demo import sentences
from bert_adapter.evaluate import compare, embed, ranks, spearman
from bert_adapter.factorisation import KernelReport
from bert_adapter.page import loss_figure, place, write_page
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
