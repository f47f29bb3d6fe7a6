"""Seeded problems whose weights are known: like Fisher information, and the six families of the table of columns.

And encoders of any size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

DECAY = 0.35


def target(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Singular values (1 + i)**-0.35 between random orthonormal vectors."""
    k = min(m, n)
    left, right = np.linalg.qr(rng.normal(size=(m, k)))[0], np.linalg.qr(rng.normal(size=(n, k)))[0]
    return (left * (1 + np.arange(k)) ** -DECAY) @ right.T


def fisher_like(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A target, and weights exp(1.5 a_i + 1.5 b_j + 0.3 c_ij) of standard normal a, b and c."""
    rng = np.random.default_rng(seed)
    W = target(rng, m, n)
    a, b, c = rng.normal(size=(m, 1)), rng.normal(size=(1, n)), rng.normal(size=(m, n))
    return W, np.exp(1.5 * a + 1.5 * b + 0.3 * c)


def spanning(exponent: np.ndarray, decades: float) -> np.ndarray:
    """Weights whose logarithms are the exponents, stretched over so many decades."""
    low, high = exponent.min(), exponent.max()
    return 10 ** (decades * (exponent - low) / (high - low))


def families(n: int, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An n x n target, and for it weights of six kinds by name."""
    rng = np.random.default_rng(seed)
    W = target(rng, n, n)
    a, b, c = rng.normal(size=(n, 1)), rng.normal(size=(1, n)), rng.normal(size=(n, n))
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "Fisher-like, 4 decades": lambda: spanning(a + b + 0.2 * c, 4),
        "Fisher-like, 12 decades": lambda: spanning(a + b + 0.2 * c, 12),
        "12 decades + lognormal noise": lambda: spanning(a + b, 12) * np.exp(c),
        "unstructured, 6 decades": lambda: 10 ** (6 * rng.uniform(size=(n, n))),
        "half missing": lambda: (rng.uniform(size=(n, n)) < 0.5).astype(float),
        "uniform": lambda: rng.uniform(size=(n, n)),
    }
    return W, {name: make() for name, make in kinds.items()}


def random_encoder(**sizes: int) -> Any:
    """A `Model` of BERT's kind, with the words of all-MiniLM-L6-v2, mean pooling, and entries of its config in place of
    others; its weights are normal, of 0.02."""
    import jax

    import bert_adapter
    from bert_adapter.demo import minilm
    from bert_adapter.families import module_for
    from bert_adapter.layers.running import parameter_shapes

    like = bert_adapter.load(minilm())
    config = like.config | sizes
    files = {name: data for name, data in like.files.items() if name != "1_Pooling/config.json"}
    files["1_Pooling/config.json"] = b'{"pooling_mode_mean_tokens": true}'
    module, rng = module_for(config, files), np.random.default_rng(0)
    shapes, _ = parameter_shapes(module)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(np.float32), shapes)
    return bert_adapter.Model(module, params, config, files)
