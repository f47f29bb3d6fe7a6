"""A directory's tokenizer, and what the directory says of it: known to fit the model before a text is read."""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint.directory import SENTENCEPIECE, TOKENIZER, write_texts
from bert_adapter.families import family_of
from bert_adapter.families.sentence import SETTINGS, settings
from bert_adapter.json_files import parsed
from bert_adapter.model import Model, check_family

DECLARED = "tokenizer_config.json"
TRIMMED = "trimmed_to"  # its entry with how many tokens a trimmed vocabulary has


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of transformers that the model's files describe.

    Raises:
      ValueError: no files of one, ids that the model has no row for, no token for padding, or a declaration that it
        cannot honour.
    """
    check_family(model, "has no tokenizer: make batches of arrays with yours, by the names that it is called with")
    lower, tokenize = settings(model.files).lower, as_described(model)
    check_declared(tokenize)
    if lower:
        lower_first(tokenize)
    rows = family_of(model.config).sizes(model.module.config).get("input_ids")
    check_unknown(tokenize)
    special = max(tokenize("", "")["input_ids"], default=0)  # by their numbers, which need be in no vocabulary
    token, largest = max(tokenize.get_vocab().items(), key=lambda item: item[1])
    if special > largest:
        token, largest = tokenize.convert_ids_to_tokens(special) or "a special one", special
    if rows is not None and largest >= rows:
        raise ValueError(
            f"the tokenizer knows {largest + 1} tokens, the last of them {token!r}, and the model has embeddings of "
            f"{rows}: wanted the tokenizer that the model was trained with"
        )
    trimmed = parsed(model.files.get(DECLARED, b"{}"), DECLARED).get(TRIMMED)
    if trimmed is not None and rows is not None and trimmed != rows:
        raise ValueError(
            f"{DECLARED}: got {TRIMMED} {trimmed}, of a vocabulary that was trimmed with its model, and the model has "
            f"embeddings of {rows}: wanted the directory that both were saved to"
        )
    if tokenize.pad_token_id is None:
        raise ValueError("the tokenizer has no token for padding: wanted 'pad_token' in tokenizer_config.json")
    return tokenize


def has_tokenizer(model: Model) -> bool:
    """Whether the model's files have one."""
    return bool(model.files.keys() & {"tokenizer.json", "vocab.txt", "vocab.json", SENTENCEPIECE})


def as_described(model: Model) -> Any:
    """What transformers makes of the model's files; a ValueError names them, and says why it cannot."""
    from transformers import AutoTokenizer

    if not has_tokenizer(model):
        wanted = f"tokenizer.json, vocab.txt or vocab.json, or {SENTENCEPIECE}"
        got = f"the files {sorted(model.files)}" if model.files else "no small files"
        raise ValueError(f"tokenizer: got a model of {got}, wanted {wanted} too, as its base model has them")
    with tempfile.TemporaryDirectory() as directory:
        write_texts(model, Path(directory))
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # whatever transformers, tokenizers and the packages that they need raise
            names, why = sorted(model.files.keys() & set(TOKENIZER)), str(error).replace(directory, "the directory")
            raise ValueError(
                f"tokenizer: transformers cannot make one of {', '.join(names)}: {type(error).__name__}: {why}"
            ) from error


def check_declared(tokenize: Any) -> None:
    """A ValueError for lengths that cannot be, and for rows without a mask: their padding would be read as text.

    Padding is on the right from here on, as `text_batches` has it.
    """
    names, longest = tokenize.model_input_names, tokenize.model_max_length
    if not isinstance(names, list | tuple) or not {"input_ids", "attention_mask"} <= set(names):
        raise ValueError(
            f"{DECLARED}: got model_input_names {names!r}, wanted a list with 'input_ids' and 'attention_mask'"
        )
    whole = type(longest) in (int, float) and longest >= 1 and (math.isinf(longest) or longest == int(longest))
    if not whole:
        raise ValueError(f"{DECLARED}: got model_max_length {longest!r}, wanted a positive integer")
    if tokenize.padding_side != "right":
        said = f"{DECLARED}: got padding_side {tokenize.padding_side!r}, texts are padded on the right"
        warnings.warn(f"{said}: a text is then read the same whatever is beside it", stacklevel=4)
        tokenize.padding_side = "right"


def check_unknown(tokenize: Any) -> None:
    """A ValueError if a vocabulary of pieces has no token for words that it does not know."""
    model = getattr(getattr(tokenize, "backend_tokenizer", None), "model", None)
    unknown = getattr(model, "unk_token", None)
    if model is not None and type(model).__name__ == "WordPiece" and model.token_to_id(unknown) is None:
        raise ValueError(f"the tokenizer has no token {unknown!r} in its vocabulary, wanted one for unknown words")


def lower_first(tokenize: Any) -> None:
    """The tokenizer brings texts to lower case before all else, and leaves accents, as sentence-transformers does."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = getattr(tokenize, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{SETTINGS}: got do_lower_case true, which this tokenizer cannot do: lower the texts")
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Sequence([Lowercase(), *before])


def longest_row(model: Model, tokenize: Any) -> int:
    """The most tokens a row: as the files say, and never more than there are positions."""
    declared = settings(model.files).longest or tokenize.model_max_length  # infinite where there is no limit
    return int(min(declared, family_of(model.config).longest(model.module.config)))
