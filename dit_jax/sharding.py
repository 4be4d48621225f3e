"""The device mesh, and how batches and state lie on it.

One jitted step runs over a named mesh, on one device as on many: the batch is split over the axis ``data`` and
the state is replicated; the compiler inserts the all-reduce of the gradients.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of all devices along one axis, ``data``."""
    return Mesh(np.asarray(devices), ("data",))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays ``[B, ...]`` split over the devices along B."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_sharding(shapes: Any, sharding: NamedSharding) -> Any:
    """A tree of shapes and dtypes, each with this sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Send a batch of host arrays to the devices.

    Each of several processes hands in its own rows, `dit_jax.processes.own_rows`, and gets the whole batch, of which
    its devices hold those.
    """
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, array) for key, array in batch.items()}
