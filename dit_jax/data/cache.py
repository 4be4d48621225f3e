"""Encoded records: what is kept of pictures and captions, and batches gathered from it.

The frozen encoders give the same numbers for a record at every epoch, so they run once, and training reads what they
gave from here: a `Cache`, in memory or mapped from the files of `dit_jax.data.cache_files`. With n records, m distinct
captions of t tokens each, F sides (2 where mirror images are kept too, else 1) and moments of s bytes (``float16``: 2):

    what                                           bytes                                 at 256 px, CLIP-L, t = 16
    picture   mean and std ``[F, 2, h, w, C]``     2 F h w C s, and 1 for `bad`          16,385 (F = 1)
    caption   ``hidden [t, E]``, ``pooled [P]``    2 t E + 2 P + 8                       26,120
    table     id, bucket, first caption            id's UTF-8 + 17, and 4 a caption      about 40
              text of a distinct caption           its UTF-8 + 8                         about 70

Only the tokens from BOS to EOS are kept, once per distinct caption, as 16-bit floats; a batch pads them with zeros to
the longest caption of the cache. 77 padded tokens in 32 bits would be 236,544 bytes a caption.

Everything but the numbers is known before anything is encoded, so that many processes can share the work. The records
of a bucket (pictures of one shape), in order of their index, are cut into shards of ``records_per_shard``, and so are
the distinct captions, in order of their first appearance, into shards of ``captions_per_shard``: these are the `units`
of the work. In the numbering that leaves a gap behind the last shard of every bucket, record i is at

    slot(i)    = first_shard(bucket(i)) * records_per_shard + number of records before i in its bucket     (1)
    shard, row = divmod(slot(i), records_per_shard)                                                        (2)
"""

import collections
import hashlib
import itertools
import json
import math
import mmap
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from dit_jax.data.rows import Strings
from dit_jax.data.sources import Source, fingerprint_of_choice, fingerprint_of_mixture
from dit_jax.errors import DataError

# What a cache was made from and how, as in its manifest: nested dicts of what JSON can hold. The keys:
#   format                              version of the files
#   data {name, fingerprint, records, captions}   records: how many in each bucket; captions: distinct ones
#   image_size, crop, mirrored, buckets           buckets: [[height, width], ...] of the pictures
#   vae {name, sha256, shift, scale, factor, channels}
#   text_encoder {name, sha256, length, width, pooled_width}
#   storage_dtype, records_per_shard, captions_per_shard
Identity = dict[str, Any]
# Of these, two caches that were encoded alike may differ in: what people call things, and how shards are cut.
FREE = ("vae.name", "text_encoder.name", "records_per_shard", "captions_per_shard")
Batch = dict[str, np.ndarray]  # an encoded batch, see dit_jax.arrays

HASH_BYTES = 16  # of a caption; among ten million, two share one with a probability of 1e-25
BITS = np.uint16  # bfloat16 by its bits: numpy copies these without asking another library
IDLE = 8  # batches of a shape whose memory is kept
ALIGNED = 64  # bytes at which arrays of a batch begin, as devices like it


# --- before anything is encoded -----------------------------------------------------------------------------


class Table(NamedTuple):
    """What is known of n records before they are encoded.

    Attributes:
      ids: of every record.
      captions: the m distinct captions, in order of first appearance.
      caption_of: int32, distinct captions by their number, of all records, one record after the other.
      first: int64 ``[n + 1]``; record i has ``caption_of[first[i] : first[i + 1]]``.
      bucket: uint8 ``[n]``, which of the cache's shapes a picture is cut to.
    """

    ids: Strings
    captions: Strings
    caption_of: np.ndarray
    first: np.ndarray
    bucket: np.ndarray

    def counts(self, buckets: int) -> dict[str, Any]:
        """``records`` of each bucket and distinct ``captions``, as an identity has them under ``data``."""
        return {"records": np.bincount(self.bucket, minlength=buckets).tolist(), "captions": len(self.captions)}


