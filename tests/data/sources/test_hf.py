"""Data sets of the library ``datasets`` from local folders, and every wrong word for one."""

import io
import json
import pickle
import socket
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.hf import open_hf
from dit_jax.data.sources.records import BadRecord
from dit_jax.errors import ConfigError, DataError, FetchError

COLOURS = ["red", "blue", "green"]


def picture(colour, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


COLUMNS = {
    "image": [{"bytes": picture(colour), "path": f"{colour}.png"} for colour in COLOURS],
    "text": [f"a {colour} square" for colour in COLOURS],
    "many": [["one", "two"], ["three"], ["four"]],
    "groups": [[["one", "two"], ["three"]], [["four"]], [["five"]]],
    "label": [0, 1, 0],
    "breed": ["polar_bear", "ox", "ox"],
    "width": [8, 8, 8],
}
TEXT = datasets.Value("string")
FEATURES = {
    "image": datasets.Image(),
    "text": TEXT,
    "many": datasets.List(TEXT),
    "groups": datasets.List(datasets.List(TEXT)),
    "label": datasets.ClassLabel(names=["polar_bear", "ox"]),
    "breed": TEXT,
    "width": datasets.Value("int64"),
}


def table(**columns):
    """A data set of these columns, or types of columns, beside or in place of those above; None takes one away."""
    rows = {**COLUMNS, **{name: rows for name, rows in columns.items() if isinstance(rows, list)}}
    kinds = {**FEATURES, **{name: kind for name, kind in columns.items() if not isinstance(kind, list)}}
    kept = {name: kind for name, kind in kinds.items() if kind is not None}
    return datasets.Dataset.from_dict({name: rows[name] for name in kept}, features=datasets.Features(kept))


def open_local(place, split="train", image="", caption="", label="", template="a photo of a {}", subset=""):
    return open_hf(str(place), subset, split, image, caption, label, template)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library's Arrow tables go where the test's files go; whoever asks for the network fails."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*_):
        raise AssertionError("a local folder touched the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def saved(path):
    table().save_to_disk(path)


def saved_splits(path):
    datasets.DatasetDict({"train": table(), "test": table().select([1])}).save_to_disk(path)


def parquet(path):
    path.mkdir()
    table().select([0, 1]).to_parquet(path / "train-00000-of-00002.parquet")
    table().select([2]).to_parquet(path / "train-00001-of-00002.parquet")


def folder_of_pictures(path):
    path.mkdir()
    for colour in COLOURS:
        (path / f"{colour}.png").write_bytes(picture(colour))
    rows = [json.dumps({"file_name": f"{colour}.png", "text": f"a {colour} square"}) for colour in COLOURS]
    (path / "metadata.jsonl").write_text("\n".join(rows))


LAYOUTS = [saved, saved_splits, parquet, folder_of_pictures]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_pictures_of_a_folder(write, tmp_path):
    write(tmp_path / "data")
    folder_of_pictures(tmp_path / "folder")
    source, folder = open_local(tmp_path / "data"), Folder(tmp_path / "folder")
    assert list(source.captions()) == list(folder.captions())
    assert list(source.ids()) == ["train/0", "train/1", "train/2"]
    for i in range(3):
        assert np.array_equal(source[i].image, folder[i].image) and source[i].captions == folder[i].captions
        assert source.size(i) == (6, 8) and source.stamp(i) == folder.stamp(i)


def test_copies_and_layouts_of_the_same_records_have_one_fingerprint(tmp_path):
    for write in LAYOUTS:
        write(tmp_path / write.__name__)
    assert len({open_local(tmp_path / write.__name__).fingerprint() for write in LAYOUTS}) == 1
    changed = [
        {"text": ["a red square", "a blue square", "another"]},
        {"image": [*COLUMNS["image"][:2], {"bytes": picture("green") + b"\0", "path": None}]},
    ]
    for i, columns in enumerate(changed):
        table(**columns).save_to_disk(tmp_path / f"changed{i}")
    places = ["saved", "changed0", "changed1"]
    assert len({open_local(tmp_path / place).fingerprint() for place in places}) == 3


def test_splits_by_name_and_by_part(tmp_path):
    saved_splits(tmp_path / "saved")
    assert list(open_local(tmp_path / "saved", "test").captions()) == [("a blue square",)]
    parquet(tmp_path / "parquet")
    table().select([2]).to_parquet(tmp_path / "parquet/test.parquet")
    assert list(open_local(tmp_path / "parquet", "train[1:]+test").captions()) == [
        ("a blue square",),
        ("a green square",),
        ("a green square",),
    ]


@pytest.mark.parametrize(
    ("words", "captions"),
    [
        ({"caption": "many"}, [("one", "two"), ("three",), ("four",)]),
        ({"caption": "groups"}, [("one", "two", "three"), ("four",), ("five",)]),
        ({"label": "label"}, [("a photo of a polar bear",), ("a photo of a ox",), ("a photo of a polar bear",)]),
        ({"caption": "label", "template": "{}!"}, [("polar bear!",), ("ox!",), ("polar bear!",)]),
        ({"label": "breed"}, [("a photo of a polar bear",), ("a photo of a ox",), ("a photo of a ox",)]),
        ({"caption": "breed"}, [("polar_bear",), ("ox",), ("ox",)]),
    ],
)
def test_captions_come_from_the_column_that_is_named(words, captions, tmp_path):
    saved(tmp_path / "data")
    assert list(open_local(tmp_path / "data", **words).captions()) == captions


def test_without_captions_the_names_of_classes_are_taken(tmp_path):
    table(text=None, many=None, groups=None, breed=None).save_to_disk(tmp_path / "data")
    assert list(open_local(tmp_path / "data").captions())[1] == ("a photo of a ox",)


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        (datasets.Value("binary"), [picture(colour) for colour in COLOURS]),
        ({"bytes": datasets.Value("binary"), "path": TEXT}, COLUMNS["image"]),
    ],
)
def test_pictures_in_parquet_that_says_nothing_of_their_type(kind, column, tmp_path):
    plain = datasets.Dataset.from_dict(
        {"image": column, "text": COLUMNS["text"]}, features=datasets.Features({"image": kind, "text": TEXT})
    )
    plain.save_to_disk(tmp_path / "data")
    assert [tuple(open_local(tmp_path / "data")[i].image[0, 0]) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


def test_what_is_wrong_with_a_row_is_its_bad_record(tmp_path, capfd):
    there, outside = tmp_path / "cache/there.png", tmp_path / "outside.png"
    for path in (there, outside):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture("red"))
    images = [
        {"bytes": None, "path": str(there)},
        {"bytes": None, "path": str(tmp_path / "cache/gone.png")},
        {"bytes": None, "path": str(outside)},
        {"bytes": None, "path": str(tmp_path / "cache/../outside.png")},
        {"bytes": None, "path": "https://example.org/a.png"},
        {"bytes": b"", "path": None},
        {"bytes": b"<html>", "path": None},
        None,
        COLUMNS["image"][0],
        COLUMNS["image"][0],
    ]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {"image": pyarrow.array(images, kind), "text": [*"abcdefgh", None, " "]}
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data/train.parquet")
    source, reasons = open_local(tmp_path / "data"), []
    assert tuple(source[0].image[0, 0]) == (255, 0, 0)
    assert source.stamp(0) == len(picture("red")) and source.stamp(1) == source.stamp(7) == -1
    for i in range(1, 10):
        with pytest.raises(BadRecord) as error:
            source[i]
        assert error.value.id == f"train/{i}"
        reasons.append(error.value.reason)
    outside, caption = "outside.png, which is not in", "no caption"
    expected = (
        "No such file",
        outside,
        outside,
        "an address",
        "empty file",
        "not a picture",
        "no picture",
        caption,
        caption,
    )
    assert all(said in reason for said, reason in zip(expected, reasons, strict=True)), reasons
    assert "Generating" not in capfd.readouterr().err  # no terminal, no bar


