"""What is accepted, and what is refused?

Every kind of input is tried, and every sentence is the one that the call raised:

    python -m benchmarks.accepted
"""

import argparse
import contextlib
import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.sparse
from jax.experimental.sparse import BCOO, BCSR

import bert_adapter
import wlra
from benchmarks.tables import markdown
from bert_adapter.families.stages import MODES
from bert_adapter.sample import sample_model
from wlra.sklearn import WLRA

PAGE = Path(__file__).parent.parent / "docs" / "accepted.md"
INTRODUCTION = """# What is accepted, what is refused

*This page is made by `python -m benchmarks.accepted`, which tries every line.*

What can be converted exactly is: into its own precision first, then, by powers of two, into units that float32 holds
(float64 where JAX has it enabled), and results come back in yours. Where float32 cannot hold weights so far apart next
to each other, the problem is solved in float64 and the result cast back. What cannot be converted is refused before
work starts, in a sentence that names it. Arrays that a caller's `jit` or `vmap` traces have no values yet: their dtypes
and shapes are checked, and a status says the rest: also of subnormal numbers, which processors take for zero.

* A **masked** entry of `W` or of `weights` is not known: its weight is 0. Elsewhere a mask is refused.
* A **missing** value (`None`, `pandas.NA`, NaN) is NaN: fine in `W` where the weight is 0, and refused elsewhere.
* Of a **sparse** matrix, what is stored is known, explicit zeros too, and everything else has weight 0. Duplicates are
  summed as SciPy does; `BCOO` with duplicates is refused.
* **Data frames** are taken by position. If labels of `W` and `weights` are the same in another order, that is refused.
"""

D = np.outer([1.0, 2.0, 3.0, 4.0], [1.0, 0.5, 2.0])
SEEN = D != 1.5
ONES = np.ones(D.shape)
KEY = jax.random.key(0)

Call = Callable[[Any, Any, str], Any]
CALLS: dict[str, Call] = {
    "`solve`": lambda W, weights, method: wlra.solve(W, weights, 1, method=method, max_iters=1),
    "`solve_batch`": lambda W, weights, method: wlra.solve_batch(
        stacked(W), stacked(weights), 1, method=method, max_iters=1
    ),
    "`solve_path`": lambda W, weights, method: wlra.solve_path(W, weights, [1], method=method, max_iters=1),
    "`select_rank`": lambda W, weights, method: wlra.select_rank(
        W, weights, [1], key=KEY, folds=2, method=method, max_iters=1
    ),
    "`WLRA`": lambda W, weights, method: WLRA(1, method=method, max_iters=1).fit(W, weights=weights),
}


def stacked(value: Any) -> Any:
    """The same kind of input with the axis of a batch, where it has one."""
    if isinstance(value, np.ndarray | jax.Array):
        return value[None] if value.ndim else value
    if isinstance(value, wlra.Kronecker):
        return wlra.Kronecker(stacked(value.row), stacked(value.col))
    return [value] if isinstance(value, list | pd.DataFrame) else value


def frame(dtype: str, missing: bool = False) -> pd.DataFrame:
    """A data frame of whole numbers, one of them missing."""
    table = pd.DataFrame(np.int64(2 * D)).astype(dtype)
    if missing:
        table.iloc[2, 1] = pd.NA
    return table


def sparse(duplicates: bool = False) -> Any:
    """A sparse array of SciPy."""
    rows, cols = np.nonzero(SEEN)
    rows, cols = (np.append(axis, axis[:1]) if duplicates else axis for axis in (rows, cols))
    return scipy.sparse.coo_array((D[rows, cols], (rows, cols)), shape=D.shape)


