"""Every figure of an inspection, against sets of which the truth is known by hand."""

import io
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.inspection.sources import inspect
from dit_jax.data.inspection.words import printable
from dit_jax.data.shapes_world import ShapesWorld
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.records import BadRecord, Record
from dit_jax.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]


class Given:
    """A source without files: pictures of given sizes, or the reason why one is bad."""

    name = "given"

    def __init__(self, sizes, captions=None, ids=None):
        self.sizes = sizes
        self._captions = captions or [("a thing",)] * len(sizes)
        self._ids = ids or [f"{i}.png" for i in range(len(sizes))]
        self.opened = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.opened.append(index)
        if isinstance(self.sizes[index], str):
            raise BadRecord(self._ids[index], self.sizes[index])
        return Record(np.zeros((*self.sizes[index], 3), np.uint8), self._captions[index], self._ids[index])

    def ids(self):
        return iter(self._ids)

    def captions(self):
        return iter(self._captions)


def count_words(captions):
    return np.array([len(caption.split()) + 2 for caption in captions])


def look(
    source, *, text_length=77, image_size=8, max_bad_fraction=0.01, shapes=(), limit=1000, patience=60, said=print
):
    return inspect(source, count_words, text_length, image_size, max_bad_fraction, shapes, limit, 2, patience, said)


def told(report, what):
    """The lines that begin with a word."""
    return [line for line in report.lines() if line.strip().startswith(what)]


# --- captions and ids


def test_captions_are_counted_by_record_and_by_what_they_say():
    captions = [("red", "blue"), (), ("red",), ("green", "red", "red")]
    report = look(Given([(8, 8)] * 4, captions))
    found = report.captions
    assert (found.count, found.distinct, found.fewest, found.most, found.lacking) == (6, 3, 0, 3, 1)
    assert told(report, "captions") == ["  captions   6 (0 to 3 a record, 1.5 on average), 3 of them distinct"]
    assert told(report, "lacking") == ["  lacking    1 of 4 records (25.0%) have no caption"]


def test_lengths_of_captions():
    # With begin and end: 3 to 102 words, one of each, and one more of 3.
    captions = [("word " * n,) for n in (1, *range(1, 101))]
    found = look(Given([(8, 8)] * 101, captions)).captions
    assert found.lengths == {3: 2, **{n: 1 for n in range(4, 103)}}
    assert found.mean_length == pytest.approx((3 + sum(range(3, 103))) / 101)
    assert [found.quantile(share) for share in (0, 0.5, 0.95, 1)] == [3, 52, 97, 102]
    for share in (0.3, 0.5, 0.95):
        exact = np.quantile([len(c[0].split()) + 2 for c in captions], share, method="inverted_cdf")
        assert found.quantile(share) == exact
    assert found.cut == 102 - 77


def test_the_words_that_are_lost_are_shown_of_the_first_long_caption():
    captions = [("just as long",), ("a b c  d e",), ("1 2 3 4 5 6 7",)]
    report = look(Given([(8, 8)] * 3, captions), text_length=5)
    assert report.captions.cut == 2 and report.captions.lost == "d e"
    assert any(line.endswith("the first of them loses: d e") for line in report.lines())
    assert look(Given([(8, 8)] * 3, captions), text_length=9).captions.lost == ""


def test_a_caption_without_spaces_loses_its_last_characters():
    source = Given([(8, 8)], [("一个蓝色的正方形",)])
    report = inspect(source, lambda texts: np.array([len(t) + 2 for t in texts]), 7, 8, 0.01, (), 9, 1, 60, print)
    assert report.captions.lost == "正方形"


def test_captions_that_speak_of_sides_are_counted():
    captions = [("a cat left of a dog", "a cat"), ("what is right",), ("bright",)]
    report = look(Given([(8, 8)] * 3, captions))
    assert report.captions.of_sides == 2
    assert "mirrors no picture" in told(report, "sides")[0] and "2 of 4 captions" in told(report, "sides")[0]
    assert "half of the pictures are mirrored" in told(look(Given([(8, 8)], [("bright",)])), "sides")[0]


