"""Whatever lies where data are read from: each record is usable or has its reason, or one line says why none is."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_jax.data import bad_records
from dit_jax.data.cache.files import open_cache
from dit_jax.data.cache.tensor_files import open_tensors, write_tensors
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.manifests import open_coco, open_manifest
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.wds import open_wds
from dit_jax.data.transforms import PictureError, decode, picture_size
from dit_jax.errors import DataError
from tests.data.cache.test_cache import encoded
from tests.hostile.mutations import JSON, changed, mutated

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of long examples

NAMES = ("a.png", "b.png", "sub/c.png")


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(png())
    return tmp_path


def look_at(open_it):
    """The law of this file, on a source."""
    try:
        source = open_it()
    except DataError as error:
        assert "\n" not in str(error)
        return
    ids, captions = list(source.ids()), list(source.captions())
    assert len(source) == len(ids) == len(captions) > 0
    assert source.fingerprint() == open_it().fingerprint()
    for i, id in enumerate(ids):
        try:
            record = source[i]
            assert record.id == id and record.captions == captions[i] and all(one.encode() for one in record.captions)
            assert record.image.dtype == np.uint8 and record.image.shape[2:] == (3,)
        except BadRecord as error:
            assert error.id == id and error.reason and "\n" not in error.reason


ROWS = [{"file_name": name, "text": [f"a picture {name}", "another"]} for name in NAMES]
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
CSV = b"file_name,text\n" + b"".join(b'%s,"a picture, ""red"""\n' % name.encode() for name in NAMES)
COCO = {
    "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
    "annotations": [{"id": 9 - i, "image_id": i % 3, "caption": f"a picture {i}"} for i in range(5)],
}


@given(content=mutated(JSONL) | st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
def test_lines_of_json(content, pictures, soon):
    (pictures / "list.jsonl").write_bytes(content)
    with soon():
        look_at(lambda: open_manifest("jsonl", str(pictures / "list.jsonl"), "", ""))


@given(content=mutated(CSV) | st.binary(max_size=200))
def test_tables(content, pictures, soon):
    (pictures / "list.csv").write_bytes(content)
    with soon():
        look_at(lambda: open_manifest("csv", str(pictures / "list.csv"), "", ""))


@given(content=mutated(json.dumps(COCO).encode()) | changed(COCO) | JSON.map(lambda value: json.dumps(value).encode()))
def test_captions_of_coco(content, pictures, soon):
    (pictures / "captions_it.json").write_bytes(content)
    with soon():
        look_at(lambda: open_coco(str(pictures / "captions_it.json"), ""))


@given(
    content=mutated(json.dumps(ROWS).encode()) | changed(ROWS),
    name=st.sampled_from(["metadata.json", "metadata.jsonl"]),
)
def test_metadata_of_a_folder(content, name, pictures, soon):
    (pictures / name).write_bytes(content)
    with soon():
        look_at(lambda: Folder(pictures))
    (pictures / name).unlink()


@given(content=mutated(b"a red picture\n") | st.binary(max_size=100))
def test_texts_beside_pictures(content, pictures, soon):
    (pictures / "a.txt").write_bytes(content)
    with soon():
        look_at(lambda: Folder(pictures))


def tar_of(form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i, name in enumerate((*NAMES, "d" * 90 + "/" + "d" * 40 + ".png")):
            for suffix, content in ((".png", png()), (".json", json.dumps({"caption": f"picture {i}"}).encode())):
                member = tarfile.TarInfo(name.removesuffix(".png") + suffix)
                member.size = len(content)
                member.pax_headers = {"GNU.sparse.size": "9"} if form == tarfile.PAX_FORMAT and i == 2 else {}
                tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
    return file.getvalue()


TARS = {form: tar_of(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)}


@st.composite
def tars(draw):
    """Tars with headers that say otherwise, and the sums of these headers right again."""
    content = bytearray(draw(mutated(TARS[draw(st.sampled_from(list(TARS)))])))
    for _ in range(draw(st.integers(0, 3))):
        block = 512 * draw(st.integers(0, max(len(content) // 512 - 1, 0)))
        header = content[block : block + 512]
        if len(header) < 512:
            break
        size = draw(
            st.sampled_from(
                [b"", b"77777777777", b"-0000000001", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 10 + b"\xfe\0"]
            )
        )
        header[124 : 124 + len(size)] = size
        header[156:157] = draw(st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"x", b"g", b"L", b"K", b"S", b"\xff"]))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[block : block + 512] = header
    return bytes(content)


@given(content=tars())
def test_tars(content, tmp_path, soon):
    (tmp_path / "0.tar").write_bytes(content)
    with soon():
        look_at(lambda: open_wds(str(tmp_path)))


def parquet_of(images):
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pyarrow.table({"image": images, "text": ["one", "two", "three"]}), file, row_group_size=2)
    return file.getvalue()


@given(data=st.data(), inside=st.booleans())
def test_parquet(data, inside, pictures, soon):
    content = data.draw(mutated(parquet_of([png()] * 3 if inside else list(NAMES))))
    (pictures / "list.parquet").write_bytes(content)
    with soon():
        try:
            look_at(lambda: open_manifest("parquet", str(pictures / "list.parquet"), "", ""))
        except DataError as error:  # found when a picture is read: the disk, for all that can be known
            assert "\n" not in str(error)


# --- pictures -----------------------------------------------------------------------------------------------


def files_of_pictures():
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    ways = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}), ("BMP", {}),
            ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"})]  # fmt: skip
    moving = {"save_all": True, "append_images": [noise.rotate(9)]}
    for form, how in [*ways, ("GIF", moving), ("WEBP", moving)]:
        file = io.BytesIO()
        noise.save(file, form, **how)
        yield file.getvalue()


