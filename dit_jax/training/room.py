"""Whether the disk has room for what a run will save: looked at before the first step, not found out after the last.

a save is written before an older one goes      free >= one checkpoint, or the run does not begin
the most that lies there at any time            free >= that, or a warning
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from dit_jax import stores
from dit_jax.errors import WorkdirError
from dit_jax.training.saved_steps import steps_of

GIB = 2**30


def check_room(
    directory: Path, state: Any, saves: Iterable[int], keep_latest: int, keep_every: int, keep_best: int
) -> list[str]:
    """Compare what will be saved with the free space of the disk. A bucket has none, and quotas are not seen.

    Args:
      directory: ``<workdir>/checkpoints``.
      state: shapes and dtypes of what is saved. Orbax compresses, but parameters hardly become smaller.
      saves: the steps that are still to be saved.
      keep_latest, keep_every, keep_best: which of them stay, as `dit_jax.training.checkpoint.Checkpoints` takes them.

    Returns:
      Warnings: one, where there is room for the next save but not for all.

    Raises:
      WorkdirError: there is no room for one.
    """
    if stores.in_bucket(directory):
        return []
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    saves = list(saves)
    more = most_at_once(steps_of(directory), saves, keep_latest, keep_every)
    more = min(len(saves), more + keep_best)  # whichever they will be
    free = shutil.disk_usage(directory).free
    if more and free < size:
        raise WorkdirError(
            f"a checkpoint of this run takes {size / GIB:.3f} GiB, and {free / GIB:.3f} GiB are free in {directory}:"
            " make room, or give another --workdir"
        )
    if free < more * size:
        return [
            f"up to {more} more checkpoints will lie in {directory} at once, {more * size / GIB:.3f} GiB, and"
            f" {free / GIB:.3f} GiB are free: make room, lower keep_latest or keep_best, or raise keep_every"
        ]
    return []


def most_at_once(there: Iterable[int], saves: Iterable[int], keep_latest: int, keep_every: int) -> int:
    """How many more checkpoints than now lie on the disk, at most, while these steps are saved.

    Args:
      there: steps that are saved already.
      saves: those to come.
      keep_latest, keep_every: as of `check_room`.
    """
    latest = sorted(there)
    before, kept, most = len(latest), 0, 0
    for step in saves:
        latest.append(step)
        most = max(most, kept + len(latest) - before)
        gone, latest = latest[:-keep_latest], latest[-keep_latest:]
        kept += sum(keep_every > 0 and old % keep_every == 0 for old in gone)
    return most
