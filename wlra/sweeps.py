"""One pass of a base algorithm over both factors: what accelerations accelerate."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from wlra.linalg import Factors, gram_solve, subspace_step
from wlra.problem import Problem, gradient

Sweep = Callable[[Problem, Factors], Factors]


def em(problem: Problem, factors: Factors) -> Factors:
    """The loss does not rise: one majorisation step, with the projection by one subspace step in place of an SVD.

    Srebro & Jaakkola 2003, sec. 3: complete the target where its weight is below 1, Y = X + weight * (target - X), and
    project Y on the matrices of rank k. Differs from the paper: the projection is onto the span of Y @ right.T, which
    `right` makes nearly optimal from one iteration to the next. Three products of 2mnk operations. Needs weights <= 1.
    """
    return subspace_step(gradient(problem, factors), factors)


def als(problem: Problem, factors: Factors) -> Factors:
    """Each row of `left`, then each column of `right`, minimises the objective with the other factor fixed.

    Srebro & Jaakkola 2003, sec. 2. Differs from the paper: rows move by a correction whose Gram matrix is shifted
    relative to its own size, so that rows with tiny weights are not pulled to zero, and rows with fewer weights than
    unknowns move no further than they must.
    """
    left = factors.left + best_rows(problem.weight, gradient(problem, factors), factors.right)
    half = Factors(left, factors.right)
    right = factors.right + best_rows(problem.weight.T, gradient(problem, half).T, left.T).T
    return Factors(left, right)


def best_rows(
    weight: Float[Array, "m n"], grad: Float[Array, "m n"], basis: Float[Array, "k n"]
) -> Float[Array, "m k"]:
    """Row i is the correction d_i with (basis diag(weight_i) basis') d_i = basis @ grad_i.

    Rows are taken a few at a time: no more than about the size of `weight` is held besides (at least one row's k * n).
    """
    m, k = len(weight), len(basis)

    def row(pair: tuple[Float[Array, " n"], Float[Array, " k"]]) -> Float[Array, " k"]:
        weight_row, right_side = pair
        gram = (basis * weight_row[None, :]) @ basis.T
        return gram_solve(gram, right_side)

    return jax.lax.map(row, (weight, grad @ basis.T), batch_size=max(1, min(m, 4 * m // k)))