PICTURES = list(files_of_pictures())


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=2 * settings.default.max_examples)
@given(content=st.sampled_from(PICTURES).flatmap(mutated))
def test_pictures(content, soon):
    size = image = None
    with soon():
        try:
            size = picture_size(content)
            image = decode(content)
        except PictureError as error:
            assert str(error)
    if image is not None:
        assert image.dtype == np.uint8 and image.shape == (*size, 3)


# --- what a run and a cache read again ----------------------------------------------------------------------

LISTED = "".join(json.dumps({"id": f"{i}.png", "reason": "bad", "replaced_by": None}) + "\n" for i in range(4)).encode()


@given(content=mutated(LISTED) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_list_of_bad_records(content, tmp_path):
    path = tmp_path / "bad_records.jsonl"
    path.write_bytes(content)
    list_ = bad_records.BadRecords(path, 1.0, 9)
    list_.add(0, bad_records.Replaced("new.png", "bad", None))
    assert json.loads(path.read_bytes().splitlines()[-1])["id"] == "new.png"


TENSORS = {"wide": np.arange(12.0, dtype=np.float32).reshape(3, 4), "bad": np.array([True, False, True])}
LAYOUT = {"wide": (np.dtype(np.float32), (None, 4)), "bad": (np.dtype(bool), (None,))}


def tensor_file():
    file = io.BytesIO()
    write_tensors(file, TENSORS, {"of": "a cache"})
    return file.getvalue()


ENTRIES = {
    "__metadata__": {"notes": "{}"},
    "wide": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "bad": {"dtype": "BOOL", "shape": [3], "data_offsets": [48, 51]},
}


@given(content=mutated(tensor_file()) | changed(ENTRIES).map(lambda h: len(h).to_bytes(8, "little") + h + bytes(51)))
def test_tensors(content, tmp_path, soon):
    (tmp_path / "x").write_bytes(content)
    with soon():
        try:
            found = open_tensors(tmp_path / "x", LAYOUT)
        except DataError as error:
            assert "\n" not in str(error)
            return
    assert found.tensors["wide"].shape[1] == 4 and found.tensors["bad"].view(np.uint8).max(initial=0) <= 1
    assert sum(array.nbytes for array in found.tensors.values()) <= 2 * len(content)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    encoded(n=12).on_disk(folder)
    return folder


@given(data=st.data())
def test_caches(data, cache, soon):
    path = data.draw(st.sampled_from(sorted(path for path in cache.iterdir() if path.name != "bad_records.jsonl")))
    whole = path.read_bytes()
    how = mutated(whole)
    if path.suffix == ".json":
        how |= changed(json.loads(whole))
    path.write_bytes(data.draw(how))
    try:
        with soon():
            found = open_cache(cache)
            list(found.ids()), list(found.captions())
            for bucket in np.unique(found.bucket[~found.bad]):  # a record that is not bad has a caption
                good = np.flatnonzero(~found.bad & (found.bucket == bucket))
                found.gather(good, np.arange(len(good), dtype=np.uint64), np.zeros(len(good), bool))
    except DataError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)
