"""A copy of a run in a place that outlives this machine, such as a drive that a notebook mounts.

A run writes where disks are quick, and what was saved is copied afterwards. The copy is a workdir too: copied back, it
is a run that goes on as the first would have, and encodes its data anew. Whenever the copying ends, also when the
machine is taken away in the middle of it, the steps that are there are whole, and so are the rows up to each of them.
"""

import os
import shutil
from pathlib import Path

from dit_jax.config import LENGTH, differences, read_run
from dit_jax.errors import ConfigError
from dit_jax.training import manifest
from dit_jax.training.saved_steps import ITEMS, UNFINISHED, steps_of, unfinished
from dit_jax.workdir import CHECKPOINTS, ENCODED, LOCK, STATUS

COPYING = ".copying"  # what the name of a file ends with until all of it is there


def mirror(source: Path | str, target: Path | str) -> list[int]:
    """Make ``target`` what ``source`` is, a workdir; of a run that goes on, as far as it is saved.

    A step that the source no longer keeps goes when a newer one is there.

    Args:
      source: a workdir on a disk, or a copy of one; where there is none, nothing is done.
      target: where to copy it to; made if it is not there.

    Returns:
      The steps that were copied. One that is not whole, as it is just being deleted, is not.

    Raises:
      ConfigError: the target holds another run, or a later step, which would be lost.
      OSError: one of the two cannot be read or written.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        return []
    steps, here = steps_of(source / CHECKPOINTS), target / CHECKPOINTS  # later ones may have rows not copied here
    _check(source, target, steps)
    for left in unfinished(here):
        shutil.rmtree(left)
    _copy_files(source, target)
    new = [step for step in steps if not _is_there(source / CHECKPOINTS / str(step), here / str(step))]
    copied = [step for step in new if _copy_step(source / CHECKPOINTS / str(step), here / str(step))]
    if steps and (here / str(steps[-1])).is_dir():
        for step in set(steps_of(here)) - set(steps):
            _remove_step(here / str(step))
    if (source / STATUS).is_file():
        _copy_file(source / STATUS, target / STATUS)  # last: it says which step there must be
    return copied


def _check(source: Path, target: Path, steps: list[int]) -> None:
    """Raises ConfigError where something of the target would be lost."""
    if all((folder / "config.json").is_file() for folder in (source, target)):
        changed = differences(read_run(target), read_run(source))
        if changed := [one for one in changed if not one.startswith(LENGTH)]:
            raise ConfigError(f"{target} holds a run with another config ({'; '.join(changed)}): name another place")
    there = steps_of(target / CHECKPOINTS)
    if there and (not steps or there[-1] > steps[-1]):
        has = f"has none after {steps[-1]}" if steps else "has none"
        raise ConfigError(f"{target} holds step {there[-1]} and {source} {has}: copy it back, or name another place")


def _copy_files(source: Path, target: Path) -> None:
    """All that lies beside the checkpoints and changed, but for what is quicker encoded again than copied."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        passing = path.suffix in (".tmp", COPYING) or not path.is_file()
        if passing or name.parts[0] in (CHECKPOINTS, ENCODED, LOCK, STATUS):
            continue
        if not (target / name).is_file() or _stamp(target / name) != _stamp(path):
            _copy_file(path, target / name)


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and time of a file; of fractions of a second some drives keep nothing."""
    found = path.stat()
    return found.st_size, int(found.st_mtime)


def _copy_file(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    growing = copy.with_name(copy.name + COPYING)
    shutil.copy2(path, growing)
    os.replace(growing, copy)


def _is_there(step: Path, copy: Path) -> bool:
    """Whether a step was copied, and not saved again since."""
    ours, theirs = step / manifest.NAME, copy / manifest.NAME
    return theirs.is_file() and ours.is_file() and ours.read_bytes() == theirs.read_bytes()


def _copy_step(step: Path, copy: Path) -> bool:
    """Whether it was whole: one that need not be kept any longer may go while it is copied.

    Until it is whole the copy bears the name of what was not finished.
    """
    growing = copy.with_name(f"{copy.name}{UNFINISHED}")
    try:
        shutil.copytree(step, growing)
    except (FileNotFoundError, shutil.Error):
        if step.is_dir():
            raise
    whole = growing.is_dir() and not manifest.verify(growing, "fast", ITEMS).problems
    if whole:
        if copy.is_dir():
            _remove_step(copy)
        os.replace(growing, copy)
    else:
        shutil.rmtree(growing, ignore_errors=True)
    return whole


def _remove_step(step: Path) -> None:
    """At one stroke: what is half deleted must not look like a step."""
    gone = step.with_name(f"{step.name}{UNFINISHED}-gone")
    os.replace(step, gone)
    shutil.rmtree(gone)