def tabulate(source: Source, bucket: np.ndarray) -> Table:
    """The table of a source's records, given the bucket of each.

    Captions are told apart by their hashes and sorted as numbers, which takes 40 bytes each while it lasts.
    """
    hashes, first = bytearray(), np.zeros(len(source) + 1, np.int64)
    for i, captions in enumerate(source.captions()):
        for caption in captions:
            content = caption.encode("utf-8", "surrogatepass")
            hashes += hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        first[i + 1] = len(hashes) // HASH_BYTES
    halves = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort(halves.T)  # stable: of equal captions, the first that appears comes first
    ordered = halves[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    appearance = np.zeros(len(order), bool)
    appearance[order[is_new]] = True
    number = np.cumsum(appearance, dtype=np.int32) - np.int32(1)  # right where a caption appears first
    caption_of = np.empty(len(order), np.int32)
    caption_of[order] = number[order[is_new]][np.cumsum(is_new) - 1]
    everything = itertools.chain.from_iterable(source.captions())
    distinct = Strings.of(itertools.compress(everything, appearance))
    return Table(Strings.of(source.ids()), distinct, caption_of, first, np.asarray(bucket, np.uint8))


@dataclass(frozen=True)
class Unit:
    """One shard of a cache: what is encoded and written as a whole.

    Attributes:
      kind: what it holds.
      number: of the shard among the ``total`` of its kind.
      total: see there.
      bucket: of the pictures; 0 for texts.
      first: of the bucket's records in order of their index, or of the distinct captions, the first in it.
      last: the first that is in it no more.
    """

    kind: Literal["pictures", "texts"]
    number: int
    total: int
    bucket: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.number:05}-of-{self.total:05}.safetensors"

    def records(self, table: Table) -> np.ndarray:
        """Indices of the records whose pictures are in it, int64."""
        return np.flatnonzero(table.bucket == self.bucket)[self.first : self.last]

    def captions(self, table: Table) -> list[str]:
        """The captions whose texts are in it."""
        return [table.captions[i] for i in range(self.first, self.last)]


def units(identity: Identity) -> list[Unit]:
    """All shards of a cache: pictures bucket by bucket, then texts."""
    data, pictures, texts = identity["data"], identity["records_per_shard"], identity["captions_per_shard"]
    of_pictures = [(b, *cut) for b, count in enumerate(data["records"]) for cut in _cuts(count, pictures)]
    of_texts = [(0, *cut) for cut in _cuts(data["captions"], texts)]
    return [
        *(Unit("pictures", i, len(of_pictures), *place) for i, place in enumerate(of_pictures)),
        *(Unit("texts", i, len(of_texts), *place) for i, place in enumerate(of_texts)),
    ]


def _cuts(count: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, count)) for first in range(0, count, size)]


# --- what a cache was made from and how ---------------------------------------------------------------------


