"""Which record comes when: raw batches as a pure function of the global step.

The k-th sample of a run over a source of n records is found from k alone, so that stopping, resuming, and the
number of threads or processes that read never change what is trained on:

    k        = step * batch_size + i               sample i of a step, counted over the whole run  (1)
    epoch, j = divmod(k, n)                        every record once per epoch; a batch may cross  (2)
    index    = permutation(epoch, seed, n)[j]                                                      (3)
    index    = replacement(index, attempt, ...)    while that record is bad; k never shifts        (4)

Whether sample k is mirrored and where it is cropped are functions of (seed, k) as well. Grain computes
samples ahead of their use; it keeps no state that a checkpoint would need.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from absl import flags

from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.sources import BadRecord, Record, Source
from dit_jax.data.transforms import cut, mirror
from dit_jax.errors import DataError

Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # ids int32 [B, S], mask bool [B, S]
RawBatch = dict[str, np.ndarray]  # its keys: see dit_jax.arrays

# How often a stand-in is drawn anew. With half of the records bad, all draws fail once in 2**100.
ATTEMPTS = 100


# --- order and randomness -----------------------------------------------------------------------------------


class Purpose(IntEnum):
    """What random words are for, so that no two uses share them."""

    ORDER = 1
    REPLACEMENT = 2
    MIRROR = 3
    CROP = 4


def random_words(count: int, seed: int, purpose: Purpose, *numbers: int) -> np.ndarray:
    """Random uint64 ``[count]`` that depend on the arguments alone.

    Raw words of the bit generator, because numpy promises to keep their stream (NEP 19). What
    ``Generator.permutation`` makes of them may change between releases, and a resumed run with it.
    """
    return np.random.PCG64(np.random.SeedSequence([seed, purpose, *numbers])).random_raw(count)


# Two epochs of two sources are kept: reading ahead crosses the edge of an epoch before training does.
@functools.lru_cache(maxsize=4)
def permutation(epoch: int, seed: int, n: int) -> np.ndarray:
    """The order of the records in an epoch, int64 ``[n]``, read-only."""
    order = np.argsort(random_words(n, seed, Purpose.ORDER, epoch), kind="stable")
    order.flags.writeable = False
    return order


def position_to_index(k: np.ndarray | int, n: int, seed: int) -> np.ndarray:
    """Which record each sample of the run is, equations (2) and (3).

    Args:
      k: positions of samples in the run, integers of any shape.
      n: number of records in the source.
      seed: of the data order.

    Returns:
      int64 record indices with the shape of ``k``.
    """
    epochs, places = np.divmod(np.asarray(k, np.int64), n)
    index = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index[here] = permutation(int(epoch), seed, n)[places[here]]
    return index


def replacement(index: int, attempt: int, n: int, seed: int) -> int:
    """The record that stands in for a bad one, equation (4): never ``index`` itself; needs ``n`` > 1."""
    word = random_words(1, seed, Purpose.REPLACEMENT, index, attempt)[0]
    return (index + 1 + int(word) % (n - 1)) % n


def is_mirrored(k: int, seed: int) -> bool:
    """Whether sample ``k`` is flipped left and right, where flips are on."""
    return bool(random_words(1, seed, Purpose.MIRROR, k)[0] >> 63)


def crop_place(k: int, seed: int) -> tuple[float, float]:
    """Where sample ``k`` is cropped, if random crops are on: ``across`` and ``down`` of `transforms.cut`."""
    across, down = (random_words(2, seed, Purpose.CROP, k) >> 11) * 2.0**-53  # 53 bits: a float in [0, 1)
    return float(across), float(down)


# --- samples and batches ------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What was read for an index: a record, the record's own index, and what it replaced, if anything."""

    record: Record
    used: int
    replaced: Replaced | None


def read(source: Source, index: int, seed: int) -> Reading:
    """Reads a record, or its stand-in where it is bad; which one depends on ``index`` and ``seed`` alone.

    Raises:
      DataError: the record and all of its stand-ins are bad.
    """
    try:
        return Reading(source[index], index, None)
    except BadRecord as error:
        bad = error
    n = len(source)
    for attempt in range(ATTEMPTS if n > 1 else 0):
        other = replacement(index, attempt, n, seed)
        with contextlib.suppress(BadRecord):
            record = source[other]
            return Reading(record, other, Replaced(bad.id, bad.reason, record.id))
    raise DataError(f"{source.name}: {bad}, and no usable record was found in its place among {n}")


