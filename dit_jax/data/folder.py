"""A folder of pictures with their captions as a source."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dit_jax.data.rows import Entry, Listed, Rows, is_utf8, make_entry
from dit_jax.data.sources import BadRecord
from dit_jax.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Folder(Listed):
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
        if not self.path.is_dir():
            fault = "is not a folder" if self.path.exists() else "does not exist"
            raise DataError(f"data folder {path} {fault} (from {Path.cwd()}); set data.source=folder:PATH")
        super().__init__(f"folder:{path}", Rows(_entries(self.path)))

    def content(self, index: int, length: int | None) -> bytes:
        """The file, or its first bytes."""
        id = self.rows.ids[index]
        return _content(self.path / id, id, length)

    def stamp(self, index: int) -> int:
        """The size of the file; blind to an edit that keeps it."""
        picture = self.path / self.rows.ids[index]
        return picture.stat().st_size if picture.is_file() else -1


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
        return Entry(where, (), "not a row with file_name and text")
    name, caption = row.get("file_name", row.get("image")), row.get("text")
    if not isinstance(name, str) or not name.strip():
        return Entry(where, (), "no file name")
    id = os.path.normpath(name)
    if not is_utf8(id):
        return Entry(id, (), "file name is not valid UTF-8")
    if os.path.isabs(id) or Path(id).parts[:1] == ("..",):
        return Entry(id, (), "path leaves the data folder")
    return make_entry(id, caption)


def _read_jsonl(file: Path) -> Iterator[Entry]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        where = f"{file.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Entry(where, (), f"not JSON: {error}")
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

    if not any(entry.captions for entry in entries):
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
    """Reads a text file; bytes that are not UTF-8 become lone surrogates, and `is_utf8` finds the record."""
    try:
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _content(file: Path, id: str, length: int | None) -> bytes:
    """Reads a picture file. A failing disk is not a bad record: replacing it would differ from run to run."""
    of_the_record = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
    try:
        with file.open("rb") as opened:
            return opened.read(length)
    except ValueError as error:  # a NUL in the name
        raise BadRecord(id, f"not a file name: {error}") from error
    except OSError as error:
        if error.errno in of_the_record:
            raise BadRecord(id, f"cannot be read: {error.strerror}") from error
        raise DataError(f"cannot read {file}: {error.strerror} (is the disk or share in order?)") from error
