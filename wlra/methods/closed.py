"""Closed forms: one decomposition each, exact for weights of a special shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wlra.certificate import nearly_equal
from wlra.linalg.decompose import mask_rank, square_root, truncated_svd
from wlra.linalg.gram import eliminated
from wlra.methods import host
from wlra.methods.method import Evaluated, Method
from wlra.problem import Factors, Kronecker, Problem, loss, rounding, stationarity, total
from wlra.scaling import Scaling, equilibrate, scale, scale_factors, unscale_factors
from wlra.sparse import Matrix, row_sum


def equal(weight: Matrix) -> Scaling:
    """All weights are taken for equal."""
    m, n = weight.shape
    return Scaling(jnp.ones(m, weight.dtype), jnp.ones(n, weight.dtype))


def row_sums(weight: Matrix) -> Scaling:
    """The weights of a row are taken for equal, and replaced by their sum (Hsu et al. 2022, eq. 7).

    The row of a kernel (in, out) is an input, as in the paper.
    """
    return Scaling(row_sum(weight), jnp.ones(weight.shape[1], weight.dtype))


def equalised(
    name: str, equalise: Callable[[Matrix], Scaling], on_host: host.Equalise, *, sees_hidden: bool = False
) -> Method:
    """The method that is exact for weights row_i col_j, and takes those of `equalise` for all others.

    Its factors are the truncated SVD in the variables in which such weights are equal; loss and stationarity are those
    of the weights as given.
    """

    def closed_form(problem: Problem, rank: int, ranks: Any) -> Evaluated:
        scaling = equalise(problem.weight)
        scaled = scale(problem, scaling)
        best = mask_rank(truncated_svd(scaled.target, rank), ranks)
        factors, lowest = unscale_factors(best, scaling), nearly_equal(scaled.weight)
        if equalise is not equilibrate:
            scaling = equilibrate(problem.weight)
            scaled, best = scale(problem, scaling), scale_factors(factors, scaling)
        return Evaluated(factors, loss(scaled, best), stationarity(scaled, best, eliminated), lowest)

    return Method(
        name,
        closed_form=closed_form,
        on_host=host.of_entries(on_host, sees_hidden),
        equalise=equalise,
        sees_hidden=sees_hidden,
        keeps_zeros=True,
    )


svd = equalised("svd", equal, host.equal_weights, sees_hidden=True)  # Eckart & Young 1936
fwsvd = equalised("fwsvd", row_sums, host.summed, sees_hidden=True)  # Hsu et al. 2022, eq. 7
separable = equalised("separable", equilibrate, host.equilibrated)  # Irani & Anandan 2000, sec. 3


class Deflated(NamedTuple):
    """The components of a Kronecker problem that have been found, and what they leave of it.

    factors: zero from component `count` on.
    rest: the target less their product, and both weights less what that no longer sees of them.
    whole: the weighted square of the target as given.
    """

    factors: Factors
    rest: Problem
    whole: Float[Array, ""]
    count: Int[Array, ""]


def deflate(state: Deflated, wanted: Int[Array, ""]) -> Deflated:
    """The leading components of what is left, up to the number wanted, and down to those that rounding blurs.

    The eigenvectors U of root' target col target' root, with root root' = row, give right = U' root' target, and that
    the best left. Decompositions have errors of eps times the largest eigenvalue. Components far smaller are left to
    the next call, which no longer sees the large ones; those of the size of rounding errors are left out.
    """
    target, (row, col) = state.rest.target, state.rest.weight
    slot, eps = jnp.arange(state.factors.left.shape[1], dtype=jnp.int32), jnp.finfo(target.dtype).eps
    root, product = square_root(row), target @ col
    gram = root.T @ (product @ target.T) @ root
    ascending, vectors = jnp.linalg.eigh((gram + gram.T) / 2)
    whole = jnp.maximum(state.whole, jnp.sum(ascending))
    order = len(ascending) - 1 - jnp.clip(slot - state.count, 0, len(ascending) - 1)
    values = ascending[order]
    clear = (values > 4 * jnp.sqrt(eps) * ascending[-1]) & (values > (8 * eps) ** 2 * whole)
    kept = clear & (slot >= state.count) & (slot < wanted)
    one = jnp.diag(kept.astype(target.dtype))
    size = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    right = (root @ (vectors[:, order] * size[None, :])).T @ target
    across = right @ col
    left = product @ right.T @ (2 * one - across @ right.T)  # the inverse of what is the identity but for rounding
    along = (left * size[None, :]).T @ row
    rest = Kronecker(
        row - along.T @ (2 * one - along @ (left * size[None, :])) @ along,
        col - across.T @ (2 * one - across @ right.T) @ across,
    )
    return Deflated(
        Factors(state.factors.left + left, state.factors.right + right),
        Problem(target - left @ right, rest),
        whole=whole,
        count=jnp.where(jnp.any(kept), state.count + jnp.sum(kept, dtype=jnp.int32), wanted),
    )


def nearest(problem: Problem, rank: int, ranks: Int[Array, ""] | None = None) -> Evaluated:
    """The factors of least trace(row E col E'), E = target - left @ right, with their relative loss and stationarity.

    Components are found a few at a time (`deflate`), so that those beside one a million times as large are seen too.
    The larger of the two weights is only multiplied with: of 768 x 3072, decompositions of 768. What the smaller
    side's weight is too small to see is fitted as the rest is.
    """
    target, weight = problem.target, problem.weight
    m, n = target.shape
    if m > n:
        flipped = Problem(target.T, Kronecker(weight.col, weight.row))
        best = nearest(flipped, rank, ranks)
        return best._replace(factors=Factors(best.factors.right.T, best.factors.left.T))
    wanted = jnp.asarray(rank if ranks is None else ranks, jnp.int32)
    zeros = Factors(jnp.zeros((m, rank), target.dtype), jnp.zeros((rank, n), target.dtype))
    start = Deflated(zeros, problem, whole=jnp.zeros((), target.dtype), count=jnp.zeros((), jnp.int32))
    found = jax.lax.while_loop(lambda state: state.count < wanted, lambda state: deflate(state, wanted), start)
    error, (row, col) = found.rest.target, found.rest.weight
    weighted = row @ error
    lost = jnp.maximum(total(weighted * (error @ col)), 0)
    along = found.factors.left.T @ weighted
    share = jnp.sqrt(jnp.clip(total(along * (along @ col)) / jnp.where(lost > 0, lost, 1), 0, 1))
    relative = lost / jnp.where(found.whole > 0, found.whole, 1)
    return Evaluated(found.factors, relative, jnp.where(relative > rounding(found.factors), share, 0), lowest=True)


kronecker = Method("kronecker", closed_form=nearest, on_host=host.of_rows_and_columns, kronecker=True, keeps_zeros=True)
