"""Every family computes what transformers' PyTorch model computes, from its files, old and odd ones among them."""

import functools
import json
import os
import pickle
import re
import shlex
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

import bert_adapter
from bert_adapter import FAMILIES, load, save
from bert_adapter.checkpoint.names import by_path
from bert_adapter.checkpoint.weights import conversion, named
from bert_adapter.families import distilbert, electra, modernbert, module_for, mpnet, roberta
from bert_adapter.families.bert import Bert
from bert_adapter.model import Model

WIDE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
ROBERTA = WIDE | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
DISTILBERT = {
    "vocab_size": 20,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
    "activation": "relu",
}
MPNET = WIDE | {"pad_token_id": 1, "layer_norm_eps": 1e-5, "hidden_act": "relu"}
MODERN = WIDE | {"pad_token_id": 0, "local_attention": 4}  # the second layer sees two tokens to both sides
BIASED = {f"{name}_bias": True for name in ("attention", "mlp", "norm", "classifier")}
OTHER = {"classifier_pooling": "mean", "classifier_activation": "relu", "hidden_activation": "gelu_new"}
OTHER |= {"decoder_bias": False}
TURNED = {"global_rope_theta": 500.0, "local_rope_theta": 20.0, "global_attn_every_n_layers": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("bert", WIDE),
    "BERT of one type": ("bert", WIDE | {"type_vocab_size": 1}),
    "RoBERTa": ("roberta", ROBERTA),
    "RoBERTa of two types": ("roberta", ROBERTA | {"type_vocab_size": 2, "pad_token_id": 4}),
    "CamemBERT": ("camembert", ROBERTA),
    "XLM-RoBERTa": ("xlm-roberta", ROBERTA),
    "DistilBERT": ("distilbert", DISTILBERT),
    "DistilBERT of sinusoids": ("distilbert", DISTILBERT | {"sinusoidal_pos_embds": True}),
    "ELECTRA": ("electra", WIDE | {"embedding_size": 8}),
    "ELECTRA without projection": ("electra", WIDE | {"embedding_size": 16}),
    "MPNet": ("mpnet", MPNET),
    "ModernBERT": ("modernbert", MODERN),
    "ModernBERT of biases and means": ("modernbert", MODERN | BIASED | OTHER | TURNED),
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch uses it, to open ModernBERT
OLD = ["BERT", "RoBERTa", "DistilBERT", "ELECTRA", "MPNet"]
DISTINCT = [*OLD, "ModernBERT"]  # whose arithmetic or names differ
ENCODERS = {
    "bert": Bert,
    "distilbert": distilbert.DistilBert,
    "electra": electra.Electra,
    "mpnet": mpnet.MpnetEncoder,
    "modernbert": modernbert.ModernBert,
}
MASK = np.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 3 + [1] * 5], np.int32)  # whole, padded on the right, on the left
FIVE = int(version("transformers").split(".")[0]) >= 5
WORDS = np.array([[2, 5, 6, 7, 9, 10, 13, 3], [2, 8, 9, 11, 3, 0, 0, 0], [0, 0, 0, 2, 7, 0, 9, 3]], np.int32)


@functools.cache
def model_of(case, classifier=False, **entries) -> Model:
    name, known = CASES[case]
    family = FAMILIES[name]
    architecture = family.classifier if classifier else family.embedder
    config = {"model_type": name, "architectures": [architecture.names[0]], **known, **entries}
    module = module_for(config)
    return Model(module, tiny.random_params(module, size=0.3), config, {})


