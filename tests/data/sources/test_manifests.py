"""Lists of pictures as people have them: JSON lines, CSV, Parquet with and without pictures inside, COCO."""

import io
import json
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources import parquet
from dit_jax.data.sources.manifests import open_coco, open_manifest
from dit_jax.data.sources.records import BadRecord
from dit_jax.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLOURS = ("red", "blue", "green", "yellow", "purple")


def png(colour, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder ``pictures`` with one of each colour, ``red.png`` and so on; lists lie in ``lists`` beside it."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "lists").mkdir()
    for colour in COLOURS:
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def names(folder):
    """One relative name that leaves the folder of the list, the rest absolute."""
    return ["../pictures/red.png", *(str(folder / "pictures" / f"{colour}.png") for colour in COLOURS[1:])]


def write_jsonl(folder, image, caption):
    rows = [json.dumps({"id": 7, image: n, caption: f"a {c}"}) for n, c in zip(names(folder), COLOURS, strict=True)]
    (folder / "lists" / "it.jsonl").write_text("\n".join(rows))
    return "jsonl", folder / "lists" / "it.jsonl"


def write_csv(folder, image, caption):
    rows = [f'7,{n},"a {c}"' for n, c in zip(names(folder), COLOURS, strict=True)]
    (folder / "lists" / "it.csv").write_text("\n".join([f"id,{image},{caption}", *rows]))
    return "csv", folder / "lists" / "it.csv"


def write_tsv(folder, image, caption):
    rows = [f"7\t{n}\ta {c}" for n, c in zip(names(folder), COLOURS, strict=True)]
    (folder / "lists" / "it.tsv").write_text("\n".join([f"id\t{image}\t{caption}", *rows]))
    return "csv", folder / "lists" / "it.tsv"


def write_parquet(folder, image, caption):
    table = {"id": [7] * 5, image: names(folder), caption: [f"a {c}" for c in COLOURS]}
    pq.write_table(pyarrow.table(table), folder / "lists" / "it.parquet", row_group_size=2)
    return "parquet", folder / "lists" / "it.parquet"


def write_bytes(folder, image, caption):
    table = {"id": [7] * 5, image: [png(c) for c in COLOURS], caption: [f"a {c}" for c in COLOURS]}
    pq.write_table(pyarrow.table(table), folder / "lists" / "it.parquet", row_group_size=2)
    return "parquet", folder / "lists" / "it.parquet"


def write_structs(folder, image, caption):
    """As Hugging Face exports a column of pictures."""
    structs = [{"bytes": png(c), "path": f"{c}.png"} for c in COLOURS]
    table = {"id": [7] * 5, image: structs, caption: [f"a {c}" for c in COLOURS]}
    pq.write_table(pyarrow.table(table), folder / "lists" / "it.parquet", row_group_size=2)
    return "parquet", folder / "lists" / "it.parquet"


WRITERS = [write_jsonl, write_csv, write_tsv, write_parquet, write_bytes, write_structs]
each_writer = pytest.mark.parametrize("write", WRITERS)


def colours_of(source):
    """The colour of every picture, by name."""
    exact = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)): colour for colour in COLOURS}
    return [exact[tuple(source[i].image[3, 3].tolist())] for i in range(len(source))]


@each_writer
@pytest.mark.parametrize(("image", "caption"), [("file_name", "text"), ("path", "caption"), ("image", "prompt")])
def test_usual_columns_are_found(pictures, write, image, caption):
    kind, file = write(pictures, image, caption)
    source = open_manifest(kind, str(file), "", "")
    assert colours_of(source) == list(COLOURS)
    assert list(source.captions()) == [(f"a {colour}",) for colour in COLOURS]
    assert [source[i].captions for i in range(5)] == list(source.captions())
    assert [source[i].id for i in range(5)] == list(source.ids()) and len(set(source.ids())) == 5
    assert source.size(0) == (6, 8)


@each_writer
def test_columns_can_be_named(pictures, write):
    kind, file = write(pictures, "pic", "alt")
    with pytest.raises(DataError, match="pic, alt.*needs a picture|no file name among id, pic, alt; every row needs"):
        open_manifest(kind, str(file), "", "")
    source = open_manifest(kind, str(file), "pic", "alt")
    assert colours_of(source) == list(COLOURS) and list(source.captions())[0] == ("a red",)
    with pytest.raises(DataError, match=r"a caption \(words\)"):
        open_manifest(kind, str(file), "pic", "words")


