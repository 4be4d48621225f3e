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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.trees import leaf_name, named_leaves

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # arrays [B, ...]

Spec = tuple[str | EllipsisType | None, ...]  # an axis of the mesh for each of an array; `...` are those between

# By what a parameter's name ends with; the first rule that matches counts. Small ones are whole on every device.
RULES: tuple[tuple[str, Spec], ...] = (
    (r"/(q|kv|qkv|fc_in)/kernel", ("fsdp", ..., "tensor")),  # heads, and columns of the MLP
    (r"/(q|kv|qkv|fc_in)/bias", (..., "tensor")),
    (r"/(attention|cross)/out/kernel", ("tensor", "fsdp")),  # what those are summed up with
    (r"/fc_out/kernel", ("tensor", "fsdp")),
    (r"x_embedder/proj/kernel", (None, "fsdp")),  # a patch has few numbers
    (r"(proj|mlp_in|mlp_out|linear)/kernel", ("fsdp",)),
    (r"/bias|/scale|/table|registers|/null_token|/null_pooled", ()),
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
    devices = np.asarray(devices)
    here = sum(device.process_index == devices[0].process_index for device in devices)
    if here % tensor:
        raise ValueError(f"tensor is {tensor}; it must divide the {here} devices of a process")
    fsdp = fsdp or len(devices) // tensor
    if len(devices) % (fsdp * tensor):
        raise ValueError(f"fsdp {fsdp} x tensor {tensor} must divide the {len(devices)} devices")
    return Mesh(devices.reshape(-1, fsdp, tensor), AXES)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays ``[B, ...]`` split over the devices along B."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(params: Any, mesh: Mesh, rules: Sequence[tuple[str, Spec]] = RULES) -> Any:
    """How every parameter lies on the mesh, a tree like ``params`` (arrays or their shapes).

    Raises:
      ValueError: no rule is about a parameter, or the axes of the mesh do not divide its own.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        found = [spec for pattern, spec in rules if re.search(f"(?:{pattern})$", name)]
        if not found:
            raise ValueError(f"no rule of dit_jax.sharding is about the parameter {name} {leaf.shape}")
        axes = axes_of(found[0], leaf.ndim)
        for size, axis in zip(leaf.shape, axes, strict=False):
            if axis and size % mesh.shape[axis]:
                raise ValueError(f"{axis} is {mesh.shape[axis]}, and does not divide {size} of {name} {leaf.shape}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, params)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
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


def axes_of(spec: Spec, ndim: int) -> list[str | None]:
    """The axes of the mesh for those of an array: ``("fsdp", ..., "tensor")`` and 3 -> ``["fsdp", None, "tensor"]``."""
    axes: list[Any] = list(spec)
    if ... in axes:
        i = axes.index(...)
        axes[i : i + 1] = [None] * (ndim - len(axes) + 1)
    return axes


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Arrays that a jitted function keeps in this sharding; None leaves it to the compiler."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def with_sharding(shapes: Any, sharding: Any) -> Any:
    """A tree of shapes and dtypes, each with this sharding, or with its own of a tree of them."""
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharding)


def gather_whole(tree: Any, mesh: Mesh) -> Any:
    """All of every array on every device; each process must ask for it. What lies so already is not copied."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Send a batch of host arrays to the devices.

    Each of several processes hands in its own rows, `dit_jax.processes.own_rows`, and gets the whole batch, of which
    its devices hold those.
    """
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, array) for key, array in batch.items()}
