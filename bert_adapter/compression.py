"""The one-liner: a model, some batches and a budget in; a smaller model and a report out."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax

import wlra
from bert_adapter.checkpoint import as_model
from bert_adapter.checkpoint.names import SCHEMA, low_rank
from bert_adapter.factorisation import Row, factorise
from bert_adapter.families import predictive
from bert_adapter.importance.gradients import Loss
from bert_adapter.importance.sums import Importance
from bert_adapter.kernels import choose_ranks, select_kernels
from bert_adapter.layers.capture import Batch
from bert_adapter.model import Model, forward
from bert_adapter.ranks import check_budget, per_example, plan_for
from bert_adapter.signals import SIGNALS, measure_signal, reliabilities, solver_weights
from wlra.checks import check_count, check_name
from wlra.options import check_options


class Report(NamedTuple):
    """What `compress` did: a row per kernel, and the seconds that each stage took.

    predicted: the increase of the mean loss, to second order; None where ranks were given.
    reliability: by path, the share of what was measured, beyond what is simpler, that is no noise, in [0, 1]: the rest
      was drawn towards what is simpler. It rises with the number of examples. Empty where it is not known.
    """

    rows: list[Row]
    method: str
    importance: str
    seconds: dict[str, float]
    predicted: float | None = None
    reliability: dict[str, float] = {}  # noqa: RUF012 of a NamedTuple, which no one can change

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
    budget: float | None = None,
    of: str = "kernels",
    uniform: bool = False,
    multiple_of: int = 1,
    rank: int | Mapping[str, int] | None = None,
    importance: str = "shampoo",
    method: str | None = None,
    shrink: float | None = None,
    loss: Loss | None = None,
    measured: Importance | None = None,
    include: str = r"^(bert/)?encoder/",
    exclude: str | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> tuple[Model, Report]:
    """The model with its selected kernels factorised where that makes them smaller, and a report.

    Args:
      model: a `Model`, a directory or Hub id, or an instance of transformers' FlaxBertModel or
        FlaxBertForSequenceClassification.
      batches: what the importance is measured on, mappings of arrays (batch, ...) with "input_ids", "attention_mask"
        and what else the module takes; see `text_batches`. Not the rows that the result will be judged on.
      budget, of: the share of the selected kernels' parameters to keep, in (0, 1], or of what else `plan` knows. It
        gives each kernel its rank, a multiple of `multiple_of`, by what that saves; with `uniform`, each kernel keeps
        the same share.
      rank: instead of a budget, of every selected kernel, or by path.
      importance: "shampoo", the correlations of a kernel's gradients along its inputs and along its outputs;
        "kronecker", those of inputs and of output gradients; "activation", of inputs alone; "eigenbasis", a weight per
        entry in the coordinates of "kronecker", two passes; "fisher", a weight per entry of the kernel, from the
        gradients of `loss`; "exact", the same of the model's own predictive distribution; "row", a weight per input;
        "none".
      method: of `wlra.solve`, by default the one that fits the importance; `options` (tol, max_iters, ...) go there.
      shrink: how far Gram matrices are drawn towards the identity, and weights per entry towards their separable fit,
        in [0, 1]; if None, as far as they are noise, as far as that is known: see `Report.reliability`.
      loss: (output, batch) -> (batch,), each example's loss with its label. If None, no labels are needed: the
        gradients are those of the model's own predictive distribution; see `measure_importance`.
      measured: what `measure_signal` returned for these kernels, to use instead of measuring on `batches`.
      include, exclude: regular expressions that select kernels by path; by default all of the encoder.
      seed: of the random directions that stand in for labels.
      file: what was measured is kept there, and a run that was killed goes on from it; see `measure_importance`.

    Raises:
      ValueError: before work starts, for a name, rank or share that cannot be; or when a batch does not fit.
    """
    check_name("importance", importance, SIGNALS)
    signal = SIGNALS[importance]
    method = method or signal.method
    check_options(method, **options)
    if (signal.method == "kronecker") != (method == "kronecker"):
        raise ValueError(
            f"method 'kronecker' is for importance 'shampoo', 'kronecker' and 'activation', and they for it; "
            f"got {method!r} and {importance!r}"
        )
    if measured is None and importance in ("fisher", "exact") and (importance == "fisher") != (loss is not None):
        wanted = "'fisher' needs loss=, of examples with labels" if loss is None else "'exact' takes no loss"
        raise ValueError(f"importance {wanted}: write importance='exact' without labels, 'fisher' with them")
    if (rank is None) == (budget is None):
        raise ValueError(f"wanted exactly one of rank and budget; got rank={rank!r}, budget={budget!r}")
    check_budget(budget, of, shrink)
    multiple_of = check_count("multiple_of", multiple_of, 1)
    began = time.perf_counter()
    dense = as_model(model)
    shapes = select_kernels(dense.params, include, exclude)
    ranks = None if rank is None else choose_ranks(shapes, rank)
    loaded = time.perf_counter()
    if measured is None and importance != "none":
        measured = measure_signal(
            forward(dense),
            dense.params,
            batches,
            shapes,
            importance,
            loss=loss or predictive(dense.module),
            seed=seed,
            file=file,
            progress=progress,
        )
    weighed = time.perf_counter()
    weights, predicted = solver_weights(measured, importance, shapes, shrink), None
    if ranks is None:
        assert budget is not None
        limits = {"of": of, "uniform": uniform, "multiple_of": multiple_of}
        examples = per_example(measured, importance)
        planned = plan_for(dense.params, shapes, weights.__getitem__, examples, budget, **limits)
        ranks, predicted = planned.ranks, planned.predicted
    plotted = time.perf_counter()
    small, rows = factorise(dense.params, weights, ranks, method=method, progress=progress, **options)
    seconds = {
        "load": loaded - began,
        "importance": weighed - loaded,
        "plan": plotted - weighed,
        "solve": time.perf_counter() - plotted,
    }
    section = {
        "schema": SCHEMA,
        "ranks": low_rank(dense.config) | {row.path: row.rank for row in rows if row.status != "DENSE"},
        "method": method,
        "importance": importance,
        "seed": seed,
        "versions": {package.__name__: package.__version__ for package in (wlra, jax, flax)},
    }
    compressed = dense._replace(params=small, config=dense.config | {"low_rank": section})
    return compressed, Report(rows, method, importance, seconds, predicted, reliabilities(measured, importance, shapes))
