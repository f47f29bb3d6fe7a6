"""The one-liner: a model, some batches and a budget in; a smaller model and a report out."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax

import wlra
from bert_adapter.batches import labelled
from bert_adapter.checkpoint.bits import DTYPES, FEWER, as_stored, check_layers, chosen_dtypes, holds, is_matrix
from bert_adapter.checkpoint.names import by_path, dtypes_of, heads_of, low_rank, section_of
from bert_adapter.correcting import corrected_for
from bert_adapter.decompositions import (
    Decompositions,
    check_of,
    check_shrink,
    check_shrinks,
    chosen_signal,
    decompositions,
    restricted,
)
from bert_adapter.exactness import check_runs_on_factors
from bert_adapter.factorisation import KernelReport, factorise
from bert_adapter.families import predictive
from bert_adapter.files import check_writable, path_of
from bert_adapter.flax_objects import is_flax_model
from bert_adapter.head_sizes import check_plain, identities_in, pairs_of, selected_pairs
from bert_adapter.healing import Healing, HealingPlan, follow, healing_plan, known_before
from bert_adapter.importance.gradients import Gradients, Loss, check_gradients
from bert_adapter.importance.measure import check_module, check_reached
from bert_adapter.importance.sums import Importance, check_texts
from bert_adapter.kernels import Shapes, choose_ranks, select_kernels, tables_of
from bert_adapter.kinds import as_model, in_kind
from bert_adapter.latency import Latency
from bert_adapter.layers.capture import Batch
from bert_adapter.layers.integers import check_floats
from bert_adapter.layers.stacks import whole
from bert_adapter.losses import TaskLoss
from bert_adapter.model import Model, is_own
from bert_adapter.model import forward as function_of
from bert_adapter.own import as_rows
from bert_adapter.pairs import NARROW, narrowed, of_whole, reported, with_identities
from bert_adapter.ranks import Budget, Plan, budget_of, check_affordable, needs_bits, plan_for
from bert_adapter.signals import SIGNALS, as_signal
from bert_adapter.signals.definition import Signal
from bert_adapter.signals.measure import measure_signal
from bert_adapter.signals.weights import no_tables, solver_weights
from bert_adapter.steps import check_run
from bert_adapter.tables import Tokens
from bert_adapter.values import check_listed
from wlra.checks import check_count, check_name
from wlra.options import as_method, check_options


class Report(NamedTuple):
    """What `compress` did: a report for each kernel, and the seconds that each stage took.

    predicted: the increase of the mean loss, to second order; None where ranks were given, or where the signal is not
      in units of the loss.
    reliability: by path, the share of what was measured, beyond what is simpler, that is no noise, in [0, 1]: the rest
      was shrunk towards what is simpler. It rises with the number of examples. Empty where it is not known.
    tokens: by path, of factorised tables, how many of their rows the texts looked up, and what the others lose.
    dtypes: by path, the layers that a plan of bytes stores in fewer bits.
    healed: what `heal=` gained, if it was asked for.

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
    tokens: Mapping[str, Tokens] = {}
    dtypes: Mapping[str, str] = {}
    healed: Healing | None = None

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
    forward: Callable[..., Any] | None = None,
    output: int | str | None = None,
    budget: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    of: str | Latency = "kernels",
    flops: float | None = None,
    uniform: bool = False,
    multiple_of: int = 1,
    pairs: bool = False,
    correct: Iterable[Batch] | None = None,
    signal: str | Signal | None = None,
    importance: Importance | Decompositions | None = None,
    gradients: Gradients | None = None,
    loss: Loss | None = None,
    method: str | wlra.Method | None = None,
    shrink: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embeddings: bool = False,
    seed: int = 0,
    file: str | Path | None = None,
    solver: Mapping[str, Any] | None = None,
    heal: Iterable[Batch] | None = None,
    dtype: str | Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[Any, Report]:
    """The model with its selected kernels factorised where that makes them smaller, and a report.

    Args:
      model: a `Model`, a directory or Hub id, (module, params) of any Linen module, any NNX module, or an instance of
        one of transformers' Flax models. What is returned is of the same kind: a `Model` for the first three; a copy of
        the NNX module with other layers in it; an object of a subclass of the Flax model's class.
      batches: what the importance is measured on, mappings of arrays (batch, ...) with "input_ids", "attention_mask"
        and what else the module takes; see `text_batches`. Not the rows that the result will be judged on.
      forward: how a model of your own is called, (params, batch) -> output, or (model, batch) -> output for NNX. By
        default with the entries of the batch that its `__call__` takes by name.
      output: where that returns several arrays, the index, key or attribute of the one that counts; by default
        "logits". It is (batch, width), or (batch, time, width) with padding as batch["attention_mask"] says.
      budget: the share of the selected kernels' parameters to keep, in (0, 1]. It gives each kernel its rank by what
        that saves.
      rank: instead of a budget, of every selected kernel, or by path.
      of: what the budget is a share of; see `plan`. "bytes" selects the table of words too, and chooses in how many
        bits each matrix is stored: the parameters are what is left after that rounding, and `save` stores them so.
      flops: the share of the operations that may be left besides; see `plan`.
      uniform: each kernel keeps the same share, not more where it matters more.
      multiple_of: ranks are multiples of it; of 16 they are fast.
      pairs: whether heads of attention may keep fewer dimensions, all of a layer as many, where that is predicted to
        lose less than factors of query and key, or of value and output, of as many parameters. Kernels are narrower
        then, and faster than factors. The budget is not one of bytes. See `with_identities`.
      correct: batches of other texts without labels, a few thousand tokens, on which it is measured what the
        plan's cuts of each kind of kernel lose: predicted losses are corrected by that before the budget is spent; see
        `corrected`.
      signal: what an error is weighted by, a name in `SIGNALS` or a `Signal` of your own. The default, "combined",
        plans ranks by the marginals of the Fisher information, E[GG'] along a kernel's inputs and E[G'G] along its
        outputs, with G an example's gradient (Gupta et al. 2018); it makes factors by the same, with half of E[GG']
        replaced by E[xx'] of what enters the layer.
      importance: what `measure_signal` returned for these kernels of this model, to use instead of measuring on
        `batches`. A list of batches must then be the one that was measured on, or empty. Or what `decompose` makes of
        the importance: at a second budget nothing is computed again. of="bytes" needs it measured with whole=True.
      gradients: of which loss. "categorical", "bernoulli", "gaussian" or "span", the distribution that the model
        predicts; see `measure_importance`. By default that of the module's head: of classes, of labels at once, of an
        answer's ends, or around values or an embedding. No labels are needed. Or a function, as `loss`.
      loss: (output, batch) -> (batch,), each example's loss with its label, whose gradients to take instead; as in
        `finetune` and `loss_increase`.
      method: of `wlra.solve`, by default the one that fits the signal.
      shrink: how far Gram matrices are shrunk towards the identity, weights per entry towards their separable fit, and
        those of a table's rows towards equal ones, in [0, 1]; if None, as far as they are noise, as far as that is
        known: see `Report.reliability`.
      include, exclude: regular expressions that select kernels by path; by default all of the encoder, and of a model
        of your own all that can be factorised: those of Dense, DenseGeneral and Einsum, NNX's Linear and LinearGeneral.
      embeddings: the table of words (vocabulary, width) too. It becomes `left` (vocabulary, k), in which words are
        looked up, and `right` (k, width). `budget` is then a share of the kernels and the table.
      seed: of the random directions that stand in for labels, and of the order of the texts in healing.
      file: what was measured is kept there, and a run that was killed goes on from it; see `measure_importance`. The
        state of healing is kept beside it, in FILE.healing: delete that once the result is saved, since it fits no
        other.
      solver: other options of `wlra.solve_batch` (tol, max_iters, ...).
      heal: batches of texts without labels, thousands of them, on which the result is trained to the outputs of the
        model as `bert_adapter.heal` does it by default.
      dtype: what matrices are stored as, as `save` takes it: they are rounded so, healed so, and `save` stores them so.
        By default factors are stored as the matrix was that they are of: 4 bits may lose as much as the ranks.
      progress: whether there are bars on a terminal, or a line a minute elsewhere.

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
    signal, given = chosen_signal(signal, shrink, importance), importance
    chosen, solved_by = check_signal(signal, gradients, method=method, solver=solver, measured=given is not None)
    size: dict[str, Any] = {"of": of, "flops": flops, "uniform": uniform, "multiple_of": multiple_of, "shrink": shrink}
    wanted = check_size(rank=rank, budget=budget, dtype=dtype, **size)
    check_predicted({"pairs": pairs, "correct": correct is not None}, wanted, chosen, solved_by)
    check_given(given, None if heal is not None else file, gradients)  # healing has a state of its own
    check_listed(batches=batches, correct=correct, heal=heal)
    seed, clock = check_count("seed", seed, 0, 2**32 - 1), [time.perf_counter()]
    dense = dense_model(model, forward=forward, output=output, dtype=dtype, budget=wanted)
    batches = list(batches) if is_own(dense) else batches
    seen = seen_in_pairs(model, dense, given) if pairs else dense
    check_fits(given, seen, batches)
    healing = None if heal is None else to_heal(dense, heal, file)
    shapes = selected(dense, batches, include, exclude, embeddings=embeddings or of == "bytes")
    met = selected_pairs(dense, shapes) if pairs else []
    check_tables(chosen, solved_by, tables_of(dense, shapes), shrink)
    ranks = None if rank is None else choose_ranks(shapes, rank)
    check_affordable(dense.params, shapes, wanted, met)
    clock.append(time.perf_counter())
    how: dict[str, Any] = {"signal": chosen, "method": solved_by, "bits": needs_bits(wanted), "progress": progress}
    every = shapes | identities_in(met)
    if given is None and chosen.statistics:
        importance = measured(seen, batches, every, gradients=gradients, seed=seed, file=file, **how)
    clock.append(time.perf_counter())
    known = decomposed(seen.params, importance, every, shrink=shrink, consume=given is None, **how)
    if correct is not None and wanted is not None:
        known = corrected_for(seen, known, correct, budget=wanted, progress=progress)
    spent = Spent(ranks or {}) if wanted is None else spent_by(plan_for(dense.params, known, wanted, met), chosen)
    clock.append(time.perf_counter())
    how = {"shapes": shapes, "method": solved_by, "solver": solver, "progress": progress}
    params, kernels = factorise(dense.params, components_or_weights(known, importance), spent.ranks, **how)
    small = narrowed(dense._replace(params=params), met, spent.heads, known.kernels)
    known = known._replace(kernels={}, given=of_whole(known.given, met, spent.heads))  # components are done with
    done = {"method": solved_by.name, "signal": chosen.name, "seconds": stages([*clock, time.perf_counter()])}
    report = report_of(reported(kernels, met, spent.heads), known, **done, **spent.about)
    config = small.config | {"low_rank": section(small, report, seed, known.calibration)}
    small = in_dtypes(small._replace(config=config), dtype)
    small, report = healed(small, dense, healing, report, seed=seed, file=file, given=known.given, progress=progress)
    return in_kind(model, small), report


def dense_model(
    model: Any,
    *,
    forward: Callable[..., Any] | None,
    output: int | str | None,
    dtype: str | Mapping[str, str] | None,
    budget: Budget | None,
) -> Model:
    """The model, which is one of floats, whose layers are those that dtypes are asked for."""
    dense = as_model(model, forward=forward, output=output)
    check_floats(dense.params, "model")
    check_layers(dtype if isinstance(dtype, Mapping) else {}, by_path(dense.params))
    check_bytes(dense, budget)
    return dense


def check_bytes(dense: Model, budget: Budget | None) -> None:
    """A ValueError for a budget of bytes of a model that is stored in fewer bits than it is here."""
    if budget is not None and budget.of == "bytes" and (stored := dtypes_of(dense.config)):
        path = min(stored)
        raise ValueError(
            f"of: got 'bytes' for a model whose {path} is stored in {stored[path]}: wanted one in floats, as "
            f"save(model, directory, dtype='float32') writes it: the budget chooses the bits"
        )


def that_fit(params: Any, dtypes: Mapping[str, str]) -> dict[str, str]:
    """Of what layers are to be stored as, by path, that which holds the numbers of their matrices."""
    beyond = set()
    for path, leaf in by_path(params).items():
        layer = path.rpartition("/")[0]
        if layer in dtypes and is_matrix(path, leaf) and not holds(dtypes[layer], leaf):
            beyond.add(layer)
    return {layer: dtype for layer, dtype in dtypes.items() if layer not in beyond}


class Spent(NamedTuple):
    """What a budget goes to: the ranks, the dimensions of heads, and what the report says of it."""

    ranks: Mapping[str, int]
    heads: Mapping[str, int] = {}
    about: Mapping[str, Any] = {}


def spent_by(planned: Plan, signal: Signal) -> Spent:
    """That of a plan."""
    predicted = planned.predicted if signal.units == "loss" else None
    return Spent(planned.ranks, planned.heads, {"dtypes": planned.dtypes, "predicted": predicted})


def seen_in_pairs(model: Any, dense: Model, given: Importance | Decompositions | None) -> Model:
    """The model with identities, on which importance is measured, or a ValueError if there can be none."""
    if is_flax_model(model):
        name = type(model).__name__
        raise ValueError(
            f"pairs: got an object of {name}, whose heads are all of one size, wanted a Model or a directory"
        )
    found = with_identities(dense)
    measured = () if given is None else given.shapes if isinstance(given, Decompositions) else given.sums
    if given is not None and not any(path in measured for pair in pairs_of(dense) for path in pair.identities):
        raise ValueError(
            "importance: got one without identities, wanted that of probe = with_identities(model), measured for "
            "select_kernels(probe), which tells what heads of fewer dimensions lose"
        )
    return found


def check_predicted(asked: Mapping[str, bool], budget: Budget | None, signal: Signal, method: wlra.Method) -> None:
    """A ValueError if "pairs" or "correct" is asked for, and no loss is predicted that it could go by."""
    for name in (name for name, wanted in asked.items() if wanted):
        if budget is None or budget.uniform:
            got = "a rank" if budget is None else "uniform"
            raise ValueError(
                f"{name}: got {got}, wanted a budget, which is spent where the loss is predicted to rise least"
            )
        if not (can_pair(signal) and method == as_method(signal.method)):
            fitting = ", ".join(repr(name) for name, one in SIGNALS.items() if can_pair(one))
            raise ValueError(
                f"{name}: got signal {signal.name!r} and method {method.name!r}, wanted a signal in units of the loss "
                f"and its own closed form: {fitting}, and no method"
            )
    if asked["pairs"] and budget is not None:
        check_unit_of_pairs(budget)


def check_unit_of_pairs(budget: Budget) -> None:
    """A ValueError for a budget of which the costs of heads are not known."""
    if budget.of == "bytes":
        raise ValueError("pairs: got a budget of bytes, wanted one of kernels, parameters, flops or time")
    if isinstance(budget.of, Latency) and not budget.of.heads:
        raise ValueError("pairs: got times without those of heads, wanted of=measure_latency(model, ..., pairs=True)")


def can_pair(signal: Signal) -> bool:
    """Whether its components are known, and say what heads of fewer dimensions lose beside factors."""
    return signal.units == "loss" and as_method(signal.method).kronecker


def selected(
    dense: Model, batches: Iterable[Batch], include: str | None, exclude: str | None, *, embeddings: bool
) -> dict[str, tuple[int, int]]:
    """What `select_kernels` finds; a model of the caller's own must run on exact factors of it."""
    check_plain(dense)
    first = next(iter(batches), None) if is_own(dense) else None
    shapes = select_kernels(dense, include, exclude, embeddings=embeddings, batch=first)
    if first is not None:
        check_runs_on_factors(dense, shapes, first)
    return shapes


