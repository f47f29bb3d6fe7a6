"""Whether a stationary point is a minimum: how much lower the loss can be nearby, and where.

A small gradient bounds nothing where the curvature is small or negative. What is left to gain is g' H^-1 g / 2 with the
Hessian H, if no direction bends downwards; both are read off a few products with H (see `look_around`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wlra.linalg.batch import over_grams
from wlra.linalg.decompose import orthonormal
from wlra.linalg.gram import eliminated, gram_inverse
from wlra.problem import Factors, Problem, loss, residual, total, weighted_residual
from wlra.sparse import Matrix, entries, is_sparse, like, values

WITHIN = 0.01  # a loss that is said to have converged is within this share of a local minimum
STEPS, FEW = 20, 8  # products with the Hessian, and for factors of more than MANY numbers
MANY, GRAMS = 2**14, 2**20  # numbers of the factors, and of the Gram matrices of all rows and columns
COUNTS, NEARLY_ALL = 0.01, 0.95  # a scaled weight that counts; the share of each row and column whose weights must
DIRECTIONS, PASSES = 4, 8  # in which a component is turned, and how often they are improved


class Look(NamedTuple):
    """What was seen around a point: whether it is within WITHIN of a minimum, a point nearby, and the loss there."""

    certified: Bool[Array, ""]
    factors: Factors
    loss: Float[Array, ""]


class Surroundings(NamedTuple):
    """Half the objective to second order around a point, and the inverses that make its curvatures about 1."""

    problem: Problem
    factors: Factors
    weighted_residual: Matrix
    rows: Float[Array, "... k k"]
    columns: Float[Array, "... k k"]


def trusted(weight: Matrix, tol: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether nearly all weights count, so that the curvature is far from 0 along all that a gradient can show.

    A stationarity of `tol` then leaves a share of about tol**2 / COUNTS of the loss, which must be within WITHIN.
    """
    if is_sparse(weight):
        return jnp.array(False)
    counts = (weight >= COUNTS).astype(weight.dtype)
    nearly_all = [jnp.min(jnp.mean(counts, axis=axis)) >= NEARLY_ALL for axis in (0, 1)]
    return nearly_all[0] & nearly_all[1] & (tol**2 <= WITHIN * COUNTS)