def test_a_class_that_is_not_known_is_no_caption(tmp_path):
    table(label=[0, -1, None]).save_to_disk(tmp_path / "data")
    assert list(open_local(tmp_path / "data", label="label").captions()) == [("a photo of a polar bear",), (), ()]


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_source_travels_to_another_process(write, tmp_path):
    write(tmp_path / "data")
    source = open_local(tmp_path / "data")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and np.array_equal(copy[2].image, source[2].image)


@pytest.mark.parametrize(
    ("write", "words", "said"),
    [
        (saved, {"split": "test"}, "no split 'test'; set split= to one of train"),
        (saved_splits, {"split": "validation"}, "no split 'validation'; set split= to one of train, test"),
        (saved_splits, {"split": "train+test"}, "set split= to one of train, test"),
        (parquet, {"split": "test"}, "no split 'test'; set split= to one of train"),
        (parquet, {"split": "train[:x]"}, r"train\[:x\]"),
        (parquet, {"subset": "en"}, "'en' not found. Available: .'default'"),
        (saved, {"subset": "en"}, "no subsets"),
        (saved, {"image": "picture"}, "no column 'picture' that can be its image; choose among image"),
        (saved, {"caption": "title"}, "no column 'title' that can be its caption; choose among text, many"),
        (saved, {"caption": "width"}, "no column 'width'"),
        (saved, {"label": "width"}, "no column 'width' that can be its label; choose among label"),
        (saved, {"caption": "text", "label": "label"}, "leave one away"),
        (saved, {"template": "a photo"}, "'a photo' has no {}"),
    ],
)
def test_a_wrong_word_is_told_with_the_choices(write, words, said, tmp_path):
    write(tmp_path / "data")
    with pytest.raises(ConfigError, match=said) as error:
        open_local(tmp_path / "data", **words)
    assert "\n" not in str(error.value)


