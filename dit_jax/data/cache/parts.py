"""What a cache consists of: its table, the shards that the work is cut into, and what encoders return.

Everything but the numbers is known before anything is encoded, so that many processes can share the work. The records
of a bucket (pictures of one shape), in order of their index, are cut into shards of ``records_per_shard``, and so are
the distinct captions, in order of their first appearance, into shards of ``captions_per_shard``: these are the `units`
of the work. With n records, m distinct captions of t tokens each, F sides (2 where mirror images are kept too, else 1)
and moments of s bytes (``float16``: 2):

    what                                           bytes                                 at 256 px, CLIP-L, t = 16
    picture   mean and std ``[F, 2, h, w, C]``     2 F h w C s, and 1 for ``bad``        16,385 (F = 1)
    caption   ``hidden [t, E]``, ``pooled [P]``    2 t E + 2 P + 8                       26,120
    table     id, bucket, first caption            id's UTF-8 + 17, and 4 a caption      about 40
              text of a distinct caption           its UTF-8 + 8                         about 70

Only the tokens from BOS to EOS are kept, once per distinct caption, as 16-bit floats. 77 padded tokens in 32 bits would
be 236,544 bytes a caption.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_jax.data.sources.records import Source
from dit_jax.data.sources.rows import Strings
from dit_jax.files import flatten

# What a cache was made from and how, as in its manifest: nested dicts of what JSON can hold.
Identity = dict[str, Any]
FIELDS = {  # all of its fields, by dotted names, and their types
    "format": int,  # version of the files
    "data.name": str,
    "data.fingerprint": str,  # of the source
    "data.records": list,  # how many there are in each bucket
    "data.captions": int,  # distinct ones
    "image_size": int,
    "crop": str,
    "mirrored": bool,  # whether mirror images are kept too
    "buckets": list,  # [height, width] of the pictures of each
    "storage_dtype": str,  # of the moments
    "vae.name": str,
    "vae.sha256": str,
    "vae.shift": object,
    "vae.scale": object,
    "vae.factor": int,
    "vae.channels": int,
    "text_encoder.name": str,
    "text_encoder.sha256": str,
    "text_encoder.length": int,
    "text_encoder.width": int,
    "text_encoder.pooled_width": int,
    "records_per_shard": int,
    "captions_per_shard": int,
}

COUNTS = (  # fields that are 1 or more
    "vae.factor",
    "vae.channels",
    "text_encoder.length",
    "text_encoder.width",
    "text_encoder.pooled_width",
    "records_per_shard",
    "captions_per_shard",
)

MOST_SHARDS = 2**20  # files of a cache; of 4,096 records each, those of the largest sets there are
HASH_BYTES = 16  # of a caption; among ten million, two share one with a probability of 1e-25


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


def impossible(identity: Identity) -> list[str]:
    """Fields, of the right types, whose values no cache has: what is made of them would fail or be nonsense."""
    fields = flatten(identity)
    possible = {
        "data.records": all(type(count) is int and count >= 0 for count in fields["data.records"]),
        "buckets": len(fields["buckets"]) == len(fields["data.records"])
        and all(isinstance(shape, list) and len(shape) == 2 for shape in fields["buckets"])
        and all(type(side) is int and side > 0 for shape in fields["buckets"] for side in shape),
        "data.captions": fields["data.captions"] >= 0,
        "storage_dtype": fields["storage_dtype"] in ("float16", "float32"),
    } | {name: fields[name] > 0 for name in COUNTS}
    if all(possible.values()):  # else they cannot be counted
        shards = [-(-count // fields["records_per_shard"]) for count in fields["data.records"]]
        shards.append(-(-fields["data.captions"] // fields["captions_per_shard"]))
        possible |= {"number of shards": sum(shards) <= MOST_SHARDS}
    return [name for name, it_is in possible.items() if not it_is]


def mismatches(manifest: Identity, expected: dict[str, Any]) -> list[str]:
    """What a run expects and a cache has otherwise: a phrase per field, with both values.

    Args:
      manifest: the identity of the cache, or all of its manifest.
      expected: what the run's config asks for, by dotted names of fields.
    """
    return differences(manifest, expected, "cache", "run")


def differences(found: Identity, wanted: dict[str, Any], holder: str, asker: str) -> list[str]:
    """The same with other words for the cache and the run."""
    held, asked = (json.loads(json.dumps(fields)) for fields in (flatten(found), wanted))  # JSON has no tuples
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
