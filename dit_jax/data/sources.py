"""Sources of captioned pictures: what a source is, a folder of files as a source, and parts of a source.

A source is a finite, random-access collection of records. It knows nothing of order, size or batches:
``transforms`` cuts the pictures and ``loader`` decides which record comes when.
"""

import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from dit_jax.data.transforms import PictureError, decode
from dit_jax.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Record(NamedTuple):
    """One captioned picture.

    Attributes:
      image: uint8 ``[height, width, 3]``, any size.
      caption: what the picture shows.
      id: a stable name of the picture: a relative file name, or ``shapes:<seed>:<i>``.
    """

    image: np.ndarray
    caption: str
    id: str


class BadRecord(Exception):
    """A record that cannot be used: the loader replaces it by another and lists it.

    Attributes:
      id: the record's stable name.
      reason: one line that says what is wrong with it, the same on every run.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Source(Protocol):
    """A finite collection of captioned pictures with random access.

    ``ids``, ``captions`` and ``fingerprint`` are cheap: they decode no file and draw a few pictures at most.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; raises `BadRecord` where it cannot be used."""
        ...

    def ids(self) -> Iterable[str]:
        """The id of every record, in order."""
        ...

    def captions(self) -> Iterable[str]:
        """The caption of every record, in order; empty where a record has none."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the records do; caches and resumed runs compare it."""
        ...


# --- a folder of files --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What the caption files say of one record, before its picture is opened."""

    id: str
    caption: str
    problem: str  # why the record is bad; empty where nothing is known against it


class Folder:
    """The pictures of a folder with their captions.

    Of these layouts the first that is there is taken:

      1. ``metadata.jsonl``: a line ``{"file_name": "cat.jpg", "text": "a cat"}`` per picture
      2. ``metadata.csv``: columns ``file_name`` and ``text``
      3. ``metadata.json``: a list of ``{"image": "cat.jpg", "text": "a cat"}``
      4. ``cat.jpg`` with ``cat.txt`` beside it, in any depth of subfolders

    Records keep the order of the metadata file, or that of the sorted file names. File names are relative to
    the folder and may not leave it; links to files are followed, since download caches are made of them, links to
    folders are not searched for pairs.

    Raises:
      DataError: no such folder, no captions in it, or not one usable row.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.name = f"folder:{path}"
        if not self.path.is_dir():
            fault = "is not a folder" if self.path.exists() else "does not exist"
            raise DataError(f"data folder {path} {fault} (from {Path.cwd()}); set data.source=folder:PATH")
        self._entries = _entries(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        id, caption, problem = self._entries[index]
        if problem:
            raise BadRecord(id, problem)
        try:
            return Record(decode(_content(self.path / id, id)), caption, id)
        except PictureError as error:
            raise BadRecord(id, str(error)) from error

    def ids(self) -> list[str]:
        """The file name of every record, relative to the folder."""
        return [entry.id for entry in self._entries]

    def captions(self) -> list[str]:
        """The caption of every record; empty where a record has none."""
        return [entry.caption for entry in self._entries]

    def fingerprint(self) -> str:
        """SHA-256 of file names, captions and file sizes; blind to an edit that keeps a picture's size."""
        digest = hashlib.sha256()
        for id, caption, problem in self._entries:
            picture = self.path / id
            size = picture.stat().st_size if not problem and picture.is_file() else -1
            digest.update(json.dumps([id, caption, size]).encode())
        return digest.hexdigest()


def _entries(folder: Path) -> list[Entry]:
    """Reads the captions of a folder in the first layout that is there."""
    readers = {"metadata.jsonl": _read_jsonl, "metadata.csv": _read_csv, "metadata.json": _read_json}
    layouts = [file_name for file_name in readers if (folder / file_name).is_file()]
    if not layouts:
        return _paired_entries(folder, looked_for=tuple(readers))

    layout = layouts[0]
    entries = list(readers[layout](folder / layout))
    if all(entry.problem for entry in entries):
        first = f", the first because of {entries[0].id}: {entries[0].problem}" if entries else ""
        raise DataError(
            f"{folder / layout}: none of its {len(entries)} records can be used{first}; "
            "every row needs file_name and text"
        )
    return entries


def _entry(row: object, where: str) -> Entry:
    """Checks one row of captions; ``where`` stands for the id in a row without a file name."""
    if not isinstance(row, dict):
        return Entry(where, "", "not a row with file_name and text")
    name, caption = row.get("file_name", row.get("image")), row.get("text")
    if not isinstance(name, str) or not name.strip():
        return Entry(where, "", "no file name")
    id = os.path.normpath(name)
    if not _is_utf8(id):
        return Entry(id, "", "file name is not valid UTF-8")
    if os.path.isabs(id) or Path(id).parts[:1] == ("..",):
        return Entry(id, "", "path leaves the data folder")
    if not isinstance(caption, str) or not caption.strip():
        return Entry(id, "", "no caption")
    if not _is_utf8(caption):
        return Entry(id, "", "caption is not valid UTF-8")
    return Entry(id, " ".join(caption.split()), "")