class Sample(NamedTuple):
    """A picture cut to size, its caption, and where both come from."""

    image: np.ndarray  # uint8 [size, size, 3]
    caption: str
    due: int  # index of the record whose turn it is
    used: int  # index of the record that was read
    replaced: Replaced | None


@dataclass(frozen=True)
class Samples:
    """The endless sequence of a run's samples: ``samples[k]`` is a pure function of k.

    Attributes:
      source: the records.
      seed: of order, replacements, flips and crops.
      image_size: side of the pictures, in pixels.
      random_crop: cut at a random place; else at the centre.
      flip: mirror half of the samples.

    Raises:
      DataError: the source is empty.
    """

    source: Source
    seed: int
    image_size: int
    random_crop: bool
    flip: bool

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise DataError(f"{self.source.name} holds no records")

    def __getitem__(self, k: int) -> Sample:
        index = int(position_to_index(k, len(self.source), self.seed))
        record, used, replaced = read(self.source, index, self.seed)
        across, down = crop_place(k, self.seed) if self.random_crop else (0.5, 0.5)
        image = cut(record.image, self.image_size, across, down)
        if self.flip and is_mirrored(k, self.seed):
            image = mirror(image)
        return Sample(image, record.captions[0], index, used, replaced)


def batches(
    samples: Samples,
    tokenize: Tokenize,
    bad_records: BadRecords,
    batch_size: int,
    first_step: int,
    last_step: int,
    threads: int,
    workers: int,
) -> Generator[RawBatch, None, None]:
    """Yields the raw batches of steps ``first_step`` to ``last_step - 1``.

    Args:
      samples: what to train on.
      tokenize: captions -> ids, mask; called here, not in the threads: tokenizers need not be thread-safe.
      bad_records: notes the records that were replaced.
      batch_size: samples per step.
      first_step: where the run starts or resumes.
      last_step: where it ends; nothing is read past it.
      threads: that read ahead, in each process; 0 reads when asked.
      workers: processes that read ahead, sharing ``2 * batch_size`` samples in /dev/shm; 0 reads in this one.

    Raises:
      DataError: too many bad records.
    """
    first, last = first_step * batch_size, last_step * batch_size
    stream = _ahead(samples.__getitem__, first, last, 2 * batch_size, threads, workers)
    with contextlib.closing(stream):
        while chunk := list(itertools.islice(stream, batch_size)):
            yield _collate(chunk, tokenize, bad_records)


def scan(
    source: Source,
    tokenize: Tokenize,
    bad_records: BadRecords,
    chunk_size: int,
    seed: int,
    image_size: int,
    threads: int,
    workers: int,
) -> Generator[RawBatch, None, None]:
    """Yields every record once, in order, for encoders that run once.

    Row i of all chunks together is what a sample whose position falls on record i looks like, cropped at the
    centre and not mirrored. ``index`` differs from i where record i is bad: it is the stand-in that `batches`
    takes with the same seed.

    Args and errors are those of `batches` and `Samples`; the last chunk may be shorter than ``chunk_size``.
    """

    def sample(index: int) -> Sample:
        record, used, replaced = read(source, index, seed)
        return Sample(cut(record.image, image_size, 0.5, 0.5), record.captions[0], index, used, replaced)

    stream = _ahead(sample, 0, len(source), 2 * chunk_size, threads, workers)
    with contextlib.closing(stream):
        while chunk := list(itertools.islice(stream, chunk_size)):
            yield _collate(chunk, tokenize, bad_records)


def _collate(chunk: list[Sample], tokenize: Tokenize, bad_records: BadRecords) -> RawBatch:
    for sample in chunk:
        if sample.replaced:
            bad_records.add(sample.due, sample.replaced)
    ids, mask = tokenize([sample.caption for sample in chunk])
    return {
        "image": np.stack([sample.image for sample in chunk]),
        "ids": np.asarray(ids, np.int32),
        "mask": np.asarray(mask, bool),
        "index": np.array([sample.used for sample in chunk], np.int64),
    }


def _ahead(
    sample: Callable[[int], Sample], first: int, last: int, buffer: int, threads: int, workers: int
) -> Generator[Sample, None, None]:
    """Yields ``sample(first)`` to ``sample(last - 1)`` in order, computed ahead by threads and processes."""
    if first >= last:
        return
    import grain  # here, because it brings jax along, which this room does without

    share = -(-buffer // max(workers, 1))  # of each process
    options = grain.ReadOptions(threads, prefetch_buffer_size=max(share, threads) if threads else 0)
    dataset = grain.MapDataset.range(first, last).map(sample).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; Grain asks for one of its flags
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=share))
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()