# --- pictures


def test_sizes_are_those_of_the_smallest_the_median_and_the_largest_picture():
    report = look(Given([(10, 30), (4, 4), (20, 20), (90, 2), (50, 60)]))
    assert report.pictures.sizes == ((4, 4), (10, 30), (50, 60))
    assert "smallest 4 x 4, median 30 x 10, largest 60 x 50" in told(report, "sizes")[0]


def test_a_picture_is_enlarged_where_a_side_is_shorter_than_the_square():
    assert look(Given([(7, 100), (8, 8), (8, 100), (100, 7), (9, 9)])).pictures.enlarged == 2


def test_shapes_of_pictures_and_what_a_square_cuts_off():
    #        very tall  tall (two)            square (three)              wide     very wide
    sizes = [(30, 10), (20, 10), (13, 10), (10, 8), (8, 10), (10, 10), (10, 20), (10, 100)]
    groups = look(Given(sizes)).pictures.shapes
    assert [group.name.split("  ")[0] for group in groups] == ["very tall", "tall", "square", "wide", "very wide"]
    assert [group.count for group in groups] == [1, 2, 3, 1, 1]
    lost = [2 / 3, (1 / 2 + 3 / 13) / 2, (0.2 + 0.2 + 0) / 3, 1 / 2, 9 / 10]
    assert [group.lost for group in groups] == pytest.approx(lost)


def test_what_a_square_cuts_off_of_a_square_is_nothing_at_all():
    report = look(Given([(side, side) for side in range(2, 300)]), image_size=7)
    assert report.pictures.lost == (0, 0) and told(report, "all")[0].endswith(" 0.0%")


def test_buckets_and_what_they_cut_off():
    shapes = ((16, 4), (8, 8), (4, 16))
    sizes = [(10, 10)] * 4 + [(10, 40), (10, 80)] * 2 + [(16, 3), (16, 4)] * 2
    report = look(Given(sizes), shapes=shapes)
    pictures = report.pictures
    assert [(group.name, group.count) for group in pictures.buckets] == [("4 x 16", 4), ("8 x 8", 4), ("16 x 4", 4)]
    assert [group.lost for group in pictures.buckets] == pytest.approx([1 / 8, 0, (0 + 1 / 2) / 2])
    assert pictures.lost == pytest.approx(
        ((0 + (3 / 4 + 7 / 8) / 2 + (13 / 16 + 3 / 4) / 2) / 3, (1 / 8 + 0 + 1 / 4) / 3)
    )
    assert pictures.enlarged == 2  # 3 x 16 to 4 x 16; as squares of 8 x 8, 4 x 16 would be too
    assert told(report, "bucket") and told(report, "8 x 8")[0].split() == ["8", "x", "8", "4", "33.3%", "0.0%"]
    assert not told(look(Given(sizes)), "bucket") and not told(look(Given(sizes), shapes=((8, 8),)), "bucket")


def test_every_picture_of_a_small_set_is_opened():
    source = Given([(8, 8)] * 7)
    report = look(source, limit=7)
    assert sorted(source.opened) == list(range(7)) and report.opened == 7
    assert "pictures: all 7 were opened" in report.lines()


def test_a_sample_is_evenly_spaced_and_the_same_on_every_run():
    runs = []
    for _ in range(2):
        source = Given([(8, 8 + i) for i in range(10_000)])
        report = look(source, limit=1500)  # more than are opened together
        runs.append((sorted(source.opened), report))
    assert runs[0] == runs[1]
    opened, report = runs[0]
    assert len(set(opened)) == 1500 == report.opened
    assert set(np.diff(opened)) == {6, 7} and opened[0] <= 6 and opened[-1] >= 9993
    assert "pictures: 1,500 of 10,000, evenly spaced, were opened" in report.lines()
    assert report.captions.count == 10_000  # captions are all read