def test_where_no_column_is_known_by_its_name_the_candidates_are_listed(tmp_path):
    rows = {"left": COLUMNS["image"], "right": COLUMNS["image"], "title": COLUMNS["text"]}
    kinds = {"left": datasets.Image(), "right": datasets.Image(), "title": TEXT}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / "data")
    with pytest.raises(ConfigError, match="Set image= to one of left, right"):
        open_local(tmp_path / "data")
    with pytest.raises(ConfigError, match="Set caption= to one of title, or label= to one of .there is none"):
        open_local(tmp_path / "data", image="left")
    assert open_local(tmp_path / "data", image="left", caption="title")[0].captions == ("a red square",)


@pytest.mark.parametrize(
    ("place", "kind", "said"),
    [
        ("nowhere", DataError, "neither a folder .* nor owner/name"),
        ("../data", DataError, "neither a folder"),
        ("pets/cats", DataError, "neither a folder"),
        ("owner/name", FetchError, "owner/name.*[Oo]ffline"),
        ("owner/name@v1.0", FetchError, "owner/name@v1.0.*[Oo]ffline"),
    ],
)
def test_what_is_no_folder_is_a_hub_id_only_where_it_reads_like_one(place, kind, said, tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said) as error:
        open_local(place)
    assert "\n" not in str(error.value)


def test_damaged_and_empty_folders_are_told(tmp_path):
    saved(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    parquet(tmp_path / "parquet")
    (tmp_path / "parquet/train-00000-of-00002.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    table(text=[None] * 3).save_to_disk(tmp_path / "mute")
    for place in ("saved", "parquet", "empty", "mute"):
        with pytest.raises(DataError, match=place) as error:
            open_local(tmp_path / place)
        assert "\n" not in str(error.value)


def test_a_folder_with_a_script_runs_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="script"):
        open_local(tmp_path / "data")
    assert not (tmp_path / "ran").exists()


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'dit_jax\[hf\]'"):
        open_local("owner/name")
