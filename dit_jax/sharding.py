"""The device mesh, and how batches, parameters and tokens lie on it.

One jitted step runs over a mesh of three axes, on one device as on thousands:

    data     devices that hold different pictures and the same parameters
    fsdp     devices that hold different pictures, and of every large parameter a share each (Zhao et al. 2023)
    tensor   devices that work on the same pictures: every one has some heads of attention and some columns of
             the MLP (Shoeybi et al. 2019, Megatron-LM)

Here is only said where arrays lie; what has to travel, the compiler finds out: the all-reduce of gradients along
``data`` and ``fsdp``, an all-gather of a parameter along ``fsdp`` where it is used, and along ``tensor`` an all-reduce
behind attention and behind the MLP. The first device of a row is next to the second: groups along ``tensor``, then
those along ``fsdp``, are neighbours.

Optimizer and moving average lie as their parameters do.
"""

import re
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dit_jax.trees import leaf_name, named_leaves

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # arrays [B, ...]

Spec = tuple[str | EllipsisType | None, ...]  # an axis of the mesh for each of an array; `...` are those between

# By a parameter's name; the first rule that matches counts.
RULES: tuple[tuple[str, Spec], ...] = (
    (r"blocks_.*/(q|kv|qkv|fc_in)/kernel$", ("fsdp", ..., "tensor")),  # heads, and columns of the MLP
    (r"blocks_.*/(q|kv|qkv|fc_in)/bias$", (..., "tensor")),
    (r"blocks_.*/(out|fc_out)/kernel$", ("tensor", "fsdp")),  # what sums them up
    (r"blocks_.*/adaln/proj/kernel$", ("fsdp",)),
    (r"blocks_.*/(bias|scale|table)$", ()),
    # All else is small, and whole on every device.
    (r"^(x_embedder|pos_embed|registers|t_embedder|y_embedder|adaln_single|final_layer)\b", ()),
)


def make_mesh(devices: Sequence[jax.Device], fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices, of which ``fsdp`` share parameters and ``tensor`` share pictures.

    Args:
      devices: of all processes, one process behind the other.
      fsdp: 0 is as many as there are.
      tensor: of one process.

    Raises:
      ValueError: so many do not go into the devices.
    """
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if here % tensor:
        raise ValueError(f"tensor is {tensor}; it must divide the {here} devices of a process")
    fsdp = fsdp or len(devices) // tensor
    if len(devices) % (fsdp * tensor):
        raise ValueError(f"fsdp {fsdp} x tensor {tensor} must divide the {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), AXES)


def abstract_mesh(fsdp: int, tensor: int, data: int = 1) -> AbstractMesh:
    """A mesh of devices that need not be there: with it, shardings say what would lie on one of them."""
    return AbstractMesh((data, fsdp, tensor), AXES)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Arrays ``[B, ...]`` split over the devices along B."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, Spec]] = RULES) -> Any:
    """How every parameter lies on the mesh, a tree like ``params`` (arrays or their shapes).

    Raises:
      ValueError: no rule is about a parameter, or the axes of the mesh do not divide its own.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        axes = _axes_of(name, leaf, rules)
        for size, axis in zip(leaf.shape, axes, strict=False):
            if axis and size % mesh.shape[axis]:
                raise ValueError(f"{axis} is {mesh.shape[axis]}, and does not divide {size} of {name} {leaf.shape}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, params)


def state_shardings(state: Any, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """How a tree lies on the mesh that holds arrays like parameters under their names, as an optimizer's does.

    What has neither name nor shape of a parameter, a count of steps, is whole on every device.
    """
    shapes, places = named_leaves(params), named_leaves(parameter_shardings(params, mesh))

    def place(path: tuple, leaf: Any) -> NamedSharding:
        words = leaf_name(path).split("/")
        ends = ("/".join(words[i:]) for i in range(len(words)))
        name = next((end for end in ends if end in shapes), None)
        return places[name] if name and shapes[name].shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def gather_block(params: Any, mesh: Mesh, dtype: DTypeLike) -> Any:
    """A block's parameters as it computes with them: whole along ``fsdp``. What travels is in the compute dtype."""

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        axes = _axes_of(f"blocks_/{leaf_name(path)}", leaf, RULES)
        if "fsdp" not in axes:
            return leaf
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(gather, params)


def _axes_of(name: str, leaf: Any, rules: Sequence[tuple[str, Spec]]) -> list[Any]:
    """The axes of the mesh for those of a parameter."""
    found = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if found is None:
        raise ValueError(f"no rule of dit_jax.sharding is about the parameter {name} {leaf.shape}")
    axes = list(found)
    if ... in axes:
        i = axes.index(...)
        axes[i : i + 1] = [None] * (leaf.ndim - len(axes) + 1)
    return axes


def spread_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays ``[B, ...]`` of a jitted function, split over the devices along B; no mesh leaves it to the compiler."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def with_sharding(shapes: Any, sharding: Any) -> Any:
    """A tree of shapes and dtypes, each with this sharding, or with its own of a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharding)


def gather_whole(tree: Any) -> Any:
    """All of every array on every device of its mesh; of several processes, every one must ask for it."""
    whole = jax.tree.map(lambda a: replicated(a.sharding.mesh), tree)
    return jax.jit(lambda tree: tree, out_shardings=whole)(tree)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Send a batch of host arrays to the devices.

    Each of several processes hands in its own rows, `dit_jax.processes.own_rows`, and gets the whole batch, of which
    its devices hold those.
    """
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, array) for key, array in batch.items()}
