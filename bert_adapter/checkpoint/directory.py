"""The files of a checkpoint directory, which is replaced whole or not at all."""

import json
import os
import re
import shlex
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint.card_file import CARD, MARK, card, provenance
from bert_adapter.families import FAMILIES
from bert_adapter.families.sentence import (
    MODULES,
    OLDER_SETTINGS,
    PROMPTS,
    SETTINGS,
    is_encoder_alone,
    modules_file,
    stage_paths,
)
from bert_adapter.files import path_of
from bert_adapter.json_files import check_fetched, is_there, parsed, without_mark
from bert_adapter.model import Model

CONFIG, MSGPACK = "config.json", "flax_model.msgpack"


# Factors have a file name of their own. A library that knows no factors looks for WEIGHTS and finds nothing. If it
# found them, it would draw random kernels for those it misses, and say so in a warning at most.
WEIGHTS, INDEX, FACTORS = "model.safetensors", "model.safetensors.index.json", "factorised.safetensors"


SENTENCEPIECE = "sentencepiece.bpe.model"  # no text, unlike all others
CODES = "bpe.codes"  # of BERTweet's and PhoBERT's, beside vocab.txt
PARAMETERS = "parameters.safetensors"  # of a model whose module is the caller's own
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    CODES,
    SENTENCEPIECE,
    "special_tokens_map.json",
    "added_tokens.json",
)


READING = (*TOKENIZER, SETTINGS, PROMPTS, CARD)  # how texts become batches, and whose work it is: true with any head
STAGES = "[0-9]*_*/"  # the folders of what follows the encoder


SIDE_FILES = (*READING, MODULES, f"{STAGES}{CONFIG}")


ADAPTER = "adapter_config.json"


CHECKPOINT_FILES = (
    CONFIG,
    WEIGHTS,
    INDEX,
    FACTORS,
    PARAMETERS,
    "model-[0-9]*-of-[0-9]*.safetensors",
    *SIDE_FILES,
    *OLDER_SETTINGS,
    f"{STAGES}{WEIGHTS}",
)


KEEP = "wanted the checkpoint that it was made of, or one of save"
EXPORTED = ("model.onnx", "model.onnx.data", "model.stablehlo")  # of `export`, beside those and its code


def code_name(model_type: str) -> str:
    """What `export` calls its code for a family's models."""
    return f"modeling_low_rank_{model_type.replace('-', '_')}"


