"""A contact sheet shows whole pictures and their captions, whatever those are."""

import threading

import numpy as np
import pytest
from PIL import Image, ImageFont

from dit_jax.data.inspection.contact_sheet import (
    CAPTION_SIZE,
    GAP,
    MARGIN,
    PANEL,
    SIDE,
    contact_sheet,
    lay_out,
    showable,
    spread,
)
from dit_jax.data.shapes_world import ShapesWorld
from dit_jax.data.sources.records import BadRecord, Record
from dit_jax.errors import DataError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
OVERHANG = 2  # pixels of a letter outside its place
GREY = Image.new("RGB", (1, 1), PANEL).getpixel((0, 0))


def plain(height, width, colour=RED):
    return np.full((height, width, 3), colour, np.uint8)


def cells_of(sheet, columns, top):
    """The squares of pictures in the row that begins at ``top``."""
    lefts = [MARGIN + i * (SIDE + GAP) for i in range(columns)]
    return [np.asarray(sheet)[top : top + SIDE, left : left + SIDE] for left in lefts]


def top_of(sheet):
    """Where the first row of pictures begins: the first line with a colour or the grey behind pictures."""
    inside = np.asarray(sheet)[:, MARGIN]
    return next(y for y in range(60, len(inside)) if tuple(inside[y]) != WHITE)


def ink(sheet, top):
    """Whether something is written below the pictures of the first row."""
    return bool((np.asarray(sheet)[top + SIDE :] < 128).any())


class Given:
    """A source of which some records are bad."""

    name = "given"

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(str(index), "broken")
        return Record(plain(8, 8, (index % 256, 0, 0)), ("x",), str(index))


def make_sheet(source, columns, rows):
    return contact_sheet(source, columns, rows, 2, 60)


def shown(sheet, columns):
    """Red of the middle of each cell in the first row; None where nothing is."""
    cells = cells_of(sheet, columns, top_of(sheet))
    return [
        None if tuple(cell[SIDE // 2, SIDE // 2]) == WHITE else int(cell[SIDE // 2, SIDE // 2, 0]) for cell in cells
    ]


# --- pictures


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (2, 2), (1000, 3000), (3000, 2), (2, 3000)])
def test_a_picture_is_shown_whole_and_in_its_shape(height, width):
    picture = plain(height, width)
    picture[: height // 2] = GREEN  # its upper half
    sheet = lay_out("t", [Record(picture, ("x",), "a.png")], 1)
    (cell,) = cells_of(sheet, 1, top_of(sheet))
    coloured = (cell != GREY).any(axis=2)
    rows, columns = np.flatnonzero(coloured.any(axis=1)), np.flatnonzero(coloured.any(axis=0))
    expected = [max(1, round(side * SIDE / max(height, width))) for side in (height, width)]
    assert [len(rows), len(columns)] == expected and max(expected) == SIDE
    assert abs((rows[0] + rows[-1]) / 2 - SIDE / 2) <= 1, "in the middle of its cell"
    if expected[0] > 8 and height > 8:
        assert cell[rows[1], columns[0]].argmax() == 1 and cell[rows[-2], columns[-1]].argmax() == 0


def test_the_sheet_has_the_asked_columns_and_as_many_rows_as_are_needed():
    one, seven = (lay_out("t", [Record(plain(8, 8), ("x",), "a")] * n, 3) for n in (1, 7))
    assert one.width == seven.width == 2 * MARGIN + 3 * SIDE + 2 * GAP
    top = top_of(one)
    assert seven.height - one.height == 2 * (one.height - MARGIN - top + GAP)
    assert [tuple(cell[0, 0]) for cell in cells_of(one, 3, top)] == [RED, WHITE, WHITE]


def test_records_are_evenly_spaced_and_the_same_on_every_call():
    source = Given(240)
    assert shown(make_sheet(source, 4, 1), 4) == [30, 90, 150, 210]
    world = ShapesWorld(0, 100, (1, 2), "seen")
    assert make_sheet(world, 3, 2).tobytes() == make_sheet(world, 3, 2).tobytes()


def test_a_bad_record_is_replaced_by_the_next_one_and_never_shown_twice():
    assert shown(make_sheet(Given(240, bad=[90, 91]), 4, 1), 4) == [30, 92, 150, 210]
    assert shown(make_sheet(Given(4, bad=[1]), 4, 1), 4) == [0, 2, 3, None]
    assert shown(make_sheet(Given(3), 4, 2), 4) == [0, 1, 2, None]


def test_a_source_without_a_usable_record_gives_a_sheet_with_a_title_alone():
    sheet = make_sheet(Given(9, bad=range(9)), 2, 2)
    assert (np.asarray(sheet) < 128).any() and sheet.height < SIDE


def test_a_record_that_never_comes_ends_in_one_error():
    released = threading.Event()

    class Silent(Given):
        def __getitem__(self, index):
            if index == 5:
                released.wait()
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"^reading given: nothing came for 0\.5 seconds"):
        contact_sheet(Silent(9), 3, 3, 2, 0.5)
    released.set()