def bends(problem: Problem, factors: Factors, ranks: Int[Array, ""] | None = None) -> Bool[Array, ""]:
    """Whether the loss falls where the weakest component turns towards what the factors lack.

    As it does at a saddle that symmetry holds the iterates at: a block of the target that no factor meets has no
    gradient. The Hessian of component (l, r) alone is [D, M; M', E], with D = diag(weight r^2), E = diag(l^2 weight)
    and M = weight * (l r' - residual). It has a negative direction where D^-1/2 M E^-1/2 is longer than 1, which it is
    along (l, -r), where nothing changes. A few steps of subspace iteration, of 16 mn operations each, tell; what cannot
    be computed, as of a component of zero, counts as bent.
    """
    if is_sparse(problem.weight):
        return jnp.array(True)
    (left, right), weight = weakest(factors, ranks), values(problem.weight)
    rows, columns = weight @ right**2 + problem.penalty, left**2 @ weight + problem.penalty
    least = jnp.finfo(weight.dtype).eps
    rows, columns = (1 / jnp.sqrt(jnp.maximum(each, least * jnp.max(each))) for each in (rows, columns))
    mixed = weight * (left[:, None] * right[None, :] - residual(problem, factors)) * rows[:, None] * columns[None, :]
    start = patternless(min(weight.shape[1], DIRECTIONS) * weight.shape[1], weight.dtype).reshape(weight.shape[1], -1)

    def improved(_: Any, basis: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return orthonormal(mixed.T @ (mixed @ basis))[0]

    images = mixed @ jax.lax.fori_loop(0, PASSES, improved, orthonormal(start)[0])
    return ~(jnp.linalg.eigvalsh(images.T @ images)[-1] <= (1 + WITHIN) ** 2)


def weakest(factors: Factors, ranks: Int[Array, ""] | None) -> tuple[Float[Array, " m"], Float[Array, " n"]]:
    """A component (l, r) of about the least singular value of the product, both parts of one size.

    By a few steps of inverse iteration: z is an eigenvector of right right' left' left, and l = left z.
    """
    left, right = factors
    inverses = gram_inverse(left.T @ left), gram_inverse(right @ right.T)
    place = jnp.arange(left.shape[1], dtype=jnp.int32)
    start = patternless(len(place), left.dtype)
    start = start if ranks is None else jnp.where(place < ranks, start, 0)

    def improved(_: Any, mix: Float[Array, " k"]) -> Float[Array, " k"]:
        mix = inverses[0] @ (inverses[1] @ mix)
        return mix / jnp.max(jnp.abs(mix))

    along = left @ jax.lax.fori_loop(0, PASSES, improved, start)
    across = (left.T @ along) @ right / jnp.sum(along**2)
    size = jnp.sqrt(jnp.sqrt(jnp.sum(across**2) / jnp.sum(along**2)))
    return along * size, across / size


def nearly_equal(weight: Matrix) -> Bool[Array, ""]:
    """Whether the weights are so equal that the best approximation for equal ones is within WITHIN of the lowest loss.

    Of all: with weights in [1 - WITHIN, 1], no loss is below (1 - WITHIN) times that for weights of 1.
    """
    return jnp.array(False) if is_sparse(weight) else jnp.min(weight) >= (1 - WITHIN) * jnp.max(weight)


def look_around(problem: Problem, factors: Factors) -> Look:
    """The lowest point among some along the directions in which the loss can fall, and what is left to gain.

    A Krylov space of the Hessian (Lanczos 1950) in the inner product of alternating least squares, from the gradient
    and from a fixed direction; on it, Newton's step, and the direction of the least curvature. A longer space would
    find more: it is taken for ten times what the last quarter of this one did.
    """
    around = surroundings(problem, factors)
    error = total(values(problem.weight) * residual(problem, factors) ** 2)
    basis, bent, first = krylov(around)
    product = basis @ bent.T
    curvatures, mix = jnp.linalg.eigh((product + product.T) / 2)
    largest, eps = jnp.max(jnp.abs(curvatures)), jnp.finfo(error.dtype).eps
    newton = -mix @ (first * mix[0] / jnp.maximum(jnp.abs(curvatures), eps**0.75 * largest))
    steps = len(newton)
    last = jnp.where(jnp.arange(steps, dtype=jnp.int32) < steps * 3 // 4, 0, newton)
    left = -first * newton[0] + 10 * last @ product @ last  # and ten times what the last directions brought
    lowest = lowest_of(problem, factors, newton @ basis, mix[:, 0] @ basis, size=jnp.sqrt(error))
    bounded = jnp.isfinite(left) & (left <= WITHIN / 2 * error)
    bends = curvatures[0] < -8 * eps * largest
    share = jnp.where(bends, 16 * eps, WITHIN / 20)  # a saddle is flat at first: any fall counts
    return lowest._replace(certified=bounded & ~(lowest.loss < (1 - share) * loss(problem, factors)))


def surroundings(problem: Problem, factors: Factors) -> Surroundings:
    """With the Gram matrices of all rows and columns, or where those would be too large with two for all."""
    left, right = factors
    (m, n), k = problem.target.shape, left.shape[1]
    if (m + n) * k * k <= GRAMS:
        floor = jnp.finfo(left.dtype).eps / k  # of a Gram matrix whose weights are all 1, where nothing is seen
        rows, columns = grams(problem.weight, right), grams(problem.weight.T, left.T)
        shifts = jnp.repeat(problem.penalty + floor * jnp.stack([total(right**2), total(left**2)]), np.array([m, n]))
        inverses = jax.vmap(eliminated)(jnp.concatenate([rows, columns]), shifts)
        rows, columns = inverses[:m], inverses[m:]
    else:
        rows = gram_inverse(right @ right.T, problem.penalty)[None]
        columns = gram_inverse(left.T @ left, problem.penalty)[None]
    return Surroundings(problem, factors, weighted_residual(problem, factors), rows=rows, columns=columns)


def grams(weight: Matrix, basis: Float[Array, "k n"]) -> Float[Array, "m k k"]:
    """basis diag(weight_i) basis' for each row i."""
    return over_grams(lambda gram: gram, weight, basis)


def descent(around: Surroundings) -> Factors:
    """Minus the derivative of half the objective."""
    (left, right), penalty = around.factors, around.problem.penalty
    return Factors(
        around.weighted_residual @ right.T - penalty * left, left.T @ around.weighted_residual - penalty * right
    )


def hessian_times(around: Surroundings, move: Factors) -> Factors:
    """The second derivative of half the objective, times a move of both factors: six products of 2mnk operations."""
    (left, right), problem, rest = around.factors, around.problem, around.weighted_residual
    moved = entries(problem.target, move.left, right) + entries(problem.target, left, move.right)
    bent = like(problem.target, values(problem.weight) * moved)
    return Factors(
        bent @ right.T - rest @ move.right.T + problem.penalty * move.left,
        left.T @ bent - move.left.T @ rest + problem.penalty * move.right,
    )


def precondition(around: Surroundings, force: Factors) -> Factors:
    """The step of alternating least squares for the force, in both factors at once."""
    if len(around.rows) == 1:
        return Factors(force.left @ around.rows[0], around.columns[0] @ force.right)
    return Factors(
        jnp.einsum("ikl,il->ik", around.rows, force.left), jnp.einsum("jkl,lj->kj", around.columns, force.right)
    )


def krylov(around: Surroundings) -> tuple[Float[Array, "s d"], Float[Array, "s d"], Float[Array, ""]]:
    """Directions, orthonormal for the inverse of `precondition`; the Hessian times each; the gradient along the first.

    The first two are the preconditioned gradient and a direction fixed by formula, each later one is made from the
    Hessian times the last but one. Those that bring nothing new are zero.
    """
    starts = jnp.stack([-flat(descent(around)), wavy(around)])
    steps = STEPS if starts.shape[1] <= MANY else FEW
    none = jnp.zeros((steps, starts.shape[1]), starts.dtype)

    def step(i: Int[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, forces, bent = state
        force = jnp.where(i < 2, starts[i % 2], bent[jnp.maximum(i - 2, 0)])
        move = flat(precondition(around, unflat(force, around.factors)))
        before = force @ move
        for _ in range(2):  # what rounding leaves of the other directions goes in the second pass
            shares = basis @ force
            force, move = force - shares @ forces, move - shares @ basis
        size = force @ move
        new = (size > jnp.finfo(force.dtype).eps * before) & jnp.isfinite(size)
        scale = jnp.where(new, 1 / jnp.sqrt(jnp.where(new, size, 1)), 0)
        force, move = (jnp.where(new, array * scale, 0) for array in (force, move))
        image = flat(hessian_times(around, unflat(move, around.factors)))
        return basis.at[i].set(move), forces.at[i].set(force), bent.at[i].set(image)

    basis, _, bent = jax.lax.fori_loop(0, steps, step, (none, none, none))
    return basis, bent, basis[0] @ starts[0]


def lowest_of(problem: Problem, factors: Factors, newton: Array, bending: Array, *, size: Float[Array, ""]) -> Look:
    """The lowest of points along Newton's step and, both ways, along the direction of least curvature."""
    lengths = size * 4.0 ** -jnp.arange(14, dtype=newton.dtype)
    none = jnp.zeros_like(lengths)
    towards = jnp.concatenate([0.25 ** jnp.arange(4, dtype=newton.dtype), none, none])
    aside = jnp.concatenate([jnp.zeros(4, newton.dtype), lengths, -lengths])

    def at(step: tuple[Array, Array]) -> Factors:
        return unflat(flat(factors) + step[0] * newton + step[1] * bending, factors)

    losses = jax.lax.map(lambda step: loss(problem, at(step)), (towards, aside))
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    return Look(jnp.array(False), at((towards[best], aside[best])), losses[best])


def wavy(around: Surroundings) -> Float[Array, " d"]:
    """Forces without a pattern that a problem could share, about as large in both factors as a step is stiff."""
    left, right = around.factors
    noise = unflat(patternless(left.size + right.size, left.dtype), around.factors)
    return flat(Factors(noise.left * jnp.sum(right**2, 1)[None, :], noise.right * jnp.sum(left**2, 0)[:, None]))


def patternless(count: int, dtype: Any) -> Float[Array, " count"]:
    """Numbers in [-1/2, 1/2], the same each time."""
    waves = jnp.sin(jnp.arange(count, dtype=jnp.int32).astype(dtype) * 12.9898) * 43758.547
    return waves - jnp.floor(waves) - 0.5


def flat(factors: Factors) -> Float[Array, " d"]:
    """All entries of both factors."""
    return jnp.concatenate([factors.left.ravel(), factors.right.ravel()])


def unflat(entries: Float[Array, " d"], as_in: Factors) -> Factors:
    """The factors, of these shapes, with these entries."""
    left, right = as_in
    return Factors(entries[: left.size].reshape(left.shape), entries[left.size :].reshape(right.shape))
