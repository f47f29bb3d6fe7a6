"""Problems over several devices: a batch dealt out to them, or one matrix cut along its longer axis."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from wlra import checks
from wlra.methods.closed import equal
from wlra.options import Inputs, Options
from wlra.problem import Factors
from wlra.scaling import Scaling, equilibrate

AXIS = "devices"


REPLICATED, FIRST = PartitionSpec(), PartitionSpec(AXIS)


# jax.shard_map came when jax.experimental.shard_map went, and its check has another name there. It is off: it does not
# know the types of a while loop whose state begins as constants.
if hasattr(jax, "shard_map"):
    shard_map = functools.partial(jax.shard_map, check_vma=False)
else:
    shard_map = functools.partial(importlib.import_module("jax.experimental.shard_map").shard_map, check_rep=False)


class Cut(NamedTuple):
    """How a matrix lies on the devices: with its longer axis second, which is cut and was padded from this length."""

    mesh: Mesh
    transposed: bool
    length: int


def check_mesh(mesh: Any) -> Mesh:
    """The mesh with all its devices on one axis, partitioned by the compiler whatever the types of its axes were."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('devices',)); got {type(mesh).__name__}"
        )
    return Mesh(mesh.devices.ravel(), (AXIS,))


def check_placed(W: Any, weights: Any, mesh: Any) -> None:
    """A ValueError for an array that lies on an explicit mesh, over which nothing is computed unless one is given."""
    for name, value in (("W", W), ("weights", weights)):
        if mesh is None and isinstance(value, jax.Array) and not checks.is_traced(value):
            axes = getattr(getattr(value.sharding, "mesh", None), "axis_types", None) or ()
            if any("Explicit" in str(axis) for axis in axes):
                raise ValueError(
                    f"{name} lies on an explicit mesh: wanted mesh={name}.sharding.mesh too, to compute over it"
                )


def deal(arrays: Any, mesh: Mesh) -> Any:
    """The arrays with their first axis split over the devices; the last problem is repeated until they divide it."""

    def one(array: Any) -> Array:
        short = -len(array) % mesh.size
        pad = (jnp if isinstance(array, jax.Array) else np).pad
        padded = pad(array, ((0, short), *[(0, 0)] * (array.ndim - 1)), mode="edge") if short else array
        return place(padded, NamedSharding(mesh, FIRST))

    return jax.tree.map(one, arrays)


def each_its_own(function: Callable, mesh: Mesh) -> Callable:
    """The function of (arrays, scalars) run by each device on its own part of the arrays, waiting for no other."""
    return shard_map(function, mesh=mesh, in_specs=(FIRST, REPLICATED), out_specs=FIRST)


def cut(mesh: Mesh, inputs: Inputs) -> tuple[Inputs, Cut]:
    """Target, weights and start, if it is a pair, cut along the longer axis; what is added to divide it weighs zero.

    Wide: from tall ones the compiler makes hundreds of exchanges an iteration, from wide ones three. Arrays of NumPy go
    to the devices in parts, and none ever holds a whole one.
    """
    rows, columns = inputs.target.shape
    plan, start = Cut(mesh, rows > columns, max(rows, columns)), inputs.start
    if start is not None:
        left, right = transpose(*start, plan)
        start = Factors(place(left, NamedSharding(mesh, REPLICATED)), part(right, plan))
    W, weights = (part(array.T if plan.transposed else array, plan) for array in (inputs.target, inputs.weights))
    return inputs._replace(target=W, weights=weights, start=start), plan


def turned(options: Options, plan: Cut) -> Options:
    """The options, their start by the rows and columns of the caller's matrix, which may lie transposed."""
    start = options.start
    if start is None or start.equalise in (None, equal, equilibrate) or not plan.transposed:
        return options
    return options._replace(start=start._replace(equalise=turned_over(start.equalise)))


@functools.cache
def turned_over(equalise: Callable[[Any], Scaling]) -> Callable[[Any], Scaling]:
    """The function weight -> scaling, of a weight that is transposed."""

    def of_columns(weight: Any) -> Scaling:
        row, col = equalise(weight.T)
        return Scaling(col, row)

    return of_columns


def uncut(left: Array, right: Array, plan: Cut) -> Factors:
    """The factors as the caller's matrix lies, without the columns that were added."""
    return Factors(*transpose(left, right[:, : plan.length], plan))


def transpose(left: Any, right: Any, plan: Cut) -> tuple[Any, Any]:
    """The factors of the matrix, transposed if the plan says so."""
    return (right.T, left.T) if plan.transposed else (left, right)


def part(array: Any, plan: Cut) -> Array:
    """The matrix with its columns cut over the devices, padded with zeros."""
    short = -array.shape[1] % plan.mesh.size
    if short:
        array = (jnp if isinstance(array, jax.Array) else np).pad(array, ((0, 0), (0, short)))
    return place(array, NamedSharding(plan.mesh, PartitionSpec(None, AXIS)))


def place(array: Any, sharding: NamedSharding) -> Array:
    """The array as the sharding says. Of an array of one process, each process gives its devices their parts."""
    if checks.is_traced(array):
        return jax.lax.with_sharding_constraint(array, sharding)
    if isinstance(array, jax.Array) and (sharding.is_fully_addressable or not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(
        host.shape, sharding, lambda index: np.array(host[index])
    )  # the caller's may change
