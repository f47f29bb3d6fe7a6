"""What does the closed form cost, beside the LAPACK decomposition that it cannot do without?

The upper table: plan and factors of a model's kernels for two budgets, beside NumPy's `eigh` of every kernel's smaller
side, as NumPy runs it and with one thread each. Bars: decomposing, planning and cutting take at most twice as long as
that. The lower table: `wlra.solve` by each closed form, its first call and the median of later ones, beside the
decomposition of NumPy that serves it: of the smaller Gram matrix in float64, and for Kronecker weights the products
with them. The last table: `wlra.solve_batch` of the 72 kernels of BERT-base's shapes, those of a shape at a time,
beside a loop of `wlra.solve`, both after a first call: by two closed forms, and by five iterations of "anderson".
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import bert_adapter
import wlra
from benchmarks.tables import Row, arguments, at_most, markdown, row, write
from wlra.components import congruent

SIZES = ((64, 64), (384, 384), (384, 1536), (768, 768), (3072, 768))
FORMS = ("svd", "fwsvd", "separable", "kronecker")
STEPS, TIMED = "plan and solve", ("first call", "later", "LAPACK")
BATCHES, BATCHED = "a batch", {"svd": {}, "kronecker": {}, "anderson": {"tol": 0.0, "max_iters": 5}}
KERNELS = {(768, 768): 48, (768, 3072): 12, (3072, 768): 12}  # of twelve layers


class Spent(NamedTuple):
    """Seconds by the clock, and of all processors."""

    wall: float
    cpu: float


def spent(call: Callable[[], Any]) -> Spent:
    """Of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def smaller_sides(importance: bert_adapter.Importance, shapes: Mapping[str, tuple[int, int]]) -> list[np.ndarray]:
    """Of each kernel, the Gram matrix of its smaller side."""
    sums = [(importance[path], shape) for path, shape in shapes.items()]
    return [np.asarray(each.row_gram if m <= n else each.col_gram) for each, (m, n) in sums]


def beside_eigh(
    params: Any,
    importance: bert_adapter.Importance,
    shapes: Mapping[str, tuple[int, int]],
    budgets: tuple[float, ...] = (0.5, 0.25),
) -> dict[str, Spent]:
    """What each step takes to plan and factorise for every budget, and what NumPy takes for `eigh` in the same run."""
    grams, known, small = smaller_sides(importance, shapes), [], []

    def eigh() -> None:
        for gram in grams:
            np.linalg.eigh(gram)

    steps = {"NumPy's eigh": spent(eigh)}
    with threadpool_limits(1, "blas"):
        steps["NumPy's eigh, one thread"] = spent(eigh)
    steps["decompose"] = spent(
        lambda: known.append(bert_adapter.decompose(params, importance, kernels=shapes, progress=False))
    )
    for budget in budgets:

        def cut(budget: float = budget) -> None:
            ranks = bert_adapter.plan(params, known[0], budget).ranks
            options = {"shapes": shapes, "method": "kronecker", "progress": False}
            small.append(bert_adapter.factorise(params, known[0].kernels, ranks, **options))

        steps[f"plan and cut, {budget:.0%}"] = spent(cut)
    return steps


