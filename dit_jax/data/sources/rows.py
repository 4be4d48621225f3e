"""Names, captions and faults of many records in little memory, and the sources that begin with such a list.

Ten million records are ten million small objects in a list and a few arrays here: `Strings` keeps text as UTF-8 bytes
with offsets, `Rows` keeps one row per record. A `Listed` source adds the pictures, as encoded bytes from wherever they
lie; those of `Files` are the files of a folder.
"""

import errno
import hashlib
import itertools
import json
import os
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_jax.data.sources.records import BadRecord, Record
from dit_jax.data.transforms import LARGEST_PICTURE, TOO_LARGE, PictureError, decode, picture_size
from dit_jax.errors import DataError

LONGEST_CAPTION = 2**16  # characters; text encoders read a few hundred
LONGEST_TEXT = 2**20  # bytes of a file that holds one: more is too long however it is encoded
TOO_LONG = f"caption is longer than {LONGEST_CAPTION:,} characters"
HEADER = 2**16  # bytes of a picture file that nearly always say how large the picture is
TOGETHER = 2**16  # strings that become objects at once where all are read in order


class Strings:
    """Many strings, as their UTF-8 bytes one after the other.

    Attributes:
      content: uint8, all bytes.
      offsets: int64 ``[n + 1]``; string i is ``content[offsets[i] : offsets[i + 1]]``.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray):
        self.content, self.offsets = content, offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Of any strings; lone surrogates, which names of files can hold, survive."""
        growing = _Growing()
        for string in strings:
            growing.append(string)
        return growing.done()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        """String ``index``, counted from 0."""
        begin, end = self.offsets[index : index + 2]
        return _text(self.content[begin:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), TOGETHER):
            offsets = self.offsets[begin : begin + TOGETHER + 1].tolist()
            content = self.content[offsets[0] : offsets[-1]].tobytes()
            for here, after in itertools.pairwise(offsets):
                yield _text(content[here - offsets[0] : after - offsets[0]])


def _text(content: bytes) -> str:
    """One of `Strings`; its bytes may come from a file."""
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(f"a name or caption is damaged: {content[:80]!r} is not UTF-8; delete the cache") from error


class _Growing:
    """Strings while they are collected."""

    def __init__(self) -> None:
        self._content, self._offsets = bytearray(), array("q", [0])

    def append(self, string: str) -> None:
        self._content += string.encode("utf-8", "surrogatepass")
        self._offsets.append(len(self._content))

    def done(self) -> Strings:
        return Strings(np.frombuffer(self._content, np.uint8), np.asarray(self._offsets, np.int64))


class Entry(NamedTuple):
    """What is known of one record before its picture is opened.

    Attributes:
      id: its stable name.
      captions: one or more; none only where there is a problem.
      problem: why the record is bad; empty where nothing is known against it.
    """

    id: str
    captions: tuple[str, ...]
    problem: str


