"""How long models took, for the terminal, for programs, and as a figure."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bert_adapter.files import writing
from bert_adapter.speed import Bench, Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")  # of figures


def table(found: Bench) -> list[list[str]]:
    """A heading, and a line of cells for each model and engine: milliseconds, and times as fast as the first model."""
    cells = list(dict.fromkeys((each.batch, each.length) for each in found.timings))
    by_key: dict[tuple[str, str], dict[tuple[int, int], Timing]] = {}
    for each in found.timings:
        by_key.setdefault((each.model, each.engine), {})[each.batch, each.length] = each
    heading = ["model", "engine", *(f"{batch} x {length}" for batch, length in cells), "texts/s", "peak MB"]
    lines = []
    for key, timings in by_key.items():
        texts = [f"{1e3 * timings[cell].seconds:.1f} ms, {timings[cell].speed:.2f}" for cell in cells]
        most = max(each.texts_per_second for each in timings.values())
        lines.append([*key, *texts, f"{most:.0f}", f"{found.peaks[key] / 1e6:.0f}"])
    return [heading, *lines]


def slow_kernels(found: Bench) -> str:
    """Which kernels are slower with factors than without."""
    slow = [each for each in found.kernels if each.seconds is not None and each.seconds.low_rank > each.seconds.dense]
    if not slow:
        return f"All {len(found.kernels)} factorised kernels are faster than dense ones in JAX."
    lines = [f"  {each.path}, {each.shape[0]} by {each.shape[1]} at rank {each.rank}" for each in slow]
    return "\n".join(["Slower with factors than dense in JAX:", *lines])


def as_json(found: Bench) -> str:
    """All of it."""
    return json.dumps(
        {
            "threads": found.threads,
            "timings": [each._asdict() | {"texts_per_second": each.texts_per_second} for each in found.timings],
            "peak_bytes": [{"model": name, "engine": engine, "bytes": n} for (name, engine), n in found.peaks.items()],
            "kernels": [
                each._asdict() | {"seconds": each.seconds and each.seconds._asdict()} for each in found.kernels
            ],
        },
        indent=2,
    )


def figure(found: Bench) -> "Figure":
    """A panel for each cell: milliseconds of each model, in bars of an engine each."""
    import matplotlib.pyplot as plt

    cells = list(dict.fromkeys((each.batch, each.length) for each in found.timings))
    engines = list(dict.fromkeys(each.engine for each in found.timings))
    names = list(dict.fromkeys(each.model for each in found.timings))
    drawn, axes = plt.subplots(1, len(cells), figsize=(2.6 * len(cells) + 1, 3.5), squeeze=False, layout="constrained")
    width = 0.8 / len(engines)
    for ax, cell in zip(axes.flat, cells, strict=True):
        for number, engine in enumerate(engines):
            heights = [
                1e3 * each.seconds
                for each in found.timings
                if (each.batch, each.length, each.engine) == (*cell, engine)
            ]
            ax.bar([i + width * number for i in range(len(heights))], heights, width, label=engine)
        ax.set_title(f"{cell[0]} x {cell[1]}", fontsize=11)
        ax.set_xticks([i + width * (len(engines) - 1) / 2 for i in range(len(names))])
        ax.set_xticklabels([Path(name).name for name in names], rotation=30, ha="right")
    axes.flat[0].set_ylabel("milliseconds")
    drawn.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(engines), fontsize=9)
    return drawn


def check_figure(path: Path) -> None:
    """A ValueError if it cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib, which is not installed: pip install matplotlib")
    if path.suffix not in FORMATS:
        raise ValueError(f"--figure: got {path}, wanted a name that ends in one of {', '.join(FORMATS)}")


def write_figure(found: Bench, path: Path) -> None:
    """The figure, in the format of the file's name."""
    import matplotlib.pyplot as plt

    drawn = figure(found)
    with writing(path) as fresh:
        drawn.savefig(fresh, dpi=130, format=path.suffix.removeprefix("."))
    plt.close(drawn)
