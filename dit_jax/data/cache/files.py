"""Caches on disk: shards written by any number of processes, killed and started again, that end in the same bytes.

    begun.json                              the identity of a cache that is being written
    table.safetensors                       dit_jax.data.cache.parts.Table
    pictures-00000-of-00010.safetensors     Pictures: moments, bad; notes: problems, sums for the statistics
    texts-00000-of-00003.safetensors        Texts: hidden, offsets, pooled
    bad_records.jsonl                       {"id", "reason"} of every record that cannot be used; before, those so far
    manifest.json                           the identity, statistics, sizes and sha256 of the files; it comes last

Which shards there are, and what is in each, follows from the identity and the table, so that processes need not talk
to each other: each looks what is `missing` and writes some of it. A file is written under a temporary name and renamed
once it is on the disk, so that one with its own name is whole. Its notes hold a hash of the identity and of its name,
so that a shard of another cache, or of another place in this one, is not taken for what it is called.
"""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dit_jax.data.cache.gather import Cache, in_memory
from dit_jax.data.cache.parts import (
    FIELDS,
    Identity,
    Pictures,
    Table,
    Texts,
    Unit,
    differences,
    impossible,
    moments_shape,
    units,
)
from dit_jax.data.cache.tensor_files import (
    Layout,
    TensorFile,
    UnreadableError,
    open_tensors,
    readable,
    write_tensors,
)
from dit_jax.data.sources.rows import Strings
from dit_jax.errors import DataError
from dit_jax.files import flatten, read_json

FORMAT = 1  # raised when older releases could not read the files any more
BEGUN, MANIFEST, TABLE, BAD_RECORDS = "begun.json", "manifest.json", "table.safetensors", "bad_records.jsonl"
TEMPORARY = ".tmp"
# What a manifest adds to an identity.
ADDED = ("bad_records", "tokens", "latents", "shards")
ADDED_FIELDS = {
    "bad_records": int, "tokens.all": int, "tokens.longest": int, "latents.mean": list, "latents.std": list,
    "shards": dict,
}  # fmt: skip
PEOPLE = ("data.name", "vae.name", "text_encoder.name")  # fields for people: another word for the same thing will do
GO_ON = "the same `python -m dit_jax.precompute` command makes what is missing"
AGAIN = f"delete it: {GO_ON}"
RESERVE = 256  # open files that are not of a cache

Say = Callable[[int, int], None]  # told how many bytes of how many have been read


# --- writing ------------------------------------------------------------------------------------------------


