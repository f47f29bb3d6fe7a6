"""New heads on an encoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_adapter.families import module_for
from bert_adapter.families.bert import SequenceClassifier
from bert_adapter.model import Model


def with_head(model: Model, labels: int, *, seed: int = 0) -> Model:
    """The model with a new classifier of so many classes on its pooler; of one, the value of a regression.

    An encoder without a pooler gets a new one.

    Raises:
      ValueError: the model has a classifier, or is factorised and would need a new pooler.
    """
    if isinstance(model.module, SequenceClassifier):
        raise ValueError(f"the model has a head already, of {model.module.config.num_labels} labels")
    config = {name: value for name, value in model.config.items() if name not in ("id2label", "label2id")}
    config |= {"architectures": ["BertForSequenceClassification"], "num_labels": labels}
    if "low_rank" in config:
        section = config["low_rank"]
        config["low_rank"] = section | {"ranks": {f"bert/{path}": rank for path, rank in section["ranks"].items()}}
    module = module_for(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    initial = nn.initializers.normal(model.module.config.initializer_range)
    keys = iter(jax.random.split(jax.random.key(seed), 2))

    def fresh(part: dict[str, Any]) -> dict[str, Any]:
        kernel = part["kernel"]
        return {"kernel": initial(next(keys), kernel.shape, kernel.dtype), "bias": jnp.zeros(part["bias"].shape)}

    pooler = model.params.get("pooler") or {"dense": fresh(shapes["bert"]["pooler"]["dense"])}
    params = {"bert": {**model.params, "pooler": pooler}, "classifier": fresh(shapes["classifier"])}
    return Model(module, params, config, model.files)