def report_of(kernels: list[KernelReport], known: Decompositions, **done: Any) -> Report:
    """What was done, and how far it can be trusted."""
    return Report(kernels, reliability=known.reliability, tokens=known.tokens, **done)


def measured(
    dense: Model,
    batches: Iterable[Batch],
    shapes: Shapes,
    *,
    signal: Signal,
    method: wlra.Method,
    bits: bool,
    gradients: Gradients | None,
    **how: Any,
) -> Importance:
    """What the signal needs to know, with the gradients that are given or those of the head's distribution.

    In whole matrices where bits are planned, or where the method is none that cuts what is decomposed.
    """
    how["whole"] = bits or method != as_method(signal.method)
    batches = labelled(dense, batches) if isinstance(gradients, TaskLoss) else batches
    chosen = gradients or predictive(dense.module)
    run = as_rows(function_of(dense), chosen)
    if isinstance(batches, Sequence) and batches and set(signal.statistics) - {"inputs"}:
        check_reached(run, dense.params, batches[0], shapes)
    return measure_signal(run, dense.params, batches, shapes, signal=signal, gradients=chosen, **how)


def check_fits(given: Importance | Decompositions | None, dense: Model, batches: Iterable[Batch]) -> None:
    """A ValueError for what was measured on another model, or module with the same parameters, or on other batches."""
    check_of(given, dense.params)
    measured = given.measured if isinstance(given, Decompositions) else given
    check_module(measured, dense)
    check_texts(measured, batches if isinstance(batches, Sequence) else ())