def _read_jsonl(file: Path) -> Iterator[Entry]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        where = f"{file.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Entry(where, "", f"not JSON: {error}")
        else:
            yield _entry(row, where)


def _read_csv(file: Path) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(_text(file), newline=""))
    try:
        for row in rows:
            yield _entry(row, where=f"{file.name}:{rows.line_num}")
    except csv.Error as error:
        raise DataError(f"{file} line {rows.line_num}: {error} (a quote that is never closed?)") from error


def _read_json(file: Path) -> Iterator[Entry]:
    try:
        rows = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f'{file} holds a {type(rows).__name__}, not a list of {{"image": ..., "text": ...}}')
    for number, row in enumerate(rows):
        yield _entry(row, where=f"{file.name}[{number}]")


def _paired_entries(folder: Path, looked_for: tuple[str, ...]) -> list[Entry]:
    """Pairs of picture and text, sorted by name; hidden files and folders are no data."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [f for f in files if f.lower().endswith(PICTURE_SUFFIXES) and not f.startswith(".")]
        names += [Path(root, picture).relative_to(folder).as_posix() for picture in pictures]

    entries = []
    for name in sorted(names):
        caption_file = (folder / name).with_suffix(".txt")
        caption = _text(caption_file) if caption_file.is_file() else None
        entries.append(_entry({"file_name": name, "text": caption}, where=name))

    if not any(entry.caption for entry in entries):
        nested = sorted(path.parent for name in looked_for for path in folder.glob(f"*/{name}"))
        advice = 'write a line {"file_name": "cat.jpg", "text": "a cat"} per picture into metadata.jsonl'
        if nested:
            advice = f"set data.source=folder:{nested[0]}"
        raise DataError(
            f"no captions in data folder {folder}: looked for {', '.join(looked_for)} and for cat.txt beside "
            f"cat.jpg ({len(entries)} pictures seen); {advice}"
        )
    return entries


def _text(file: Path) -> str:
    """Reads a text file; bytes that are not UTF-8 become lone surrogates, and `_is_utf8` finds the record."""
    try:
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(file: Path, id: str) -> bytes:
    """Reads a picture file. A failing disk is not a bad record: replacing it would differ from run to run."""
    of_the_record = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
    try:
        return file.read_bytes()
    except ValueError as error:  # a NUL in the name
        raise BadRecord(id, f"not a file name: {error}") from error
    except OSError as error:
        if error.errno in of_the_record:
            raise BadRecord(id, f"cannot be read: {error.strerror}") from error
        raise DataError(f"cannot read {file}: {error.strerror} (is the disk or share in order?)") from error


# --- parts of a source --------------------------------------------------------------------------------------


class Subset:
    """Some records of another source, in the order of ``indices``."""

    def __init__(self, source: Source, indices: Iterable[int], name: str):
        self.name = name
        self._source = source
        self._indices = np.array(list(indices), np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def ids(self) -> list[str]:
        """The ids of the chosen records."""
        ids = list(self._source.ids())
        return [ids[i] for i in self._indices]

    def captions(self) -> list[str]:
        """The captions of the chosen records."""
        captions = list(self._source.captions())
        return [captions[i] for i in self._indices]

    def fingerprint(self) -> str:
        """SHA-256 of the source's fingerprint and the indices."""
        return hashlib.sha256(self._source.fingerprint().encode() + self._indices.tobytes()).hexdigest()


def split(source: Source, fraction: float, part: Literal["train", "validation"]) -> Subset:
    """Takes the training or the validation part of a source.

    A record belongs to validation where the hash of its id, read as a number in [0, 1), is below
    ``fraction``. So adding records never moves another one, and a larger fraction only adds
    to the validation part.

    Raises:
      ValueError: ``fraction`` outside [0, 1), or an unknown part.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}, must be in [0, 1)")
    if part not in ("train", "validation"):
        raise ValueError(f"unknown part {part!r}, choose 'train' or 'validation'")
    in_validation = (_unit_hash(id) < fraction for id in source.ids())
    indices = [i for i, held_out in enumerate(in_validation) if held_out == (part == "validation")]
    return Subset(source, indices, f"{source.name}/{part}")


def _unit_hash(id: str) -> float:
    """A number in [0, 1) that depends on the id alone, on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48
