"""Records that are encoded as a whole before a run begins, and kept in its folder: what was encoded once, every later
start reads, also where the first was interrupted in the middle of it.

    workdir/encoded/train         a cache (`dit_jax.data.cache.files`) of the records that are trained on
    workdir/encoded/validation    and of those that are validated on

They may be deleted: the next start makes them again. Several processes each encode all that is missing when they start,
and write what no other was quicker to write.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dit_jax import build, processes
from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.buckets import assign, sizes_of
from dit_jax.data.cache import files
from dit_jax.data.cache.gather import Cache, in_memory
from dit_jax.data.cache.parts import Identity, Pictures, Table, Texts, Unit, moments_shape, tabulate, units
from dit_jax.data.sources.records import Source
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.errors import DataError
from dit_jax.training.encode import Encoding, encode_units
from dit_jax.training.progress import EncodingCounter

THREADS = 8  # that read and decode pictures, in every process that does
SAY_EVERY = 30.0  # seconds between two lines on how far the encoding is
PER_SHARD = 512  # records, or captions, that are encoded and kept as a whole; of more, more would be lost
SHARE = 0.1  # of what is free on a disk: the rest is for checkpoints

Say = Callable[[str], None]


def encode_once(
    config: ConfigDict,
    kept: Path | None,
    source: Source,
    bucket: np.ndarray,
    shapes: tuple[tuple[int, int], ...],
    flip: bool,
    vae: VAE,
    text_encoder: TextEncoder,
    bad_records: BadRecords,
    say: Say,
) -> Cache:
    """Every record and every distinct caption, encoded now or before.

    Args:
      config: resolved.
      kept: the folder that has what was encoded before, and gets what is encoded now; None keeps it in memory alone,
        and so do disks with too little room.
      source: the records.
      bucket: of every record (`find_buckets`).
      shapes: height and width of the pictures of each bucket.
      flip: whether mirror images are encoded too.
      vae, text_encoder: what encodes.
      bad_records: counts and lists those that cannot be read.
      say: is given what a person should know, line by line.

    Raises:
      DataError: too many bad records, as soon as there are.
    """
    table = tabulate(source, bucket)
    counts = table.counts(len(shapes))
    identity = build.make_identity(
        config, source.name, source.fingerprint(), counts, shapes, flip, vae, text_encoder, PER_SHARD
    )
    wanted = left = units(identity)
    if kept and (kept := begin(kept, identity, table, say)):
        left = files.missing(kept, identity)
        missing = set(left)
        for unit in wanted:
            if unit not in missing:
                note_problems(bad_records, table, unit, files.written(kept, identity, unit))
        if done := sum(map(len, wanted)) - sum(map(len, left)):
            say(f"encoded before: {done:,} pictures and captions, in {kept}")

    in_hand: dict[Unit, Pictures | Texts] = {}  # what could not be kept
    if left:
        begun = time.monotonic()
        pictures, captions = (sum(len(unit) for unit in left if unit.kind == kind) for kind in ("pictures", "texts"))
        say(f"encoding {pictures:,} pictures and {captions:,} captions ...")
        keeping = kept is not None and has_room(kept, identity, left, say)
        with closing(EncodingCounter(left, SAY_EVERY)) as counter:
            how = THREADS, config.data.workers, config.data.patience
            encoding = Encoding(identity, source, table, vae, text_encoder, *how)
            for unit, shard in encode_units(encoding, left, counter.told):
                keeping = keeping and kept is not None and keep(kept, identity, unit, shard, say)
                if not keeping:
                    in_hand[unit] = shard
                note_problems(bad_records, table, unit, shard)
        mirrored = " and their mirror images" if flip else ""
        say(f"encoded {pictures:,} pictures{mirrored} in {time.monotonic() - begun:.0f} s")
    if kept is None:
        return in_memory(identity, table, in_hand.values())
    if not in_hand:
        with contextlib.suppress(OSError):  # no room for a manifest
            files.finish(kept, identity, lambda done, total: None)
            return files.open_cache(kept)
    shards = (in_hand[unit] if unit in in_hand else files.written(kept, identity, unit) for unit in wanted)
    return in_memory(identity, table, shards)


def begin(folder: Path, identity: Identity, table: Table, say: Say) -> Path | None:
    """The folder, begun or gone on with; None where nothing can be kept, and why is said."""
    try:
        try:
            files.begin(folder, identity, table)
        except DataError:  # of other data: the run has not taken a step
            if not processes.is_first():
                return None
            shutil.rmtree(folder)
            files.begin(folder, identity, table)
    except OSError as error:
        say_not_kept(folder, f"{error.strerror or error}", say)
        return None
    return folder


def has_room(folder: Path, identity: Identity, left: Sequence[Unit], say: Say) -> bool:
    """Whether what is left would take a small part of the disk, were all captions as long as they can be."""
    text, numbers = identity["text_encoder"], np.dtype(identity["storage_dtype"]).itemsize
    most = sum(
        numbers * int(np.prod(moments_shape(identity, unit)))
        if unit.kind == "pictures"
        else 2 * len(unit) * (text["length"] * text["width"] + text["pooled_width"])
        for unit in left
    )
    free = shutil.disk_usage(folder).free
    if most > free * SHARE:
        say_not_kept(folder, f"it may take {most / 2**30:.2f} GiB, and {free / 2**30:.2f} are free", say)
    return most <= free * SHARE


def keep(folder: Path, identity: Identity, unit: Unit, shard: Pictures | Texts, say: Say) -> bool:
    """Write a shard; whether that could be done."""
    try:
        files.write(folder, identity, unit, shard)
    except OSError as error:
        say_not_kept(folder, f"{error.strerror or error}", say)
        return False
    return True


def say_not_kept(folder: Path, why: str, say: Say) -> None:
    """Say what that means."""
    say(f"warning: what is encoded is not kept in {folder}: {why}; the next start encodes it again")


def find_buckets(source: Source, shapes: tuple[tuple[int, int], ...], patience: float, say: Say) -> np.ndarray:
    """Which shape the picture of every record is cut to, uint8 ``[n]``; with one shape nothing is looked at."""
    if len(shapes) == 1:
        return np.zeros(len(source), np.uint8)
    begun = time.monotonic()
    say(f"reading the sizes of {len(source):,} pictures ...")
    bucket = assign(sizes_of(source, THREADS, patience), shapes)
    counts = np.bincount(bucket, minlength=len(shapes)).tolist()
    found = ", ".join(f"{w}x{h}: {count:,}" for (h, w), count in zip(shapes, counts, strict=True) if count)
    say(f"buckets, in {time.monotonic() - begun:.0f} s: {found} pictures")
    return bucket


def note_problems(bad_records: BadRecords, table: Table, unit: Unit, shard: Pictures | Texts) -> None:
    """Count and list the bad records of a shard; what stands in for them is a run's choice.

    Raises:
      DataError: too many bad records.
    """
    if isinstance(shard, Pictures) and shard.problems:
        records = unit.records(table).tolist()
        for row, reason in shard.problems.items():
            bad_records.add(records[row], Replaced(table.ids[records[row]], reason, None))