def make_entry(id: str, captions: object) -> Entry:
    """The entry of a record whose name is in order; white space in captions becomes single spaces.

    Args:
      id: the record's stable name.
      captions: a string, or several of which those that can be used are taken; anything else is no caption.
    """
    given = captions if isinstance(captions, list | tuple) else [captions]
    texts = [" ".join(text.split()) for text in given if isinstance(text, str)]
    short = [text for text in texts if len(text) <= LONGEST_CAPTION]
    found = tuple(text for text in short if text and is_utf8(text))
    if found:
        return Entry(id, found, "")
    if len(short) < len(texts):
        return Entry(id, (), TOO_LONG)
    return Entry(id, (), "caption is not valid UTF-8" if any(texts) else "no caption")


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogates, which stand for bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Rows:
    """The entries of a source.

    Attributes:
      ids: of every record.
      captions: of all records, one record after the other.
      first: int64 ``[n + 1]``; record i has captions ``first[i]`` to ``first[i + 1] - 1``.
      problems: why records are bad, by index.
    """

    def __init__(self, entries: Iterable[Entry]):
        ids, captions, first = _Growing(), _Growing(), array("q", [0])
        self.problems: dict[int, str] = {}
        for i, entry in enumerate(entries):
            ids.append(entry.id)
            for caption in entry.captions:
                captions.append(caption)
            first.append(first[-1] + len(entry.captions))
            if entry.problem:
                self.problems[i] = entry.problem
        self.ids, self.captions, self.first = ids.done(), captions.done(), np.asarray(first, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of a record."""
        return tuple(self.captions[i] for i in range(*self.first[index : index + 2].tolist()))

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """All captions of every record, in order; none where a record has none."""
        captions = iter(self.captions)
        return (tuple(itertools.islice(captions, count)) for count in np.diff(self.first))


class Listed(ABC):
    """A source (`dit_jax.data.sources.records.Source`) of listed records whose pictures are the bytes of files.

    Args:
      name: what the user called it.
      rows: its records.
    """

    def __init__(self, name: str, rows: Rows):
        self.name = name
        self.rows = rows

    @abstractmethod
    def content(self, index: int, length: int | None) -> bytes:
        """The picture file of a record; of a length, its first bytes are enough. Of one that is larger than
        `LARGEST_PICTURE` no more is read than shows it.

        Raises:
          BadRecord: the record has no such file.
          DataError: the disk fails: replacing the record would differ from run to run.
        """

    @abstractmethod
    def stamp(self, index: int) -> object:
        """What changes, most likely, with a record's picture and is cheap, such as the size of its file; JSON."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        id = self._usable(index)
        try:
            return Record(decode(self.content(index, None)), self.rows.captions_of(index), id)
        except PictureError as error:
            raise BadRecord(id, str(error)) from error

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the picture as it is decoded, from the head of its file where that says it."""
        id = self._usable(index)
        try:
            return picture_size(self.content(index, HEADER))
        except PictureError:  # of some files the end is needed too
            pass
        try:
            return picture_size(self.content(index, None))
        except PictureError as error:
            raise BadRecord(id, str(error)) from error

    def _usable(self, index: int) -> str:
        """The id of a record against which nothing is known."""
        id = self.rows.ids[index]
        if problem := self.rows.problems.get(index):
            raise BadRecord(id, problem)
        return id

    def ids(self) -> Iterable[str]:
        """The id of every record."""
        return self.rows.ids

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of every record; none where it has none."""
        return self.rows.all_captions()

    def fingerprint(self) -> str:
        """SHA-256 of ids, captions and stamps."""
        digest = hashlib.sha256()
        for i, (id, captions) in enumerate(zip(self.ids(), self.captions(), strict=True)):
            stamp = None if i in self.rows.problems else self.stamp(i)
            digest.update(json.dumps([id, captions, stamp]).encode())
        return digest.hexdigest()


class Files(Listed):
    """Listed records whose ids are the names of picture files.

    Args:
      name: what the user called it.
      folder: where relative names begin; an absolute one stands for itself.
      rows: the records.
    """

    def __init__(self, name: str, folder: Path, rows: Rows):
        super().__init__(name, rows)
        self.folder = folder

    def content(self, index: int, length: int | None) -> bytes:
        """The file, or its first bytes."""
        id = self.rows.ids[index]
        return read_file(self.folder / id, id, length)

    def stamp(self, index: int) -> int:
        """The size of the file, -1 where there is none; blind to an edit that keeps it."""
        return file_size(os.path.join(self.folder, self.rows.ids[index]))


# What is wrong with one file rather than with the disk.
OF_THE_RECORD = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)


def read_file(file: Path, id: str, length: int | None) -> bytes:
    """The picture file of a record, or its first bytes; errors as of `Listed.content`."""
    try:
        with open(file, "rb", opener=_open_at_once) as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadRecord(id, "not a regular file")
            if found.st_size > LARGEST_PICTURE:
                raise BadRecord(id, TOO_LARGE)
            return opened.read(length)
    except ValueError as error:  # a NUL in the name
        raise BadRecord(id, f"not a file name: {error}") from error
    except OSError as error:
        if error.errno in OF_THE_RECORD:
            raise BadRecord(id, f"cannot be read: {error.strerror}") from error
        raise disk_error(file, error) from error


def _open_at_once(name: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # not on Windows


def file_size(file: str) -> int:
    """The size of a file, -1 where there is none."""
    try:
        found = os.stat(file)  # one call: over a network it is the whole cost of a fingerprint
    except ValueError:
        return -1
    except OSError as error:
        if error.errno in OF_THE_RECORD:
            return -1
        raise disk_error(file, error) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def disk_error(file: str | Path, error: OSError) -> DataError:
    """What to raise where a disk fails, since replacing the record would differ from run to run."""
    return DataError(f"cannot read {file}: {error.strerror} (is the disk or share in order?)")
