"""What the files of a directory declare is honoured, or refused by the name of the file and of the entry."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny import BATCH, CLASSIFIER, CONFIG, EMBEDDER, at

import bert_adapter
from bert_adapter import load, save, with_head
from bert_adapter.evaluate import embed, score
from bert_adapter.families import module_for
from bert_adapter.families.bert import Bert, config_from_dict
from bert_adapter.families.sentence import OLDER_SETTINGS, Settings, declared_stages, settings
from bert_adapter.families.stages import MODES, PROJECTED, UNDECLARED, Pooling, Projection, pooled
from bert_adapter.outputs.sentences import similarity_of
from bert_adapter.text import LabelledTexts, tokenizer
from bert_adapter.vocabulary import tokenizer_of

TYPE = "sentence_transformers.models."
POOLING, QUERY = "1_Pooling/config.json", "encoder/layer/0/attention/self/query"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def modules(*kinds) -> bytes:
    """modules.json of an encoder and of what follows."""
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds, 1))]
    return as_json(
        [
            {"idx": i, "path": p, "type": TYPE + k}
            for i, (p, k) in enumerate(zip(paths, ("Transformer", *kinds), strict=True))
        ]
    )


def dense(**entries) -> bytes:
    tanh = "torch.nn.modules.activation.Tanh"
    return as_json({"in_features": 16, "out_features": 5, "bias": True, "activation_function": tanh} | entries)


def write(folder, **files):
    """Files by name, "/" written as "__"."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def edit_config(folder, remove=(), **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name not in remove}))


