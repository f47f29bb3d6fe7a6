"""Every kernel decomposed once: the plan of all budgets, and the factors of all ranks."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

import wlra
from bert_adapter.checkpoint.names import by_path
from bert_adapter.checkpoint.nibbles import feedback
from bert_adapter.importance.fingerprint import of_arrays, of_params
from bert_adapter.importance.sums import Importance, Sums, check_model
from bert_adapter.importance.through import Through
from bert_adapter.kernels import Shapes, break_even, shape_of_kernel, split_axes
from bert_adapter.layers.layer import Axes
from bert_adapter.layers.places import in_brief, is_table, kernel_path, layer_path
from bert_adapter.layers.stacks import unstacked
from bert_adapter.progress import track
from bert_adapter.rounding import Rounding, rounding
from bert_adapter.signals import DEFAULT, SIGNALS, as_signal
from bert_adapter.signals.definition import Evidence, Signal, TableWeights
from bert_adapter.signals.weights import check_counts, check_measured, check_whole, evidence_of, table_weights
from bert_adapter.tables import Tokens, decompose_table
from wlra import components
from wlra.checks import check_number
from wlra.components import Decomposed, Seen
from wlra.options import as_method

BY_ROWS = ("fwsvd", "separable")  # exact for a weight for each row


class Decompositions(NamedTuple):
    """The kernels in the coordinates in which a signal's weights are equal, from which every budget and rank is cut.

    kernels: by path, components and weighted squares; the squares alone where the signal's method is no closed form of
      them.
    squares: by path, the weighted squares that ranks are planned by: those, or others where the signal has `ranks`.
    shapes: by path, inputs by outputs.
    signal, shrink: what errors are weighted by.
    examples: by path, what the squares are sums over: examples, times the steps of the kernel where that is per token.
    model: the fingerprint of the parameters.
    reliability: by path, as in `Report`.
    calibration: how many texts were measured on, and their fingerprint; empty where nothing was measured.
    measured: the importance without its sums, if there is one.
    tokens: by path, of tables, what is known of their rows.
    roundings: by path, what fewer bits lose; empty where that was not asked for.
    given: by path, what an input's errors of 4 bits give to those after it (`nibbles.feedback`), from the matrices
      along inputs that factors are made by; empty where bits were not asked for.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"easy": {"kernel": np.diag([9.0, 8, 0, 0, 0, 0, 0, 0])}, "hard": {"kernel": np.eye(8)}}
      >>> known = bert_adapter.decompose(params, None, signal="svd")
      >>> [bert_adapter.plan(params, known, budget=share).ranks for share in (0.5, 0.75)]
      [{'easy': 2, 'hard': 2}, {'easy': 2, 'hard': 4}]
    """

    kernels: Mapping[str, Decomposed]
    squares: Mapping[str, Float[np.ndarray, " components"]]
    shapes: Shapes
    signal: Signal
    shrink: float | None
    examples: Mapping[str, float]
    model: str
    reliability: Mapping[str, float]
    calibration: Mapping[str, Any]
    measured: Importance | None = None
    tokens: Mapping[str, Tokens] = {}
    roundings: Mapping[str, Rounding] = {}
    given: Mapping[str, Float[np.ndarray, "in in"]] = {}


def decompose(
    params: Any,
    importance: Importance | None,
    *,
    signal: str | Signal = DEFAULT,
    shrink: float | None = None,
    kernels: Shapes | None = None,
    bits: bool = False,
    progress: bool = True,
) -> Decompositions:
    """The kernels decomposed, which `plan` and `compress` take in place of the importance, at any budget.

    It takes as much memory as the kernels, with bits a matrix (in, in) for each of them besides, and the importance is
    not needed any more.

    Args:
      params: nested dicts, with dense kernels.
      importance: what `measure_signal` returned, or `measure_importance` with what the signal needs; None for a signal
        that needs nothing.
      signal, shrink: as `compress` takes them.
      kernels: what `select_kernels` returned. By default all kernels that were measured; all with two axes where
        nothing was.
      bits: what storing in fewer bits loses too, which plans of bytes need, of an importance measured with whole=True.
      progress: whether there is a bar on a terminal, or a line a minute elsewhere.

    Raises:
      ValueError: a name or share that cannot be, an importance of another model or without what the signal needs, or
        values that are not finite or no weights.

    Example:
      >>> import numpy as np, bert_adapter
      >>> params = {"layer": {"kernel": np.outer(np.arange(1.0, 7), np.ones(4)).astype("f4")}}
      >>> known = bert_adapter.decompose(params, None, signal="svd")
      >>> small, reports = bert_adapter.factorise(params, known.kernels, {"layer": 1}, method="svd")
      >>> small["layer"]["left"].shape, reports[0].loss["svd"] < 1e-6
      ((6, 1), True)
    """
    chosen = as_signal(signal)
    check_shrink(shrink)
    check_of(importance, params)
    shapes = selected_shapes(params, importance, kernels)
    how: dict[str, Any] = {"signal": chosen, "shrink": shrink, "method": as_method(chosen.method)}
    return decompositions(params, importance, shapes, **how, bits=bits, progress=progress)


def decompositions(
    params: Any,
    importance: Importance | None,
    shapes: Shapes,
    *,
    signal: Signal,
    shrink: float | None,
    method: wlra.Method | None,
    bits: bool = False,
    progress: bool = False,
    consume: bool = False,
) -> Decompositions:
    """The same for what has been checked, and for another method than the signal's, or for the squares alone.

    consume: the sums of kernels that need them no more are taken out of the importance.
    """
    known = {} if importance is None else importance.sums
    examples = {path: per_example(importance, signal, path) for path in shapes}  # before sums are taken out
    flat = by_path(unstacked(params, shapes))
    check_shrinks(signal, shrink, any(is_table(kernel_path(flat, path)) for path in shapes))
    for path in shapes:
        check_measured(importance, signal, path)
        check_usable(importance, signal, path, bits)

    def one(path: str) -> One:
        place = kernel_path(flat, path)
        kernel = flat[place]
        evidence = evidence_of(importance, path, shapes[path], kernel)
        options: dict[str, Any] = {"shape": shapes[path], "table": is_table(place), "method": method, "bits": bits}
        found = one_matrix(path, kernel, evidence, signal, shrink=shrink, **options)
        if consume and found.decomposed.left is not None:
            known.pop(path, None)
        return found if signal.reliability is None else found._replace(reliability=signal.reliability(evidence))

    model = of_params(params) if importance is None else importance.model  # checked
    largest = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
    done = components.side_by_side(one, largest, lambda futures: track(futures, "decompose", progress))
    by_name = dict(zip(largest, done, strict=True))
    found = {path: by_name[path] for path in shapes}
    return Decompositions(
        {path: each.decomposed for path, each in found.items()},
        {path: each.squares for path, each in found.items()},
        shapes,
        signal=signal,
        shrink=shrink,
        examples=examples,
        model=model,
        reliability={path: each.reliability for path, each in found.items() if each.reliability is not None},
        calibration=calibration(importance),
        measured=None if importance is None else replace(importance, sums={}),
        tokens={path: each.tokens for path, each in found.items() if each.tokens is not None},
        roundings={path: each.rounding for path, each in found.items() if each.rounding is not None},
        given={path: each.given for path, each in found.items() if each.given is not None},
    )


class One(NamedTuple):
    """What is known of one matrix.

    squares: what ranks are planned by. tokens: of a table. rounding, given: where bits were asked for. reliability:
      where the signal can tell.
    """

    decomposed: Decomposed
    squares: Float[np.ndarray, " components"]
    tokens: Tokens | None = None
    rounding: Rounding | None = None
    given: Float[np.ndarray, "in in"] | None = None
    reliability: float | None = None


def check_usable(importance: Importance | None, signal: Signal, path: str, bits: bool) -> None:
    """A ValueError where matrices were measured `Through` a kernel and that will not do."""
    if bits:
        check_whole(importance, signal, path, "plans of bytes, which fewer bits are chosen by, are")
    if not signal.through:
        check_whole(importance, signal, path, f"signal {signal.name!r} is")
    if importance is not None and not importance.model:
        check_whole(importance, signal, path, "a measurement that is to fit another model's kernels is")


def one_matrix(
    path: str,
    kernel: Any,
    evidence: Evidence,
    signal: Signal,
    *,
    shape: tuple[int, int],
    table: bool,
    shrink: float | None,
    method: wlra.Method | None,
    bits: bool,
) -> One:
    """That of a kernel or a table; an error says whose it is."""
    axes, kernel = split_axes(path, np.shape(kernel), shape), np.asarray(kernel).reshape(shape)
    try:
        if table:
            found = one_table(kernel, table_weights(evidence, signal, path, shrink), method, prior=shrink, bits=bits)
            return found if signal.statistics else found._replace(tokens=None)
        return one_kernel(kernel, evidence, signal, shrink=shrink, method=method, bits=bits, axes=axes)
    except ValueError as error:
        check_counts(evidence, signal, path)
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def one_kernel(
    kernel: Any,
    evidence: Evidence,
    signal: Signal,
    *,
    shrink: float | None,
    method: wlra.Method | None,
    bits: bool,
    axes: Axes,
) -> One:
    """That of a kernel: its components by what factors are made by, its squares by what ranks are planned by.

    Rounding is of the components also where the method does not cut them.
    """
    if signal.ranks is not None and method is None and not bits:
        squares = components.decompose(kernel, *sides(kernel, signal.ranks(evidence, shrink)), 0).squares
        return One(Decomposed(squares), squares)
    made = signal.weights(evidence, shrink)
    by = planned = sides(kernel, made)
    if is_identity(kernel) and not all(np.any(getattr(side, "matrix", side)) for side in by):
        return nothing_lost(kernel)
    if signal.ranks is not None:
        planned = sides(kernel, signal.ranks(evidence, shrink))
        by, planned = (by, planned) if bits else seen_once(kernel, by, planned)
    most = most_components(kernel) if is_cut(kernel, made, method) else 0
    found = whole = components.decompose(kernel, *by, most)
    squares = found.squares if signal.ranks is None else components.decompose(kernel, *planned, 0).squares
    if not bits:
        return One(found, squares)
    if whole.left is None:
        whole = components.decompose(kernel, *by, most_components(kernel))
    given = feedback(by[0]) if by[0].ndim == 2 and len(axes[0]) == len(axes[1]) == 1 else None
    lost = rounding(kernel, whole, planned, by_rows=False, given=given, axes=axes)
    return One(found, squares, rounding=lost, given=given)


def nothing_lost(identity: Float[np.ndarray, "n n"]) -> One:
    """Of an identity that the output does not depend on, as in a head that is masked: any components will do."""
    most, squares = most_components(identity), np.zeros(len(identity))
    return One(Decomposed(squares, identity[:, :most], identity[:most]), squares)


def seen_once(kernel: Any, one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Both pairs of sides; columns' matrices that are the same, and no smaller than the rows', as they are `Seen`."""
    (row, col), (its_row, its_col) = one, other
    if kernel.shape[0] > kernel.shape[1] or isinstance(col, Seen) or isinstance(its_col, Seen):
        return one, other
    if col.shape != 2 * kernel.shape[1:] or not np.array_equal(col, its_col) or not components.usable(col):
        return one, other
    seen = Seen(components.congruent(np.asarray(kernel, np.float64), col))
    return (row, seen), (its_row, seen)


