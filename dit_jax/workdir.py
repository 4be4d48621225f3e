"""The folder of a run, which may lie in a bucket.

    place   where the user wants it: a folder on this machine, or gs://bucket/run
    folder  where the run writes what grows line by line: the place, or in front of a bucket a folder on this machine

Checkpoints go straight to the place. All else is small: before a checkpoint counts, and at the end, the files that
changed are brought to the bucket whole; a run that is resumed fetches them first. So rows up to the last checkpoint are
never lost, and later ones would be cut off anyway.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from dit_jax import processes, stores
from dit_jax.errors import ConfigError

CHECKPOINTS = "checkpoints"
METRICS, TIMING = "metrics.jsonl", "timing.jsonl"  # a row of numbers for a step
STATUS = "STATUS.json"
ENCODED = "encoded"
LOCK = "LOCK"  # empty; who trains holds it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what disks say that have no locks
NOT_BROUGHT = ("wandb",)  # Weights & Biases has it


@dataclass
class Workdir:
    """Place and folder of a run; `open_workdir` makes one.

    Attributes:
      place: as the user named it.
      folder: on this machine.
    """

    place: Path
    folder: Path
    _there: dict[str, tuple[int, int]] = field(default_factory=dict)  # path -> bytes and time of what is in the bucket
    _lock: TextIO | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.place / CHECKPOINTS

    @property
    def bad_records(self) -> Path:
        """This process's list of records that cannot be read."""
        return processes.own_file(self.folder / "bad_records.jsonl")

    @property
    def encoded(self) -> Path | None:
        """Where data are kept as they were encoded; nowhere in front of a bucket, as this machine may go."""
        return self.folder / ENCODED if self.folder == self.place else None

    def lock(self) -> None:
        """Keep other runs out until this process ends, however it does; buckets and some networks' disks cannot.

        Raises:
          ConfigError: another run is there.
          OSError: nothing can be written there.
        """
        if self._lock is not None or self.folder != self.place:
            return
        self._lock = (self.folder / LOCK).open("w")
        with suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another process trains in {self.place} (see {STATUS} there): end it, or give another --workdir"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def has(self, name: str) -> bool:
        """Whether a file is there by its path in the workdir."""
        return (self.folder / name).exists() or (self.place / name).exists()

    def bring(self) -> None:
        """Bring what changed to the bucket; nothing is to be done where the place is on this machine.

        Raises:
          FetchError: it cannot be reached.
        """
        if self.folder == self.place:
            return
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_symlink() or not path.is_file() or name.parts[0] in NOT_BROUGHT or path.suffix == ".tmp":
                continue
            now = _stamp(path)
            if self._there.get(name.as_posix()) != now:
                stores.put(path, self.place / name)
                self._there[name.as_posix()] = now

    def fetch(self) -> None:
        """Fetch what a run goes on writing: the files beside the checkpoints, but none in folders."""
        for name in stores.files_of(self.place):
            if "/" not in name:
                stores.get(self.place / name, self.folder / name)
                self._there[name] = _stamp(self.folder / name)


@contextmanager
def open_workdir(place: Path) -> Iterator[Workdir]:
    """The workdir at a place; what is in its folder at the end is brought there, however it ends.

    Raises:
      ConfigError: the library that speaks to buckets is missing.
      FetchError: the bucket cannot be reached.
    """
    if not stores.in_bucket(place):
        workdir = Workdir(place, place)
        try:
            yield workdir
        finally:
            workdir.unlock()
        return
    stores.reach(place)
    with TemporaryDirectory(prefix="dit_jax-") as folder:
        workdir = Workdir(place, Path(folder))
        workdir.fetch()
        try:
            yield workdir
        except BaseException:
            with suppress(Exception):  # the first error is the one to be told
                workdir.bring()
            raise
        workdir.bring()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
