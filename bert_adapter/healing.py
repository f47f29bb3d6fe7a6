"""Training without labels: a small model follows the dense one on texts, as long as that helps on other texts."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bert_adapter.checkpoint.bits import Stored, as_stored, factorised_tables, stored_as
from bert_adapter.checkpoint.names import by_path, dtypes_of
from bert_adapter.families import output_of
from bert_adapter.files import check_writable, path_of
from bert_adapter.importance.fingerprint import of_arrays, of_function, of_params
from bert_adapter.kinds import as_model, in_kind
from bert_adapter.layers.capture import Batch, Forward
from bert_adapter.layers.following import leaving, mean_apart
from bert_adapter.layers.integers import check_floats
from bert_adapter.layers.marker import Factorised
from bert_adapter.losses import distillation
from bert_adapter.model import Model, check_batch, check_same_tokens, is_own
from bert_adapter.model import forward as function_of
from bert_adapter.pools import (
    Deal,
    Pool,
    all_of,
    batch_of,
    count_of,
    dealt,
    epochs_of,
    held_out,
    pools_of,
    text_of,
    together,
    unlike,
    unmasked_text_of,
    without,
)
from bert_adapter.progress import track
from bert_adapter.steps import (
    SAVE_EVERY,
    State,
    adamw,
    check_run,
    learning_rates,
    resumed,
    save_state,
    step_function,
)
from bert_adapter.straight_through import as_kept, narrowed, straight_through, widened
from bert_adapter.training import check_teacher
from bert_adapter.values import check_finite
from wlra.checks import check_count, check_number

HELD_OUT = (16, 512)  # one of so many rows is held out, and no more than that many
LOOKS = 12  # how often the held-out loss is measured in a run
SEEN, MOST_EPOCHS = 40_000, 20  # texts that are seen in all, with those that are repeated; and how often at most
BATCH = 16  # texts in a step: 64 of all-MiniLM-L6-v2 take four times as long, and bring less than four steps
RATE, SMALL = 1e-3, 0.25  # the highest rate, for factors of up to that share of their kernels' numbers
LOWER, TRIES = 1 / 3, 4  # what the rate is multiplied by where it proves too high, and how many there are
WARMUP = 0.1  # the share of the steps in which the rate rises
KEPT_BYTES = 2**28  # outputs of the dense model that are kept rather than computed in each epoch
FROZEN = "embedding"  # the name of tables, dense or factorised, most of whose rows the texts do not touch


class TooFewTexts(ValueError):
    """There is not a batch of texts beside those held out."""


class Healing(NamedTuple):
    """What healing gained.

    before, after: the mean distance from the dense model's outputs on the texts that were held out: the divergence of
      its predictions, or half the squared distance. `after` is never above `before`.
    kept: the step whose parameters were kept; 0 for those that were given.
    steps: how many were done.
    losses: by the step, the held-out loss.
    texts, heldout: how many were trained on, and held out.

    Example:
      >>> import bert_adapter
      >>> bert_adapter.Healing(0.5, 0.2, 90, 100, losses={0: 0.5, 90: 0.2}, texts=800, heldout=50, seconds=9.0)
      Healing: 0.5 became 0.2 on 50 texts held out, after 90 of 100 steps on 800 others, in 9 s.
    """

    before: float
    after: float
    kept: int
    steps: int
    losses: Mapping[int, float]
    texts: int
    heldout: int
    seconds: float

    def __repr__(self) -> str:
        """A sentence."""
        done = f"of {self.steps} steps on {self.texts:,} others, in {self.seconds:.0f} s"
        where = f"on {self.heldout:,} texts held out"
        if not self.kept:
            return f"Healing: nothing gained: {self.before:.4g} {where}, not less after any {done}."
        return f"Healing: {self.before:.4g} became {self.after:.4g} {where}, after {self.kept} {done}."


class Recipe(NamedTuple):
    """The loss of each example: how far the output is from that of the dense model, which comes with the batch.

    stored: of the matrices that are trained, which are rounded on the way, and how.
    teach, paths: the dense model, and the layers whose outputs are to be near its own too; none without it.
    """

    run: Forward
    apart: Callable[..., Float[Array, " batch"]]
    weight_decay: float = 0.0
    stored: tuple[Stored, ...] = ()
    teach: Forward | None = None
    paths: frozenset[str] = frozenset()

    def __call__(self, params: Any, beside: "Beside", batch: Batch, key: Any = None) -> Float[Array, " batch"]:
        """How far the output is, and what the layers add to that."""
        output, layers = self.parts(params, beside, batch)
        return output + beside.share * layers

    def parts(self, params: Any, beside: "Beside", batch: Batch) -> tuple[Float[Array, " batch"], Any]:
        """How far the output is, and how far what leaves the layers."""
        whole = joined(straight_through(params, self.stored), beside.frozen)
        if self.teach is None:
            return self.apart(widened(self.run(whole, batch)), beside.wanted, batch), 0.0
        output, ours = leaving(self.run, whole, batch, self.paths)
        _, theirs = leaving(self.teach, beside.dense, batch, self.paths)
        return self.apart(widened(output), beside.wanted, batch), mean_apart(ours, theirs, batch)


class Beside(NamedTuple):
    """What a step is given beside the parameters that are trained.

    frozen: those that are not. wanted: the dense model's outputs. dense: its parameters. share: what the distance of
      the layers counts.
    """

    frozen: Any
    wanted: Any
    dense: Any = None
    share: Any = 0.0


class Texts(NamedTuple):
    """Rows of one shape together, and what the dense model makes of each pool, where there is room for that."""

    pools: list[Pool]
    outputs: list[np.ndarray | None]
    teach: Callable[[Batch], Any]

    def batch(self, deal: Deal) -> tuple[Batch, Any]:
        """A batch and what the dense model makes of it."""
        batch, outputs = batch_of(self.pools, deal), self.outputs[deal.pool]
        return batch, widened(self.teach(batch)) if outputs is None else outputs[deal.rows]

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(map(count_of, self.pools))


def heal(
    small: Any,
    dense: Any,
    batches: Iterable[Batch],
    *,
    heldout: Iterable[Batch] | None = None,
    forward: Callable[..., Any] | None = None,
    output: int | str | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> tuple[Any, Healing]:
    """The compressed model after training it to the dense model's outputs, no labels needed, and what that gained.

    The loss is that of `loss_increase`: for embeddings and values half the squared distance; for labels, tokens and
    answers the divergence of the predictions, at all visible tokens where there are several. What leaves the
    compressed layers is to be near what leaves the dense ones too: the mean of the squared distances over the squares,
    which counts as much as the loss does at the start (after Jiao et al. 2020, TinyBERT, sec. 3). AdamW without weight
    decay or dropout, gradients cut to 1, a rate that rises and falls linearly. Trained are factors, biases, norms and
    what else there is, but for the tables of embeddings. Some texts are held out; the parameters that do best on them
    are returned, or those that were given: the held-out loss, of the outputs alone, never rises. A default rate that
    has not lowered it when it is measured first, after a twelfth of the steps, is too high: all begins again at a third
    of it, three times at most. With a rate that was given no run ends early but one whose loss is not finite: high
    rates may cost at first what low ones bring back. Matrices that are stored
    in fewer bits are rounded in every step, and gradients pass through that: what is trained, judged and returned is
    what is stored. A model in 16 bits is trained in float32, and judged and returned in 16 bits. A model of your own is
    healed by squared distances, whatever its outputs mean.

    Args:
      small: what `compress` returned, or another model, of any kind that `compress` takes.
      dense: the model that it was made of, of the same kind. A `Model`, a directory or a name on the Hub too.
      batches: as for `compress`, with more texts: thousands, like those that the model is to serve. Rows are dealt anew
        in every epoch into batches of rows of one shape; "labels" do not matter, "weights" weigh rows.
      heldout: other batches, to be held out; rows of texts that are in `batches` too are left out. By default one of 16
        rows, 512 at most, chosen by what they say; what is repeated is on one side.
      forward, output: of a model of your own, as for `compress`.
      epochs: passes at most; by default so many that 40,000 texts are seen, 1 to 20.
      learning_rate: the highest; by default 1e-3 where factors have up to a quarter of their kernels' numbers, and less
        the more they have, 5e-4 at a half; classifiers may need a ninth of it, which is found on the way. At a
        quarter of all-MiniLM-L6-v2 the held-out loss rises on the way at 3e-3; at a half 1e-3 leaves it a quarter
        higher than 3e-4.
      batch_size: by default 16.
      seed: of the order of the rows.
      file: holds the state once a minute and whenever the held-out loss is measured; if it is there already, healing
        goes on from it. Delete it once the result is saved.
      progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: before work starts, for too few texts, a number that cannot be, a dense model whose outputs are of
        another shape or meaning, or its classes in another order, or a file of another run or that cannot be written.
      FloatingPointError: an output of either model is not finite at the start.

    Example:
        >>> import bert_adapter
        >>> from bert_adapter.sample import sample_model
        >>> dense = sample_model()
        >>> small, _ = bert_adapter.compress(dense, [], rank=2, signal="svd")
        >>> texts = ["a red fox runs", "a dog", "it runs far", "a fox"] * 16
        >>> healed, gained = bert_adapter.heal(small, dense, bert_adapter.text_batches(dense, texts))
        >>> gained.after < gained.before
        True
    """
    if file is not None:
        check_writable(file)
    model, teacher = (as_model(one, forward=forward, output=output) for one in (small, dense))
    check_floats(model.params, "small")
    seed = check_count("seed", seed, 0, 2**32 - 1)
    plan = healing_plan(
        model, teacher, batches, heldout, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size
    )
    healed, gained = follow(model, teacher, plan, seed=seed, file=file, progress=progress)
    return in_kind(small, healed), gained


class HealingPlan(NamedTuple):
    """What is trained on, and how, once it is known to fit the models."""

    pools: list[Pool]
    heldout: list[Pool]
    epochs: int
    learning_rate: float | None
    batch_size: int


def healing_plan(
    model: Model,
    teacher: Model,
    batches: Iterable[Batch],
    heldout: Iterable[Batch] | None = None,
    *,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
) -> HealingPlan:
    """The texts and the numbers, those that are not given chosen; a ValueError for what cannot be."""
    listed, others = list(batches), None if heldout is None else list(heldout)
    for name, each in (("batches", listed), ("heldout", others)):
        if each is not None and not each:
            raise ValueError(f"{name}: got none, wanted at least one")
    for number, batch in enumerate(listed + (others or [])):
        for one in (model, teacher):
            check_batch(function_of(one), batch, number)
    check_same_tokens(model, teacher, name="dense")
    check_teacher(model, teacher, listed[0], name="dense")
    pools, held = divided_rows(model, listed, others)
    count = sum(map(count_of, pools))
    chosen = defaults(count)
    numbers = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    given = {name: value for name, value in numbers.items() if value is not None}
    check_number(given.get("learning_rate", 0), 1.0, "learning_rate must be in [0, 1]")
    given |= {name: check_count(name, given[name], 1, 10**6) for name in ("epochs", "batch_size") if name in given}
    plan = HealingPlan(pools, held, **chosen | given)
    if count < plan.batch_size:
        raise TooFewTexts(
            f"batches: got {count} texts that count beside those held out, wanted at least {plan.batch_size}, a batch"
        )
    return plan


def divided_rows(model: Model, batches: list[Batch], heldout: list[Batch] | None) -> tuple[list[Pool], list[Pool]]:
    """The rows to train on and those held out, none of which says what another on the other side does."""
    ours = not is_own(model) and model.forward is None  # else what an array is called says nothing of it
    said = all_of if not ours else unmasked_text_of if output_of(model.module) == "words" else text_of
    pools, leave_out = pools_of(batches), () if is_own(model) else ("labels",)
    count = sum(map(count_of, pools))
    if heldout is None:
        one_of, most = HELD_OUT
        pools, held = held_out(pools, min(max(1, count // one_of), most), said)
        if not held:
            got = "one text" if count else "0 texts that count"
            raise TooFewTexts(f"batches: got {got}, wanted others too, some of which are held out")
    else:
        given = pools_of(heldout)
        if not (held := unlike(given, pools, said)):
            got = "the texts that are trained on" if given else "no row of weight above 0"
            raise TooFewTexts(f"heldout: got {got}, wanted others")
    return together(without(pools, leave_out)), together(without(held, leave_out))


def defaults(texts: int) -> dict[str, Any]:
    """The epochs and the size of a batch for so many texts; the rate is that of the factors, which may be to come."""
    epochs = min(max(1, round(SEEN / max(texts, 1))), MOST_EPOCHS)
    return {"epochs": epochs, "learning_rate": None, "batch_size": BATCH}


def rate_for(share: float) -> float:
    """The highest rate, by how many numbers the factors hold, beside those of their kernels."""
    return RATE * min(1.0, SMALL / share)


def share_of(params: Any) -> float:
    """How many numbers the factors of kernels have, beside those of the kernels; 1 where there are none."""
    counts = np.sum([(0, 0), *counts_of(params)], axis=0)
    return float(counts[0] / counts[1]) if counts[1] else 1.0


def counts_of(params: Any) -> Iterator[tuple[int, int]]:
    """Of each kernel with factors, how many numbers these have, and how many it had."""
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            yield from counts_of(leaf)
        elif isinstance(leaf, Factorised) and name != FROZEN:
            left, right = params["left"], params["right"]
            both, stack = left.size // left.shape[-1] * (right.size // left.shape[-1]), left.shape[: leaf.stacked]
            yield left.size + right.size, both // math.prod(stack)


def follow(
    model: Model,
    teacher: Model,
    plan: HealingPlan,
    *,
    seed: int,
    file: str | Path | None,
    progress: bool,
    given: Mapping[str, Any] | None = None,
) -> tuple[Model, Healing]:
    """The model with the parameters that did best on the texts held out, and what that gained.

    given: as `as_stored` takes it, where the parameters will be rounded so.
    """
    began = time.monotonic()
    how: dict[str, Any] = {"seed": seed, "file": file, "progress": progress}
    params, gained = followed(model, teacher, plan, given=given, **how)
    gained = gained._replace(seconds=time.monotonic() - began)
    healed = model._replace(params=params, config=noted(model.config, gained))
    return healed if gained.kept else model, gained


def followed(
    model: Model,
    teacher: Model,
    plan: HealingPlan,
    *,
    given: Mapping[str, Any] | None,
    seed: int,
    file: str | Path | None,
    progress: bool,
) -> tuple[Any, Healing]:
    """The parameters that did best on the texts held out, and what is known of the run, but for its seconds."""
    judged, dtypes = Recipe(function_of(model), distillation(model.module, 1.0)), dtypes_of(model.config)
    trained, frozen = divided(prepared(model, dtypes, given))
    recipe = judged._replace(stored=stored_as(trained, dtypes), teach=function_of(teacher))
    recipe = recipe._replace(paths=compressed_layers(model.params, dtypes))
    run = {} if file is None else fingerprints(recipe, model, teacher, plan, seed=seed)
    check_run(run, file)
    texts, held = (taught(teacher, pools, plan.batch_size) for pools in (plan.pools, plan.heldout))
    like, tables = divided(model.params)
    keep, tables = partial(as_kept, like=like, dtypes=dtypes), narrowed(frozen, tables)
    look = looker(judged, held, tables, plan.batch_size, keep=keep)
    if not np.isfinite(before := look(trained)):
        raise FloatingPointError(f"the held-out loss is {before} to begin with: look at the outputs of both models")
    beside = Beside(frozen, None, jax.device_put(teacher.params))
    recipe, beside = with_layers(recipe, beside, held, trained, size=plan.batch_size)
    schedule = Schedule(
        deals=list(epochs_of(plan.pools, plan.batch_size, plan.epochs, seed)),
        rate=rate_for(share_of(model.params)) if plan.learning_rate is None else plan.learning_rate,
        tries=TRIES if plan.learning_rate is None else 1,
    )
    advance, key = step_function(recipe), jax.random.key(seed)

    def step(learnt: tuple[Any, Any], deal: Deal, rate: Any) -> tuple[Any, Any]:
        batch, wanted = texts.batch(deal)
        return advance(learnt, beside=beside._replace(wanted=wanted), batch=batch, key=key, rate=rate)[0]

    fresh = State(trained, (), 0, run)
    state, losses = descended(fresh, schedule, step, look, before=before, file=file, progress=progress)
    kept, after = best_of(before, losses)
    found = {0: before} | {int(i) + 1: float(losses[i]) for i in np.flatnonzero(~np.isnan(losses))}
    counts = {"texts": texts.count, "heldout": held.count}
    about = Healing(before, after, kept, state.step, losses=found, seconds=0.0, **counts)
    return joined(keep(jax.device_get(state.moments[1])), as_given(model.params, dtypes, given)), about


def as_given(params: Any, dtypes: Mapping[str, str], given: Mapping[str, Any] | None) -> Any:
    """The tables, which are not trained, on the host as they are stored; None stands where the others are."""
    tables = jax.device_get(divided(params)[1])
    layers = {path.rpartition("/")[0] for path, leaf in by_path(tables).items() if leaf is not None}
    return as_stored(tables, {path: dtype for path, dtype in dtypes.items() if path in layers}, given)


class Schedule(NamedTuple):
    """What each step takes, the highest rate, and how many rates are tried."""

    deals: list[Deal]
    rate: float
    tries: int

    @property
    def every(self) -> int:
        """After how many steps the held-out loss is measured."""
        return -(-len(self.deals) // LOOKS)

    def rates(self, tried: int) -> Float[np.ndarray, " steps"]:
        """Those of the steps, after so many that proved too high."""
        return learning_rates(self.rate * LOWER**tried, round(WARMUP * len(self.deals)), len(self.deals))

    def too_high(self, tried: int, before: float, losses: Float[np.ndarray, " steps"]) -> bool:
        """Whether the held-out loss has not fallen when it is measured first, and a lower rate is left to try."""
        return tried + 1 < self.tries and bool(losses[self.every - 1] >= before)


def descended(
    fresh: State,
    schedule: Schedule,
    step: Callable[[tuple[Any, Any], Deal, Any], tuple[Any, Any]],
    look: Callable[[Any], float],
    *,
    before: float,
    file: str | Path | None,
    progress: bool,
) -> tuple[State, Float[np.ndarray, " steps"]]:
    """The state after all steps, and the held-out losses; where the first is no lower, from anew at a lower rate.

    fresh: with the parameters to begin with. The state's moments are the optimiser's, the parameters that did best, and
      how many rates proved too high.
    """
    start, steps = jax.device_get(fresh.params), len(schedule.deals)
    state, losses = resumed(begun(fresh, start, 0), np.full(steps, np.nan, np.float32), file)
    saved = time.monotonic()
    while True:
        tried = int(state.moments[2])
        rates = schedule.rates(tried)
        for number in track(range(state.step, steps), "heal", progress):
            if np.isinf(losses).any() or schedule.too_high(tried, before, losses):  # nothing comes back from infinity
                break
            inner, best, _ = state.moments
            params, inner = step((state.params, inner), schedule.deals[number], rates[number])
            if looked := (number + 1) % schedule.every == 0 or number + 1 == steps:
                loss = look(params)
                losses[number] = loss if np.isfinite(loss) else np.inf
                best = jax.tree.map(jnp.copy, params) if best_of(before, losses)[0] == number + 1 else best
            state = State(params, (inner, best, np.int32(tried)), number + 1, fresh.run)
            if file is not None and (looked or time.monotonic() - saved > SAVE_EVERY):
                save_state(state, losses, path_of(file))
                saved = time.monotonic()
        if not schedule.too_high(tried, before, losses):
            return state, losses
        state, losses = begun(fresh, start, tried + 1), np.full(steps, np.nan, np.float32)


def begun(fresh: State, start: Any, tried: int) -> State:
    """The state before the first step, with copies of the parameters, since a step reuses the memory of the last."""
    params, best = (jax.tree.map(jnp.array, start) for _ in range(2))
    return fresh._replace(params=params, moments=(adamw(0.0).init(params), best, np.int32(tried)))


def prepared(model: Model, dtypes: Mapping[str, str], given: Mapping[str, Any] | None) -> Any:
    """Copies of the parameters, since a step reuses the memory of the last: as they are stored, or else balanced.

    What has 16 bits has 32 here.
    """
    params = widened(jax.device_get(model.params))
    return jax.tree.map(jnp.array, as_stored(balanced(params, dtypes), dtypes, given))


def balanced(params: Any, but: Collection[str] = (), path: str = "") -> Any:
    """The same products, of factors with left.T @ left = right @ right.T, so that one rate suits both.

    Factors of several axes, and those of the layers named, stay as they are.
    """
    if not isinstance(params, Mapping) or path in but:
        return params
    factorised = any(isinstance(leaf, Factorised) for leaf in params.values())
    if not factorised or np.ndim(params["left"]) != 2 or np.ndim(params["right"]) != 2:
        return {name: balanced(leaf, but, f"{path}/{name}".lstrip("/")) for name, leaf in params.items()}
    (left, r), (right, c) = (np.linalg.qr(np.asarray(one, np.float64)) for one in (params["left"], params["right"].T))
    u, s, vt = np.linalg.svd(r @ c.T)
    even = {"left": left @ (u * np.sqrt(s)), "right": np.sqrt(s)[:, None] * (vt @ right.T)}
    return {**params, **{name: array.astype(params[name].dtype) for name, array in even.items()}}


def best_of(before: float, losses: Float[np.ndarray, " steps"]) -> tuple[int, float]:
    """The step after which the held-out loss was lowest, and that loss; 0 is before the first."""
    step = int(np.nanargmin(np.append(np.float32(before), losses)))
    return step, before if step == 0 else float(losses[step - 1])


def taught(teacher: Model, pools: list[Pool], size: int) -> Texts:
    """The rows and what the dense model makes of them."""
    run, params = jax.jit(function_of(teacher)), jax.device_put(teacher.params)
    room, outputs = KEPT_BYTES, []
    for number, pool in enumerate(pools):
        first, *deals = dealt([pool], size)
        found = [np.asarray(run(params, batch_of([pool], first)))]
        room -= (wanted := found[0][0].nbytes * count_of(pool))
        fits = room >= 0
        if fits:
            found += [np.asarray(run(params, batch_of([pool], deal))) for deal in deals]
        else:
            room += wanted
        for each in found:
            check_finite(each, number, "the dense model")
        outputs.append(widened(np.concatenate(found)[: count_of(pool)]) if fits else None)
    return Texts(pools, outputs, partial(run, params))


def looker(
    recipe: Recipe, texts: Texts, frozen: Any, size: int, *, keep: Callable[[Any], Any]
) -> Callable[[Any], float]:
    """(parameters) -> the mean loss on the texts of what is kept of them."""
    run, deals = compiled(recipe), dealt(texts.pools, size)
    total = sum(float(pool["weights"].sum()) for pool in texts.pools)

    def look(params: Any) -> float:
        loss, params = 0.0, jax.device_put(keep(params))
        for deal in deals:
            batch, wanted = texts.batch(deal)
            each, _ = run(params, Beside(frozen, wanted), batch)
            loss += float(np.sum(batch["weights"] * np.asarray(each)))
        return float(np.float32(loss / total))

    return look


def compressed_layers(params: Any, dtypes: Collection[str], path: str = "") -> frozenset[str]:
    """The layers with factors, and those whose kernels are stored in fewer bits."""
    if any(isinstance(leaf, Factorised) for name, leaf in params.items() if name != FROZEN):
        return frozenset({path})
    if path in dtypes and FROZEN not in params:
        return frozenset({path})
    inner = [(name, leaf) for name, leaf in params.items() if isinstance(leaf, Mapping)]
    return frozenset().union(*(compressed_layers(leaf, dtypes, f"{path}/{name}".lstrip("/")) for name, leaf in inner))


def with_layers(recipe: Recipe, beside: Beside, held: Texts, trained: Any, *, size: int) -> tuple[Recipe, Beside]:
    """The recipe in which the layers count as much as the output does on the texts held out, or not at all."""
    run, sums = compiled(recipe), np.zeros(2)
    for deal in dealt(held.pools, size) if recipe.paths else ():
        batch, wanted = held.batch(deal)
        parts = run(trained, beside._replace(wanted=wanted), batch)
        sums += [float(np.sum(batch["weights"] * np.asarray(part))) for part in parts]
    if not (np.isfinite(sums).all() and (sums > 0).all()):
        return recipe._replace(teach=None, paths=frozenset()), beside._replace(dense=None)
    return recipe, beside._replace(share=np.float32(sums[0] / sums[1]))


@lru_cache(maxsize=16)
def compiled(recipe: Recipe) -> Callable[..., Any]:
    """The compiled parts of the loss of each example."""
    return jax.jit(lambda params, beside, batch: recipe.parts(params, beside, batch))


def divided(params: Any) -> tuple[Any, Any]:
    """The parameters that are trained, and the tables that are not; None stands where the others are."""
    factorised = factorised_tables(params)

    def chosen(tables: bool) -> Any:
        def leaf_of(path: Any, leaf: Any) -> Any:
            layer, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
            return leaf if (name == FROZEN or layer in factorised) == tables else None

        return jax.tree_util.tree_map_with_path(leaf_of, params)

    return chosen(tables=False), chosen(tables=True)


def joined(trained: Any, frozen: Any) -> Any:
    """What `divided` has divided."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def fingerprints(recipe: Recipe, model: Model, teacher: Model, plan: HealingPlan, *, seed: int) -> dict[str, str]:
    """Of all that a run depends on, by the words for what differs."""
    first = batch_of(plan.pools, dealt(plan.pools, plan.batch_size)[0])
    return {
        "model": of_params(model.params),
        "module": of_function(recipe.run, model.params, first),
        **known_before(teacher, plan),
        "options": json.dumps(
            [plan.epochs, plan.learning_rate, plan.batch_size, seed, recipe.stored],
            default=lambda number: number.item(),
        ),
    }


def known_before(teacher: Model, plan: HealingPlan) -> dict[str, str]:
    """Of what is known before there is a compressed model."""
    first = batch_of(plan.pools, dealt(plan.pools, plan.batch_size)[0])
    return {
        "dense model": of_params(teacher.params),
        "dense module": of_function(function_of(teacher), teacher.params, first),
        "texts": " ".join(map(of_arrays, [*plan.pools, *plan.heldout])),
    }


def noted(config: dict[str, Any], gained: Healing) -> dict[str, Any]:
    """The config, whose section on what was factorised says what healing gained."""
    if not config.get("low_rank"):
        return config
    names = ("texts", "heldout", "before", "after", "kept")
    return config | {"low_rank": config["low_rank"] | {"healed": {name: getattr(gained, name) for name in names}}}
