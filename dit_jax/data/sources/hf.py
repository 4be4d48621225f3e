"""Data sets of the Hugging Face library ``datasets`` as a source: a local folder, or ``owner/name`` on the hub.

The library keeps a data set as memory-mapped Arrow tables, so that rows have random access. Captions are a column that
is read once; a picture is the bytes of a file, or the path of one, which we decode ourselves.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data.sources.features import check_template, choose, flatten, label_caption, one_line
from dit_jax.data.sources.manifests import Columns, usable_rows
from dit_jax.data.sources.parquet import texts_of
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.rows import Listed, file_size, make_entry, read_file
from dit_jax.errors import ConfigError, DataError, FetchError, UserError

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
CHUNK = 10_000  # rows of a column that are looked at together
RETRIES = 5  # of a file that the hub does not give


def open_hf(name: str, subset: str, split: str, image: str, caption: str, label: str, template: str) -> "Table":
    """Opens a data set.

    Args:
      name: a folder, written by ``save_to_disk`` or holding parquet files or pictures with their metadata; where there
        is none, ``owner/name[@revision]`` on the hub. A folder never touches the network.
      subset: what the hub calls the config of the data set; empty where there is one.
      split: such as ``train``; unless written by ``save_to_disk`` also ``train+test`` or ``train[:10%]``.
      image: name of the column of pictures; empty for a usual one or the only one.
      caption: name of the column of captions, each a string or a list of them; empty for a usual one.
      label: name of a column of classes to make captions of; empty for a usual one or the only one, where there are no
        captions.
      template: the caption of a class, with ``{}`` for its name.

    Raises:
      ConfigError: the library is not installed, there is no such subset, split or column, or the template has no place
        for the name.
      DataError: no such folder, it cannot be read, or not one record can be used.
      FetchError: the hub does not give it.
    """
    _library()
    check_template(template)
    return Table(f"hf:{name}", _load(name, subset, split), split, (image, caption, label), template, _places(name))


class Table(Listed):
    """The rows of one split; an id is the split and the number of the row.

    Args:
      name: what the user called it.
      table: the library's data set.
      split: its name.
      wanted: columns of picture, caption and label that the user named, or empty.
      template: the caption of a class.
      places: folders, resolved, below which files lie that rows may name: others are none of a stranger's business.
    """

    def __init__(
        self, name: str, table: Any, split: str, wanted: tuple[str, str, str], template: str, places: Sequence[Path]
    ):
        datasets = _library()
        kinds = table.features
        labels = [column for column in kinds if isinstance(kinds[column], datasets.ClassLabel)]
        texts = [column for column in kinds if _is_text(kinds[column])]
        typed = [column for column in kinds if isinstance(kinds[column], datasets.Image)]
        images = typed or [column for column in kinds if _may_be_picture(kinds[column])]  # parquet without types
        chosen = choose(name, wanted, images, texts, labels)

        self._image, self._places = chosen.image, places
        self._pictures = table.select_columns([chosen.image]).cast_column(chosen.image, datasets.Image(decode=False))
        self._lengths = _lengths(self._pictures)
        names = kinds[chosen.text].names if chosen.text in labels else None
        values = (
            _label_captions(table, chosen.text, names, template) if chosen.is_label else _captions(table, chosen.text)
        )
        entries = (make_entry(f"{split}/{i}", value) for i, value in enumerate(values))
        super().__init__(name, usable_rows(entries, Path(name), Columns((chosen.image,), (chosen.text,))))

    def content(self, index: int, length: int | None) -> bytes:
        """The bytes of the picture in the table, or those of the file that the table names."""
        id = self.rows.ids[index]
        picture = self._pictures[index][self._image] or {}
        if picture.get("bytes") is not None:
            return picture["bytes"][:length]
        path = picture.get("path")
        if not path:
            raise BadRecord(id, "no picture")
        if "://" in path:
            raise BadRecord(id, "an address where a picture belongs: download the pictures first")
        if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in self._places):
            raise BadRecord(id, f"names {path}, which is not in {' or '.join(map(str, self._places))}")
        return read_file(Path(path), id, length)

    def stamp(self, index: int) -> int:
        """The number of bytes of the picture."""
        if self._lengths[index] >= 0:
            return int(self._lengths[index])
        return file_size((self._pictures[index][self._image] or {}).get("path") or "")


# --- columns ------------------------------------------------------------------------------------------------


def _is_text(kind: Any) -> bool:
    """Whether a column holds strings, or lists of them."""
    datasets = _library()
    if isinstance(kind, datasets.List | datasets.LargeList):
        return _is_text(kind.feature)
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "string_view")


def _may_be_picture(kind: Any) -> bool:
    """Whether a column can be read as pictures: bytes, a path, or both."""
    datasets = _library()
    if isinstance(kind, dict):
        return {"bytes", "path"} <= kind.keys()
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary", "string", "large_string")


def _chunks(table: Any, column: str) -> Iterator[Any]:
    """The Arrow arrays of a column, without copying what they hold."""
    for part in table.select_columns([column]).with_format("arrow").iter(CHUNK):
        yield from part.column(0).chunks


def _captions(table: Any, column: str) -> Iterator[object]:
    for chunk in _chunks(table, column):
        for value in texts_of(chunk):
            yield list(flatten(value))


def _label_captions(table: Any, column: str, names: list[str] | None, template: str) -> Iterator[object]:
    """Captions of classes, given as names or, with ``names``, as numbers; None where the class is not known."""
    for chunk in _chunks(table, column):
        for value in chunk.to_pylist() if names else texts_of(chunk):
            if names:
                value = names[value] if value is not None and 0 <= value < len(names) else None
            yield None if value is None else label_caption(template, value)


def _lengths(pictures: Any) -> np.ndarray:
    """Bytes of every picture, int64, -1 where the table holds none; the pictures themselves are not read."""
    import pyarrow.compute

    lengths = [np.zeros(0, np.int64)]
    for chunk in _chunks(pictures, pictures.column_names[0]):
        counts = pyarrow.compute.binary_length(pyarrow.compute.struct_field(chunk, "bytes"))
        lengths.append(counts.cast("int64").fill_null(-1).to_numpy(zero_copy_only=False))
    return np.concatenate(lengths)


# --- where the data set is ----------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("data.source=hf: needs the library datasets: pip install 'dit_jax[hf]'") from error
    return datasets


def _load(name: str, subset: str, split: str) -> Any:
    """One split, from a folder or the hub."""
    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _load_saved(folder, name, subset, split)
    if folder.is_dir():
        return _build(name, str(folder), None, subset, split)
    on_hub = HUB_ID.fullmatch(name)
    if not on_hub or Path(name.partition("/")[0]).is_dir():
        raise DataError(f"hf:{name} is neither a folder (from {Path.cwd()}) nor owner/name[@revision] on the hub")
    return _build(name, on_hub[1], on_hub[2], subset, split)


def _places(name: str) -> list[Path]:
    """Where files of a data set may lie: in its own folder, or in what the library has fetched and unpacked."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(name).expanduser()
    cached = _library().config.HF_DATASETS_CACHE, HF_HUB_CACHE
    return [Path(os.path.realpath(place)) for place in (*cached, *([folder] if folder.is_dir() else []))]


