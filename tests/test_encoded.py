"""What was encoded is kept: a run that is started again encodes what is missing, and trains on the same numbers."""

import errno
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax import build, encoded, feed
from dit_jax.data.bad_records import BadRecords
from dit_jax.data.cache import files
from dit_jax.data.cache.tensor_files import UnreadableError
from dit_jax.errors import DataError
from dit_jax.resolve import resolve
from tests.noise_pictures import SQUARE, TALL, draw_noise
from tests.tiny_run import tiny_config, train_tiny


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """28 records of the tiny run in 4 shards."""
    monkeypatch.setattr(encoded, "PER_SHARD", 7)


@functools.cache
def encoders():
    config = tiny_config()
    return build.make_vae(config), build.make_text_encoder(config)


class Encoded:
    """`encode_once` of a config's source, and what it said and encoded."""

    def __init__(self, folder, monkeypatch, stop_after=None, **changes):
        vae, text_encoder = encoders()
        config = tiny_config(**changes)
        source = build.make_source(config, "train")
        resolve(config, len(source), vae.shape, text_encoder.shape, 1)
        shapes = build.make_shapes(config, vae.factor)
        self.said, self.units, self.config = [], [], config
        say = self.said.append

        def counted(encoding, wanted, told):
            for unit, shard in encode_units(encoding, wanted, told):
                if len(self.units) == stop_after:
                    raise KeyboardInterrupt
                self.units.append(unit)
                yield unit, shard

        encode_units = encoded.encode_units
        self.bad = BadRecords(None, 1.0, len(source))
        bucket = feed.find_buckets(source, shapes, 0.0, say)
        with monkeypatch.context() as patch:
            patch.setattr(encoded, "encode_units", counted)
            how = source, bucket, shapes, False, vae, text_encoder, self.bad, say
            place = folder and encoded.Place(folder, source.fingerprint())
            self.cache = encoded.encode_once(config, place, *how)

    @property
    def first(self):
        n = min(4, len(self.cache))
        index = np.flatnonzero(self.cache.bucket == self.cache.bucket[0])[:n]
        return self.cache.gather(index, np.zeros(len(index), np.uint64), np.zeros(len(index), bool))

    def warnings(self):
        return [line for line in self.said if line.startswith("warning")]


def assert_same(one, other):
    for key, array in one.first.items():
        np.testing.assert_array_equal(array, other.first[key], err_msg=key)


def test_what_was_encoded_is_not_encoded_again(tmp_path, monkeypatch):
    alone = Encoded(None, monkeypatch)
    first = Encoded(tmp_path / "kept", monkeypatch)
    again = Encoded(tmp_path / "kept", monkeypatch)
    assert len(alone.units) == len(first.units) > 4 and not again.units and not again.warnings()
    assert any(line.startswith("encoded before:") for line in again.said)
    assert_same(alone, first)
    assert_same(alone, again)


