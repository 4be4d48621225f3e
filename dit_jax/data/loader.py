"""Raw batches as a function of the step: pictures cut to shape, with their captions.

`dit_jax.data.order` says which record each sample is; here it is read, or its stand-in where it is bad, cut, mirrored
and given one of its captions. Sample k is a function of k and the seed alone, so that stopping, resuming, and the
number of threads or processes that read (`dit_jax.data.ahead`), or of processes that share a batch (`Rows`), never
change what is trained on.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dit_jax.data.ahead import in_processes, in_threads
from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.order import Order, caption_words, crop_place, is_mirrored
from dit_jax.data.sources.records import BadRecord, Record, Source
from dit_jax.data.transforms import cut, mirror
from dit_jax.errors import DataError

Tokenize = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # ids int32 [B, S], mask bool [B, S]
RawBatch = dict[str, np.ndarray]  # its keys: see dit_jax.arrays
Scanned = dict[str, Any]  # its keys: see `scan`
Result = TypeVar("Result")


class Reading(NamedTuple):
    """What was read for an index: a record, the record's own index, and what it replaced, if anything."""

    record: Record
    used: int
    replaced: Replaced | None


def read(source: Source, order: Order, index: int) -> Reading:
    """Reads a record, or its stand-in where it is bad.

    Raises:
      DataError: the record and all of its stand-ins are bad.
    """
    try:
        return Reading(source[index], index, None)
    except BadRecord as error:
        bad = error
    for other in order.replacements(index):
        with contextlib.suppress(BadRecord):
            record = source[other]
            return Reading(record, other, Replaced(bad.id, bad.reason, record.id))
    raise DataError(f"{source.name}: {bad}, and no usable record was found in its place among {len(source)}")


class Sample(NamedTuple):
    """A picture cut to shape, its caption, and where both come from."""

    image: np.ndarray  # uint8 [height, width, 3]
    caption: str
    due: int  # index of the record whose turn it is
    used: int  # index of the record that was read
    replaced: Replaced | None


@dataclass(frozen=True)
class Samples:
    """The endless sequence of a run's samples: ``samples[k]`` is a pure function of k.

    Attributes:
      source: the records.
      order: which of them comes when.
      seed: of flips, crops and captions.
      shapes: height and width of the pictures of each bucket.
      random_crop: cut at a random place; else at the centre.
      flip: mirror half of the samples.
    """

    source: Source
    order: Order
    seed: int
    shapes: Sequence[tuple[int, int]]
    random_crop: bool
    flip: bool

    def __getitem__(self, k: int) -> Sample:
        position = np.array([k], np.int64)
        index = int(self.order.indices(position)[0])
        record, used, replaced = read(self.source, self.order, index)
        height, width = self.shapes[self.order.bucket(k // self.order.batch_size)]
        across, down = crop_place(k, self.seed) if self.random_crop else (0.5, 0.5)
        image = cut(record.image, height, width, across, down)
        if self.flip and is_mirrored(position, self.seed)[0]:
            image = mirror(image)
        word = int(caption_words(position, self.seed)[0])
        return Sample(image, record.captions[word % len(record.captions)], index, used, replaced)


@dataclass(frozen=True)
class Rows:
    """The same rows of every batch, one batch after the other: what one of several processes reads.

    Attributes:
      samples: of whole batches.
      first_step: where they begin.
      rows: of a batch, in [0, B).
    """

    samples: Samples
    first_step: int
    rows: range

    def __getitem__(self, j: int) -> Sample:
        step, row = divmod(j, len(self.rows))
        return self.samples[(self.first_step + step) * self.samples.order.batch_size + self.rows[row]]


def batches(
    samples: Samples,
    tokenize: Tokenize,
    bad_records: BadRecords,
    first_step: int,
    last_step: int,
    rows: range,
    threads: int,
    workers: int,
    patience: float,
) -> Generator[RawBatch, None, None]:
    """Yields rows of the raw batches of steps ``first_step`` to ``last_step - 1``, each of one bucket.

    Args:
      samples: what to train on.
      tokenize: captions -> ids, mask; called here, not in the threads: tokenizers need not be thread-safe.
      bad_records: notes the records that were replaced.
      first_step: where the run starts or resumes.
      last_step: where it ends; nothing is read past it.
      rows: of every batch, those that are wanted; no others are read.
      threads: that read ahead, in each process; 0 reads when asked.
      workers: processes that read ahead, two batches in all; 0 reads in this one.
      patience: seconds to wait for a sample, 0 for ever.

    Raises:
      DataError: too many bad records, nothing came, or a worker process died.
    """
    size, wanted = len(rows), Rows(samples, first_step, rows)
    places = range((last_step - first_step) * size)
    stream = _read_ahead(wanted.__getitem__, places, 2 * size, threads, workers, patience, samples.source.name)
    with contextlib.closing(stream):
        while chunk := list(itertools.islice(stream, size)):
            for sample in chunk:
                if sample.replaced:
                    bad_records.add(sample.due, sample.replaced)
            ids, mask = tokenize([sample.caption for sample in chunk])
            yield {
                "image": np.stack([sample.image for sample in chunk]),
                "ids": np.asarray(ids, np.int32),
                "mask": np.asarray(mask, bool),
                "index": np.array([sample.used for sample in chunk], np.int64),
            }


# --- every record once --------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A record's picture, or why there is none."""

    image: np.ndarray  # uint8 [height, width, 3], zeros where there is none
    problem: BadRecord | None


def read_picture(source: Source, height: int, width: int, index: int) -> Picture:
    """The picture of a record, cut at the centre; its stand-in is somebody else's business."""
    try:
        image = source[int(index)].image
    except BadRecord as error:
        return Picture(np.zeros((height, width, 3), np.uint8), error)
    return Picture(cut(image, height, width, 0.5, 0.5), None)


def scan(
    source: Source,
    indices: np.ndarray,
    height: int,
    width: int,
    chunk_sizes: Sequence[int],
    threads: int,
    workers: int,
    patience: float,
) -> Generator[Scanned, None, None]:
    """Yields the pictures of some records in order, for encoders that run once; bad ones are not replaced.

    Args:
      source: the records.
      indices: int64, which of them.
      height, width: what they are cut to, at the centre.
      chunk_sizes: pictures in one chunk after the other, all of them together.
      threads, workers, patience: as of `batches`.

    Yields:
      ``image``: uint8 ``[b, height, width, 3]``, zeros where the record is bad.
      ``index``: int64 ``[b]``, of the records.
      ``problems``: the `BadRecord` of each, None where nothing is wrong with it.
    """
    picture = functools.partial(read_picture, source, height, width)
    buffer = 2 * max(chunk_sizes, default=0)
    stream = _read_ahead(picture, indices, buffer, threads, workers, patience, source.name)
    with contextlib.closing(stream):
        for last, size in zip(itertools.accumulate(chunk_sizes), chunk_sizes, strict=True):
            chunk = list(itertools.islice(stream, size))
            yield {
                "image": np.stack([picture.image for picture in chunk]),
                "index": np.array(indices[last - size : last], np.int64),
                "problems": [picture.problem for picture in chunk],
            }


def _read_ahead(
    make: Callable[[int], Result],
    positions: range | np.ndarray,
    buffer: int,
    threads: int,
    workers: int,
    patience: float,
    name: str,
) -> Generator[Result, None, None]:
    """``make`` of every position in order, ``buffer`` of them ahead."""
    what = f"reading {name}"
    if workers:
        share = -(-buffer // workers)
        return in_processes(make, positions, workers, threads, max(share, threads), patience, what)
    return in_threads(make, positions, threads, max(buffer, threads), patience, what)
