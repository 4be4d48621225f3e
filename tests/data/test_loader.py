"""Raw batches are a function of the step, whatever is bad and whoever reads."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.loader import Samples, batches, read, scan
from dit_jax.data.order import caption_words, crop_place, is_mirrored, make_order
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.records import BadRecord, Mixture, Record, parts_of
from dit_jax.errors import DataError
from dit_jax.processes import rows_of

SEED, SIZE, BATCH = 7, 8, 4
LONG = 60.0  # seconds: more than any of these tests may take


class Numbered(NamedTuple):
    """A source whose picture i shows its number: red is i, green its column, blue its row."""

    count: int
    bad: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()
    name: str = "numbered"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"record {index}", "on purpose")
        if index in self.blocked:
            time.sleep(1000)
        rows, columns = np.mgrid[0:SIZE, 0 : 2 * SIZE]
        image = np.stack([np.full_like(rows, index), columns, rows], axis=-1).astype(np.uint8)
        return Record(image, (f"caption {index}",), f"record {index}")


def tokenize(captions):
    """The number in the caption, and a mask of one token."""
    return np.array([[int(caption.split()[1])] for caption in captions]), np.ones((len(captions), 1))


def count_letters(captions):
    return np.array([[len(caption)] for caption in captions]), np.ones((len(captions), 1))


def samples(source, random_crop=False, flip=False, batch_size=BATCH):
    order = make_order(parts_of(source), None, batch_size, SEED)
    return Samples(source, order, SEED, [(SIZE, SIZE)], random_crop, flip)


def plain(n):
    """The order of n squares."""
    return make_order([(n, 1.0)], None, BATCH, SEED)


def quiet(source):
    return BadRecords(None, 1.0, len(source))


def take(wanted, first_step, last_step, threads=0, workers=0, patience=LONG, rows=None):
    log, rows = quiet(wanted.source), rows or range(wanted.order.batch_size)
    return list(batches(wanted, tokenize, log, first_step, last_step, rows, threads, workers, patience))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# --- batches ------------------------------------------------------------------------------------------------


def test_batches_cross_epochs_and_lose_nothing():
    n = 10  # a batch of 4 crosses the first edge in step 2
    index = np.concatenate([batch["index"] for batch in take(samples(Numbered(n)), 0, 5)])
    assert sorted(index[:n]) == sorted(index[n:]) == list(range(n))
    assert index[:n].tolist() != index[n:].tolist()


def test_a_batch_holds_what_its_index_says():
    batch = take(samples(Numbered(10)), 3, 4)[0]
    np.testing.assert_array_equal(batch["index"], plain(10).indices(np.arange(12, 16)))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["ids"][:, 0], batch["index"])
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "image": ((BATCH, SIZE, SIZE, 3), "uint8"),
        "ids": ((BATCH, 1), "int32"),
        "mask": ((BATCH, 1), "bool"),
        "index": ((BATCH,), "int64"),
    }


def full(batch_size=BATCH):
    """Everything that is drawn at random."""
    return samples(Numbered(23, bad=(3, 4)), random_crop=True, flip=True, batch_size=batch_size)


FULL = full()


def test_starting_at_a_step_equals_reaching_it():
    assert_equal(take(FULL, 7, 12), take(FULL, 0, 12)[7:])


@pytest.mark.parametrize(("threads", "workers"), [(1, 0), (5, 0), (0, 1), (2, 3)])
def test_who_reads_changes_nothing(threads, workers):
    assert_equal(take(FULL, 3, 9, threads, workers), take(FULL, 3, 9))


def test_the_batch_size_regroups_the_same_samples():
    flat = [np.concatenate([b["image"] for b in take(full(size), 0, 24 // size)]) for size in (4, 6)]
    np.testing.assert_array_equal(*flat)


def test_several_processes_share_every_batch():
    """Their rows, one below the other, are the batch of one process, also where their number changes in between."""
    n = 30
    source = Mixture([Numbered(20, bad=(3, 4)), Numbered(10, bad=(0, 9))], [0.7, 0.3])
    bucket = np.arange(n) % 2
    order = make_order(parts_of(source), bucket, BATCH, SEED)
    wanted = Samples(source, order, SEED, [(SIZE, SIZE), (SIZE, 2 * SIZE)], random_crop=True, flip=True)
    alone = take(wanted, 0, 24, threads=2)
    for first_step, last_step, processes in ((0, 24, 2), (0, 24, 4), (7, 9, 2), (9, 24, 4)):
        parts = [take(wanted, first_step, last_step, rows=rows_of(BATCH, p, processes)) for p in range(processes)]
        joined = [
            {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
            for batches in zip(*parts, strict=True)
        ]
        assert_equal(joined, alone[first_step:last_step])
    rows = rows_of(BATCH, 1, 2)
    assert_equal(take(wanted, 7, 9, 1, 2, rows=rows), take(wanted, 7, 9, rows=rows))  # rows that two workers read
    seen = np.concatenate([batch["index"] for batch in alone])
    assert len(set(seen)) > 20 and not {3, 4, 20, 29} & set(seen)


def test_nothing_is_read_past_the_last_step():
    class Watched(Numbered):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen = []
    take(samples(Watched(100)), 2, 5, threads=3)
    assert sorted(seen) == sorted(plain(100).indices(np.arange(8, 20)))


def test_a_run_can_be_longer_than_any_counter_of_32_bits():
    far = 2**40
    batch = take(samples(Numbered(10)), far, far + 1)[0]
    np.testing.assert_array_equal(batch["index"], plain(10).indices(far * BATCH + np.arange(4)))


# --- flips and crops ----------------------------------------------------------------------------------------


def test_half_of_the_samples_are_mirrored():
    flags = is_mirrored(np.arange(20), SEED)
    for flag, batch in zip(flags, take(samples(Numbered(10), flip=True, batch_size=1), 0, 20), strict=True):
        columns = batch["image"][0, 0, :, 1].astype(int)
        assert (columns[0] > columns[-1]) == flag


def test_crops_are_central_or_spread_over_the_picture():
    """The pictures are twice as wide as high: the left column of a crop is one of 0 to 8."""
    lefts = [batch["image"][0, 0, 0, 1] for batch in take(samples(Numbered(10), batch_size=1), 0, 3)]
    assert lefts == [4, 4, 4]
    lefts = [int(samples(Numbered(10), random_crop=True)[k].image[0, 0, 1]) for k in range(300)]
    assert set(lefts) == set(range(9))
    assert lefts[5] == int(crop_place(5, SEED)[0] * 9)


class Talkative(Numbered):
    """Record i has i % 3 + 1 captions."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record._replace(captions=tuple(f"caption {100 * i + index}" for i in range(index % 3 + 1)))