def begin(folder: Path, identity: Identity, table: Table) -> None:
    """Begin a cache, or go on with one that was begun with the same identity, by this process or another.

    Raises:
      DataError: the folder holds another cache, or other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _begun(folder, identity) is None:
        ours = {TABLE, BAD_RECORDS, MANIFEST, BEGUN, *(unit.name for unit in units(identity))}
        others = sorted({path.name for path in folder.iterdir() if not path.name.startswith(".")} - ours)
        if others:
            raise DataError(
                f"{folder} holds other things than this cache ({', '.join(others[:3])}); name another folder"
            )
        _write_whole(folder / BEGUN, lambda file: file.write(_json(identity)))
    tensors = _tensors_of(table)
    if _is_whole(_open_table, folder, identity):
        there = _tensors_of(_open_table(folder, identity))
        if other := [name for name in tensors if not np.array_equal(tensors[name], there[name])]:
            raise DataError(f"{folder} was begun with other records ({', '.join(other)}); name another folder")
    else:
        notes = {"of": _digest(identity, TABLE)}
        _write_whole(folder / TABLE, lambda file: write_tensors(file, tensors, notes))


def _tensors_of(table: Table) -> dict[str, np.ndarray]:
    tensors = {name: getattr(table, name) for name in ("caption_of", "first", "bucket")}
    for name in ("ids", "captions"):
        strings = getattr(table, name)
        tensors |= {name: strings.content, f"{name}_offsets": strings.offsets}
    return tensors


def missing(folder: Path, identity: Identity) -> list[Unit]:
    """The shards that are yet to be written; a damaged one is."""
    return [unit for unit in units(identity) if not _is_whole(_open_shard, folder, identity, unit)]


def write(folder: Path, identity: Identity, unit: Unit, shard: Pictures | Texts) -> None:
    """Write a shard, unless another process was quicker."""
    if _is_whole(_open_shard, folder, identity, unit):
        return
    if isinstance(shard, Pictures):
        tensors, notes = {"moments": shard.moments, "bad": shard.bad}, _notes(shard)
    else:
        tensors, notes = shard._asdict(), {}
    notes["of"] = _digest(identity, unit.name)
    with contextlib.suppress(FileNotFoundError):  # of a finished cache a file is made again
        os.replace(folder / MANIFEST, folder / BEGUN)
    _write_whole(folder / unit.name, lambda file: write_tensors(file, tensors, notes))


def written(folder: Path, identity: Identity, unit: Unit) -> Pictures | Texts:
    """A shard that is there, with what is wrong with its records.

    Raises:
      DataError: it is not there, or damaged.
    """
    found = _open_shard(folder, identity, unit)
    if unit.kind == "texts":
        return Texts(**found.tensors)
    return Pictures(**found.tensors, problems=dict(found.notes["problems"]))


def _notes(shard: Pictures) -> dict[str, Any]:
    """Problems, and what the statistics are made of: per channel, over all raw samples, their sum and that of squares.

    A raw sample is mean + std * noise; the square of one is expected to be mean ** 2 + std ** 2.
    """
    C = shard.moments.shape[-1]
    sums = np.zeros((2, C))
    for moments in shard.moments:  # row by row, because float64 takes four times the room
        mean, std = moments.astype(np.float64).swapaxes(0, 1).reshape(2, -1, C)
        sums += mean.sum(0), (mean**2 + std**2).sum(0)
    count = int((~shard.bad).sum()) * shard.mean[:1].size // C
    return {"problems": sorted(shard.problems.items()), "count": count, "sums": sums.tolist()}


def finish(folder: Path, identity: Identity, say: Say) -> dict[str, Any]:
    """Write the list of bad records and the manifest of a cache of which nothing is missing.

    What killed processes left behind is removed. Several processes may finish at the same time.

    Args:
      folder: of the cache.
      identity: that it was begun with.
      say: is told how many bytes of how many have been hashed.

    Returns:
      The manifest.

    Raises:
      DataError: a shard is missing, or the folder holds another cache.
    """
    identity = _begun(folder, identity) or identity
    with contextlib.suppress(FileNotFoundError):
        if not (folder / BEGUN).exists():  # it is finished: nothing is hashed again, or taken for right as it is now
            return _read(folder / MANIFEST)
    table, files = _open_table(folder, identity), [folder / TABLE]
    notes, problems, tokens, longest = [], {}, 0, 0
    for unit in units(identity):
        shard = _open_shard(folder, identity, unit)
        files.append(folder / unit.name)
        if unit.kind == "texts":
            tokens, longest = tokens + len(shard.tensors["hidden"]), max(longest, _longest(shard.tensors["offsets"]))
            continue
        notes.append(shard.notes)
        if shard.notes["problems"]:
            records = unit.records(table).tolist()
            problems.update({records[row]: reason for row, reason in shard.notes["problems"]})
    rows = [{"id": table.ids[record], "reason": problems[record]} for record in sorted(problems)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    _write_whole(folder / BAD_RECORDS, lambda file: file.write(lines.encode()))
    manifest = identity | {
        "bad_records": len(rows),
        "tokens": {"all": tokens, "longest": longest},
        "latents": _statistics(notes, identity["vae"]["channels"]),
        "shards": {path.name: {"bytes": path.stat().st_size, "sha256": sha256} for path, sha256 in _hash(files, say)},
    }
    _write_whole(folder / MANIFEST, lambda file: file.write(_json(manifest)))
    for left in (folder / BEGUN, *folder.glob(f".*{TEMPORARY}")):
        left.unlink(missing_ok=True)
    return manifest


def _statistics(notes: list[dict[str, Any]], channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation of raw latents per channel, from the sums of the shards in their order."""
    count, sums = 0, np.zeros((2, channels))
    for note in notes:
        count += note["count"]
        sums += note["sums"]
    mean, square = sums / max(count, 1)
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that is absent or whole under its name, whenever this process or the machine stops."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError:  # another process has finished the cache and tidied up
        if not path.exists():
            raise
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the name, too, is on the disk
    finally:
        os.close(directory)


