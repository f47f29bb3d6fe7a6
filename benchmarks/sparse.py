"""How long, and in how much memory, are a million ratings of 4000 users and 6000 items fitted at rank 20?

A seeded problem like MovieLens 1M: popularity falls as a power of the rank, and ratings are 1 to 5, from a planted
model of rank 8 with noise. Each method runs in a process of its own, whose peak memory it then is, JAX included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

import wlra
from benchmarks.tables import at_most, markdown, write_page
from benchmarks.timing import environment, process_peak_bytes

USERS, ITEMS, RATINGS, PLANTED, RANK = 4000, 6000, 1_000_000, 8, 20
METHODS = ("als", "anderson", "lbfgs")
SECONDS = 200  # for one method at most


def ratings(seed: int = 0) -> BCOO:
    """The ratings, less the mean of all: each user and item pair at most once."""
    rng = np.random.default_rng(seed)
    places = np.zeros(0, np.int64)
    while len(places) < RATINGS:
        users, items = (popular(rng, count) for count in (USERS, ITEMS))
        places = np.unique(np.append(places, users * ITEMS + items))
    users, items = np.divmod(np.sort(rng.choice(places, RATINGS, replace=False)), ITEMS)
    left, right = rng.normal(size=(USERS, PLANTED)), rng.normal(size=(ITEMS, PLANTED))
    taste = sum(left[users, i] * right[items, i] for i in range(PLANTED)) / np.sqrt(PLANTED)
    stars = np.clip(np.rint(3.5 + 0.8 * taste + 0.5 * rng.normal(size=RATINGS)), 1, 5)
    values = jnp.asarray((stars - stars.mean()).astype(np.float32))
    return BCOO((values, jnp.asarray(np.stack([users, items], axis=1).astype(np.int32))), shape=(USERS, ITEMS))


def popular(rng: np.random.Generator, count: int) -> np.ndarray:
    """So many draws as there are ratings, the i-th of `count` with a chance in proportion to (i + 10)**-0.7."""
    chance = (np.arange(count) + 10.0) ** -0.7
    return rng.choice(count, RATINGS, p=chance / chance.sum())


def measure(method: str, iterations: int) -> dict[str, Any]:
    """One method's loss, times and memory; an iteration is the difference between a long and a short solve."""
    W, empty = ratings(), process_peak_bytes()

    def seconds(count: int) -> tuple[wlra.Result, float]:
        began = time.perf_counter()
        result = jax.block_until_ready(wlra.solve(W, None, RANK, method=method, tol=0, max_iters=count, patience=10**6))
        return result, time.perf_counter() - began

    _, first = seconds(iterations)
    result, long = seconds(iterations)
    peak = process_peak_bytes()
    seconds(1)
    _, short = seconds(1)
    return {
        "problem": f"{USERS} x {ITEMS}, {RATINGS} entries, rank {RANK}",
        "method": method,
        "loss": float(result.loss),
        "stationarity": float(result.stationarity),
        "iterations": int(result.iterations),
        "status": wlra.Status(int(result.status)).name,
        "compile_seconds": first - long,
        "seconds": long,
        "seconds_per_iteration": (long - short) / (iterations - 1),
        "peak_mib": peak / 2**20,
        "before_mib": empty / 2**20,
    }


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.sparse", description=__doc__, formatter_class=formatter)
    parser.add_argument("--iterations", type=int, default=20, help="of each method (%(default)s)")
    parser.add_argument("--only", choices=METHODS, help="one method, in this process, printed only")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.iterations) | environment()))
        return
    rows = []
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.sparse", "--only", method, "--iterations", str(options.iterations)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        print(f"  {method}: {rows[-1]['seconds']:.1f} s", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sparse.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    print("\n" + report(rows))
    write_page(options.output / "sparse.md", __doc__, report(rows))


def report(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, and the verdict on memory."""
    head = [
        "method",
        "iterations",
        "loss",
        "s an iteration",
        "s in all",
        "compile s",
        "peak MiB",
        "of it before solving",
    ]
    body = [
        [
            line["method"],
            line["iterations"],
            f"{line['loss']:.5f}",
            f"{line['seconds_per_iteration']:.2f}",
            f"{line['seconds']:.1f}",
            f"{line['compile_seconds']:.1f}",
            f"{line['peak_mib']:.0f}",
            f"{line['before_mib']:.0f}",
        ]
        for line in rows
    ]
    return f"{markdown(head, body)}\n\n{at_most('peak MiB', max(line['peak_mib'] for line in rows), 1024)}"


if __name__ == "__main__":
    main()
