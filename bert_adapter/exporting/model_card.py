"""The card of a model that is exported: where it comes from, what was kept, how to load it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_adapter.checkpoint.bits import INTEGERS
from bert_adapter.checkpoint.card_file import CARD, card, provenance
from bert_adapter.checkpoint.names import heads_of, low_rank
from bert_adapter.exporting.target import Target
from bert_adapter.exporting.texts import reading
from bert_adapter.families import architecture_of
from bert_adapter.head_sizes import sizes_of, whole_sizes
from bert_adapter.json_files import parsed
from bert_adapter.layers.running import kernel_shapes
from bert_adapter.model import Model


def describe(model: Model, target: Target, *, dtype: str | None, scores: Mapping[str, float]) -> bytes:
    """README.md, with the licence and the base model of the card that the model came with."""
    declared = provenance(model.files.get(CARD))
    entries = declared | ({"library_name": target.library} if target.library else {})
    still = target.ranks(model)
    small = bool(still) or (target.heads and bool(heads_of(model.config)))
    about = [heading(model, declared, small), kept(model, target), bits(target.integers(model))]
    parts = [*about, measured(scores), "" if target.reads else reading(model), loading(model, target, dtype)]
    return card(entries, "\n\n".join(part for part in parts if part) + "\n")


def heading(model: Model, declared: Mapping[str, Any], small: bool) -> str:
    """What it is, and of what it was made."""
    base, name = declared.get("base_model"), architecture_of(model.config).names[0]
    bases = [base] if isinstance(base, str) else base or []
    lines = [f"# {', '.join(bases) or name}, {'low-rank' if small else 'dense'}", ""]
    made = ", ".join(f"`{each}`" for each in bases)
    lines += [f"A `{name}`, {f'made from {made}' if made else 'whose base model is not recorded'}."]
    if "license" not in declared:
        lines += ["", "No licence was declared where it comes from: that of the base model applies."]
    return "\n".join(lines)


def kept(model: Model, target: Target) -> str:
    """What became of the kernels, those that have factors in what is written and the others, and what decided that."""
    ranks, section = low_rank(model.config), model.config.get("low_rank") or {}
    told = narrower(model, target)
    if not ranks and not told:
        return "No kernel was factorised."
    shapes = {path: shape for path, shape in kernel_shapes(model.module).items() if path in ranks}
    still = [path for path in shapes if path in target.ranks(model)]
    if ranks:
        told = [f"{len(shapes)} kernels were replaced by products of two factors, of the ranks below.", *told]
    if still:
        before = sum(math.prod(shapes[path]) for path in still)
        after = sum(ranks[path] * sum(shapes[path]) for path in still)
        told.append(
            f"The factors of {len(still)} are here, {after:,} numbers in place of {before:,} ({after / before:.0%})."
        )
    if len(still) < len(shapes):
        which = f"Those of the other {len(shapes) - len(still)}" if still else "They"
        told.append(f"{which} are multiplied out, to as many numbers as before.")
    told = [
        " ".join(told),
        "",
        *([f"* Signal, which says how much an error counts: {section['signal']}"] if "signal" in section else []),
        *([f"* Method: {section['method']}"] if "method" in section else []),
        *calibrated(section.get("calibration")),
        *healed(section.get("healed")),
        *(["", "| kernel | inputs | outputs | rank |", "|---|---|---|---|"] if ranks else []),
        *(f"| {path} | {m} | {n} | {ranks[path]} |" for path, (m, n) in shapes.items()),
    ]
    return "\n".join(told)


def narrower(model: Model, target: Target) -> list[str]:
    """How many dimensions heads have kept, where they have fewer."""
    if not heads_of(model.config):
        return []
    sizes, (most, _) = sizes_of(model), whole_sizes(model)[0]
    compared, mixed = (", ".join(str(each[side]) for each in sizes) for side in (0, 1))
    told = [f"Of {most} dimensions of a head, by layer, queries and keys kept {compared}, values {mixed}."]
    return told if target.heads else [*told, "The others are zeros here."]


def bits(integers: Mapping[str, str]) -> str:
    """How many layers hold integers, of how many bits."""
    held = [(list(integers.values()).count(dtype), dtype.removeprefix("int")) for dtype in INTEGERS]
    told = [f"{bits} bits in {count} layer{'s' * (count > 1)}" for count, bits in held if count]
    return f"Matrices are integers beside scales, which are not trained: of {', of '.join(told)}." if told else ""


def calibrated(calibration: Mapping[str, Any] | None) -> list[str]:
    """On what the signal was measured."""
    if not calibration:
        return []
    return [f"* Calibration: {calibration['texts']} texts, of the fingerprint {calibration['fingerprint']}"]


def healed(section: Mapping[str, Any] | None) -> list[str]:
    """What training to the dense model's outputs gained."""
    if not section or not section["kept"]:
        return []
    losses = f"from {section['before']:.4g} to {section['after']:.4g}"
    return [f"* Healed on {section['texts']:,} texts: the distance from the dense model's outputs fell {losses}"]


def read_scores(file: Path) -> dict[str, float]:
    """The scores in a JSON file, by name."""
    scores = parsed(file.read_bytes(), file)
    check_scores(scores, f"{file}: ")
    return scores


def check_scores(scores: Mapping[str, Any], where: str = "") -> None:
    """A ValueError if a score is no number."""
    for name, value in scores.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{where}scores: got {name!r} of {value!r}, wanted a number for each name")


def measured(scores: Mapping[str, float]) -> str:
    """The scores in a table."""
    if not scores:
        return ""
    return "\n".join(["| score | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in scores.items())])


def loading(model: Model, target: Target, dtype: str | None) -> str:
    """Code that loads it."""
    numbers = f", in {dtype}" if dtype else ""
    return f"## Load\n\n{target.about[0].upper()}{target.about[1:]}{numbers}.\n\n```python\n{target.load(model)}\n```"
