"""Which record each sample of a run is: a pure function of its position.

Records lie in parts, the sources of a mixture, which are drawn by weight. Where pictures keep their aspect ratio they
lie in buckets besides, and a batch comes from one bucket. So the records of a source in a bucket are a cell, with an
order of its own. For a run with batches of B samples:

    k        = step * B + i                   sample i of a step, counted over the whole run              (1)
    b, s     = plan(step)                     the bucket of a step, and how many of its steps came before (2)
    q        = s * B + i                      position among the samples of the bucket                    (3)
    p, r     = plan_b(q)                      the part of the sample, how many of the cell came before    (4)
    epoch, j = divmod(r, n)                   every record of the cell once per epoch                     (5)
    index    = records[permutation(epoch)[j]]                                                             (6)

With one bucket q is k, so that a batch may cross epochs and its size only regroups; with one part r is q. A plan is
computed once: a cycle of L slots, of which part p has c_p, its share of L rounded, but one at least. Slot j of a part
lies at a random place in the j-th of c_p equal stretches of the cycle,

    time(p, j) = (j + u) / c_p,  u in [0, 1)  slots are sorted by their time                              (7)
    plan(t)    = p, (t div L) * c_p + j       where slot t mod L is the j-th of part p                    (8)

so that any stretch of the run holds about its share of every part. What a part gets differs from its share by one of L
slots at most: a record that is alone in its part or bucket comes as often as one of a million would. Only the largest
part gives more, one slot for each part that is too small to have earned its own.

A record that cannot be used is replaced by another of its cell, drawn from its index alone, so positions never shift.
Where the whole cell is bad another of the bucket stands in, whose picture has the same shape, and where the bucket is,
any other: its picture is cut to the shape that is due. One bad record, alone in its bucket, must not end a run.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from dit_jax.errors import DataError

SLOTS = 2**20  # L: fine enough for any weight that people type, and a plan still costs a tenth of a second

# How often a stand-in is drawn anew. With half of the records bad, all draws fail once in 2**100.
ATTEMPTS = 100


# --- randomness ---------------------------------------------------------------------------------------------


class Purpose(IntEnum):
    """What random words are for, so that no two uses share them."""

    ORDER = 1
    REPLACEMENT = 2
    MIRROR = 3
    CROP = 4
    CAPTION = 5
    PLAN = 6


def random_words(count: int, seed: int, purpose: Purpose, *numbers: int) -> np.ndarray:
    """Random uint64 ``[count]`` that depend on the arguments alone.

    Raw words of the bit generator, because numpy promises to keep their stream (NEP 19). What
    ``Generator.permutation`` makes of them may change between releases, and a resumed run with it.
    """
    return np.random.PCG64(np.random.SeedSequence([seed, purpose, *numbers])).random_raw(count)


def words_at(k: np.ndarray, seed: int, purpose: Purpose) -> np.ndarray:
    """Words number ``k`` of the stream of a seed and a purpose.

    Args:
      k: int64 ``[m]``, 0 or more; cheap where they follow each other, as the positions of a batch do.
      seed: of the run.
      purpose: what they are for.

    Returns:
      uint64 ``[m]``.
    """
    words = np.empty(len(k), np.uint64)
    for run in _runs(k - np.arange(len(k))):
        stream = np.random.PCG64(np.random.SeedSequence([seed, purpose])).advance(int(k[run.start]))
        words[run] = stream.random_raw(run.stop - run.start)
    return words


def _runs(values: np.ndarray) -> list[slice]:
    """Cuts ``[m]`` values into stretches of equal ones."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [slice(*edge) for edge in itertools.pairwise(edges)] if len(values) else []


def is_mirrored(k: np.ndarray, seed: int) -> np.ndarray:
    """Whether samples ``k`` (int64 ``[m]``) are flipped left and right, where flips are on: bool ``[m]``."""
    return words_at(k, seed, Purpose.MIRROR) >> np.uint64(63) == 1


def caption_words(k: np.ndarray, seed: int) -> np.ndarray:
    """A word per sample, uint64 ``[m]``; of a record's c captions number ``word % c`` is taken."""
    return words_at(k, seed, Purpose.CAPTION)


def crop_place(k: int, seed: int) -> tuple[float, float]:
    """Where sample ``k`` is cropped, if random crops are on: ``across`` and ``down`` of `transforms.cut`."""
    across, down = _uniform(words_at(np.arange(2 * k, 2 * k + 2), seed, Purpose.CROP))
    return float(across), float(down)


