"""Every block of README, docs and CONTRIBUTING runs, in order, with the outputs that it shows.

Blocks of one file share one namespace. The comment behind a `print` is what it prints. Where a page loads
all-MiniLM-L6-v2, a BERT of a few hundred numbers stands in for it.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bert_adapter
import bert_adapter.demo
from bert_adapter.cli import parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
TABBED = re.compile(r"`([^`]*bert-adapter (?:demo|compress|finetune)[^`]*)`")
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "dog", "runs", "far", "."]
SENTENCES = ["A red fox runs.", "A dog runs far.", "far", "A red dog.", "The fox", "a fox runs far."]


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages, indented as in the margin."""
    for indent, language, code in FENCE.findall(page.read_text("utf-8")):
        if language in languages:
            yield re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def tiny_bert() -> bert_adapter.Model:
    """A BERT of one layer, with a tokenizer of twelve words."""
    from bert_adapter.families import module_for

    module, rng = module_for(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    files = {
        "vocab.txt": "\n".join(WORDS).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer", "do_lower_case": true}',
    }
    return bert_adapter.Model(module, params, CONFIG, files)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the files that the pages speak of."""
    bert_adapter.save(tiny_bert(), tmp_path / "minilm")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    rows = "\n".join(f"{text}\t{label}" for text, label in zip(SENTENCES, [0, 1, 1, 0, 1, 0], strict=True))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"sentence\tlabel\n{rows}\n")
    monkeypatch.setattr(bert_adapter.demo, "minilm", lambda: tmp_path / "minilm")
    monkeypatch.setattr(bert_adapter.demo, "sentences", lambda name: SENTENCES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=lambda page: page.stem)
def test_code_runs_and_prints_what_it_says(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_links_lead_to_files() -> None:
    """Those to other files of the repository; pages made of results are made when the site is."""
    missing = []
    for page in [*PAGES, ROOT / "benchmarks" / "README.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in link and "evidence/" not in link and not (page.parent / link).exists():
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing, missing
