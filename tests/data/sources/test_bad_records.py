"""R8: what is wrong with a record is found in every kind of source that can hold it, and what is only unusual is not.

Every maker writes the same records, as (file name, bytes of the picture, bytes of the caption or None), into a kind of
source and returns the user's word for it.
"""

import io
import json
import shutil
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources.catalogue import open_source
from dit_jax.data.sources.records import BadRecord
from tests.data.same_pictures import GOLDEN

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


class Given(NamedTuple):
    """A record as it is written."""

    name: str
    picture: bytes
    caption: bytes | None


# --- kinds of sources ---------------------------------------------------------------------------------------


def write_files(folder, records):
    folder.mkdir()
    for record in records:
        (folder / record.name).write_bytes(record.picture)


def json_row(record, image, caption):
    """A JSON object; a caption that is not UTF-8 stays what it is."""
    text = b"null" if record.caption is None else b'"' + record.caption + b'"'
    return b'{"%s": "%s", "%s": %s}' % (image.encode(), record.name.encode(), caption.encode(), text)


def metadata_jsonl(folder, records):
    write_files(folder, records)
    (folder / "metadata.jsonl").write_bytes(b"\n".join(json_row(record, "file_name", "text") for record in records))
    return f"folder:{folder}"


def metadata_csv(folder, records):
    write_files(folder, records)
    rows = [record.name.encode() + b"," + (record.caption or b"") for record in records]
    (folder / "metadata.csv").write_bytes(b"\n".join([b"file_name,text", *rows]))
    return f"folder:{folder}"


def metadata_json(folder, records):
    write_files(folder, records)
    (folder / "metadata.json").write_bytes(b"[" + b",".join(json_row(r, "image", "text") for r in records) + b"]")
    return f"folder:{folder}"


def pairs(folder, records):
    write_files(folder, records)
    for record in records:
        if record.caption is not None:
            (folder / record.name).with_suffix(".txt").write_bytes(record.caption)
    return f"folder:{folder}"


def jsonl(folder, records):
    write_files(folder, records)
    file = folder.parent / "list.jsonl"
    rows = [r._replace(name=f"{folder.name}/{r.name}") for r in records]
    file.write_bytes(b"\n".join(json_row(row, "image", "caption") for row in rows))
    return f"jsonl:{file}"


def csv(folder, records):
    write_files(folder, records)
    file = folder.parent / "list.csv"
    rows = [f"{folder}/{record.name},".encode() + (record.caption or b"") for record in records]
    file.write_bytes(b"\n".join([b"path,prompt", *rows]))
    return f"csv:{file}"


def strings(values):
    """A column of text that may hold bytes that are none."""
    array = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(array), array.buffers())


def parquet_of(folder, images, records):
    table = pyarrow.table({"image": images, "text": strings([record.caption for record in records])})
    pq.write_table(table, folder / "train.parquet", row_group_size=3)
    return folder / "train.parquet"


def parquet_names(folder, records):
    write_files(folder, records)
    return f"parquet:{parquet_of(folder, [record.name for record in records], records)}"


def parquet_bytes(folder, records):
    folder.mkdir()
    return f"parquet:{parquet_of(folder, [record.picture for record in records], records)}"


def structs(records):
    return [{"bytes": record.picture, "path": record.name} for record in records]


def parquet_structs(folder, records):
    folder.mkdir()
    return f"parquet:{parquet_of(folder, structs(records), records)}"


def coco(folder, records):
    write_files(folder, records)
    images = [json.dumps({"id": i, "file_name": record.name}).encode() for i, record in enumerate(records)]
    captions = [
        b'{"id": %d, "image_id": %d, "caption": "%s"}' % (i, i, record.caption)
        for i, record in enumerate(records)
        if record.caption is not None
    ]
    file = folder / "captions_it.json"
    file.write_bytes(b'{"images": [%s], "annotations": [%s]}' % (b",".join(images), b",".join(captions)))
    return f"coco:{file}"


def wds(folder, records):
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for record in records:
            stem = record.name.partition(".")[0]
            for name, content in ((record.name, record.picture), (f"{stem}.txt", record.caption)):
                if content is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"wds:{folder}"


def hf(folder, records):
    pytest.importorskip("datasets")
    folder.mkdir()
    parquet_of(folder, structs(records), records)
    return f"hf:{folder}"