def plain(folder, architecture=EMBEDDER, **entries):
    """A directory that declares nothing of what follows its encoder."""
    model = tiny.model(architecture, **entries)
    made = module_for(model.config)
    save(model._replace(module=made, files=tiny.FILES), folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Directories that tests copy and spoil."""
    place = tmp_path_factory.mktemp("originals")
    save(tiny.model(), place / "declared")
    return place, plain(place / "plain"), plain(place / "classifier", CLASSIFIER, num_labels=3)


def copied(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def folder(originals, tmp_path):
    return copied(originals[1], tmp_path)


@pytest.fixture
def classifier(originals, tmp_path):
    return copied(originals[2], tmp_path)


@pytest.fixture
def declared(originals, tmp_path):
    return copied(originals[0] / "declared", tmp_path)


def embeddings(model) -> np.ndarray:
    return np.asarray(bert_adapter.apply(model.module, model.params, **BATCH), np.float64)


def states(model) -> np.ndarray:
    params = {name: model.params[name] for name in ("embeddings", "encoder", "pooler")}
    return np.asarray(bert_adapter.apply(Bert(model.module.config), params, **BATCH).last_hidden_state, np.float64)


# What follows the encoder.


REFERENCE: dict[str, Any] = {  # of the visible states of one text
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(axis=0) / np.sqrt(len(rows)),
    "weightedmean": lambda rows: np.average(rows, axis=0, weights=np.arange(1, len(rows) + 1)),
    "lasttoken": lambda rows: rows[-1],
}


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), ("mean", "cls", "lasttoken"), tuple(MODES)])
def test_pooling_is_that_of_the_visible_states(modes):
    hidden = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    visible = [rows[mask == 1] for rows, mask in zip(hidden.astype(np.float64), BATCH["attention_mask"], strict=True)]
    wanted = [np.concatenate([REFERENCE[mode](rows) for mode in modes]) for rows in visible]
    got = pooled(Pooling(modes), jnp.asarray(hidden), BATCH["attention_mask"])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # sums of eight float32 numbers


def test_first_token_is_the_first_that_is_no_padding():
    hidden, mask = jnp.arange(8.0).reshape(1, 4, 2), np.array([[0, 0, 1, 1]])
    np.testing.assert_array_equal(pooled(Pooling(("cls", "lasttoken")), hidden, mask), [[4, 5, 6, 7]])


def test_text_without_tokens_is_zeros_in_all_modes_but_the_first_tokens_state():
    modes = tuple(mode for mode in MODES if mode != "cls")
    got = pooled(Pooling(modes), jnp.ones((1, 3, 2)), np.zeros((1, 3), np.int32))
    np.testing.assert_array_equal(got, np.zeros((1, 10)))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_cls_token": True}, ("cls",)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_max_tokens": True}, ("max", "lasttoken")),
        ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}, ("weightedmean",)),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 16}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, ("mean",)),  # there is no prompt to leave out
    ],
)
def test_pooling_modes_are_read_in_both_forms(config, modes):
    stage = (declared_stages({POOLING: as_json(config)}) or (None,))[0]
    assert isinstance(stage, Pooling)
    assert stage.modes == modes


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_mean_tokens": False}, "modes"),
        ({"pooling_mode": "attention"}, "attention"),
        ({"pooling_mode": []}, "modes"),
        ({"pooling_mode_median_tokens": True}, "pooling_mode_median_tokens"),
    ],
)
def test_unknown_pooling_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=f"{POOLING}: got.*{named}.*supported"):
        declared_stages({POOLING: as_json(config)})


def test_pooling_of_another_width_is_refused(folder):
    write(folder, **{"1_Pooling__config.json": as_json({"word_embedding_dimension": 384})})
    with pytest.raises(ValueError, match=f"{POOLING}: got states of 384 numbers, wanted 16"):
        load(folder)


def test_pooling_of_a_directory_is_computed_and_saved_along(folder, tmp_path):
    cls = as_json({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    write(folder, **{"1_Pooling__config.json": cls})
    model = load(folder)
    np.testing.assert_allclose(embeddings(model), states(model)[:, 0], rtol=0, atol=1e-5)  # two compilations
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").module == model.module


def test_directory_that_declares_nothing_gives_means_of_any_length(folder):
    """As sentence-transformers does."""
    model = load(folder)
    assert model.module.stages == UNDECLARED
    rows = zip(states(model), BATCH["attention_mask"], strict=True)
    wanted = [row[mask == 1].mean(axis=0) for row, mask in rows]
    np.testing.assert_allclose(embeddings(model), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Identity", [-1, 0, 2]),
        ("Tanh", [-0.76159416, 0, 0.96402758]),
        ("ReLU", [0, 0, 2]),
        ("GELU", [-0.15865525, 0, 1.95449974]),
        ("Sigmoid", [0.26894142, 0.5, 0.88079708]),
        ("SiLU", [-0.26894142, 0, 1.76159416]),
    ],
)
def test_activations_are_pytorchs(name, values):
    got = PROJECTED[name](jnp.array([-1.0, 0.0, 2.0]))
    np.testing.assert_allclose(got, values, rtol=0, atol=1e-6)  # a few roundings of float32


def test_dense_modules_are_computed_compressed_and_saved_in_their_folder(folder, tmp_path):
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(16, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    files = {"modules.json": modules("Pooling", "Dense", "Normalize"), "1_Pooling__config.json": b"{}"}
    write(folder, **files, **{"2_Dense__config.json": dense()})
    save_file({"linear.weight": kernel.T.copy(), "linear.bias": bias}, folder / "2_Dense/model.safetensors")
    model = load(folder)
    means = embeddings(model._replace(module=model.module.clone(stages=UNDECLARED)))
    rows = np.tanh(means @ kernel + bias)
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings(model), wanted, rtol=0, atol=1e-5)
    small, _ = bert_adapter.compress(model, [], rank=2, signal="svd", include="2_Dense", progress=False)
    save(small, tmp_path / "small")
    assert load_file(tmp_path / "small/2_Dense/model.safetensors").keys() == {
        "linear.left",
        "linear.right",
        "linear.bias",
    }
    listed = [entry["path"] for entry in json.loads((tmp_path / "small/modules.json").read_text())]
    assert all((tmp_path / "small" / path).is_dir() for path in listed)
    np.testing.assert_array_equal(embeddings(load(tmp_path / "small")), embeddings(small))
    save(model, tmp_path / "again")
    again = load_file(tmp_path / "again/2_Dense/model.safetensors")
    np.testing.assert_array_equal(again["linear.weight"], kernel.T)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sentence_transformers_sees_the_same_directory_after_a_merge(folder, tmp_path):
    """Every file that it reads, byte for byte but for kernels' numbers, and every folder that modules.json lists."""
    rng = np.random.default_rng(0)
    files = {
        "modules.json": modules("Pooling", "Dense", "Normalize"),
        "1_Pooling__config.json": as_json({"word_embedding_dimension": 16, "pooling_mode_cls_token": True}),
        "2_Dense__config.json": dense(),
        "sentence_bert_config.json": as_json({"max_seq_length": 12, "do_lower_case": False}),
        "config_sentence_transformers.json": as_json(
            {"default_prompt_name": "q", "prompts": {"q": "it "}, "similarity_fn_name": "dot"}
        ),
    }
    write(folder, **files)
    tensors = {"linear.weight": rng.normal(size=(5, 16)), "linear.bias": rng.normal(size=5)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / "2_Dense/model.safetensors", metadata={"format": "pt"})
    model, shapes = load(folder), {}
    both = "encoder|2_Dense"
    small, _ = bert_adapter.compress(model, [], rank=2, signal="svd", include=both, progress=False)
    save(bert_adapter.merge(small), tmp_path / "merged")
    before, after = contents(folder), contents(tmp_path / "merged")
    weights = ("model.safetensors", "2_Dense/model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} - {*weights, "config.json"} == set()
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    for name in weights:
        shapes = [
            {key: (array.shape, array.dtype) for key, array in load_file(place / name).items()}
            for place in (folder, tmp_path / "merged")
        ]
        assert shapes[0] == shapes[1]
    listed = [entry["path"] for entry in json.loads(after["modules.json"])]
    assert all((tmp_path / "merged" / path).is_dir() for path in listed)
    again = load(tmp_path / "merged")
    assert (again.module, settings(again.files)) == (model.module, settings(model.files))
    np.testing.assert_allclose(embeddings(again), embeddings(small), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softplus"}, "activation_function"),
        ({"activation_function": "my.own.Tanh"}, "activation_function"),
        ({"activation_function": None}, "activation_function"),
        ({"in_features": 12}, "in_features 12, wanted 16"),
        ({"out_features": "5"}, "out_features"),
        ({"module_input_name": "token_embeddings"}, "module_input_name"),
        ({"use_residual": True}, "use_residual true"),
    ],
)
def test_dense_module_that_cannot_be_computed_is_refused_by_name(folder, entries, named):
    files = {"modules.json": modules("Pooling", "Dense"), "1_Pooling__config.json": b"{}"}
    write(folder, **files, **{"2_Dense__config.json": dense(**entries)})
    save_file(
        {"linear.weight": np.ones((5, 16), np.float32), "linear.bias": np.ones(5, np.float32)},
        folder / "2_Dense/model.safetensors",
    )
    with pytest.raises(ValueError, match=f"2_Dense/config.json: got.*{named}"):
        load(folder)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "linear.bias"])