def batch_of(case, *more) -> dict[str, Any]:
    """Ids and mask, and other inputs of these names. Padding has its id in hidden places, and in one that is seen."""
    config = model_of(case).config
    types = np.array([[0] * 4 + [1] * 4, [0] * 8, [0, 1] * 4], np.int32) % config.get("type_vocab_size", 2)
    local = config.get("local_attention") if FIVE else None
    known = {
        "input_ids": np.where(WORDS == 0, config.get("pad_token_id", 0), WORDS),
        "attention_mask": MASK if local is None else near_some(MASK, local // 2),
        "token_type_ids": types,
        "position_ids": np.array([np.arange(8)[::-1], np.arange(8) + 5, np.full(8, 3)], np.int32),
    }
    return {name: known[name] for name in ("input_ids", "attention_mask", *more)}


def near_some(mask, reach):
    """The mask, with those seen that no token is near which is seen: versions differ in what these are a mix of."""
    near = [[row[max(0, i - reach) : i + reach + 1].any() for i, _ in enumerate(row)] for row in mask]
    return np.where(near, mask, 1)


def output_of(model, **batch) -> Any:
    return model.module.apply({"params": model.params}, **batch)


def states_of(model, **batch) -> Any:
    encoder = ENCODERS.get(model.config["model_type"], roberta.Roberta)
    module = encoder(model.module.config, add_pooling_layer="pooler" in model.params)
    return module.apply({"params": model.params}, **batch)


def assert_same(got, wanted):
    assert (got.module, got.config, got.files) == (wanted.module, wanted.config, wanted.files)
    assert_same_params(got.params, wanted.params)


def assert_same_params(got, wanted):
    ours, theirs = by_path(got), by_path(wanted)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype, path
        assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(theirs[path]).tobytes(), path


# transformers' models.


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(case, classifier) -> transformers' PyTorch model in what `save` writes, and where that is."""
    pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")

    @functools.cache
    def read(case, classifier=False):
        model, directory = model_of(case, classifier, num_labels=3), tmp_path_factory.mktemp("saved") / "model"
        save(model, directory)
        kind = getattr(transformers, model.config["architectures"][0])
        found, notes = kind.from_pretrained(directory, output_loading_info=True)
        assert not any(notes.values()), notes
        return found.eval(), directory

    return read


def run_torch(model, batch, **options):
    torch: Any = pytest.importorskip("torch")
    with torch.no_grad():
        return model(**{name: torch.tensor(array).long() for name, array in batch.items()}, **options)


@pytest.mark.parametrize(
    "more", [(), ("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")], ids=" ".join
)
@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state_is_that_of_pytorch(opened, case, more):
    model, batch = model_of(case, num_labels=3), batch_of(case, *more)
    if unknown := set(more) - set(FAMILIES[model.config["model_type"]].inputs):
        with pytest.raises(ValueError, match=f"({'|'.join(unknown)}): got some, wanted none"):
            output_of(model, **batch)
        return
    wanted = run_torch(opened(case)[0], batch, output_hidden_states=True)
    got = states_of(model, **batch)
    assert len(got.hidden_states) == len(wanted.hidden_states) == 3
    states = (*wanted.hidden_states[:-1], wanted.last_hidden_state)  # of ModernBERT, the last is normalised
    for ours, theirs in zip(got.hidden_states, states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # float32 sums of 16 numbers of about 1
    if (pooled := getattr(wanted, "pooler_output", None)) is not None:
        np.testing.assert_allclose(got.pooler_output, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pytorch(opened, case):
    model, batch = model_of(case, classifier=True, num_labels=3), batch_of(case)
    got = output_of(model, **batch)
    wanted = run_torch(opened(case, classifier=True)[0], batch).logits
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classifier", [False, True], ids=["embedder", "classifier"])
@pytest.mark.parametrize("case", CASES)
def test_what_pytorch_saves_loads_bit_for_bit(opened, tmp_path, case, classifier):
    """And it opens what `save` writes without a parameter that is missing or left over, or `opened` fails."""
    opened(case, classifier)[0].save_pretrained(tmp_path / "again")
    assert_same_params(load(tmp_path / "again").params, model_of(case, classifier, num_labels=3).params)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("BERT", "BertForPreTraining"),
        ("RoBERTa", "RobertaForMaskedLM"),
        ("CamemBERT", "CamembertForMaskedLM"),
        ("XLM-RoBERTa", "XLMRobertaForMaskedLM"),
        ("DistilBERT", "DistilBertForMaskedLM"),
        ("ELECTRA", "ElectraForMaskedLM"),
        ("ELECTRA", "ElectraForPreTraining"),
    ],
)
def test_pretraining_models_of_pytorch_hold_their_encoder(tmp_path, case, kind):
    """The decoder is tied to the embeddings, and so is in no file."""
    pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    name, entries = CASES[case]
    full = getattr(transformers, kind)(transformers.AutoConfig.for_model(name, **entries)).eval()
    full.save_pretrained(tmp_path / "model")
    model = bert_adapter.without_head(load(tmp_path / "model"))
    assert model.config["architectures"] == [FAMILIES[name].embedder.names[0]]
    wanted = run_torch(full.base_model, batch_of(case)).last_hidden_state
    np.testing.assert_allclose(states_of(model, **batch_of(case)).last_hidden_state, wanted, rtol=0, atol=1e-5)


HEADED = [(case, head) for case, (name, _) in CASES.items() if name != "bert" for head in FAMILIES[name].heads]


@pytest.mark.parametrize(("case", "head"), HEADED)  # BERT's are in test_heads
def test_other_heads_are_those_of_pytorch(tmp_path, case, head):
    """Of what each saves, opened by the other."""
    torch = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    name, entries = CASES[case]
    kind = getattr(transformers, FAMILIES[name].heads[head].names[0])
    labels = {"num_labels": 2 if head == "answer" else 3}
    theirs = kind(transformers.AutoConfig.for_model(name, **entries, **labels)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model, batch = load(tmp_path / "theirs"), batch_of(case)
    save(model, tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), model)
    again, notes = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(notes.values()), notes
    if head == "choice":
        batch = {input_name: np.stack([array, array[::-1]], axis=1) for input_name, array in batch.items()}
    got = bert_adapter.apply(model.module, model.params, **batch)
    for each in (theirs, again.eval()):
        found = run_torch(each, batch)
        wanted = np.stack([found.start_logits, found.end_logits], -1) if head == "answer" else found.logits.numpy()
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def flax_model(case, classifier) -> Any:
    """transformers' Flax model, or a skip: from version 5 on it has none, and it never had a CamemBERT."""
    transformers: Any = pytest.importorskip("transformers")
    model = model_of(case, classifier)
    name = f"Flax{model.config['architectures'][0]}"
    kind = getattr(transformers, name, None) or pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return kind(kind.config_class(**CASES[case][1]), _do_init=False)


@pytest.mark.parametrize("classifier", [False, True], ids=["embedder", "classifier"])
@pytest.mark.parametrize("case", [case for case in CASES if "of" not in case])
def test_parameter_tree_is_that_of_flax(case, classifier):
    """FlaxDistilBert of sinusoids has no table of them, unlike PyTorch's."""
    theirs = by_path(flax_model(case, classifier).params_shape_tree)
    ours = by_path(model_of(case, classifier).params)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in ours.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in theirs.items()
    }


