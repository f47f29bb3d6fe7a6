"""What encoders like BERT are made of: the pieces that a family's file puts together.

Every projection is a plain `nn.Dense` and every table a plain `nn.Embed`, so an interceptor of `nn.Dense.__call__` sees
all of them, under the paths of their parameters. A piece that makes several of these is a function, and `Scope` puts
them below a name.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from bert_adapter.families.stages import PROJECTED, Pooling, Projection, Stage, normalised, pooled
from bert_adapter.values import check_values

Ids = Num[Array | np.ndarray, "batch time"]
States = tuple[Float[Array, "batch time hidden"], ...]
Heads = Float[Array, "batch time heads size"]
Values = Float[Array, "batch time heads width"]  # of which heads may have fewer, or more, than of queries and keys


class Context(NamedTuple):
    """What every part of one forward pass needs to know."""

    config: Any
    deterministic: bool
    dtypes: dict[str, Any]  # dtype and param_dtype
    layer: int = 0  # its number


class Inputs(NamedTuple):
    """What a model is called with. By default all tokens are visible, of type 0, and numbered from the left."""

    input_ids: Ids
    attention_mask: Ids | None
    token_type_ids: Ids | None
    position_ids: Ids | None


class Output(NamedTuple):
    """The hidden states before, between and after the layers; the last one; its first token, pooled."""

    last_hidden_state: Float[Array, "batch time hidden"]
    pooler_output: Float[Array, "batch hidden"] | None
    hidden_states: States
    attention_mask: Ids | None = None  # as it was given


class Scope(nn.Module):
    """The parameters that the function `part` makes lie below this module's name."""

    part: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs):
        return self.part(*inputs)


def dense(context: Context, features: int, name: str = "dense", use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.normal(context.config.initializer_range)
    return nn.Dense(features, use_bias, kernel_init=init, name=name, **context.dtypes)


def embed(context: Context, size: int, name: str, features: int | None = None) -> nn.Embed:
    """A table of `size` rows, by default as wide as the states."""
    init = nn.initializers.normal(context.config.initializer_range)
    width = context.config.hidden_size if features is None else features
    return nn.Embed(size, width, embedding_init=init, name=name, **context.dtypes)


def norm(context: Context, x: Array, name: str = "LayerNorm", use_bias: bool = True) -> Array:
    options = {"epsilon": context.config.layer_norm_eps, "use_bias": use_bias}
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes to float32 for the statistics
        return nn.LayerNorm(**options, name=name, **context.dtypes)(x)


def dropout(context: Context, x: Array, rate: float) -> Array:
    return nn.Dropout(rate, deterministic=context.deterministic)(x)


def refuse(inputs: Inputs, *names: str) -> None:
    """A ValueError if one of these is given, of which the model knows nothing."""
    taken = ", ".join(name for name in Inputs._fields if name not in names)
    for name in names:
        if getattr(inputs, name) is not None:
            raise ValueError(f"{name}: got some, wanted none: the model takes {taken}")


def filled(inputs: Inputs, sizes: dict[str, int], longest: int) -> Inputs:
    """The inputs, with what is left out by default, once it is known that the model has a meaning for all of them."""
    check_values(sizes, inputs._asdict())
    ids, mask, types, positions = inputs
    if ids.shape[1] > longest:
        raise ValueError(f"input_ids: got {ids.shape[1]} tokens a row, wanted at most {longest}")
    mask = jnp.ones(ids.shape, jnp.int32) if mask is None else mask
    types = jnp.zeros(ids.shape, jnp.int32) if types is None else types
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) if positions is None else positions
    return Inputs(ids, mask, types, positions)


def visible(mask: Any) -> Bool[Array, "batch 1 1 time"]:
    """Which tokens all heads of all tokens may see."""
    return (jnp.asarray(mask) > 0)[:, None, None, :]


def sizes_of_heads(config: Any, layer: int) -> tuple[int, int]:
    """The dimensions of a layer's heads: of queries and keys, and of values."""
    whole = config.hidden_size // config.num_attention_heads
    return config.head_sizes[layer] if config.head_sizes else (whole, whole)


