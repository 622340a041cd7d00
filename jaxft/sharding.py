"""Where every array lies: one table from the names of dimensions to the axes of the device mesh.

Parameters and activations name their dimensions; this table alone says which of them are split over which mesh axis.
One device is the mesh of size 1: nothing here is a special case for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "embed_activation": None,
    # parameters: fsdp splits the model dimension, tensor splits what is computed independently
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
    "blocks": "fsdp",  # of a quantised weight, whose values are not split by the weight's own dimensions
    "rank": None,
    "layers": None,
    None: None,
}


def mesh_sizes(axes: dict[str, int] | None, device_count: int) -> dict[str, int]:
    """Sizes of all mesh axes from those that `--mesh` names; with none named all devices are the data axis.

    Raises InputError where the product is not device_count.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | (axes or {"data": device_count})
    product = math.prod(sizes.values())
    if product != device_count:
        named = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(f"--mesh {named} needs {product} devices, this run has {device_count}; change the sizes")
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `mesh_sizes`' sizes over `devices` (all of them where None)."""
    grid = np.array(jax.devices() if devices is None else devices).reshape([sizes[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Sequence[str | None], shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """The partition of an array whose dimensions are named `axes`.

    A dimension that its mesh axis does not divide (a bias of odd length, 2 kv heads on 4 devices) is not split.
    """
    parts: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        rule = RULES[name]
        count = math.prod(sizes[axis] for axis in ((rule,) if isinstance(rule, str) else rule or ()))
        parts.append(rule if size % count == 0 else None)
    return PartitionSpec(*parts)


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding from a tree of axis names (tuples) and one of shapes (anything with `.shape`)."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, dict(mesh.shape))), shapes, axes
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the (A, B, T) arrays of a batch lie: rows split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"], None))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of (A, B, T) numpy arrays on the mesh; of several processes each puts its own rows."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda whole: jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__), batch)


def data_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    """Over how many groups of devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation to its place on the mesh of `jax.set_mesh`; without a mesh returns x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, dict(mesh.shape)))
