"""Vocabularies without the tokens that no text of the user's needs."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from bert_adapter.checkpoint.directory import CODES, SENTENCEPIECE
from bert_adapter.checkpoint.names import by_path, low_rank, shapes
from bert_adapter.families import family_of
from bert_adapter.families.sentence import prompts
from bert_adapter.json_files import parsed
from bert_adapter.model import Model
from bert_adapter.rows import NO_ROWS, LabelledTexts, rows_in
from bert_adapter.vocabulary import TRIMMED, tokenizer_of

JSON, SETTINGS, LINES = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
WORDS, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"


class Trimmed(NamedTuple):
    """A model with a smaller vocabulary. kept: the old number of each token, in the new order.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> bert_adapter.trim(sample_model(), ["a dog"], keep=["fox"]).model.config["vocab_size"]
      10
    """

    model: Model
    kept: Int[np.ndarray, " tokens"]


def trim(model: Model, texts: Iterable[Any], keep: Iterable[str] = ()) -> Trimmed:
    """The model without the tokens that neither the texts nor `keep` use: their rows, their names, their merges.

    Special and added tokens stay, and so do single characters and bytes: every text still has tokens, and one whose
    tokens all stay has the same ones as before, with other numbers. Tokenizers of WordPiece, Unigram and BPE.

    Args:
      model: of a family, dense or factorised.
      texts: strings, or tuples and lists of them.
      keep: tokens as the vocabulary spells them.

    Raises:
      ValueError: tokens that the vocabulary has not, a vocabulary without its token for what is unknown, or a tokenizer
        of another kind, or without its file in JSON or text.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> small, kept = bert_adapter.trim(sample_model(), ["a red fox"])
      >>> small.config["vocab_size"], kept.tolist()
      (10, [0, 1, 2, 3, 4, 5, 6, 7, 13, 14])
    """
    if isinstance(keep, str | bytes):
        raise ValueError(f"keep: got {keep!r}, wanted a list of tokens")
    keep = list(keep)
    tokenize = tokenizer_of(model)
    known = vocabulary(model)
    if odd := [token for token in keep if token not in known.numbers]:
        raise ValueError(f"keep: got {odd[:3]}, wanted tokens of the vocabulary")
    flat = [part for text in rows_of(texts) for part in strings_in(text)]
    flat = [prompt + text for prompt in ("", *prompts(model.files)) for text in flat]  # as each is read
    used = {number for some in in_parts(flat) for row in tokenize(some)["input_ids"] for number in row}
    used |= {known.numbers[token] for token in keep} | set(tokenize.all_special_ids)
    module: Any = model.module
    if family_of(model.config).longest(module.config) < module.config.max_position_embeddings:
        used |= set(range(tokenize.pad_token_id + 1))  # positions are counted from the number of padding
    used |= set(tokenize.get_added_vocab().values())
    rows = module.config.vocab_size
    kept = np.array(sorted(number for number in known.closed(used) if number < rows))
    files = rewritten(model.files, {int(old): new for new, old in enumerate(kept)})
    return Trimmed(with_rows(model, kept, files), kept)


def rows_of(texts: Any) -> list[Any]:
    """The texts in a list; a single one is a list of one."""
    if isinstance(texts, LabelledTexts):
        texts = texts.texts
    return [texts] if isinstance(texts, str) else rows_in(texts, "a list of texts, or of tuples or lists of texts")


def strings_in(text: Any) -> list[str]:
    """The strings of a text, or of a tuple or list of texts."""
    if isinstance(text, str):
        return [text]
    if isinstance(text, NO_ROWS) or not isinstance(text, Iterable):
        raise ValueError(f"texts: got {text!r:.80}, wanted texts (str), or tuples or lists of texts")
    return [part for each in text for part in strings_in(each)]


def in_parts(texts: list[str], size: int = 1000) -> Iterable[list[str]]:
    """The texts, some at a time."""
    return (texts[begin : begin + size] for begin in range(0, len(texts), size))


class Vocabulary(NamedTuple):
    """Tokens and their numbers.

    always: numbers of the tokens that any text may need.
    merges: of BPE, the pairs of tokens that are joined.
    """

    numbers: Mapping[str, int]
    always: set[int]
    merges: list[tuple[str, str]]

    def closed(self, used: Iterable[int]) -> set[int]:
        """The numbers, with those that any text may need, and with the parts that kept tokens are joined from."""
        names = {number: token for token, number in self.numbers.items()}
        parts: dict[str, set[str]] = {}
        for left, right in self.merges:
            parts.setdefault(left + right, set()).update((left, right))
        found, todo = set(), list(set(used) | self.always)
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                todo += [self.numbers[part] for part in parts.get(names.get(number, ""), ()) if part in self.numbers]
        return found


def vocabulary(model: Model) -> Vocabulary:
    """That of the model's files."""
    files = model.files
    if JSON in files:
        return of_json(parsed(files[JSON], JSON)["model"])
    if LINES in files and CODES not in files:
        numbers = {token: number for number, token in enumerate(lines_of(files[LINES]))}
        return Vocabulary(numbers, single(numbers, "##"), [])
    if WORDS in files and MERGES in files:
        numbers = parsed(files[WORDS], WORDS)
        return Vocabulary(numbers, single(numbers, ""), merges_in(files[MERGES].decode().splitlines()))
    raise ValueError(f"files: got {sorted(files)}, wanted {JSON}, {LINES}, or {WORDS} and {MERGES}, to be rewritten")


