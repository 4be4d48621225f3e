"""A TFDS data set read without TensorFlow, made by a tool of ours, and every wrong word for one."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.tfds import _is_picture, open_tfds
from dit_jax.errors import ConfigError, DataError, FetchError
from tests.data.same_pictures import FOLDER, GOLDEN
from tools.make_golden_tfds import GoldenShapes

REPOSITORY = Path(__file__).resolve().parents[3]
FEATURES = tensorflow_datasets.features


def open_local(
    name="golden_shapes", split="train", image="", caption="", label="", template="a photo of a {}", at=None
):
    return open_tfds(name, split, image, caption, label, template, str(at or GOLDEN / "tfds"))


def picture(colour, size=(8, 6), form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


class Many(tensorflow_datasets.core.GeneratorBasedBuilder):
    """A data set of what the tests want: TFDS knows a class by its name, so that there can be only one."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    features, examples = None, None

    def _info(self):
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=self.features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {"train": enumerate(self.examples), "test": enumerate(self.examples[:1])}

    def _generate_examples(self):
        raise AssertionError("the splits are given")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares ``many`` in the test's folder."""

    def prepare_many(kinds, examples, file_format="array_record"):
        monkeypatch.setattr(Many, "features", FEATURES.FeaturesDict(kinds))
        monkeypatch.setattr(Many, "examples", examples)
        Many(data_dir=tmp_path, file_format=file_format).download_and_prepare()

    return prepare_many


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Where TensorFlow is installed, it is not for us; and TFDS does not import it behind our back."""
    monkeypatch.setattr("dit_jax.data.sources.tfds._tensorflow", lambda: None)
    before = "tensorflow" in sys.modules
    yield
    assert before or "tensorflow" not in sys.modules


def test_the_records_are_those_of_the_folder_it_was_made_of():
    source, folder = open_local(), Folder(FOLDER)
    assert list(source.ids()) == [f"train/{i}" for i in range(8)]
    assert list(source.captions()) == list(folder.captions())
    for i in range(8):
        assert np.array_equal(source[i].image, folder[i].image) and source[i].captions == folder[i].captions
        assert source.size(i) == (32, 32) and source.content(i, None) == folder.content(i, None)
        assert source.stamp(i) == folder.stamp(i)


def test_the_tool_makes_what_lies_there(tmp_path):
    GoldenShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    made, kept = open_local(at=tmp_path), open_local()
    assert [made.content(i, None) for i in range(8)] == [kept.content(i, None) for i in range(8)]
    assert made.fingerprint() == kept.fingerprint()
    assert open_local(at=tmp_path, label="label").fingerprint() == open_local(label="label").fingerprint()


def test_parts_of_a_split():
    assert list(open_local(split="train[2:4]+train[:1]").captions()) == [
        list(open_local().captions())[i] for i in (2, 3, 0)
    ]


def test_names_of_classes_become_captions():
    assert open_local(label="label")[0].captions == ("a photo of a purple square",)
    assert open_local(caption="label", template="{}!")[2].captions == ("red cross!",)


def test_a_source_travels_to_another_process_and_to_another_place(tmp_path):
    source = open_local()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and np.array_equal(copy[5].image, source[5].image)
    shutil.copytree(GOLDEN / "tfds", tmp_path / "moved")
    assert open_local(at=tmp_path / "moved").fingerprint() == source.fingerprint()
    assert (
        open_local(label="label").fingerprint() != source.fingerprint() != open_local(split="train[1:]").fingerprint()
    )


def test_features_in_any_depth(prepare, tmp_path):
    text, label = FEATURES.Text(), FEATURES.ClassLabel(names=["polar_bear", "ox"])
    kinds = {
        "image": FEATURES.Image(),
        "captions": FEATURES.Sequence({"text": text, "id": np.int64}),
        "objects": FEATURES.Sequence({"label": label, "crop": FEATURES.Image()}),
        "mask": FEATURES.LabeledImage(labels=["sky"], shape=(None, None, 1)),
        "nested": {"label": label, "title": text},
    }
    example = {
        "image": io.BytesIO(picture("red")),
        "captions": [{"text": "a red square", "id": 7}, {"text": "一个红色的正方形", "id": 8}],
        "objects": [{"label": 0, "crop": io.BytesIO(picture("blue"))}],
        "mask": io.BytesIO(picture("blue")),
        "nested": {"label": 1, "title": "red"},
    }
    prepare(kinds, [example, {**example, "captions": []}])
    source = open_local("many", at=tmp_path)
    assert source[0].captions == ("a red square", "一个红色的正方形") and tuple(source[0].image[0, 0]) == (255, 0, 0)
    assert list(source.captions())[1] == ()
    assert open_local("many", label="nested/label", at=tmp_path)[0].captions == ("a photo of a ox",)
    assert list(open_local("many", caption="nested/title", split="test", at=tmp_path).captions()) == [("red",)]
    for words in ({"image": "mask"}, {"image": "objects/crop"}, {"label": "objects/label"}):
        with pytest.raises(ConfigError, match="choose among (image|nested/label, captions/text, nested/title)$"):
            open_local("many", at=tmp_path, **words)


def test_maps_of_depth_are_no_pictures():
    """Their floats are kept in the four bytes of a PNG's pixel."""
    assert not _is_picture(FEATURES.Image(shape=(None, None, 1), dtype=np.float32))
    assert _is_picture(FEATURES.Image(shape=(None, None, 1), dtype=np.uint16))


