"""What a directory declares in the files of sentence-transformers: what follows the encoder, and how texts are read."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bert_adapter.families.stages import MODES, PROJECTED, Normalise, Pooling, Projection, Stage
from bert_adapter.json_files import parsed, shown

MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
ACTIVATION, OLDER_ACTIVATION = "activation_fn", "sbert_ce_default_activation_function"
IDENTITY = "torch.nn.modules.linear.Identity"  # what both may be where outputs are what they are
OLDER_SETTINGS = tuple(  # read where the first is not there
    f"sentence_{name}_config.json" for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
FLAGS = {  # the entries that ask for a mode, in the order of their vectors
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TASKS = ("feature-extraction", "sequence-classification")
READS = ("last_hidden_state", "logits")  # what comes of a forward pass; the second of a classifier
UNSUPPORTED = (  # arguments for what loads the encoder, its tokenizer and its config
    *("model_args", "tokenizer_args", "config_args"),
    *("model_kwargs", "processor_kwargs", "config_kwargs", "processing_kwargs"),
)
Files = Mapping[str, bytes]


class Settings(NamedTuple):
    """How texts are read: the most tokens, whether in lower case, what is put before them, how pairs are compared."""

    longest: int | None = None
    lower: bool = False
    prompt: str = ""
    similarity: str = "cosine"


def modules_file(modules: Sequence[tuple[str, str]]) -> bytes:
    """modules.json with these folders and kinds."""
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    return json.dumps(entries, indent=2).encode()


def is_encoder_alone(modules: bytes) -> bool:
    """Whether modules.json lists nothing behind the encoder, as a classifier's does."""
    found = parsed(modules, MODULES, list)
    return len(found) == 1 and isinstance(found[0], dict) and str(found[0].get("type")).endswith(".Transformer")


def stage_paths(modules: bytes | None) -> list[str]:
    """The folders of what follows the encoder, as modules.json lists them; without it, the pooling's."""
    return ["1_Pooling"] if modules is None else [path for path, _ in listed(modules)[1:]]


def declared_stages(files: Files) -> tuple[Stage, ...] | None:
    """What follows the encoder; None where nothing is declared."""
    if MODULES not in files:
        return (pooling("1_Pooling", files),) if "1_Pooling/config.json" in files else None
    modules = listed(files[MODULES])
    return tuple(KINDS[kind](path, files) for path, kind in modules[1:])


