"""Kinds of layers that can be factorised; modules of other kinds run as they are."""

from bert_adapter.layers.dense import DENSE
from bert_adapter.layers.layer import Layer

LAYERS: dict[str, Layer] = {
    "dense": DENSE,
}