def test_what_is_wrong_with_a_record_is_its_bad_record(prepare, tmp_path):
    kinds = {"image": FEATURES.Image(), "caption": FEATURES.Text()}
    pictures = [picture("red"), b"", b"<html>", picture("red", (40, 40))[:60], picture("red", (1, 1)), picture("red")]
    captions = [*"abcde", " "]
    pairs = zip(pictures, captions, strict=True)
    prepare(kinds, [{"image": io.BytesIO(file), "caption": text} for file, text in pairs])
    source, reasons = open_local("many", at=tmp_path), []
    assert source[0].captions == ("a",)
    for i in range(1, 6):
        with pytest.raises(BadRecord) as error:
            source[i]
        reasons.append(error.value.reason)
    expected = ("empty file", "not a picture", "cannot be decoded", "too small", "no caption")
    assert all(said in reason for said, reason in zip(expected, reasons, strict=True)), reasons


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"split": "test"}, "no split 'test'; set split= to one of train"),
        ({"split": "train[:x]"}, r"no split 'train\[:x\]'"),
        ({"image": "picture"}, "no column 'picture' that can be its image; choose among image"),
        ({"caption": "title"}, "no column 'title' that can be its caption; choose among caption, label"),
        ({"label": "image"}, "no column 'image' that can be its label"),
        ({"template": "a photo"}, "'a photo' has no {}"),
        ({"name": "someone:golden_shapes"}, "is not a name like mnist"),
        ({"name": "golden_shapes/a=1"}, "is not a name like mnist"),
        (
            {"name": "mnist"},
            r"mnist is not prepared in .* \(there: golden_shapes\), and .* pip install 'dit_jax.tfds.'",
        ),
        ({"name": "golden_shapes:2.0.0"}, "golden_shapes:2.0.0 is not prepared"),
        ({"at": "nowhere"}, r"not prepared in nowhere \(there: nothing\)"),
    ],
)
def test_a_wrong_word_is_told_with_the_choices(words, said):
    with pytest.raises(ConfigError, match=said) as error:
        open_local(**words)
    assert "\n" not in str(error.value)


def test_tfrecord_has_no_random_access_and_the_conversion_is_told(tmp_path):
    shutil.copytree(GOLDEN / "tfds", tmp_path / "tfds")
    prepared = tmp_path / "tfds/golden_shapes/1.0.0"
    for file in prepared.glob("*.array_record-*"):
        file.rename(str(file).replace("array_record", "tfrecord"))
    info = prepared / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=f"as tfrecord, .* convert_format --dataset_version_dir={prepared} ") as error:
        open_local(at=tmp_path / "tfds")
    assert "\n" not in str(error.value)


def test_damaged_files_are_told(tmp_path):
    shutil.copytree(GOLDEN / "tfds", tmp_path / "tfds")
    records = next(tmp_path.glob("tfds/golden_shapes/1.0.0/*.array_record*"))
    records.write_bytes(records.read_bytes()[:70000])
    with pytest.raises(DataError, match="cannot read tfds:golden_shapes") as error:
        open_local(at=tmp_path / "tfds")
    assert "\n" not in str(error.value)


def test_what_is_not_prepared_is_prepared_first(tmp_path, monkeypatch, capsys):
    """With a stand-in for TensorFlow, as this data set happens to need no more of it."""
    hidden = []
    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: hidden.append((devices, kind)))
    monkeypatch.setattr("dit_jax.data.sources.tfds._tensorflow", lambda: types.SimpleNamespace(config=config))
    source = open_local(at=tmp_path)
    assert "tfds: preparing golden_shapes/1.0.0" in capsys.readouterr().out
    assert hidden == [([], "GPU")]
    assert source.fingerprint() == open_local().fingerprint()
    with pytest.raises(DataError, match="nowhere is not prepared .* TFDS cannot prepare it: DatasetNotFoundError"):
        open_local("nowhere", at=tmp_path)
    monkeypatch.setattr(GoldenShapes, "_split_generators", lambda self, manager: 1 / 0)
    with pytest.raises(FetchError, match="cannot prepare tfds:golden_shapes .* ZeroDivisionError"):
        open_local(at=tmp_path / "other")


@pytest.mark.parametrize("library", ["tensorflow_datasets", "array_record.python.array_record_data_source"])
def test_without_a_library_one_line_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"needs {library}: pip install 'dit_jax\[tfds\]'"):
        open_local()


@pytest.mark.slow
def test_prepared_with_tensorflow_the_records_are_the_same(tmp_path):
    """In an environment of its own: the tool, and our own preparing, which both come out as what lies here."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    libraries = ["tensorflow-cpu", "tensorflow-datasets", "array_record", "importlib_resources", "numpy", "pillow"]
    subprocess.run([python, "-m", "pip", "install", "-q", *libraries], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words):
        subprocess.run([python, *words], cwd=REPOSITORY, env=environment, check=True)

    run("-m", "tools.make_golden_tfds", tmp_path / "tool")
    program = f"""
import sys, tools.make_golden_tfds
from dit_jax.data.sources.tfds import _is_picture, open_tfds
words = ("golden_shapes", "train", "", "", "", "{{}}", {str(tmp_path / "ours")!r})
open_tfds(*words)
assert "tensorflow" in sys.modules
"""
    run("-c", program)
    run("-c", program.replace("assert", "assert not"))  # it is prepared now: TensorFlow is not even imported
    kept = open_local()
    for at in ("tool", "ours"):
        source = open_local(at=tmp_path / at)
        assert source.fingerprint() == kept.fingerprint()
        assert all(np.array_equal(source[i].image, kept[i].image) for i in range(len(kept)))
