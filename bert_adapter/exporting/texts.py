"""How texts are read where a model goes: what its tokenizer's files say there, and code that makes a batch."""

import json
from collections.abc import Iterable
from pathlib import Path

from bert_adapter.checkpoint.directory import write_texts
from bert_adapter.exporting.program import has_choices, inputs_of
from bert_adapter.families import family_name
from bert_adapter.families.sentence import settings
from bert_adapter.json_files import parsed
from bert_adapter.model import Model
from bert_adapter.vocabulary import DECLARED, has_tokenizer, longest_row, tokenizer_of

IN_ALL = ("PreTrainedTokenizerFast", "TokenizersBackend")  # what tokenizer.json says, and no more


def tokenizer_files(model: Model) -> dict[str, bytes]:
    """The files, whose tokenizer cuts texts where they are cut here, gives what the model takes, and names its class.

    transformers knows neither what sentence-transformers' files declare, nor a class for a model_type that is new to
    it, nor that a model has no token types.
    """
    if not has_tokenizer(model):
        return model.files
    tokenize, said = tokenizer_of(model), parsed(model.files.get(DECLARED, b"{}"), DECLARED)
    said |= {"model_max_length": longest_row(model, tokenize), "model_input_names": inputs_of(model)}
    said |= {"padding_side": tokenize.padding_side} if "padding_side" in said else {}
    if not said.get("tokenizer_class"):
        kind = type(tokenize).__name__
        said["tokenizer_class"] = IN_ALL[0] if kind in IN_ALL else kind.removesuffix("Fast")
    return model.files | {DECLARED: json.dumps(said, indent=2).encode()}


def write_reading(model: Model, directory: Path) -> None:
    """The config that transformers knows and the small files lie beside a program, which holds all else."""
    config = {name: value for name, value in model.config.items() if name not in ("low_rank", "dtype", "torch_dtype")}
    config |= {"model_type": family_name(config)}
    write_texts(model._replace(config=config, files=tokenizer_files(model)), directory)


def reading(model: Model) -> str:
    """How the model's texts have to be read, for its card; empty where a tokenizer does all of it."""
    said = settings(model.files)
    told = ["brought to lower case"] if said.lower else []
    told += [f"put behind `{said.prompt}`"] if said.prompt else []
    return f"Texts are {' and '.join(told)} first, as in the code below." if told else ""


def example(model: Model, numbers: str, *, imports: Iterable[str], load: str, call: str, trust: str = "") -> str:
    """Python that loads a model from "OUT", makes a `batch` for it, by its tokenizer if it has one, and calls it.

    numbers: "np" or "pt". trust: what is given to transformers besides.
    """
    tokenized = has_tokenizer(model)
    needed = {*imports, "transformers" if tokenized else {"np": "numpy as np", "pt": "torch"}[numbers]}
    begin = [*(f"import {name}" for name in sorted(needed)), "", load]
    return "\n".join(
        [*begin, *(tokenized_batch(model, numbers, trust) if tokenized else [plain_batch(model, numbers)]), call]
    )


def tokenized_batch(model: Model, numbers: str, trust: str) -> list[str]:
    """Lines that make a batch of texts as they are read here."""
    said = settings(model.files)
    texts = [f"{said.prompt}{text.lower() if said.lower else text}" for text in ("A sentence.", "Another.")]
    pairs = f"{texts[:1] * 2}, {texts}" if has_choices(model) else str(texts)
    lines = [
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("OUT"{trust})',
        f'batch = tokenizer({pairs}, padding=True, truncation=True, return_tensors="{numbers}")',
    ]
    return [*lines, *(["batch = {name: rows[None] for name, rows in batch.items()}"] if has_choices(model) else [])]


def plain_batch(model: Model, numbers: str) -> str:
    """A line that makes a batch in place of a tokenizer."""
    make = {"np": "np.full({}, {})", "pt": "torch.full({}, {})"}[numbers]
    shape = (1, 2, 16) if has_choices(model) else (2, 16)
    arrays = (f'"{name}": {make.format(shape, int(name == "attention_mask"))}' for name in inputs_of(model))
    return f"batch = {{{', '.join(arrays)}}}  # the arrays of your tokenizer"