def test_dense_module_without_its_files_is_refused_by_name(folder, missing):
    files = {
        "modules.json": modules("Pooling", "Dense"),
        "1_Pooling__config.json": b"{}",
        "2_Dense__config.json": dense(),
    }
    write(folder, **files)
    tensors = {"linear.weight": np.ones((5, 16), np.float32), "linear.bias": np.ones(5, np.float32)}
    tensors.pop(missing, None)
    save_file(tensors, folder / "2_Dense/model.safetensors")
    (folder / "2_Dense" / missing).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"2_Dense/{missing.replace('.bias', '/bias')}"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (modules("Pooling", "LayerNorm"), "LayerNorm"),
        (modules("Pooling", "Dropout"), "Dropout"),
        (modules("WordWeights", "Pooling"), "WordWeights"),
        (modules("Router"), "Router"),
        (as_json([{"path": "", "type": TYPE + "CLIPModel"}]), "CLIPModel"),
        (as_json([{"path": "", "type": "custom_st.Transformer"}]), "custom_st"),
        (as_json([{"path": "0_Transformer", "type": TYPE + "Transformer"}]), "0_Transformer"),
        (as_json([{"path": "", "type": TYPE + "Transformer"}, {"path": "../x", "type": TYPE + "Pooling"}]), r"\.\./x"),
        (as_json([{"type": TYPE + "Transformer"}]), "'path'"),
        (modules(), "Pooling"),
        (modules("Normalize", "Pooling"), "Pooling"),
        (as_json({"modules": []}), "list"),
        (b"[", "JSON"),
        (b"", "empty"),
    ],
)
def test_other_modules_are_refused_by_name(folder, content, named):
    write(folder, **{"modules.json": content, "1_Pooling__config.json": b"{}"})
    with pytest.raises(ValueError, match=f"modules.json: .*{named}"):
        load(folder)


def test_listed_pooling_that_is_missing_is_refused(folder):
    write(folder, **{"modules.json": modules("Pooling")})
    with pytest.raises(ValueError, match=f"{POOLING}: the file is missing"):
        load(folder)


def test_names_of_newer_releases_are_known():
    new = [("", "base.modules.transformer.Transformer"), ("1_Pooling", "sentence_transformer.modules.pooling.Pooling")]
    listed = as_json([{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in new])
    assert declared_stages({"modules.json": listed, POOLING: b"{}"}) == (Pooling(),)


def test_files_that_declare_another_embedding_than_the_module_has_are_not_saved(tmp_path):
    model = tiny.model()
    for files in (tiny.FILES, model.files | {POOLING: as_json({"pooling_mode": "cls"})}):
        with pytest.raises(ValueError, match="wanted what declares the module's stages"):
            save(model._replace(files=files), tmp_path / "model")
    with pytest.raises(ValueError, match=r"modules\.json"):
        save(tiny.model(CLASSIFIER)._replace(files=model.files), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_new_head_takes_the_place_of_all_that_follows_the_encoder(tmp_path):
    model = tiny.model()
    stages = (*model.module.stages, Projection("3_Dense", 16, features=5, use_bias=False, activation="Tanh"))
    factors = {"left": np.ones((16, 2), np.float32), "right": np.ones((2, 5), np.float32)}
    params = model.params | {"3_Dense": {"linear": {"kernel": bert_adapter.FACTORISED, **factors}}}
    low_rank = {"low_rank": {"schema": 1, "ranks": {"3_Dense/linear": 2}}}
    told = {"sentence_bert_config.json": as_json({"max_seq_length": 8})}
    embedder = model._replace(
        module=model.module.clone(stages=stages),
        params=params,
        config=model.config | low_rank,
        files=model.files | told,
    )
    headed = with_head(embedder, 3)
    save(headed, tmp_path / "headed")
    assert load(tmp_path / "headed").files == tiny.FILES | told
    assert headed.params.keys() == {"bert", "classifier"}


def test_classifier_beside_modules_is_read_as_transformers_does(classifier):
    write(classifier, **{"modules.json": modules("Pooling"), "1_Pooling__config.json": b"{}"})
    with pytest.warns(UserWarning, match=r"modules\.json is left out"):
        assert load(classifier).files == tiny.FILES


def test_a_cross_encoder_of_sentence_transformers_is_read_as_the_classifier_that_it_is(classifier, tmp_path):
    reads = {"text": {"method": "forward", "method_output_name": "logits"}}
    entries = {"transformer_task": "sequence-classification", "modality_config": reads, "module_output_name": "scores"}
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    listed = {"modules.json": as_json([{"idx": 0, "name": "0", "path": "", "type": kind}])}
    write(classifier, **listed, **{"sentence_bert_config.json": as_json(entries)})
    model = load(classifier)
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").files == model.files
    files = {"modules.json": modules("Pooling"), "1_Pooling/config.json": b"{}"}
    with pytest.raises(ValueError, match="modality_config"):
        settings({**files, "sentence_bert_config.json": as_json({"modality_config": reads})})


SIGMOID, TOLD = "torch.nn.modules.activation.Sigmoid", "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({"sentence_transformers": {"activation_fn": SIGMOID, "version": "5.0"}}, {}),
        ({"sbert_ce_default_activation_function": SIGMOID}, {}),
        ({}, {"activation_fn": SIGMOID, "prompts": {}}),
    ],
)
def test_an_activation_that_is_declared_is_named_and_goes_with_the_head(classifier, config, file):
    edit_config(classifier, num_labels=3, **config)
    write(classifier, **({TOLD: as_json(file)} if file else {}))
    with pytest.warns(
        UserWarning, match=f"(activation_fn|activation_function): {SIGMOID} is not applied, outputs are l"
    ):
        model = load(classifier)
    bare = bert_adapter.without_head(model)
    assert SIGMOID not in json.dumps(bare.config)
    assert SIGMOID.encode() not in bare.files.get(TOLD, b"")
    assert settings(bare.files) == settings(model.files)


