"""What is exported has texts read as they are read here: by its tokenizer's files, and by the code in its card."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_export import in_integers, model, slow
from tiny import CLASSIFIER, of_distilbert

import bert_adapter
from bert_adapter import exporting
from bert_adapter.checkpoint.card_file import CARD
from bert_adapter.families import module_for

READ = {  # as sentence-transformers' files say, which no other library looks at
    "sentence_bert_config.json": b'{"max_seq_length": 7, "do_lower_case": true}',
    "config_sentence_transformers.json": b'{"prompts": {"query": "a red "}, "default_prompt_name": "query"}',
}


def in_its_words() -> bert_adapter.Model:
    """One that reads texts in lower case, behind a prompt, and not many words of them; its tokenizer gives types."""
    return tiny.model(CLASSIFIER)._replace(files=tiny.FILES | READ)


CARDS = {
    "in its words": in_its_words,
    "choices": lambda: tiny.model("BertForMultipleChoice"),
    "no tokenizer": lambda: tiny.model("BertForMultipleChoice")._replace(files={}),
    "other inputs": of_distilbert,
}


def run_card(directory: Path) -> dict[str, Any]:
    """What there is once the card's code has run."""
    code = re.search(r"```python\n(.*?)```", (directory / CARD).read_text("utf-8"), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1].replace("OUT", str(directory)), found)
    return found


@pytest.mark.parametrize("given", CARDS)
@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_code_in_the_card_reads_texts_as_the_model_does(to, given, tmp_path):
    pytest.importorskip(exporting.TARGETS[to].packages[0])
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    chosen = CARDS[given]()
    bert_adapter.export(chosen, tmp_path, to=to)
    batch = run_card(tmp_path)["batch"]
    if given == "choices":
        assert batch["input_ids"].shape[:2] == (1, 2)
    elif given != "no tokenizer":
        wanted = bert_adapter.tokenizer(chosen, multiple_of=1)(["A sentence.", "Another."])
        assert batch.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(batch[name], array)
    told = "Texts are brought to lower case and put behind `a red ` first"
    assert (told in (tmp_path / CARD).read_text("utf-8")) == (given == "in its words")


@pytest.mark.parametrize("to", ["transformers-dense", "sentence-transformers", "onnx", "stablehlo"])
def test_exported_tokenizers_know_lengths_and_inputs(to, tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    for package in exporting.TARGETS[to].packages:
        pytest.importorskip(package)
    chosen = of_distilbert()
    bert_adapter.export(chosen._replace(files=chosen.files | READ), tmp_path, to=to)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = loaded(["a red fox runs far from it ."], truncation=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert len(batch["input_ids"][0]) == 7
    bert_adapter.export(chosen, tmp_path, to=to)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 20


@pytest.mark.parametrize("to", ["onnx", "stablehlo"])
def test_inputs_are_those_that_the_tokenizer_gives(to, tmp_path):
    """RoBERTa's gives no token types; the card's code has none either."""
    pytest.importorskip(exporting.TARGETS[to].packages[0])
    declared = json.loads(tiny.FILES["tokenizer_config.json"]) | {"model_input_names": ["input_ids", "attention_mask"]}
    given = model()._replace(files=model().files | {"tokenizer_config.json": json.dumps(declared).encode()})
    bert_adapter.export(given, tmp_path, to=to)
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    assert run_card(tmp_path)["batch"].keys() == {"input_ids", "attention_mask"}


@slow
@pytest.mark.parametrize("given", CARDS)
@pytest.mark.parametrize("to", ["transformers-dense", "transformers"])
def test_code_in_the_cards_runs_in_pytorch(to, given, torch, tmp_path):
    chosen = CARDS[given]()
    chosen = in_integers(chosen, tmp_path / "int8") if to == "transformers" else chosen
    bert_adapter.export(chosen, tmp_path / "out", to=to)
    found = run_card(tmp_path / "out")
    batch = {name: np.asarray(array).astype(np.int32) for name, array in found["batch"].items()}
    got = found["model"].eval()(**found["batch"])
    got = got.logits if "logits" in got else got.last_hidden_state
    if given != "other inputs":  # whose output here is an embedding
        wanted = bert_adapter.apply(chosen.module, chosen.params, **batch)
        np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)


@slow
def test_sentence_transformers_cuts_texts_where_positions_end(torch, tmp_path):
    """RoBERTa's positions begin behind that of padding, so that there are fewer than its config says."""
    package = pytest.importorskip("sentence_transformers")
    sizes = {
        name: tiny.CONFIG[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    }
    config = {"model_type": "roberta", "architectures": ["RobertaModel"], "num_attention_heads": 2, "pad_token_id": 0}
    config |= sizes | {"max_position_embeddings": 20, "type_vocab_size": 1}
    module = module_for(config, tiny.FILES)
    chosen = bert_adapter.Model(module, tiny.random_params(module, size=0.3), config, tiny.FILES)
    bert_adapter.export(chosen, tmp_path, to="sentence-transformers")
    loaded = package.SentenceTransformer(str(tmp_path), device="cpu")
    texts = ["a red fox " * 9]
    wanted = bert_adapter.apply(module, chosen.params, **bert_adapter.tokenizer(chosen)(texts))
    np.testing.assert_allclose(loaded.encode(texts), wanted, atol=1e-5)
