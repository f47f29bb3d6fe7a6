"""New heads on an encoder, and none."""

import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.checkpoint.directory import READING
from bert_adapter.checkpoint.names import dtypes_of, low_rank, shapes, with_dtypes
from bert_adapter.families import architecture_of, architectures_of, family_of, label_count, module_for, output_of
from bert_adapter.families.sentence import ACTIVATION, OLDER_ACTIVATION, PROMPTS
from bert_adapter.json_files import parsed
from bert_adapter.layers.places import kernel_names
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model, check_family
from bert_adapter.outputs import OUTPUTS

DECLARED = (  # what a config says of a head
    *("id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
    *("sentence_transformers", OLDER_ACTIVATION),  # of a cross-encoder's
)


def with_head(
    model: Model, labels: int | None = None, *, head: str = "labels", problem_type: str | None = None, seed: int = 0
) -> Model:
    """The model with a new head; by default a classifier of `labels` classes, or of one, the value of a regression.

    What followed the encoder to embed texts is gone, dense layers and modules.json among it, and a pooler that the new
    head does not use. Of a pretraining head stays what transformers has there too, ModernBERT's `head`. What is missing
    is new, a pooler among it: `heads.drawn` names it. New kernels are drawn from the normal distribution that the
    config names; new biases are zero.

    Args:
      labels: how many classes; None for "answer" and "choice", whose outputs are given.
      head: what it is for: "labels" of texts, "tokens" (labels of words), "answer" or "choice".
      problem_type: as in config.json, what the labels of texts are, if that is something else: "regression", values;
        "multi_label_classification", labels that may be there at once.

    Raises:
      ValueError: the model has a head, its family has no such one, or none for that number of labels.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> bert_adapter.with_head(sample_model(), 3).params["classifier"]["kernel"].shape
        (16, 3)
        >>> bert_adapter.with_head(sample_model(), head="answer").params["qa_outputs"]["kernel"].shape
        (16, 2)
    """
    check_family(model, "gets no head: put one into your module")
    has, count, family = output_of(model.module), label_count(model.module), family_of(model.config)
    if count is not None and not OUTPUTS[has].pretraining:
        advice = "finetune trains it; without_head(model), in Python, has none"
        raise ValueError(f"the model has a head already, of {count} labels: {advice}")
    architecture = architectures_of(family).get(head)
    if architecture is None:
        known = ", ".join(map(repr, architectures_of(family)))
        raise ValueError(f"head: got {head!r}, supported by models of this family: {known}")
    entries = OUTPUTS[head].entries(labels) | ({} if problem_type is None else {"problem_type": problem_type})
    config = bare(model.config) | entries | {"architectures": [architecture.names[0]]}
    headed = moved(model, config, lambda path: path if count is not None else f"{family.prefix}{path}")
    params: dict[str, Any] = dict(flatten_dict(headed.params, keep_empty_nodes=True, sep="/"))
    wanted = shapes(headed.module, low_rank(headed.config))
    missing = {path: wanted[path] for path in wanted if path not in params}
    new = fresh(missing, family.deviation(headed.module.config), seed)
    return headed._replace(params=unflatten_dict(params | new, sep="/"))


def drawn(model: Model, headed: Model) -> list[str]:
    """The paths of the layers that are new in what `with_head` made of the model.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.heads import drawn
        >>> from bert_adapter.sample import sample_model
        >>> drawn(model := sample_model(), bert_adapter.with_head(model, 3))
        ['classifier']
    """
    prefix = "" if label_count(model.module) is not None else family_of(model.config).prefix
    had, has = (flatten_dict(each.params, keep_empty_nodes=True, sep="/") for each in (model, headed))
    return sorted({str(path).rpartition("/")[0] for path in has.keys() - {f"{prefix}{path}" for path in had}})


def without_head(model: Model) -> Model:
    """The model's encoder, which embeds a text as the mean of its tokens; the model itself if it has no head.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> bert_adapter.without_head(bert_adapter.with_head(sample_model(), 3)).config["architectures"]
        ['BertModel']
    """
    if label_count(model.module) is None:
        return model
    family = family_of(model.config)
    config = bare(model.config) | {"architectures": [family.embedder.names[0]]}
    return moved(model, config, lambda path: path.removeprefix(family.prefix) if path.startswith(family.prefix) else "")


def moved(model: Model, config: dict[str, Any], new_path: Callable[[str], str]) -> Model:
    """The model that the config names, with those of the parameters that it has, under new paths, and their ranks."""
    flat: dict[str, Any] = dict(flatten_dict(model.params, keep_empty_nodes=True, sep="/"))
    params = {new_path(path): leaf for path, leaf in flat.items()}
    module = architecture_of(config).fit(module_for(config), params)
    kernels = kernel_shapes(module)
    ranks = {new_path(path): rank for path, rank in low_rank(model.config).items() if new_path(path) in kernels}
    if config.get("low_rank"):
        stored = {new_path(path): dtype for path, dtype in dtypes_of(config).items() if new_path(path) in kernels}
        config = with_dtypes(config | {"low_rank": config["low_rank"] | {"ranks": ranks}}, stored)
    wanted = shapes(module, ranks).keys() | {f"{path}/{name}" for path in ranks for name in kernel_names()}
    kept = unflatten_dict({path: leaf for path, leaf in params.items() if path in wanted}, sep="/")
    files = {name: content for name, content in model.files.items() if name in READING}
    if ACTIVATION in (told := parsed(files.get(PROMPTS, b"{}"), PROMPTS)):
        files[PROMPTS] = json.dumps({name: told[name] for name in told if name != ACTIVATION}, indent=2).encode()
    return Model(module, kept, config, files)


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that say nothing of a head."""
    return {name: value for name, value in config.items() if name not in DECLARED}


def fresh(wanted: dict[str, tuple[int, ...]], deviation: float, seed: int) -> dict[str, Any]:
    """New kernels, in the order of their paths, ones for scales, and zeros for all else."""
    kernels = sorted(path for path in wanted if path.endswith("/kernel"))
    keys = jax.random.split(jax.random.key(seed), len(kernels))
    draw = nn.initializers.normal(deviation)
    drawn = {path: draw(key, wanted[path], jnp.float32) for path, key in zip(kernels, keys, strict=True)}
    scales = {path: jnp.ones(shape) for path, shape in wanted.items() if path.endswith("/scale")}
    return {path: jnp.zeros(shape) for path, shape in wanted.items()} | scales | drawn
