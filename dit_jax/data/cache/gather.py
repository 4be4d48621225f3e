"""Encoded records, and batches gathered from them.

The frozen encoders give the same numbers for a record at every epoch, so they run once, and training reads what they
gave from here: a `Cache`, in memory or mapped from the files of `dit_jax.data.cache.files`. In a numbering of the rows
of all shards of pictures that leaves a gap behind the last shard of every bucket, record i is at

    slot(i)    = first_shard(bucket(i)) * records_per_shard + number of records before i in its bucket     (1)
    shard, row = divmod(slot(i), records_per_shard)                                                        (2)

A batch pads its text with zeros to the longest caption of the cache.
"""

import collections
import math
import mmap
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dit_jax.data.cache.parts import Identity, Pictures, Table, Texts, differences
from dit_jax.data.cache.tensor_files import pages_of
from dit_jax.data.sources.records import fingerprint_of_choice, fingerprint_of_mixture
from dit_jax.errors import DataError
from dit_jax.files import flatten

Batch = dict[str, np.ndarray]  # an encoded batch, see dit_jax.arrays

# What two caches that are joined may differ in: what people call things, how shards are cut, and whether there are
# mirror images, which are then left alone, as a mixture of their sources would have it.
FREE = ("data.", "vae.name", "text_encoder.name", "records_per_shard", "captions_per_shard", "mirrored")
BITS = np.uint16  # bfloat16 by its bits: numpy copies these without asking another library
CHUNK = 65_536  # records that are looked up at a time where all are
IDLE = 8  # batches of a shape whose memory is kept
ALIGNED = 64  # bytes at which arrays of a batch begin, as devices like it


# --- one cache ----------------------------------------------------------------------------------------------


class _Store:
    """All shards of one cache, and where in them a record is."""

    def __init__(self, identity: Identity, table: Table, pictures: list[Pictures], texts: list[Texts]):
        self.identity, self.table = identity, table
        self._moments = [shard.moments for shard in pictures]
        self._texts = [(shard.offsets, shard.hidden.view(BITS), shard.pooled.view(BITS)) for shard in texts]
        self._picture_pages = [pages_of(shard.moments, 2) for shard in pictures]
        self._text_pages = [(pages_of(shard.hidden, 1), pages_of(shard.pooled, 1)) for shard in texts]
        # as many as there are at most, so that a number without bound makes no array of its size
        self._per_shard = tuple(
            max(1, min(identity[f"{name}_per_shard"], count))
            for name, count in (("records", len(table.bucket)), ("captions", len(table.captions)))
        )
        self._slot = _slots(table.bucket, self._per_shard[0])
        self.bad = np.zeros(len(pictures) * self._per_shard[0], bool)
        for number, shard in enumerate(pictures):
            self.bad[number * self._per_shard[0] :][: len(shard.bad)] = shard.bad
        self.bad = self.bad[self._slot]
        self.longest = max((int(np.diff(shard.offsets).max()) for shard in texts), default=0)

    def __len__(self) -> int:
        return len(self.table.bucket)

    def captions_of(self, index: int) -> tuple[str, ...]:
        """All captions of a record."""
        begin, end = self.table.first[index : index + 2]
        return tuple(self.table.captions[i] for i in self.table.caption_of[begin:end].tolist())

    def captions_of_length(self, tokens: int) -> tuple[int, str]:
        """How many distinct captions have so many tokens, and the first of them."""
        lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in self._texts])
        numbers = np.flatnonzero(lengths == tokens)
        return len(numbers), self.table.captions[int(numbers[0])] if len(numbers) else ""

    def fill(self, rows: np.ndarray, index: np.ndarray, words: np.ndarray, sides: np.ndarray, room: "_Room") -> None:
        """Copy records into some rows of a batch."""
        begin, end = self.table.first[index], self.table.first[index + 1]
        caption = self.table.caption_of[begin + (words % (end - begin).astype(np.uint64)).astype(np.int64)]
        picture_places = np.divmod(self._slot[index], self._per_shard[0])
        text_places = np.divmod(caption, self._per_shard[1])
        moments, hidden, pooled, tokens = room
        columns = (rows, tokens[rows], *picture_places, sides, *text_places)
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        spans = [self._texts[shard][0][text : text + 2].tolist() for *_, shard, text in places]
        self._ask_for(places, spans)
        for (i, before, shard, row, side, text_shard, text), (first, last) in zip(places, spans, strict=True):
            moments[:, i] = self._moments[shard][row, side]
            _, all_hidden, all_pooled = self._texts[text_shard]
            hidden[i, : last - first] = all_hidden[first:last]
            hidden[i, last - first : before] = 0
            pooled[i] = all_pooled[text]
            tokens[i] = last - first

    def _ask_for(self, places: list[tuple[int, ...]], spans: list[list[int]]) -> None:
        """Have the disk look for all that a batch needs at once."""
        sides = 1 + self.identity["mirrored"]
        for (_, _, shard, row, side, text_shard, text), (first, last) in zip(places, spans, strict=True):
            if pictures := self._picture_pages[shard]:
                pictures.ask_for(row * sides + side, row * sides + side + 1)
            hidden, pooled = self._text_pages[text_shard]
            if hidden and pooled:
                hidden.ask_for(first, last)
                pooled.ask_for(text, text + 1)


