"""An inspection of a cache tells what its manifest says, and finds what is damaged."""

import json

import ml_dtypes
import numpy as np
import pytest

from dit_jax.data.cache.files import BAD_RECORDS, MANIFEST, begin, finish, write
from dit_jax.data.cache.parts import Pictures, Texts, tabulate, units
from dit_jax.data.inspection.caches import inspect_cache
from dit_jax.errors import DataError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Named:
    """A source of which only names and captions are read: six records, five different captions."""

    def __len__(self):
        return 6

    def ids(self):
        return [f"{i}.png" for i in range(6)]

    def captions(self):
        return [("red",), ("blue", "red"), ("green",), ("a",), ("b",), ("red",)]


@pytest.fixture
def cache(tmp_path):
    """Records 1 and 4 are bad. Records lie in two buckets of three; captions have 2, 3, 4, 5 and 6 tokens."""
    folder = tmp_path / "cache"
    table = tabulate(Named(), np.array([0, 1, 0, 1, 0, 1]))
    identity = {
        "format": 1,
        "data": {"name": "folder:pictures", "fingerprint": "f" * 64, **table.counts(2)},
        "image_size": 16,
        "crop": "center",
        "mirrored": True,
        "buckets": [[16, 16], [8, 32]],
        "vae": {
            "name": "a/vae", "sha256": "0123456789ab" + "0" * 52, "shift": 0, "scale": 1, "factor": 8, "channels": 2,
        },
        "text_encoder": {
            "name": "a/clip", "sha256": "ba9876543210" + "0" * 52, "length": 77, "width": 4, "pooled_width": 3,
        },
        "storage_dtype": "float16",
        "records_per_shard": 2,
        "captions_per_shard": 3,
    }  # fmt: skip
    begin(folder, identity, table)
    for unit in units(identity):
        if unit.kind == "pictures":
            shard = Pictures.zeros(identity, unit)
            for row, record in enumerate(unit.records(table).tolist()):
                if record in (1, 4):
                    shard.bad[row] = True
                    shard.problems[row] = f"too small: 1x{record} pixels"
                else:
                    shard.mean[row], shard.std[row] = (2, -1), (0, 1)
        else:
            offsets = np.cumsum([0, *range(unit.first + 2, unit.last + 2)])
            hidden, pooled = np.ones((offsets[-1], 4), BFLOAT16), np.ones((len(unit), 3), BFLOAT16)
            shard = Texts(hidden, offsets, pooled)
        write(folder, identity, unit, shard)
    finish(folder, identity, lambda done, total: None)
    return folder


def test_a_cache_is_told_by_what_it_was_made_from_and_what_is_in_it(cache):
    report = inspect_cache(cache, 0.5, print)
    assert report.records == 6 and not report.damaged and len(report.sizes) == 7
    assert report.sizes == {file.name: file.stat().st_size for file in cache.glob("*.safetensors")}
    text = "\n".join(report.lines())
    for told in (
        "6 records of folder:pictures",
        "16 x 16, 32 x 8; center crop, with mirror images, float16",
        "5 distinct, 4.0 tokens on average, longest 6",
        "a/vae (sha256 0123456789ab..), 2 channels at 1/8 of the size",
        "a/clip (sha256 ba9876543210..), 77 x 4, pooled 3",
        f"in 7 files (pictures {report.bytes_of('pictures') / 2**20:.1f}",
        f"{sum(report.sizes.values()) / 6:,.0f} bytes a record",
        "mean +2.000 -1.000, by channel",
        "std  +0.000 +1.000",
        "files: all 7 have the sha256 that manifest.json says",
        "bad records: 2 of 6 records (33.3%); training replaces them (data.max_bad_fraction=0.5)",
        "2   too small: 1.png, 4.png\n             the first: too small: 1x1 pixels",
    ):
        assert told in text, told
    assert [line.split()[-1] for line in report.lines() if line.startswith(("    16 x 16 ", "    32 x 8 "))] == [
        "3",
        "3",
    ]
    assert max(map(len, report.lines())) <= 120 and len(report.lines()) < 30


def test_bad_records_that_training_does_not_bear_are_told_as_such(cache):
    text = "\n".join(inspect_cache(cache, 0.25, print).lines())
    assert "2 of 6 records (33.3%); training would stop (data.max_bad_fraction=0.25)" in text


def test_how_much_smaller_its_texts_are(cache):
    report = inspect_cache(cache, 0.5, print)
    texts = sum(file.stat().st_size for file in cache.glob("texts-*"))
    assert report.times_smaller == pytest.approx(6 * 77 * 4 * 4 / texts)


def test_files_that_changed_or_are_gone_are_named(cache):
    flipped = cache / "pictures-00001-of-00004.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    (cache / "texts-00000-of-00002.safetensors").unlink()
    report = inspect_cache(cache, 0.5, print)
    assert report.damaged == (flipped.name, "texts-00000-of-00002.safetensors")
    text = "\n".join(report.lines())
    assert f"files: 2 of 7 files (28.6%) are damaged or absent: {flipped.name}, texts-0" in text
    assert "dit_jax.precompute" in text


def test_what_is_no_finished_cache_is_refused(cache, tmp_path):
    for folder, told in ((tmp_path, "holds no cache"), (tmp_path / "none", "there is no cache")):
        with pytest.raises(DataError, match=told):
            inspect_cache(folder, 0.5, print)
    (cache / BAD_RECORDS).write_text('{"id": "1.png", "rea')
    with pytest.raises(DataError, match="bad_records.jsonl is absent or damaged"):
        inspect_cache(cache, 0.5, print)


@pytest.mark.parametrize("field", ["bad_records", "tokens", "latents"])
def test_a_manifest_that_lacks_something_is_refused_by_its_name(cache, field):
    manifest = json.loads((cache / MANIFEST).read_text())
    del manifest[field]
    (cache / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest.json is damaged: {field}"):
        inspect_cache(cache, 0.5, print)
