"""Directories that transformers and sentence-transformers load, with PyTorch's names; no PyTorch is needed for it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bert_adapter.checkpoint import by_file, checked, write
from bert_adapter.checkpoint.bits import INTEGERS, SCALE, SHAPE, encoded, factorised_tables
from bert_adapter.checkpoint.directory import FACTORS, WEIGHTS, code_name
from bert_adapter.checkpoint.names import by_path, dtypes_of, heads_of, low_rank, markers, stored
from bert_adapter.exporting.target import Target
from bert_adapter.exporting.texts import example, tokenizer_files
from bert_adapter.factorisation import merge
from bert_adapter.families import architecture_of, family_name, family_of
from bert_adapter.families.sentence import MODULES, declared_stages, modules_file
from bert_adapter.families.stages import Pooling, Projection
from bert_adapter.head_sizes import SIDES, paths_in, sizes_of, whole_sizes
from bert_adapter.json_files import parsed
from bert_adapter.model import Model

CODE = Path(__file__).with_name("modeling_low_rank.py")
NOTHING = np.zeros(0, np.float32)  # a weight of a size at which a stock model refuses the file
TASKS = (  # of transformers' Auto classes; that of the bare model last
    "ModelForSequenceClassification",
    "ModelForTokenClassification",
    "ModelForQuestionAnswering",
    "ModelForMaskedLM",
    "ModelForMultipleChoice",
    "Model",
)


def task_of(model: Model) -> str:
    """The end of the name of the Auto class that loads such a model."""
    name = architecture_of(model.config).names[0]
    return next(task for task in TASKS if name.endswith(task.removeprefix("Model")))


def check_stock(model: Model, dtype: str | None) -> None:
    """A ValueError if transformers has no such model."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, name = family_name(model.config), architecture_of(model.config).names[0]
    if kind not in CONFIG_MAPPING_NAMES or not hasattr(transformers, name):
        raise ValueError(
            f"model_type and architectures: got {kind!r} and {name!r}, which transformers "
            f"{transformers.__version__} has not: wanted to='onnx' or to='stablehlo', which need no model of its"
        )
    older(model)


def check_factorised(model: Model, dtype: str | None) -> None:
    """A ValueError if nothing would be smaller, or a kernel is that transformers has no linear layer for."""
    check_stock(model, dtype)
    if not needs_code(model):
        raise ValueError("to: got 'transformers' for a model without factors or integers, wanted 'transformers-dense'")
    check_matrices(model)


def check_matrices(model: Model) -> None:
    """A ValueError if a factorised kernel has more than two axes, or a factorised table has a decoder tied to it."""
    if architecture_of(model.config).tied and (tables := factorised_tables(model.params)):
        raise ValueError(
            f"{min(tables)}: got a factorised table with a decoder that is tied to it, wanted a dense one, or "
            f"to='transformers-dense', 'onnx' or 'stablehlo': merge(model) is a dense model"
        )
    lefts = {path: leaf for path, leaf in by_path(model.params).items() if path.endswith(("/left", "/right"))}
    if odd := [path for path, leaf in lefts.items() if np.ndim(leaf) != 2]:
        raise ValueError(f"{odd[0]}: got {np.ndim(lefts[odd[0]])} axes, wanted 2: merge() the factors first")


def check_sentences(model: Model, dtype: str | None) -> None:
    """A ValueError if the model does not embed sentences."""
    check_stock(model, dtype)
    check_matrices(model)
    if not hasattr(model.module, "stages"):
        name = architecture_of(model.config).names[0]
        raise ValueError(f"to: got 'sentence-transformers' for {name}, wanted an encoder, which embeds sentences")


def write_dense(model: Model, directory: Path, dtype: str | None = None) -> None:
    """What transformers itself writes: factors are multiplied out."""
    dense = merge(model)
    config = dense.config
    config |= older(dense) | {"model_type": family_name(config), "architectures": [architecture_of(config).names[0]]}
    write(dense._replace(files=tokenizer_files(dense)), directory, by_file(dense, checked(dense)))


def older(model: Model) -> dict[str, Any]:
    """Entries of config.json by which transformers before 5 computes the same, or a ValueError if it cannot."""
    return family_of(model.config).older(getattr(model.module, "config"))  # noqa: B009


