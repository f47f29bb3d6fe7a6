"""The pipeline under vmap, in chunks, over devices and from random starts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from wlra import checks, devices
from wlra.components import side_by_side
from wlra.door import Given, wide
from wlra.linalg.batch import in_chunks
from wlra.methods.host import Found
from wlra.narrowing import as_dtype
from wlra.options import Inputs, Options, Request, join, split
from wlra.pipeline import solve_inputs
from wlra.problem import Factors, Kronecker
from wlra.result import History, Restarts, Result, Status
from wlra.sparse import is_sparse

ROUND = 5  # starts solved at a time


@functools.partial(jax.jit, static_argnames=("options", "chunk"))
def solve_chunks(inputs: Inputs, options: Options, chunk: int) -> Result:
    """Many problems of one shape, `chunk` at a time."""

    arrays, shared = split(inputs)

    def one(arrays: tuple) -> Result:
        return solve_inputs(join(arrays, shared), options)

    return jax.vmap(one)(arrays) if chunk == len(inputs.target) else in_chunks(one, arrays, chunk)


@functools.partial(jax.jit, static_argnames=("options", "chunk", "mesh"))
def solve_dealt(inputs: Inputs, options: Options, chunk: int, mesh: Mesh) -> Result:
    """Many problems of one shape, each device its own, `chunk` at a time."""

    def part(arrays: tuple, shared: tuple) -> Result:
        return solve_chunks(join(arrays, shared), options, chunk)

    return devices.each_its_own(part, mesh)(*split(inputs))


def known_on_host(given: Given, request: Request) -> bool:
    """Whether a closed form can be computed in NumPy: float32 that is known, and no accelerator at hand."""
    weights = given.weights if isinstance(given.weights, Kronecker) else (given.weights,)
    arrays = (given.target, *weights)
    if request.method.on_host is None or jax.default_backend() != "cpu" or is_sparse(given.target) or wide(given):
        return False
    return not any(checks.is_traced(each) or checks.on_accelerator(each) for each in (*arrays, request.tol))


def solve_on_host(inputs: Inputs, options: Options, count: int | None = None) -> Result:
    """One problem by its closed form in NumPy, or each of a batch, one on each core."""
    on_host, (target, weights) = options.method.on_host, jax.tree.map(np.asarray, inputs[:2])
    assert on_host is not None  # asked before
    if count is None:
        return jax.tree.map(jnp.asarray, host_result(on_host(target, weights, options.rank), inputs))
    ranks = [options.rank] * count if inputs.ranks is None else np.asarray(inputs.ranks).tolist()

    def one(i: int) -> Result:
        units = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count,))[i], inputs.units)
        try:
            found = on_host(target[i], jax.tree.map(lambda leaf: leaf[i], weights), ranks[i])
        except ValueError as error:
            raise ValueError(f"problem {i} of the batch: {error}") from None
        missing = options.rank - ranks[i]
        left, right = np.pad(found.left, ((0, 0), (0, missing))), np.pad(found.right, ((0, missing), (0, 0)))
        return host_result(found._replace(left=left, right=right), inputs._replace(units=units))

    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *side_by_side(one, range(count)))


def host_result(found: Found, inputs: Inputs) -> Result:
    """The result, in units of the caller and in arrays of NumPy."""
    half, dtype = inputs.units.target // 2, inputs.target.dtype
    left: Any = np.ldexp(found.left, half).astype(dtype)
    right: Any = np.ldexp(found.right, inputs.units.target - half).astype(dtype)
    known = found.stationarity <= inputs.tol and found.lowest
    status: Any = np.int32(Status.CONVERGED if known else Status.CLOSED_FORM)
    loss: Any = np.float32(found.loss)
    stationarity: Any = np.float32(found.stationarity)
    zero: Any = np.int32(0)
    gap: Any = np.float32(np.inf)
    history = History(loss[None], stationarity[None])
    result = Result(left, right, loss, stationarity, iterations=zero, status=status, history=history, gap=gap)
    finite = np.isfinite(left).all() and np.isfinite(right).all()
    return result if finite else as_dtype(result, dtype)


def solve_cut(inputs: Inputs, options: Options, plan: devices.Cut) -> Result:
    """One problem cut over the devices: the compiler makes every product and sum of parts."""
    result = solve_inputs(inputs, options)
    left, right = devices.uncut(result.left, result.right, plan)
    return result._replace(left=left, right=right)


def solve_repeatedly(inputs: Inputs, options: Options, count: int, key: Any) -> Result:
    """The result of the lowest loss from random starts, which stop once it has been found twice."""
    losses, found = np.zeros(0), tally(np.full(1, np.inf), 0.0)
    rounds: list[Result] = []
    for start in random_starts(inputs.target, inputs.weights, options.rank, count=count, key=key):
        rounds.append(solve_from_each(inputs._replace(start=start), options._replace(start=None)))
        losses = np.append(losses, np.nan_to_num(rounds[-1].loss, nan=np.inf))
        found = tally(losses, float(jnp.finfo(rounds[-1].loss.dtype).eps) ** (1 / 3))
        if found.count[0] > 1:
            break
    place, winner = divmod(int(np.argmin(losses)), len(rounds[0].loss))
    return jax.tree.map(lambda leaf: leaf[winner], rounds[place])._replace(restarts=found)


@functools.partial(jax.jit, static_argnames="options")
def solve_from_each(inputs: Inputs, options: Options) -> Result:
    """One problem from several starts at a time."""
    return jax.vmap(lambda start: solve_inputs(inputs._replace(start=start), options))(inputs.start)


def random_starts(W: Array, weights: Array, rank: int, *, count: int, key: Any) -> list[Factors]:
    """Factors of normal entries, stacked in rounds; their products are as large as the target."""
    if key is None:
        raise ValueError("restarts are random: give key=jax.random.key(seed)")
    key = checks.check_key(key)
    if checks.is_traced(W) or checks.is_traced(weights):
        raise ValueError("restarts stop at a loss found twice, which needs values: call outside of jit and vmap")
    dtype = jnp.float64 if jnp.float64 in (W.dtype, weights.dtype) else jnp.float32
    seen = (weights > 0) & jnp.isfinite(W)
    size = jnp.max(jnp.abs(jnp.where(seen, W, 0))).astype(dtype)
    mean = jnp.sqrt(jnp.mean((jnp.where(seen, W, 0) / jnp.where(size > 0, size, 1)) ** 2, where=seen))
    root = jnp.sqrt(size) * jnp.sqrt(mean.astype(dtype) / jnp.sqrt(rank))
    keys = jax.random.split(key, 2 * count)
    left = jax.vmap(lambda key: root * jax.random.normal(key, (W.shape[0], rank), dtype))(keys[:count])
    right = jax.vmap(lambda key: root * jax.random.normal(key, (rank, W.shape[1]), dtype))(keys[count:])
    return [Factors(left[i : i + ROUND], right[i : i + ROUND]) for i in range(0, count, ROUND)]


def tally(losses: Float[np.ndarray, " r"], resolution: float) -> Restarts:
    """The losses, those within the relative resolution of one another taken for one.

    And those below the resolution's cube, eps in `solve`: of exact fits, only rounding errors are left.
    """
    ordered = np.sort(losses)
    apart = resolution * np.maximum(ordered[:-1], resolution**3)
    new = np.append(True, ordered[1:] > ordered[:-1] + apart)
    places = np.flatnonzero(new)
    return Restarts(ordered[places], np.diff(np.append(places, len(ordered))))