TARGETS: dict[str, Any] = {
    "float64": D,
    "float32": D.astype(np.float32),
    "float16": D.astype(np.float16),
    "bfloat16": jnp.asarray(D, jnp.bfloat16),
    "`numpy.longdouble`": D.astype(np.longdouble),
    "integers beyond 32 bits": np.int64(2e9 * D),
    "Python's integers beyond 64 bits": [[2**70, 2**71], [2**71, 2**72]],
    "booleans": D > 1,
    "1e-42: beyond float32": 1e-42 * D,
    "1e40: beyond float32": 1e40 * D,
    "1e80: factors beyond float32": 1e80 * D,
    "another byte order": D.astype(">f8"),
    "read-only, strided": np.broadcast_to(D[:, :, None], (*D.shape, 2))[::-1, :, 0],
    "an array of JAX": jnp.asarray(D),
    "a list of arrays of JAX, of several dtypes": [
        jnp.array([3_000_000_000, 1], jnp.uint32),
        jnp.array([1, 1], jnp.bfloat16),
    ],
    "a list of lists": D.tolist(),
    "None in a list, weight 1": [[1.0, None], [2.0, 3.0]],
    "numbers as objects": D.astype(object),
    "`Fraction`": np.vectorize(Fraction, otypes=[object])(D),
    "`Decimal`": np.vectorize(Decimal, otypes=[object])(D),
    "`Decimal` below float64": [[Decimal("1e-400"), Decimal(1)], [Decimal(1), Decimal(2)]],
    "spans of time as objects": np.full(D.shape, np.timedelta64(5, "s"), object),
    "`numpy.ma`": np.ma.masked_array(D, ~SEEN),
    "a list of `numpy.ma`": [np.ma.masked_array(row, ~seen) for row, seen in zip(D, SEEN, strict=True)],
    "`DataFrame`": pd.DataFrame(D),
    "`DataFrame`, nullable": frame("Int64"),
    "`DataFrame`, `pandas.NA`, weight 1": frame("Int64", missing=True),
    "`DataFrame` with dates": pd.DataFrame({"a": pd.to_datetime(["2020-01-01", "2020-01-02"]), "b": [1.0, 2.0]}),
    "`scipy.sparse`": sparse(),
    "`scipy.sparse` with duplicates": sparse(duplicates=True),
    "`BCOO`": BCOO.fromdense(jnp.asarray(D)),
    "`BCSR`": BCSR.from_bcoo(BCOO.fromdense(jnp.asarray(D))),
    "text": D.astype(str),
    "text among numbers": np.where(SEEN, D.astype(object), "1.5"),
    "complex": D + 0j,
    "dates": np.zeros(D.shape, "datetime64[s]"),
    "spans of time": np.zeros(D.shape, "timedelta64[s]"),
    "NaN, weight 1": np.where(SEEN, D, np.nan),
    "one axis": D[0],
    "a number": np.float64(3),
    "too many axes": np.stack([D, D]),
    "empty": D[:0],
    "rows of unequal length": [[1.0, 2.0], [3.0]],
}
WEIGHTS: dict[str, Any] = {
    "None": None,
    "per entry": ONES,
    "per row": ONES[:, :1],
    "a number": np.float64(2),
    "a mask of booleans": SEEN,
    "integers beyond 32 bits": np.full(D.shape, 2**40),
    "1e-42: beyond float32": 1e-42 * ONES,
    "1e40: beyond float32": 1e40 * ONES,
    "1e-100 beside 1e100": 10.0 ** np.linspace(-100, 100, D.size).reshape(D.shape),
    "`numpy.ma`": np.ma.masked_array(ONES, ~SEEN),
    "`DataFrame`": pd.DataFrame(ONES),
    "None in a list": [[1.0, None, 1.0]] * 4,
    "sparse, of a dense W": sparse(),
    "negative": -ONES,
    "all zero": 0 * ONES,
    "one axis": ONES[0],
    "text": ONES.astype(str),
    "complex": ONES + 0j,
    '`Kronecker`, `method="svd"`': wlra.Kronecker(np.eye(4), np.eye(3)),
}


def read(texts: Any) -> Any:
    """The texts as a model's batch."""
    return bert_adapter.tokenizer(model())(texts)


def classes(given: Any, labels: int = 2, **head: Any) -> Any:
    """What is given as the labels of two texts, to a head of so many."""
    headed = bert_adapter.with_head(model(), labels, **head)
    return bert_adapter.labelled_batches(headed, bert_adapter.LabelledTexts(["a fox", "a dog"], given))


@functools.cache
def model(**entries: Any) -> bert_adapter.Model:
    """A small BERT whose config has these entries."""
    return sample_model(**entries)


