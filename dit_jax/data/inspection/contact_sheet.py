"""A contact sheet: whole pictures of a source on white, each with its name, its size and its first caption.

The letters are those of the font that Pillow carries, so that a sheet looks the same on every machine. That font has
little more than ASCII: accents are dropped, symbols are written by their names and letters of other scripts are
counted, so a cell may read ``a [red heart] on [4 CJK characters]``.
"""

import bisect
import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from dit_jax.data.ahead import in_threads
from dit_jax.data.sources.records import BadRecord, Record, Source

# In pixels.
SIDE = 208  # of the square that a picture is fitted into
GAP, MARGIN, PADDING = 18, 28, 6  # between cells, around them all, between a picture and its words
TITLE_SIZE, NAME_SIZE, CAPTION_SIZE = 20, 12, 14  # of letters

PANEL, FAINT, DARK = "#f0f0f0", "#8a8a8a", "#202020"  # behind pictures, names, captions
MOST_LINES = 6  # of a caption
MOST_CHARACTERS = 600  # of a text that are looked at; more never fit
TRIES = 8  # records opened for one cell before it is left out

SHOWN = r" -~©«°±´·»‘’“”‹›⁄™"  # what the font has: a range of ASCII and a few more
LATIN = str.maketrans({"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"})


def contact_sheet(source: Source, columns: int, rows: int, threads: int, patience: float) -> Image.Image:
    """A sheet of usable records, evenly spaced over a source, the same on every call.

    Args:
      source: any; of a small one every record is shown once.
      columns: cells beside each other.
      rows: of cells, at most.
      threads: that read; 0 reads here.
      patience: seconds to wait for a record, 0 for ever.

    Raises:
      DataError: nothing came, or the disk fails.
    """
    records = _usable(source, columns * rows, threads, patience)
    return lay_out(f"{source.name}: {len(records):,} of {len(source):,} records", records, columns)


def lay_out(title: str, records: Iterable[Record], columns: int) -> Image.Image:
    """A sheet of given pictures, row by row.

    Args:
      title: stands above them, in one line.
      records: pictures uint8 ``[height, width, 3]`` of any size; the first of the captions is shown, if there is one.
      columns: cells beside each other.
    """
    cells = [_make_cell(record) for record in records]
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    width = 2 * MARGIN + columns * (SIDE + GAP) - GAP
    top = MARGIN + TITLE_SIZE + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * max(0, len(heights) - 1) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for text in _wrap(title, _font(TITLE_SIZE), width - 2 * MARGIN, most_lines=1):
        draw.text((MARGIN, MARGIN), text, DARK, _font(TITLE_SIZE), anchor="lt")
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            _draw_cell(sheet, draw, cell, MARGIN + column * (SIDE + GAP), top)
        top += height + GAP
    return sheet


def spread(count: int, total: int) -> np.ndarray:
    """``count`` of ``total`` indices, evenly spaced, none twice; all where there are no more. int64, ascending."""
    count = min(count, total)
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * max(1, count))


def _usable(source: Source, count: int, threads: int, patience: float) -> list[Record]:
    """At most ``count`` records; in the place of a bad one stands the next of its share of the source."""

    def first_good(share: range) -> Record | None:
        for index in share:
            with contextlib.suppress(BadRecord):
                return source[index]
        return None

    starts = spread(count, len(source)).tolist()
    ends = [*starts[1:], len(source)]
    shares = [range(start, min(end, start + TRIES)) for start, end in zip(starts, ends, strict=True)]
    found = in_threads(first_good, shares, threads, count, patience, f"reading {source.name}")
    return [record for record in found if record]


# --- a cell -------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """What a cell shows; ``height`` in pixels."""

    picture: Image.Image
    name: str
    size: str
    caption: list[str]

    @property
    def height(self) -> int:
        return SIDE + PADDING + _line_height(NAME_SIZE) + len(self.caption) * _line_height(CAPTION_SIZE)


