"""The cache: batches are those that a reader of one record at a time would make, and files end in the same bytes
however often the work was split, repeated or killed."""

import copy
import errno
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from dit_jax.data.cache import files as cache_files
from dit_jax.data.cache import parts, tensor_files
from dit_jax.data.cache.files import begin, finish, missing, open_cache, read_manifest, verify, write
from dit_jax.data.cache.gather import in_memory, join
from dit_jax.data.cache.parts import Pictures, Table, Texts, Unit, mismatches, tabulate, units
from dit_jax.data.cache.tensor_files import open_tensors, write_tensors
from dit_jax.data.order import make_order
from dit_jax.data.sources.records import Mixture, Subset, fingerprint_of_choice
from dit_jax.errors import DataError
from dit_jax.files import flatten

BUCKETS = ((32, 32), (16, 64), (64, 16))


class Captioned:
    """A source of which only names and captions are looked at."""

    name = "captioned"

    def __init__(self, captions):
        self._captions = captions

    def __len__(self):
        return len(self._captions)

    def ids(self):
        return (f"{i}.png" for i in range(len(self)))

    def captions(self):
        return iter(self._captions)

    def fingerprint(self):
        return hashlib.sha256(repr(self._captions).encode()).hexdigest()


@dataclass
class Encoded:
    """A random cache, before it is one: what every record and caption became."""

    source: Captioned
    table: Table
    identity: dict
    moments: list  # per record [F, 2, h, w, C]
    states: dict  # caption -> hidden [t, E], pooled [P]
    problems: dict  # record -> reason

    def shard(self, unit: Unit) -> Pictures | Texts:
        """What the encoders would return for a unit."""
        if unit.kind == "texts":
            states = [self.states[caption] for caption in unit.captions(self.table)]
            offsets = np.cumsum([0, *(len(hidden) for hidden, _ in states)])
            return Texts(np.concatenate([h for h, _ in states]), offsets, np.stack([p for _, p in states]))
        shard = Pictures.zeros(self.identity, unit)
        for row, record in enumerate(unit.records(self.table).tolist()):
            if record in self.problems:
                shard.bad[row], shard.problems[row] = True, self.problems[record]
            else:
                shard.mean[row], shard.std[row] = self.moments[record][:, 0], self.moments[record][:, 1]
        return shard

    def in_memory(self):
        return in_memory(self.identity, self.table, [self.shard(unit) for unit in units(self.identity)])

    def on_disk(self, folder):
        begin(folder, self.identity, self.table)
        for unit in units(self.identity):
            write(folder, self.identity, unit, self.shard(unit))
        finish(folder, self.identity, quiet)
        return open_cache(folder)

    def batch(self, index, words, mirrored, S):
        """A batch of good records, one record at a time."""
        rows = []
        for record, word, side in zip(index.tolist(), words.tolist(), mirrored.tolist(), strict=True):
            captions = self.source._captions[record]
            hidden, pooled = self.states[captions[word % len(captions)]]
            padded = np.zeros((S, hidden.shape[1]), hidden.dtype)
            padded[: len(hidden)] = hidden
            mean, std = self.moments[record][int(side)]
            rows.append((mean, std, padded, pooled, np.arange(S) < len(hidden)))
        return dict(
            zip(("mean", "std", "hidden", "pooled", "mask"), map(np.stack, zip(*rows, strict=True)), strict=True)
        )


def quiet(done, total):
    pass