@pytest.mark.parametrize("case", DISTINCT[1:])  # BERT's are in test_model
def test_states_and_logits_are_those_of_flax(case):
    """Which runs where there is no PyTorch."""
    model, flax = model_of(case, True), flax_model(case, classifier=True)
    batch = batch_of(case, *(["token_type_ids"] if case == "ELECTRA" else []))  # of type 1 by FlaxElectra's default
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted = flax(**batch, params=model.params, output_hidden_states=True)
    got = states_of(model._replace(params=model.params[model.module.prefix]), **batch)
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    logits = output_of(model, **batch)
    np.testing.assert_allclose(logits, wanted.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", DISTINCT)
def test_flax_models_are_taken_as_they_are(monkeypatch, case):
    model, flax = model_of(case), flax_model(case, classifier=False)
    monkeypatch.setattr(flax, "_is_initialized", True)  # without its own parameters, which would take a while
    flax.params = model.params
    taken = bert_adapter.as_model(flax)
    assert taken.module == model.module
    assert_same_params(taken.params, model.params)


# config.json.


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name).to_dict()
    assert FAMILIES[name].config(theirs) == FAMILIES[name].config({})


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_counted_by_their_names_first(name):
    three = {str(i): f"L{i}" for i in range(3)}
    read = FAMILIES[name].config
    for entries in ({"id2label": three}, {"num_labels": 2, "id2label": three}, {"num_labels": 3}, {"_num_labels": 3}):
        assert read(entries).num_labels == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("auto_map", {"AutoModel": "modeling.Mine"}),
        ("problem_type", "ranking"),
        ("vocab_size", "20"),
        ("id2label", ["a", "b"]),
    ],
)
def test_entries_that_cannot_be_are_refused_by_name_in_all_families(name, entry, value):
    with pytest.raises(ValueError, match=f"{entry}: got .*(supported|wanted)"):
        FAMILIES[name].config({entry: value})


