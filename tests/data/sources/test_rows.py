"""Many names and captions in little memory, and the size of a picture from the head of its file."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources.records import BadRecord, Mixture, parts_of
from dit_jax.data.sources.rows import HEADER, Entry, Listed, Rows, Strings, make_entry, read_file

TEXTS = ["", "a red circle", "一个红色的圆", "half \ud83d", "last"]


def test_strings_come_back_as_they_were():
    strings = Strings.of(TEXTS)
    assert len(strings) == 5 and list(strings) == TEXTS == [strings[i] for i in range(5)]
    assert list(Strings.of([])) == []


def test_strings_take_little_more_than_their_bytes():
    strings = Strings.of(f"picture {i:07}.jpg" for i in range(1000))
    assert strings.content.nbytes + strings.offsets.nbytes == 1000 * 19 + 8 * 1001


@pytest.mark.parametrize(
    ("captions", "entry"),
    [
        ("  a\n cat ", Entry("x", ("a cat",), "")),
        (["a cat", " ", None, "a pet"], Entry("x", ("a cat", "a pet"), "")),
        (["caf\udce9", "a pet"], Entry("x", ("a pet",), "")),
        ("caf\udce9", Entry("x", (), "caption is not valid UTF-8")),
        ([], Entry("x", (), "no caption")),
        (7, Entry("x", (), "no caption")),
        ({"a": "b"}, Entry("x", (), "no caption")),
    ],
)
def test_of_several_captions_those_that_can_be_used_are_taken(captions, entry):
    assert make_entry("x", captions) == entry


class InMemory(Listed):
    """Pictures given as bytes; notes how much of them was asked for."""

    def __init__(self, files, entries=None):
        super().__init__("memory", Rows(entries or [Entry(f"{i}", (f"caption {i}",), "") for i in range(len(files))]))
        self.files, self.asked = files, []

    def content(self, index, length):
        self.asked.append(length)
        return self.files[index][:length]

    def stamp(self, index):
        return len(self.files[index])


def picture(size, form="PNG", **how):
    file = io.BytesIO()
    Image.effect_noise(size, 64).convert("RGB").save(file, form, **how)
    return file.getvalue()


def test_rows_keep_several_captions_and_what_is_wrong():
    rows = Rows([Entry("a", ("x", "y"), ""), Entry("b", (), "no caption"), Entry("c", ("z",), "")])
    assert [rows.captions_of(i) for i in range(3)] == [("x", "y"), (), ("z",)]
    assert rows.problems == {1: "no caption"} and list(rows.ids) == ["a", "b", "c"]


def turned(size):
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "file", [picture((400, 300)), picture((40, 30), "WEBP"), picture((40, 30), "TIFF"), turned((400, 300))]
)
def test_the_size_is_that_of_the_decoded_picture(file):
    source = InMemory([file])
    assert source.size(0) == source[0].image.shape[:2]


def test_of_a_large_picture_only_the_head_is_read_for_its_size():
    file = picture((400, 300))
    assert len(file) > HEADER
    source = InMemory([file])
    assert source.size(0) == (300, 400) and source.asked == [HEADER]


def test_a_picture_that_is_none_has_no_size():
    source = InMemory(
        [b"no picture", b"", b""], [Entry("a", ("x",), ""), Entry("b", ("x",), ""), Entry("c", (), "why")]
    )
    for index, reason in enumerate(("not a picture", "empty file", "why")):
        with pytest.raises(BadRecord, match=reason):
            source.size(index)


def test_the_fingerprint_follows_ids_captions_stamps_and_problems():
    files = [picture((4, 4)), picture((5, 5))]
    entries = [Entry("a", ("x",), ""), Entry("b", ("y",), "")]
    changed = [
        (files, entries),
        ([files[0], files[1] + b"\0"], entries),
        (files, [entries[0], Entry("c", ("y",), "")]),
        (files, [entries[0], Entry("b", ("y", "z"), "")]),
        (files, [entries[0], Entry("b", (), "no caption")]),
    ]
    assert len({InMemory(*case).fingerprint() for case in changed}) == len(changed)
    assert InMemory(files, entries).fingerprint() == InMemory(files, entries).fingerprint()


def test_a_mixture_is_its_sources_one_after_the_other():
    few, many = InMemory([picture((4, 4))]), InMemory([picture((5, 6)), picture((7, 8)), picture((9, 9))])
    both = Mixture([few, many], [3, 1])
    assert len(both) == 4 and both.parts == [(1, 3), (3, 1)] == parts_of(both)
    assert parts_of(many) == [(3, 1.0)]
    assert [both.size(i) for i in range(4)] == [(4, 4), (6, 5), (8, 7), (9, 9)]
    assert [both[i].id for i in range(4)] == list(both.ids()) == ["0", "0", "1", "2"]
    assert np.array_equal(both[2].image, many[1].image)
    assert list(both.captions()) == [*few.captions(), *many.captions()]
    assert both.name == "3*memory + 1*memory"
    assert both.fingerprint() != Mixture([many, few], [1, 3]).fingerprint()
    with pytest.raises(ValueError, match="above 0"):
        Mixture([few, many], [1, 0])


def test_a_pipe_is_no_picture_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRecord, match="not a regular file"):
        read_file(tmp_path / "pipe.png", "pipe.png", None)