def check_given(given: Any, file: Any, gradients: Any) -> None:
    """A ValueError for what is of a measurement, where one is given."""
    if given is not None and (file is not None or gradients is not None):
        raise ValueError("file and gradients are for what is measured, and importance has been: wanted either")


def to_heal(dense: Model, batches: Iterable[Batch], file: str | Path | None) -> HealingPlan:
    """The texts to heal on, once it is known that they fit, and that the state can be kept or gone on from."""
    if (state := beside(file)) is not None:
        check_writable(state)
    plan = healing_plan(dense, dense, batches)
    if state is not None and state.exists():
        check_run(known_before(dense, plan), state)
    return plan


def healed(
    small: Model,
    dense: Model,
    plan: HealingPlan | None,
    report: Report,
    *,
    seed: int,
    file: str | Path | None,
    given: Mapping[str, Any],
    progress: bool,
) -> tuple[Model, Report]:
    """The model as it is stored, after `heal` if there is a plan for it, and the report with what that gained."""
    if plan is not None:
        small, gained = follow(small, dense, plan, seed=seed, file=beside(file), progress=progress, given=given)
        report = report._replace(healed=gained, seconds=report.seconds | {"heal": gained.seconds})
    return small._replace(params=as_stored(small.params, dtypes_of(small.config), given)), report