@pytest.mark.parametrize(
    ("case", "entries", "said"),
    [
        ("RoBERTa", {"pad_token_id": -1}, "pad_token_id: got -1, wanted an integer from 0"),
        ("RoBERTa", {"pad_token_id": True}, "pad_token_id: got true"),
        ("RoBERTa", {"pad_token_id": 19}, "pad_token_id: got 19, wanted at most 18"),
        ("RoBERTa", {"pad_token_id": 18, "vocab_size": 10}, "pad_token_id: got 18, wanted at most 9"),
        ("DistilBERT", {"n_heads": 3}, "dim: got 16, wanted a multiple of n_heads, 3"),
        ("DistilBERT", {"activation": "silu"}, "activation: got .*'gelu'"),
        ("DistilBERT", {"sinusoidal_pos_embds": "no"}, "sinusoidal_pos_embds: got 'no', supported"),
        ("DistilBERT", {"hidden_size": 32}, "hidden_size: got 32, wanted 16, which another name of it says"),
        ("DistilBERT", {"seq_classif_dropout": 2}, "seq_classif_dropout: got 2, wanted a number from 0 to 1"),
        ("ELECTRA", {"embedding_size": 0}, "embedding_size: got 0, wanted a positive integer"),
    ],
)
def test_entries_of_one_family_that_cannot_be_are_refused_by_name(case, entries, said):
    name, known = CASES[case]
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].config(known | entries)


def test_other_names_of_entries_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    entries: Any = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = transformers.DistilBertConfig(**entries).to_dict()
    assert theirs["dim"] == 32
    assert FAMILIES["distilbert"].config(entries) == FAMILIES["distilbert"].config(theirs)


def test_entry_that_a_family_does_not_use_changes_nothing():
    """The norms of DistilBERT have one epsilon, whatever its config says."""
    read = FAMILIES["distilbert"].config
    assert read(DISTILBERT | {"layer_norm_eps": 0.5, "type_vocab_size": 7}) == read(DISTILBERT)


def test_shared_layers_are_refused_with_the_reason():
    with pytest.raises(
        ValueError,
        match=r"model_type: got 'albert', supported: .*; its layers share one set of .*module, params. of your own",
    ):
        module_for({"model_type": "albert", "architectures": ["AlbertModel"]})


# Inputs.


def test_rows_are_as_long_as_there_are_positions_for_tokens():
    wanted = {"BERT": 20, "RoBERTa": 18, "RoBERTa of two types": 15, "DistilBERT": 20, "ELECTRA": 20}
    wanted |= {"MPNet": 18, "ModernBERT": 20}
    for case, longest in wanted.items():
        model = model_of(case)
        assert FAMILIES[model.config["model_type"]].longest(model.module.config) == longest
        with pytest.raises(ValueError, match=f"got {longest + 1} tokens a row, wanted at most {longest}"):
            jax.eval_shape(model.module.init, jax.random.key(0), np.zeros((1, longest + 1), np.int32))


