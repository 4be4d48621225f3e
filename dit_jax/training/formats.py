"""Formats of checkpoints, and how what an older release wrote becomes a state of today.

    2  skipped steps are counted by ``skips``: ``total`` and ``in_a_row``
    1  they were counted by ``loss_scale/skipped``, a row of them by nobody
    0  the same arrays, in metadata that name no format: of before there were manifests

A checkpoint is restored into the shapes that its own format has, and then its small leaves change places; the large
trees are passed on as they are, on the devices where they were restored.

What changes the leaves of a `TrainState` is a new format:

1. Raise `dit_jax.training.saved_steps.FORMAT`, say above what is new, and add how the format before is read to
   `MIGRATIONS`. Those that are there stay as they are: an old checkpoint passes through all that came after it.
2. Make its golden run, once: ``tools/make_golden_run.py`` says how. Commit both files.
3. ``tests/training/test_golden.py`` restores every golden run, trains it on and draws with it. Keys that the config got
   in the meantime belong into `dit_jax.config.ADDED`; the same test finds those that are not there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.training.loss_scale import LossScale
from dit_jax.training.saved_steps import FORMAT
from dit_jax.training.skips import Skips

Item = dict[str, Any]  # all of a state but the parameters and their average


class Migration(NamedTuple):
    """How a format is read as the next one.

    Attributes:
      shapes: of the next one, with their shardings -> its own.
      arrays: as it has them -> as the next one has them.
    """

    shapes: Callable[[Item], Item]
    arrays: Callable[[Item], Item]


def own_shapes(item: Item, wrote: int) -> Item:
    """Shapes of today as those of an older format."""
    for number in reversed(range(max(wrote, 1), FORMAT)):
        item = MIGRATIONS[number].shapes(item)
    return item


def of_today(item: Item, wrote: int) -> Item:
    """What was restored from an older format, as of today."""
    for number in range(max(wrote, 1), FORMAT):
        item = MIGRATIONS[number].arrays(item)
    return item


def _skipped_in_the_loss_scale(item: Item) -> Item:
    scale = {"scale": item["loss_scale"].scale, "finite_steps": item["loss_scale"].finite_steps}
    rest = {name: leaf for name, leaf in item.items() if name != "skips"}
    return rest | {"loss_scale": scale | {"skipped": item["skips"].total}}


def _skipped_by_themselves(item: Item) -> Item:
    scale = item["loss_scale"]
    none = jax.device_put(np.int32(0), scale["skipped"].sharding)
    new = {"loss_scale": LossScale(scale["scale"], scale["finite_steps"]), "skips": Skips(scale["skipped"], none)}
    return item | new


MIGRATIONS = {1: Migration(_skipped_in_the_loss_scale, _skipped_by_themselves)}  # by the format that is read