def one_table(table: Any, weights: TableWeights, method: wlra.Method | None, *, prior: float | None, bits: bool) -> One:
    """That of a table; without a method, the squares alone."""
    most = 0 if method is None and not bits else most_components(table)
    found, tokens = decompose_table(table, weights, most, prior)
    kept = One(Decomposed(found.squares) if method is None else found, found.squares, tokens)
    if not bits:
        return kept
    weighted = np.asarray(weights.planned, np.float64).sum(axis=0), np.asarray(weights.columns, np.float64)
    return kept._replace(rounding=rounding(table, found, weighted, by_rows=True))


def calibration(importance: Importance | None) -> dict[str, Any]:
    """How many texts it was measured on, and their fingerprint as batches, but not the texts."""
    if importance is None:
        return {}
    texts = {str(i): np.frombuffer(text.encode(), np.uint8) for i, text in enumerate(importance.texts)}
    return {"texts": importance.examples, "fingerprint": of_arrays(texts)}


def most_components(kernel: Float[np.ndarray, "in out"]) -> int:
    """The largest rank at which factors are smaller than the kernel, at least 1.

    Of an identity all but one: it is not stored.
    """
    return len(kernel) - 1 if is_identity(kernel) else max(1, math.ceil(break_even(kernel.shape)) - 1)


