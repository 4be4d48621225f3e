"""What says that it is large, or is, costs neither memory nor time: see ``little_memory`` in conftest.py."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_jax import files
from dit_jax.config import load_config
from dit_jax.data.cache.files import open_cache, read_manifest, verify
from dit_jax.data.cache.tensor_files import open_tensors
from dit_jax.data.sources import manifests, rows
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.manifests import open_coco, open_manifest
from dit_jax.data.sources.records import BadRecord
from dit_jax.data.sources.wds import open_wds
from dit_jax.data.transforms import PictureError, decode
from dit_jax.encoders import networks, weights
from dit_jax.encoders.tokenizer import Tokenizer
from dit_jax.errors import ConfigError, DataError
from dit_jax.models.dit import DiT
from dit_jax.training import manifest
from tests.data.cache.test_cache import encoded
from tests.tiny_run import CONFIG

DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def quick(soon):
    with soon():
        yield


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**27])
def test_headers_that_say_they_are_long(length, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        weights.read_tensors([file])
    with pytest.raises(DataError, match=f"its header would take {length:,} bytes of 10"):
        open_tensors(file, {})


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**40], [0, 2**42]),
        ([2**62, 2**62, 0], [0, 0]),
        ([2**70, 0], [0, 0]),
        ([9] * 10_000, [0, 4]),
        ([10**4000] * 900, [0, 4]),
    ],
)
def test_shapes_whose_product_is_too_large(shape, offsets, tmp_path):
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}, "__metadata__": {"notes": "0"}}
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        weights.read_tensors([file])
    with pytest.raises(DataError, match="is damaged"):
        open_tensors(file, {"a": (np.dtype(np.float32), (None,))})


def deep_readers(folder):
    """Everything that reads JSON which may come from elsewhere, each with its file."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    yield "config.json", lambda: load_config(str(folder / "config.json"), {})
    yield "config.json", lambda: networks.open_vae(folder, np.dtype("float32"))
    yield "model.safetensors.index.json", lambda: weights.weight_files(folder)
    yield "tokenizer.json", lambda: Tokenizer(folder, 16)
    yield "manifest.json", lambda: read_manifest(folder)
    yield "captions_x.json", lambda: open_coco(str(folder / "captions_x.json"), "")
    yield "x.jsonl", lambda: open_manifest("jsonl", str(folder / "x.jsonl"), "", "")


def test_json_that_is_deep(tmp_path):
    whole = json.dumps({"a": 1})
    for text in (
        DEEP,
        "[" * 500 + "]" * 500,
        '{"a":' * 500 + "1" + "}" * 500,
        whole[:-1] + ',"b":' + "[" * 500 + "]" * 500 + "}",
    ):
        for name, read in deep_readers(tmp_path):
            (tmp_path / name).write_text(text)
            with pytest.raises((ConfigError, DataError, ValueError)) as error:
                read()
            assert not isinstance(error.value, RecursionError) and "\n" not in str(error.value), name
            (tmp_path / name).unlink()


def test_files_that_are_larger_than_what_they_should_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1000)
    monkeypatch.setattr(files.read_bounded, "__defaults__", (1000,))
    for name, read in deep_readers(tmp_path):
        if name not in ("captions_x.json", "x.jsonl"):
            (tmp_path / name).write_text(json.dumps({"a": "x" * 2000}))
            with pytest.raises((ConfigError, DataError, ValueError)) as error:
                read()
            assert "more than 1,000 bytes" in str(error.value) or "holds no JSON" in str(error.value), name
    (tmp_path / manifest.NAME).write_bytes(b"x" * 2000)
    assert "more than 1,000 bytes" in manifest.verify(tmp_path, "full", ("params",)).problems[0]


def test_a_manifest_that_leads_out_of_its_folder(tmp_path):
    (tmp_path / "secret").write_text("secret")
    entries = [manifest.Entry("params/../../secret", 6, "0" * 64)]
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / manifest.NAME).write_bytes(manifest._text(entries))
    (problem,) = manifest.verify(tmp_path / "step", "full", ("params",)).problems
    assert "names 'params/../../secret', which is not in its folder" in problem


# --- data ---------------------------------------------------------------------------------------------------


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "PNG")
    return file.getvalue()


def problems(source):
    """What is wrong with each record, empty where nothing is."""
    for i in range(len(source)):
        try:
            source[i]
            yield ""
        except BadRecord as error:
            yield error.reason


def test_lines_and_texts_without_end(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())
    good = json.dumps({"file_name": "a.png", "text": "a picture"})
    (tmp_path / "list.jsonl").write_text(
        f'{{"text": "{"x" * 3000}\n{good}\n{json.dumps({"file_name": "a.png", "text": "y" * 70_000})}'
    )
    monkeypatch.setattr(files.bounded_lines, "__defaults__", (2000,))
    said = list(problems(open_manifest("jsonl", str(tmp_path / "list.jsonl"), "", "")))
    assert said == ["a line of more than 16,777,216 bytes", "", "a line of more than 16,777,216 bytes"]
    monkeypatch.undo()
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "a.txt").write_text("fine")
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(2**33)  # of zeros, that take no room
    assert list(problems(Folder(tmp_path))) == ["", rows.TOO_LONG]


