"""New heads on an encoder."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_adapter.checkpoint.directory import READING
from bert_adapter.checkpoint.names import low_rank, shapes
from bert_adapter.families import family_of, label_count, module_for
from bert_adapter.families.family import Family
from bert_adapter.model import Model, check_family


def with_head(model: Model, labels: int, *, problem_type: str | None = None, seed: int = 0) -> Model:
    """The model with a new classifier of `labels` classes, as its family has them; of one, the value of a regression.

    problem_type: as in config.json, what the outputs are, if that is something else: "regression", values;
    "multi_label_classification", labels that may be there at once.

    Where the head is on a pooler, as BERT's, an encoder without one gets a new one. Where it is not, as RoBERTa's, the
    pooler is gone. So is what followed the encoder to embed texts, dense layers and modules.json among it. New kernels
    are drawn from the normal distribution that the config names; new biases are zero.

    Raises:
      ValueError: the model has a classifier.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> bert_adapter.with_head(sample_model(), 3).params["classifier"]["kernel"].shape
        (16, 3)
    """
    check_family(model, "gets no head: put one into your module")
    if (count := label_count(model.module)) is not None:
        raise ValueError(f"the model has a head already, of {count} labels")
    family = family_of(model.config)
    stages = [getattr(stage, "name", "") for stage in getattr(model.module, "stages", ())]
    gone = rf"^{re.escape(family.prefix)}({'|'.join(map(re.escape, stages))})/|{family.classifier.ignored}"
    config = headed_config(model.config, labels, family, gone)
    config |= {} if problem_type is None else {"problem_type": problem_type}
    module = module_for(config)
    flat = flatten_dict(model.params, keep_empty_nodes=True, sep="/")
    under: dict[str, Any] = {f"{family.prefix}{path}": leaf for path, leaf in flat.items()}
    params = {path: leaf for path, leaf in under.items() if not re.search(gone, path)}
    wanted = shapes(module, low_rank(config))
    new = fresh({path: wanted[path] for path in wanted if path not in params}, family.deviation(module.config), seed)
    files = {name: content for name, content in model.files.items() if name in READING}
    return Model(module, unflatten_dict(params | new, sep="/"), config, files)


DECLARED = ("id2label", "label2id", "_num_labels", "problem_type")  # what a config says of a head


def headed_config(config: dict[str, Any], labels: int, family: Family, gone: str) -> dict[str, Any]:
    """The config of an encoder, changed to that of the classifier around it; layers that `gone` finds have no ranks."""
    kept = {name: value for name, value in config.items() if name not in DECLARED}
    kept |= {"architectures": [family.classifier.names[0]], "num_labels": labels}
    if not kept.get("low_rank"):
        return kept
    under = {f"{family.prefix}{path}": rank for path, rank in low_rank(kept).items()}
    ranks = {path: rank for path, rank in under.items() if not re.search(gone, path)}
    return kept | {"low_rank": kept["low_rank"] | {"ranks": ranks}}


def fresh(wanted: dict[str, tuple[int, ...]], deviation: float, seed: int) -> dict[str, Any]:
    """New kernels, in the order of their paths, and zeros for all else."""
    kernels = sorted(path for path in wanted if path.endswith("/kernel"))
    keys = jax.random.split(jax.random.key(seed), len(kernels))
    draw = nn.initializers.normal(deviation)
    drawn = {path: draw(key, wanted[path], jnp.float32) for path, key in zip(kernels, keys, strict=True)}
    return {path: jnp.zeros(shape) for path, shape in wanted.items()} | drawn
