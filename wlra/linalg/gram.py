"""Inverses and solutions of small Gram matrices (k, k)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def gram_inverse(gram: Float[Array, "k k"], shift: Float[Array, ""] | float = 0.0) -> Float[Array, "k k"]:
    """The inverse of gram + shift, whose unit-diagonal form is shifted by k * eps, the size of its rounding errors.

    Products alone: a Cholesky factor takes fewer operations and several times as long, within a loop of products; on a
    CPU its threads get in the way of theirs, and accelerators are slow at it. Callers multiply a residual by the
    result, so the shift biases no solution.
    """
    unit, scale = unit_diagonal(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))
    guess = by_halves(unit, times=2) if len(gram) >= 2 * SMALL else jnp.zeros_like(unit)
    return newton_schulz(unit, guess) * (scale[:, None] * scale[None, :])


SMALL = 16  # what halves are not worth it for


def by_halves(matrix: Float[Array, "k k"], times: int) -> Float[Array, "k k"]:
    """The inverse of a symmetric positive definite matrix from those of half its size (Strassen 1969, sec. 2).

    A third of the operations of Newton-Schulz on the whole, but good for condition numbers below 1e3 in float32.
    """
    half = len(matrix) // 2
    if times == 0 or half < SMALL:
        return newton_schulz(matrix, jnp.zeros_like(matrix))
    corner, side = matrix[:half, :half], matrix[:half, half:]
    first = by_halves(corner, times - 1)
    across = first @ side
    schur = matrix[half:, half:] - side.T @ across
    rest = by_halves((schur + schur.T) / 2, times - 1)
    off = across @ rest
    return jnp.block([[first + off @ across.T, -off], [-off.T, rest]])


def newton_schulz(matrix: Float[Array, "k k"], guess: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The inverse of a positive definite matrix by X <- X (2 - A X), from the guess if that is any good.

    Schulz 1933; Ben-Israel & Cohen 1966. 4k^3 operations a step: one or two from a good guess; else log2(cond) + 4.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)

    def improving(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        """Whether the last step squared the defect, as all do until rounding errors are left; or it is still large."""
        _, defect, before, count = state
        size = jnp.sum(defect**2)
        return ((before > 0.1) | (size < before / 4)) & (count < 64)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        inverse, defect, _, count = state
        inverse = inverse + inverse @ defect
        return inverse, eye - matrix @ inverse, jnp.sum(defect**2), count + 1

    least = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    defect = eye - matrix @ guess
    good = jnp.sum(defect**2) < 0.25
    first, defect = jnp.where(good, guess, eye / least), jnp.where(good, defect, eye - matrix / least)
    start = first, defect, jnp.array(jnp.inf, matrix.dtype), jnp.array(0, jnp.int32)
    return jax.lax.while_loop(improving, step, start)[0]


def gram_solve(
    gram: Float[Array, "k k"], right_side: Float[Array, " k"], shift: Float[Array, ""] | float = 0.0
) -> Float[Array, " k"]:
    """The solution with the inverse of `gram_inverse`, by Cholesky: for many small systems with one right side each.

    Where rounding has left more than the shift makes up for and there is no factor, the shift grows until there is one.
    """
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    unit, scale = unit_diagonal(gram + shift * eye)

    def solved(more: Float[Array, ""]) -> Float[Array, " k"]:
        return scale * jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(unit + more * eye), True), scale * right_side)

    def failed(state: tuple[Array, Array]) -> Bool[Array, ""]:
        more, solution = state
        return ~jnp.all(jnp.isfinite(solution)) & (more < 1)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return 16 * state[0], solved(16 * state[0])

    none = jnp.zeros((), gram.dtype)
    least = none + len(gram) * jnp.finfo(gram.dtype).eps
    return jax.lax.while_loop(failed, again, (least, solved(none)))[1]


def eliminated(gram: Float[Array, "k k"], shift: Float[Array, ""] | float = 0.0) -> Float[Array, "k k"]:
    """The inverse of `gram_inverse`, by Gauss-Jordan elimination in place: for many small matrices under vmap.

    On a CPU, triangular solves with many right sides, one small matrix after another, spend their time on threads.
    """
    unit, scale = unit_diagonal(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))

    def sweep(i: Int[Array, ""], matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
        inverse = 1 / matrix[i, i]
        pivot, column = (matrix[i] * inverse).at[i].set(inverse), matrix[:, i]
        return (matrix.at[:, i].set(0) - column[:, None] * pivot[None, :]).at[i].set(pivot)

    return jax.lax.fori_loop(0, len(gram), sweep, unit) * (scale[:, None] * scale[None, :])


def tiny_solve(gram: Float[Array, "k k"], right_side: Float[Array, " k"]) -> Float[Array, " k"]:
    """The solution of `gram_solve` for a handful of unknowns, by elimination without a call to LAPACK.

    In a loop of products, LAPACK's threads and XLA's keep each other waiting.
    """
    unit, scale = unit_diagonal(gram)
    rows = jnp.concatenate([unit, (scale * right_side)[:, None]], axis=1)
    for i in range(len(gram)):
        pivot = rows[i] / rows[i, i]
        rows = (rows - rows[:, i, None] * pivot[None, :]).at[i].set(pivot)
    return scale * rows[:, -1]


def unit_diagonal(gram: Float[Array, "k k"]) -> tuple[Float[Array, "k k"], Float[Array, " k"]]:
    """diag(scale) gram diag(scale) with a diagonal of ones, plus the shift; and scale.

    Ones in place of zeros too: what is not there has no part in anything, and the condition number none of it.
    """
    k, diagonal = len(gram), jnp.diagonal(gram)
    scale = 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    shift = k * jnp.finfo(gram.dtype).eps + jnp.where(diagonal > 0, 0, 1)
    return gram * (scale[:, None] * scale[None, :]) + jnp.diag(shift), scale


def psd_inverse(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The pseudo-inverse of a positive semi-definite matrix: solutions have the least norm."""
    values, vectors = jnp.linalg.eigh(gram)
    large = values > len(gram) * 16 * jnp.finfo(gram.dtype).eps * values[-1]
    return (vectors * jnp.where(large, 1 / jnp.where(large, values, 1), 0)[None, :]) @ vectors.T


def damped_solve(
    matrix: Float[Array, "d d"], right_side: Float[Array, " d"], damping: Float[Array, ""]
) -> Float[Array, " d"]:
    """The solution for a positive semi-definite matrix plus the damping times its largest diagonal entry."""
    shift = damping * jnp.max(jnp.diagonal(matrix))
    lower = jnp.linalg.cholesky(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))
    return jax.scipy.linalg.cho_solve((lower, True), right_side)
