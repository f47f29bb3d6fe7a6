"""What is compiled is kept where the user's caches are, and a second model of the same shapes compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bert_adapter
from bert_adapter import programs
from bert_adapter.cli import main
from bert_adapter.importance import batch, measure
from bert_adapter.sample import sample_model

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
)
SENTENCES = ["a red fox runs far", "a dog", "it runs", "the dog"]


@pytest.fixture
def unset(monkeypatch):
    """JAX as if no place for what it compiles had been named."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name in OPTIONS:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def kept():
    """Where, of which compiling times, and how much."""
    return [getattr(jax.config, name) for name in OPTIONS]


def test_programs_are_kept_in_the_users_cache(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    programs.keep_programs()
    assert kept() == [str(tmp_path / "caches" / "bert-adapter"), programs.LEAST_SECONDS, programs.MOST_BYTES]
    assert (tmp_path / "caches" / "bert-adapter").is_dir()


@pytest.mark.parametrize("given", [None, "", "relative/caches"])
def test_without_an_absolute_name_the_cache_is_below_home(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert programs.folder() == tmp_path / ".cache" / "bert-adapter"


def test_a_place_that_was_named_is_respected(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    programs.keep_programs()
    assert kept()[0] == str(tmp_path / "mine")
    assert not (tmp_path / "caches").exists()


def test_numbers_that_were_set_are_respected(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    before = kept()[1]
    programs.keep_programs()
    assert kept()[1] == before


def test_where_nothing_can_be_written_nothing_is_kept(unset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    programs.keep_programs()
    assert kept()[0] is None


def test_help_says_where_programs_are_kept(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "$XDG_CACHE_HOME or ~/.cache" in printed
    assert "JAX_COMPILATION_CACHE_DIR=FOLDER" in printed


def test_measuring_a_second_model_of_the_same_shapes_compiles_nothing():
    one = sample_model()
    two = one._replace(params=jax.tree.map(lambda leaf: leaf + np.float32(0.1), one.params))
    counts = []
    for model in (one, two):
        paths = bert_adapter.select_kernels(model, include="query")
        batches = bert_adapter.text_batches(model, SENTENCES)
        bert_adapter.measure_signal(bert_adapter.forward(model), model.params, batches, paths, progress=False)
        compiled: Any = batch.add_kernel, batch.entering
        counts.append([measure.program_for.cache_info().misses, *(each._cache_size() for each in compiled)])
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_second_command_compiles_nothing(tmp_path):
    """Of another model of the same shapes, in another process: it finds all in the cache and adds nothing to it."""
    (tmp_path / "text").write_text("\n".join(SENTENCES))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "MPLCONFIGDIR": str(tmp_path)}
    found = []
    for name, scale in (("one", 1), ("two", 1.1)):
        model = sample_model()
        params = jax.tree.map(lambda leaf, scale=scale: leaf * np.float32(scale), model.params)
        bert_adapter.save(model._replace(params=params), tmp_path / name)
        size = ["--rank", "4", "--text", str(tmp_path / "text"), "-o", str(tmp_path / f"{name}-small")]
        command = [sys.executable, "-m", "bert_adapter.cli", "compress", str(tmp_path / name), *size]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append({file.name for file in (tmp_path / "caches" / "bert-adapter").glob("*-cache")})
    assert found[0]
    assert found[0] == found[1]