def split_heads(context: Context, x: Array) -> Heads:
    """The states, shared out among the heads."""
    heads = context.config.num_attention_heads
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def projected(context: Context, x: Array, names: tuple[str, str, str]) -> tuple[Heads, Heads, Values]:
    """Queries, keys and values, of dense layers with these names."""
    config = context.config
    compared, mixed = sizes_of_heads(config, context.layer)
    query, key, value = (
        split_heads(context, dense(context, config.num_attention_heads * size, name)(x))
        for name, size in zip(names, (compared, compared, mixed), strict=True)
    )
    if not config.identities:
        return query, key, value
    return through_identities(context, query, names[0]), key, through_identities(context, value, names[2])


def through_identities(context: Context, x: Heads, name: str) -> Heads:
    """Each head's numbers through a dense layer of its own, `name`_0 for the first; one number stays as it is."""
    if x.shape[3] == 1:
        return x
    heads = [
        dense(context, x.shape[3], f"{name}_{head}", use_bias=False)(x[:, :, head])
        for head in range(context.config.num_attention_heads)
    ]
    return jnp.stack(heads, axis=2)


def attend(
    context: Context, query: Heads, key: Heads, value: Values, *, visible: Array, bias: Array | None = None
) -> Float[Array, "batch time hidden"]:
    """Each token's mix of the values that it may see.

    visible, bias: (batch or 1, heads or 1, time or 1, time), whether a token sees another, and what is added to its
    score. Half of finfo.min is added to a score that is hidden, beside which the score is nothing in float32. FlaxBert
    adds the whole, which may overflow in float16, and a sentence of nothing but padding is then NaN. Dropout is drawn
    for every sentence and head, as BERT's authors do, and not once a batch as FlaxBert does.
    """
    query, key, value = (jnp.swapaxes(heads, 1, 2) for heads in (query, key, value))  # twice as fast so on a CPU
    scores = query * query.shape[-1] ** -0.5 @ jnp.swapaxes(key, 2, 3)
    scores = scores if bias is None else scores + bias
    hidden = jnp.where(visible, 0, jnp.finfo(scores.dtype).min / 2).astype(scores.dtype)  # smaller than the scores
    scores = scores + hidden
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    first = scores.dtype == jnp.float16  # the sum of many values may be beyond it
    weights = dropout(context, weights / total if first else weights, context.config.attention_probs_dropout_prob)
    mixed = weights @ value if first else weights @ value / total  # then XLA makes one loop of all
    mixed = jnp.swapaxes(mixed, 1, 2)
    return mixed.reshape(*mixed.shape[:2], -1)


def stacked(context: Context, layer: Callable[..., Array], x: Array, *inputs: Any) -> States:
    """The states before the first layer and after each; layer i's parameters lie below "i"."""

    def step(x: Array, i: int) -> Array:
        return Scope(layer, name=str(i))(context._replace(layer=i), x, *inputs)

    return tuple(accumulate(range(context.config.num_hidden_layers), step, initial=x))


def project(context: Context, stage: Projection, x: Array) -> Array:
    """A dense layer on the embedding, with its activation."""
    if x.shape[-1] != stage.inputs:
        raise ValueError(f"{stage.name}/config.json: got in_features {stage.inputs}, wanted {x.shape[-1]}")
    init = nn.initializers.normal(context.config.initializer_range)
    layer = nn.Dense(stage.features, stage.use_bias, kernel_init=init, name="linear", **context.dtypes)
    return PROJECTED[stage.activation](layer(x))


def embedding(context: Context, stages: tuple[Stage, ...], hidden: Array, mask: Ids | None) -> Array:
    """What the stages make of the states, one after the other."""
    x = hidden
    for stage in stages:
        if isinstance(stage, Pooling):
            x = pooled(stage, x, mask)
        elif isinstance(stage, Projection):
            x = Scope(project, name=stage.name)(context, stage, x)
        else:
            x = normalised(x)
    return x


def two_layers(context: Context, x: Float[Array, "batch hidden"], activation: Callable[[Array], Array]) -> Array:
    """A head of a dense layer and an output, as RoBERTa's and ELECTRA's; dropout before both."""
    config = context.config
    rate = head_dropout(config)
    x = activation(dense(context, config.hidden_size)(dropout(context, x, rate)))
    return dense(context, config.num_labels, "out_proj")(dropout(context, x, rate))


def head_dropout(config: Any) -> float:
    """The rate before a head's layers."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
