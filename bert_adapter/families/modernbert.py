"""ModernBERT (Warner et al. 2024): rotated queries and keys, most layers local, gated feed-forward, norms first.

Names and numbers as in transformers 4.57. Padding is hidden, not taken out: the states of tokens are the same. Query,
key and value are one kernel `Wqkv`, value and gate one kernel `Wi`, as they are in its checkpoints.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bert_adapter.families.activations import ACTIVATIONS
from bert_adapter.families.config import SUPPORTED, Config, read_config, untyped_sizes
from bert_adapter.families.family import Architecture, Family
from bert_adapter.families.heads import Decoder, Table, against, check_span, heads
from bert_adapter.families.modules import Encoder, SentenceEmbedder, SequenceClassifier
from bert_adapter.families.parts import (
    Context,
    Heads,
    Ids,
    Inputs,
    Output,
    Scope,
    States,
    attend,
    dense,
    dropout,
    embed,
    filled,
    head_dropout,
    norm,
    refuse,
    visible,
)
from bert_adapter.families.stages import Pooling, pooled
from bert_adapter.families.torch_names import from_torch, to_torch
from bert_adapter.json_files import shown

TABLE = "embeddings/tok_embeddings/embedding"
FULL, LOCAL = "full_attention", "sliding_attention"  # layers whose tokens see all others, or those near by
THETAS = {FULL: ("global_rope_theta", 160_000.0), LOCAL: ("local_rope_theta", 10_000.0)}
OLDER_THETAS = [name for name, _ in THETAS.values()]


@dataclass(frozen=True)
class ModernBertConfig(Config):
    """ModernBertConfig's defaults, under BERT's names where these mean the same."""

    vocab_size: int = 50368
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0  # of embeddings
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = 0.0
    mlp_dropout: float = 0.0
    local_attention: int = 128  # the width of the window, both sides together
    global_attn_every_n_layers: int = 3
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"
    layer_types: tuple[str, ...] = ()
    thetas: tuple[float, float] = (160_000.0, 10_000.0)  # of full and of local layers


OTHER_NAMES = {
    "norm_eps": "layer_norm_eps",
    "hidden_activation": "hidden_act",
    "embedding_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "mlp_dropout",
    "local_attention",
    "global_attn_every_n_layers",
    "attention_bias",
    "mlp_bias",
    "norm_bias",
    "classifier_bias",
    "decoder_bias",
    "classifier_activation",
    "classifier_dropout",
    "classifier_pooling",
    "problem_type",
)
COMPUTED = SUPPORTED | {
    "position_embedding_type": ("absolute", "sans_pos"),  # which transformers does not look at: RoPE it is
    "classifier_pooling": ("cls", "mean"),
    "rope_scaling": (None,),
    "rope_theta": (None,),
    "partial_rotary_factor": (1.0,),
    "head_dim": (None,),
}


def config_from_dict(config: dict[str, Any]) -> ModernBertConfig:
    """The ModernBertConfig that a Hugging Face config.json describes, of transformers 4 or 5; see `read_config`."""
    read = read_config(ModernBertConfig, config, OTHER_NAMES | {name: name for name in SAME_NAMES}, COMPUTED)
    if read.head_sizes:
        raise ValueError("config low_rank heads: got sizes of heads, wanted none: numbers are rotated in pairs")
    size = read.hidden_size // read.num_attention_heads
    if size % 2:
        wanted = "heads of an even size, whose numbers are rotated in pairs"
        raise ValueError(f"num_attention_heads: got {read.num_attention_heads}, of size {size}, wanted {wanted}")
    return replace(read, layer_types=layer_types(config, read), thetas=thetas(config))


def layer_types(config: dict[str, Any], read: ModernBertConfig) -> tuple[str, ...]:
    """Which layers are local: as listed, or else all but every nth from the first on."""
    types, count = config.get("layer_types"), read.num_hidden_layers
    if types is None:
        return full_every(read.global_attn_every_n_layers, count)
    if not isinstance(types, list) or len(types) != count or set(map(str, types)) - {FULL, LOCAL}:
        raise ValueError(f"layer_types: got {shown(types)}, wanted {FULL!r} or {LOCAL!r} for each of {count} layers")
    return tuple(types)


def full_every(step: int, count: int) -> tuple[str, ...]:
    """So many layers, of which every so manieth is full, from the first on."""
    return tuple(LOCAL if i % step else FULL for i in range(count))


def older(config: ModernBertConfig) -> dict[str, Any]:
    """What transformers before 5 reads in place of "layer_types" and "rope_parameters"."""
    types = config.layer_types
    step = types.index(FULL, 1) if FULL in types[1:] else len(types)
    if types != full_every(step, len(types)):
        wanted = f"{FULL!r} for every nth layer from the first on: transformers before 5 computes no others"
        raise ValueError(f"layer_types: got {shown(list(types))}, wanted {wanted}; to='onnx' and 'stablehlo' have them")
    return {"global_attn_every_n_layers": step} | dict(zip(OLDER_THETAS, config.thetas, strict=True))


def thetas(config: dict[str, Any]) -> tuple[float, float]:
    """The base of the rotations' periods in full and in local layers.

    From transformers 5 they are in "rope_parameters"; before, a "local_rope_theta" of null was the global one.
    """
    declared = config.get("rope_parameters") or {}
    if not isinstance(declared, dict) or declared.keys() - THETAS.keys():
        raise ValueError(f"rope_parameters: got {shown(declared)}, wanted an object with {FULL!r} and {LOCAL!r}")
    found = {kind: theta(config, kind, declared.get(kind) or {}) for kind in THETAS}
    return found[FULL], found[LOCAL]


def theta(config: dict[str, Any], kind: str, declared: Any) -> float:
    """The base for one kind of layers."""
    place, (name, default) = f"rope_parameters {kind}", THETAS[kind]
    if not isinstance(declared, dict) or declared.keys() - {"rope_theta", "rope_type"}:
        raise ValueError(f"{place}: got {shown(declared)}, supported: an object with 'rope_theta' and 'rope_type'")
    if declared.get("rope_type") not in (None, "default"):
        raise ValueError(f"{place}: got rope_type {shown(declared['rope_type'])}, supported: 'default'")
    if kind == LOCAL and name in config and config[name] is None:
        default = theta(config, FULL, {})
    named = {place: declared.get("rope_theta"), name: config.get(name)}
    given = {where: value for where, value in named.items() if value is not None}
    for where, value in given.items():
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: got {shown(value)}, wanted a positive number")
    if len(set(given.values())) > 1:
        raise ValueError(f"{name}: got {shown(given[name])}, and {given[place]} in {place}: wanted one of them")
    return float(next(iter(given.values()), default))


class Seen(NamedTuple):
    """What the layers of one kind know of positions: who sees whom, and the rotations' cosines and sines."""

    visible: Bool[Array, "batch 1 to from"]
    cosines: Float[Array, "batch time 1 size"]
    sines: Float[Array, "batch time 1 size"]


