"""A sha256 manifest of a folder, which says later whether a file of it is lost, cut, or other than it was.

``manifest.sha256`` lies in the folder. Two lines a file: its size, for a look that reads nothing, and its hash, in the
layout of ``sha256sum``, so that ``cd FOLDER && sha256sum -c manifest.sha256`` checks it without this package. The last
line is for the manifest itself:

    # 471 bytes
    9c3f...e1  ema/_METADATA
    # 07be...52 is the sha256 of the lines above

Files that are not in it do not count.
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dit_jax.files import read_bounded
from dit_jax.stores import files_of

NAME = "manifest.sha256"
THREADS = 4  # files that are hashed at a time; hashlib lets other threads run

ENTRY = re.compile(r"# (\d+) bytes\n([0-9a-f]{64})  (.+)\n")
SEAL = "# {} is the sha256 of the lines above\n"


class Entry(NamedTuple):
    """A file: its path in the folder, bytes and sha256."""

    path: str
    bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"# {self.bytes} bytes\n{self.sha256}  {self.path}\n"


class Verdict(NamedTuple):
    """What is wrong with a folder, a line for a file, and the bytes and seconds that it took to find out."""

    problems: tuple[str, ...]
    bytes: int
    seconds: float


def write(folder: Path, under: Sequence[str]) -> float:
    """Write the manifest of the files that are now in these folders of a folder; returns the seconds that it took.

    Raises:
      OSError: a file cannot be read, or the manifest not written.
    """
    begin = time.monotonic()
    sizes = {name: size for name, size in sorted(files_of(folder).items()) if name.split("/")[0] in under}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name), sizes))
    entries = [Entry(name, size, sha256) for (name, size), sha256 in zip(sizes.items(), hashes, strict=True)]
    (folder / NAME).write_bytes(_text(entries))
    return time.monotonic() - begin


def verify(folder: Path, how: str, under: Sequence[str]) -> Verdict:
    """Compare a folder with its manifest.

    Args:
      folder: has a manifest, or had one.
      how: ``fast`` looks whether every file is there and has its size, ``full`` reads and hashes it too.
      under: the folders in it that count.
    """
    begin = time.monotonic()
    try:
        entries = _read(folder / NAME)
    except (OSError, ValueError) as error:
        return Verdict((f"{NAME} {_reason(error)}",), 0, time.monotonic() - begin)
    entries = [entry for entry in entries if entry.path.split("/")[0] in under]
    sizes = files_of(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        problems = tuple(filter(None, pool.map(lambda entry: _problem(folder, entry, sizes, how), entries)))
    size = sum(entry.bytes for entry in entries) if how == "full" else 0
    return Verdict(problems, size, time.monotonic() - begin)


def _read(path: Path) -> list[Entry]:
    """The entries of a manifest; ValueError if it is not what `write` makes, to the last byte."""
    found = read_bounded(path)
    entries = [Entry(name, int(size), sha256) for size, sha256, name in ENTRY.findall(found.decode(errors="replace"))]
    if _text(entries) != found:
        raise ValueError("is damaged itself")
    outside = [entry.path for entry in entries if entry.path.startswith("/") or ".." in entry.path.split("/")]
    if outside:
        raise ValueError(f"names {outside[0]!r}, which is not in its folder")
    return entries


def _text(entries: Sequence[Entry]) -> bytes:
    lines = "".join(map(str, entries)).encode()
    return lines + SEAL.format(hashlib.sha256(lines).hexdigest()).encode()


def _problem(folder: Path, entry: Entry, sizes: Mapping[str, int], how: str) -> str:
    """What is wrong with a file; nothing if it is what it was. ``sizes`` are those of all files of the folder."""
    size = sizes.get(entry.path)
    if size is None:  # also of what no hash would ever end, a device or a pipe
        return f"{entry.path} is missing"
    if size != entry.bytes:
        return f"{entry.path} has {size:,} bytes, not {entry.bytes:,}"
    try:
        if how == "full" and _sha256(folder / entry.path) != entry.sha256:
            return f"{entry.path} has another sha256 than it was written with"
    except OSError as error:
        return f"{entry.path} {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