def is_identity(kernel: Float[np.ndarray, "in out"]) -> bool:
    """Whether it is one, as `with_identities` puts between two kernels."""
    return kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1] and np.array_equal(kernel, np.eye(len(kernel)))


def is_cut(kernel: Float[np.ndarray, "in out"], weights: Any, method: wlra.Method | None) -> bool:
    """Whether the method's result is the decomposition cut at its rank. In float64 it is more than that."""
    if method is None or kernel.dtype == np.float64:
        return False
    if isinstance(weights, wlra.Kronecker):
        return method == wlra.METHODS["kronecker"]
    by_rows = weights is not None and np.shape(weights)[1:] == (1,)
    names = BY_ROWS if by_rows else ("svd", *BY_ROWS) if weights is None else ()
    return any(method == wlra.METHODS[name] for name in names)


def sides(kernel: Any, weights: Any) -> tuple[Any, Any]:
    """The weights of rows and of columns, as `components.decompose` takes them; of entries, those of their fit."""
    if isinstance(weights, wlra.Kronecker):
        row, col = (Seen(each.matrix) if isinstance(each, Through) else np.asarray(each) for each in weights)
        return row, col
    m, n = kernel.shape
    if weights is None:
        return np.ones(m), np.ones(n)
    full = np.broadcast_to(np.asarray(weights), kernel.shape)
    row, col = (full.sum(axis=axis, dtype=np.float64) for axis in (1, 0))
    return row, col / (col.sum() or 1)