def in_dtypes(small: Model, dtype: str | Mapping[str, str] | None) -> Model:
    """The model whose config says what its matrices are stored as, if that is given."""
    if dtype is None:
        return small
    found = chosen_dtypes(dtype, by_path(small.params), dtypes_of(small.config))
    fewer = {path: name for path, name in found.items() if name in FEWER}
    section = section_of(small.config.get("low_rank") or {}, low_rank(small.config), fewer)
    return small._replace(config=small.config | {"low_rank": section})


def beside(file: str | Path | None) -> Path | None:
    """The file of the state of healing, beside that of what was measured."""
    return None if file is None else path_of(file).with_name(f"{path_of(file).name}.healing")


def decomposed(
    params: Any,
    importance: Importance | Decompositions | None,
    shapes: Shapes,
    *,
    signal: Signal,
    shrink: float | None,
    method: wlra.Method,
    **how: Any,
) -> Decompositions:
    """What is given for the kernels, if it is decomposed for the method, or else the decompositions."""
    if not isinstance(importance, Decompositions):
        return decompositions(params, importance, shapes, signal=signal, shrink=shrink, method=method, **how)
    known = restricted(importance, shapes)
    if method != as_method(signal.method) or any(each.left is None for each in known.kernels.values()):
        raise ValueError(
            f"importance: decomposed for the closed form of signal {signal.name!r}; method {method.name!r} needs the "
            f"importance itself, as measure_signal returned it"
        )
    return known


