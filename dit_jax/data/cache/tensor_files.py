"""Safetensors files that hold data: equal arrays give equal bytes, and reading maps the file into memory.

    8 bytes    N, length of the header, little-endian
    N bytes    JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {"notes": JSON as text}}
    the rest   the arrays, one after the other; offsets count from here

The published library reads these files too. They are not written by it, because it would copy every array, and not read
by it, because it would load them. Spaces behind the header let the arrays begin at a page of memory, so that rows of
whole pages lie in as few pages as they can. Nothing in a file is believed before it is checked: reading a damaged or
hostile one ends in a `DataError`.
"""

import contextlib
import errno
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dit_jax.errors import DataError
from dit_jax.files import parse_json

PAGE = 4096
MOST_AXES = 8
HEADER_LIMIT = 100_000_000  # bytes, the published library's own
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA, NOTES = "__metadata__", "notes"

Layout = Mapping[str, tuple[np.dtype, tuple[int | None, ...]]]  # name -> type and shape; None is any length


class UnreadableError(DataError):
    """The system does not let a file be read, which may be whole all the same."""


class TensorFile(NamedTuple):
    """A file that was opened.

    Attributes:
      tensors: read-only views of the file, by name; its pages are read when they are used.
      notes: what was written beside them.
      file: the mapping that the views look into.
    """

    tensors: dict[str, np.ndarray]
    notes: Any
    file: mmap.mmap


class Pages(NamedTuple):
    """Where in a mapped file the rows of an array lie.

    Attributes:
      file: the mapping.
      start: of the first row, in bytes.
      stride: bytes of a row.
    """

    file: mmap.mmap
    start: int
    stride: int

    def ask_for(self, first: int, last: int) -> None:
        """Have the system read rows ``first`` to ``last - 1`` while this thread does something else.

        Without it a page is read when it is touched, and the next one after that: a disk that could serve many at a
        time serves one.
        """
        begin = (self.start + first * self.stride) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.madvise(mmap.MADV_WILLNEED, begin, self.start + last * self.stride - begin)


def pages_of(array: np.ndarray, axes: int) -> Pages | None:
    """Where an array of a `TensorFile` lies, the first ``axes`` of which count its rows; None of any other array."""
    if not isinstance(array.base, mmap.mmap):
        return None
    start = array.ctypes.data - np.frombuffer(array.base, np.uint8).ctypes.data
    return Pages(array.base, start, array.strides[axes - 1])


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], notes: Any) -> None:
    """Write arrays and notes (JSON) to an open file."""
    header: dict[str, Any] = {METADATA: {NOTES: json.dumps(notes, sort_keys=True)}}
    # Wide types first: then every array is aligned to its type, whatever the lengths.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def open_tensors(path: Path, layout: Layout) -> TensorFile:
    """Map a file into memory.

    Args:
      path: the file.
      layout: the arrays that it should hold, all of them.

    Raises:
      DataError: there is no such file, it is damaged, or it holds other arrays.
      UnreadableError: it cannot be told, because the system fails.
    """
    try:
        with readable(path), path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there") from error
    except ValueError as error:
        raise DataError(f"{path} is empty") from error
    try:
        tensors, notes = _parse(mapped)
        _compare(tensors, layout)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {_words(error)}") from error
    return TensorFile(tensors, notes, mapped)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file that is there and cannot be read ends in an `UnreadableError`; one that is not, in a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        more = "; `ulimit -n` raises how many" if error.errno == errno.EMFILE else ""
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}{more}") from error


def _parse(mapped: mmap.mmap) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays and the notes of a file; errors of many kinds where it is not what it should be."""
    length = int.from_bytes(mapped[:8], "little")
    start = 8 + length
    if start > len(mapped) or length > HEADER_LIMIT:
        raise ValueError(f"its header would take {length:,} bytes of {len(mapped):,}")
    header = parse_json(mapped[8:start].decode())
    notes = parse_json(header.pop(METADATA)[NOTES])
    return {name: _view(mapped, start, name, entry) for name, entry in header.items()}, notes


def _view(mapped: mmap.mmap, start: int, name: str, entry: Any) -> np.ndarray:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError(f"shape or place of {name!r} are no whole numbers")
    if len(shape) > MOST_AXES:
        raise ValueError(f"{name!r} has {len(shape)} axes")
    if end > len(mapped) - start or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} {tuple(shape)} does not lie at its bytes {begin} to {end}")
    if entry["dtype"] == "BOOL" and mapped[start + begin : start + end].translate(None, b"\0\1"):
        raise ValueError(f"{name!r} holds more than 0 and 1")
    return np.ndarray(tuple(shape), dtype, mapped, start + begin)


def _compare(tensors: Mapping[str, np.ndarray], layout: Layout) -> None:
    if tensors.keys() != layout.keys():
        raise ValueError(f"it holds {', '.join(tensors) or 'nothing'}, and should hold {', '.join(layout)}")
    for name, (dtype, shape) in layout.items():
        found = tensors[name]
        fits = len(found.shape) == len(shape) and all(b in (a, None) for a, b in zip(found.shape, shape, strict=True))
        if found.dtype != dtype or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name!r} is {found.dtype} {found.shape}, and should be {dtype} ({sizes})")


def _words(error: Exception) -> str:
    """What an error says; the key alone of a KeyError is no sentence."""
    said = " ".join(str(error).split())
    return f"no or an unknown {said}" if isinstance(error, KeyError) else said[:200]