def listed(content: bytes) -> list[tuple[str, str]]:
    """The folder and the kind of every module, if it is an encoder, a pooling, and then what can follow one."""
    found = []
    for entry in parsed(content, MODULES, list):
        kind, path = (entry.get(name) for name in ("type", "path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ValueError(f"{MODULES}: got {shown(entry)}, wanted an object with 'type' and 'path'")
        package, _, name = kind.rpartition(".")
        known = package.split(".")[0] == "sentence_transformers" and name in ("Transformer", *KINDS)
        if not known:
            raise ValueError(f"{MODULES}: got a module {kind!r}, supported: Transformer, {', '.join(KINDS)}")
        if not re.fullmatch(r"[0-9]+_\w+" if found else "", path):
            wanted = "a folder such as '1_Pooling'" if found else "'', the folder of config.json"
            raise ValueError(f"{MODULES}: got the path {path!r} of {name}, wanted {wanted}")
        found.append((path, name))
    kinds = [kind for _, kind in found]
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
        raise ValueError(f"{MODULES}: got {kinds}, wanted Transformer, Pooling, and then Dense or Normalize")
    if repeated := [path for path, _ in found if [other for other, _ in found].count(path) > 1]:
        raise ValueError(f"{MODULES}: got {repeated[0]!r} more than once, wanted a folder for each module")
    return found


def stage_config(path: str, files: Files) -> tuple[str, dict[str, Any]]:
    """The name of a module's config, and its entries."""
    name = f"{path}/config.json"
    if name not in files:
        raise ValueError(f"{name}: the file is missing, which {MODULES} lists")
    return name, parsed(files[name], name)


def pooling(path: str, files: Files) -> Pooling:
    """The modes that the config asks for: by flags, or by the name or names in "pooling_mode"; by default the mean."""
    name, config = stage_config(path, files)
    modes = [mode for entry, mode in FLAGS.items() if config.get(entry)]
    if not modes and config.get("pooling_mode_mean_tokens") is None:
        modes = ["mean"]
    if unknown := [entry for entry in config if entry.startswith("pooling_mode_") and entry not in FLAGS]:
        raise ValueError(f"{name}: got {unknown}, supported: {', '.join(FLAGS)}")
    if (named := config.get("pooling_mode")) is not None:
        modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not modes or [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"{name}: got the modes {shown(modes)}, supported: {', '.join(MODES)}")
    if not config.get("include_prompt", True) and settings(files).prompt:
        raise ValueError(f"{name}: got include_prompt false beside a default prompt, supported: true")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    if width is not None and type(width) is not int:
        raise ValueError(f"{name}: got a width of {shown(width)}, wanted an integer")
    return Pooling(tuple(modes), width, path)


def projection(path: str, files: Files) -> Projection:
    """A dense layer on the embedding."""
    name, config = stage_config(path, files)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    kind = str(activation).rpartition(".")[2]
    if not str(activation).startswith("torch.nn.") or kind not in PROJECTED:
        raise ValueError(f"{name}: got activation_function {shown(activation)}, supported: {', '.join(PROJECTED)}")
    for entry in ("in_features", "out_features"):
        if type(config.get(entry)) is not int or config[entry] < 1:
            raise ValueError(f"{name}: got {entry} {shown(config.get(entry))}, wanted a positive integer")
    if config.get("use_residual"):
        raise ValueError(f"{name}: got use_residual {shown(config['use_residual'])}, supported: false")
    check_on_embedding(name, config)
    sizes = {"inputs": config["in_features"], "features": config["out_features"]}
    return Projection(path, **sizes, use_bias=bool(config.get("bias", True)), activation=kind)


def normalise(path: str, files: Files) -> Normalise:
    """Embeddings of length 1. There need not be a config."""
    name = f"{path}/config.json"
    if name in files:
        check_on_embedding(name, parsed(files[name], name))
    return Normalise(path)


def check_on_embedding(name: str, config: Mapping[str, Any]) -> None:
    """A ValueError if the module reads or writes something else than the embedding."""
    for entry in ("module_input_name", "module_output_name"):
        if config.get(entry) not in (None, "sentence_embedding"):
            raise ValueError(f"{name}: got {entry} {shown(config[entry])}, supported: 'sentence_embedding'")


KINDS: dict[str, Any] = {"Pooling": pooling, "Dense": projection, "Normalize": normalise}


def settings(files: Files) -> Settings:
    """What the files say of texts; a ValueError names the entry that cannot be honoured."""
    own = parsed(files[SETTINGS], SETTINGS) if SETTINGS in files else {}
    longest = own.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{SETTINGS}: got max_seq_length {shown(longest)}, wanted a positive integer")
    for entry in UNSUPPORTED:
        if own.get(entry):
            raise ValueError(f"{SETTINGS}: got {entry} {shown(own[entry])}, supported: none")
    tasks, reads = (TASKS[:1], READS[:1]) if MODULES in files else (TASKS, READS)
    check_modalities(own.get("modality_config"), reads)
    if own.get("transformer_task", tasks[0]) not in tasks:
        raise ValueError(f"{SETTINGS}: got transformer_task {shown(own['transformer_task'])}, supported: {tasks}")
    if own.get("module_output_name", "token_embeddings") not in ("token_embeddings", "scores"):
        raise ValueError(f"{SETTINGS}: got module_output_name {shown(own['module_output_name'])}, supported: none")
    more = parsed(files[PROMPTS], PROMPTS) if PROMPTS in files else {}
    if not isinstance(more.get("prompts") or {}, dict):
        raise ValueError(f"{PROMPTS}: got prompts {shown(more['prompts'])}, wanted an object of texts by name")
    if more.get("truncate_dim") is not None:
        raise ValueError(f"{PROMPTS}: got truncate_dim {shown(more['truncate_dim'])}, supported: none")
    similarity = more.get("similarity_fn_name") or "cosine"
    if not isinstance(similarity, str):
        raise ValueError(f"{PROMPTS}: got similarity_fn_name {shown(similarity)}, wanted a name")
    return Settings(longest, bool(own.get("do_lower_case")), default_prompt(more), similarity)


def activations(config: Mapping[str, Any], files: Files) -> dict[str, str]:
    """By the entry, what a cross-encoder is declared to apply to its outputs, where that is something."""
    declared = config.get("sentence_transformers")
    more = parsed(files[PROMPTS], PROMPTS) if PROMPTS in files else {}
    found = {
        "config.json: sentence_transformers activation_fn": (declared if isinstance(declared, dict) else {}).get(
            ACTIVATION
        ),
        f"config.json: {OLDER_ACTIVATION}": config.get(OLDER_ACTIVATION),
        f"{PROMPTS}: {ACTIVATION}": more.get(ACTIVATION),
    }
    return {name: str(kind) for name, kind in found.items() if kind and not str(kind).endswith(".Identity")}


def without_activation(config: Mapping[str, Any], files: Files) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config and the files, which declare that outputs are what they are wherever they declared something else."""
    config, files = dict(config), dict(files)
    if isinstance(declared := config.get("sentence_transformers"), dict) and ACTIVATION in declared:
        config["sentence_transformers"] = declared | {ACTIVATION: IDENTITY}
    if OLDER_ACTIVATION in config:
        config[OLDER_ACTIVATION] = IDENTITY
    if PROMPTS in files and ACTIVATION in (told := parsed(files[PROMPTS], PROMPTS)):
        files[PROMPTS] = json.dumps(told | {ACTIVATION: IDENTITY}, indent=2).encode()
    return config, files


def check_modalities(declared: Any, reads: Sequence[str]) -> None:
    """A ValueError if texts are to be read by something else than a forward pass, or for something else of it."""
    known = [{"text": {"method": "forward", "method_output_name": name}} for name in reads]
    if declared is not None and declared not in known:
        supported = " or ".join(map(shown, known))
        raise ValueError(f"{SETTINGS}: got modality_config {shown(declared)}, supported: {supported}")


def prompts(files: Files) -> list[str]:
    """All that may be put before a text."""
    found = (parsed(files[PROMPTS], PROMPTS) if PROMPTS in files else {}).get("prompts") or {}
    return sorted({prompt for prompt in found.values() if isinstance(prompt, str) and prompt})


def prompt_named(files: Files, name: str) -> str:
    """What is put before every text in place of the default prompt; a ValueError if the files have no such prompt."""
    prompts = (parsed(files[PROMPTS], PROMPTS) if PROMPTS in files else {}).get("prompts") or {}
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        known = f"one of {', '.join(map(repr, prompts))}" if prompts else f"none: {PROMPTS} has no prompts"
        raise ValueError(f"prompt_name: got {name!r}, wanted {known}; other words may stand in the texts themselves")
    for path in stage_paths(files.get(MODULES)):
        if not parsed(files.get(f"{path}/config.json", b"{}"), path).get("include_prompt", True):
            raise ValueError(f"prompt_name: got {name!r}, and {path}/config.json has include_prompt false: wanted none")
    return prompts[name]


def default_prompt(config: Mapping[str, Any]) -> str:
    """What is put before every text, unless another prompt is asked for."""
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ValueError(f"{PROMPTS}: got default_prompt_name {shown(name)}, wanted one of prompts: {shown(prompts)}")
    return prompts[name]