def in_file(content: bytes, reader: Callable[[Path], Any]) -> Any:
    """What is read of a file; an error calls it by its name alone."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("rows.tsv").write_bytes(content)
        return reader(Path("rows.tsv"))


def reread(config: dict[str, Any] | None = None, files: dict[str, bytes] | None = None) -> Any:
    """A model that was saved, and loaded with other entries of its config.json, or other files beside it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        bert_adapter.save(model(), "m")
        entries = json.loads(Path("m/config.json").read_text("utf-8")) | (config or {})
        for name, content in ({"config.json": json.dumps(entries).encode()} | (files or {})).items():
            Path("m", name).parent.mkdir(exist_ok=True)
            Path("m", name).write_bytes(content)
        return bert_adapter.load("m")


def pooled(mode: str | list[str]) -> Any:
    """A model that was saved, and loaded with a file that declares how it pools."""
    return reread(files={"1_Pooling/config.json": json.dumps({"pooling_mode": mode}).encode()})


def compress(batches: Sequence[Any] = (), of: bert_adapter.Model | None = None, **options: Any) -> Any:
    """A compression of a small model."""
    return bert_adapter.compress(model() if of is None else of, batches, progress=False, **options)


def with_nan() -> bert_adapter.Model:
    """The small model with NaN for all its parameters."""
    return model()._replace(params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model().params))


