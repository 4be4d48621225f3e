"""Lists of captioned picture files, as JSON lines, CSV, Parquet or COCO's JSON, as sources.

A row is a picture and its caption or captions. Which columns these are is known by their usual names (`Columns`) or
told by the user. Files are read row by row, so that a list of ten million pictures needs no more memory than what
`rows.Rows` keeps of it. `folder` reads its metadata files with the same functions.
"""

import contextlib
import csv
import itertools
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dit_jax.data.sources.rows import Entry, Files, Listed, Rows, is_utf8, make_entry
from dit_jax.errors import DataError
from dit_jax.files import LONGEST_LINE, bounded_lines, parse_json

IMAGE_COLUMNS = ("file_name", "image", "path", "filename", "filepath", "image_path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
LARGEST_LIST = 2**30  # bytes of a list that is one JSON: as objects it takes ten times as many; COCO's has 0.1 GB
SAY_WHICH = "if its columns have other names, say which with ?image=COLUMN&caption=COLUMN"


class Columns(NamedTuple):
    """Names that the columns of pictures and of captions can have; the first that a row has is taken."""

    image: tuple[str, ...]
    caption: tuple[str, ...]

    def __str__(self) -> str:
        return f"a picture ({'|'.join(self.image)}) and a caption ({'|'.join(self.caption)})"


def columns(image: str, caption: str) -> Columns:
    """The columns that the user named; where a name is empty, the usual ones."""
    return Columns((image,) if image else IMAGE_COLUMNS, (caption,) if caption else CAPTION_COLUMNS)


def open_manifest(kind: str, path: str, image: str, caption: str) -> Listed:
    """Opens a list of captioned pictures: ``jsonl``, ``csv`` (also tab-separated ``.tsv``) or ``parquet``.

    File names are relative to the folder of the list. Other than in a folder of pictures they may be absolute or lead
    out of it: the list is the user's own, not part of something that was downloaded whole. Rows one after the other
    with the same file are one picture with several captions, as Flickr8k has them.

    Args:
      kind: one of the above; ``parquet`` can be a folder or a pattern too, and hold the pictures themselves.
      path: where the list lies.
      image: name of the column of pictures; empty for the usual ones.
      caption: name of the column of captions, each a string or a list of them; empty for the usual ones.

    Raises:
      DataError: it is not there, cannot be read, or has not one usable row.
      ConfigError: ``parquet`` without pyarrow.
    """
    names = columns(image, caption)
    if kind == "parquet":
        from dit_jax.data.sources.parquet import open_parquet

        return open_parquet(path, names)
    read = {"jsonl": read_jsonl, "csv": read_csv}[kind]
    file = _find_file(kind, path, "FILE")
    rows = usable_rows(grouped(read(file, names)), file, f"{names}; {SAY_WHICH}")
    return Files(f"{kind}:{path}", file.parent, rows)


def _find_file(kind: str, path: str, place: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        fault = "is not a file" if file.exists() else "does not exist"
        raise DataError(f"{kind} file {path} {fault} (from {Path.cwd()}); set data.source={kind}:{place}")
    return file


def grouped(entries: Iterable[Entry]) -> Iterator[Entry]:
    """One entry of entries one after the other with the same id, with the captions of all."""
    for id, same in itertools.groupby(entries, key=operator.attrgetter("id")):
        first, *others = same
        captions = tuple(itertools.chain(first.captions, *(entry.captions for entry in others)))
        yield Entry(id, captions, "" if captions else first.problem)


def usable_rows(entries: Iterable[Entry], file: Path, needed: Columns | str) -> Rows:
    """The records of a list.

    Raises:
      DataError: not one of them can be used; ``needed`` says what a row must have.
    """
    rows = Rows(entries)
    if len(rows.problems) == len(rows):
        first = f", the first because of {rows.ids[0]}: {rows.problems[0]}" if len(rows) else ""
        raise DataError(f"{file}: none of its {len(rows)} records can be used{first}; every row needs {needed}")
    return rows


def make_row(row: object, where: str, names: Columns) -> Entry:
    """The entry of a row whose picture is the name of a file; ``where`` is its id as long as it has no such name."""
    if not isinstance(row, dict):
        return Entry(where, (), "not a row with names of columns")
    file_name = _first(row, names.image)
    if not isinstance(file_name, str) or not file_name.strip():
        keys = ", ".join(map(str, row))
        return Entry(where, (), f"no file name among {keys if keys.isprintable() else ascii(keys)}"[:200])
    if "://" in file_name:
        return Entry(where, (), "an address where a file name belongs: download the pictures first")
    id = os.path.normpath(file_name)
    if not is_utf8(id):
        return Entry(id, (), "file name is not valid UTF-8")
    return make_entry(id, _first(row, names.caption))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    return None


# --- formats ------------------------------------------------------------------------------------------------
# Bytes that are not UTF-8 become lone surrogates, so that one of them spoils one record and not the list.


def read_jsonl(file: Path, names: Columns) -> Iterator[Entry]:
    """The rows of a file with a JSON object per line."""
    with _read_errors(file), file.open("rb") as opened:
        for number, line in enumerate(bounded_lines(opened), start=1):
            where = f"{file.name}:{number}"
            if line is None:
                yield Entry(where, (), f"a line of more than {LONGEST_LINE:,} bytes")
                continue
            text = line.decode("utf-8", "surrogateescape")
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                row = parse_json(text)
            except ValueError as error:
                yield Entry(where, (), f"not JSON: {error}")
            else:
                yield make_row(row, where, names)


def read_csv(file: Path, names: Columns) -> Iterator[Entry]:
    """The rows of a file with a header and commas, or tabs where it is called ``.tsv``."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with _read_errors(file), file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        rows = csv.DictReader(_short_lines(opened), delimiter=delimiter)
        try:
            header = rows.fieldnames or []
            if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                raise DataError(
                    f"{file} has one column, {header[0]!r}: columns are parted by commas, or by tabs in a .tsv"
                )
            for row in rows:
                yield make_row(row, f"{file.name}:{rows.line_num}", names)
        except csv.Error as error:
            raise DataError(f"{file} line {rows.line_num}: {error} (a quote that is never closed?)") from error


def _short_lines(opened: TextIO) -> Iterator[str]:
    """The lines of a file; csv.Error at one that is too long."""
    while line := opened.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise csv.Error(f"a line of more than {LONGEST_LINE:,} characters")
        yield line


def read_json(file: Path, names: Columns) -> Iterator[Entry]:
    """The rows of a file with one JSON list."""
    rows = load_json(file)
    if not isinstance(rows, list):
        raise DataError(f'{file} holds a {type(rows).__name__}, not a list of {{"image": ..., "text": ...}}')
    for number, row in enumerate(rows):
        yield make_row(row, f"{file.name}[{number}]", names)


def load_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
      DataError: it cannot be read or is not JSON.
    """
    try:
        return parse_json(read_text(file, LARGEST_LIST))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error


def read_text(file: str | Path, limit: int) -> str:
    """Reads a text file, or the beginning of one that has more than ``limit`` bytes."""
    with _read_errors(file), open(file, "rb") as opened:
        return opened.read(min(limit, os.fstat(opened.fileno()).st_size)).decode("utf-8-sig", "surrogateescape")


@contextlib.contextmanager
def _read_errors(file: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


# --- COCO ---------------------------------------------------------------------------------------------------

COCO = Columns(("file_name",), ("caption",))


def open_coco(path: str, images: str) -> Listed:
    """Opens the pictures of a COCO ``captions_*.json``, in its order, each with its captions by the annotations' ids.

    Args:
      path: the JSON file.
      images: the folder of the pictures; empty: found where the files of COCO are usually laid, such as
        ``train2017/`` beside the folder of ``annotations/captions_train2017.json``.

    Raises:
      DataError: the file or the pictures are not there, or it is another JSON.
    """
    file = _find_file("coco", path, "CAPTIONS.json")
    found = load_json(file)
    try:
        captions: dict[Any, list[object]] = {}
        for annotation in sorted(found["annotations"], key=lambda annotation: annotation["id"]):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        rows = {picture["id"]: {"file_name": picture["file_name"]} for picture in found["images"]}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not COCO's JSON of captions ({type(error).__name__}: {error}): images need id and file_name, "
            "annotations id, image_id and caption; it is captions_*.json, not instances_*.json"
        ) from error
    entries = (
        make_row({**row, "caption": captions.get(number)}, f"{file.name}: image {number}", COCO)
        for number, row in rows.items()
    )
    table = usable_rows(entries, file, COCO)
    return Files(f"coco:{path}", _pictures_of(file, table, images), table)


def _pictures_of(file: Path, rows: Rows, images: str) -> Path:
    """The folder that holds the pictures of a COCO file: the user's, or the first usual one that has some of them."""
    if images:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise DataError(f"images={images} is not a folder (from {Path.cwd()})")
        return folder
    here, above, part = file.parent, file.parent.parent, file.stem.rpartition("_")[2]
    folders = [above / part, above / "images" / part, here / part, here / "images", above / "images", here]
    first = [rows.ids[i] for i in range(min(len(rows), 100))]
    for folder in folders:
        if any((folder / id).is_file() for id in first):
            return folder
    looked = ", ".join(map(str, folders))
    raise DataError(f"pictures of {file}, such as {first[0]}, are in none of {looked}; say ?images=FOLDER")
