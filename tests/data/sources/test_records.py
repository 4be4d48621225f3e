"""Folders as people have them, what is wrong with their records, and parts of a source."""

import errno
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources.folder import Folder, passed_over
from dit_jax.data.sources.records import BadRecord, split
from dit_jax.errors import DataError

CAPTIONS = {"b.png": "a blue square", "a.png": "a red square", "sub/c.png": "a green square"}
COLOURS = {"b.png": "blue", "a.png": "red", "sub/c.png": "green"}


def draw(folder, name, colour="red", size=(8, 6)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)


def write_jsonl(folder, captions):
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_csv(folder, captions):
    rows = [f'{name},"{text}"' for name, text in captions.items()]
    (folder / "metadata.csv").write_bytes("\r\n".join(["file_name,text", *rows]).encode("utf-8-sig"))


def write_json(folder, captions):
    rows = [{"image": name, "text": text} for name, text in captions.items()]
    (folder / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")


def write_pairs(folder, captions):
    for name, text in captions.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


LAYOUTS = [write_jsonl, write_csv, write_json, write_pairs]


@pytest.fixture
def pictures(tmp_path):
    for name, colour in COLOURS.items():
        draw(tmp_path, name, colour)
    return tmp_path


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_pictures_with_their_captions(pictures, write):
    write(pictures, CAPTIONS)
    source = Folder(pictures)
    assert len(source) == 3
    # A metadata file has an order of its own; pairs are sorted.
    assert list(source.ids()) == (sorted(CAPTIONS) if write is write_pairs else list(CAPTIONS))
    for i in range(3):
        image, captions, id = source[i]
        assert captions == (CAPTIONS[id],) and list(source.captions())[i] == captions
        assert image.shape == (6, 8, 3) and image.dtype == np.uint8
        assert Image.new("RGB", (1, 1), COLOURS[id]).getpixel((0, 0)) == tuple(image[3, 3])


def test_a_metadata_file_is_preferred_to_pairs(pictures):
    write_pairs(pictures, CAPTIONS)
    write_jsonl(pictures, {"a.png": "from the file"})
    assert list(Folder(pictures).captions()) == [("from the file",)]


def test_hidden_files_are_no_data(pictures):
    draw(pictures, "._a.png")
    draw(pictures, ".thumbnails/a.png")
    write_pairs(pictures, {**CAPTIONS, "._a.png": "hidden", ".thumbnails/a.png": "hidden"})
    assert list(Folder(pictures).ids()) == sorted(CAPTIONS)


def test_ids_of_pairs_do_not_depend_on_how_the_folder_is_written(pictures, monkeypatch):
    write_pairs(pictures, CAPTIONS)
    monkeypatch.chdir(pictures)
    for path in (".", "./", "sub/..", f"../{pictures.name}", pictures):
        assert list(Folder(path).ids()) == sorted(CAPTIONS)
        assert Folder(path).fingerprint() == Folder(pictures).fingerprint()


def test_captions_are_read_as_one_line_in_any_language(pictures):
    write_pairs(pictures, {"a.png": "  a red\n square ", "b.png": "一个蓝色的\u2028正方形", "sub/c.png": "x"})
    assert list(Folder(pictures).captions())[:2] == [("a red square",), ("一个蓝色的 正方形",)]
    write_jsonl(pictures, {"a.png": "line\u2028separator"})
    assert list(Folder(pictures).captions()) == [("line separator",)]


def test_columns_with_other_usual_names_and_several_captions(pictures):
    rows = [{"image": "a.png", "caption": ["a red square", "red"]}, {"path": "b.png", "prompt": "a blue square"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [Folder(pictures)[i].captions for i in range(2)] == [("a red square", "red"), ("a blue square",)]


def test_every_kind_of_bad_record_is_named_with_its_reason(pictures, monkeypatch):
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "html.png").write_text("<html>404</html>")
    Image.effect_noise((24, 24), 64).save(pictures / "cut.png")
    (pictures / "cut.png").write_bytes((pictures / "cut.png").read_bytes()[:300])
    draw(pictures, "dot.png", size=(1, 1))
    draw(pictures, "bomb.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    rows = [json.dumps({"file_name": name, "text": "fine"}).encode() for name in ("a.png", "./b.png")]
    rows += [
        json.dumps({"file_name": name, "text": "fine"}).encode()
        for name in ("empty.png", "html.png", "cut.png", "dot.png", "bomb.png", "gone.png", "sub")
    ]
    rows += [
        b'{"file_name": "nocaption.png"}',
        b'{"file_name": "blank.png", "text": "  "}',
        b'{"file_name": "number.png", "text": 8}',
        b'{"file_name": "latin1.png", "text": "caf\xe9"}',
        b'{"file_name": "half.png", "text": "\\ud83d"}',
        b'{"file_name": "../up.png", "text": "fine"}',
        b'{"file_name": "sub/../../up.png", "text": "fine"}',
        b'{"file_name": "/etc/up.png", "text": "fine"}',
        b'{"file_name": "nul\\u0000.png", "text": "fine"}',
        b'{"text": "fine"}',
        b'["a.png", "fine"]',
        b'{"file_name": "a.png", "te',
    ]
    (pictures / "metadata.jsonl").write_bytes(b"\n\n".join(rows))

    source, bad = Folder(pictures), {}
    assert len(source) == len(rows) == len(list(source.ids())) == len(list(source.captions()))
    for i in range(2, len(source)):
        with pytest.raises(BadRecord) as error:
            source[i]
        bad[error.value.id] = error.value.reason
        assert "\n" not in error.value.reason
    assert [source[i].id for i in range(2)] == ["a.png", "b.png"]
    expected = {
        "empty.png": "empty file",
        "html.png": "not a picture",
        "cut.png": "cannot be decoded",
        "dot.png": "too small: 1x1",
        "bomb.png": "too many pixels",
        "gone.png": "No such file",
        "sub": "directory",
        "nocaption.png": "no caption",
        "blank.png": "no caption",
        "number.png": "no caption",
        "latin1.png": "not valid UTF-8",
        "half.png": "not valid UTF-8",
        "../up.png": "leaves the data folder",
        "/etc/up.png": "leaves the data folder",
        "nul\0.png": "not a file name",
        "metadata.jsonl:37": "no file name",
        "metadata.jsonl:39": "not a row",
        "metadata.jsonl:41": "not JSON",
    }
    assert bad.keys() == expected.keys()
    for id, reason in expected.items():
        assert reason in bad[id], (id, bad[id])


def test_a_pair_without_its_text_is_bad(pictures):
    write_pairs(pictures, {"a.png": "a red square", "b.png": ""})
    (pictures / "sub" / "c.txt").write_bytes(b"caf\xe9")
    reasons = {}
    for i in range(1, 3):
        with pytest.raises(BadRecord) as error:
            Folder(pictures)[i]
        reasons[error.value.id] = error.value.reason
    assert reasons == {"b.png": "no caption", "sub/c.png": "caption is not valid UTF-8"}


def test_a_short_row_of_a_csv_is_bad(pictures):
    (pictures / "metadata.csv").write_text("file_name,text\na.png,red\nb.png\n")
    source = Folder(pictures)
    assert source[0].captions == ("red",)
    with pytest.raises(BadRecord, match=r"b\.png: no caption"):
        source[1]


def test_a_failing_disk_is_not_a_bad_record(pictures, monkeypatch):
    write_pairs(pictures, CAPTIONS)
    source = Folder(pictures)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match="Input/output error"):
        source[0]


def test_a_bad_record_travels_between_processes():
    bad = pickle.loads(pickle.dumps(BadRecord("a.png", "empty")))
    assert (bad.id, bad.reason, str(bad)) == ("a.png", "empty", "a.png: empty")


def test_links_of_a_download_cache_are_followed(pictures, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    (snapshot / "a.png").symlink_to(pictures / "a.png")
    write_jsonl(snapshot, {"a.png": "a red square"})
    assert Folder(snapshot)[0].captions == ("a red square",)


def message(folder):
    with pytest.raises(DataError) as error:
        Folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_told_with_the_key_to_set(tmp_path):
    assert "nowhere does not exist" in message(tmp_path / "nowhere")
    assert "data.source=folder:PATH" in message(tmp_path / "nowhere")
    draw(tmp_path, "a.png")
    assert "is not a folder" in message(tmp_path / "a.png")


def test_a_folder_without_captions_says_what_was_looked_for(pictures):
    text = message(pictures)
    assert all(name in text for name in ("metadata.jsonl", "metadata.csv", "metadata.json", "cat.txt"))
    assert "3 pictures seen" in text and "write a line" in text


def test_pictures_as_phones_save_them_are_named_with_what_mends_it(tmp_path):
    """By their names alone: no reader of ours is asked. A folder with a list is another matter."""
    for name in ("IMG_1.HEIC", "sub/IMG_2.heic", "IMG_3.dng", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    told = "1 .dng, 2 .heic: not read, convert them to JPEG"
    assert message(tmp_path).endswith(f"(0 pictures seen); {told}")
    draw(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    assert len(Folder(tmp_path)) == 1 and passed_over(tmp_path) == told
    write_jsonl(tmp_path, {"a.png": "a dog"})
    assert passed_over(tmp_path) == ""


def test_captions_one_folder_below_are_pointed_at(pictures):
    write_jsonl(pictures / "sub", {"c.png": "a green square"})
    assert f"data.source=folder:{pictures / 'sub'}" in message(pictures)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metadata.jsonl", "", "none of its 0 records"),
        ("metadata.jsonl", '{"file_name": "a.png", "colour": "red"}', "a.png: no caption; every row needs"),
        ("metadata.csv", "image;text\na.png;red\n", "has one column, 'image;text'"),
        ("metadata.csv", 'file_name,text\na.png,"' + "x" * 200_000, "quote that is never closed"),
        ("metadata.json", '{"a.png": "red"}', "holds a dict"),
        ("metadata.json", '[{"image": "a.png", "text"', "is not JSON"),
    ],
)
def test_a_metadata_file_that_cannot_be_used_is_named(pictures, name, content, told):
    (pictures / name).write_text(content)
    assert told in message(pictures) and name in message(pictures)


def test_fingerprint_follows_names_captions_and_sizes(pictures):
    write_pairs(pictures, CAPTIONS)
    seen = {Folder(pictures).fingerprint()}
    assert Folder(pictures).fingerprint() in seen
    (pictures / "a.txt").write_text("another caption")
    seen.add(Folder(pictures).fingerprint())
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes() + b"\0")
    seen.add(Folder(pictures).fingerprint())
    (pictures / "b.png").rename(pictures / "d.png")
    (pictures / "b.txt").rename(pictures / "d.txt")
    seen.add(Folder(pictures).fingerprint())
    assert len(seen) == 4


class Named:
    """A source of which only the names matter."""

    name = "named"

    def __init__(self, names):
        self._names = names

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index):
        return self._names[index]

    def ids(self):
        return iter(self._names)

    captions = ids

    def fingerprint(self):
        return str(hash(tuple(self._names)))


NAMES = [f"{i:04}.jpg" for i in range(2000)]


def test_the_parts_of_a_source_share_no_record_and_lose_none():
    source = Named(NAMES)
    train, validation = split(source, 0.2, "train"), split(source, 0.2, "validation")
    assert sorted([*train.ids(), *validation.ids()]) == NAMES
    assert 0.16 < len(validation) / len(source) < 0.24
    assert [validation[i] for i in range(len(validation))] == list(validation.ids()) == list(validation.captions())
    assert train.fingerprint() != validation.fingerprint() != source.fingerprint()


def test_adding_records_never_moves_another_between_parts():
    before = set(split(Named(NAMES[::2]), 0.2, "validation").ids())
    after = set(split(Named(list(reversed(NAMES))), 0.2, "validation").ids())
    assert before == after & set(NAMES[::2])


def test_a_larger_fraction_only_adds_to_validation():
    small, large = (set(split(Named(NAMES), fraction, "validation").ids()) for fraction in (0.1, 0.3))
    assert small < large
    assert len(split(Named(NAMES), 0.0, "validation")) == 0


def test_the_split_is_the_same_on_every_machine_and_release():
    """By hand: ``printf 0001.jpg | sha256sum`` begins with 12e3, and 0x12e3 / 0x10000 is 0.0738."""
    assert list(split(Named(NAMES[:10]), 0.0739, "validation").ids()) == ["0001.jpg"]
    assert list(split(Named(NAMES[:10]), 0.0737, "validation").ids()) == []


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        split(Named(NAMES), 1.5, "train")
    with pytest.raises(ValueError, match="'test'"):
        split(Named(NAMES), 0.1, "test")


def test_real_pictures_are_all_read(shared_data):
    source = Folder(shared_data / "emoji")
    assert len(source) == 1634
    bad = []
    for i in range(len(source)):
        try:
            image, caption, _ = source[i]
        except BadRecord as error:
            bad.append(str(error))
        else:
            assert image.shape == (128, 128, 3) and caption
    assert bad == ["emoji_u20e3.png: no caption"]
    assert tuple(source[0].image[0, 0]) == (255, 255, 255)  # transparent corners lie on white