def flat(identity: Identity) -> dict[str, Any]:
    """The fields of an identity by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in identity.items():
        inner = flat(value) if isinstance(value, dict) else {"": value}
        fields |= {f"{name}.{rest}".rstrip("."): below for rest, below in inner.items()}
    return fields


def mismatches(manifest: Identity, expected: dict[str, Any]) -> list[str]:
    """What a run expects and a cache has otherwise: a phrase per field, with both values.

    Args:
      manifest: the identity of the cache, or all of its manifest.
      expected: what the run's config asks for, by dotted names of fields.
    """
    return differences(manifest, expected, "cache", "run")


def differences(found: Identity, wanted: dict[str, Any], holder: str, asker: str) -> list[str]:
    """The same with other words for the cache and the run."""
    held, asked = flat(found), json.loads(json.dumps(wanted))  # JSON has no tuples
    return [
        f"{field}: {holder} {_short(held.get(field))}, {asker} {_short(value)}"
        for field, value in asked.items()
        if field not in held or held[field] != value
    ]


def _short(value: Any) -> str:
    """A value for a line of text; of a hash, the beginning."""
    if value is None:
        return "none"
    return f"{value[:12]}.." if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else str(value)


# --- what encoders return -----------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """r encoded pictures of one bucket.

    Attributes:
      moments: ``[r, F, 2, h, w, C]``, float16 or float32: mean and std of the raw latents; side 1 of F is mirrored.
        Zero where ``bad``.
      bad: bool ``[r]``, whether the record cannot be used.
      problems: why, by row.
    """

    moments: np.ndarray
    bad: np.ndarray
    problems: dict[int, str]

    @classmethod
    def zeros(cls, identity: Identity, unit: Unit) -> "Pictures":
        """Room for a unit, to be filled through `mean`, `std`, ``bad`` and ``problems``."""
        return cls(np.zeros(moments_shape(identity, unit), identity["storage_dtype"]), np.zeros(len(unit), bool), {})

    @property
    def mean(self) -> np.ndarray:
        """``[r, F, h, w, C]``, a view."""
        return self.moments[:, :, 0]

    @property
    def std(self) -> np.ndarray:
        """``[r, F, h, w, C]``, a view."""
        return self.moments[:, :, 1]


class Texts(NamedTuple):
    """c encoded captions, T tokens in all.

    Attributes:
      hidden: bfloat16 ``[T, E]``, the tokens from BOS to EOS of one caption after the other.
      offsets: int64 ``[c + 1]``; caption i has the tokens ``offsets[i]`` to ``offsets[i + 1] - 1``.
      pooled: bfloat16 ``[c, P]``.
    """

    hidden: np.ndarray
    offsets: np.ndarray
    pooled: np.ndarray


def moments_shape(identity: Identity, unit: Unit) -> tuple[int, ...]:
    """``[r, F, 2, h, w, C]`` of a unit of pictures."""
    vae = identity["vae"]
    h, w = (side // vae["factor"] for side in identity["buckets"][unit.bucket])
    return (len(unit), 1 + identity["mirrored"], 2, h, w, vae["channels"])


# --- gathering ----------------------------------------------------------------------------------------------


class _Store:
    """All shards of one cache, and where in them a record is."""

    def __init__(self, identity: Identity, table: Table, pictures: list[Pictures], texts: list[Texts]):
        self.identity, self.table = identity, table
        self._moments = [shard.moments for shard in pictures]
        self._texts = [(shard.offsets, shard.hidden.view(BITS), shard.pooled.view(BITS)) for shard in texts]
        self._per_shard = identity["records_per_shard"], identity["captions_per_shard"]
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

    def fill(self, rows: np.ndarray, index: np.ndarray, words: np.ndarray, sides: np.ndarray, room: "_Room") -> None:
        """Copy records into some rows of a batch."""
        begin, end = self.table.first[index], self.table.first[index + 1]
        caption = self.table.caption_of[begin + (words % (end - begin).astype(np.uint64)).astype(np.int64)]
        picture_places = np.divmod(self._slot[index], self._per_shard[0])
        text_places = np.divmod(caption, self._per_shard[1])
        moments, hidden, pooled, tokens = room
        places = (rows, tokens[rows], *picture_places, sides, *text_places)
        for i, before, shard, row, side, text_shard, text in zip(*(place.tolist() for place in places), strict=True):
            moments[:, i] = self._moments[shard][row, side]
            offsets, all_hidden, all_pooled = self._texts[text_shard]
            first, last = offsets[text : text + 2].tolist()
            hidden[i, : last - first] = all_hidden[first:last]
            hidden[i, last - first : before] = 0
            pooled[i] = all_pooled[text]
            tokens[i] = last - first


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

    `in_memory` and `dit_jax.data.cache_files.open_cache` make one. Threads may gather from it at the same time.

    Attributes:
      identity: what it was made from; of several caches, that of the first.
      parts: number of records and weight of each of the caches that were joined; one where none were.
      bad: bool ``[n]``, records that cannot be used.
      bucket: uint8 ``[n]``, which of ``shapes`` a picture has.
      shapes: (height, width) of the pictures of every bucket, in pixels.
      mirrored: whether mirror images are kept too.
      longest: S of every batch, the tokens of the longest caption.
    """

    def __init__(
        self, stores: Sequence[_Store], chosen: np.ndarray, parts: Sequence[tuple[int, float]], fingerprint: str
    ):
        self._stores, self._chosen, self._fingerprint = list(stores), chosen, fingerprint
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self.parts = list(parts)
        self.identity: Identity = stores[0].identity
        self.bad = np.concatenate([store.bad for store in stores])[chosen]
        self.bucket = np.concatenate([store.table.bucket for store in stores])[chosen]
        self.shapes = tuple((height, width) for height, width in self.identity["buckets"])
        self.mirrored: bool = self.identity["mirrored"]
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
        for i in range(len(self)):
            store, index = self._places(np.array(i))
            yield self._stores[int(store)], int(index)

    def ids(self) -> Iterable[str]:
        """The id of every record."""
        return (store.table.ids[index] for store, index in self._each())

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of every record."""
        return (store.captions_of(index) for store, index in self._each())

    def fingerprint(self) -> str:
        """That of the source that the records were encoded from; see `dit_jax.data.sources`."""
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


def join(caches: Sequence[Cache], weights: Sequence[float]) -> Cache:
    """Several caches as one, one after the other; each becomes a part that is drawn by its weight.

    Raises:
      DataError: they were not made alike.
    """
    if len(caches) == 1:
        return caches[0]
    first = caches[0].identity
    alike = {field: value for field, value in flat(first).items() if not field.startswith(("data.", *FREE))}
    for other in (cache.identity for cache in caches[1:]):
        if wrong := differences(other, alike, other["data"]["name"], first["data"]["name"]):
            raise DataError(f"these caches cannot be trained on together: {'; '.join(wrong)}")
    stores = [store for cache in caches for store in cache._stores]
    starts = np.cumsum([0, *(cache._starts[-1] for cache in caches)])
    chosen = np.concatenate([cache._chosen + start for cache, start in zip(caches, starts, strict=False)])
    fingerprint = fingerprint_of_mixture([cache.fingerprint() for cache in caches], weights)
    parts = [(len(cache), weight) for cache, weight in zip(caches, weights, strict=True)]
    return Cache(stores, chosen, parts, fingerprint)