def _uniform(words: np.ndarray) -> np.ndarray:
    """Words as numbers in [0, 1): a float has 53 bits."""
    return (words >> np.uint64(11)) * 2.0**-53


def permutation(epoch: int, seed: int, n: int, cell: int) -> np.ndarray:
    """The order of the ``n`` records of a cell in an epoch, unsigned integers ``[n]``."""
    order = np.argsort(random_words(n, seed, Purpose.ORDER, epoch, cell), kind="stable")
    return order.astype(np.min_scalar_type(n))  # half as much memory


# --- order --------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Records that are drawn with one weight.

    Attributes:
      records: int64 ``[n]``, ascending; one at least.
      weight: above zero; only ratios count.
    """

    records: np.ndarray
    weight: float


class Order:
    """The endless order of a run's samples.

    Args:
      parts: of every bucket; a bucket without records has none. No record is in two of them.
      batch_size: samples per step, all from one bucket.
      seed: of the run.

    Attributes:
      used: numbers of the buckets that batches come from.
    """

    def __init__(self, parts: Sequence[Sequence[Part]], batch_size: int, seed: int):
        self.parts, self.batch_size, self.seed = parts, batch_size, seed
        self.used = tuple(b for b, here in enumerate(parts) if here)
        self._cells = [
            [_Cell(part.records, seed, (b << 16) + p) for p, part in enumerate(here)] for b, here in enumerate(parts)
        ]
        self._plan = _Plan([sum(part.weight for part in here) for here in parts], seed, 0)
        self._plans = [_Plan([part.weight for part in here], seed, 1 + b) for b, here in enumerate(parts)]

    def __reduce__(self) -> tuple:
        return Order, (self.parts, self.batch_size, self.seed)  # plans and permutations are quicker made than sent

    def bucket(self, step: int) -> int:
        """The bucket that the batch of a step comes from, equation (2)."""
        return int(self._plan.place(np.array(step, np.int64))[0])

    def indices(self, k: np.ndarray) -> np.ndarray:
        """Which record each sample of the run is, before any replacement: equations (1) to (6).

        Args:
          k: int64, positions of samples in the run.

        Returns:
          int64, indices of records, with the shape of ``k``.
        """
        steps, i = np.divmod(np.ravel(k), self.batch_size)
        buckets, before = self._plan.place(steps)
        positions = before * self.batch_size + i
        index = np.empty_like(positions)
        for bucket in np.unique(buckets):
            in_bucket = np.flatnonzero(buckets == bucket)
            parts, places = self._plans[bucket].place(positions[in_bucket])
            for part in np.unique(parts):
                here = parts == part
                index[in_bucket[here]] = self._cells[bucket][part].at(places[here])
        return index.reshape(np.shape(k))

    def replacements(self, index: int) -> Iterator[int]:
        """The records that are tried in the place of one that is bad, in order; they depend on ``index`` alone.

        Others of its cell, then others of its bucket, then any others. Some may come more than once.
        """
        bucket, mine, place = self._find(index)
        n = len(mine.records)
        for attempt in range(ATTEMPTS if n > 1 else 0):
            yield int(mine.records[(place + 1 + self._draw(index, attempt, n - 1)) % n])
        near = [cell.records for cell in self._cells[bucket] if cell is not mine]
        far = [cell.records for cells in self._cells for cell in cells if cells is not self._cells[bucket]]
        for stage, others in enumerate((near, far), start=1):
            starts = np.cumsum([0, *map(len, others)])
            for attempt in range(ATTEMPTS if others else 0):
                drawn = self._draw(index, stage * ATTEMPTS + attempt, int(starts[-1]))
                which = int(np.searchsorted(starts, drawn, side="right")) - 1
                yield int(others[which][drawn - starts[which]])

    def _draw(self, index: int, attempt: int, below: int) -> int:
        return int(random_words(1, self.seed, Purpose.REPLACEMENT, index, attempt)[0]) % below

    def _find(self, index: int) -> tuple[int, "_Cell", int]:
        """The bucket and the cell of a record, and its place there."""
        for bucket, cells in enumerate(self._cells):
            for cell in cells:
                place = int(np.searchsorted(cell.records, index))
                if place < len(cell.records) and cell.records[place] == index:
                    return bucket, cell, place
        raise IndexError(f"record {index} is in no part")

    def without(self, bad: np.ndarray) -> "Order":
        """The order of a run that knows which records are bad, bool ``[n]``: buckets that are all bad never come.

        Raises:
          DataError: there is no other bucket.
        """
        parts = [here if any(not bad[part.records].all() for part in here) else [] for here in self.parts]
        if not any(parts):
            raise DataError(f"all {len(bad)} records are bad")
        return self if len(self.used) == sum(map(bool, parts)) else Order(parts, self.batch_size, self.seed)

    def stand_ins(self, bad: np.ndarray) -> np.ndarray:
        """For every record the one that is used when its turn comes, where it is known which are bad.

        Args:
          bad: bool ``[n]``.

        Returns:
          int64 ``[n]``: itself, or the first of its replacements that is not bad; it has the same shape.

        Raises:
          DataError: there is none.
        """
        used = np.arange(len(bad))
        for bucket in self.used:
            here = np.concatenate([part.records for part in self.parts[bucket]])
            for index in here[bad[here]].tolist():
                used[index] = next((other for other in self.replacements(index) if not bad[other]), index)
                if bad[used[index]] or self._find(used[index])[0] != bucket:
                    raise DataError(f"record {index} cannot be used, and no usable record of its shape was found")
        return used


class _Plan:
    """An endless sequence of parts in which each has its share, equations (7) and (8).

    Args:
      weights: of the parts; one of zero never comes.
      seed: of the run.
      number: tells the plans of a run apart.
    """

    def __init__(self, weights: Sequence[float], seed: int, number: int):
        self._counts = _slots(np.array(weights))
        j = np.concatenate([np.arange(count) for count in (0, *self._counts)])
        parts = np.repeat(np.arange(len(weights)), self._counts)
        time = (j + _uniform(random_words(len(j), seed, Purpose.PLAN, number))) / self._counts[parts]
        order = np.argsort(time, kind="stable")
        self._parts = parts[order].astype(np.int16)
        self._before = j[order].astype(np.int32)

    def place(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part at each place ``t`` of the sequence, and how often it came before."""
        cycle, slot = np.divmod(t, len(self._parts))
        part = self._parts[slot]
        return part, cycle * self._counts[part] + self._before[slot]


