"""The parameters' names in PyTorch's files, and their paths in Flax's trees.

Transposes happen in this file alone: the weight of a PyTorch Linear is (out, in) on disk, a kernel is (in, out) in
memory. A factorised kernel is stored as `<module>.left` (in, k) and `<module>.right` (k, out), never transposed.
"""

import numpy as np


def from_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """A PyTorch parameter's Flax path and value. Norms have a scale; in the oldest they have gamma and beta.

    Raises:
      ValueError: the name is Flax's, so that a square kernel would be transposed unseen.
    """
    *parents, leaf = name.split(".")
    if leaf in ("kernel", "scale", "embedding"):
        raise ValueError(f"{name}: got a name of Flax's, wanted PyTorch's: which axis is the input's is not known")
    parent = ["", *parents][-1]
    norm, table = parent.endswith(("LayerNorm", "_norm")), parent.endswith("_embeddings")
    weight = "scale" if norm else "embedding" if table else "kernel"
    leaf = {"weight": weight, "gamma": "scale", "beta": "bias"}.get(leaf, leaf)
    return "/".join([*parents, leaf]), tensor.T if leaf == "kernel" else tensor


def to_torch(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A Flax parameter's PyTorch name and value; contiguous, for safetensors writes the memory as it lies."""
    *parents, leaf = path.split("/")
    name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*parents, name]), np.ascontiguousarray(array.T if leaf == "kernel" else array)
