"""Is a checkpoint of XLM-R's size, most of it a table of words, compressed, saved and loaded in two minutes and 4 GB?

A table of 250,002 words by 768 and two layers of width 768, random and seeded; 512 texts of at most 32 tokens, whose
ids are drawn as words are in a language, one over their rank. Everything, table, kernels and bits, under one budget of
bytes, as users run it. Each budget in a process of its own, compiling included; "peak" is the most memory that the
process has held so far, with JAX and the float32 weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.seeded import random_encoder
from benchmarks.tables import Row, arguments, at_most, markdown, number, row, write
from benchmarks.timing import Measured, process_peak_bytes

BUDGETS = (0.25, 0.125)
WIDE = {"vocab_size": 250_002, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"vocab_size": 31_000, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
LENGTH, SECONDS, BYTES = 32, 120.0, 4e9
WHOLE = "compress to load"


def stages(budget: float, quick: bool) -> Iterator[Row]:
    """A row for each stage when it is over, and one for all of them."""
    import jax

    import bert_adapter

    model = random_encoder(**(SMALL if quick else WIDE), num_hidden_layers=2)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    batches = list(drawn(model, 16 if quick else 512))
    started = began = time.perf_counter()

    def done(name: str, **more: Any) -> Row:
        nonlocal began
        seconds, began = time.perf_counter() - (started if name == WHOLE else began), time.perf_counter()
        cost = Measured(None, None, seconds, process_peak_bytes())
        return row(f"{budget:.1%}", name, None, "", cost, weight_bytes=weights, **more)

    with tempfile.TemporaryDirectory() as folder:
        small, report = bert_adapter.compress(model, batches, budget=budget, of="bytes", progress=False)
        yield done("compress", stages=report.seconds)
        bert_adapter.save(small, Path(folder) / "small")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        yield done("save", file_bytes=size)
        bert_adapter.load(Path(folder) / "small")
        yield done("load")
    yield done(WHOLE, file_bytes=size)


def drawn(model: Any, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the texts that come with the package, with other words in their places."""
    import bert_adapter
    from bert_adapter.demo import sentences

    rng, vocabulary = np.random.default_rng(0), model.config["vocab_size"]
    chances = 1 / np.arange(1, vocabulary + 1)
    texts = np.resize(np.array(sentences("calibration"), object), count).tolist()
    for batch in bert_adapter.text_batches(model, texts, max_length=LENGTH):
        ids = rng.choice(vocabulary, size=batch["input_ids"].shape, p=chances / chances.sum())
        yield {**batch, "input_ids": ids.astype(batch["input_ids"].dtype)}


def report(rows: list[Row]) -> str:
    """Seconds and memory of each stage, and the bars."""
    cells = [
        [
            line["problem"],
            line["method"],
            f"{line['run_seconds']:.1f}",
            f"{line['peak_bytes'] / 1e9:.2f}",
            number(line.get("file_bytes") and line["file_bytes"] / line["weight_bytes"], ".1%"),
        ]
        for line in rows
    ]
    table = markdown(["bytes kept", "stage", "seconds", "peak GB so far", "the file, of the float32 weights"], cells)
    bars = [
        at_most(f"{line['problem']}: {what}", value, limit)
        for line in rows
        if line["method"] == WHOLE
        for what, value, limit in (
            ("seconds", line["run_seconds"], SECONDS),
            ("peak bytes", float(line["peak_bytes"]), BYTES),
        )
    ]
    return "\n".join([table, "", *bars])


def main(argv: list[str] | None = None) -> None:
    parser = arguments("large_table", __doc__)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.budget:
        for line in stages(options.budget, options.quick):
            print("ROW " + json.dumps(line), flush=True)
        return
    rows = []
    for budget in BUDGETS:
        command = [sys.executable, "-m", "benchmarks.large_table", "--budget", str(budget)]
        ran = subprocess.run(command + ["--quick"] * options.quick, stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line[4:]) for line in ran.stdout.splitlines() if line.startswith("ROW ")]
        print(f"  {budget:.1%}: {rows[-1]['run_seconds']:.1f} s", flush=True)
    text = report(rows)
    print("\n" + text)
    write(options, "large_table", rows, None, __doc__, text)


if __name__ == "__main__":
    main()
