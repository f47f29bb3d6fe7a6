"""One pass of a base algorithm over both factors: what accelerations accelerate."""

from collections.abc import Callable

from jaxtyping import Array, Float

from wlra.linalg.batch import over_grams
from wlra.linalg.decompose import subspace_step
from wlra.linalg.gram import gram_solve
from wlra.problem import Factors, Problem, weighted_residual
from wlra.sparse import Matrix

Sweep = Callable[[Problem, Factors], Factors]


def em(problem: Problem, factors: Factors) -> Factors:
    """The loss does not rise: one majorisation step, with the projection by one subspace step in place of an SVD.

    Srebro & Jaakkola 2003, sec. 3: complete the target where its weight is below 1, Y = X + weight * (target - X), and
    project Y on the matrices of rank k. Differs from the paper: the projection is onto the span of Y @ right.T, which
    `right` makes nearly optimal from one iteration to the next. Three products of 2mnk operations. Needs weights <= 1.
    """
    return subspace_step(weighted_residual(problem, factors), factors, problem.penalty)


def als(problem: Problem, factors: Factors) -> Factors:
    """Each row of `left`, then each column of `right`, minimises the objective with the other factor fixed.

    Srebro & Jaakkola 2003, sec. 2. Differs from the paper: rows move by a correction whose Gram matrix is shifted
    relative to its own size, so that rows with tiny weights are not pulled to zero. Rows with fewer weights than
    unknowns may also move where nothing that counts changes.
    """
    left = best_left(problem, factors)
    return Factors(left, best_right(problem, Factors(left, factors.right)))


def best_left(problem: Problem, factors: Factors) -> Float[Array, "m k"]:
    """The `left` of least objective for the `right` given."""
    gradient = weighted_residual(problem, factors) @ factors.right.T - problem.penalty * factors.left
    return factors.left + corrections(problem.weight, gradient, factors.right, problem.penalty)


def best_right(problem: Problem, factors: Factors) -> Float[Array, "k n"]:
    """The `right` of least objective for the `left` given."""
    gradient = factors.left.T @ weighted_residual(problem, factors) - problem.penalty * factors.right
    return factors.right + corrections(problem.weight.T, gradient.T, factors.left.T, problem.penalty).T


def corrections(
    weight: Matrix,
    gradient: Float[Array, "m k"],
    basis: Float[Array, "k n"],
    penalty: Float[Array, ""] | float,
) -> Float[Array, "m k"]:
    """Row i is the correction d_i with (basis diag(weight_i) basis' + penalty) d_i = gradient_i."""
    return over_grams(lambda gram, gradient: gram_solve(gram, gradient, penalty), weight, basis, gradient)
