"""Tar shards as img2dataset writes them: their records, what is wrong with a tar, and the user's word for several."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.wds import _members, _plain_members, open_wds
from dit_jax.errors import DataError


def picture(colour, form="PNG", size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT, mtime=0):
    """A tar of names and contents; where the content is a str, a link to that name."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def sample(number, colour, caption=None, **row):
    """What img2dataset writes for one picture."""
    rows = json.dumps({"caption": caption, "key": f"{number:09}", "status": "success", **row}).encode()
    return [
        (f"{number:09}.jpg", picture(colour, "JPEG")),
        (f"{number:09}.json", rows),
        (f"{number:09}.txt", (caption or f"a {colour} square").encode()),
    ]


@pytest.fixture
def shards(tmp_path):
    """Two tars of three and two samples, as a download of img2dataset lies on a disk."""
    folder = tmp_path / "laion"
    folder.mkdir()
    write_tar(folder / "00000.tar", [*sample(0, "red"), *sample(1, "blue"), *sample(3, "green")])
    write_tar(folder / "00001.tar", [*sample(10000, "white"), *sample(10002, "black")])
    for name in ("00000.parquet", "00000_stats.json", "00001.parquet"):
        (folder / name).write_bytes(b"PAR1")
    return folder


IDS = [
    "00000.tar/000000000",
    "00000.tar/000000001",
    "00000.tar/000000003",
    "00001.tar/000010000",
    "00001.tar/000010002",
]
COLOURS = ["red", "blue", "green", "white", "black"]


@pytest.mark.parametrize(
    "place", ["{}", "{}/*.tar", "{}/{{00000..00001}}.tar", "{}/0000{{0,1}}.tar", "{}/0000{{0..1}}.*r"]
)
def test_a_folder_and_patterns_of_its_tars_are_the_same_records(shards, place):
    source = open_wds(place.format(shards))
    assert list(source.ids()) == IDS
    assert list(source.captions()) == [(f"a {colour} square",) for colour in COLOURS]
    for i, colour in enumerate(COLOURS):
        image, captions, id = source[i]
        assert (captions, id) == ((f"a {colour} square",), IDS[i])
        assert source.size(i) == image.shape[:2] == (6, 8)
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(picture(colour, "JPEG")))))
    assert source.fingerprint() == open_wds(str(shards)).fingerprint()


def test_one_tar_is_a_source(shards):
    assert list(open_wds(f"{shards}/00001.tar").ids()) == IDS[3:]


def test_tars_of_one_name_in_several_folders_keep_their_folder(shards):
    other = shards.parent / "coyo"
    other.mkdir()
    write_tar(other / "00000.tar", sample(0, "pink"))
    source = open_wds(f"{shards.parent}/*/00000.tar")
    assert list(source.ids()) == ["coyo/00000.tar/000000000", *(f"laion/{id}" for id in IDS[:3])]


def test_samples_without_a_picture_are_left_out(tmp_path):
    failed = [("000000001.json", b'{"status": "failed_to_download", "caption": "gone"}'), ("000000001.txt", b"gone")]
    write_tar(tmp_path / "a.tar", [*failed, *sample(2, "red"), (".hidden.png", picture("red")), ("README", b"read me")])
    assert list(open_wds(f"{tmp_path}/a.tar").ids()) == ["a.tar/000000002"]


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ([("txt", b" from\n txt "), ("json", b'{"caption": "from json"}')], ("from txt",)),
        ([("txt", "\ufeff一个圆".encode())], ("一个圆",)),
        ([("txt", b""), ("json", b'{"caption": "from json"}')], ("from json",)),
        ([("json", b'{"caption": ["one", "two"], "text": "other"}')], ("one", "two")),
        ([("json", b'{"caption": null, "text": "other"}')], ("other",)),
    ],
)
def test_the_caption_is_the_txt_or_else_what_the_json_says(tmp_path, members, captions):
    write_tar(tmp_path / "a.tar", [("x.png", picture("red")), *((f"x.{suffix}", text) for suffix, text in members)])
    assert list(open_wds(str(tmp_path)).captions()) == [captions]


def test_a_sample_is_what_has_one_key_in_any_order_and_depth(tmp_path):
    long = "d" * 90 + "/" + "n" * 90  # longer than a plain header holds
    members = [
        ("./a/1.txt", b"one"),
        ("./b/1.txt", b"two"),
        ("./b/1.PNG", picture("blue")),
        ("./a/1.png", picture("red")),
        ("./a/1.mask.png", picture("black")),  # another suffix: no picture of the sample
        (f"{long}.png", picture("green")),
        (f"{long}.txt", b"long"),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        source = open_wds(str(write_tar(tmp_path / "a.tar", members, form)))
        assert dict(zip(source.ids(), source.captions(), strict=True)) == {
            "a.tar/./a/1": ("one",),
            "a.tar/./b/1": ("two",),
            f"a.tar/{long}": ("long",),
        }
        assert [tuple(source[i].image[0, 0]) for i in range(3)] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]


def test_what_is_added_to_a_tar_under_the_same_name_replaces_it(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample(0, "red", "old"), *sample(0, "blue", "new")])
    source = open_wds(str(tmp_path))
    assert len(source) == 1 and source[0].captions == ("new",) and source[0].image[0, 0, 2] > 200


