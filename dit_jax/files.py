"""How files that describe something are read, with limits on their size and depth, and how they are written whole.

Somebody else wrote them, or a disk changed them. What is too large or too deep is a ValueError in one line, like what
is no JSON at all. Nothing is read past a limit, so that it costs neither memory nor time, and what is read is never too
deep for a function that descends into it.
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

LARGEST = 2**26  # bytes of a file that describes something; of these a tokenizer's vocabulary is the largest: a few MiB
LONGEST_LINE = 2**24  # bytes of a row
DEEPEST = 64  # lists and objects in one another


def read_bounded(path: Path, limit: int = LARGEST) -> bytes:
    """A whole file.

    Raises:
      ValueError: it is longer than ``limit``.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file in UTF-8 says; errors as of `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path).decode("utf-8"))


def flatten(tree: Any, separator: str = ".") -> dict[str, Any]:
    """The values of nested objects (or sections of a config) by their names one behind the other."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = flatten(value, separator).items() if hasattr(value, "items") else [("", value)]
        found |= {f"{name}{separator}{rest}" if rest else name: leaf for rest, leaf in inner}
    return found


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is no JSON, or deeper than `DEEPEST`.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
        if not level:
            return found
    raise ValueError(f"it is nested deeper than {DEEPEST}")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whenever the process ends."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def bounded_lines(file: BinaryIO, limit: int = LONGEST_LINE) -> Iterator[bytes | None]:
    """The lines of an open file; None in place of one that is longer than ``limit``, which is passed over."""
    while line := file.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
        yield None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a JSON-lines file that hold an object, each with what it says.

    Others are passed over: a process that is killed leaves its last line torn, a failing disk leaves anything.
    """
    # wrapped, as files in a bucket cannot read a line up to a limit
    with path.open("rb") as raw, io.BufferedReader(cast(io.RawIOBase, raw)) as file:
        for line in bounded_lines(file):
            try:
                text = (line or b"").decode("utf-8").rstrip("\r\n")
                row = parse_json(text)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield text, row
