"""Where arrays live: a one-axis mesh over all devices, rows split, everything else replicated."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def data_mesh() -> Mesh:
    """All devices in one axis; on one device the same program runs unchanged."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: weights, adapters, optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def shapes(tree: Any, sharding: NamedSharding) -> Any:
    """The tree with shapes and dtypes, placed like that, instead of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def rows(mesh: Mesh) -> NamedSharding:
    """A batch [A, B, T] with its rows B split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