def test_types_of_a_model_that_has_one_are_zero():
    model, batch = model_of("RoBERTa"), batch_of("RoBERTa")
    with pytest.raises(ValueError, match="token_type_ids: got 1 in row 0, token 0, wanted 0 to 0"):
        bert_adapter.forward(model)(model.params, batch | {"token_type_ids": np.ones((3, 8), np.int32)})


@pytest.mark.parametrize("case", DISTINCT)
def test_tokenizer_gives_what_the_model_takes(case):
    """With a vocabulary that is smaller than the table of embeddings, as where that was padded."""
    if FIVE and case == "ModernBERT":
        pytest.skip("transformers 5 reads its tokenizer from tokenizer.json alone")
    model = model_of(case)._replace(files=tiny.FILES)
    batch = bert_adapter.tokenizer(model)([("a red fox", "a dog")])
    assert model.config["vocab_size"] > len(tiny.WORDS)
    assert ("token_type_ids" in batch) == (case not in ("DistilBERT", "MPNet", "ModernBERT"))
    if case != "RoBERTa":  # which has one type
        assert bert_adapter.apply(model.module, model.params, **batch).shape == (1, 16)


def test_types_that_the_tokenizer_does_not_know_are_left_out():
    told = {"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids", "attention_mask"]}
    files = tiny.FILES | {"tokenizer_config.json": json.dumps(told).encode()}
    batch = bert_adapter.tokenizer(model_of("RoBERTa")._replace(files=files))([("a red fox", "a dog")])
    assert batch.keys() == {"input_ids", "attention_mask"}


# Old and odd checkpoints.


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """(case, classifier) -> a directory that is not to be changed."""

    @functools.cache
    def written(case, classifier=False):
        directory = tmp_path_factory.mktemp("original") / "model"
        save(model_of(case, classifier), directory)
        return directory

    return written


HEADS = {  # names of what pretraining leaves behind, some of them tied
    "BERT": ("cls.predictions.bias", "cls.predictions.decoder.weight", "cls.seq_relationship.weight"),
    "RoBERTa": ("lm_head.bias", "lm_head.layer_norm.weight", "lm_head.decoder.weight"),
    "MPNet": ("lm_head.bias", "lm_head.layer_norm.weight", "lm_head.decoder.weight"),
    "DistilBERT": ("vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.weight"),
    "ELECTRA": (
        "discriminator_predictions.dense.weight",
        "generator_lm_head.weight",
        "generator_predictions.dense.bias",
    ),
}