def _load_saved(folder: Path, name: str, subset: str, split: str) -> Any:
    """What ``save_to_disk`` wrote: one split, or several by name."""
    if subset:
        raise ConfigError(f"hf:{name} was written by save_to_disk and has no subsets, so subset={subset} is not there")
    with _told(name, DataError):
        saved = _library().load_from_disk(str(folder))
    several = saved if isinstance(saved, dict) else {str(saved.split or "train").partition("[")[0]: saved}
    _check_splits(name, [split], list(several))
    return several[split]


def _build(name: str, path: str, revision: str | None, subset: str, split: str) -> Any:
    """A split of a data set that the library first lays out as Arrow tables in its cache."""
    datasets = _library()
    is_hub = not Path(path).is_dir()
    if is_hub and not datasets.config.HF_HUB_OFFLINE:
        print(
            f"hub: data set {name} from {datasets.config.HF_ENDPOINT} into {datasets.config.HF_CACHE_HOME}", flush=True
        )
    how = datasets.DownloadConfig(max_retries=RETRIES)
    with _told(name, FetchError if is_hub else DataError, ConfigError):
        builder = datasets.load_dataset_builder(path, subset or None, revision=revision, download_config=how)
    parts = [part.partition("[")[0] for part in split.split("+")]
    _check_splits(name, parts, [str(known) for known in builder.config.data_files or parts])
    with _told(name, FetchError if is_hub else DataError), _bars_for_people():
        builder.download_and_prepare(download_config=how)
    with _told(name, DataError, ConfigError):
        return builder.as_dataset(split)


@contextlib.contextmanager
def _bars_for_people() -> Iterator[None]:
    """Where nobody watches, the library's progress bars fill the log of a run."""
    datasets = _library()
    off = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if off:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if off:
            datasets.enable_progress_bars()


def _check_splits(name: str, wanted: list[str], known: list[str]) -> None:
    """Refuses a split that is not there, before anything is fetched."""
    for split in wanted:
        if split not in known:
            raise ConfigError(f"hf:{name} has no split {split!r}; set split= to one of {', '.join(known)}")


@contextlib.contextmanager
def _told(name: str, kind: type[UserError], of_a_word: type[UserError] | None = None) -> Iterator[None]:
    """What the library trips over as one line: ``of_a_word`` is for a ValueError, its word for a name that it lacks.

    Other than that it lets out whatever the file formats, the disk and the network's libraries raise.
    """
    try:
        yield
    except Exception as error:
        chosen = of_a_word if of_a_word and isinstance(error, ValueError) else kind
        verb = "fetch" if chosen is FetchError else "open"
        raise chosen(f"cannot {verb} hf:{name}: {one_line(error)}") from error