def rotations(context: Context, positions: Ids, theta: float) -> tuple[Array, Array]:
    """The cosine and the sine of each position times each frequency, twice side by side, for one head."""
    dtype = jnp.promote_types(context.dtypes["dtype"], jnp.float32)
    size = context.config.hidden_size // context.config.num_attention_heads
    frequencies = jnp.asarray(theta ** (-np.arange(0, size, 2) / size), dtype)
    angles = jnp.asarray(positions).astype(dtype)[:, :, None, None] * jnp.tile(frequencies, 2)[None, None, None]
    return jnp.cos(angles).astype(context.dtypes["dtype"]), jnp.sin(angles).astype(context.dtypes["dtype"])


def rotated(x: Heads, seen: Seen) -> Heads:
    """Each number rotated with the one half a head further (Su et al. 2021)."""
    low, high = jnp.split(x, 2, axis=-1)
    return x * seen.cosines + jnp.concatenate([-high, low], axis=-1) * seen.sines


def self_attention(context: Context, x: Array, seen: Seen) -> Array:
    config = context.config
    fused = dense(context, 3 * config.hidden_size, "Wqkv", use_bias=config.attention_bias)(x)
    heads = (*x.shape[:2], 3, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    query, key, value = jnp.moveaxis(fused.reshape(heads), 2, 0)
    mixed = attend(context, rotated(query, seen), rotated(key, seen), value, visible=seen.visible)
    x = dense(context, config.hidden_size, "Wo", use_bias=config.attention_bias)(mixed)
    return dropout(context, x, config.attention_probs_dropout_prob)


def feed_forward(context: Context, x: Array) -> Array:
    """The second half of what `Wi` makes gates the first."""
    config = context.config
    both = dense(context, 2 * config.intermediate_size, "Wi", use_bias=config.mlp_bias)(x)
    value, gate = jnp.split(both, 2, axis=-1)
    x = dropout(context, ACTIVATIONS[config.hidden_act](value) * gate, config.mlp_dropout)
    return dense(context, config.hidden_size, "Wo", use_bias=config.mlp_bias)(x)


def normed(context: Context, x: Array, name: str) -> Array:
    return norm(context, x, name, use_bias=context.config.norm_bias)


def layer(context: Context, x: Array, seen: Seen) -> Array:
    x = x + Scope(self_attention, name="attn")(context, normed(context, x, "attn_norm"), seen)
    return x + Scope(feed_forward, name="mlp")(context, normed(context, x, "mlp_norm"))


def first_layer(context: Context, x: Array, seen: Seen) -> Array:
    """As the others, but what it is given is normalised already."""
    x = x + Scope(self_attention, name="attn")(context, x, seen)
    return x + Scope(feed_forward, name="mlp")(context, normed(context, x, "mlp_norm"))


def layers(context: Context, x: Array, seen: dict[str, Seen]) -> States:
    """The states before the first layer and after each, of which the last is not normalised yet."""

    def step(x: Array, i: int) -> Array:
        return Scope(layer if i else first_layer, name=str(i))(context, x, seen[context.config.layer_types[i]])

    return tuple(accumulate(range(context.config.num_hidden_layers), step, initial=x))


def embeddings(context: Context, input_ids: Ids) -> Array:
    x = embed(context, context.config.vocab_size, "tok_embeddings")(jnp.asarray(input_ids))
    return dropout(context, normed(context, x, "norm"), context.config.hidden_dropout_prob)


def near(time: Any, config: ModernBertConfig) -> Bool[Array, "1 1 time time"]:
    """Which tokens lie within each other's window, by their place in the row, whatever position_ids say."""
    steps = jnp.arange(time)  # of a length that may be a symbol of jax.export
    return (jnp.abs(steps[:, None] - steps[None, :]) <= config.local_attention // 2)[None, None]


def encode(context: Context, inputs: Inputs) -> States:
    """ModernBERT's states, the last of them normalised."""
    config = context.config
    refuse(inputs, "token_type_ids")
    ids, mask, _, positions = filled(inputs, untyped_sizes(config), longest(config))
    assert positions is not None
    full, local = (rotations(context, positions, theta) for theta in config.thetas)
    seen = {
        FULL: Seen(visible(mask), *full),
        LOCAL: Seen(visible(mask) & near(ids.shape[1], config), *local),
    }
    x = Scope(embeddings, name="embeddings")(context, ids)
    *states, last = Scope(layers, name="layers")(context, x, seen)
    return (*states, normed(context, last, "final_norm"))


def longest(config: ModernBertConfig) -> int:
    """The most tokens a row."""
    return config.max_position_embeddings


def prediction(context: Context, x: Array) -> Array:
    """What lies between the states and an output: dense, activation, norm."""
    config = context.config
    x = dense(context, config.hidden_size, use_bias=config.classifier_bias)(x)
    return normed(context, ACTIVATIONS[config.classifier_activation](x), "norm")


def classified(context: Context, x: Array, labels: int) -> Array:
    """Outputs behind the part that all heads have."""
    x = dropout(context, Scope(prediction, name="head")(context, x), head_dropout(context.config))
    return dense(context, labels, "classifier")(x)


def head(context: Context, result: Output) -> Array:
    """The classifier on the first token, or on the mean of the visible ones."""
    mean = context.config.classifier_pooling == "mean"
    states = result.last_hidden_state
    x = pooled(Pooling(), states, result.attention_mask) if mean else states[:, 0]
    return classified(context, x, context.config.num_labels)


def token_logits(context: Context, result: Output) -> Array:
    """The classes of each token."""
    return classified(context, result.last_hidden_state, context.config.num_labels)


def answer_logits(context: Context, result: Output) -> Array:
    """How likely an answer starts and ends at each token."""
    check_span(context.config)
    return classified(context, result.last_hidden_state, 2)


def choice_logits(context: Context, result: Output) -> Array:
    """How well the first visible token fits, unlike the classifier's first of all, or the mean."""
    pooling = Pooling((context.config.classifier_pooling,))
    return classified(context, pooled(pooling, result.last_hidden_state, result.attention_mask), 1)


def word_logits(context: Context, result: Output, table: Table) -> Array:
    """The words at each token, masked or not."""
    x = Scope(prediction, name="head")(context, result.last_hidden_state)
    if not context.config.decoder_bias:
        return against(x, table)
    return Decoder(lambda context, x: x, name="decoder")(context, x, table)


class ModernBert(Encoder):
    """ModernBertModel: the hidden states, of which the last is normalised."""

    encode = staticmethod(encode)


class ModernBertEmbedder(SentenceEmbedder):
    """Sentence embeddings, from the parameters of ModernBertModel and those of dense layers among the stages."""

    encode = staticmethod(encode)


class ModernBertClassifier(SequenceClassifier):
    """ModernBertForSequenceClassification's logits, or its values: see `families.predictive`."""

    prefix = "model"
    encode, head = staticmethod(encode), staticmethod(head)


HEADS = heads(
    "ModernBert",
    prefix="model",
    encode=encode,
    pool=None,
    words=word_logits,
    tied={"decoder/kernel": f"model/{TABLE}"},
    table=TABLE,
    tokens=token_logits,
    answer=answer_logits,
    choice=choice_logits,
)

MODERNBERT = Family(
    config=config_from_dict,
    embedder=Architecture(
        names=("ModernBertModel", "ModernBertForMaskedLM"),
        module=ModernBertEmbedder,
        ignored="^(head|decoder)/",  # for masked tokens
    ),
    classifier=Architecture(
        names=("ModernBertForSequenceClassification",),
        module=ModernBertClassifier,
        labels=lambda config: config.num_labels,
    ),
    prefix="model/",
    encoder="^(model/)?layers/",
    from_torch=from_torch,
    to_torch=to_torch,
    inputs=("input_ids", "attention_mask", "position_ids"),
    longest=longest,
    deviation=lambda config: config.initializer_range,
    sizes=untyped_sizes,
    heads=HEADS,
    older=older,
)
