"""Records that are encoded as a whole before a run begins, and kept in its folder: what was encoded once, every later
start reads, also where the first was interrupted in the middle of it.

    workdir/encoded/train         shards, as those of a cache (`dit_jax.data.cache.files`), of the records to train on
    workdir/encoded/validation    and of those to validate on

They may be deleted while no run reads them: the next start makes them again. Several processes each encode all that is
missing when they start, and write what no other was quicker to write.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dit_jax import build
from dit_jax.data.ahead import THREADS
from dit_jax.data.bad_records import BadRecords, Replaced
from dit_jax.data.cache import files
from dit_jax.data.cache.gather import Cache, in_memory
from dit_jax.data.cache.parts import Pictures, Table, Texts, Unit, moments_shape, tabulate, units
from dit_jax.data.cache.tensor_files import UnreadableError
from dit_jax.data.loader import scan
from dit_jax.data.sources.records import Source
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.errors import DataError
from dit_jax.training.encode import Encoding, encode_units, tokenize_quietly
from dit_jax.training.progress import EncodingCounter

SAY_EVERY = 30.0  # seconds between two lines on how far the encoding is
PER_SHARD = 512  # records, or captions, that are encoded and kept as a whole: what an interruption can cost
MOST_SHARDS = 1024  # of each kind; of a larger set, each holds more
SHARE = 0.1  # of what is free on a disk: the rest is for checkpoints
COUNTED = 1000  # captions whose tokens are counted to tell how much room they take

Say = Callable[[str], None]


class Place(NamedTuple):
    """Where encoded records are kept.

    Attributes:
      folder: theirs alone.
      fingerprint: of the records; others in the folder are left alone and not used.
    """

    folder: Path
    fingerprint: str


def encode_once(
    config: ConfigDict,
    place: Place | None,
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
      place: has what was encoded before, and gets what is encoded now; None keeps it in memory alone.
      source: the records.
      bucket: of every record (`dit_jax.feed.find_buckets`).
      shapes: height and width of the pictures of each bucket.
      flip: whether mirror images are encoded too.
      vae, text_encoder: what encodes.
      bad_records: counts and lists those that cannot be read, at every start those that cannot be read then.
      say: is given what a person should know, line by line.

    Raises:
      DataError: too many bad records, as soon as there are.
    """
    table = tabulate(source, bucket)
    fingerprint, counts = place.fingerprint if place else "", table.counts(len(shapes))
    per_shard = max(PER_SHARD, -(-max(len(source), len(table.captions)) // MOST_SHARDS))
    identity = build.make_identity(config, source.name, fingerprint, counts, shapes, flip, vae, text_encoder, per_shard)
    how = THREADS, config.data.workers, config.data.patience
    encoding = Encoding(identity, source, table, vae, text_encoder, *how)
    shards = Shards(encoding, place and place.folder, say)
    for unit, kept in shards.with_problems():
        if is_mended(encoding, unit, kept):
            shards.forget(unit)
        else:
            note_problems(bad_records, table, unit, kept)
    if left := shards.missing():
        begun = time.monotonic()
        pictures, captions = (sum(len(unit) for unit in left if unit.kind == kind) for kind in ("pictures", "texts"))
        say(f"encoding {pictures:,} pictures and {captions:,} captions ...")
        with closing(EncodingCounter(left, SAY_EVERY)) as counter:
            for unit, shard in encode_units(encoding, left, counter.told):
                shards.add(unit, shard)
                note_problems(bad_records, table, unit, shard)
        mirrored = " and their mirror images" if flip else ""
        say(f"encoded {pictures:,} pictures{mirrored} in {time.monotonic() - begun:.0f} s")
    return shards.as_cache()


class Shards:
    """The shards of a data set, in a folder where that can be, and in memory.

    What is wrong with the folder is told, and ends no run: what is encoded from then on stays in memory.

    Args:
      encoding: whose shards they are.
      folder: None for memory alone.
      say: is told what is there, and what is wrong.
    """

    def __init__(self, encoding: Encoding, folder: Path | None, say: Say):
        self._encoding, self._folder, self._say = encoding, folder, say
        self._units = units(encoding.identity)
        self._kept: set[Unit] = set()
        self._in_memory: dict[Unit, Pictures | Texts] = {}
        self._keeps = folder is not None
        if folder is None:
            return
        with self._going_on():
            files.begin(folder, encoding.identity, encoding.table)
            self._kept = set(self._units) - set(files.missing(folder, encoding.identity))
            if self._kept:
                say(f"encoded before: {sum(map(len, self._kept)):,} pictures and captions, in {folder}")
            if left := self.missing():
                needed, free = self._room(left), shutil.disk_usage(folder).free
                if needed > free * SHARE:
                    room = f"{needed / 2**30:.2f} GiB are more than a tenth of the {free / 2**30:.2f} that are free"
                    self._stop_keeping(room)

    def missing(self) -> list[Unit]:
        """Those that are neither kept nor in memory, in their order."""
        return [unit for unit in self._units if unit not in self._kept and unit not in self._in_memory]

    def with_problems(self) -> Iterator[tuple[Unit, Pictures]]:
        """Those that are kept and have bad records; one that cannot be read is missing again."""
        for unit in self._units:
            if unit in self._kept and unit.kind == "pictures":
                self._kept.discard(unit)
                with self._going_on():
                    shard = self._read(unit)
                    self._kept.add(unit)
                if unit in self._kept and isinstance(shard, Pictures) and shard.problems:
                    yield unit, shard

    def forget(self, unit: Unit) -> None:
        """Have one that is kept encoded again."""
        self._kept.discard(unit)
        if self._folder:
            with self._going_on():
                (self._folder / unit.name).unlink(missing_ok=True)

    def add(self, unit: Unit, shard: Pictures | Texts) -> None:
        """Keep one that was encoded."""
        if self._folder and self._keeps:
            with self._going_on():
                files.write(self._folder, self._encoding.identity, unit, shard)
                self._kept.add(unit)
                return
        self._in_memory[unit] = shard

    def as_cache(self) -> Cache:
        """All of them; those that are kept are mapped into memory.

        Raises:
          DataError: one that is kept cannot be read.
        """
        files.allow_open_files(len(self._kept))
        found = (self._in_memory[unit] if unit in self._in_memory else self._read(unit) for unit in self._units)
        return in_memory(self._encoding.identity, self._encoding.table, found)

    def _read(self, unit: Unit) -> Pictures | Texts:
        assert self._folder is not None
        return files.written(self._folder, self._encoding.identity, unit)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stop_keeping(error.strerror or str(error))
        except UnreadableError as error:
            self._stop_keeping(str(error))
        except DataError:
            self._stop_keeping("other data lie there, or it is damaged; delete the folder, or name another --workdir")

    def _stop_keeping(self, why: str) -> None:
        self._keeps = False
        self._say(f"warning: what is encoded is not kept in {self._folder}: {why}; the next start encodes it again")

    def _room(self, left: list[Unit]) -> int:
        """About how many bytes some of them will take."""
        identity, text = self._encoding.identity, self._encoding.text_encoder
        some = list(itertools.islice(self._encoding.table.captions, COUNTED))
        tokens = float(tokenize_quietly(text, some)[1].sum(1).mean()) if some else 0.0
        numbers = sum(int(np.prod(moments_shape(identity, unit))) for unit in left if unit.kind == "pictures")
        captions = sum(len(unit) for unit in left if unit.kind == "texts")
        of_pictures = numbers * np.dtype(identity["storage_dtype"]).itemsize
        return of_pictures + int(captions * 2 * (tokens * text.width + text.pooled_width))


def is_mended(encoding: Encoding, unit: Unit, shard: Pictures) -> bool:
    """Whether one of a shard's bad records can be read by now: its file came back, or the right to read it."""
    height, width = encoding.identity["buckets"][unit.bucket]
    records = unit.records(encoding.table)[sorted(shard.problems)]
    how = [1] * len(records), THREADS, 0, encoding.patience
    with closing(scan(encoding.source, records, height, width, *how)) as again:
        return any(picture["problems"] == [None] for picture in again)


def note_problems(bad_records: BadRecords, table: Table, unit: Unit, shard: Pictures | Texts) -> None:
    """Count and list the bad records of a shard; what stands in for them is a run's choice.

    Raises:
      DataError: too many bad records.
    """
    if isinstance(shard, Pictures) and shard.problems:
        records = unit.records(table).tolist()
        for row, reason in shard.problems.items():
            bad_records.add(records[row], Replaced(table.ids[records[row]], reason, None))
