"""Formats of checkpoints, and how what an older release wrote becomes a state of today.

    3  maps that are one matrix product have an axis of their own: kernels ``[D, parts, features]`` (`FusedDense`)
    2  they lay side by side, ``[D, parts * features]``; skipped steps are counted by ``skips``: ``total``, ``in_a_row``
    1  skipped steps were counted by ``loss_scale/skipped``, a row of them by nobody
    0  the same arrays, in metadata that name no format: of before there were manifests

A checkpoint is restored into the shapes that its own format has, on the devices and shards of today, and changed there.

What changes the leaves of a `TrainState` is a new format:

1. Raise `dit_jax.training.saved_steps.FORMAT`, say above what is new, and add how the format before is read to
   `MIGRATIONS`. Those that are there stay as they are: an old checkpoint passes through all that came after it.
2. Make its golden run, once: ``tools/make_golden_run.py`` says how. Commit both files.
3. ``tests/training/test_golden.py`` restores every golden run, trains it on and draws with it. Keys that the config got
   in the meantime belong into `dit_jax.config.ADDED`; the same test finds those that are not there.

Exports have no format: their maps lie side by side, as in format 2 and as other programs have them (`side_by_side`).
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.training.loss_scale import LossScale
from dit_jax.training.saved_steps import FORMAT
from dit_jax.training.skips import Skips
from dit_jax.trees import leaf_name

Trees = dict[str, Any]  # of a checkpoint, all or some, by the names in `dit_jax.training.saved_steps.TREES`
FUSED = re.compile(r"(qkv|kv|fc_in)/(kernel|bias)$")  # what is fused where there are several maps
MATRIX = {"kernel": 2, "bias": 1}  # axes of a single map


class Migration(NamedTuple):
    """How a format is read as the next one.

    Attributes:
      shapes: of the next one, with their shardings -> its own.
      arrays: as it has them, and the shapes of the next one -> as that has them.
    """

    shapes: Callable[[Trees], Trees]
    arrays: Callable[[Trees, Trees], Trees]


def restore(shapes: Trees, wrote: int, read: Callable[[Trees], Trees]) -> Trees:
    """What a format wrote, as today's ``shapes``; ``read`` restores arrays into shapes."""
    wrote = max(wrote, 1)
    steps = {FORMAT: shapes}
    for number in reversed(range(wrote, FORMAT)):
        steps[number] = MIGRATIONS[number].shapes(steps[number + 1])
    trees = read(steps[wrote])
    for number in range(wrote, FORMAT):
        trees = MIGRATIONS[number].arrays(trees, steps[number + 1])
    return trees


def side_by_side(tree: Any) -> Any:
    """Arrays, or shapes with their shardings, with fused maps side by side: ``[D, parts * features]``."""

    def flat(path: tuple, leaf: Any) -> Any:
        fused = FUSED.search(leaf_name(path))
        if not fused or leaf.ndim == MATRIX[fused[2]]:
            return leaf
        shape = (*leaf.shape[:-2], leaf.shape[-2] * leaf.shape[-1])
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.reshape(shape)
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):  # columns are not shared out: those of a device would not be together
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: leaf.ndim - 2]))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(flat, tree)


def in_parts(tree: Any, shapes: Any) -> Any:
    """Arrays of `side_by_side` in these shapes, and with their shardings."""

    def reshape(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == wanted.shape:
            return leaf
        return jax.jit(lambda a: a.reshape(wanted.shape), out_shardings=wanted.sharding)(leaf)

    return jax.tree.map(reshape, tree, shapes)


def _skipped_in_the_loss_scale(trees: Trees) -> Trees:
    if (item := trees.get("optimizer")) is None:
        return trees
    scale = {"scale": item["loss_scale"].scale, "finite_steps": item["loss_scale"].finite_steps}
    rest = {name: leaf for name, leaf in item.items() if name != "skips"}
    return trees | {"optimizer": rest | {"loss_scale": scale | {"skipped": item["skips"].total}}}


def _skipped_by_themselves(trees: Trees, _: Trees) -> Trees:
    if (item := trees.get("optimizer")) is None:
        return trees
    scale = item["loss_scale"]
    none = jax.device_put(np.int32(0), scale["skipped"].sharding)
    new = {"loss_scale": LossScale(scale["scale"], scale["finite_steps"]), "skips": Skips(scale["skipped"], none)}
    return trees | {"optimizer": item | new}


MIGRATIONS = {  # by the format that is read
    1: Migration(_skipped_in_the_loss_scale, _skipped_by_themselves),
    2: Migration(side_by_side, in_parts),
}
