"""What is measured for a signal, in one pass over the batches or in two."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bert_adapter.importance.gradients import Gradients
from bert_adapter.importance.measure import eigenbases, measure_importance
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
    gradients: Gradients = "gaussian",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Importance:
    """What the signal needs to know of the kernels, from one pass over the batches, or two for an eigenbasis.

    The default, "shampoo", needs the marginals of the Fisher information: E[GG'] along inputs and E[G'G] along outputs,
    with G an example's gradient (Gupta et al. 2018).

    Args are those of `measure_importance`. With a file, each of two passes has its own: the first one's has the suffix
    ".factors".

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
    chosen, batches, paths = as_signal(signal), list(batches), list(paths)
    given = {"params": params, "batches": batches, "paths": paths}
    measure: Any = partial(measure_importance, forward, **given, gradients=gradients, seed=seed, progress=progress)
    if not chosen.rotated:
        return measure(statistics=chosen.statistics, file=file)
    factors = measure(statistics=chosen.statistics, file=None if file is None else f"{file}.factors")
    rotated = measure(statistics=("fisher",), bases=eigenbases(factors), file=file)
    both = {path: sums._replace(fisher=rotated[path].fisher) for path, sums in factors.sums.items()}
    return replace(rotated, sums=both)