def components_or_weights(known: Decompositions, importance: Importance | Decompositions | None) -> dict[str, Any]:
    """By path, the components where they are known, and the weights for the solver elsewhere."""
    left = {path: known.shapes[path] for path, each in known.kernels.items() if each.left is None}
    if not left:
        return dict(known.kernels)
    assert not isinstance(importance, Decompositions)
    return {**known.kernels, **solver_weights(importance, known.signal, left, known.shrink)}


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
    *,
    rank: Any,
    budget: float | None,
    of: str | Latency,
    flops: float | None,
    uniform: bool,
    multiple_of: int,
    shrink: float | None,
    dtype: Any = None,
) -> Budget | None:
    """The budget, if there is one, once it is known that all of these can be, together."""
    check_one_size(rank, budget)
    for name in () if dtype is None else dtype.values() if isinstance(dtype, Mapping) else (dtype,):
        check_name("dtype", name, DTYPES)
    if dtype is not None and of == "bytes":
        raise ValueError("dtype: got one with of='bytes', which chooses it for each matrix: wanted either")
    check_shrink(shrink)
    if budget is not None:
        return budget_of(budget, of, flops=flops, uniform=uniform, multiple_of=multiple_of)
    if uniform or multiple_of != 1 or of != "kernels" or flops is not None:
        raise ValueError("uniform, multiple_of, of and flops say how a budget is spent; got a rank: leave them out")
    return None


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