def write_factorised(model: Model, directory: Path, dtype: str | None = None) -> None:
    """Factors as linear layers, integers beside scales, and the code that puts these into transformers' model."""
    model, kind = behind_merged(model), family_name(model.config)
    ranks, prefix = low_rank(model.config), family_of(model.config).prefix.replace("/", ".")
    layers, tables = {path: torch_name(model, path) for path in ranks}, factorised_tables(model.params)
    kept, narrow = integers(model), narrow_in(model)
    numbers = encoded(checked(model), kept, tables)
    files = by_file(model, numbers)
    linear = as_linear(files.pop(FACTORS), set(layers.values()), {layers[path] for path in tables})
    files[WEIGHTS] = inside(with_integers(linear), {torch_name(model, path) for path in narrow})
    code = code_name(kind)  # transformers 4 mixes up files of one name in folders of one name
    config = stored(model.config, kind) | older(model)
    config |= {
        "architectures": [f"LowRank{task_of(model)}"],
        "auto_map": {"AutoConfig": f"{code}.LowRankConfig"}
        | {f"Auto{task}": f"{code}.LowRank{task}" for task in TASKS},
        "low_rank": {name: value for name, value in model.config["low_rank"].items() if name not in ("dtypes", "heads")}
        | {"ranks": {layers[path].removeprefix(prefix): rank for path, rank in ranks.items()}}
        | {"integers": {torch_name(model, path).removeprefix(prefix): dtype for path, dtype in kept.items()}}
        | {"narrow": {torch_name(model, path).removeprefix(prefix): sizes for path, sizes in narrow.items()}},
    }
    write(model._replace(config=config, files=tokenizer_files(model)), directory, files)
    text = CODE.read_text("utf-8").replace('STOCK = "bert"', f'STOCK = "{kind}"')
    (directory / f"{code}.py").write_text(text, "utf-8")


def write_sentences(model: Model, directory: Path, dtype: str | None = None) -> None:
    """What follows the encoder is declared, whether or not it was."""
    files = model.files | declarations(model)
    module: Any = model.module
    declared = model._replace(module=module.clone(stages=declared_stages(files)), files=files)
    (write_factorised if needs_code(model) else write_dense)(declared, directory)


def behind_merged(model: Model) -> Model:
    """The model with dense stages behind the encoder: sentence-transformers has no others."""
    if not low_rank(model.config):
        return model
    stages = stages_behind(model)
    config = model.config | {"low_rank": model.config["low_rank"] | {"ranks": ranks_before(model)}}
    params = {name: merge(leaf) if name in stages else leaf for name, leaf in model.params.items()}
    return model._replace(params=params, config=config)


def stages_behind(model: Model) -> list[str]:
    """The names of the dense stages behind the encoder."""
    return [stage.name for stage in getattr(model.module, "stages", ()) if isinstance(stage, Projection)]


def ranks_before(model: Model) -> dict[str, int]:
    """The ranks, but for those of the dense stages behind the encoder."""
    stages = stages_behind(model)
    return {path: rank for path, rank in low_rank(model.config).items() if path.split("/")[0] not in stages}


def integers(model: Model) -> dict[str, str]:
    """As what matrices stay integers, by layer; a table that a decoder is tied to has other readers, and is floats."""
    tied = {path.rpartition("/")[0] for path in architecture_of(model.config).tied.values()}
    return {path: dtype for path, dtype in dtypes_of(model.config).items() if dtype in INTEGERS and path not in tied}


def needs_code(model: Model) -> bool:
    """Whether transformers' own classes cannot hold it."""
    return bool(ranks_before(model) or integers(model) or heads_of(model.config))


def narrow_in(model: Model) -> dict[str, tuple[int, int, float]]:
    """By path, of kernels whose heads have fewer dimensions: inputs, outputs, and what the outputs are multiplied by.

    Queries are for scores that are divided by the root of the dimensions that there are, not of a whole head's.
    """
    if not heads_of(model.config):
        return {}
    found, config = {}, getattr(model.module, "config")  # noqa: B009
    heads, hidden = config.num_attention_heads, config.hidden_size
    for layer, (sizes, whole) in enumerate(zip(sizes_of(model), whole_sizes(model), strict=True)):
        paths = paths_in(model, layer)
        for names, size, most in zip(SIDES, sizes, whole, strict=True):
            for name in names if size < most else ():
                shape = (heads * size, hidden) if name == "output" else (hidden, heads * size)
                found[paths[name]] = (*shape, math.sqrt(most / size) if name == "query" else 1.0)
    return found