BATCH = {"input_ids": np.array([[2, 5, 6, 3]], np.int32)}
SVD: dict[str, Any] = {"signal": "svd"}  # which needs no batches
TEXTS = ["a red fox", "a dog"]
MODULES = b'[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_%s", "type": "%s"}]'
READ: dict[str, Callable[[], Any]] = {
    "a single text": lambda: read("a red fox"),
    "a tuple, an array, a Series, a generator": lambda: [
        read(texts) for texts in (tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS), iter(TEXTS))
    ],
    "pairs": lambda: read([("a fox", "a dog"), ("it", "a dog")]),
    "a text that is empty": lambda: read(["", "a dog"]),
    "None among texts": lambda: read(["a fox", None]),
    "a number among texts": lambda: read(["a fox", 3]),
    "bytes among texts": lambda: read(["a fox", b"a dog"]),
    "half of a surrogate pair": lambda: read(["a fox", "\ud800"]),
    "pairs among texts": lambda: read(["a fox", ("it", "a dog")]),
    "no texts": lambda: read([]),
    "a dictionary": lambda: read({"a fox": 1}),
    "a set": lambda: read(set(TEXTS)),
    "`max_length=2`": lambda: bert_adapter.tokenizer(model(), max_length=2),
}
LABELS: dict[str, Callable[[], Any]] = {
    "numbers of classes": lambda: classes([0, 1]),
    "a class beyond the head": lambda: classes([0, 2]),
    "-1, as in GLUE's test files": lambda: classes([0, -1]),
    "a fraction": lambda: classes([0, 1.5]),
    "None": lambda: classes([0, None]),
    "a name that the config does not have": lambda: classes(["LABEL_0", "good"]),
    "values, of a regression": lambda: classes([0.5, 2.5], labels=1),
    "NaN, of a regression": lambda: classes([0.5, np.nan], labels=1),
    "rows of 0 and 1, of `multi_label_classification`": lambda: classes(
        [[0, 1], [1, 1]], problem_type="multi_label_classification"
    ),
    "fewer than texts": lambda: classes([0]),
}
FILES: dict[str, Callable[[], Any]] = {
    "a byte-order mark, CRLF": lambda: in_file(b"\xef\xbb\xbfsentence\tlabel\r\na fox\t1\r\n", bert_adapter.read_rows),
    "UTF-16": lambda: in_file("a fox\n".encode("utf-16"), bert_adapter.read_texts),
    "Latin-1": lambda: in_file("a fox\nune b\u00eate\n".encode("latin-1"), bert_adapter.read_texts),
    "a row of another length": lambda: in_file(b"sentence\tlabel\na fox\n", bert_adapter.read_rows),
    "a label that is missing": lambda: in_file(b"sentence\tlabel\na fox\t\n", bert_adapter.read_rows),
    "blank lines alone": lambda: in_file(b"\n\n", bert_adapter.read_texts),
}
DIRECTORIES: dict[str, Callable[[], Any]] = {
    f"pooling: {', '.join(MODES)}, and all of them": lambda: [pooled(mode) for mode in (*MODES, list(MODES))],
    "a pooling that is not known": lambda: pooled("median"),
    "a module that is not known": lambda: reread(
        files={"modules.json": MODULES % (b"LSTM", b"sentence_transformers.models.LSTM")}
    ),
    "another family": lambda: reread({"model_type": "t5"}),
    "another architecture": lambda: reread({"architectures": ["BertForQuestions"]}),
    "an entry that changes the arithmetic": lambda: reread({"position_embedding_type": "relative_key"}),
    "a null entry": lambda: reread({"hidden_act": None}),
    "a size that is no number": lambda: reread({"hidden_size": "16"}),
    "weights that are a pointer to a file": lambda: reread(
        files={"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}
    ),
}
COMPRESSION: dict[str, Callable[[], Any]] = {
    "a token id beyond the table": lambda: compress([{"input_ids": BATCH["input_ids"] + 100}], budget=0.5),
    "parameters with NaN": lambda: compress([BATCH], with_nan(), budget=0.5),
    "no batches": lambda: compress(budget=0.5),
    '`include="("`': lambda: compress(budget=0.5, include="(", **SVD),
    "`include` that selects nothing": lambda: compress(budget=0.5, include="decoder", **SVD),
    "a budget and a rank": lambda: compress(budget=0.5, rank=2, **SVD),
    "a budget above 1": lambda: compress(budget=1.5, **SVD),
    "a rank of 0": lambda: compress(rank=0, **SVD),
    "a signal that is not known": lambda: compress(budget=0.5, signal="magic"),
    "compressed already": lambda: compress((), compress(rank=2, **SVD)[0], rank=2, **SVD),
    "importance of another model": lambda: compress((), model(hidden_size=32), budget=0.5, importance=measured()),
    "importance of other batches": lambda: compress([BATCH, BATCH], budget=0.5, importance=measured()),
}
ADAPTER = {
    "texts": READ,
    "labels": LABELS,
    "files of texts and rows": FILES,
    "directories of models": DIRECTORIES,
    "what is compressed": COMPRESSION,
}
"""Of `bert_adapter`, by headings: an input in words, and a call that gives it to the adapter."""


@functools.cache
def measured() -> bert_adapter.Importance:
    """The importance of the small model's kernels."""
    run, kernels = bert_adapter.forward(model()), bert_adapter.select_kernels(model())
    return bert_adapter.measure_signal(run, model().params, [BATCH], kernels, progress=False)


REFUSALS = ValueError, TypeError, FloatingPointError  # scikit-learn refuses sparse X by a TypeError


def attempt(call: Callable[[], Any]) -> str:
    """An empty string if the call is accepted, else the sentence that refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one iteration that does not converge
        try:
            call()
        except REFUSALS as error:
            return str(error).strip().partition("\n")[0]
    return ""


def line(name: str, outcomes: Sequence[str]) -> list[str]:
    """The cells of a line: which calls accept the input, and the sentences of those that do not.

    Of sentences that begin alike, but for the argument's name, the first.
    """
    sentences = {" ".join(outcome.split()[1:4]): outcome.replace("|", "\\|") for outcome in outcomes[::-1] if outcome}
    return [name, *("no" if outcome else "yes" for outcome in outcomes), "<br>".join(list(sentences.values())[::-1])]


def of_solver(inputs: dict[str, Any], give: Callable[[Call, Any], Any]) -> str:
    """The table of the solver's five doors."""
    lines = [
        line(name, [attempt(functools.partial(give, call, value)) for call in CALLS.values()])
        for name, value in inputs.items()
    ]
    return markdown(["", *CALLS, "refused with"], lines)


def as_target(call: Call, W: Any) -> Any:
    """The call on a target; on a sparse one by a method that takes it."""
    kind = scipy.sparse.issparse(W) or isinstance(W, BCOO | BCSR)
    return call(W, None, "als" if kind else "svd")


def page() -> str:
    """The page of the documentation."""
    targets = of_solver(TARGETS, as_target)
    weights = of_solver(WEIGHTS, lambda call, weights: call(D, weights, "svd"))
    parts = [INTRODUCTION, "## The solver: `W`", targets, "## The solver: `weights`", weights]
    for heading, calls in ADAPTER.items():
        lines = [line(name, [attempt(call)]) for name, call in calls.items()]
        parts += [f"## The adapter: {heading}", markdown(["", "accepted", "refused with"], lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.accepted", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=PAGE, help="(%(default)s)")
    parser.parse_args(argv).page.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