def encoded(seed=0, n=57, dtype="float16", mirrored=True, buckets=BUCKETS, per_shard=(5, 7)) -> Encoded:
    """Records with one to four captions out of few, some of them bad; of those, some without a caption."""
    rng = np.random.default_rng(seed)
    words = [f"word {i}" for i in range(n // 2)]
    captions = [tuple(rng.choice(words, rng.integers(1, 5)).tolist()) for _ in range(n)]
    problems = {int(i): f"reason {i}" for i in rng.choice(n, n // 9, replace=False)}
    for i in list(problems)[::2]:
        captions[i] = ()
    source, bucket = Captioned(captions), rng.integers(0, len(buckets), n)
    table = tabulate(source, bucket)
    identity = {
        "format": 1,
        "data": {"name": source.name, "fingerprint": source.fingerprint(), **table.counts(len(buckets))},
        "image_size": 32,
        "crop": "center",
        "mirrored": mirrored,
        "buckets": buckets,
        "vae": {"name": "v", "sha256": "a" * 64, "shift": (0.1,), "scale": (0.2,), "factor": 8, "channels": 3},
        "text_encoder": {"name": "t", "sha256": "b" * 64, "length": 9, "width": 6, "pooled_width": 5},
        "storage_dtype": dtype,
        "records_per_shard": per_shard[0],
        "captions_per_shard": per_shard[1],
    }

    def bfloat16(*shape):
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16)

    moments = [rng.normal(size=(1 + mirrored, 2, *(s // 8 for s in buckets[b]), 3)).astype(dtype) for b in bucket]
    states = {caption: (bfloat16(int(rng.integers(2, 9)), 6), bfloat16(5)) for caption in words}
    return Encoded(source, table, identity, moments, states, problems)


def random_batch(cache, rng, mirrored):
    """Arguments of a gather: good records of one bucket, some of them twice."""
    good = np.flatnonzero(~cache.bad & (cache.bucket == rng.choice(np.unique(cache.bucket[~cache.bad]))))
    index = rng.choice(good, 6)
    return index, rng.integers(0, 2**64, 6, dtype=np.uint64), rng.random(6) < (0.5 if mirrored else 0)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- gathering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_batches_are_those_of_one_record_at_a_time_in_memory_and_from_files(seed, tmp_path):
    mirrored, dtype = bool(seed % 2), ("float16", "float32")[seed // 2]
    made = encoded(seed, dtype=dtype, mirrored=mirrored)
    rng = np.random.default_rng(seed)
    memory, disk = made.in_memory(), made.on_disk(tmp_path)
    S = max(len(hidden) for caption, (hidden, _) in made.states.items() if caption in set(made.table.captions))
    assert memory.longest == disk.longest == S
    kept = []
    for _ in range(30):  # more than lie idle, so that memory is used again: with padding over longer texts
        arguments = random_batch(memory, rng, mirrored)
        expected = made.batch(*arguments, S)
        for cache in (memory, disk):
            batch = cache.gather(*arguments)
            assert_equal(batch, expected)
            kept.append((batch, expected))
        kept = kept[-5:]
    for batch, expected in kept:
        assert_equal(batch, expected)


def test_a_batch_stays_as_it_is_for_as_long_as_a_device_looks_at_it(tmp_path):
    made = encoded(n=200, buckets=((32, 32),), mirrored=False)
    cache, rng = made.in_memory(), np.random.default_rng(0)
    held = []
    for _ in range(40):
        arguments = random_batch(cache, rng, False)
        batch = cache.gather(*arguments)
        held.append((jax.device_put(batch), batch["mask"][:1], made.batch(*arguments, cache.longest)))
        del batch
        held = held[-20:]
    for on_device, _, expected in held:
        assert_equal(jax.device_get(on_device), expected)


def test_threads_gather_what_one_does():
    made = encoded(n=200)
    cache, rng = made.in_memory(), np.random.default_rng(0)
    work = [random_batch(cache, rng, True) for _ in range(200)]
    wrong = []

    def gather(mine):
        for arguments in mine:
            expected = made.batch(*arguments, cache.longest)
            found = cache.gather(*arguments)
            wrong.extend(key for key in expected if not np.array_equal(found[key], expected[key]))

    threads = [threading.Thread(target=gather, args=(work[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_cache_says_of_its_records(tmp_path):
    made = encoded()
    for cache in (made.in_memory(), made.on_disk(tmp_path)):
        assert len(cache) == len(made.source) and list(cache.ids()) == list(made.source.ids())
        assert list(cache.captions()) == list(made.source.captions())
        assert cache.fingerprint() == made.source.fingerprint()
        assert np.flatnonzero(cache.bad).tolist() == sorted(made.problems)
        np.testing.assert_array_equal(cache.bucket, made.table.bucket)
        assert cache.shapes == BUCKETS and cache.mirrored and cache.parts == [(len(made.source), 1.0)]


def test_a_batch_of_two_buckets_is_refused():
    cache = encoded().in_memory()
    index = np.array([np.flatnonzero(cache.bucket == b)[0] for b in (0, 2)])
    with pytest.raises(ValueError, match=r"buckets \[0, 2\]"):
        cache.gather(index, np.zeros(2, np.uint64), np.zeros(2, bool))


# --- views --------------------------------------------------------------------------------------------------


def test_views_and_views_of_views_show_the_records_that_they_were_made_of():
    rng = np.random.default_rng(0)
    one, two = encoded(1, n=30), encoded(2, n=41, per_shard=(4, 3))
    first = rng.permutation(30)[:20]
    second = np.sort(rng.choice(41, 25, replace=False))
    parts = [one.in_memory().select(first), two.in_memory().select(second)]
    joined = join(parts, [1.0, 3.0], ["one", "two"])
    assert joined.parts == [(20, 1.0), (25, 3.0)]
    chosen = np.flatnonzero(rng.random(45) < 0.6)
    both = [(one, int(i)) for i in first] + [(two, int(i)) for i in second]
    for view, expected in ((joined, both), (joined.select(chosen), [both[i] for i in chosen])):
        assert list(view.captions()) == [made.source._captions[i] for made, i in expected]
        assert list(view.ids()) == [f"{i}.png" for _, i in expected]
        assert view.bad.tolist() == [i in made.problems for made, i in expected]
        assert view.bucket.tolist() == [int(made.table.bucket[i]) for made, i in expected]
        assert [n for n, _ in view.parts] == [sum(made is part for made, _ in expected) for part in (one, two)]
        for _ in range(10):
            index, words, mirrored = random_batch(view, rng, True)
            found = view.gather(index, words, mirrored)
            for row, i in enumerate(index):
                made, record = expected[i]
                here = slice(row, row + 1)
                alone = made.batch(np.array([record]), words[here], mirrored[here], view.longest)
                assert_equal({key: array[here] for key, array in found.items()}, alone)
    with pytest.raises(ValueError, match="one after those of the other"):
        joined.select(np.array([21, 3]))


def test_fingerprints_are_those_of_the_sources():
    """So that a run may go on from a cache where it began with pictures, and not with other records."""
    one, two = encoded(1), encoded(2)
    chosen = np.array([1, 5, 6])
    assert one.in_memory().select(chosen).fingerprint() == Subset(one.source, chosen, "some").fingerprint()
    assert one.in_memory().select(chosen).fingerprint() == fingerprint_of_choice(one.source.fingerprint(), chosen)
    joined = join([one.in_memory(), two.in_memory()], [1.0, 2.0], ["one", "two"])
    assert joined.fingerprint() == Mixture([one.source, two.source], [1.0, 2.0]).fingerprint()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "storage_dtype: two float32, one float16"),
        ({"buckets": BUCKETS[:2]}, "buckets: two [[32, 32], [16, 64]], one [[32, 32], [16, 64], [64, 16]]"),
    ],
)
def test_caches_that_were_made_in_other_ways_are_not_joined(change, said):
    with pytest.raises(DataError) as error:
        join([encoded().in_memory(), encoded(**change).in_memory()], [1.0, 1.0], ["one", "two"])
    assert said in str(error.value)


def test_mirror_images_that_one_cache_lacks_are_left_alone_in_the_other():
    plain, mirrored = encoded(1, n=10, mirrored=False), encoded(2, n=10)
    joined = join([plain.in_memory(), mirrored.in_memory()], [1.0, 1.0], ["one", "two"])
    assert not joined.mirrored and not joined.identity["mirrored"]
    record = int(np.flatnonzero(~joined.bad[10:])[0])
    here = np.array([record]), np.zeros(1, np.uint64), np.zeros(1, bool)
    assert_equal(joined.gather(10 + here[0], *here[1:]), mirrored.batch(*here, joined.longest))


# --- the table ----------------------------------------------------------------------------------------------


def test_distinct_captions_are_numbered_as_a_dict_would():
    rng = np.random.default_rng(0)
    long = "x" * 300
    near = [long[:i] + "y" + long[i + 1 :] for i in range(300)] + [long, "", "x", "xx", "一个圆"]  # one byte apart
    captions = [tuple(rng.choice(near, rng.integers(0, 4)).tolist()) for _ in range(500)]
    table = tabulate(Captioned(captions), np.zeros(500, np.uint8))
    number: dict[str, int] = {}
    expected = [number.setdefault(caption, len(number)) for some in captions for caption in some]
    assert table.caption_of.tolist() == expected and list(table.captions) == list(number)
    assert table.first.tolist() == np.cumsum([0, *map(len, captions)]).tolist()


@pytest.mark.parametrize("half", [slice(0, 8), slice(8, 16)])
def test_captions_whose_hashes_are_half_alike_are_told_apart(half, monkeypatch):
    blake2b = hashlib.blake2b

    def half_alike(content, digest_size):
        digest = bytearray(blake2b(content, digest_size=digest_size).digest())
        digest[half] = bytes(8)
        return SimpleNamespace(digest=lambda: bytes(digest))

    monkeypatch.setattr(parts.hashlib, "blake2b", half_alike)
    captions = [("a", "b"), ("c", "a"), ("b", "d")] * 20
    table = tabulate(Captioned(captions), np.zeros(60, np.uint8))
    assert list(table.captions) == ["a", "b", "c", "d"] and table.caption_of.tolist() == [0, 1, 2, 0, 1, 3] * 20


def test_a_source_without_a_caption_has_a_table():
    table = tabulate(Captioned([(), ()]), np.zeros(2, np.uint8))
    assert len(table.captions) == 0 and table.first.tolist() == [0, 0, 0] and list(table.ids) == ["0.png", "1.png"]


def test_units_hold_every_record_and_every_caption_once():
    made = encoded()
    all_units = units(made.identity)
    pictures = [unit.records(made.table) for unit in all_units if unit.kind == "pictures"]
    assert sorted(np.concatenate(pictures).tolist()) == list(range(57))
    assert all(
        len(set(made.table.bucket[records].tolist())) == 1 and (np.diff(records) > 0).all() for records in pictures
    )
    texts = [unit.captions(made.table) for unit in all_units if unit.kind == "texts"]
    assert sum(texts, []) == list(made.table.captions)
    assert len({unit.name for unit in all_units}) == len(all_units)


# --- writing ------------------------------------------------------------------------------------------------


@functools.cache
def made_once():
    return encoded(per_shard=(8, 9))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished cache, and its bytes; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    made_once().on_disk(folder)
    return folder, contents(folder)


def test_any_order_and_any_split_of_the_work_ends_in_the_same_bytes(whole, tmp_path):
    made, rng = made_once(), np.random.default_rng(0)
    for split in (1, 3):
        folder = tmp_path / str(split)
        order = rng.permutation(len(units(made.identity)))
        for i in range(split):  # each process begins, does its part and what it finds left over, and one finishes
            begin(folder, made.identity, made.table)
            for number in order[i::split]:
                unit = units(made.identity)[number]
                assert unit in missing(folder, made.identity)
                write(folder, made.identity, unit, made.shard(unit))
                write(folder, made.identity, unit, made.shard(unit))  # another process was as quick
        assert missing(folder, made.identity) == []
        for _ in range(2):
            finish(folder, made.identity, quiet)
        begin(folder, made.identity, made.table)  # a process that comes too late
        assert missing(folder, made.identity) == []
        assert contents(folder) == whole[1]


def test_what_the_manifest_and_the_list_of_bad_records_say(whole):
    made, manifest = made_once(), read_manifest(whole[0])
    good = [made.moments[i].astype(np.float64) for i in range(57) if i not in made.problems]
    mean = np.concatenate([moments[:, 0].reshape(-1, 3) for moments in good])
    std = np.concatenate([moments[:, 1].reshape(-1, 3) for moments in good])
    np.testing.assert_allclose(manifest["latents"]["mean"], mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest["latents"]["std"], np.sqrt(mean.var(0) + (std**2).mean(0)), rtol=1e-12)
    lengths = [len(made.states[caption][0]) for caption in made.table.captions]
    assert manifest["tokens"] == {"all": sum(lengths), "longest": max(lengths)}
    assert manifest["bad_records"] == len(made.problems)
    rows = [json.loads(line) for line in (whole[0] / "bad_records.jsonl").read_text().splitlines()]
    assert rows == [{"id": f"{i}.png", "reason": made.problems[i]} for i in sorted(made.problems)]
    files = {name: content for name, content in whole[1].items() if name.endswith(".safetensors")}
    expected = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    assert manifest["shards"] == expected
    assert {name: manifest[name] for name in made.identity} == json.loads(json.dumps(made.identity))


def test_the_published_library_reads_the_files(whole):
    made = made_once()
    for unit in units(made.identity):
        shard = made.shard(unit)
        with safetensors.safe_open(whole[0] / unit.name, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                found = file.get_tensor(name)
                np.testing.assert_array_equal(found.view(np.uint8), getattr(shard, name).view(np.uint8))


def test_arrays_lie_where_memory_likes_them(whole):
    for unit in units(made_once().identity):
        shard = made_once().shard(unit)
        arrays = {"moments": shard.moments, "bad": shard.bad} if unit.kind == "pictures" else shard._asdict()
        file = open_tensors(whole[0] / unit.name, {name: (array.dtype, array.shape) for name, array in arrays.items()})
        places = [array.ctypes.data - np.frombuffer(file.file, np.uint8).ctypes.data for array in file.tensors.values()]
        assert min(places) % 4096 == 0 and all(array.flags.aligned for array in file.tensors.values())


def test_what_killed_processes_leave_behind_is_not_taken_for_work_and_removed(whole, tmp_path):
    made = made_once()
    begin(tmp_path, made.identity, made.table)
    for unit in units(made.identity)[1:]:
        write(tmp_path, made.identity, unit, made.shard(unit))
    first = units(made.identity)[0]
    (tmp_path / f".{first.name}.elsewhere.17.tmp").write_bytes(whole[1][first.name][:100])
    assert missing(tmp_path, made.identity) == [first]
    write(tmp_path, made.identity, first, made.shard(first))
    finish(tmp_path, made.identity, quiet)
    assert contents(tmp_path) == whole[1]


WORK = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[2])
from tests.data.cache.test_cache import *
made, folder = encoded(per_shard=(8, 9)), Path(sys.argv[1])
print("ready", flush=True)
begin(folder, made.identity, made.table)
for unit in missing(folder, made.identity):
    write(folder, made.identity, unit, made.shard(unit))
finish(folder, made.identity, quiet)
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole, tmp_path):
    """Each time a little later; the system call that is under way, a write, an fsync or a rename, is done or is not."""
    repository = str(Path(__file__).resolve().parents[3])
    folder, delay = tmp_path / "killed", 0.0
    kills = 0
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04, 60.0):
        process = subprocess.Popen([sys.executable, "-c", WORK, str(folder), repository], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        try:
            assert process.wait(delay) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
    assert kills and contents(folder) == whole[1]


def test_processes_that_begin_write_and_finish_at_the_same_time_do_not_harm_each_other(whole, tmp_path):
    repository = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-c", WORK, str(tmp_path / "cache"), repository]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "cache") == whole[1]


def test_a_folder_with_another_cache_is_refused_with_the_fields_that_differ(whole):
    made = made_once()
    other = copy.deepcopy(made.identity)
    other["vae"]["sha256"], other["image_size"] = "c" * 64, 64
    with pytest.raises(DataError) as error:
        begin(whole[0], other, made.table)
    assert "vae.sha256: there aaaaaaaaaaaa.., here cccccccccccc..; image_size" not in str(error.value)  # in their order
    assert "image_size: there 32, here 64; vae.sha256: there aaaaaaaaaaaa.., here cccccccccccc.." in str(error.value)
    with pytest.raises(DataError, match="another cache"):
        finish(whole[0], other, quiet)
    renamed = copy.deepcopy(made.identity)
    renamed["vae"]["name"] = "the same under another name"
    begin(whole[0], renamed, made.table)
    finish(whole[0], renamed, quiet)
    assert contents(whole[0]) == whole[1]


def test_a_cache_that_was_only_begun_is_refused_too(tmp_path):
    made = made_once()
    begin(tmp_path, made.identity, made.table)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="crop: there center, here random"):
        begin(tmp_path, {**made.identity, "crop": "random"}, made.table)
    assert contents(tmp_path) == before


def test_another_process_finishes_while_this_one_writes_a_shard_or_begins(whole, tmp_path, monkeypatch):
    """What this one was writing is tidied away as left behind, and what it was looking for has another name."""
    made, fsync, read = made_once(), os.fsync, cache_files._read
    begin(tmp_path, made.identity, made.table)
    *most, last = units(made.identity)
    for unit in most:
        write(tmp_path, made.identity, unit, made.shard(unit))

    def quicker(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        for path in tmp_path.glob(".*.tmp"):
            path.unlink()
        (tmp_path / last.name).write_bytes(whole[1][last.name])

    monkeypatch.setattr(os, "fsync", quicker)
    write(tmp_path, made.identity, last, made.shard(last))

    def and_then_finished(path):
        monkeypatch.setattr(cache_files, "_read", read)
        try:
            return read(path)
        finally:
            finish(tmp_path, made.identity, quiet)

    monkeypatch.setattr(cache_files, "_read", and_then_finished)
    begin(tmp_path, made.identity, made.table)
    assert contents(tmp_path) == whole[1]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds other things than this cache \(holiday.jpg\)"):
        begin(tmp_path, made_once().identity, made_once().table)
    assert contents(tmp_path) == {"holiday.jpg": b"x"}


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    made = made_once()
    begin(tmp_path, made.identity, made.table)
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    unit = units(made.identity)[0]
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, made.identity, unit, made.shard(unit))
    assert contents(tmp_path) == before


# --- R12: what a cache was made from ------------------------------------------------------------------------


def other_value(value):
    """A value of the same kind that is not equal."""
    match value:
        case bool():
            return not value
        case str():
            return "c" * 64 if len(value) == 64 else value + "x"
        case int() | float():
            return value + 1
        case _:
            return [*value, 8]


@pytest.mark.parametrize("field", parts.FIELDS)
def test_every_field_that_differs_is_named_with_both_values(field, whole):
    manifest, expected = read_manifest(whole[0]), flatten(made_once().identity)
    assert mismatches(manifest, expected) == []
    held, expected[field] = flatten(manifest)[field], other_value(expected[field])
    (said,) = mismatches(manifest, expected)
    if isinstance(held, str) and len(held) == 64:
        assert said == f"{field}: cache {held[:12]}.., run cccccccccccc.."
    else:
        assert said == f"{field}: cache {held}, run {json.loads(json.dumps(expected))[field]}"


def test_a_field_that_a_cache_does_not_have_is_a_mismatch():
    assert mismatches({"crop": "center"}, {"vae.sha256": "c" * 64}) == ["vae.sha256: cache none, run cccccccccccc.."]


# --- R13: files that are damaged, or made to harm -----------------------------------------------------------


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in whole[1].items():
        (folder / name).write_bytes(content)
    return folder


def with_header(content, change):
    """A file whose header was changed, its offsets still true."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def set_moments(**entries):
    return lambda header: header["moments"].update(entries)


DAMAGES = {
    "truncated": (lambda c: c[:-1], "does not lie at its bytes"),
    "empty": (lambda c: b"", "is empty; delete it"),
    "a few bytes": (lambda c: c[:5], "its header would take"),
    "an endless header": (lambda c: b"\xff" * 8 + c[8:], "its header would take 18,446,744,073,709,551,615 bytes"),
    "a header past the end": (lambda c: len(c).to_bytes(8, "little") + c[8:], "its header would take"),
    "no JSON": (lambda c: c[:9] + b"\x00" + c[10:], "damaged"),
    "not UTF-8": (lambda c: c[:9] + b"\xff" + c[10:], "damaged"),
    "nested without end": (lambda c: (80_000).to_bytes(8, "little") + b"[" * 80_000, "damaged"),
    "a list": (lambda c: (2).to_bytes(8, "little") + b"[]" + c[8:], "damaged"),
    "no notes": (lambda c: with_header(c, lambda h: h.pop("__metadata__")), "__metadata__"),
    "other notes": (lambda c: with_header(c, lambda h: h["__metadata__"].update(notes="[]")), "another cache"),
    "an offset outside": (lambda c: with_header(c, set_moments(data_offsets=[0, 2**60])), "does not lie at its bytes"),
    "a negative offset": (lambda c: with_header(c, set_moments(data_offsets=[-8, 8])), "no whole numbers"),
    "offsets that are no numbers": (lambda c: with_header(c, set_moments(data_offsets=[0.0, 8.0])), "no whole numbers"),
    "three offsets": (lambda c: with_header(c, set_moments(data_offsets=[0, 8, 16])), "damaged"),
    "another shape": (lambda c: with_header(c, lambda h: h["moments"]["shape"].reverse()), "'moments' is float16"),
    "a huge shape": (lambda c: with_header(c, set_moments(shape=[2**62, 4])), "does not lie at its bytes"),
    "a type that is none": (lambda c: with_header(c, set_moments(dtype="OBJECT")), "unknown 'OBJECT'"),
    "another type": (lambda c: with_header(c, set_moments(dtype="BF16")), "'moments' is bfloat16"),
    "another name": (lambda c: with_header(c, lambda h: h.update(x=h.pop("bad"))), "should hold moments, bad"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_with_what_mends_it_and_is_made_again(damage, copy_of_whole, whole):
    harm, said = DAMAGES[damage]
    made, name = made_once(), units(made_once().identity)[1].name
    (copy_of_whole / name).write_bytes(harm(whole[1][name]))
    with pytest.raises(DataError) as error:
        open_cache(copy_of_whole)
    assert name in str(error.value) and said in str(error.value) and "precompute" in str(error.value)
    assert verify(copy_of_whole, quiet) == [name]
    (unit,) = missing(copy_of_whole, made.identity)
    write(copy_of_whole, made.identity, unit, made.shard(unit))
    with pytest.raises(DataError, match="unfinished cache, 0 of"):  # its hashes are of what was there before
        open_cache(copy_of_whole)
    finish(copy_of_whole, made.identity, quiet)
    assert contents(copy_of_whole) == whole[1]


def test_a_damaged_cache_is_not_made_right_by_the_same_command_again(copy_of_whole, whole):
    name = units(made_once().identity)[0].name
    (copy_of_whole / name).write_bytes(whole[1][name][:-1] + bytes([whole[1][name][-1] ^ 1]))
    finish(copy_of_whole, made_once().identity, quiet)
    assert verify(copy_of_whole, quiet) == [name]


def test_a_header_longer_than_any_that_is_written_is_not_read(copy_of_whole, monkeypatch):
    monkeypatch.setattr(tensor_files, "HEADER_LIMIT", 4000)
    with pytest.raises(DataError, match="its header would take 4,088 bytes"):
        open_cache(copy_of_whole)


def test_texts_whose_offsets_lie_are_refused(copy_of_whole):
    made = made_once()
    unit = next(unit for unit in units(made.identity) if unit.kind == "texts")
    path = copy_of_whole / unit.name
    notes = open_tensors(path, {n: (a.dtype, a.shape) for n, a in made.shard(unit)._asdict().items()}).notes
    for change in (lambda o: o + 1, lambda o: o[::-1].copy(), lambda o: np.r_[0, np.full(len(o) - 1, o[-1])]):
        shard = made.shard(unit)
        with path.open("wb") as file:
            write_tensors(file, shard._replace(offsets=change(shard.offsets))._asdict(), notes)
        with pytest.raises(DataError, match="its offsets do not cut"):
            open_cache(copy_of_whole)


def test_shards_that_changed_places_are_told_apart(copy_of_whole, whole):
    one, two = units(made_once().identity)[:2]
    assert len(whole[1][one.name]) == len(whole[1][two.name])
    (copy_of_whole / one.name).write_bytes(whole[1][two.name])
    (copy_of_whole / two.name).write_bytes(whole[1][one.name])
    with pytest.raises(DataError, match="another place in this one"):
        open_cache(copy_of_whole)
    assert verify(copy_of_whole, quiet) == [one.name, two.name]


def test_verify_names_one_flipped_bit_and_what_is_absent(copy_of_whole, whole):
    assert verify(copy_of_whole, quiet) == []
    one, two = units(made_once().identity)[0].name, "table.safetensors"
    (copy_of_whole / one).write_bytes(whole[1][one][:-1] + bytes([whole[1][one][-1] ^ 1]))
    (copy_of_whole / two).unlink()
    assert sorted(verify(copy_of_whole, quiet)) == [one, two]


def test_hashing_says_how_far_it_is(whole):
    said = []
    verify(whole[0], lambda done, total: said.append((done, total)))
    total = sum(len(content) for name, content in whole[1].items() if name.endswith(".safetensors"))
    assert said == sorted(said) and said[-1] == (total, total) and len(said) > 2


def test_a_shard_of_another_size_than_the_manifest_says_is_refused(copy_of_whole):
    manifest = json.loads((copy_of_whole / "manifest.json").read_text())
    name = units(made_once().identity)[0].name
    manifest["shards"][name]["bytes"] += 1
    (copy_of_whole / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{name} is not as large as manifest.json says"):
        open_cache(copy_of_whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: "{", "holds no JSON object"),
        (lambda m: "[]", "holds no JSON object"),
        (lambda m: json.dumps({**m, "format": 2}), "has format 2, and this release reads 1; update dit_jax"),
        (lambda m: json.dumps({**m, "storage_dtype": 16}), "storage_dtype cannot be"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "vae"}), "vae.sha256"),
        (lambda m: json.dumps({**m, "data": {**m["data"], "records": [10**12]}}), "damaged"),
        (lambda m: json.dumps({**m, "records_per_shard": 0}), "damaged"),
        (lambda m: json.dumps({**m, "buckets": [32]}), "damaged"),
        (lambda m: json.dumps({**m, "storage_dtype": "object"}), "storage_dtype cannot be"),
        (lambda m: json.dumps({**m, "shards": None}), "shards cannot be"),
        (lambda m: json.dumps({**m, "shards": {}}), "damaged"),
        (lambda m: json.dumps({**m, "vae": {**m["vae"], "sha256": "0" * 64}}), "belongs to another cache"),
    ],
)
def test_a_damaged_manifest_ends_in_one_line(change, said, copy_of_whole):
    path = copy_of_whole / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DataError) as error:
        open_cache(copy_of_whole)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("", "records_per_shard", 0),
        ("", "captions_per_shard", -1),
        ("", "storage_dtype", "nonsense"),
        ("", "buckets", [[32, 32], [16], [64, 16, 8]]),
        ("", "buckets", [[32, 32]]),
        ("data", "records", ["x", 1, 2]),
        ("data", "captions", -1),
        ("vae", "factor", 0),
        ("vae", "channels", -3),
        ("text_encoder", "width", 0),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_values_that_no_cache_has_end_in_one_line(section, field, value, begun, copy_of_whole):
    """In `begun.json` as in the manifest, and whatever is done with it."""
    manifest = json.loads((copy_of_whole / "manifest.json").read_text())
    (manifest[section] if section else manifest)[field] = value
    (copy_of_whole / "manifest.json").unlink()
    name = "begun.json" if begun else "manifest.json"
    (copy_of_whole / name).write_text(json.dumps(manifest))
    made = made_once()
    for act in (
        open_cache,
        lambda folder: verify(folder, quiet),
        lambda folder: begin(folder, made.identity, made.table),
    ):
        with pytest.raises(DataError, match=rf"{name} is damaged: {f'{section}.' if section else ''}{field} cannot be"):
            act(copy_of_whole)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_does_not_let_be_read_is_neither_damaged_nor_made_again(number, copy_of_whole, monkeypatch):
    made, open_it = made_once(), Path.open
    shard = units(made.identity)[1].name

    def fail(path, *rest, **more):
        if path.name == refused:
            raise OSError(number, os.strerror(number))
        return open_it(path, *rest, **more)

    monkeypatch.setattr(Path, "open", fail)
    acts = {
        shard: [
            open_cache,
            lambda folder: missing(folder, made.identity),
            lambda folder: write(folder, made.identity, units(made.identity)[1], None),
            lambda folder: verify(folder, quiet),
        ],
        "table.safetensors": [open_cache, lambda folder: begin(folder, made.identity, made.table)],
        "manifest.json": [open_cache, lambda folder: begin(folder, made.identity, made.table)],
    }
    for refused, some in acts.items():  # noqa: B007
        for act in some:
            with pytest.raises(DataError, match=f"{refused} cannot be read: {os.strerror(number)}") as error:
                act(copy_of_whole)
            assert "delete" not in str(error.value)


def test_a_manifest_has_no_other_file_hashed(copy_of_whole, tmp_path):
    path = copy_of_whole / "manifest.json"
    manifest = json.loads(path.read_text())
    (tmp_path / "private").write_bytes(b"x" * 1000)
    manifest["shards"]["../private"] = {"bytes": 1000, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    said = []
    assert verify(copy_of_whole, lambda done, total: said.append(total)) == []
    assert said[0] == sum(known["bytes"] for name, known in manifest["shards"].items() if name != "../private")


def test_a_manifest_that_is_lost_is_made_again_from_the_shards(copy_of_whole, whole):
    (copy_of_whole / "manifest.json").unlink()
    made = made_once()
    begin(copy_of_whole, made.identity, made.table)
    assert missing(copy_of_whole, made.identity) == []
    finish(copy_of_whole, made.identity, quiet)
    assert contents(copy_of_whole) == whole[1]


def test_what_is_no_finished_cache_says_what_it_is(tmp_path):
    made = made_once()
    with pytest.raises(DataError, match="there is no cache"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no cache"):
        open_cache(tmp_path)
    begin(tmp_path, made.identity, made.table)
    write(tmp_path, made.identity, units(made.identity)[0], made.shard(units(made.identity)[0]))
    total = len(units(made.identity))
    with pytest.raises(
        DataError, match=f"unfinished cache, {total - 1} of {total} files are missing; the same .*precompute"
    ):
        open_cache(tmp_path)


def test_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    """Files of ten million records are more than the 1,024 that many systems allow at first."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    made = encoded(n=400, per_shard=(1, 50), buckets=((32, 32),))
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, hard))
    monkeypatch.setattr(cache_files, "RESERVE", in_use + 50)
    try:
        assert len(made.on_disk(tmp_path)) == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_goes_through_an_order_of_samples():
    """Bad records are never gathered where the order's stand-ins are."""
    made = encoded(n=120)
    cache = made.in_memory()
    order = make_order(cache.parts, cache.bucket, 4, 0)
    used = order.stand_ins(cache.bad)
    assert not cache.bad[used].any()
    for step in range(40):
        index = used[order.indices(np.arange(4 * step, 4 * step + 4))]
        words, flips = np.full(4, step, np.uint64), np.zeros(4, bool)
        assert_equal(cache.gather(index, words, flips), made.batch(index, words, flips, cache.longest))
