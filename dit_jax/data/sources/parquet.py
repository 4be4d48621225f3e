"""Parquet files of captioned pictures as a source: with the pictures inside, as exports of data sets have them, or
with the names of picture files.

Pictures inside are read by row group, the smallest part that can be read alone: a few hundred pictures. Read in order,
as for a cache or by encoders that run once, a group is kept until the next ones come, and each process that reads and
each bucket of shapes reads it about once. Training on them in random order would read a whole group for a picture: make
a cache first.
"""

import collections
import contextlib
import glob
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.data.sources.manifests import SAY_WHICH, Columns, grouped, make_row, usable_rows
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.rows import Files, Listed, Rows, make_entry
from dit_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow

TOGETHER = 2**14  # rows of names and captions that become objects at once
CACHE_BYTES = 2**28  # of row groups that are kept, in each process that reads
FEWEST_GROUPS = 2  # kept however large: threads that read ahead cross from one group into the next


def open_parquet(place: str, names: Columns) -> Listed:
    """Opens a Parquet file, all below a folder, or those that a pattern such as ``data/train-*.parquet`` matches.

    Whether the pictures are inside is what the type of their column says: bytes, or a struct with ``bytes`` as
    Hugging Face writes it, or text. Records keep the order of the file names and rows.

    Raises:
      DataError: no such file, a file that is damaged, without these columns or not like the others, no usable row.
      ConfigError: pyarrow is not installed.
    """
    pyarrow = _pyarrow()
    files, root = _find(place)
    with _damage(files[0]):
        schema = pyarrow.parquet.read_schema(files[0])
    image, caption = (next((name for name in usual if name in schema.names), "") for usual in names)
    if not image or not caption:
        raise DataError(f"{files[0]} has columns {', '.join(schema.names)}, but needs {names}; {SAY_WHICH}")
    types = {name: schema.field(name).type for name in (image, caption)}
    kind = types[image]
    folders = [os.path.relpath(file.parent, root) for file in files]
    if _is_text(kind):
        entries = (
            make_row({**row, image: _below(folder, row[image])}, where, names)
            for file, folder in zip(files, folders, strict=True)
            for where, row in _read(file, types, [image, caption])
        )
        return Files(f"parquet:{place}", root, usable_rows(grouped(entries), Path(place), names))
    if _is_bytes(kind):
        pictures = image
    elif pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
        pictures = f"{image}.bytes"
    else:
        raise DataError(f"{files[0]}: column {image} holds {kind}: neither pictures (bytes) nor names of files")
    entries = (
        make_entry(os.path.normpath(os.path.join(folder, where)), row[caption])
        for file, folder in zip(files, folders, strict=True)
        for where, row in _read(file, types, [caption])
    )
    rows = usable_rows(entries, Path(place), names)
    return PicturesInside(f"parquet:{place}", rows, files, pictures)


class PicturesInside(Listed):
    """Listed records whose pictures lie in Parquet files.

    Args:
      name: what the user called it.
      rows: the records, as they lie in the files.
      files: one after the other.
      column: of the pictures' bytes; ``image.bytes`` is a field of a struct.
    """

    def __init__(self, name: str, rows: Rows, files: list[Path], column: str):
        super().__init__(name, rows)
        self._files, self._column = files, column
        self._sizes = [file.stat().st_size for file in files]
        self._groups: list[tuple[int, int]] = []  # file and number in it of every row group
        lengths = [0]
        for number, file in enumerate(files):
            with _damage(file):
                metadata = _pyarrow().parquet.read_metadata(file)
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum(lengths)
        self.__setstate__({})

    def content(self, index: int, length: int | None) -> bytes:
        """The bytes of the picture, or the first of them; its row group stays in memory for its neighbours."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        picture = self._read_group(group)[index - int(self._starts[group])]
        if not picture.is_valid:
            raise BadRecord(self.rows.ids[index], "no picture")
        return picture.as_buffer()[:length].to_pybytes()

    def stamp(self, index: int) -> int:
        """The size of the Parquet file; blind to an edit that keeps it."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sizes[self._groups[group][0]]

    def _read_group(self, group: int) -> "pyarrow.ChunkedArray":
        """The pictures of a row group. One thread reads at a time, so that the others find what it has read."""
        with self._lock:
            if group not in self._kept:
                number, place = self._groups[group]
                file = self._files[number]
                with _damage(file), _pyarrow().parquet.ParquetFile(file) as opened:
                    column = opened.read_row_group(place, columns=[self._column]).column(0)
                is_struct = _pyarrow().types.is_struct(column.type)
                self._kept[group] = _pyarrow().compute.struct_field(column, "bytes") if is_struct else column
                while len(self._kept) > FEWEST_GROUPS and sum(k.nbytes for k in self._kept.values()) > CACHE_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; it reads row groups of its own."""
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[int, pyarrow.ChunkedArray] = collections.OrderedDict()  # latest last


# --- files --------------------------------------------------------------------------------------------------


def _find(place: str) -> tuple[list[Path], Path]:
    """The files in the order of their names, and the folder that the ids of records begin at."""
    path = Path(place).expanduser()
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
        root = path
    else:
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    if not files:
        fault = "holds no *.parquet" if path.is_dir() else "does not exist"
        raise DataError(f"parquet {place} {fault} (from {Path.cwd()}); set data.source=parquet:FILE_OR_FOLDER")
    return files, root


def _read(file: Path, types: dict[str, "pyarrow.DataType"], columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the texts of every row of a file, which must have the types of the first one."""
    with _damage(file), _pyarrow().parquet.ParquetFile(file) as opened:
        here = opened.schema_arrow
        for name, kind in types.items():
            if name not in here.names or here.field(name).type != kind:
                raise DataError(f"{file} is not like the other files: it has no column {name} of type {kind}")
        number = itertools.count()
        for batch in opened.iter_batches(TOGETHER, columns=columns):
            for values in zip(*(texts_of(batch.column(name)) for name in columns), strict=True):
                yield f"{file.name}:{next(number)}", dict(zip(columns, values, strict=True))


def texts_of(column: "pyarrow.Array") -> list[Any]:
    """Texts or lists of texts as Python objects; bytes that are not UTF-8 become lone surrogates."""
    pyarrow = _pyarrow()
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        return texts_of(column.cast(kind.value_type))
    if _is_text(kind):
        texts = column.cast(pyarrow.large_binary()).to_pylist()
        return [text if text is None else text.decode("utf-8", "surrogateescape") for text in texts]
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inner = iter(texts_of(column.flatten()))
        counts = (length.as_py() or 0 for length in pyarrow.compute.list_value_length(column))
        return [list(itertools.islice(inner, count)) for count in counts]
    return [None] * len(column)  # numbers are no captions


def _below(folder: str, name: Any) -> Any:
    return os.path.join(folder, name) if isinstance(name, str) and name.strip() else name


def _is_text(kind: "pyarrow.DataType") -> bool:
    types = _pyarrow().types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: "pyarrow.DataType") -> bool:
    types = _pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """A file that pyarrow cannot read is told in one line."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError) as error:
        raise DataError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("data.source=parquet: needs pyarrow: pip install 'dit_jax[parquet]'") from error
    return pyarrow