@pytest.mark.parametrize(("count", "total"), [(1, 1), (3, 3), (9, 4), (4, 9), (48, 10_000_000), (7, 8), (5, 0)])
def test_places_are_spread_evenly(count, total):
    places = spread(count, total)
    assert len(places) == min(count, total) and len(np.unique(places)) == len(places)
    if len(places) > 1:
        assert np.ptp(np.diff(places)) <= 1 and abs(places[0] - (total - 1 - places[-1])) <= 1
        assert places[-1] < total and places[0] <= total / len(places) / 2


# --- words


def test_the_font_has_every_letter_that_is_taken_as_it_is():
    """Any other is drawn as one and the same box."""
    font = ImageFont.load_default(CAPTION_SIZE)
    box = bytes(font.getmask("\uffff"))
    letters = [letter for letter in map(chr, range(33, 0x3000)) if showable(letter) == letter]
    assert len(letters) >= 100
    assert not [letter for letter in letters if bytes(font.getmask(letter)) == box]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a red circle, (large) & 'round'", "a red circle, (large) & 'round'"),
        ("Café “naïve” – Łódź straße…", "Cafe “naive” - Lodz strasse..."),
        ("一个蓝色的正方形", "[8 CJK characters]"),
        ("红色, a 圆", "[2 CJK characters], a [1 CJK character]"),
        ("большой красный", "[14 Cyrillic characters]"),
        ("I ❤️ 🍕", "I [heavy black heart, slice of pizza]"),
        ("😀😀 ok", "[2 x grinning face] ok"),
        ("👨\u200d👩", "[man, woman]"),
        ("a\nb\tc\x00d", "a b c d"),
        ("half\ud83d", "half"),
        ("\u200b", ""),
    ],
)
def test_what_the_font_lacks_is_told_in_words(text, read):
    assert showable(text) == read


@pytest.mark.parametrize(
    "caption",
    ["一个蓝色的正方形" * 50, "😀" * 200, "x" * 2000, "word " * 20_000, "\udcff\x00\n", "العربية", "🇩🇪 → ½", "i" * 700],
)
def test_no_caption_breaks_a_sheet_or_leaves_its_cell(caption):
    record = Record(plain(8, 8), (caption,), caption[:600])
    alone = np.asarray(lay_out("t", [record], 2))
    top = top_of(Image.fromarray(alone))
    assert (alone[top:, MARGIN + SIDE + OVERHANG :] == 255).all(), "nothing is written in the next cell"
    assert (alone[:, : MARGIN - OVERHANG] == 255).all() and (alone[-MARGIN // 2 :] == 255).all()
    assert len(alone) < top + 2 * SIDE


def test_captions_are_written_and_the_others_counted():
    top = top_of(lay_out("t", [Record(plain(8, 8), (), "")], 1))
    none, one, more = (lay_out("t", [Record(plain(8, 8), c, "")], 1) for c in ((), ("a cat",), ("a cat", "a dog")))
    assert not ink(none, top) and ink(one, top)
    assert more.height > one.height > none.height


def test_a_long_title_stays_on_its_line():
    sheet = np.asarray(lay_out("folder:" + "/very/long" * 50, [Record(plain(8, 8), ("x",), "a")], 1))
    assert (sheet[:, -MARGIN + OVERHANG :] == 255).all() and (sheet[:, : MARGIN - OVERHANG] == 255).all()