# --- reading ------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
      DataError: there is none: no cache at all, an unfinished one, one of a newer release, or it is damaged.
    """
    with readable(folder):
        finished, begun = (folder / MANIFEST).exists(), (folder / BEGUN).exists()
    if finished:
        return _read(folder / MANIFEST)
    if begun:
        identity = _identity(_read(folder / BEGUN))
        left, total = len(missing(folder, identity)), len(units(identity))
        raise DataError(f"{folder} is an unfinished cache, {left} of {total} files are missing; {GO_ON}")
    raise DataError(f"{folder} holds no cache" if folder.is_dir() else f"there is no cache {folder}")


def open_cache(folder: Path) -> Cache:
    """The cache in a folder, its files mapped into memory.

    Raises:
      DataError: as of `read_manifest`, or a file is absent or damaged.
    """
    manifest = read_manifest(folder)
    try:
        return _open_all(folder, manifest)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # it says what cannot be
        raise DataError(f"{folder / MANIFEST} is damaged: {error}; {AGAIN}") from error


def _open_all(folder: Path, manifest: dict[str, Any]) -> Cache:
    identity = _identity(manifest)
    table, every_unit = _open_table(folder, identity), units(identity)
    allow_open_files(len(every_unit))
    shards: list[Pictures | Texts] = []
    for unit in every_unit:
        path = folder / unit.name
        tensors = _open_shard(folder, identity, unit).tensors
        if manifest["shards"][unit.name]["bytes"] != path.stat().st_size:
            raise DataError(f"{path} is not as large as {MANIFEST} says; {AGAIN}")
        shards.append(Pictures(**tensors, problems={}) if unit.kind == "pictures" else Texts(**tensors))
    return in_memory(identity, table, shards)


def verify(folder: Path, say: Say) -> list[str]:
    """The names of files of a finished cache that are absent or not what they were when it was finished.

    ``say`` is told how many bytes of how many have been hashed.
    """
    manifest = read_manifest(folder)
    names = [TABLE, *(unit.name for unit in units(manifest))]
    hashes = {path.name: sha256 for path, sha256 in _hash([folder / n for n in names if (folder / n).is_file()], say)}
    known = flatten(manifest["shards"])
    return [name for name in names if name not in hashes or hashes[name] != known.get(f"{name}.sha256")]


def _hash(paths: list[Path], say: Say) -> Iterator[tuple[Path, str]]:
    """Each file with its sha256; several are read at a time."""

    def sha256(path: Path) -> str:
        with readable(path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    total, done = sum(path.stat().st_size for path in paths), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, digest in zip(paths, pool.map(sha256, paths), strict=True):
            yield path, digest
            done += path.stat().st_size
            say(done, total)


def _open_table(folder: Path, identity: Identity) -> Table:
    n, m = sum(identity["data"]["records"]), identity["data"]["captions"]
    wide, narrow, byte = np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint8)
    layout: Layout = {
        "ids": (byte, (None,)),
        "ids_offsets": (wide, (n + 1,)),
        "captions": (byte, (None,)),
        "captions_offsets": (wide, (m + 1,)),
        "caption_of": (narrow, (None,)),
        "first": (wide, (n + 1,)),
        "bucket": (byte, (n,)),
    }
    found = _open(folder / TABLE, layout, identity).tensors
    counts = np.bincount(found["bucket"], minlength=len(identity["buckets"])).tolist()
    if counts != identity["data"]["records"]:
        raise DataError(f"{folder / TABLE} has other records than {MANIFEST} says; delete the cache and make it again")
    caption_of = found["caption_of"]
    cuts = [(found[f"{name}_offsets"], len(found[name])) for name in ("ids", "captions")]
    if not all(_cuts_all(*cut) for cut in [*cuts, (found["first"], len(caption_of))]) or (
        len(caption_of) and not 0 <= caption_of.min() <= caption_of.max() < m
    ):
        raise DataError(f"{folder / TABLE} is damaged: its offsets do not cut what it holds; delete the cache")
    return Table(
        Strings(found["ids"], found["ids_offsets"]),
        Strings(found["captions"], found["captions_offsets"]),
        *(found[name] for name in ("caption_of", "first", "bucket")),
    )


def _open_shard(folder: Path, identity: Identity, unit: Unit) -> TensorFile:
    layout: Layout
    if unit.kind == "pictures":
        moments = moments_shape(identity, unit)
        stored = np.dtype(identity["storage_dtype"])
        layout = {"moments": (stored, moments), "bad": (np.dtype(bool), moments[:1])}
        return _open(folder / unit.name, layout, identity)
    text, half = identity["text_encoder"], np.dtype(ml_dtypes.bfloat16)
    layout = {
        "hidden": (half, (None, text["width"])),
        "offsets": (np.dtype(np.int64), (len(unit) + 1,)),
        "pooled": (half, (len(unit), text["pooled_width"])),
    }
    found = _open(folder / unit.name, layout, identity)
    offsets, tokens = found.tensors["offsets"], len(found.tensors["hidden"])
    if not _cuts_all(offsets, tokens) or _longest(offsets) > text["length"]:
        raise DataError(
            f"{folder / unit.name} is damaged: its offsets do not cut {tokens} tokens into captions; {AGAIN}"
        )
    return found


def _open(path: Path, layout: Layout, identity: Identity) -> TensorFile:
    try:
        found = open_tensors(path, layout)
    except UnreadableError:
        raise
    except DataError as error:
        raise DataError(f"{error}; {AGAIN if path.exists() else GO_ON}") from error
    if not isinstance(found.notes, dict) or found.notes.get("of") != _digest(identity, path.name):
        raise DataError(f"{path} belongs to another cache or another place in this one; {AGAIN}")
    return found


def _is_whole(open_it: Callable[..., Any], *where: Any) -> bool:
    """Whether a file is there and not damaged; where the system fails to say, the error goes on."""
    try:
        open_it(*where)
    except UnreadableError:
        raise
    except DataError:
        return False
    return True


def _cuts_all(offsets: np.ndarray, count: int) -> bool:
    """Whether offsets cut so many things, one after the other, into parts."""
    return offsets[0] == 0 and offsets[-1] == count and bool((offsets[1:] >= offsets[:-1]).all())


def _longest(offsets: np.ndarray) -> int:
    """Tokens of the longest caption of a shard."""
    return int(np.diff(offsets).max())


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, often 1,024, as far as the system allows: mapped files count.

    Windows has no such limit, and no such module.
    """
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


