"""The one-liner: a model, some batches and a budget in; a smaller model and a report out."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax

import wlra
from bert_adapter.apply import apply
from bert_adapter.capture import Batch
from bert_adapter.checkpoint import SCHEMA, Model, Texts, load, low_rank, tokenizer
from bert_adapter.factorise import Row, factorise
from bert_adapter.importance import Importance, Loss, measure_importance
from bert_adapter.model import SentenceEmbedder, module_for
from bert_adapter.select import choose_ranks, select_kernels
from wlra.solve import check_options

FLAX_BERTS = ("FlaxBertModel", "FlaxBertForSequenceClassification")
WEIGHTS: dict[str, Callable[[Any, str], Any]] = {
    "fisher": lambda importance, path: importance[path].fisher,
    "kronecker": lambda importance, path: wlra.Kronecker(importance[path].inputs, importance[path].outputs),
    "none": lambda importance, path: None,
}


class Report(NamedTuple):
    """What `compress` did: a row per kernel, and the seconds that each stage took."""

    rows: list[Row]
    method: str
    importance: str
    seconds: dict[str, float]

    @property
    def parameters_before(self) -> int:
        """Of the selected kernels."""
        return sum(row.parameters_before for row in self.rows)

    @property
    def parameters_after(self) -> int:
        """Of the factors, and of the kernels that stay dense."""
        return sum(row.parameters_after for row in self.rows)

    @property
    def dense(self) -> list[str]:
        """The kernels that stay dense, because factors of their rank would not be smaller."""
        return [row.path for row in self.rows if row.status == "DENSE"]


def compress(
    model: Model | str | Path | Any,
    batches: Iterable[Batch],
    *,
    rank: int | Mapping[str, int] | None = None,
    params: float | int | None = None,
    method: str = "anderson",
    importance: str = "fisher",
    loss: Loss | None = None,
    measured: Importance | None = None,
    include: str = r"^(bert/)?encoder/",
    exclude: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Model, Report]:
    """The model with its selected kernels factorised where that makes them smaller, and a report.

    Args:
      model: a `Model`, a directory or Hub id, or an instance of transformers' FlaxBertModel or
        FlaxBertForSequenceClassification.
      batches: what the importance is measured on, mappings of arrays (batch, ...) with "input_ids", "attention_mask"
        and what else the module takes; see `text_batches`. Not the rows that the result will be judged on.
      rank: of every selected kernel, or by path. Or instead:
      params: the share of the selected kernels' parameters to keep, in (0, 1]; each kernel keeps that share.
      method: of `wlra.solve`; `options` (tol, max_iters, ...) go there too.
      importance: "fisher" (a weight per entry), "kronecker" (needs method="kronecker"), "none".
      loss: (output, batch) -> (batch,), each example's loss. If None, no labels are needed: see `measure_importance`.
      measured: what `measure_importance` returned for these kernels, to use instead of measuring on `batches`.
      include, exclude: regular expressions that select kernels by path; by default all of the encoder.
      seed: of the random directions that stand in for labels.

    Raises:
      ValueError: before work starts, for a name, rank or share that cannot be; or when a batch does not fit.
    """
    if importance not in WEIGHTS:
        raise ValueError(f"importance must be one of {', '.join(map(repr, WEIGHTS))}; got {importance!r}")
    if (importance == "kronecker") != (method == "kronecker"):
        raise ValueError(f"importance and method are 'kronecker' both or neither; got {importance!r} and {method!r}")
    check_options(method, **options)
    began = time.perf_counter()
    dense = as_model(model)
    shapes = select_kernels(dense.params, include, exclude)
    ranks = choose_ranks(shapes, rank, params)
    loaded = time.perf_counter()
    if measured is None and importance != "none":
        measured = measure_importance(
            forward(dense), dense.params, batches, shapes, loss=loss, seed=seed, progress=progress
        )
    weighed = time.perf_counter()
    weights = {path: WEIGHTS[importance](measured, path) for path in shapes}
    small, rows = factorise(dense.params, weights, ranks, method=method, progress=progress, **options)
    seconds = {"load": loaded - began, "importance": weighed - loaded, "solve": time.perf_counter() - weighed}
    section = {
        "schema": SCHEMA,
        "ranks": low_rank(dense.config) | {row.path: row.rank for row in rows if row.status != "DENSE"},
        "method": method,
        "importance": importance,
        "seed": seed,
        "versions": {package.__name__: package.__version__ for package in (wlra, jax, flax)},
    }
    compressed = dense._replace(params=small, config=dense.config | {"low_rank": section})
    return compressed, Report(rows, method, importance, seconds)


def as_model(model: Model | str | Path | Any) -> Model:
    """The model itself, the one in a directory, or a transformers FlaxBert's parameters in our module."""
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        return load(model)
    name = type(model).__name__
    if name not in FLAX_BERTS:
        raise ValueError(f"wanted a Model, a directory, or one of transformers' {', '.join(FLAX_BERTS)}; got {name}")
    config = model.config.to_dict() | {"architectures": [name.removeprefix("Flax")]}
    module = module_for(config)
    if isinstance(module, SentenceEmbedder):
        module = module.clone(add_pooling_layer="pooler" in model.params)
    return Model(module, model.params, config, {})


def forward(model: Model) -> Callable[[Any, Batch], Any]:
    """The function (params, batch) -> output of the model's module, dropout off; keys it does not take are ignored.

    The same function for the same module, so that what is compiled for it once serves again.
    """
    return forward_of(model.module)


@functools.cache
def forward_of(module: Any) -> Callable[[Any, Batch], Any]:
    inputs = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

    def run(params: Any, batch: Batch) -> Any:
        return apply(module, params, **{name: batch[name] for name in inputs if name in batch})

    return run


def text_batches(model: Model, texts: Texts, batch_size: int = 16, max_length: int = 128) -> Sequence[Batch]:
    """The texts, or pairs of texts, as batches of about equal length, the longest first.

    The order of the texts is lost.
    """
    encode = tokenizer(model, max_length)
    ordered: Any = sorted(
        texts, key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)), reverse=True
    )
    return [encode(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