def _slots(weights: np.ndarray) -> np.ndarray:
    """How many slots of a cycle each part has: int64, with a sum of SLOTS, or one slot where there is one part."""
    used = weights > 0
    if used.sum() <= 1:
        return used.astype(np.int64)
    edges = np.rint(np.cumsum(weights) / weights.sum() * SLOTS).astype(np.int64)
    counts = np.diff(edges, prepend=0)
    missing = used & (counts == 0)
    counts[missing] = 1
    counts[np.argmax(counts)] -= missing.sum()
    return counts


class _Cell:
    """Records in an order that is new in every epoch, equations (5) and (6)."""

    def __init__(self, records: np.ndarray, seed: int, number: int):
        self.records, self._seed, self._number = records, seed, number
        self._epochs: dict[int, np.ndarray] = {}
        self._one = threading.Lock()  # who reads ahead comes with many threads, and a permutation can be large

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The records at some positions of the endless order."""
        epochs, places = np.divmod(positions, len(self.records))
        index = np.empty_like(places)
        for run in _runs(epochs):
            index[run] = self.records[self._permutation(int(epochs[run.start]))[places[run]]]
        return index

    def _permutation(self, epoch: int) -> np.ndarray:
        with self._one:
            if epoch not in self._epochs:
                while len(self._epochs) > 1:  # two are kept: reading ahead crosses the edge before training does
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = permutation(epoch, self._seed, len(self.records), self._number)
            return self._epochs[epoch]


def make_order(parts: Sequence[tuple[int, float]], bucket: np.ndarray | None, batch_size: int, seed: int) -> Order:
    """The order of the records of one source or several.

    A source's share is split over the buckets as its records are: a cell with n_b of its n records has the weight
    ``weight * n_b / n``, so that all records of a source come equally often.

    Args:
      parts: number of records and weight of each source; records are counted from the first to the last.
      bucket: of every record, integers ``[n]``; None where all pictures have one shape.
      batch_size: samples per step.
      seed: of the run.

    Raises:
      DataError: a source without records.
    """
    cells: list[list[Part]] = [[] for _ in range(1 if bucket is None else int(np.max(bucket, initial=0)) + 1)]
    start = 0
    for number, (n, weight) in enumerate(parts, start=1):
        if n == 0:
            raise DataError(f"source {number} of {len(parts)} in data.source holds no records")
        here = np.zeros(n, np.uint8) if bucket is None else bucket[start : start + n]
        for b in np.flatnonzero(np.bincount(here)).tolist():
            records = start + np.flatnonzero(here == b)
            cells[b].append(Part(records, weight * len(records) / n))
        start += n
    return Order(cells, batch_size, seed)