def of_json(entry: Mapping[str, Any]) -> Vocabulary:
    """The same from the entry "model" of tokenizer.json."""
    kind = entry.get("type")
    if kind == "WordPiece":
        if entry["unk_token"] not in entry["vocab"]:
            raise ValueError(
                f"{JSON}: got no {entry['unk_token']!r} in the vocabulary, wanted it: it is for the unknown"
            )
        return Vocabulary(entry["vocab"], single(entry["vocab"], entry["continuing_subword_prefix"]), [])
    if odd := [
        name for name in ("continuing_subword_prefix", "end_of_word_suffix") if kind == "BPE" and entry.get(name)
    ]:
        raise ValueError(f"{JSON}: got {odd[0]} {entry[odd[0]]!r} of BPE, wanted none: parts are joined as they are")
    if kind == "BPE":
        merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in entry["merges"]]
        kept = single(entry["vocab"], "") | (bytes_in(entry["vocab"]) if entry.get("byte_fallback") else set())
        return Vocabulary(entry["vocab"], kept, merges)
    if kind == "Unigram":
        pieces = [piece for piece, _ in entry["vocab"]]
        numbers = {piece: number for number, piece in enumerate(pieces)}
        least = int(np.argmin([score for _, score in entry["vocab"]]))  # what is unknown is worth less than that
        always = single(numbers, "") | bytes_in(numbers) | {least}
        return Vocabulary(numbers, always | ({entry["unk_id"]} if entry["unk_id"] is not None else set()), [])
    raise ValueError(f"{JSON}: got a model of the type {kind!r}, wanted WordPiece, Unigram or BPE")


def bytes_in(numbers: Mapping[str, int]) -> set[int]:
    """The numbers of single bytes, by which what has no token is spelled."""
    return {number for piece, number in numbers.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece)}


def single(numbers: Mapping[str, int], prefix: str) -> set[int]:
    """The numbers of single characters, with the prefix and without."""
    return {number for token, number in numbers.items() if len(token) == 1 or len(token.removeprefix(prefix)) == 1}


def lines_of(content: bytes) -> list[str]:
    """The tokens of vocab.txt, in which a line ends as in any text."""
    return re.sub(r"\r\n?", "\n", content.decode("utf-8")).rstrip("\n").split("\n")


