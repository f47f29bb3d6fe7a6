"""The one-liner: a model, some batches and a budget in; a smaller model and a report out."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

import wlra
from bert_adapter.batches import labelled
from bert_adapter.checkpoint import as_model
from bert_adapter.checkpoint.names import SCHEMA, low_rank
from bert_adapter.factorisation import KernelReport, factorise
from bert_adapter.families import predictive
from bert_adapter.importance.fingerprint import of_arrays, of_params
from bert_adapter.importance.gradients import Gradients, Loss, check_gradients
from bert_adapter.importance.sums import Importance, check_model
from bert_adapter.kernels import choose_ranks, select_kernels
from bert_adapter.layers.capture import Batch
from bert_adapter.losses import TaskLoss
from bert_adapter.model import Model, forward
from bert_adapter.ranks import allowed_ranks, check_affordable, check_budget, per_example, plan_for
from bert_adapter.signals import DEFAULT, SIGNALS, as_signal
from bert_adapter.signals.definition import Signal
from bert_adapter.signals.measure import measure_signal
from bert_adapter.signals.weights import reliabilities, solver_weights
from wlra.options import check_options


class Report(NamedTuple):
    """What `compress` did: a report for each kernel, and the seconds that each stage took.

    predicted: the increase of the mean loss, to second order; None where ranks were given, or where the signal is not
      in units of the loss.
    reliability: by path, the share of what was measured, beyond what is simpler, that is no noise, in [0, 1]: the rest
      was shrunk towards what is simpler. It rises with the number of examples. Empty where it is not known.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> small, report = bert_adapter.compress(sample_model(intermediate_size=16), [], budget=0.5, signal="svd")
      >>> report.signal, report.method, len(report.kernels)
      ('svd', 'svd', 6)
    """

    kernels: list[KernelReport]
    method: str
    signal: str
    seconds: dict[str, float]
    predicted: float | None = None
    reliability: Mapping[str, float] = {}

    @property
    def parameters_before(self) -> int:
        """Of the selected kernels."""
        return sum(kernel.parameters_before for kernel in self.kernels)

    @property
    def parameters_after(self) -> int:
        """Of the factors, and of the kernels that stay dense."""
        return sum(kernel.parameters_after for kernel in self.kernels)

    @property
    def dense(self) -> list[str]:
        """The kernels that stay dense, because factors would not be smaller at the rank planned or given."""
        return [kernel.path for kernel in self.kernels if kernel.status == "DENSE"]


def compress(
    model: Model | str | Path | Any,
    batches: Iterable[Batch],
    *,
    budget: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    of: str = "kernels",
    uniform: bool = False,
    multiple_of: int = 1,
    signal: str | Signal = DEFAULT,
    importance: Importance | None = None,
    gradients: Gradients | None = None,
    loss: Loss | None = None,
    method: str | wlra.Method | None = None,
    shrink: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    solver: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Model, Report]:
    """The model with its selected kernels factorised where that makes them smaller, and a report.

    Args:
      model: a `Model`, a directory or Hub id, or an instance of transformers' FlaxBertModel or
        FlaxBertForSequenceClassification.
      batches: what the importance is measured on, mappings of arrays (batch, ...) with "input_ids", "attention_mask"
        and what else the module takes; see `text_batches`. Not the rows that the result will be judged on.
      budget: the share of the selected kernels' parameters to keep, in (0, 1]. It gives each kernel its rank by what
        that saves.
      rank: instead of a budget, of every selected kernel, or by path.
      of: what the budget is a share of; see `plan`.
      uniform: each kernel keeps the same share, not more where it matters more.
      multiple_of: ranks are multiples of it.
      signal: what an error is weighted by, a name in `SIGNALS` or a `Signal` of your own. The default, "shampoo", is
        the marginals of the Fisher information: E[GG'] along a kernel's inputs and E[G'G] along its outputs, with G an
        example's gradient (Gupta et al. 2018).
      importance: what `measure_signal` returned for these kernels of this model, to use instead of measuring on
        `batches`.
      gradients: of which loss. "categorical", "bernoulli" or "gaussian", the distribution that the model predicts; see
        `measure_importance`. By default that of the module's head: of classes, of labels at once, or around values or
        an embedding. No labels are needed. Or a function, as `loss`.
      loss: (output, batch) -> (batch,), each example's loss with its label, whose gradients to take instead; as in
        `finetune` and `loss_increase`.
      method: of `wlra.solve`, by default the one that fits the signal.
      shrink: how far Gram matrices are shrunk towards the identity, and weights per entry towards their separable fit,
        in [0, 1]; if None, as far as they are noise, as far as that is known: see `Report.reliability`.
      include, exclude: regular expressions that select kernels by path; by default all of the encoder.
      seed: of the random directions that stand in for labels.
      file: what was measured is kept there, and a run that was killed goes on from it; see `measure_importance`.
      solver: other options of `wlra.solve_batch` (tol, max_iters, ...).
      progress: whether there are bars on a terminal.

    Raises:
      ValueError: before work starts, for a name, rank or share that cannot be, or an importance or a file that was
        measured on something else; or when a batch does not fit.

    Example:
      >>> import bert_adapter
      >>> from bert_adapter.sample import sample_model
      >>> small, report = bert_adapter.compress(sample_model(intermediate_size=16), [], budget=0.5, signal="svd")
      >>> report.parameters_after <= 0.5 * report.parameters_before
      True
    """
    gradients = check_one_loss(gradients, loss)
    chosen, solved_by = check_signal(signal, gradients, method=method, solver=solver, measured=importance is not None)
    allowed = check_size(rank=rank, budget=budget, of=of, uniform=uniform, multiple_of=multiple_of, shrink=shrink)
    if importance is not None and (file is not None or gradients is not None):
        raise ValueError("file and gradients are for what is measured, and importance has been: wanted either")
    clock = [time.perf_counter()]
    dense = as_model(model)
    if importance is not None:
        check_model(importance, of_params(dense.params))
    shapes = select_kernels(dense, include, exclude)
    ranks, predicted = None if rank is None else choose_ranks(shapes, rank), None
    if budget is not None:
        check_affordable(dense.params, shapes, budget, of=of, allowed=allowed)
    clock.append(time.perf_counter())
    if importance is None and chosen.statistics:
        batches = labelled(dense, batches) if isinstance(gradients, TaskLoss) else batches
        wanted: dict[str, Any] = {"signal": chosen, "gradients": gradients or predictive(dense.module), "seed": seed}
        shown = {"file": file, "progress": progress}
        importance = measure_signal(forward(dense), dense.params, batches, shapes, **wanted, **shown)
    clock.append(time.perf_counter())
    weights = solver_weights(importance, chosen, shapes, shrink)
    if ranks is None:
        assert budget is not None
        limits = {"allowed": allowed, "units": chosen.units, "examples": per_example(importance, chosen)}
        planned = plan_for(dense.params, shapes, weights.__getitem__, budget, of=of, uniform=uniform, **limits)
        ranks, predicted = planned.ranks, planned.predicted if chosen.units == "loss" else None
    clock.append(time.perf_counter())
    how = {"shapes": shapes, "method": solved_by, "solver": solver, "progress": progress}
    params, kernels = factorise(dense.params, weights, ranks, **how)
    clock.append(time.perf_counter())
    trusted = reliabilities(importance, chosen, shapes)
    done = {"method": solved_by.name, "signal": chosen.name, "seconds": stages(clock)}
    report = Report(kernels, **done, predicted=predicted, reliability=trusted)
    config = dense.config | {"low_rank": section(dense, report, seed, importance)}
    return dense._replace(params=params, config=config), report


def check_one_loss(gradients: Gradients | None, loss: Loss | None) -> Gradients | None:
    """Whose gradients are measured, of which at most one is given."""
    if gradients is not None and loss is not None:
        raise ValueError(f"gradients and loss: got both, {gradients!r} and a loss, wanted at most one")
    return gradients if loss is None else loss


def check_signal(
    signal: str | Signal,
    gradients: Gradients | None,
    *,
    method: str | wlra.Method | None,
    solver: Mapping[str, Any] | None = None,
    measured: bool = False,
) -> tuple[Signal, wlra.Method]:
    """The signal and the method, once it is known that they fit each other, and, if it is to be measured, the loss."""
    chosen = as_signal(signal)
    solved_by = method_for(chosen, method, solver)
    if not measured:
        check_labels(chosen, gradients)
    return chosen, solved_by


def check_size(
    *, rank: Any, budget: float | None, of: str, uniform: bool, multiple_of: int, shrink: float | None
) -> range:
    """The ranks that a budget may give, once it is known that all of these can be, together."""
    check_one_size(rank, budget)
    if rank is not None and (uniform or multiple_of != 1 or of != "kernels"):
        raise ValueError("uniform, multiple_of and of say how a budget is spent; got a rank: leave them out")
    check_budget(budget, of, shrink)
    return allowed_ranks(1, None, multiple_of)


def method_for(signal: Signal, method: str | wlra.Method | None, solver: Mapping[str, Any] | None) -> wlra.Method:
    """The method, or else the signal's own, once it is known to fit the signal's weights and the other options."""
    own = check_options(signal.method).method
    chosen = check_options(own if method is None else method, **(solver or {})).method
    if own.kronecker != chosen.kronecker:
        raise ValueError(
            f"signal {signal.name!r} needs a method for {'Kronecker' if own.kronecker else 'other'} weights; got "
            f"{chosen.name!r}, which is not: leave method out, and {own.name!r} is used"
        )
    return chosen


def check_one_size(rank: Any, budget: Any) -> None:
    """Either is given, and the other is not."""
    if (rank is None) == (budget is None):
        raise ValueError(f"wanted exactly one of rank and budget; got rank={rank!r}, budget={budget!r}")


def check_labels(signal: Signal, gradients: Gradients | None) -> None:
    """The gradients are of labels where the signal needs that, and are not where it refuses them."""
    given = callable(gradients) if gradients is None else callable(check_gradients(gradients))
    free, bound = ([name for name, one in SIGNALS.items() if one.needs_labels == needs] for needs in (False, True))
    if signal.needs_labels and not given:
        raise ValueError(
            f"signal {signal.name!r} needs gradients=loss, a function (output, batch) -> (batch,) of examples with "
            f"labels; got {gradients!r}. Signals that need no labels: {', '.join(map(repr, free))}"
        )
    if signal.refuses_labels and given:
        raise ValueError(
            f"signal {signal.name!r} is of the distribution that the model predicts and takes no loss as gradients: "
            f"leave gradients out, or write signal={' or '.join(map(repr, bound))}"
        )


def stages(clock: list[float]) -> dict[str, float]:
    """The seconds of each stage, from the times at which they begin and the last one ends."""
    names = ("load", "importance", "plan", "solve")
    return {name: end - begin for name, begin, end in zip(names, clock[:-1], clock[1:], strict=True)}


def section(dense: Model, report: Report, seed: int, importance: Importance | None) -> dict[str, Any]:
    """The "low_rank" section of config.json: which kernels have which rank, and how that was done."""
    ranks = {kernel.path: kernel.rank for kernel in report.kernels if kernel.status != "DENSE"}
    return {
        "schema": SCHEMA,
        "ranks": low_rank(dense.config) | ranks,
        "method": report.method,
        "signal": report.signal,
        "seed": seed,
        **({} if importance is None else {"calibration": calibration(importance)}),
        "versions": {package.__name__: package.__version__ for package in (wlra, jax, flax)},
    }


def calibration(importance: Importance) -> dict[str, Any]:
    """How many texts it was measured on, and their fingerprint as batches, but not the texts."""
    return {
        "texts": importance.examples,
        "fingerprint": of_arrays(
            {str(i): np.frombuffer(text.encode(), np.uint8) for i, text in enumerate(importance.texts)}
        ),
    }
