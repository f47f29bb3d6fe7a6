"""Where the kernels and tables of layers lie among the parameters."""

import re
from collections.abc import Container, Iterable

from bert_adapter.layers import LAYERS

MOST_NAMED = 12


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


def kind_of(path: str) -> str:
    """The path with # for its numbers: that of its like in every layer."""
    return re.sub(r"\d+", "#", path)


def in_brief(paths: Iterable[str]) -> str:
    """The paths for a message: one for those of a kind, and no more than MOST_NAMED."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(paths):
        kinds.setdefault(kind_of(path), []).append(path)
    named = [found[0] if len(found) == 1 else kind for kind, found in kinds.items()]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"{named[:MOST_NAMED]}{more}"