# --- bad records


def test_every_kind_of_bad_record_is_told_with_count_ids_and_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)

    def save(name, content):
        (tmp_path / name).write_bytes(content)

    def png(width, height):
        file = io.BytesIO()
        Image.effect_noise((width, height), 64).save(file, "PNG")
        return file.getvalue()

    save("good.png", png(8, 8))
    save("empty.png", b"")
    save("html.png", b"<html>404</html>")
    save("cut.png", png(24, 24)[:300])
    save("dot.png", png(1, 1))
    save("dash.png", png(9, 1))
    save("bomb.png", png(40, 40))
    rows = [{"file_name": path.name, "text": "fine"} for path in sorted(tmp_path.glob("*.png"))]
    rows += [{"file_name": "gone.png", "text": "fine"}, {"file_name": "silent.png"}, {"text": "fine"}]
    rows += [{"file_name": "half.png", "text": "\ud83d"}, {"file_name": "../up.png", "text": "fine"}]
    lines = [json.dumps(row) for row in rows] + ['{"file_name": "good.p']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))

    report = look(Folder(tmp_path))
    found = {trouble.kind: (trouble.count, trouble.ids) for trouble in report.troubles}
    assert found.pop("too small") == (2, ("dash.png", "dot.png"))
    expected = {
        "empty file": "empty.png",
        "not a picture that can be read": "html.png",
        "cannot be decoded": "cut.png",
        "too many pixels": "bomb.png",
        "cannot be read": "gone.png",
        "no caption": "silent.png",
        "caption is not valid UTF-8": "half.png",
        "no file name": "metadata.jsonl:10",
        "path leaves the data folder": "../up.png",
        "not JSON": "metadata.jsonl:13",
    }
    assert len(found) == len(expected)
    for kind, id in expected.items():
        assert [value for told, value in found.items() if told.startswith(kind)] == [(1, (id,))], (kind, found)
    assert "empty file" in found, "what differs from record to record is no part of the kind"
    assert report.bad == 12 and report.records == 13
    text = "\n".join(report.lines())
    assert "bad records: 12 of 13 opened (92.3%); training would stop (data.max_bad_fraction=0.01)" in text
    assert "2   too small: dash.png, dot.png\n             the first: too small: 9x1 pixels" in text
    assert "1   no caption: silent.png\n  " in text and "No such file" in text
    assert report.troubles[0].kind == "too small", "the most frequent first"
    assert all(line.isprintable() for line in report.lines())


def test_only_a_few_ids_and_kinds_are_told():
    reasons = ["broken: 1"] * 50 + [f"fault number {i}" for i in range(30)]
    report = look(Given(reasons))
    assert report.troubles[0].ids == ("0.png", "1.png", "2.png") and report.troubles[0].count == 50
    assert "0.png, 1.png, 2.png, ..." in told(report, "50 ")[0]
    assert told(report, "21 ") == ["        21   of 21 more kinds"]
    assert len(report.lines()) < 40


@pytest.mark.parametrize(
    ("bad", "records", "limit", "stops"),
    [(1, 10, 99, False), (2, 10, 99, True), (2, 200, 999, False), (3, 200, 999, True), (3, 200, 50, True)],
)
def test_the_verdict_on_bad_records_is_that_of_training(bad, records, limit, stops):
    """One is never too many; of a sample the share counts, not the number."""
    report = look(Given(["broken"] * bad + [(8, 8)] * (records - bad)), limit=limit)
    assert ("training would stop" in told(report, "bad records")[0]) == stops


def test_a_set_without_a_usable_picture_or_caption_is_still_told():
    report = look(Given(["broken", "broken"], [(), ()]))
    assert report.pictures is None and report.captions is None
    assert "  captions   none" in report.lines() and "  sizes      none can be used" in report.lines()


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="given holds no records"):
        look(Given([]))