def rewritten(source, target, change):
    """A copy of a directory whose tensors, by name, are `change` of the source's."""
    target.mkdir()
    for path in source.iterdir():
        if path.name == "model.safetensors":
            save_file(change(load_file(path)), target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def aged(tensors, prefix=""):
    """The names of 2018: norms with gamma and beta. And a table's row numbers among the parameters."""
    old = {}
    for name, tensor in tensors.items():
        if re.search("LayerNorm|layer_norm", name):
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[f"{prefix}{name}"] = tensor
    place = next(name for name in old if name.endswith("embeddings.word_embeddings.weight"))
    return old | {place.replace("word_embeddings.weight", "position_ids"): np.arange(20)[None, :]}


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefixed"])
@pytest.mark.parametrize("case", OLD)
def test_old_names_prefixes_buffers_and_pretraining_heads_are_understood(originals, tmp_path, case, prefixed):
    prefix = FAMILIES[CASES[case][0]].prefix.replace("/", ".") if prefixed else ""
    heads = {name: np.ones((2, 3), np.float32) for name in HEADS[case]} if prefixed else {}
    directory = rewritten(originals(case), tmp_path / "old", lambda tensors: aged(tensors, prefix) | heads)
    assert_same(load(directory), model_of(case))


@pytest.mark.parametrize("case", OLD)
def test_old_classifiers_are_understood(originals, tmp_path, case):
    """RoBERTa's of before 2020 have a pooler, which no output depends on."""
    pooler = {"roberta.pooler.dense.weight": np.ones((16, 16), np.float32)} if case == "RoBERTa" else {}
    directory = rewritten(originals(case, True), tmp_path / "old", lambda tensors: aged(tensors) | pooler)
    assert_same(load(directory), model_of(case, True))


@pytest.mark.parametrize("case", DISTINCT)
def test_layout_of_flax_is_read(originals, tmp_path, case):
    directory = rewritten(originals(case, True), tmp_path / "flax", lambda tensors: tensors)
    (directory / "model.safetensors").unlink()
    (directory / "flax_model.msgpack").write_bytes(msgpack_serialize(model_of(case, True).params))
    assert_same(load(directory), model_of(case, True))


def test_table_of_sinusoids_that_is_in_no_file_is_asked_for(originals, tmp_path):
    """FlaxDistilBert computes it."""

    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if "position_embeddings" not in name}

    directory = rewritten(originals("DistilBERT of sinusoids"), tmp_path / "flax", without)
    with pytest.raises(ValueError, match=r"embeddings/position_embeddings/embedding: got nothing, wanted \(20, 16\)"):
        load(directory)


@pytest.mark.parametrize("case", DISTINCT)
def test_shards_are_one_checkpoint_or_a_refusal(originals, tmp_path, case):
    directory = rewritten(originals(case), tmp_path / "shards", lambda tensors: tensors)
    tensors = load_file(directory / "model.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    first, second = (directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    for file in (first, second):
        save_file({name: tensors[name] for name in tensors if places[name] == file.name}, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "model.safetensors").unlink()
    assert_same(load(directory), model_of(case))
    repeated = next(name for name in places if places[name] == first.name)
    save_file(load_file(second) | {repeated: tensors[repeated]}, second)
    with pytest.raises(ValueError, match=f"{second.name}: got '{repeated}', which another file holds too"):
        load(directory)
    second.unlink()
    with pytest.raises(ValueError, match=f"index.json: got .*wanted {second.name} too"):
        load(directory)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", DISTINCT)
def test_sixteen_bits_come_back_as_they_are(tmp_path, case, dtype):
    model = tiny.cast(model_of(case), dtype)
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("case", CASES)
def test_pickles_are_refused_with_the_command_that_converts_them(originals, tmp_path, case):
    directory = rewritten(originals(case, True), tmp_path / "it's old", lambda tensors: tensors)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    name, place = model_of(case, True).config["architectures"][0], repr(str(directory))
    code = f"import transformers; transformers.{name}.from_pretrained({place}).save_pretrained({place})"
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*wanted model\.safetensors") as error:
        load(directory)
    assert f"`python -c {shlex.quote(code)}` writes model.safetensors" in str(error.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("names", [None, [], "RobertaModel", ["RobertaModel"], ["x; import os"]])
def test_that_command_names_a_class_or_none(names):
    wanted = "RobertaModel" if "RobertaModel" in (names or []) else "AutoModel"
    assert named({"architectures": names}) == wanted


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"num_labels": 2, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "finetuning_task": None}, "AutoModel"),
        ({"num_labels": 3}, "AutoModelForSequenceClassification"),
        ({"_num_labels": 1}, "AutoModelForSequenceClassification"),
        ({"id2label": {"0": "bad", "1": "good"}}, "AutoModelForSequenceClassification"),
        ({"finetuning_task": "sst-2"}, "AutoModelForSequenceClassification"),
    ],
)
def test_that_command_keeps_a_head_of_which_the_config_tells(entries, name):
    assert named(entries) == name