def merges_in(lines: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of merges.txt."""
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return [(pair[0], pair[1]) for pair in pairs]


def rewritten(files: Mapping[str, bytes], new: Mapping[int, int]) -> dict[str, bytes]:
    """The tokenizer's files with the new numbers, without the tokens that have none.

    SentencePiece's own file goes, where tokenizer.json says the same.
    """
    found = {name: content for name, content in files.items() if name != SENTENCEPIECE}
    if JSON in found:
        found[JSON] = json.dumps(in_json(parsed(found[JSON], JSON), new), ensure_ascii=False).encode()
    if LINES in found:
        tokens = lines_of(found[LINES])
        found[LINES] = "\n".join(tokens[old] for old in new if old < len(tokens)).encode()
    for name in [name for name in (WORDS, ADDED) if name in found]:
        found[name] = json.dumps(renumbered(parsed(found[name], name), new), ensure_ascii=False).encode()
    if MERGES in found and WORDS in found:
        kept = parsed(found[WORDS], WORDS)
        merges = [pair for pair in merges_in(files[MERGES].decode().splitlines()) if joined(pair, kept)]
        found[MERGES] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]).encode()
    declared = parsed(found.get(SETTINGS, b"{}"), SETTINGS)
    if added := declared.get("added_tokens_decoder"):
        declared["added_tokens_decoder"] = {str(new[int(old)]): each for old, each in added.items() if int(old) in new}
    found[SETTINGS] = json.dumps(declared | {TRIMMED: len(new)}, indent=2, ensure_ascii=False).encode()
    return found


def renumbered(numbers: Mapping[str, int], new: Mapping[int, int]) -> dict[str, int]:
    """The tokens that stay, with their new numbers."""
    return {token: new[old] for token, old in numbers.items() if old in new}


def joined(pair: tuple[str, str], kept: Mapping[str, int]) -> bool:
    """Whether both parts and the whole of a merge stay."""
    return all(token in kept for token in (*pair, "".join(pair)))


def in_json(content: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json's entries."""
    entry, names = dict(content["model"]), {}
    if entry["type"] == "Unigram":
        entry["vocab"] = [entry["vocab"][old] for old in new if old < len(entry["vocab"])]
        entry["unk_id"] = None if entry["unk_id"] is None else new[entry["unk_id"]]
    else:
        entry["vocab"] = names = renumbered(entry["vocab"], new)
    if entry["type"] == "BPE":
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in entry["merges"]]
        kept = [joined((pair[0], pair[1]), names) for pair in pairs]
        entry["merges"] = [pair for pair, stays in zip(entry["merges"], kept, strict=True) if stays]
    added = [each | {"id": new[each["id"]]} for each in content.get("added_tokens", []) if each["id"] in new]
    padding = content.get("padding")
    return content | {
        "model": entry,
        "added_tokens": added,
        "padding": padding and padding | {"pad_id": new[padding["pad_id"]]},
        "post_processor": in_processor(content.get("post_processor"), new),
    }


def in_processor(entry: Any, new: Mapping[int, int]) -> Any:
    """What puts special tokens around a text, with their new numbers."""
    if not isinstance(entry, dict):
        return entry
    found = dict(entry)
    for name in [name for name in ("sep", "cls") if isinstance(found.get(name), list)]:
        found[name] = [found[name][0], new[found[name][1]]]
    if "processors" in found:
        found["processors"] = [in_processor(each, new) for each in found["processors"]]
    if isinstance(found.get("special_tokens"), dict):
        found["special_tokens"] = {
            token: each | {"ids": [new[old] for old in each["ids"]]} for token, each in found["special_tokens"].items()
        }
    return found


def with_rows(model: Model, kept: Int[np.ndarray, " tokens"], files: dict[str, bytes]) -> Model:
    """The model with those rows of all that has one for each token: the table, or its left factor, and biases."""
    numbers = {int(old): new for new, old in enumerate(kept)}
    config = model.config | {"vocab_size": len(kept)}
    config |= {
        name: numbers[value]
        for name, value in model.config.items()
        if name.endswith("_token_id") and isinstance(value, int) and value in numbers
    }
    module: Any = model.module
    module = module.clone(config=family_of(config).config(config))
    whole = by_path(jax.device_get(model.params))
    flat: dict[str, Any] = dict(flatten_dict(model.params, keep_empty_nodes=True, sep="/"))
    ranks = low_rank(config)
    old, wanted = shapes(model.module, ranks), shapes(module, ranks)
    for path in [path for path in wanted if path in old and old[path] != wanted[path]]:
        flat[path] = np.asarray(whole[path])[kept]
    return model._replace(module=module, params=unflatten_dict(flat, sep="/"), config=config, files=files)