def _slots(bucket: np.ndarray, per_shard: int) -> np.ndarray:
    """Equation (1) for every record, int64 ``[n]``."""
    counts = np.bincount(bucket)
    first_slot = np.cumsum(-(-counts // per_shard)) - -(-counts // per_shard)
    by_bucket = np.argsort(bucket, kind="stable")
    slots = np.empty(len(bucket), np.int64)
    shift = first_slot * per_shard - (np.cumsum(counts) - counts)  # from place in by_bucket to slot
    slots[by_bucket] = np.arange(len(bucket)) + shift[bucket[by_bucket]]
    return slots


class _Room(NamedTuple):
    """The arrays of a batch, text as bits.

    Attributes:
      moments: ``[2, B, h, w, C]``.
      hidden: ``[B, S, E]``, zero from ``tokens`` on.
      pooled: ``[B, P]``.
      tokens: int64 ``[B]``.
    """

    moments: np.ndarray
    hidden: np.ndarray
    pooled: np.ndarray
    tokens: np.ndarray


class _Rooms:
    """Memory for batches of one shape. What nobody looks at any more is used again.

    New memory costs several times what is copied into it, because the system clears it page by page, for one thread
    at a time.

    Args:
      arrays: type and shape of the arrays of a `_Room`.
      most: how many may lie idle.
    """

    def __init__(self, arrays: Sequence[tuple[Any, tuple[int, ...]]], most: int):
        self._arrays = [(np.dtype(dtype), shape) for dtype, shape in arrays]
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self._arrays]
        self._ends = np.cumsum([-(-size // ALIGNED) * ALIGNED for size in sizes]).tolist()
        self._idle: collections.deque[mmap.mmap] = collections.deque(maxlen=most)

    def take(self) -> _Room:
        """A room; all zero, or as it was left."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = mmap.mmap(-1, self._ends[-1], access=mmap.ACCESS_COPY)  # private to this process
        whole = np.ndarray(self._ends[-1], np.uint8, memory)
        weakref.finalize(whole, self._idle.append, memory).atexit = False  # all views below keep it alive
        places = zip([0, *self._ends], self._arrays, strict=False)
        return _Room(*(np.ndarray(shape, dtype, whole, begin) for begin, (dtype, shape) in places))


class Cache:
    """n encoded records: all of one cache, some of them, or those of several.

    `in_memory` and `dit_jax.data.cache.files.open_cache` make one. Threads may gather from it at the same time.

    Attributes:
      identity: what it was made from; of several caches, that of the first, ``mirrored`` if all are.
      parts: number of records and weight of each of the caches that were joined; one where none were.
      bad: bool ``[n]``, records that cannot be used.
      bucket: uint8 ``[n]``, which of ``shapes`` a picture has.
      shapes: (height, width) of the pictures of every bucket, in pixels.
      mirrored: whether mirror images of all records are kept too.
      longest: S of every batch, the tokens of the longest caption.
    """

    def __init__(
        self, stores: Sequence[_Store], chosen: np.ndarray, parts: Sequence[tuple[int, float]], fingerprint: str
    ):
        self._stores, self._chosen, self._fingerprint = list(stores), chosen, fingerprint
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self.parts = list(parts)
        mirrored = all(store.identity["mirrored"] for store in stores)
        self.identity: Identity = stores[0].identity | {"mirrored": mirrored}
        self.bad = np.concatenate([store.bad for store in stores])[chosen]
        self.bucket = np.concatenate([store.table.bucket for store in stores])[chosen]
        self.shapes = tuple((height, width) for height, width in self.identity["buckets"])
        self.mirrored: bool = mirrored
        self.longest = max(store.longest for store in stores)
        self._rooms: dict[tuple[int, int], _Rooms] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In which store records are, and their indices there."""
        chosen = self._chosen[index]
        store = np.searchsorted(self._starts, chosen, side="right") - 1
        return store, chosen - self._starts[store]

    def _each(self) -> Iterable[tuple[_Store, int]]:
        """Store and index of every record."""
        for first in range(0, len(self), CHUNK):
            store, index = self._places(np.arange(first, min(first + CHUNK, len(self))))
            yield from ((self._stores[s], i) for s, i in zip(store.tolist(), index.tolist(), strict=True))

    def ids(self) -> Iterable[str]:
        """The id of every record."""
        return (store.table.ids[index] for store, index in self._each())

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of every record."""
        return (store.captions_of(index) for store, index in self._each())

    def captions_of_length(self, tokens: int) -> tuple[int, str]:
        """How many distinct captions have so many tokens, and the first of them; also of records not chosen."""
        found = [store.captions_of_length(tokens) for store in self._stores]
        return sum(count for count, _ in found), next((caption for _, caption in found if caption), "")

    def fingerprint(self) -> str:
        """That of the source that the records were encoded from; see `dit_jax.data.sources.records`."""
        return self._fingerprint

    def select(self, indices: np.ndarray) -> "Cache":
        """Some of the records, in the order of ``indices``, without copying them.

        Raises:
          ValueError: the caches that were joined would not stay one after the other.
        """
        indices = np.asarray(indices, np.int64)
        counts, weights = zip(*self.parts, strict=True)
        part = np.searchsorted(np.cumsum(counts), indices, side="right")
        if (np.diff(part) < 0).any():
            raise ValueError("indices of joined caches must take the records of one after those of the other")
        parts = list(zip(np.bincount(part, minlength=len(counts)).tolist(), weights, strict=True))
        fingerprint = fingerprint_of_choice(self._fingerprint, indices)
        return Cache(self._stores, self._chosen[indices], parts, fingerprint)

    def gather(self, index: np.ndarray, words: np.ndarray, mirrored: np.ndarray) -> Batch:
        """The encoded batch of B good records of one bucket.

        Args:
          index: int64 ``[B]``, the records.
          words: uint64 ``[B]``; a record with c captions shows number ``word % c``.
          mirrored: bool ``[B]``, which take their mirror image; none where it is not kept.

        Raises:
          ValueError: the records are of several buckets.
        """
        if (self.bucket[index] != self.bucket[index[0]]).any():
            raise ValueError(f"records of buckets {np.unique(self.bucket[index]).tolist()} in one batch")
        room = self._rooms_for(len(index), int(self.bucket[index[0]])).take()
        of_store, places = self._places(index)
        for number in np.unique(of_store).tolist():
            rows = np.flatnonzero(of_store == number)
            self._stores[number].fill(rows, places[rows], words[rows], mirrored[rows].astype(np.int64), room)
        mean, std = room.moments
        return {
            "mean": mean,
            "std": std,
            "hidden": room.hidden.view(ml_dtypes.bfloat16),
            "pooled": room.pooled.view(ml_dtypes.bfloat16),
            "mask": np.arange(self.longest)[None] < room.tokens[:, None],
        }

    def _rooms_for(self, B: int, bucket: int) -> _Rooms:
        if (B, bucket) not in self._rooms:
            vae, text = self.identity["vae"], self.identity["text_encoder"]
            h, w = (side // vae["factor"] for side in self.shapes[bucket])
            arrays = (
                (self.identity["storage_dtype"], (2, B, h, w, vae["channels"])),
                (BITS, (B, self.longest, text["width"])),
                (BITS, (B, text["pooled_width"])),
                (np.int64, (B,)),
            )
            self._rooms.setdefault((B, bucket), _Rooms(arrays, IDLE))
        return self._rooms[B, bucket]


def in_memory(identity: Identity, table: Table, shards: Iterable[Pictures | Texts]) -> Cache:
    """A cache of shards at hand, one for each of `units` in their order."""
    found = list(shards)
    pictures = [shard for shard in found if isinstance(shard, Pictures)]
    texts = [shard for shard in found if isinstance(shard, Texts)]
    n = len(table.bucket)
    return Cache([_Store(identity, table, pictures, texts)], np.arange(n), [(n, 1.0)], identity["data"]["fingerprint"])


def join(caches: Sequence[Cache], weights: Sequence[float], names: Sequence[str]) -> Cache:
    """Several caches as one, one after the other; each becomes a part that is drawn by its weight.

    ``names`` are what the user calls them.

    Raises:
      DataError: they were not made alike.
    """
    if len(caches) == 1:
        return caches[0]
    first = caches[0].identity
    alike = {field: value for field, value in flatten(first).items() if not field.startswith(FREE)}
    for cache, name in zip(caches[1:], names[1:], strict=True):
        if wrong := differences(cache.identity, alike, name, names[0]):
            raise DataError(f"these caches cannot be trained on together: {'; '.join(wrong)}")
    stores = [store for cache in caches for store in cache._stores]
    starts = np.cumsum([0, *(cache._starts[-1] for cache in caches)])
    chosen = np.concatenate([cache._chosen + start for cache, start in zip(caches, starts, strict=False)])
    fingerprint = fingerprint_of_mixture([cache.fingerprint() for cache in caches], weights)
    parts = [(len(cache), weight) for cache, weight in zip(caches, weights, strict=True)]
    return Cache(stores, chosen, parts, fingerprint)
