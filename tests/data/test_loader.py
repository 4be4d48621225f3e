"""Contract 6: which record comes when is a function of the global step, whatever is bad and whoever reads."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.folder import Folder
from dit_jax.data.loader import (
    Samples,
    batches,
    crop_place,
    is_mirrored,
    permutation,
    position_to_index,
    read,
    replacement,
    scan,
)
from dit_jax.data.sources import BadRecord, Record
from dit_jax.errors import DataError

SEED, SIZE, BATCH = 7, 8, 4


class Numbered(NamedTuple):
    """A source whose picture i shows its number: red is i, green its column, blue its row."""

    count: int
    bad: tuple[int, ...] = ()
    name: str = "numbered"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"record {index}", "on purpose")
        rows, columns = np.mgrid[0:SIZE, 0 : 2 * SIZE]
        image = np.stack([np.full_like(rows, index), columns, rows], axis=-1).astype(np.uint8)
        return Record(image, (f"caption {index}",), f"record {index}")


def tokenize(captions):
    """The number in the caption, and a mask of one token."""
    return np.array([[int(caption.split()[1])] for caption in captions]), np.ones((len(captions), 1))


def count_letters(captions):
    return np.array([[len(caption)] for caption in captions]), np.ones((len(captions), 1))


def samples(source, random_crop=False, flip=False):
    return Samples(source, SEED, SIZE, random_crop, flip)


def quiet(source):
    return BadRecords(None, 1.0, len(source))


def take(wanted, first_step, last_step, threads=0, batch_size=BATCH):
    log = quiet(wanted.source)
    return list(batches(wanted, tokenize, log, batch_size, first_step, last_step, threads, 0))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# --- order --------------------------------------------------------------------------------------------------


def test_every_record_comes_once_per_epoch_in_another_order():
    orders = [permutation(epoch, SEED, 50) for epoch in range(3)] + [permutation(0, SEED + 1, 50)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders}) == 4


def test_the_order_is_uniform():
    """Record 0 lands on each of four places about as often: 1000 epochs, five standard deviations of room."""
    places = [int(np.argmin(permutation(epoch, SEED, 4))) for epoch in range(1000)]
    assert np.all(np.abs(np.bincount(places) - 250) < 5 * np.sqrt(1000 * 0.25 * 0.75))


def test_the_order_is_the_same_in_every_release():
    """Golden values. A release that changes them gives every resumed run another data order: do not."""
    assert permutation(0, 0, 8).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert [replacement(3, attempt, 10, 0) for attempt in range(5)] == [8, 4, 2, 1, 7]
    assert [is_mirrored(k, 0) for k in range(8)] == [True, False, True, False, False, False, False, True]
    assert crop_place(3, 0) == (0.3851702615600233, 0.7703965705258287)


def test_positions_are_a_permutation_of_their_epoch():
    n = 10
    k = np.arange(35).reshape(5, 7)
    index = position_to_index(k, n, SEED)
    assert index.shape == k.shape
    for position, found in zip(k.ravel(), index.ravel(), strict=True):
        assert found == permutation(position // n, SEED, n)[position % n]
        assert found == position_to_index(int(position), n, SEED)


def test_batches_cross_epochs_and_lose_nothing():
    n = 10  # a batch of 4 crosses the first edge in step 2
    index = np.concatenate([batch["index"] for batch in take(samples(Numbered(n)), 0, 5)])
    assert sorted(index[:n]) == sorted(index[n:]) == list(range(n))
    assert index[:n].tolist() != index[n:].tolist()


def test_a_batch_holds_what_its_index_says():
    batch = take(samples(Numbered(10)), 3, 4)[0]
    np.testing.assert_array_equal(batch["index"], position_to_index(np.arange(12, 16), 10, SEED))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["ids"][:, 0], batch["index"])
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "image": ((BATCH, SIZE, SIZE, 3), "uint8"),
        "ids": ((BATCH, 1), "int32"),
        "mask": ((BATCH, 1), "bool"),
        "index": ((BATCH,), "int64"),
    }


FULL = samples(Numbered(23, bad=(3, 4)), random_crop=True, flip=True)


def test_starting_at_a_step_equals_reaching_it():
    assert_equal(take(FULL, 7, 12), take(FULL, 0, 12)[7:])


@pytest.mark.parametrize("threads", [1, 5])
def test_who_reads_changes_nothing(threads):
    assert_equal(take(FULL, 3, 9, threads), take(FULL, 3, 9))


def test_the_batch_size_regroups_the_same_samples():
    flat = [np.concatenate([b["image"] for b in take(FULL, 0, 24 // size, batch_size=size)]) for size in (4, 6)]
    np.testing.assert_array_equal(*flat)


def test_nothing_is_read_past_the_last_step():
    class Watched(Numbered):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen = []
    take(samples(Watched(100)), 2, 5, threads=3)
    assert sorted(seen) == sorted(position_to_index(np.arange(8, 20), 100, SEED))


def test_a_run_can_be_longer_than_any_counter_of_32_bits():
    far = 2**40
    batch = take(samples(Numbered(10)), far, far + 1)[0]
    np.testing.assert_array_equal(batch["index"], position_to_index(far * BATCH + np.arange(4), 10, SEED))


# --- flips and crops ----------------------------------------------------------------------------------------


def test_half_of_the_samples_are_mirrored_anew_in_every_epoch():
    flags = np.array([is_mirrored(k, SEED) for k in range(1000)])
    assert 0.42 < flags.mean() < 0.58
    assert not np.array_equal(flags[:500], flags[500:])
    for k, batch in enumerate(take(samples(Numbered(10), flip=True), 0, 20, batch_size=1)):
        columns = batch["image"][0, 0, :, 1].astype(int)
        assert (columns[0] > columns[-1]) == flags[k]


def test_crops_are_central_or_spread_over_the_picture():
    """The pictures are twice as wide as high: the left column of a crop is one of 0 to 8."""
    lefts = [batch["image"][0, 0, 0, 1] for batch in take(samples(Numbered(10)), 0, 3, batch_size=1)]
    assert lefts == [4, 4, 4]
    lefts = [int(samples(Numbered(10), random_crop=True)[k].image[0, 0, 1]) for k in range(300)]
    assert set(lefts) == set(range(9))
    assert lefts[5] == int(crop_place(5, SEED)[0] * 9)


# --- bad records --------------------------------------------------------------------------------------------


def test_a_bad_record_does_not_shift_any_other():
    n, bad = 20, (2, 11, 12)
    whole = take(samples(Numbered(n), True, True), 0, 15)
    holed = take(samples(Numbered(n, bad), True, True), 0, 15)
    for a, b in zip(whole, holed, strict=True):
        for i, index in enumerate(a["index"]):
            if index in bad:
                assert b["index"][i] == read(Numbered(n, bad), int(index), SEED).used
                assert b["index"][i] not in bad and b["ids"][i, 0] == b["index"][i]
            else:
                np.testing.assert_array_equal(a["image"][i], b["image"][i])


def test_stand_ins_are_spread_over_the_other_records():
    stand_ins = [replacement(4, attempt, 6, SEED) for attempt in range(600)]
    assert set(stand_ins) == {0, 1, 2, 3, 5}
    assert np.bincount(stand_ins)[[0, 1, 2, 3, 5]].min() > 80
    assert len({replacement(i, 0, 10_000, SEED) for i in range(100)}) > 90


def test_one_good_record_stands_in_for_all():
    source = Numbered(5, bad=(0, 1, 3, 4))
    assert [read(source, index, SEED).used for index in range(5)] == [2] * 5
    assert read(source, 2, SEED).replaced is None
    assert read(source, 4, SEED).replaced == Replaced("record 4", "on purpose", "record 2")


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_source_of_bad_records_only_is_refused(count, threads):
    with pytest.raises(DataError, match=r"numbered.*on purpose"):
        take(samples(Numbered(count, tuple(range(count)))), 0, 1, threads)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="numbered holds no records"):
        samples(Numbered(0))


def test_bad_records_are_counted_and_listed_once(tmp_path):
    source, path = Numbered(20, bad=(2, 11)), tmp_path / "bad_records.jsonl"
    for _ in range(2):  # the same command again: nothing is listed twice
        log = BadRecords(path, 0.1, len(source))
        list(batches(samples(source), tokenize, log, BATCH, 0, 15, 2, 0))
        assert len(log) == 2
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(row["id"] for row in rows) == ["record 11", "record 2"]
        for row in rows:
            stand_in = read(source, int(row["id"].split()[1]), SEED).used
            assert row == {"id": row["id"], "reason": "on purpose", "replaced_by": f"record {stand_in}"}


def test_too_many_bad_records_stop_the_run(tmp_path):
    source, path = Numbered(20, bad=(2, 11)), tmp_path / "bad_records.jsonl"
    log = BadRecords(path, 0.09, len(source))
    with pytest.raises(DataError, match=r"2 of 20 .*max_bad_fraction=0\.09.*record \d+: on purpose; record") as error:
        list(batches(samples(source), tokenize, log, BATCH, 0, 15, 2, 0))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(path.read_text().splitlines()) == 2


def test_many_records_of_one_file_are_many_in_the_count_and_one_in_the_list(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "good.png")
    rows = [{"file_name": "broken.png", "text": f"caption {i}"} for i in range(5)]
    rows += [{"file_name": "good.png", "text": "caption 9"}] * 5
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source, path = Folder(tmp_path), tmp_path / "bad_records.jsonl"

    def scan_all(max_bad_fraction):
        log = BadRecords(path, max_bad_fraction, len(source))
        list(scan(source, tokenize, log, 4, SEED, SIZE, 0, 0))
        return log

    assert len(scan_all(0.5)) == 5 and len(path.read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"5 of 10 records are bad.*; the first: broken\.png: [^;]* \(all so far"):
        scan_all(0.45)


def test_a_list_cut_off_by_a_kill_is_continued(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    path.write_text('{"id": "a", "reason": "x", "replaced_by": "c"}\n{"id": "b", "rea')
    log = BadRecords(path, 1.0, 9)
    for index, id in enumerate(("a", "b")):
        log.add(index, Replaced(id, "x", "c"))
    good = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["id"] for line in good] == ["a", "b"]


def test_a_bad_fraction_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        BadRecords(None, 1.5, 9)


# --- the whole source at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 3])
def test_a_scan_gives_what_batches_give(threads):
    source = Numbered(11, bad=(5,))
    chunks = list(scan(source, tokenize, quiet(source), 4, SEED, SIZE, threads, 0))
    assert [len(chunk["index"]) for chunk in chunks] == [4, 4, 3]
    whole = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    assert [i for i in range(11) if whole["index"][i] != i] == [5]
    for step, batch in enumerate(take(samples(source), 0, 8)):
        rows = position_to_index(np.arange(step * BATCH, (step + 1) * BATCH), 11, SEED)
        for key, value in batch.items():
            np.testing.assert_array_equal(value, whole[key][rows])


def test_a_folder_is_read_by_threads_and_processes(tmp_path, shared_data):
    source = Folder(shared_data / "emoji")
    wanted = Samples(source, SEED, 16, random_crop=False, flip=True)

    def read_by(threads, workers):
        log = BadRecords(tmp_path / "bad_records.jsonl", 0.01, len(source))
        return list(batches(wanted, count_letters, log, 32, 40, 44, threads, workers))

    assert_equal(read_by(4, 0), read_by(0, 0))
    assert_equal(read_by(2, 2), read_by(0, 0))


def test_leaving_early_stops_the_readers():
    stream = batches(samples(Numbered(50)), tokenize, quiet(Numbered(50)), BATCH, 0, 10**9, 2, 0)
    assert len(list(islice(stream, 3))) == 3
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_the_room_is_numpy_only():
    code = "import sys, dit_jax.data.loader; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    repository = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
