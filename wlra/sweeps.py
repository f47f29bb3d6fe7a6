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

    All Gram matrices are one product of 2mnk^2 operations; they and the products of pairs of basis rows are held, which
    takes (m + n) k^2 numbers.
    """
    k, n = basis.shape
    pairs = (basis[:, None, :] * basis[None, :, :]).reshape(k * k, n)
    grams = (weight @ pairs.T).reshape(-1, k, k)
    return jax.vmap(gram_solve)(grams, grad @ basis.T)