def _make_cell(record: Record) -> _Cell:
    height, width = record.image.shape[:2]
    size = f"{width} x {height}"
    font = _font(NAME_SIZE)
    name = _shorten_name(showable(record.id), font, SIDE - font.getlength(f"{size}    "))
    more = len(record.captions) - 1
    caption = record.captions[0] if record.captions else ""
    lines = _wrap(caption[:MOST_CHARACTERS], _font(CAPTION_SIZE), SIDE, MOST_LINES)
    others = [f"(and {more} more caption{'s' if more > 1 else ''})"] if more > 0 else []
    return _Cell(_fit(record.image), name, size, lines + others)


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, left: int, top: int) -> None:
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), PANEL)
    picture = cell.picture
    sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
    top += SIDE + PADDING
    draw.text((left, top), cell.name, FAINT, _font(NAME_SIZE))
    draw.text((left + SIDE, top), cell.size, FAINT, _font(NAME_SIZE), anchor="ra")
    top += _line_height(NAME_SIZE)
    for line in cell.caption:
        draw.text((left, top), line, DARK, _font(CAPTION_SIZE))
        top += _line_height(CAPTION_SIZE)


def _fit(image: np.ndarray) -> Image.Image:
    """The whole picture, as large as a cell allows; a small one is blurred as in training, by the same filter."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


# --- words --------------------------------------------------------------------------------------------------


def showable(text: str) -> str:
    """A text in the letters that the font has, in one line."""
    plain = unicodedata.normalize("NFKD", text.translate(LATIN))
    plain = "".join("-" if unicodedata.category(c) == "Pd" else c for c in plain if not unicodedata.combining(c))
    named = re.sub(rf"[^{SHOWN}]+(?: +[^{SHOWN}]+)*", lambda found: _describe(found[0]), plain)
    return re.sub(r"\] ([,.;:!?])", r"]\1", " ".join(named.split()))


def _describe(text: str) -> str:
    """Names of symbols and numbers of letters, in brackets; a space where neither is there, as for punctuation."""
    symbols: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    for character in text:
        kind, name = unicodedata.category(character), unicodedata.name(character, "")
        if kind in ("So", "Sm", "Sc"):
            symbols[name.lower() or "symbol"] += 1
        elif kind[0] in "LN":
            script = name.split(" ")[0]
            letters[script if script == "CJK" else script.capitalize()] += 1
    parts = [name if count == 1 else f"{count} x {name}" for name, count in symbols.items()]
    parts += [f"{count} {script} character{'s' if count > 1 else ''}" for script, count in letters.items()]
    return f" [{', '.join(parts)}] " if parts else " "


def _wrap(text: str, font: FreeTypeFont, room: float, most_lines: int) -> list[str]:
    """A text in lines no longer than ``room``; dots stand for what does not fit. A word may be broken."""
    lines, line = [], ""
    for word in showable(text).split():
        longer = f"{line} {word}".lstrip()
        while font.getlength(longer) > room:
            if line:
                lines.append(line)
                line, longer = "", word
            else:
                fits = max(1, _fitting(longer, font, room))
                lines.append(longer[:fits])
                longer = longer[fits:]
        line = longer
    lines += [line] if line else []
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        last = last[: _fitting(last, font, room - font.getlength("..."))].rstrip()
        lines = [*lines[: most_lines - 1], f"{last}..."]
    return lines


def _shorten_name(name: str, font: FreeTypeFont, room: float) -> str:
    """A name without its beginning where it is too long: the folders of a set are often all the same."""
    if font.getlength(name) <= room:
        return name
    return f"...{name[len(name) - _fitting(name[::-1], font, room - font.getlength('...')) :]}"


def _fitting(text: str, font: FreeTypeFont, room: float) -> int:
    """How many of the first characters fit."""
    return bisect.bisect_right(range(1, len(text) + 1), room, key=lambda count: font.getlength(text[:count]))


def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont)  # of a size there is no other
    return font


def _line_height(size: int) -> int:
    return round(1.4 * size)