def test_a_failing_disk_ends_the_inspection():
    class Failing(Given):
        def __getitem__(self, index):
            raise DataError("cannot read: Input/output error")

    with pytest.raises(DataError, match="Input/output"):
        look(Failing([(8, 8)] * 3))


def test_a_picture_that_never_comes_ends_in_one_error():
    released = threading.Event()

    class Silent(Given):
        def __getitem__(self, index):
            if index == 3:
                released.wait()
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"^opening pictures of given: nothing came for 0\.5 seconds"):
        look(Silent([(8, 8)] * 9), patience=0.5)
    released.set()


NEVER = """
import time
from dit_jax.data.buckets import sizes_of
from dit_jax.data.inspection.contact_sheet import contact_sheet
from dit_jax.data.inspection.sources import inspect

class Silent:
    name = "silent"
    def __len__(self):
        return 1
    def __getitem__(self, index):
        print("reading", flush=True)
        time.sleep(1000)
    size = __getitem__
    def ids(self):
        return ["a"]
    def captions(self):
        return [("a cat",)]

{look}
"""


@pytest.mark.parametrize(
    "look",
    [
        "sizes_of(Silent(), 2, 0)",
        "contact_sheet(Silent(), 1, 1, 2, 0)",
        "inspect(Silent(), lambda texts: [3] * len(texts), 77, 8, 0.01, (), 9, 2, 0, print)",
    ],
)
def test_ctrl_c_ends_a_program_that_waits_for_ever(look):
    program = [sys.executable, "-c", NEVER.format(look=look)]
    with subprocess.Popen(
        program, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "reading\n"
        time.sleep(0.5)  # until the main thread waits: a signal on its way there is seen when the wait ends
        running.send_signal(signal.SIGINT)
        try:
            errors = running.communicate(timeout=10)[1]
        finally:
            running.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")


# --- words


def test_the_lines_fit_one_screen_and_any_terminal():
    ids = ["a\nb\x1b[31m.png", "\udcff" + "x" * 500, "c", "d"]
    captions = [("long " * 500,), ("一" * 300,), ("left",), ()]
    shapes = ((16, 4), (8, 8), (4, 16))
    report = look(Given(["broken\nfile: " + "y" * 500, "z" * 500, (8, 8), (8, 9)], captions, ids), shapes=shapes)
    assert len(report.lines()) < 40 and max(map(len, report.lines())) <= 120
    assert all(line.isprintable() for line in report.lines())
    "\n".join(report.lines()).encode()
    assert printable("a\nb\udcff红😀") == "a\\nb\\udcff红😀"


@pytest.mark.parametrize(("bad", "share"), [(0, ""), (1, "<0.1%"), (5, "0.1%"), (5000, "100.0%"), (4999, ">99.9%")])
def test_no_share_is_rounded_to_nothing_or_to_all(bad, share):
    report = look(Given(["broken"] * bad + [(8, 8)] * (5000 - bad)), limit=5000)
    assert (f"({share})" in told(report, "bad records")[0]) == (bad > 0)


def test_a_long_inspection_says_how_far_it_is(monkeypatch):
    seconds = itertools.count(0, 4)
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    heard = []
    look(Given([(8, 8)] * 5), said=heard.append)
    assert heard and all(word in " ".join(heard) for word in ("of 5 captions read", "of 5 pictures opened"))


def test_the_shapes_world_is_what_it_is_known_to_be():
    report = look(ShapesWorld(0, 40, (1, 2), "seen"), image_size=64)
    assert report.opened == report.records == report.captions.count == 40 and not report.troubles
    assert report.pictures.sizes == ((64, 64),) * 3 and report.pictures.enlarged == 0
    assert report.pictures.lost == (0, 0) and report.captions.of_sides > 0