def test_the_identity_is_no_activation(classifier):
    edit_config(classifier, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    assert load(classifier).config["architectures"] == [CLASSIFIER]


def test_an_encoder_in_a_folder_is_refused_from_without_and_from_within(declared):
    inner = declared / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        (declared / name).rename(inner / name)
    listed = json.loads((declared / "modules.json").read_text())
    listed[0]["path"] = inner.name
    write(declared, **{"modules.json": as_json(listed)})
    for place in (declared, inner):
        with pytest.raises(ValueError, match=r"modules\.json lists: `python -c .*SentenceTransformer\("):
            load(place)


def test_what_lies_beside_a_directory_is_not_its_own(folder):
    (folder.parent / "modules.json").write_text("no JSON of anybody's")
    assert load(folder).config["architectures"] == [EMBEDDER]


def test_a_pooling_without_modules_is_listed_in_what_is_saved(folder, tmp_path):
    write(folder, **{"1_Pooling__config.json": as_json({"pooling_mode": "cls"})})
    model = load(folder)
    save(model, tmp_path / "again")
    listed = json.loads((tmp_path / "again/modules.json").read_text())
    assert [(entry["idx"], entry["path"]) for entry in listed] == [(0, ""), (1, "1_Pooling")]
    assert load(tmp_path / "again").module == model.module


def test_tags_of_words_are_no_labels_of_texts(classifier):
    edit_config(classifier, id2label={"0": "O", "1": "B-PER", "2": "I-PER"}, remove=("architectures",))
    with pytest.raises(ValueError, match=r"no 'architectures' and tags of words.*BertForTokenClassification"):
        load(classifier)


# How texts are read.


def with_files(**files):
    return tiny.model()._replace(files=tiny.model().files | {name.replace("__", "/"): files[name] for name in files})


def test_declared_lengths_are_honoured():
    text = ["fox " * 30]
    said = {"tokenizer_config.json": as_json({"tokenizer_class": "BertTokenizer", "model_max_length": 5})}
    for files in (
        said | {"sentence_bert_config.json": as_json({"max_seq_length": 7})},  # the length of the embedder counts
        {"tokenizer_config.json": as_json({"tokenizer_class": "BertTokenizer", "model_max_length": 7})},
    ):
        assert tokenizer(with_files(**files))(text)["input_ids"].shape == (1, 7)
    assert tokenizer(with_files(**files), max_length=5)(text)["input_ids"].shape == (1, 5)


@pytest.mark.parametrize(("length", "named"), [(0, "positive"), ("7", "positive"), (7.5, "positive")])
def test_lengths_that_cannot_be_are_refused(folder, length, named):
    write(folder, **{"sentence_bert_config.json": as_json({"max_seq_length": length})})
    with pytest.raises(ValueError, match=f"sentence_bert_config.json: got max_seq_length.*{named}"):
        load(folder)


def test_lengths_beyond_the_positions_are_cut_with_a_warning(folder):
    write(folder, **{"sentence_bert_config.json": as_json({"max_seq_length": 21})})
    with pytest.warns(UserWarning, match="got max_seq_length 21: texts are cut to 20 tokens"):
        model = load(folder)
    assert tokenizer(model)(["fox " * 30])["input_ids"].shape == (1, 20)


@pytest.mark.parametrize("longest", ["Infinity", "1e400", "1e30"])
def test_a_length_without_end_is_no_limit(longest):
    content = f'{{"tokenizer_class": "BertTokenizer", "model_max_length": {longest}}}'.encode()
    assert tokenizer(with_files(**{"tokenizer_config.json": content}))(["fox " * 30])["input_ids"].shape == (1, 20)


def test_lower_case_is_done_by_the_tokenizer():
    cased = {"tokenizer_config.json": as_json({"tokenizer_class": "BertTokenizer", "do_lower_case": False})}
    lower = {"sentence_bert_config.json": as_json({"do_lower_case": True})}
    ids = [
        tokenizer(with_files(**files))(["A RED fox"])["input_ids"][0, :5].tolist() for files in (cased, cased | lower)
    ]
    assert ids == [[2, 1, 1, 7, 3], [2, 5, 6, 7, 3]]
    encode = tokenizer_of(with_files(**cased, **lower))
    assert encode.backend_tokenizer.normalizer.normalize_str("É") == "é"  # of a tokenizer that keeps accents


@pytest.mark.parametrize("name", OLDER_SETTINGS)
def test_settings_of_older_names_are_honoured_and_saved(folder, name, tmp_path):
    write(folder, **{name: as_json({"max_seq_length": 8})})
    assert settings(load(folder).files).longest == 8
    save(load(folder), tmp_path / "again")
    assert settings(load(tmp_path / "again").files).longest == 8
    write(folder, **{"sentence_bert_config.json": as_json({"max_seq_length": 9})})  # the newest counts
    assert settings(load(folder).files).longest == 9


def test_normalisation_of_something_else_is_refused(folder):
    files = {"modules.json": modules("Pooling", "Normalize"), "1_Pooling__config.json": b"{}"}
    write(folder, **files, **{"2_Normalize__config.json": as_json({"module_input_name": "token_embeddings"})})
    with pytest.raises(ValueError, match=r"2_Normalize/config\.json: got module_input_name"):
        load(folder)


def test_default_prompt_is_put_before_every_text():
    said = {"prompts": {"query": "a red ", "none": ""}, "default_prompt_name": "query"}
    encode = tokenizer(with_files(**{"config_sentence_transformers.json": as_json(said)}))
    wanted = tokenizer(tiny.model())(["a red fox", "a red dog runs"])
    np.testing.assert_array_equal(encode(["fox", "dog runs"])["input_ids"], wanted["input_ids"])
    np.testing.assert_array_equal(encode("fox")["input_ids"], wanted["input_ids"][:1])
    with pytest.raises(ValueError, match="texts: got none"):
        encode([])


def test_a_prompt_is_put_before_every_text_by_its_name():
    said = {"prompts": {"query": "a red ", "none": ""}, "default_prompt_name": "query"}
    model = with_files(**{"config_sentence_transformers.json": as_json(said)})
    plain, prompted = (tokenizer(one, prompt_name=name) for one, name in ((tiny.model(), None), (model, "none")))
    np.testing.assert_array_equal(plain(["fox"])["input_ids"], prompted(["fox"])["input_ids"])
    got = embed(model, ["a red fox"], prompt_name="none", progress=False)
    np.testing.assert_array_equal(got, embed(model, ["fox"], progress=False))
    with pytest.raises(ValueError, match="prompt_name: got 'passage', wanted one of 'query', 'none'"):
        tokenizer(model, prompt_name="passage")
    with pytest.raises(ValueError, match=r"prompt_name: got 'query', wanted none: .*\.json has no prompts"):
        tokenizer(tiny.model(), prompt_name="query")


def test_default_prompt_leaves_room_for_the_texts():
    said = {"prompts": {"query": "a red "}, "default_prompt_name": "query"}
    model = with_files(**{"config_sentence_transformers.json": as_json(said)})
    with pytest.raises(ValueError, match=r"wanted at least 5 for a text: 2 .*, 2 are the default prompt"):
        tokenizer(model, max_length=4)
    assert tokenizer(model, max_length=5)("fox")["attention_mask"].sum() == 5
    with pytest.raises(ValueError, match=r"wanted at least 7 for a pair of texts: 3 .*, 2 are the default"):
        tokenizer(model, max_length=6)([("fox", "dog")])


def test_a_prompt_is_put_before_the_first_text_of_a_pair():
    said = {"prompts": {"query": "a red "}, "default_prompt_name": "query"}
    model = with_files(**{"config_sentence_transformers.json": as_json(said)})
    got, wanted = tokenizer(model)([("fox", "it runs")]), tokenizer(tiny.model())([("a red fox", "it runs")])
    np.testing.assert_array_equal(got["input_ids"], wanted["input_ids"])


def test_padding_on_the_left_is_on_the_right_here_and_in_exports(folder, tmp_path):
    known = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, **{"tokenizer_config.json": as_json(known | {"padding_side": "left"})})
    model, texts = load(folder), ["a dog", "a red fox runs far"]
    with pytest.warns(UserWarning, match="got padding_side 'left', texts are padded on the right"):
        ours = bert_adapter.tokenizer(model)(texts)
    with pytest.warns(UserWarning, match="got padding_side 'left'"):
        bert_adapter.export(model, tmp_path / "out", to="transformers-dense")
    assert ours["attention_mask"][0][0] == 1
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["padding_side"] == "right"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config_sentence_transformers.json", {"default_prompt_name": "query", "prompts": {}}, "default_prompt_name"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task"),
        ("sentence_bert_config.json", {"module_output_name": "image_embeds"}, "module_output_name"),
        ("sentence_bert_config.json", {"model_args": {"torch_dtype": "float16"}}, "model_args"),
        ("sentence_bert_config.json", {"tokenizer_args": {"padding_side": "left"}}, "tokenizer_args"),
        ("sentence_bert_config.json", {"model_kwargs": {"torch_dtype": "float16"}}, "model_kwargs"),
        ("sentence_bert_config.json", {"config_kwargs": {"num_hidden_layers": 1}}, "config_kwargs"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method": "forward"}}}, "modality_config"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim 8"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, r"prompts \["),
        ("config_sentence_transformers.json", {"similarity_fn_name": ["dot"]}, "similarity_fn_name"),
    ],
)
def test_declarations_of_texts_that_cannot_be_honoured_are_refused(folder, name, content, named):
    write(folder, **{name: as_json(content)})
    with pytest.raises(ValueError, match=f"{name}: got {named}"):
        load(folder)