def check_tables(signal: Signal, method: wlra.Method, tables: Sequence[str], shrink: float | None) -> None:
    """A ValueError if the signal has no weights for tables, or the method is not the closed form that these take.

    Or if there are none, and `shrink` is for them alone.
    """
    check_shrinks(signal, shrink, bool(tables))
    if tables and signal.tables is None:
        raise ValueError(no_tables(signal, tables[0]))
    if tables and method != as_method(signal.method):
        raise ValueError(
            f"method: got {method.name!r} for the table {tables[0]}, wanted the closed form of signal {signal.name!r}: "
            f"leave method out, or exclude the table"
        )


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


def section(dense: Model, report: Report, seed: int, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The "low_rank" section of config.json: which kernels have which rank, and how that was done.

    Factors are stored as the matrix was that they are of, if their numbers can be.
    """
    ranks = {whole(each.path): each.rank for each in report.kernels if each.status not in ("DENSE", NARROW)}
    dtypes = that_fit(dense.params, dtypes_of(dense.config)) | dict(report.dtypes)
    heads = heads_of(dense.config)
    about = {
        **({"heads": heads} if heads else {}),
        "method": report.method,
        "signal": report.signal,
        "seed": seed,
        **({"calibration": dict(calibration)} if calibration else {}),
        "versions": {package.__name__: package.__version__ for package in (wlra, jax, flax)},
    }
    return section_of(about, low_rank(dense.config) | ranks, dtypes)