def test_one_of_several_captions_is_drawn_by_the_position_of_the_sample():
    wanted = samples(Talkative(9))
    ids = np.concatenate([batch["ids"][:, 0] for batch in take(wanted, 0, 100)])
    words = caption_words(np.arange(400), SEED)
    index = plain(9).indices(np.arange(400))
    np.testing.assert_array_equal(ids, 100 * (words % (index % 3 + 1).astype(np.uint64)) + index)
    assert len(set(ids.tolist())) == 3 * (1 + 2 + 3)  # all of them come


# --- mixtures and buckets -----------------------------------------------------------------------------------


def test_a_mixture_in_buckets_gives_batches_of_one_shape():
    source = Mixture([Numbered(20), Numbered(10, bad=(3,))], [0.5, 0.5])
    bucket = np.arange(30) % 3
    order = make_order(parts_of(source), bucket, BATCH, SEED)
    shapes = [(4, 16), (8, 8), (16, 4)]
    wanted = Samples(source, order, SEED, shapes, random_crop=True, flip=True)
    raw = take(wanted, 0, 30, threads=2)
    for step, batch in enumerate(raw):
        b = order.bucket(step)
        assert batch["image"].shape == (BATCH, *shapes[b], 3)
        assert set(bucket[batch["index"]]) == {b} and 23 not in batch["index"]
    assert {batch["image"].shape[1] for batch in raw} == {4, 8, 16}
    assert_equal(take(wanted, 17, 20), raw[17:20])


def test_a_picture_of_another_shape_stands_in_where_a_whole_bucket_is_bad():
    source = Numbered(6, bad=(5,))
    order = make_order([(6, 1.0)], np.array([0, 0, 0, 0, 0, 1]), BATCH, SEED)
    wanted = Samples(source, order, SEED, [(8, 8), (4, 16)], random_crop=False, flip=False)
    step = next(step for step in range(100) if order.bucket(step) == 1)
    batch = take(wanted, step, step + 1)[0]
    assert batch["image"].shape == (BATCH, 4, 16, 3) and set(batch["index"]) <= {0, 1, 2, 3, 4}


# --- bad records --------------------------------------------------------------------------------------------


def test_a_bad_record_does_not_shift_any_other():
    n, bad = 20, (2, 11, 12)
    whole = take(samples(Numbered(n), True, True), 0, 15)
    holed = take(samples(Numbered(n, bad), True, True), 0, 15)
    for a, b in zip(whole, holed, strict=True):
        for i, index in enumerate(a["index"]):
            if index in bad:
                assert b["index"][i] == read(Numbered(n, bad), plain(n), int(index)).used
                assert b["index"][i] not in bad and b["ids"][i, 0] == b["index"][i]
            else:
                np.testing.assert_array_equal(a["image"][i], b["image"][i])


def test_one_good_record_stands_in_for_all():
    source, order = Numbered(5, bad=(0, 1, 3, 4)), plain(5)
    assert [read(source, order, index).used for index in range(5)] == [2] * 5
    assert read(source, order, 2).replaced is None
    assert read(source, order, 4).replaced == Replaced("record 4", "on purpose", "record 2")


def test_who_knows_what_is_bad_takes_the_same_stand_ins():
    source = Mixture([Numbered(40, bad=(2, 11, 12)), Numbered(1, bad=(0,))], [0.9, 0.1])
    order = make_order(parts_of(source), None, BATCH, SEED)
    bad = np.isin(np.arange(41), [2, 11, 12, 40])
    np.testing.assert_array_equal(order.stand_ins(bad), [read(source, order, i).used for i in range(41)])


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_source_of_bad_records_only_is_refused(count, threads):
    with pytest.raises(DataError, match=r"numbered.*on purpose"):
        take(samples(Numbered(count, tuple(range(count)))), 0, 1, threads)