def test_prompt_that_is_left_out_of_the_pooling_is_refused():
    files = {POOLING: as_json({"include_prompt": False})}
    files |= {"config_sentence_transformers.json": as_json({"default_prompt_name": "q", "prompts": {"q": "find: "}})}
    with pytest.raises(ValueError, match=f"{POOLING}: got include_prompt false"):
        declared_stages(files)


def test_pairs_are_compared_as_declared():
    a, b = np.array([[3.0, 4], [0, 0]]), np.array([[0, 2.0], [1, 1]])
    for kind, wanted in ((None, [0.8, 0]), ("cosine", [0.8, 0]), ("dot", [8, 0])):
        model = with_files(**{"config_sentence_transformers.json": as_json({"similarity_fn_name": kind})})
        np.testing.assert_allclose(similarity_of(settings(model.files).similarity)(a, b), wanted, rtol=1e-15)
    model = with_files(**{"config_sentence_transformers.json": as_json({"similarity_fn_name": "euclidean"})})
    with pytest.raises(ValueError, match="similarity_fn_name 'euclidean', supported"):
        score(model, LabelledTexts([("a dog", "it")], np.array([1.0])))


def test_nothing_is_declared_by_what_all_models_have():
    told = {"__version__": {"pytorch": "1.8.1"}, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": None}
    files = {"sentence_bert_config.json": as_json({"max_seq_length": 256, "do_lower_case": False})}
    assert settings(files | {"config_sentence_transformers.json": as_json(told)}) == Settings(longest=256)


def test_special_tokens_beyond_the_table_are_refused():
    content = json.loads(tokenizer_of(tiny.model()).backend_tokenizer.to_str())
    content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [102]
    kind = as_json({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"knows 103 tokens, the last of them .*, and the model has embeddings of 20"):
        tokenizer(with_files(**{"tokenizer.json": as_json(content), "tokenizer_config.json": kind}))


def test_a_vocabulary_without_a_token_for_the_unknown_is_refused():
    words = [word if word != "[UNK]" else "<unk>" for word in tiny.WORDS]
    with pytest.raises(ValueError, match=r"no token '\[UNK\]' in its vocabulary, wanted one for unknown words"):
        tokenizer(with_files(**{"vocab.txt": "\n".join(words).encode()}))


def test_tokenizer_that_knows_more_tokens_than_the_table_has_rows_is_refused():
    model = with_files(**{"vocab.txt": "\n".join([*tiny.WORDS, *"bcdefg"]).encode()})
    with pytest.raises(ValueError, match="knows 21 tokens, the last of them 'g', and the model has embeddings of 20"):
        tokenizer(model)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors", "modules.json", "sentence_bert_config.json", POOLING),
        *("adapter_config.json", "tokenizer_config.json", "vocab.txt"),
    ],
)
def test_a_link_to_nothing_is_no_missing_file(declared, name):
    (declared / name).unlink(missing_ok=True)
    (declared / name).symlink_to("/nowhere/blob")
    with pytest.raises(ValueError, match=f"{name}: got a link to /nowhere/blob, which is not there"):
        load(declared)