def predicted_losses(squares: Float[np.ndarray, " components"]) -> Float[np.ndarray, " ranks"]:
    """Half the weighted squared error of the best approximation of each rank 0, 1, ..., as far as weights separate.

    What is beyond the components that there are is nothing, not what rounding leaves.
    """
    real = np.where(components.are_there(squares), squares, 0)
    return np.append(np.cumsum(real[::-1])[::-1], 0) / 2


def selected_shapes(params: Any, importance: Importance | None, kernels: Shapes | None) -> dict[str, tuple[int, int]]:
    """The shapes of the kernels to plan for: those given, or those that were measured, or all with two axes."""
    given = kernels if kernels is not None or importance is None else importance.sums
    flat = by_path(unstacked(params, given or ()))
    found = {layer: leaf for path, leaf in flat.items() if (layer := layer_path(path)) is not None}
    plain = [path for path, leaf in found.items() if np.ndim(leaf) == 2 and not is_table(kernel_path(flat, path))]
    paths = plain if importance is None else importance.sums
    paths = list(paths if kernels is None else kernels)
    if not paths or (missing := [path for path in paths if path not in found]):
        wanted = "no kernels" if not paths else f"{in_brief(missing)}, which are no dense kernels"
        raise ValueError(f"kernels: got {wanted}; wanted paths of {in_brief(found)}")
    return {path: shape_of_kernel(path, found[path], kernels) for path in paths}


def per_example(importance: Importance | None, signal: Signal, path: str) -> float:
    """What the weights of a kernel are divided by, for the loss of an example.

    A product of sums over steps, of x x' and of delta delta', is as many times too large as steps enter the kernel.
    """
    if importance is None:
        return 1.0
    steps = importance.sums.get(path, Sums()).steps
    return float(importance.examples * ((importance.tokens if steps is None else steps) if signal.per_token else 1))


def chosen_signal(signal: str | Signal | None, shrink: float | None, importance: Any) -> Signal:
    """The signal, by default the first or that of decompositions, for which no other can be asked any more."""
    if not isinstance(importance, Decompositions):
        return as_signal(DEFAULT if signal is None else signal)
    known = importance.signal
    if signal is not None and as_signal(signal) != known:
        raise ValueError(f"importance: decomposed for signal {known.name!r}; got signal={as_signal(signal).name!r}")
    if shrink not in (None, importance.shrink):
        raise ValueError(f"importance: decomposed for shrink={importance.shrink}; got shrink={shrink}")
    return known


def check_of(importance: Any, params: Any) -> None:
    """A ValueError for what is of another model, or no importance, or no parameters."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params: got {type(params).__name__}, wanted nested dicts of arrays: model.params")
    if not isinstance(importance, Importance | Decompositions | None):
        wanted = "what measure_signal or decompose returns"
        raise ValueError(f"importance: got {type(importance).__name__}, wanted {wanted}")
    if isinstance(importance, Importance):
        check_model(importance, of_params(params))
    if isinstance(importance, Decompositions) and importance.model not in ("", model := of_params(params)):
        raise ValueError(
            f"importance: decomposed for another model, whose parameters have the fingerprint {importance.model}; "
            f"those of this one have {model}: decompose(params, importance) makes it for this one"
        )


def restricted(known: Decompositions, kernels: Shapes | None) -> Decompositions:
    """Those of the kernels that are asked for."""
    if kernels is None:
        return known
    if missing := [path for path in kernels if known.shapes.get(path) != tuple(kernels[path])]:
        raise ValueError(f"importance: decomposed for {in_brief(known.shapes)}; got {in_brief(missing)} too")
    found, squares = ({path: each[path] for path in kernels} for each in (known.kernels, known.squares))
    return known._replace(kernels=found, squares=squares, shapes=kernels)


def check_shrinks(signal: Signal, shrink: float | None, tables: bool) -> None:
    """A ValueError for a share that nothing would be shrunk by: the signal's weights for kernels are what they are."""
    if shrink is not None and not signal.shrinks and not tables:
        others = ", ".join(repr(name) for name, one in SIGNALS.items() if one.shrinks)
        raise ValueError(
            f"shrink: got {shrink} for signal {signal.name!r}, whose weights for kernels are not shrunk: leave it out, "
            f"or take one of {others}"
        )


def check_shrink(shrink: float | None) -> None:
    """A ValueError for what is no share."""
    if shrink is not None:
        check_number(shrink, 1.0, "shrink is how far weights are shrunk towards simpler ones, in [0, 1]")
