"""Checkpoints as they lie on disk: which steps there are, what they say of themselves, and which of them can be used.

    checkpoints/<step>/          params/  ema/  optimizer/  metadata/ (JSON)  manifest.sha256  commit_success.txt
    checkpoints/<step>.corrupt/  a step that was found damaged, set aside by the run that goes on from the one before

On a disk a step gets its name when all of it is written. In a bucket nothing is renamed at one stroke: a step has its
name from the start, and counts when ``commit_success.txt`` is there, which is written last.

A step is verified before it is used. Steps of before there were manifests cannot be verified, and are used as they are.
Nothing here knows how the arrays are stored: `dit_jax.training.checkpoint` does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax import stores
from dit_jax.errors import CheckpointError
from dit_jax.files import read_json
from dit_jax.training import manifest

FORMAT = 3  # of what is saved now; `dit_jax.training.formats` reads older ones
TREES = ("params", "ema", "optimizer")
ITEMS = (*TREES, "metadata")
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is being written, or was when its process ended
COMMITTED = "commit_success.txt"
CORRUPT = ".corrupt"


class Report(NamedTuple):
    """What the verification of a step found.

    Attributes:
      step: which one.
      problems: what is wrong with it, a line for a file; none if it is whole.
      verifiable: whether it has a manifest; without one nothing is known.
      bytes: that were hashed.
      seconds: that it took.
    """

    step: int
    problems: tuple[str, ...]
    verifiable: bool
    bytes: int
    seconds: float

    def __str__(self) -> str:
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            return f"step {self.step} is damaged: {self.problems[0]}{more}"
        if not self.verifiable:
            return f"step {self.step} cannot be verified: an earlier release wrote it, without a {manifest.NAME}"
        if not self.bytes:
            return f"step {self.step}: no file is missing or cut"
        return f"step {self.step} is what was written: sha256 of {self.bytes / 2**30:.2f}GiB in {self.seconds:.1f}s"


def steps_of(directory: Path) -> list[int]:
    """The steps in ``<workdir>/checkpoints``, oldest first, whether whole or not."""
    if stores.in_bucket(directory):
        names = [name.removesuffix(f"/{COMMITTED}") for name in stores.files_of(directory) if COMMITTED in name]
    else:
        names = [path.name for path in directory.glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(directory: Path) -> list[Path]:
    """What a process began to save in ``<workdir>/checkpoints`` and did not finish, or does not yet."""
    if not stores.in_bucket(directory):
        return list(directory.glob(f"*{UNFINISHED}*"))
    whole = set(map(str, steps_of(directory)))
    names = {name.partition("/")[0] for name in stores.files_of(directory)}
    return [directory / name for name in sorted(names - whole) if name.isdigit()]


def half_deleted(
    directory: Path, keep_latest: int, keep_every: int, best: Callable[[Sequence[int]], set[int]]
) -> list[Path]:
    """Steps that a process began to delete: not all of it is there any more, and it is not one that is kept.

    ``best`` says which of some steps are kept because they are good.
    """
    steps = steps_of(directory)
    kept = {*steps[-keep_latest:], *(step for step in steps if keep_every and step % keep_every == 0), *best(steps)}
    problems = {step: verify(directory, step, "fast", ITEMS).problems for step in steps if step not in kept}
    return [directory / str(step) for step, found in problems.items() if found]


def verify(directory: Path, step: int, how: str, items: Sequence[str]) -> Report:
    """Compare items of a step with its manifest; ``how`` is as `manifest.verify` takes it."""
    folder = directory / str(step)
    if not (folder / manifest.NAME).is_file() and _is_of_before(folder):
        return Report(step, (), False, 0, 0.0)
    verdict = manifest.verify(folder, how, items)
    return Report(step, verdict.problems, True, verdict.bytes, verdict.seconds)


def newest_whole(directory: Path, how: str, items: Sequence[str]) -> tuple[Report | None, list[Report]]:
    """The newest step that is not damaged, and the newer ones that are; None where there is no step at all.

    Raises:
      CheckpointError: all steps are damaged.
    """
    damaged: list[Report] = []
    for step in reversed(steps_of(directory)):
        report = verify(directory, step, how, items)
        if not report.problems:
            return report, damaged
        damaged.append(report)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {directory} can be used: {'; '.join(map(str, damaged))}."
            " Put one back from a copy, or begin a new run in another --workdir"
        )
    return None, []


def find_step(directory: Path, step: int | None, how: str, items: Sequence[str]) -> tuple[Report, list[Report]]:
    """The step to load: the one asked for, or the newest that is not damaged, and the newer ones that are.

    Raises:
      CheckpointError: it is not there or damaged: another one is never taken for a step that was asked for.
    """
    steps = steps_of(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: train first, or name another run")
    there_are = f"there are {', '.join(map(str, steps))}"
    if step is None:
        report, damaged = newest_whole(directory, how, items)
        assert report
        return report, damaged
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; {there_are}")
    report = verify(directory, step, how, items)
    if report.problems:
        raise CheckpointError(f"{directory}: {report}; {there_are}")
    return report, []


def set_aside(directory: Path, step: int) -> Path:
    """Rename a damaged step, so that it is no step any more; one that was set aside before by its name is removed."""
    aside = directory / f"{step}{CORRUPT}"
    stores.remove(aside)
    stores.move(directory / str(step), aside)
    return aside


def restore_metadata(directory: Path, step: int) -> dict[str, Any]:
    """What was saved as JSON with a step.

    Raises:
      CheckpointError: it is unreadable, or written by a later release.
    """
    path = directory / str(step)
    try:
        metadata = read_json(path / "metadata" / "metadata")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot restore {path}/metadata: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict) or type(wrote := metadata.get("format", 0)) is not int:
        raise CheckpointError(f"{path}/metadata is damaged: it holds no JSON object with a number as its format")
    if wrote > FORMAT:
        versions = metadata.get("versions")
        which = versions.get("dit_jax") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"{path} has format {wrote}, this release reads {FORMAT} and older: install the one"
            f" that wrote it, or a later one ({which or 'it does not say which'})"
        )
    return metadata


def _is_of_before(folder: Path) -> bool:
    """Whether a step without a manifest never had one: it is complete, and does not say that it had."""
    try:
        complete = all((folder / item).is_dir() for item in ITEMS)
        return complete and "format" not in restore_metadata(folder.parent, int(folder.name))
    except CheckpointError:
        return False