def test_links_and_bad_names_and_captions_are_bad_records(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture("red"))
    (tmp_path / "tars").mkdir()
    write_tar(
        tmp_path / "tars/a.tar",
        [
            *(("link.png", str(outside)), ("link.txt", b"fine")),
            *(("nocaption.png", picture("red")), ("nocaption.json", b"[1]")),
            *(("notjson.png", picture("red")), ("notjson.json", b"{")),
            *(("latin1.png", picture("red")), ("latin1.txt", b"caf\xe9")),
            *(("na\udcffme.png", picture("red")), ("na\udcffme.txt", b"fine")),
            *sample(7, "red"),
        ],
        tarfile.GNU_FORMAT,
    )
    source, reasons = open_wds(f"{tmp_path}/tars"), []
    for i in range(5):
        with pytest.raises(BadRecord) as error:
            source[i]
        reasons.append(error.value.reason)
    for reason, said in zip(reasons, ("link", "no caption", "not JSON", "caption is not valid", "name"), strict=True):
        assert said in reason


@pytest.mark.parametrize("behind", [0, 300, tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + 300])
def test_of_a_tar_cut_off_the_samples_before_the_cut_remain(shards, behind):
    """Between two members, where the format itself shows no fault, in a header, and in a picture."""
    tar, whole = shards / "00001.tar", open_wds(str(shards))
    with tarfile.open(tar) as opened:
        second = opened.getmember("000010002.jpg").offset
    tar.write_bytes(tar.read_bytes()[: second + behind])
    source = open_wds(str(shards))
    assert list(source.ids()) == [*IDS[:4], "00001.tar"]
    assert source[3].image.shape == (6, 8, 3)
    with pytest.raises(BadRecord, match=r"00001.tar: cut off or damaged at byte \d+"):
        source[4]
    assert source.fingerprint() != whole.fingerprint()


def test_an_empty_tar_is_one_that_was_cut_off(shards):
    (shards / "00001.tar").write_bytes(b"")
    assert list(open_wds(str(shards)).ids()) == [*IDS[:3], "00001.tar"]


def test_a_header_overwritten_in_the_middle_is_told(shards):
    tar = shards / "00000.tar"
    with tarfile.open(tar) as opened:
        second = opened.getmember("000000001.jpg").offset
    content = bytearray(tar.read_bytes())
    content[second : second + 512] = b"\xff" * 512
    tar.write_bytes(content)
    assert list(open_wds(str(shards)).ids()) == [IDS[0], "00000.tar", *IDS[3:]]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_plain_tars_are_read_without_the_library_and_alike(tmp_path, form):
    """webdataset gives the times in fractions of seconds, which takes a header more in the default format."""
    tar = write_tar(
        tmp_path / "a.tar", [*sample(0, "red"), *sample(1, "blue"), ("empty.txt", b"")], form, mtime=1.75e9 + 0.5
    )
    plain = _plain_members(tar)
    assert plain and (plain, None) == _members(tar)
    assert [name for name, _ in plain][-2:] == ["000000001.txt", "empty.txt"]
    content = tar.read_bytes()
    for damaged in (content[:3000], content.replace(b"000000001.jpg", b"000000002.jpg"), content.rstrip(b"\0")):
        tar.write_bytes(damaged)
        assert _plain_members(tar) is None
    for name in ("l" * 120, "ü" * 60):
        assert _plain_members(write_tar(tar, [(f"{name}.png", b"x")], tarfile.PAX_FORMAT)) is None
    assert _plain_members(write_tar(tar, [("link.png", "other.png")])) is None


def test_a_tar_that_shrinks_or_goes_away_later(shards):
    source = open_wds(str(shards))
    content = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(content[:600])
    with pytest.raises(BadRecord, match="cannot be decoded"):
        source[3]
    (shards / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*00001.tar"):
        source[3]


def test_a_source_travels_to_another_process(shards):
    source = open_wds(str(shards))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert all(np.array_equal(copy[i].image, source[i].image) for i in range(len(source)))


def test_the_fingerprint_follows_the_records_and_not_the_place(shards, tmp_path):
    first = open_wds(str(shards)).fingerprint()
    moved = shards.rename(tmp_path / "moved")
    assert open_wds(str(moved)).fingerprint() == first
    write_tar(moved / "00001.tar", [*sample(10000, "white", "another caption"), *sample(10002, "black")])
    other = open_wds(str(moved)).fingerprint()
    write_tar(moved / "00001.tar", [*sample(10000, "white"), ("000010002.jpg", picture("black") + b"\0")])
    assert len({first, other, open_wds(str(moved)).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{}/gone", "1 of the 1 tars .* do not exist"),
        ("{}/laion/{{00000..00004}}.tar", "3 of the 5 tars .* do not exist, first .*00002.tar"),
        ("{}/laion/9*.tar", "no file matches"),
        ("{}", "no tars in folder .*; set data.source=wds:.*laion"),
        ("{}/laion/00000.parquet", "is not a tar"),
    ],
)
def test_a_wrong_place_is_told_in_one_line(shards, place, said):
    with pytest.raises(DataError, match=said) as error:
        open_wds(place.format(shards.parent))
    assert "\n" not in str(error.value)


def test_a_compressed_tar_is_refused_with_what_unpacks_it(shards):
    for name in ("00000.tar.gz", "00001.tar"):
        (shards / name).write_bytes(gzip.compress((shards / "00000.tar").read_bytes()))
    with pytest.raises(DataError, match="00001.tar is compressed.*gunzip"):
        open_wds(str(shards))
    for tar in shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"00000.tar.gz is compressed.*gunzip"):
        open_wds(str(shards))


def test_tars_without_pictures_are_told(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.npy", b"x"), ("a.txt", b"x")])
    with pytest.raises(DataError, match=r"none of its 0 records .* needs a picture \(.jpg"):
        open_wds(str(tmp_path))
