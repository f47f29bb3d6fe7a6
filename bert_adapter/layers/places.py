"""Where the kernels and tables of layers lie among the parameters."""

from collections.abc import Container

from bert_adapter.layers import LAYERS


def kernel_names() -> list[str]:
    """What layers call the parameter that they multiply by, or look up."""
    return list(dict.fromkeys(layer.kernel for layer in LAYERS.values()))


def kernel_path(paths: Container[str], layer: str) -> str:
    """The path of a layer's kernel or table, of those that there are; that of a kernel if there is neither."""
    names = kernel_names()
    return next((path for path in (f"{layer}/{name}" for name in names) if path in paths), f"{layer}/{names[0]}")


def is_table(path: str) -> bool:
    """Whether a parameter of that path is looked up, and not multiplied by."""
    return any(layer.looked_up and path.endswith(f"/{layer.kernel}") for layer in LAYERS.values())


def layer_path(path: str) -> str | None:
    """The path of the layer whose kernel or table that is, or None."""
    layer, _, name = path.rpartition("/")
    return layer if name in kernel_names() else None