def test_an_interruption_loses_the_shard_that_was_in_work(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Encoded(tmp_path / "kept", monkeypatch, stop_after=3)
    rest = Encoded(tmp_path / "kept", monkeypatch)
    whole = Encoded(tmp_path / "other", monkeypatch)
    assert rest.units == whole.units[3:]
    assert_same(rest, whole)
    for path in (tmp_path / "other").iterdir():
        assert (tmp_path / "kept" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_damaged_or_deleted_is_made_again(tmp_path, monkeypatch):
    whole = Encoded(tmp_path / "kept", monkeypatch)
    one, other = (tmp_path / "kept" / unit.name for unit in (whole.units[0], whole.units[-1]))
    one.unlink()
    other.write_bytes(other.read_bytes()[:-9])
    again = Encoded(tmp_path / "kept", monkeypatch)
    assert again.units == [whole.units[0], whole.units[-1]]
    assert_same(again, whole)


def spoil(path):
    """Damage a picture; returns what mends it. Neither changes its size."""
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    return lambda: path.write_bytes(whole)


def test_bad_records_are_counted_at_every_start_until_they_are_mended(tmp_path, monkeypatch):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 8 + [TALL] * 8)
    mend = spoil(sorted((tmp_path / "pictures").glob("*.png"))[5])
    changes = {"data__source": source, "data__buckets": "3", "batch_size": "4"}
    starts = [Encoded(tmp_path / "kept", monkeypatch, **changes) for _ in range(2)]
    assert [len(start.bad) for start in starts] == [1, 1] and not starts[1].units
    assert np.array_equal(*(start.cache.bad for start in starts)) and starts[0].cache.bad.sum() == 1
    mend()
    mended = Encoded(tmp_path / "kept", monkeypatch, **changes)
    assert not len(mended.bad) and not mended.cache.bad.any()
    assert [unit.kind for unit in mended.units] == ["pictures"]  # the one shard that it is in


def test_other_data_are_left_alone_and_it_is_said(tmp_path, monkeypatch):
    before = Encoded(tmp_path / "kept", monkeypatch)
    contents = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    after = Encoded(tmp_path / "kept", monkeypatch, data__num_pictures="21")
    (line,) = after.warnings()
    assert "is not kept" in line and "other data lie there" in line and "delete the folder" in line
    assert len(after.cache) == 21 < len(before.cache) and len(after.units) < len(before.units)
    assert contents == {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert not Encoded(tmp_path / "kept", monkeypatch).units


def test_a_shard_that_cannot_be_read_is_encoded_again(tmp_path, monkeypatch):
    whole = Encoded(tmp_path / "kept", monkeypatch)
    written, calls = files.written, []

    def fails_once(folder, identity, unit):
        calls.append(unit)
        if len(calls) == 1:
            raise UnreadableError("the share is gone")
        return written(folder, identity, unit)

    with monkeypatch.context() as patch:
        patch.setattr(files, "written", fails_once)
        start = Encoded(tmp_path / "kept", monkeypatch)
    assert start.units == whole.units[:1] == calls[:1] and len(start.warnings()) == 1
    assert_same(start, whole)


def test_other_buckets_of_as_many_pictures_are_other_data(tmp_path, monkeypatch):
    """As where the size of a picture could not be read for once."""
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 8 + [TALL] * 8)
    changes = {"data__source": source, "data__buckets": "3", "batch_size": "4"}
    Encoded(tmp_path / "kept", monkeypatch, **changes)
    find = feed.find_buckets
    with monkeypatch.context() as patch:
        patch.setattr(feed, "find_buckets", lambda *args: find(*args)[::-1])
        other = Encoded(tmp_path / "kept", monkeypatch, **changes)
    (line,) = other.warnings()
    assert "other data lie there" in line and len(other.units) > 2
    assert not Encoded(tmp_path / "kept", monkeypatch, **changes).units


@pytest.mark.parametrize("name", ["begin", "missing", "write"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), UnreadableError("the share is gone")])
def test_a_folder_that_fails_is_told_and_nothing_is_lost(tmp_path, monkeypatch, name, error):
    whole = Encoded(tmp_path / "other", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        Encoded(tmp_path / "kept", monkeypatch, stop_after=3)

    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, name, fails)
        start = Encoded(tmp_path / "kept", monkeypatch)
    (line,) = start.warnings()
    assert "Input/output error" in line or "the share is gone" in line
    assert_same(start, whole)
    assert Encoded(tmp_path / "kept", monkeypatch).units == whole.units[3:]


def test_a_disk_without_room_keeps_nothing_and_stops_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encoded.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
        start = Encoded(tmp_path / "kept", monkeypatch)
    (line,) = start.warnings()
    assert "is not kept in" in line and "are more than a tenth of the 0.00 that are free" in line
    assert not list((tmp_path / "kept").glob("pictures*"))

    with pytest.raises(KeyboardInterrupt):
        Encoded(tmp_path / "kept", monkeypatch, stop_after=2)
    with monkeypatch.context() as patch:
        patch.setattr(encoded.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
        rest = Encoded(tmp_path / "kept", monkeypatch)
    assert rest.units == start.units[2:] and len(rest.warnings()) == 1  # what is there already is read
    assert_same(start, rest)


def test_large_sets_have_larger_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "MOST_SHARDS", 2)
    start = Encoded(tmp_path / "kept", monkeypatch)
    assert [len(unit) for unit in start.units if unit.kind == "pictures"] == [14, 14]


def test_a_run_goes_on_without_encoding(tmp_path, monkeypatch, capsys):
    """Nor its validation, and with the numbers of one that was never stopped."""
    changes = {"data__validation_fraction": "0.2", "validate_every": "5", "log_every": "1", "total_steps": "10"}
    whole = train_tiny(tmp_path / "whole", **changes)
    run = train_tiny(tmp_path / "run", stop_at_step="5", **changes)

    def never(*args):
        raise AssertionError("it was encoded before")
        yield

    monkeypatch.setattr(encoded, "encode_units", never)
    capsys.readouterr()
    train_tiny(tmp_path / "run", **changes)
    assert capsys.readouterr().out.count("encoded before:") == 2
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for folder in (whole, run)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_too_many_bad_records_end_a_later_start_too(tmp_path, monkeypatch):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 6)
    for bad in sorted((tmp_path / "pictures").glob("*.png"))[:4]:
        bad.write_bytes(bad.read_bytes()[:200])
    config = tiny_config(data__source=source, batch_size="2", data__max_bad_fraction="0.1")
    source = build.make_source(config, "train")
    resolve(config, len(source), *(encoder.shape for encoder in encoders()), 1)
    vae, text_encoder = encoders()
    for _ in range(2):
        with pytest.raises(DataError, match="bad"):
            kept = encoded.Place(tmp_path / "kept", source.fingerprint())
            feed.open_feed(config, source, vae, vae, text_encoder, print, listed=tmp_path / "bad.jsonl", kept=kept)