def seeded(layers: int, width: int = 768) -> tuple[Any, bert_adapter.Importance, dict[str, tuple[int, int]]]:
    """Kernels of BERT's shapes with Gram matrices of `width` examples, which are shared by those of one shape."""
    from bert_adapter.importance.sums import Sums, halved

    rng = np.random.default_rng(0)
    names = {"query": (1, 1), "key": (1, 1), "value": (1, 1), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    shapes = {f"{i}/{name}": (m * width, n * width) for i in range(layers) for name, (m, n) in names.items()}

    def gram(size: int) -> Any:
        factor = rng.normal(size=(size, width)) * rng.lognormal(0, 1, (size, 1))
        return (factor @ factor.T + np.eye(size)).astype(np.float32)

    grams, inputs = ({size: gram(size) for size in (width, 4 * width)} for _ in range(2))
    params: dict[str, Any] = {str(i): {} for i in range(layers)}
    for path, shape in shapes.items():
        layer, name = path.split("/")
        params[layer][name] = {"kernel": rng.normal(size=shape).astype(np.float32)}
    sums = {
        path: halved(Sums(inputs=inputs[m], row_gram=grams[m], col_gram=grams[n], gram_squares=jnp.float32(0)))
        for path, (m, n) in shapes.items()
    }
    importance = bert_adapter.Importance(sums, width, width, 1, gradients="labels", seed=0)
    return params, importance, shapes


def problem(form: str, m: int, n: int) -> tuple[np.ndarray, Any]:
    """A seeded target, and weights for which the form is exact."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(m, n)).astype(np.float32)
    factors = [rng.normal(size=(size, 2 * size)).astype(np.float32) for size in (m, n)]
    row, col = (rng.lognormal(size=size).astype(np.float32) for size in (m, n))
    weights = {"svd": None, "fwsvd": row[:, None], "separable": row[:, None] * col[None, :]}
    return target, wlra.Kronecker(*(each @ each.T for each in factors)) if form == "kronecker" else weights[form]


def lapack(target: np.ndarray, weights: Any) -> None:
    """What no closed form can do without: `eigh` of the smaller Gram matrix, and products with Kronecker weights."""
    if target.shape[0] > target.shape[1]:
        weights = wlra.Kronecker(weights.col, weights.row) if isinstance(weights, wlra.Kronecker) else None
        return lapack(target.T, weights)
    wide = target.astype(np.float64)
    if isinstance(weights, wlra.Kronecker):
        root = np.linalg.cholesky(weights.row.astype(np.float64))
        gram = root.T @ congruent(wide, weights.col.astype(np.float64)) @ root
    else:
        gram = wide @ wide.T
    np.linalg.eigh(gram)
    return None


def closed_forms(sizes: tuple[tuple[int, int], ...] = SIZES, runs: int = 3) -> list[Row]:
    """By form and size: the first call, the median of later ones, and LAPACK's share in the same run."""
    rows = []
    for form in FORMS:
        for m, n in sizes:
            target, weights = problem(form, m, n)
            rank = max(1, m * n // (m + n) // 2)

            def solve(target: Any = target, weights: Any = weights, rank: int = rank, form: str = form) -> Any:
                return wlra.solve(target, weights, rank, method=form).left.block_until_ready()

            first = spent(solve)
            later = sorted(spent(solve) for _ in range(runs))[runs // 2]
            alone = sorted(spent(lambda t=target, w=weights: lapack(t, w)) for _ in range(runs))[runs // 2]
            spent_on = dict(zip(TIMED, map(list, (first, later, alone)), strict=True))
            rows.append(row(f"{m} x {n}", form, None, "") | spent_on)
    return rows


def in_batches(kernels: Mapping[tuple[int, int], int]) -> list[Row]:
    """By form and shape, a batch of so many kernels and a loop over them."""
    rows = []
    for form, options in BATCHED.items():
        for (m, n), count in kernels.items():
            target, weights = problem("separable" if form == "anderson" else form, m, n)
            rank = max(1, m * n // (m + n) // 2)
            targets = np.random.default_rng(0).normal(size=(count, m, n)).astype(np.float32)
            shared = jax.tree.map(lambda leaf, count=count: np.broadcast_to(leaf, (count, *leaf.shape)), weights)

            def batch(targets: Any = targets, weights: Any = shared, rank: int = rank, form: str = form) -> Any:
                return wlra.solve_batch(targets, weights, rank, method=form, **BATCHED[form]).left.block_until_ready()

            def loop(targets: Any = targets, weights: Any = weights, rank: int = rank, form: str = form) -> Any:
                found = [wlra.solve(one, weights, rank, method=form, **BATCHED[form]).left for one in targets]
                return jax.block_until_ready(found)

            wlra.solve(target, weights, rank, method=form, **options)
            batch()
            rows.append(
                row(f"{m} x {n}", form, None, "", kind=BATCHES, count=count, batch=spent(batch), loop=spent(loop))
            )
    return rows


def batch_table(rows: list[Row]) -> str:
    """Seconds of both."""
    cells = [
        [line["method"], line["count"], line["problem"]]
        + [f"{each:.2f}" for name in ("batch", "loop") for each in line[name]]
        + [f"{line['batch'][0] / line['loop'][0]:.2f}"]
        for line in rows
    ]
    columns = [f"{name}, {kind} s" for name in ("batch", "loop") for kind in ("wall", "CPU")]
    return markdown(["method", "kernels", "size", *columns, "batch over loop"], cells)


def report(rows: list[Row]) -> str:
    """All tables, in Markdown, and the bars."""
    batched = [line for line in rows if line.get("kind") == BATCHES]
    rows = [line for line in rows if line.get("kind") != BATCHES]
    steps = {line["method"]: Spent(*line["spent"]) for line in rows if line["problem"] == STEPS}
    forms = [line for line in rows if line["problem"] != STEPS]
    upper = [[name, f"{each.wall:.2f}", f"{each.cpu:.2f}"] for name, each in steps.items()]
    lower = [
        [line["method"], line["problem"]]
        + [f"{each:.4f}" for name in TIMED for each in line[name]]
        + [f"{line[name][0] / line['LAPACK'][0]:.1f}" for name in TIMED[:2]]
        for line in forms
    ]
    columns = [f"{name}, {kind} s" for name in TIMED for kind in ("wall", "CPU")]
    head = ["form", "size", *columns, "first over LAPACK", "later over LAPACK"]
    tables = [markdown(["step", "wall s", "CPU s"], upper), markdown(head, lower)]
    bars = verdicts(steps, forms)
    if batched:
        tables.append(batch_table(batched))
        both = [
            sum(line[name][0] for line in batched if line["method"] == form)
            for form in BATCHED
            for name in ("batch", "loop")
        ]
        worst = max(batch / loop for batch, loop in zip(both[::2], both[1::2], strict=True))
        bars.append(at_most("solve_batch of all 72 kernels, in times of a loop,", worst, 1.0))
    return "\n\n".join([*tables, "\n".join(bars)])


def verdicts(steps: Mapping[str, Spent], forms: list[Row]) -> list[str]:
    """The lines of the bars, by the clock."""
    ours = steps["decompose"].wall + sum(each.wall for name, each in steps.items() if name.startswith("plan"))
    alone = min(steps["NumPy's eigh"].wall, steps["NumPy's eigh, one thread"].wall)
    worst = max(line[name][0] / line["LAPACK"][0] for line in forms for name in TIMED[:2])
    return [
        at_most("decomposing, planning and cutting, in times of NumPy's eigh,", ours / alone, 2),
        at_most("a closed form, in times of its LAPACK decomposition,", worst, 1.3),
    ]


def main(argv: list[str] | None = None) -> None:
    options = arguments("decompositions", __doc__).parse_args(argv)
    steps = beside_eigh(*(seeded(1, 48) if options.quick else seeded(12)))
    forms = closed_forms(((24, 16),), runs=1) if options.quick else closed_forms()
    forms += in_batches({(24, 16): 2} if options.quick else KERNELS)
    rows = [row(STEPS, name, None, "", spent=list(each)) for name, each in steps.items()] + forms
    text = report(rows)
    print(text)
    write(options, "decompositions", rows, None, doc=__doc__, text=text)


if __name__ == "__main__":
    main()