def fetch(path_or_hub_id: str | Path) -> Path:
    """A directory with the checkpoint's files; of a checkpoint on the Hub, only the files that are read."""
    if (directory := path_of(path_or_hub_id)).is_dir():
        return directory
    name = str(path_or_hub_id)
    if directory.is_file():
        raise ValueError(f"{name}: got a file, wanted the directory that holds {CONFIG} and weights")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"{name}: wanted a directory that is there, or the name of a model on the Hugging Face Hub")
    try:
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(path_or_hub_id), allow_patterns=[*CHECKPOINT_FILES, ADAPTER]))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(str(path_or_hub_id), allow_patterns=[MSGPACK])
        return directory
    except Exception as error:  # each release of huggingface_hub has exceptions of its own
        wanted = "a directory, of which there is none, or a model on the Hugging Face Hub, which says"
        raise ValueError(f"{name}: wanted {wanted}: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The entries of config.json, of a directory that holds a whole model."""
    if is_there(directory / ADAPTER):
        raise ValueError(
            f"{directory}: got {ADAPTER}, wanted a whole model: merge the adapter into its base model with peft's "
            "merge_and_unload(), and save that"
        )
    if (whole := whole_of(directory)) is not None:
        raise ValueError(
            f"{directory}: got an encoder in a folder of its own, wanted {CONFIG} beside all that {whole / MODULES} "
            f"lists: `{as_it_is_now(whole)}` writes it as sentence-transformers does now"
        )
    weights = (WEIGHTS, INDEX, FACTORS, PARAMETERS, MSGPACK)
    exported = [name for name in EXPORTED if is_there(directory / name)]
    if exported and not any(is_there(directory / name) for name in weights):
        raise ValueError(f"{directory}: got {exported[0]}, an export, of which no model is read: {KEEP}")
    if not is_there(directory / CONFIG):
        names = sorted(path.name for path in directory.iterdir())
        raise ValueError(f"{directory}: got {names}, wanted {CONFIG} and weights")
    config = parsed((directory / CONFIG).read_bytes(), directory / CONFIG)
    code = config.get("auto_map")
    if isinstance(code, dict) and str(code.get("AutoConfig")).startswith(code_name("")):
        raise ValueError(f"{directory}: got an export for transformers, of which no model is read: {KEEP}")
    return config


def whole_of(directory: Path) -> Path | None:
    """The directory whose encoder lies in a folder, as sentence-transformers once wrote it: this one, or its parent."""
    directory = directory.resolve()
    for whole, inside in ((directory, None), (directory.parent, directory.name)):
        if not (whole / MODULES).is_file() or (inside is None and is_there(directory / CONFIG)):
            continue
        with suppress(ValueError):  # a file of that name beside a checkpoint may be anything
            first = next(iter(parsed((whole / MODULES).read_bytes(), whole / MODULES, list)), None)
            folder = first.get("path") if isinstance(first, dict) else None
            if folder and (folder == inside if inside else is_there(whole / str(folder) / CONFIG)):
                return whole
    return None


def as_it_is_now(directory: Path, target: Path | None = None) -> str:
    """A line for the shell by which sentence-transformers reads a directory and writes it, where PyTorch is."""
    source, to = str(directory), str(target or directory.with_name(f"{directory.name}-now"))
    code = f"import sentence_transformers; sentence_transformers.SentenceTransformer({source!r}).save({to!r})"
    return f"python -c {shlex.quote(code)}"


def read_texts(directory: Path, embeds: bool) -> dict[str, bytes]:
    """The small files by name, without byte-order marks. What follows an encoder is of no use to a classifier."""
    names = [*READING]
    if embeds:
        modules = directory / MODULES
        stages = stage_paths(modules.read_bytes() if is_there(modules) else None)
        names += [MODULES, *(f"{stage}/{CONFIG}" for stage in stages)]
    elif is_there(directory / MODULES) and not is_encoder_alone((directory / MODULES).read_bytes()):
        warnings.warn(f"{directory}: {MODULES} is left out, for config.json names a classifier", stacklevel=3)
    found = {name: (directory / name).read_bytes() for name in names if is_there(directory / name)}
    older = [name for name in OLDER_SETTINGS if is_there(directory / name)]
    if older and SETTINGS not in found:
        found[SETTINGS] = (directory / older[0]).read_bytes()
    if "1_Pooling/config.json" in found and MODULES not in found:  # sentence-transformers reads the folder by it
        found[MODULES] = modules_file([("", "Transformer"), ("1_Pooling", "Pooling")])
    kept = provenance(found.pop(CARD, None), directory / CARD)
    for name, content in found.items():
        check_fetched(directory / name, content)
        found[name] = content if name == SENTENCEPIECE else without_mark(content, directory / name)
        if name.endswith(".json"):
            parsed(content, directory / name, list if name == MODULES else dict)
    if kept:
        found[CARD] = card(kept)  # the rest is about that model, and not about what is made of it
    return found


def check_names(names: Iterable[str]) -> None:
    """A ValueError if a small file has another name than a checkpoint's have."""
    known = (*READING, MODULES)
    if unknown := [name for name in names if name not in known and not re.fullmatch(rf"\d+_\w+/{CONFIG}", name)]:
        raise ValueError(f"files: got {sorted(unknown)}, supported: {', '.join(SIDE_FILES)}")


def write_texts(model: Model, directory: Path) -> None:
    """config.json and the small files are in the directory."""
    config = json.dumps(model.config, indent=2) + "\n"
    for name, content in (model.files | {CONFIG: config.encode()}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `target` when the block ends, and vanishes if it fails.

    It lies beside `target`, so that taking its place is a rename. Where a directory has to give way it is
    two, and a crash just between them leaves the old one under a name that ends in ".old".
    """
    target = check_target(target)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        fresh.mkdir(parents=True)
        yield fresh
        synchronise(fresh)
        swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


def check_target(target: Path) -> Path:
    """The absolute path, if a checkpoint may be written there."""
    target = path_of(target).resolve()
    if (lost := in_the_way(target)) is not None:
        raise ValueError(f"{target}: wanted a new or empty directory, or a checkpoint and no other files; got {lost}")
    if (kind := is_held(target)) is not None:
        raise ValueError(f"{target}: got {kind}, which cannot give way to another directory: wanted one in it")
    return target


def is_held(target: Path) -> str | None:
    """What keeps a directory in its place, if anything does."""
    if not target.is_dir():
        return None
    if os.path.ismount(target):
        return "a mount point"
    with suppress(FileNotFoundError):  # the current one may be gone
        if Path.cwd().is_relative_to(target):
            return "the current directory, or one above it"
    return None


def in_the_way(target: Path) -> str | None:
    """What but a checkpoint would be lost if `target` were deleted; None if nothing is."""
    if not target.is_dir():
        return "a file" if target.exists() else None
    paths = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(target).as_posix() for path in paths]
    folders = stages_in(target) if any("/" in name for name in names) else []
    if others := sorted(name for name in names if not is_ours(name, folders)):
        return others[0]
    if CARD in names and MARK.encode() not in (target / CARD).read_bytes():
        return f"a {CARD} that is not of ours"  # it is somebody's work
    return f"no {CONFIG}" if names and CONFIG not in names else None


def is_ours(name: str, folders: list[str]) -> bool:
    """Whether a checkpoint has a file of that name; in a folder, if that is of what follows its encoder."""
    folder, _, file = name.rpartition("/")
    code = [f"{code_name(model_type)}.py" for model_type in FAMILIES]
    patterns = [pattern.rpartition("/") for pattern in (*CHECKPOINT_FILES, *EXPORTED, *code, MSGPACK)]
    fitting = [pattern for inner, _, pattern in patterns if bool(inner) == bool(folder)]
    return (not folder or folder in folders) and any(fnmatch(file, pattern) for pattern in fitting)


def stages_in(target: Path) -> list[str]:
    """The folders of what follows the encoder of the checkpoint in a directory; none where that cannot be read."""
    modules = target / MODULES
    try:
        return stage_paths(modules.read_bytes() if modules.is_file() else None)
    except ValueError:
        return []


def synchronise(directory: Path) -> None:
    """The files' contents are on the disk, so that no crash leaves a renamed directory of empty files."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def swap(fresh: Path, target: Path) -> None:
    """`fresh` is called `target`; what was called so is gone, or back in place if the renaming failed."""
    aside = fresh.with_suffix(".old")
    if not target.exists():
        os.rename(fresh, target)
        return
    shutil.copymode(target, fresh)
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