@each_writer
def test_the_fingerprint_follows_pictures_and_captions(pictures, write):
    kind, file = write(pictures, "image", "text")
    seen = [open_manifest(kind, str(file), "", "").fingerprint() for _ in range(2)]
    assert seen[0] == seen[1]
    content = png("red", (80, 60))
    (pictures / "pictures" / "red.png").write_bytes(content)
    if write in (write_bytes, write_structs):
        table = pq.read_table(file).to_pylist()
        table[0]["image"] = content if write is write_bytes else {"bytes": content, "path": "red.png"}
        pq.write_table(pyarrow.Table.from_pylist(table), file, row_group_size=2)
    assert open_manifest(kind, str(file), "", "").fingerprint() != seen[0]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_list_that_is_not_there(tmp_path, kind):
    with pytest.raises(DataError, match=rf"{kind}.*it\.list does not exist \(from .*set data\.source={kind}:"):
        open_manifest(kind, str(tmp_path / "it.list"), "", "")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_with_the_same_picture_are_one_record_with_several_captions(pictures, kind):
    rows = [("red", "a"), ("red", "b"), ("red", ""), ("blue", ""), ("blue", ""), ("green", "c"), ("red", "d")]
    table = [{"image": f"pictures/{colour}.png", "caption": caption} for colour, caption in rows]
    if kind == "jsonl":
        (pictures / "list").write_text("\n".join(map(json.dumps, table)))
    elif kind == "csv":
        (pictures / "list").write_text("\n".join(["image,caption", *(",".join(row.values()) for row in table)]))
    else:
        pq.write_table(pyarrow.Table.from_pylist(table), pictures / "list")
    source = open_manifest(kind, str(pictures / "list"), "", "")
    assert list(source.captions()) == [("a", "b"), (), ("c",), ("d",)]
    assert source[0].captions == ("a", "b")
    with pytest.raises(BadRecord, match=r"blue\.png: no caption"):
        source[1]


def test_a_file_of_another_kind_is_told_in_printable_words(pictures):
    _, file = write_bytes(pictures, "image", "text")
    with pytest.raises(DataError, match="none of its .* say which with") as error:
        open_manifest("csv", str(file), "", "")
    assert str(error.value).isprintable()
    with pytest.raises(DataError, match=r"cannot read .*red\.png"):
        open_manifest("parquet", str(pictures / "pictures" / "red.png"), "", "")
    with pytest.raises(DataError, match="lists is not a file"):
        open_manifest("jsonl", str(pictures / "lists"), "", "")


def test_columns_that_semicolons_part_are_told(tmp_path):
    (tmp_path / "it.csv").write_text("file_name;text\na.png;a red circle\n")
    with pytest.raises(DataError, match="it.csv has one column, 'file_name;text': columns are parted by commas"):
        open_manifest("csv", str(tmp_path / "it.csv"), "", "")


def test_an_address_is_no_file(pictures):
    (pictures / "a.jsonl").write_text(
        '{"image": "https://example.org/a.png", "text": "a"}\n{"image": "pictures/red.png", "text": "a"}'
    )
    source = open_manifest("jsonl", str(pictures / "a.jsonl"), "", "")
    with pytest.raises(BadRecord, match="download the pictures first"):
        source[0]
    assert source[1].captions == ("a",)


# --- parquet ------------------------------------------------------------------------------------------------


def test_parquet_captions_can_be_lists_categories_or_missing(pictures):
    files = names(pictures)
    lists = pyarrow.table({"image": files[:4], "text": [["a", "b"], None, [], ["c"]]})
    pq.write_table(lists, pictures / "lists" / "a.parquet")
    source = open_manifest("parquet", str(pictures / "lists" / "a.parquet"), "", "")
    assert list(source.captions()) == [("a", "b"), (), (), ("c",)]
    words = pyarrow.array(["a", None, "a"]).dictionary_encode()
    pq.write_table(pyarrow.table({"image": files[:3], "text": words}), pictures / "lists" / "a.parquet")
    assert list(open_manifest("parquet", str(pictures / "lists" / "a.parquet"), "", "").captions()) == [
        ("a",),
        (),
        ("a",),
    ]


def test_a_folder_of_parquet_files_is_one_source_in_the_order_of_names(pictures):
    folder = pictures / "lists"
    for number in (1, 0):
        (folder / ".sub").mkdir(exist_ok=True)
        rows = [{"image": {"bytes": png(colour), "path": None}, "text": colour} for colour in COLOURS[number::2]]
        pq.write_table(pyarrow.Table.from_pylist(rows), folder / ".sub" / f"part-{number}.parquet", row_group_size=2)
    source = open_manifest("parquet", str(folder), "", "")
    assert colours_of(source) == list(COLOURS[0::2] + COLOURS[1::2]) == [c for (c,) in source.captions()]
    assert list(source.ids()) == [f".sub/part-0.parquet:{i}" for i in range(3)] + [
        f".sub/part-1.parquet:{i}" for i in range(2)
    ]
    assert colours_of(open_manifest("parquet", f"{folder}/.sub/part-1*", "", "")) == ["blue", "yellow"]


def test_names_in_a_folder_of_parquet_files_begin_at_each_file(pictures):
    (pictures / "more").mkdir()
    for folder, caption in (("lists", "a"), ("more", "b")):
        table = pyarrow.table({"image": ["../pictures/red.png"], "text": [caption]})
        pq.write_table(table, pictures / folder / "a.parquet")
    source = open_manifest("parquet", str(pictures), "", "")
    assert list(source.ids()) == ["pictures/red.png"] and source[0].captions == ("a", "b")


