"""What is measured for a signal, in one pass over the batches."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bert_adapter.importance.gradients import Gradients
from bert_adapter.importance.measure import measure_importance
from bert_adapter.importance.sums import Importance
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.signals import DEFAULT, as_signal
from bert_adapter.signals.definition import Signal


def measure_signal(
    forward: Forward,
    params: Any,
    batches: Iterable[Batch],
    paths: Iterable[str],
    *,
    signal: str | Signal = DEFAULT,
    whole: bool = False,
    gradients: Gradients = "gaussian",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """What the signal needs to know of the kernels, from one pass over the batches.

    The default, "combined", needs the marginals of the Fisher information, E[GG'] along inputs and E[G'G] along
    outputs, with G an example's gradient (Gupta et al. 2018), and E[xx'] of what enters a layer.

    Args are those of `measure_importance`. By default a Gram matrix of a side at least twice as large as the other is
    measured as the kernel passes it on, W E[G'G] W', which is all that the factors and the plan need; signals that
    cannot say what they make of that have theirs whole. Plans of bytes, weights for `wlra.solve` and other models'
    kernels need whole=True, with which noise is told a little otherwise, and ranks may differ by a few.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, bert_adapter
      >>> net = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)])
      >>> batch = {"x": jnp.ones((4, 5))}
      >>> params = net.init(jax.random.key(0), batch["x"])["params"]
      >>> def forward(params, batch):
      ...     return net.apply({"params": params}, batch["x"])
      >>> importance = bert_adapter.measure_signal(forward, params, [batch], ["layers_0"], signal="activation")
      >>> importance["layers_0"].inputs.shape
      (5, 5)
    """
    chosen = as_signal(signal)
    how: dict[str, Any] = {"gradients": gradients, "seed": seed, "file": file, "progress": progress}
    how |= {"statistics": chosen.statistics, "whole": whole or not chosen.through}
    return measure_importance(forward, params, batches, paths, **how)
