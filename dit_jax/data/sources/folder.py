"""A folder of pictures with their captions as a source."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dit_jax.data.sources.manifests import columns, make_row, read_csv, read_json, read_jsonl, read_text, usable_rows
from dit_jax.data.sources.rows import LONGEST_TEXT, Entry, Files, Rows
from dit_jax.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw")  # of phones and cameras
MANIFESTS = {"metadata.jsonl": read_jsonl, "metadata.csv": read_csv, "metadata.json": read_json}


class Folder(Files):
    """The pictures of a folder with their captions.

    Of these layouts the first that is there is taken:

      1. ``metadata.jsonl``: a line ``{"file_name": "cat.jpg", "text": "a cat"}`` per picture
      2. ``metadata.csv``: columns ``file_name`` and ``text``
      3. ``metadata.json``: a list of ``{"image": "cat.jpg", "text": "a cat"}``
      4. ``cat.jpg`` with ``cat.txt`` beside it, in any depth of subfolders

    Columns may have the other names of `manifests` too, and a caption may be a list of several. Records keep the
    order of the metadata file, or that of the sorted file names. File names are relative to the folder and may not
    leave it; links to files are followed, since download caches are made of them, links to folders are not searched
    for pairs.

    Pairs are for as many pictures as one looks through by hand: to open them all names are listed and sorted and each
    caption file is read, which for millions takes minutes, and on a network disk far longer. There ``metadata.jsonl``,
    one file read from end to end, tar shards (``wds:``) or a cache is the way.

    Raises:
      DataError: no such folder, no captions in it, or not one usable row.
    """

    def __init__(self, path: str | Path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"data folder {path} {fault} (from {Path.cwd()}); set data.source=folder:PATH")
        super().__init__(f"folder:{path}", folder, _rows(folder))


USUAL = columns(image="", caption="")


def _rows(folder: Path) -> Rows:
    """Reads the captions of a folder in the first layout that is there."""
    for file_name, read in MANIFESTS.items():
        file = folder / file_name
        if file.is_file():
            return usable_rows(map(_inside, read(file, USUAL)), file, USUAL)
    return _paired_rows(folder)


def passed_over(folder: Path) -> str:
    """What a folder of pairs holds of pictures in formats that are not read, and what mends it; empty if nothing."""
    if any((folder / name).is_file() for name in MANIFESTS):
        return ""  # what it lists and cannot be decoded is a bad record
    found = Counter(os.path.splitext(name)[1].lower() for name in _names(folder, UNREAD_SUFFIXES))
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(found.items()))
    return kinds and f"{kinds}: not read, convert them to JPEG"


def _inside(entry: Entry) -> Entry:
    """The entry, or what is wrong with it if it leads out of the folder: folders come from others."""
    if os.path.isabs(entry.id) or Path(entry.id).parts[:1] == ("..",):
        return Entry(entry.id, (), "path leaves the data folder")
    return entry


def _names(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The files that end so, in any depth, sorted; hidden files and folders are no data."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = [f for f in files if f.lower().endswith(suffixes) and not f.startswith(".")]
        below = os.path.relpath(root, folder) if root != str(folder) else ""
        names += [os.path.join(below, name) for name in found]
    return sorted(names)


def _paired_rows(folder: Path) -> Rows:
    """Pairs of picture and text, sorted by name."""
    rows = Rows(_paired_entries(folder, _names(folder, PICTURE_SUFFIXES)))
    if len(rows.problems) == len(rows):
        nested = sorted(path.parent for name in MANIFESTS for path in folder.glob(f"*/{name}"))
        advice = 'write a line {"file_name": "cat.jpg", "text": "a cat"} per picture into metadata.jsonl'
        if nested:
            advice = f"set data.source=folder:{nested[0]}"
        elif not len(rows) and (unread := passed_over(folder)):
            advice = unread
        raise DataError(
            f"no captions in data folder {folder}: looked for {', '.join(MANIFESTS)} and for cat.txt beside "
            f"cat.jpg ({len(rows)} pictures seen); {advice}"
        )
    return rows


def _paired_entries(folder: Path, names: list[str]) -> Iterator[Entry]:
    for name in names:
        caption_file = os.path.join(folder, f"{os.path.splitext(name)[0]}.txt")
        caption = read_text(caption_file, LONGEST_TEXT) if os.path.isfile(caption_file) else None
        yield make_row({"file_name": name, "text": caption}, name, USUAL)