def with_tokenizer(name, content):
    files = tiny.model().files
    entries = json.loads(files["tokenizer_config.json"]) | content if name == "tokenizer_config.json" else content
    return tiny.model()._replace(files=files | {name: as_json(entries)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"model_input_names": ["input_ids"]}, "got model_input_names .*'attention_mask'"),
        ("tokenizer_config.json", {"model_input_names": "input_ids"}, "got model_input_names .*, wanted a list"),
        ("tokenizer_config.json", {"model_max_length": 8.5}, "got model_max_length 8.5, wanted a positive integer"),
        ("tokenizer_config.json", {"model_max_length": "8"}, "got model_max_length '8', wanted a positive integer"),
        ("tokenizer_config.json", {"tokenizer_class": ["BertTokenizer"]}, "tokenizer: transformers cannot make one"),
        ("tokenizer.json", {}, "tokenizer: transformers cannot make one of tokenizer.json.*vocab.txt"),
    ],
)
def test_tokenizers_that_cannot_be_are_refused_in_a_sentence(name, content, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(with_tokenizer(name, content))


def test_a_length_that_is_whole_is_a_length():
    assert tokenizer(with_tokenizer("tokenizer_config.json", {"model_max_length": 8.0}))("a dog " * 9)[
        "input_ids"
    ].shape == (1, 8)


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    with pytest.raises(ValueError, match="tokenizer: transformers cannot make one"):
        tokenizer(with_tokenizer("tokenizer_config.json", code))


def test_tokenizer_without_a_token_for_padding_is_refused():
    said = as_json({"tokenizer_class": "PreTrainedTokenizerFast"})
    words = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    model = with_files(**{"tokenizer_config.json": said, "tokenizer.json": as_json(words)})
    with pytest.raises(ValueError, match="pad_token"):
        tokenizer(model)


# config.json.


def test_labels_are_counted_as_transformers_counts_them():
    names = {str(i): f"L{i}" for i in range(3)}
    for entries in ({"id2label": names}, {"num_labels": 2, "id2label": names}, {"num_labels": None, "id2label": names}):
        assert config_from_dict(CONFIG | entries).num_labels == 3
    for entries in (
        {"num_labels": 3},
        {"_num_labels": 3},
        {"num_labels": 3, "_num_labels": 2},
        {"_num_labels": 3, "id2label": None},
    ):
        assert config_from_dict(CONFIG | entries).num_labels == 3


@pytest.mark.parametrize("entries", [{"num_labels": 2, "id2label": {"0": "a", "1": "b", "2": "c"}}, {"_num_labels": 3}])
def test_classifier_loads_with_labels_counted_so(classifier, entries):
    edit_config(classifier, remove={"num_labels"} - entries.keys(), **entries)
    assert load(classifier).module.config.num_labels == 3


@pytest.mark.parametrize(("named", "remove"), [(None, ()), ([], ()), (None, ("architectures",))])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_without_architectures_the_weights_say_what_the_model_is(originals, tmp_path, named, remove, architecture):
    path = copied(originals[1 if architecture == EMBEDDER else 2], tmp_path)
    edit_config(path, remove, architectures=named)
    assert load(path).config["architectures"] == [architecture]


def test_pretraining_weights_without_architectures_are_an_encoders(folder):
    edit_config(folder, architectures=None)
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"cls.predictions.bias": np.ones(20, np.float32)}, folder / "model.safetensors")
    assert load(folder).config["architectures"] == [EMBEDDER]


