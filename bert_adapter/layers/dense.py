"""`flax.linen.Dense`: a kernel (in, out)."""

import flax.linen as nn

from bert_adapter.layers.layer import Layer

DENSE = Layer(nn.Dense, input_axes=lambda module: 1)
