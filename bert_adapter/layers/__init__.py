"""Kinds of layers that can be factorised; modules of other kinds run as they are."""

from bert_adapter.layers.dense import DENSE, DENSE_GENERAL
from bert_adapter.layers.einsum import EINSUM
from bert_adapter.layers.embed import EMBED
from bert_adapter.layers.layer import Layer

LAYERS: dict[str, Layer] = {
    "dense": DENSE,
    "dense_general": DENSE_GENERAL,
    "einsum": EINSUM,
    "embed": EMBED,
}