NULLS = ["position_embedding_type", "is_decoder", "classifier_dropout", "pruned_heads", "auto_map", "problem_type"]


@pytest.mark.parametrize("entry", [*NULLS, "quantization_config", "model_type"])
def test_null_is_a_missing_entry(entry):
    assert module_for(CONFIG | {entry: None}) == module_for(CONFIG)


@pytest.mark.parametrize("entry", ["layer_norm_eps", "type_vocab_size", "hidden_act"])
def test_null_that_transformers_cannot_use_is_a_missing_entry_and_a_warning(entry):
    with pytest.warns(UserWarning, match=f"{entry}: null"):
        assert module_for(CONFIG | {entry: None}) == module_for(CONFIG)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("problem_type", "ranking"),
        ("hidden_size", "16"),
        ("hidden_size", 16.0),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", float("nan")),
        ("hidden_dropout_prob", 1.5),
        ("hidden_act", ["gelu"]),
        ("id2label", ["a", "b"]),
        ("id2label", {"no": 0, "yes": 1}),
        ("label2id", {"0": "no", "1": "yes"}),
        ("is_decoder", True),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key_query"),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("auto_map", {"AutoModel": "modeling.MyBert"}),
        ("model_type", ["bert"]),
        ("architectures", [["BertModel"]]),
        ("architectures", {"BertModel": 1}),
        ("vocab_size", 10**30),
        ("low_rank", [1]),
        ("low_rank", {"schema": 1, "ranks": {QUERY: 2.5}}),
    ],
)
def test_entries_that_cannot_be_are_refused_by_name(folder, entry, value):
    edit_config(folder, **{entry: value})
    with pytest.raises(ValueError, match=f"{entry}.*: got .*(supported|wanted)"):
        load(folder)


def test_single_label_of_one_class_is_refused(classifier):
    edit_config(classifier, num_labels=1, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="num_labels: got 1 with problem_type"):
        load(classifier)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vocab.txt", "modules.json", POOLING])
