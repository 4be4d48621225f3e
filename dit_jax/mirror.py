"""A copy of a run in a place that outlives this machine, such as a drive that a notebook mounts.

A run writes where disks are quick, and what was saved is copied when it counts. The copy is a workdir too: copied back,
it is a run that goes on as the first would have. So at any moment, also when the machine is taken away in the middle of
a copy, it holds whole checkpoints, and the rows up to each of them.
"""

import os
import shutil
from pathlib import Path

from dit_jax.errors import ConfigError
from dit_jax.training import manifest, status
from dit_jax.training.saved_steps import ITEMS, UNFINISHED, steps_of
from dit_jax.workdir import CHECKPOINTS, LOCK

COPYING = ".copying"  # what a name ends with until all of it is there


def mirror(source: Path | str, target: Path | str) -> list[int]:
    """Make ``target`` what ``source`` is, a workdir; of a run that goes on, as far as it is saved.

    Args:
      source: a workdir on a disk, or a copy of one; where there is none, nothing is done.
      target: where to copy it to; made if it is not there.

    Returns:
      The steps that were copied.

    Raises:
      ConfigError: the target has a later step; it would be lost.
      OSError: one of the two cannot be read or written.
    """
    source, target = Path(source), Path(target)
    steps = steps_of(source / CHECKPOINTS)  # first: a later step may have rows that are not copied yet
    here = target / CHECKPOINTS
    if steps and (later := [step for step in steps_of(here) if step > steps[-1]]):
        raise ConfigError(
            f"{target} has step {later[-1]} of a run, and {source} only step {steps[-1]}: copy it back first, or name"
            " another place"
        )
    _copy_files(source, target)
    missing = [step for step in steps if not (here / str(step)).is_dir()]
    copied = [step for step in missing if _copy_step(source / CHECKPOINTS / str(step), here / str(step))]
    for step in set(steps_of(here)) - set(steps) if steps else ():
        gone = here / f"{step}{UNFINISHED}"
        os.replace(here / str(step), gone)  # at one stroke: what is half deleted must not look like a step
        shutil.rmtree(gone)
    if (source / status.NAME).is_file():
        _copy_file(source / status.NAME, target / status.NAME)  # last: it says which step there must be
    return copied


def _copy_files(source: Path, target: Path) -> None:
    """All that lies beside the checkpoints and changed."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if name.parts[0] in (CHECKPOINTS, LOCK, status.NAME) or path.suffix == ".tmp" or not path.is_file():
            continue
        copy, found = target / name, path.stat()
        if not copy.is_file() or (copy.stat().st_size, int(copy.stat().st_mtime)) != (
            found.st_size,
            int(found.st_mtime),  # of the finer part some drives keep nothing
        ):
            _copy_file(path, copy)


def _copy_file(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    growing = copy.with_name(copy.name + COPYING)
    shutil.copy2(path, growing)
    os.replace(growing, copy)


def _copy_step(step: Path, copy: Path) -> bool:
    """Whether it was whole: one that need not be kept any longer may go while it is copied.

    The copy bears the name of what was not finished until it is whole; a run that finds it removes it.
    """
    growing = copy.with_name(f"{copy.name}{UNFINISHED}")
    shutil.rmtree(growing, ignore_errors=True)
    try:
        shutil.copytree(step, growing)
    except (FileNotFoundError, shutil.Error):
        if step.is_dir():
            raise
    if whole := growing.is_dir() and not manifest.verify(growing, "fast", ITEMS).problems:
        os.replace(growing, copy)
    shutil.rmtree(growing, ignore_errors=True)
    return whole
