"""Modules with a kernel, or a table, that cannot be factorised, and why."""

from typing import Any

from bert_adapter.layers import LAYERS

SLIDES = "its kernel slides over neighbours, so that its factors would be two convolutions"
NO_LAYER = {  # by the names of the classes, Linen's and NNX's alike
    "Conv": SLIDES,
    "ConvTranspose": SLIDES,
    "ConvLocal": "it has a kernel for each place",
    "Embed": "its table is looked up, and of those tables only those of nn.Embed and nnx.Embed run on factors",
}


def why_not(module: Any) -> str:
    """Why a module with parameters of its own cannot be factorised, in words that begin with its class."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    known = next((NO_LAYER[name] for name in kinds if name in NO_LAYER), None)
    layer = next((layer for layer in reversed(LAYERS.values()) if isinstance(module, layer.module)), None)
    own = None if layer is None else layer.why_not(module)
    why = own or known or f"no kind of layer in bert_adapter.LAYERS, where a Layer({kinds[0]}, ...) adds it"
    return f"{kinds[0]}: {why}"