def test_tables_without_end(tmp_path, monkeypatch):
    table = tmp_path / "list.csv"
    table.write_text('file_name,text\na.png,"' + "x" * 200_000)
    with pytest.raises(DataError, match="field larger than field limit .*never closed"):
        open_manifest("csv", str(table), "", "")
    monkeypatch.setattr(manifests, "LONGEST_LINE", 1000)
    table.write_text("file_name,text\n" + "x," * 2000)
    with pytest.raises(DataError, match="a line of more than 1,000 characters"):
        open_manifest("csv", str(table), "", "")


def tar(*members):
    """Headers as they are given, with the right sum, each with its content."""
    blocks = b""
    for name, kind, size, content in members:
        header = bytearray(tarfile.TarInfo(name).tobuf())
        header[156:157], header[124:136], header[148:156] = kind, size.ljust(12, b"\0"), b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks += bytes(header) + content + bytes(-len(content) % 512)
    return blocks + bytes(1024)


PICTURE = ("a.png", b"0", b"%011o" % len(picture()), picture()), ("a.txt", b"0", b"00000000004", b"fine")
TARS = {
    "a size below zero": [*PICTURE, ("b.png", b"0", b"\xff" * 10 + b"\xfe\0", b"")],
    "a size of 2**64": [*PICTURE, ("b.png", b"0", b"\x80" + b"\xff" * 11, b"")],
    "a header of eight gigabytes": [*PICTURE, ("x", b"x", b"77777777777", b"")],
    "a header before a header, a thousand times": [*PICTURE, *[("x", b"x", b"00000000014", b"12 a=aaaaaa\n")] * 3000],
    "a sparse file": [*PICTURE, ("b.png", b"S", b"00000000000", b"")],
}  # fmt: skip


@pytest.mark.parametrize("what", TARS)
def test_tars_whose_headers_lie(what, tmp_path):
    (tmp_path / "0.tar").write_bytes(tar(*TARS[what]))
    source = open_wds(str(tmp_path))
    first, *others = problems(source)
    assert not first and all(others) and len(others) <= 1


def test_members_that_are_links_or_lie_elsewhere_are_not_followed(tmp_path):
    """They are not unpacked at all; a name is only a name."""
    (tmp_path / "secret.png").write_bytes(picture())
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as file:
        file.addfile(link)
        for name, content in (("b.txt", b"fine"), ("../../c.png", picture()), ("../../c.txt", b"fine")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    source = open_wds(str(tmp_path / "tars"))
    assert list(problems(source)) == ["a link or sparse file in the tar, which is not followed", ""]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "secret.png", "tars"]


def test_pictures_with_too_many_pixels_are_errors():
    for size in ((10_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        small = io.BytesIO()
        Image.new("1", (8, 8)).save(small, "PNG")
        content = bytearray(small.getvalue())
        content[16:24] = struct.pack(">II", *size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        with pytest.raises(PictureError, match="too many pixels"):
            decode(bytes(content))


def test_a_picture_file_of_gigabytes_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    with (tmp_path / "a.png").open("wb") as file:
        file.write(picture())
        file.truncate(2**40)
    assert list(problems(Folder(tmp_path))) == ["a file of more than 536,870,912 bytes"]


# --- caches and models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("records_per_shard", 10**15),
        ("captions_per_shard", 10**30),
        ("data.captions", 10**15),
        ("data.records", [10**15, 0, 0]),
    ],
)
def test_caches_that_say_they_are_large(field, value, tmp_path):
    made = encoded(n=12)
    made.on_disk(tmp_path)
    path = tmp_path / "manifest.json"
    found = json.loads(path.read_text())
    section, _, name = field.rpartition(".")
    (found[section] if section else found)[name] = value
    path.write_text(json.dumps(found))
    for begun in (False, True):
        if begun:
            path.rename(tmp_path / "begun.json")
        for look in (open_cache, read_manifest, lambda folder: verify(folder, lambda done, total: None)):
            try:
                look(tmp_path)
            except DataError as error:
                assert "\n" not in str(error)


def test_networks_that_say_they_are_large():
    text = {"num_hidden_layers": 10**9}
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000; no network is that large"):
        networks.text_network(text, project=False, skip_layers=0, final_norm=True, dtype=np.float32)
    for vae in ({"layers_per_block": 10**9}, {"block_out_channels": [32] * 40}):
        with pytest.raises(ValueError, match="no network is that large"):
            networks.vae_network(vae, dtype=np.float32)
    config = dict(load_config(str(CONFIG), {}).model) | {"text_length": 1, "text_width": 1, "pooled_width": 1}
    for key in ("num_layers", "hidden_size"):
        with pytest.raises(ValueError, match=f"model.{key} is {10**9}; it must be .* or less"):
            DiT(**config | {key: 10**9})