def tfds(folder, records):
    """As TFDS lays it: the records of the golden data set in exchange for ours."""
    writer = pytest.importorskip("array_record.python.array_record_module")
    protos = pytest.importorskip("tensorflow_datasets.proto.tf_example_generated_pb2")
    shutil.copytree(GOLDEN / "tfds" / "golden_shapes", folder / "golden_shapes")
    version = folder / "golden_shapes" / "1.0.0"
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(len(records))]
    (version / "dataset_info.json").write_text(json.dumps(info))
    file = writer.ArrayRecordWriter(str(version / "golden_shapes-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        example = protos.Example()
        example.features.feature["image"].bytes_list.value.append(record.picture)
        example.features.feature["caption"].bytes_list.value.append(record.caption or b"")
        example.features.feature["label"].int64_list.value.append(0)
        file.write(example.SerializeToString())
    file.close()
    return f"tfds:golden_shapes?data_dir={folder}"


KINDS = [
    metadata_jsonl,
    metadata_csv,
    metadata_json,
    pairs,
    jsonl,
    csv,
    parquet_names,
    parquet_bytes,
    parquet_structs,
    coco,
    wds,
    hf,
    tfds,
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def opened(request, tmp_path, monkeypatch):
    """Writes records into a kind of source and opens it, as often as it is called."""
    if request.param is hf:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    written = {}

    def open_it(records):
        if not written:
            written["word"] = request.param(tmp_path / "pictures", records)
        return open_source(written["word"], lambda: None, 0.0, "all")

    return open_it


# --- pictures -----------------------------------------------------------------------------------------------


def encoded(image, form, **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


RED = Image.new("RGB", (8, 6), "red")
GOOD = encoded(RED, "PNG")


def bad_ones():
    """Records that cannot be used, by what is said of them."""
    noise = encoded(Image.effect_noise((24, 24), 64), "PNG")
    return {
        "cannot be decoded": Given("truncated.png", noise[: len(noise) // 2], b"fine"),
        "too small: 1x1": Given("dot.png", encoded(Image.new("RGB", (1, 1)), "PNG"), b"fine"),
        "too many pixels": Given("bomb.png", encoded(Image.new("RGB", (40, 40)), "PNG"), b"fine"),
        "empty file": Given("zero.png", b"", b"fine"),
        "not a picture": Given("html.png", b"<html>404</html>", b"fine"),
        "no caption": Given("silent.png", GOOD, None),
        "caption is not valid UTF-8": Given("latin.png", GOOD, b"caf\xe9"),
    }


def test_what_is_wrong_with_a_record_is_found_and_told_the_same_way_on_every_run(opened, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    reasons, given = zip(*bad_ones().items(), strict=True)
    records = [Given(f"{i:02}-{one.name}", one.picture, one.caption) for i, one in enumerate(given)]
    records.append(Given("99-good.png", GOOD, b"a red picture"))
    told = []
    for source in (opened(records), opened(records)):
        assert len(source) == len(records) == len(list(source.ids()))
        assert source[len(given)].captions == ("a red picture",) and source.size(len(given)) == (6, 8)
        for i, reason in enumerate(reasons):
            with pytest.raises(BadRecord) as error:
                source[i]
            assert error.value.reason.startswith(reason) and "\n" not in error.value.reason
            assert error.value.id == list(source.ids())[i]
            told.append(str(error.value))
            if reason != "cannot be decoded":  # the head of a truncated picture says its size
                with pytest.raises(BadRecord, match=reason):
                    source.size(i)
    assert told[: len(given)] == told[len(given) :]


def test_unusual_pictures_are_converted(opened):
    transparent = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    cmyk = Image.new("CMYK", (8, 6), (0, 255, 255, 0))
    deep = Image.fromarray(np.full((6, 8), 0x80FF, np.uint16))
    moving = encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    pictures = {
        "0-rgba.png": (encoded(transparent, "PNG"), (255, 255, 255)),
        "1-cmyk.tif": (encoded(cmyk, "TIFF"), (255, 0, 0)),
        "2-deep.png": (encoded(deep, "PNG"), (128, 128, 128)),
        "3-moving.gif": (moving, (255, 0, 0)),
    }
    source = opened([Given(name, picture, b"fine") for name, (picture, _) in pictures.items()])
    assert [tuple(source[i].image[3, 3].tolist()) for i in range(4)] == [colour for _, colour in pictures.values()]
    assert all(source[i].image.shape == (6, 8, 3) and source.size(i) == (6, 8) for i in range(4))