def test_parquet_files_that_do_not_fit_together_are_named(pictures):
    folder = pictures / "lists"
    pq.write_table(pyarrow.table({"image": [png("red")], "text": ["a"]}), folder / "a.parquet")
    pq.write_table(pyarrow.table({"image": ["red.png"], "text": ["a"]}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet is not like the other files: .* image of type binary"):
        open_manifest("parquet", str(folder), "", "")


def test_a_column_that_holds_no_pictures(pictures):
    pq.write_table(pyarrow.table({"image": [3], "text": ["a"]}), pictures / "a.parquet")
    with pytest.raises(DataError, match="column image holds int64: neither"):
        open_manifest("parquet", str(pictures / "a.parquet"), "", "")


def test_a_damaged_parquet_file_is_named(pictures):
    _, file = write_bytes(pictures, "image", "text")
    source = open_manifest("parquet", str(file), "", "")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot read .*it\.parquet"):
        source[0]
    with pytest.raises(DataError, match=r"cannot read .*it\.parquet"):
        open_manifest("parquet", str(file), "", "")


@pytest.fixture
def counted(pictures, monkeypatch):
    """A source of twelve pictures in six row groups, and the groups that were read so far."""
    rows = [{"image": png("red", (8 + i, 6)), "text": f"{i}"} for i in range(12)]
    pq.write_table(pyarrow.Table.from_pylist(rows), pictures / "a.parquet", row_group_size=2)
    source, read = open_manifest("parquet", str(pictures / "a.parquet"), "", ""), []
    original = pq.ParquetFile.read_row_group

    def count(self, group, **how):
        read.append(group)
        return original(self, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    return source, read


def test_threads_that_are_less_than_a_group_apart_read_every_group_once(counted, monkeypatch):
    source, read = counted
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    step = threading.Barrier(2)

    def look(lead):
        widths = []
        for index in range(lead, 11 + lead):
            step.wait(10)
            widths.append(source[index].image.shape[1])
        return widths

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(look, (0, 1))) == [list(range(8, 19)), list(range(9, 20))]
    assert read == list(range(6))


def test_the_memory_of_row_groups_is_bounded(counted, monkeypatch):
    source, read = counted
    one_group = source._read_group(0).nbytes
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * one_group + 20)
    for index in (2, 4, 6, 2, 0):  # the fourth pushes out the one that was not used for longest: the first
        source[index]
    assert read == [0, 1, 2, 3, 0]


def test_pictures_inside_parquet_travel_to_another_process(counted):
    source, _ = counted
    assert np.array_equal(pickle.loads(pickle.dumps(source))[5].image, source[5].image)


def test_without_pyarrow_the_command_to_install_it_is_told(pictures, monkeypatch):
    _, file = write_parquet(pictures, "image", "text")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'dit_jax\[parquet\]'"):
        open_manifest("parquet", str(file), "", "")


# --- COCO ---------------------------------------------------------------------------------------------------


def write_coco(file):
    found = {
        "images": [{"id": i, "file_name": f"{colour}.png"} for i, colour in enumerate(COLOURS)],
        "annotations": [
            {"id": 9, "image_id": 0, "caption": "second\n"},
            {"id": 2, "image_id": 0, "caption": "First "},
            {"id": 3, "image_id": 2, "caption": "green"},
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))


LAYOUTS = ["train2017", "images/train2017", "annotations/train2017", "annotations/images", "images", "annotations"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pictures_of_coco_are_found_where_they_usually_are(pictures, layout):
    file = pictures / "coco" / "annotations" / "captions_train2017.json"
    write_coco(file)
    (pictures / "coco" / layout).mkdir(parents=True, exist_ok=True)
    for picture in (pictures / "pictures").iterdir():
        picture.rename(pictures / "coco" / layout / picture.name)
    source = open_coco(str(file), "")
    assert list(source.ids()) == [f"{colour}.png" for colour in COLOURS]
    assert list(source.captions()) == [("First", "second"), (), ("green",), (), ()]
    assert source[0].captions == ("First", "second") and tuple(source[0].image[0, 0]) == (255, 0, 0)
    with pytest.raises(BadRecord, match=r"blue\.png: no caption"):
        source[1]


def test_the_pictures_of_coco_can_be_told(pictures):
    file = pictures / "captions_train2017.json"
    write_coco(file)
    with pytest.raises(DataError, match=r"red\.png, are in none of .*train2017.*say \?images=FOLDER"):
        open_coco(str(file), "")
    assert open_coco(str(file), str(pictures / "pictures"))[2].captions == ("green",)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_coco(str(file), "nowhere")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"images": [], "annotations": []}', "none of its 0 records"),
        ('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1}]}', "captions_"),
        ("[]", "not COCO's"),
        ("{", "is not JSON"),
    ],
)
def test_another_json_is_no_coco(tmp_path, content, told):
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(DataError, match=told):
        open_coco(str(tmp_path / "it.json"), "")