# --- identities ---------------------------------------------------------------------------------------------


def _begun(folder: Path, identity: Identity) -> Identity | None:
    """The identity that a cache was begun with, None where none was; DataError unless it is the same cache."""
    for name in (BEGUN, MANIFEST):  # in this order, because finishing writes one before it removes the other
        with contextlib.suppress(FileNotFoundError):
            found = _read(folder / name)
            wanted = {field: value for field, value in flatten(identity).items() if field not in PEOPLE}
            if wrong := differences(found, wanted, "there", "here"):
                raise DataError(_otherwise(folder, found, wrong))
            return _identity(found)
    return None


def _otherwise(folder: Path, found: Identity, wrong: list[str]) -> str:
    """What to do about a cache that differs in some fields."""
    if all(words.startswith(("records_per_shard", "captions_per_shard")) for words in wrong):
        per_file = found["records_per_shard"]
        return (
            f"{folder} holds this cache in files of {per_file} records: --records_per_file={per_file} goes on with it"
        )
    if all(words.startswith("data.") for words in wrong):
        return (
            f"the data set is another one than {folder} was begun with, or has changed since; name another folder, or"
            f" delete this one ({'; '.join(wrong)})"
        )
    return f"{folder} holds another cache; delete it or name another: {'; '.join(wrong)}"


def _identity(manifest: dict[str, Any]) -> Identity:
    """That part of a manifest."""
    return {name: value for name, value in manifest.items() if name not in ADDED}


def _read(path: Path) -> dict[str, Any]:
    """An identity, or a manifest that begins with one, with all of its fields."""
    try:
        with readable(path):
            found = read_json(path)
        fields = flatten(found)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: it holds no JSON object; {AGAIN}") from error
    version = fields.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise DataError(f"{path.parent} has format {version}, and this release reads {FORMAT}; update dit_jax")
    expected = FIELDS | (ADDED_FIELDS if path.name == MANIFEST else {})
    fields |= found  # whole sections, too
    wrong = [name for name, kind in expected.items() if not isinstance(fields.get(name), kind)]
    if wrong := wrong or impossible(found):
        raise DataError(f"{path} is damaged: {', '.join(wrong)} cannot be; {AGAIN}")
    return found


def _digest(identity: Identity, name: str) -> str:
    """What a file of a cache is known by: a hash of its name and of what the cache was made from."""
    fields = {field: value for field, value in flatten(identity).items() if field not in PEOPLE}
    return hashlib.sha256(json.dumps([name, fields], sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
