"""A hook for MkDocs: benchmarks/README.md and benchmarks/results/*.md become the pages of "Evidence"."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))


def on_config(config: Any) -> Any:
    """The pages come before the API reference in the navigation."""
    pages: list[Any] = [{"Overview": "evidence/index.md"}]
    pages += [{path.stem: f"evidence/{path.name}"} for path in RESULTS]
    place = next(i for i, entry in enumerate(config.nav) if "API reference" in entry)
    config.nav.insert(place, {"Evidence": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages and figures, with links as they are between pages and not between files."""
    overview = re.sub(r"\[([^]]*)\]\((?!results/|https?:)[^)]*\)", r"\1", (BENCHMARKS / "README.md").read_text("utf-8"))
    files.append(File.generated(config, "evidence/index.md", content=overview.replace("](results/", "](")))
    for path in RESULTS:
        text = re.sub(r"\[([^]]*)\]\([^)]*\.jsonl\)", r"`\1`", path.read_text("utf-8"))
        files.append(File.generated(config, f"evidence/{path.name}", content=text))
    for path in (BENCHMARKS / "results").glob("*.png"):
        files.append(File.generated(config, f"evidence/{path.name}", abs_src_path=str(path)))
    return files