def test_bad_records_are_counted_and_listed_once(tmp_path):
    source, path = Numbered(20, bad=(2, 11)), tmp_path / "bad_records.jsonl"
    for _ in range(2):  # the same command again: nothing is listed twice
        log = BadRecords(path, 0.1, len(source))
        list(batches(samples(source), tokenize, log, 0, 15, range(BATCH), 2, 0, LONG))
        assert len(log) == 2
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(row["id"] for row in rows) == ["record 11", "record 2"]
        for row in rows:
            stand_in = read(source, plain(20), int(row["id"].split()[1])).used
            assert row == {"id": row["id"], "reason": "on purpose", "replaced_by": f"record {stand_in}"}


def test_too_many_bad_records_stop_the_run(tmp_path):
    source, path = Numbered(20, bad=(2, 11)), tmp_path / "bad_records.jsonl"
    log = BadRecords(path, 0.09, len(source))
    with pytest.raises(DataError, match=r"2 of 20 .*max_bad_fraction=0\.09.*record \d+: on purpose; record") as error:
        list(batches(samples(source), tokenize, log, 0, 15, range(BATCH), 2, 0, LONG))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(path.read_text().splitlines()) == 2


def test_many_records_of_one_file_are_many_in_the_count_and_one_in_the_list(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "good.png")
    rows = [{"file_name": "broken.png", "text": f"caption {i}"} for i in range(5)]
    rows += [{"file_name": "good.png", "text": "caption 9"}] * 5
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source, path = Folder(tmp_path), tmp_path / "bad_records.jsonl"

    def read_all(max_bad_fraction):
        log = BadRecords(path, max_bad_fraction, len(source))
        list(batches(samples(source, batch_size=5), tokenize, log, 0, 2, range(5), 0, 0, LONG))
        return log

    assert len(read_all(0.5)) == 5 and len(path.read_text().splitlines()) == 1
    with pytest.raises(DataError, match=r"5 of 10 records are bad.*; the first: broken\.png: [^;]* \(all so far"):
        read_all(0.45)


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


# --- every record once --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (3, 0), (2, 2)])
def test_a_scan_gives_the_pictures_that_batches_give(threads, workers):
    source = Numbered(11, bad=(5,))
    indices = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    chunks = list(scan(source, indices, SIZE, SIZE, [4, 4, 2], threads, workers, LONG))
    assert [len(chunk["image"]) for chunk in chunks] == [4, 4, 2]
    index, image = (np.concatenate([chunk[key] for chunk in chunks]) for key in ("index", "image"))
    np.testing.assert_array_equal(index, indices)
    problems = [problem for chunk in chunks for problem in chunk["problems"]]
    assert [str(problem) for problem in problems if problem] == ["record 5: on purpose"]
    assert problems[4] and not image[4].any()
    for batch in take(samples(source), 0, 3):
        for used, picture in zip(batch["index"], batch["image"], strict=True):
            if used in indices:
                np.testing.assert_array_equal(picture, image[np.flatnonzero(indices == used)[0]])


def test_a_scan_cuts_rectangles_and_of_nothing_makes_nothing():
    [chunk] = scan(Numbered(2), np.array([1]), 4, 16, [1], 0, 0, LONG)
    assert chunk["image"].shape == (1, 4, 16, 3)
    assert list(scan(Numbered(2), np.array([], np.int64), SIZE, SIZE, [], 2, 2, LONG)) == []


# --- who reads ----------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_threads_and_processes(tmp_path, shared_data):
    source = Folder(shared_data / "emoji")
    order = make_order([(len(source), 1.0)], None, 32, SEED)
    wanted = Samples(source, order, SEED, [(16, 16)], random_crop=False, flip=True)

    def read_by(threads, workers):
        log = BadRecords(tmp_path / "bad_records.jsonl", 0.01, len(source))
        return list(batches(wanted, count_letters, log, 40, 44, range(32), threads, workers, LONG))

    assert_equal(read_by(4, 0), read_by(0, 0))
    assert_equal(read_by(2, 2), read_by(0, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_never_read_ends_the_run(workers):
    with pytest.raises(DataError, match=r"^reading numbered: nothing came for 0\.5 seconds"):
        take(samples(Numbered(3, blocked=(1,))), 0, 1, threads=1, workers=workers, patience=0.5)
    with pytest.raises(DataError, match=r"^reading numbered: nothing came for 0\.5 seconds"):
        list(scan(Numbered(3, blocked=(1,)), np.arange(3), SIZE, SIZE, [3], 1, workers, 0.5))


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_stops_the_readers(workers):
    stream = batches(samples(Numbered(50)), tokenize, quiet(Numbered(50)), 0, 10**9, range(BATCH), 2, workers, LONG)
    assert len(list(islice(stream, 3))) == 3
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_the_room_is_numpy_only():
    code = "import sys, dit_jax.data.loader; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    repository = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0