def test_that_command_keeps_what_lies_beside_the_weights_of_a_model_on_the_hub(tmp_path):
    directory = tmp_path / "models--someone--it/snapshots/5f"
    directory.mkdir(parents=True)
    line = conversion(directory, {"architectures": ["BertForMaskedLM"]})
    assert "; transformers.AutoTokenizer.from_pretrained" in line
    code = shlex.split(line)[2]
    assert code.count("from_pretrained('someone/it').save_pretrained('it')") == 2
    (directory / "modules.json").write_text("[]")
    code = "import sentence_transformers; sentence_transformers.SentenceTransformer('someone/it').save('it')"
    assert shlex.split(conversion(directory, {}))[2] == code


def test_that_command_converts(opened, tmp_path):
    torch: Any = pytest.importorskip("torch")
    model, directory = model_of("RoBERTa", True, num_labels=3), tmp_path / "it's old"
    directory.mkdir()
    torch.save(opened("RoBERTa", True)[0].state_dict(), directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps(model.config))
    with pytest.raises(ValueError, match="python -c") as error:
        load(directory)
    line = re.search("`(.*)`", str(error.value))
    assert line
    exec(shlex.split(line[1])[2], {})  # what the shell would give to Python
    assert_same_params(load(directory).params, model.params)


def test_vocabularies_that_are_no_text_are_kept(tmp_path):
    model = model_of("XLM-RoBERTa")._replace(files={"sentencepiece.bpe.model": b"\x0a\xff\x00\xfe"})
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


# The whole way.


def test_head_without_a_pooler_leaves_the_encoders_out(tmp_path):
    """Its factors too."""
    model = model_of("RoBERTa")
    small = tiny.with_factors(model, {"pooler/dense": 2, "encoder/layer/0/output/dense": 3})
    headed = bert_adapter.with_head(small, 3)
    assert headed.config["low_rank"]["ranks"] == {"roberta/encoder/layer/0/output/dense": 3}
    save(headed, tmp_path / "headed")
    assert_same(load(tmp_path / "headed"), headed._replace(params=jax.device_get(headed.params)))


def test_norms_of_a_new_head_begin_with_scale_one():
    headed = bert_adapter.with_head(model_of("ModernBERT"), 3)
    np.testing.assert_array_equal(headed.params["head"]["norm"]["scale"], np.ones(16))


WHOLE_WAY = [  # BERT goes it in many tests
    pytest.param(case, marks=() if case == "RoBERTa" else pytest.mark.slow) for case in DISTINCT[1:]
]


@pytest.mark.parametrize("case", WHOLE_WAY)
def test_family_goes_the_whole_way(tmp_path, case):
    """Half of its encoder's kernels; saved, loaded, and trained for a step."""
    layers: Any = {"n_layers" if case == "DistilBERT" else "num_hidden_layers": 1}
    model, batch = model_of(case, True, **layers), batch_of(case)
    kernels = 4 if case == "ModernBERT" else 6  # whose query, key and value are one, and value and gate
    assert len(bert_adapter.select_kernels(model)) == kernels  # of the layer's, all, and none of the head's
    small, report = bert_adapter.compress(model, [batch], budget=0.5, signal="fwsvd", progress=False)
    before = sum(kernel.parameters_before for kernel in report.kernels)
    assert 0.3 < sum(kernel.parameters_after for kernel in report.kernels) / before <= 0.5
    save(small, tmp_path / "small")
    again = load(tmp_path / "small")
    assert_same(again, small._replace(params=jax.device_get(small.params)))
    labelled = batch | {"labels": np.array([0, 1, 0], np.int32)}
    tuned, losses = bert_adapter.finetune(again, [labelled], epochs=1, learning_rate=1e-2, progress=False)
    assert np.isfinite(losses).all()
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), tuned.params, again.params)
    assert all(by_path(moved).values())