def inside(tensors: dict[str, np.ndarray], layers: set[str]) -> dict[str, np.ndarray]:
    """The tensors with those of these layers below "narrow", and a weight that a stock model refuses in their place."""
    found = dict(tensors)
    for layer in layers:
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            found[f"{layer}.narrow.{name.removeprefix(f'{layer}.')}"] = found.pop(name)
        found[f"{layer}.weight"] = NOTHING
    return found


def torch_name(model: Model, path: str) -> str:
    """The name of PyTorch's module for a kernel or a table."""
    place = next(iter(markers(model.module, {path: 1})))
    name, _ = family_of(model.config).to_torch(place, np.empty((1, 1), np.float32))
    return name.removesuffix(".weight")


def as_linear(tensors: dict[str, np.ndarray], layers: set[str], tables: set[str]) -> dict[str, np.ndarray]:
    """The tensors with the factors of these layers as weights of linear layers, which are (out, in).

    The left factor of a table is one that is looked up, as it lies.
    """
    found = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        side = leaf.removesuffix(SCALE).removesuffix(SHAPE)
        if layer not in layers:
            found[name] = tensor
        elif leaf == "bias":
            found[f"{layer}.right.bias"] = tensor
        else:
            is_looked_up = layer in tables and side == "left"
            weight = f"{layer}.{side}.weight{leaf.removeprefix(side)}"
            found[weight] = tensor if is_looked_up else np.ascontiguousarray(tensor.T)
            found[f"{layer}.weight"] = NOTHING
    return found


def with_integers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with integers and scales under names of their own: a stock layer would take integers for weights."""
    found = {}
    for name, tensor in tensors.items():
        layer, weight = name.removesuffix(SCALE).rpartition(".")[::2]
        if name.endswith(SHAPE):
            continue  # which the layer knows
        if tensor.dtype in INTEGERS.values():
            found |= {f"{layer}.integers": tensor, f"{layer}.{weight}": NOTHING}
        else:
            found[f"{layer}.scale" if name.endswith(SCALE) else name] = tensor
    return found


def declarations(model: Model) -> dict[str, bytes]:
    """modules.json and the pooling's config, with all that sentence-transformers needs there."""
    stages = getattr(model.module, "stages", ())
    folder = next((stage.name for stage in stages if isinstance(stage, Pooling)), Pooling().name)
    place, kinds = f"{folder}/config.json", [("", "Transformer"), (folder, "Pooling")]
    modules = parsed(model.files.get(MODULES, modules_file(kinds)), MODULES, list)
    modules = [{"idx": number, "name": str(number)} | entry for number, entry in enumerate(modules)]
    pooling = parsed(model.files.get(place, b'{"pooling_mode_mean_tokens": true}'), place)
    if not {"word_embedding_dimension", "embedding_dimension"} & pooling.keys():
        pooling["word_embedding_dimension"] = getattr(model.module, "config").hidden_size  # noqa: B009
    return {name: json.dumps(value, indent=2).encode() for name, value in ((MODULES, modules), (place, pooling))}


def load_with_transformers(model: Model, code: bool) -> str:
    """How to load it."""
    trust = ", trust_remote_code=True" if code else ""
    load = f'model = transformers.Auto{task_of(model)}.from_pretrained("OUT"{trust})'
    return example(model, "pt", imports=["transformers"], load=load, call="print(model(**batch))", trust=trust)


def load_with_sentence_transformers(model: Model) -> str:
    """How to load it."""
    trust = ", trust_remote_code=True" if needs_code(model) else ""
    return f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("OUT"{trust})
print(model.encode(["A sentence.", "Another."]).shape)"""


DENSE = Target(
    about="factors multiplied out; AutoModel.from_pretrained loads it",
    write=write_dense,
    load=lambda model: load_with_transformers(model, code=False),
    ranks=lambda model: {},
    check=check_stock,
    library="transformers",
    heads=False,
)
FACTORISED = Target(
    about="factorised, in as few bits; AutoModel.from_pretrained loads it with trust_remote_code=True",
    write=write_factorised,
    load=lambda model: load_with_transformers(model, code=True),
    ranks=ranks_before,
    integers=integers,
    check=check_factorised,
    library="transformers",
)
SENTENCES = Target(
    about="as it is, with what follows the encoder; SentenceTransformer loads it with trust_remote_code=True",
    write=write_sentences,
    load=load_with_sentence_transformers,
    ranks=ranks_before,
    integers=integers,
    check=check_sentences,
    library="sentence-transformers",
    reads=True,
)