def test_byte_order_mark_is_no_content(declared, name):
    (declared / name).write_bytes(b"\xef\xbb\xbf" + (declared / name).read_bytes())
    model = load(declared)
    assert (model.files, model.config, model.module) == (tiny.model().files, tiny.model().config, tiny.model().module)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json", POOLING])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b'{"a": ', "wanted JSON"),
        (b"3", "got int, wanted"),
        (b'{"\xff": 1}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (POINTER, "pointer of Git LFS"),
    ],
)
def test_files_that_hold_no_json_are_refused_by_name(declared, name, content, named):
    (declared / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*: .*{named}"):
        load(declared)


@pytest.mark.parametrize("content", [b"", POINTER, b"a\xff"])
def test_vocabulary_that_is_no_text_is_refused(folder, content):
    (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab\.txt: "):
        load(folder)


def test_directory_without_config_says_what_it_holds(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"got \['model.safetensors', .*wanted config.json"):
        load(folder)


def test_adapter_is_to_be_merged_first(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json.*merge_and_unload"):
        load(folder)


# Weights.


@pytest.mark.parametrize("layout", ["tf", "flax", "mlx", "jax"])
@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/model.safetensors"])
def test_weights_in_another_frameworks_layout_are_refused(folder, layout, name):
    files = {"modules.json": modules("Pooling", "Dense"), "1_Pooling__config.json": b"{}"}
    write(folder, **files, **{"2_Dense__config.json": dense(out_features=16)})
    square = {"linear.weight": np.ones((16, 16), np.float32), "linear.bias": np.ones(16, np.float32)}
    save_file(square, folder / "2_Dense/model.safetensors")
    load(folder)
    save_file(load_file(folder / name), folder / name, metadata={"format": layout})
    with pytest.raises(ValueError, match=f"{name}: got the layout '{layout}'"):
        load(folder)


def test_flax_names_without_metadata_are_refused(folder):
    """A square kernel (in, out) would be transposed, and nobody would see it."""
    tensors = load_file(folder / "model.safetensors")
    name = f"{QUERY.replace('/', '.')}.weight"
    tensors[name.replace("weight", "kernel")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"query\.kernel: got a name of Flax's"):
        load(folder)


def test_parameter_that_is_there_twice_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"embeddings.LayerNorm.gamma": np.ones(16, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="embeddings/LayerNorm/scale"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
@pytest.mark.parametrize(("content", "named"), [(b"", "empty"), (POINTER, "Git LFS"), (None, "wanted a whole")])
def test_weights_that_are_empty_pointers_or_cut_short_are_refused_by_name(folder, name, content, named):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(whole[:-9] if content is None else content)
    with pytest.raises(ValueError, match=f"{re.escape(name)}: .*{named}"):
        load(folder)


def shard(folder):
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return names


def test_shard_that_is_missing_or_incomplete_is_refused_by_name(folder):
    names = shard(folder)
    first = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, first)
    with pytest.raises(ValueError, match=f"index.json: wanted '{next(iter(tensors))}' in {first.name}"):
        load(folder)
    first.unlink()
    with pytest.raises(ValueError, match=f"index.json: got .*wanted {first.name} too"):
        load(folder)
    for content in (
        {"weight_map": [1]},
        {"weight_map": {}},
        {},
        {"weight_map": dict.fromkeys(names, "../model.safetensors")},
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"index\.json: (wanted 'weight_map'|got )"):
            load(folder)


def test_pickled_weights_are_refused_with_the_call_that_converts_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*transformers\.BertModel\.from_pretrained"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_parameter(folder, tmp_path, value, dtype):
    save(tiny.cast(load(folder), dtype), tmp_path / "cast")
    tensors = load_file(tmp_path / "cast/model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][3] = value
    save_file(tensors, tmp_path / "cast/model.safetensors")
    with pytest.raises(
        ValueError, match=r"encoder/layer/0/output/dense/bias: got \(16,\) with 1 values NaN or infinite"
    ):
        load(tmp_path / "cast")


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny.model()
    params = model.params | {
        "pooler": {"dense": {"kernel": np.full((16, 16), np.nan, np.float32), "bias": np.ones(16)}}
    }
    with pytest.raises(ValueError, match=r"pooler/dense/kernel: got .*256 values NaN"):
        save(model._replace(params=params), tmp_path / "model")


def test_numbers_of_eight_bits_are_refused_by_name(folder):
    tensors = load_file(folder / "model.safetensors")
    fp8 = {
        name: tensor.astype(jnp.float8_e4m3fn) if "query.weight" in name else tensor for name, tensor in tensors.items()
    }
    save_file(fp8, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"got F8_E4M3 in 'encoder\.layer\.0\.attention\.self\.query\.weight'"):
        load(folder)


# Factors, and libraries that know none.


def factorised(folder):
    model = tiny.with_factors(tiny.model(), {QUERY: 2})
    save(model, folder / "small")
    return model


def test_factors_are_in_a_file_that_other_libraries_do_not_find(tmp_path):
    model = factorised(tmp_path)
    assert not [*(tmp_path / "small").rglob("model*.safetensors"), *(tmp_path / "small").glob("*model*.bin")]
    np.testing.assert_array_equal(at(load(tmp_path / "small").params, QUERY)["left"], at(model.params, QUERY)["left"])


def opened(folder):
    """transformers' model in a directory, whichever framework it finds."""
    transformers: Any = pytest.importorskip("transformers")
    if not (flax := hasattr(transformers, "FlaxAutoModel")):
        pytest.importorskip("torch")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return getattr(transformers, "FlaxAutoModel" if flax else "AutoModel").from_pretrained(folder)


def test_transformers_does_not_open_a_factorised_directory(tmp_path):
    """As a BertModel it would: with random kernels in place of the factors, and no more than a warning."""
    factorised(tmp_path)
    with pytest.raises(ValueError, match="low_rank_bert"):
        opened(tmp_path / "small")
    edit_config(tmp_path / "small", model_type="bert")
    with pytest.raises(OSError, match="no file named"):
        opened(tmp_path / "small")
    (tmp_path / "small/factorised.safetensors").rename(tmp_path / "small/model.safetensors")
    assert type(opened(tmp_path / "small")).__name__.endswith("BertModel")


def test_factors_without_ranks_and_ranks_without_factors_are_refused(tmp_path):
    factorised(tmp_path)
    edit_config(tmp_path / "small", remove=("low_rank",))
    with pytest.raises(ValueError, match=r"factorised\.safetensors.*wanted model\.safetensors"):
        load(tmp_path / "small")
    save(tiny.model(), tmp_path / "dense")
    edit_config(tmp_path / "dense", low_rank={"schema": 1, "ranks": {QUERY: 2}})
    with pytest.raises(ValueError, match=r"wanted factorised\.safetensors"):
        load(tmp_path / "dense")
