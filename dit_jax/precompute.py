"""Encodes a data set once, into a cache that any number of runs train from.

    python -m dit_jax.precompute --config=configs/small.py --config.data.source=folder:my_pictures --output=caches/mine
    python -m dit_jax.main --config=configs/small.py --config.data.source=cache:caches/mine
    python -m dit_jax.precompute --config=configs/small.py --inspect=folder:my_pictures

The same command again goes on where it was interrupted. ``--shard=i/n`` does the i-th of n parts of the work, i from 0
to n - 1: processes on any machines that share the folder do one part each, in any order, and the last to end finishes
the cache. What is in it does not depend on who made what. ``--inspect`` looks at a data set, or at a cache, encodes
nothing, and writes nothing but a contact sheet.
"""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from ml_collections import ConfigDict

from dit_jax.arrays import to_pixels
from dit_jax.config import load_config, name_of
from dit_jax.ending import run_program, writable
from dit_jax.errors import ConfigError, DataError, WorkdirError
from dit_jax.runtime import EVERY_KEY, add_flags, path_of, program_parser, read_overrides, say, set_up

if TYPE_CHECKING:
    from dit_jax.data.cache.gather import Cache
    from dit_jax.data.cache.parts import Texts, Unit
    from dit_jax.data.sources.records import Record, Source
    from dit_jax.training.encode import Encoding

TRIED = (16, 256)  # pictures or captions whose encoding is timed for the forecast: few, and more where few are quick
LONG_ENOUGH = 2.0  # seconds that tell how quick it is
COUNTED = 2000  # captions whose tokens are counted for it
SPARE = 2**28  # bytes of the disk that are not filled
PER_FILE = 4096  # pictures, or captions, in a file
ALL_KEYS = "configs/default.py"  # what is inspected with where no config is named
SHEET_NAME = "contact_sheet.png"
SHEET = (6, 4)  # columns and rows of a contact sheet
OPENED = 20_000  # pictures of a larger set are sampled when it is inspected


def precompute(config: ConfigDict, output: Path, part: int, parts: int, per_shard: int) -> bool:
    """Encode what is missing of a part of the data set, and finish the cache if nothing else is missing.

    Args:
      config: as `dit_jax.config.load_config` returns it.
      output: the folder of the cache.
      part, parts: which part of the work, 0 to ``parts - 1``.
      per_shard: records, or captions, in a file.

    Returns:
      Whether the cache is finished.

    Raises:
      ConfigError: values that cannot be.
      DataError: a data set that cannot be read or has too many bad records, whoever found them, or a folder that holds
        something else.
      WorkdirError: the folder cannot be written to, or its disk is too small.
    """
    from dit_jax import build
    from dit_jax.data.cache import files
    from dit_jax.data.cache.parts import units
    from dit_jax.encoded import SAY_EVERY, note_problems
    from dit_jax.feed import say_long
    from dit_jax.training.encode import encode_units
    from dit_jax.training.progress import EncodingCounter, duration

    # ---- what there is, and what is missing
    encoding = open_encoding(config, per_shard)
    identity, table = encoding.identity, encoding.table
    pictures, captions = len(table.bucket), len(table.captions)
    say(f"data: {encoding.source.name}, {pictures:,} pictures, {captions:,} distinct captions -> {output}")
    every_unit = units(identity)
    mine = every_unit[part::parts]
    with writable(output):
        files.begin(output, identity, table)
        missing = set(files.missing(output, identity))
        bad_records = build.make_bad_records(config, output / files.BAD_RECORDS, pictures)

    def note_written(some: Iterable["Unit"]) -> None:
        for unit in some:
            if unit.kind == "pictures":
                with writable(output):
                    note_problems(bad_records, table, unit, files.written(output, identity, unit))

    note_written(unit for unit in every_unit if unit not in missing)
    left = [unit for unit in mine if unit in missing]
    whose = f"part {part} of {parts}: " if parts > 1 else ""
    say(f"{whose}{len(left)} of {len(mine)} files to make")

    # ---- encode
    if left:
        if not os.access(output, os.W_OK):  # before the work; a disk that is read-only has no room either
            raise WorkdirError(f"{output} cannot be written to, and files are missing there: {len(left)}")
        forecast(output, encoding, left)
        begin = time.monotonic()
        with closing(EncodingCounter(left, SAY_EVERY)) as counter:
            for unit, shard in encode_units(encoding, left, counter.told):
                with writable(output):
                    note_problems(bad_records, table, unit, shard)
                    files.write(output, identity, unit, shard)
                del shard  # before the next one is made
        say(f"encoded {sum(map(len, left)):,} pictures and captions in {duration(time.monotonic() - begin)}")

    # ---- finish
    if others := files.missing(output, identity):
        say(f"{len(others)} of {len(every_unit)} files are missing still; the other parts make them")
        return False
    note_written(unit for unit in every_unit if unit in missing)  # those that other parts have made since, too
    from dit_jax.data.inspection.words import Progress

    hashing = Progress(say)
    with writable(output):
        manifest = files.finish(output, identity, lambda done, total: hashing.at(done, total, "bytes hashed"))
    size = sum(known["bytes"] for known in manifest["shards"].values())
    say(f"done: {in_words(size)}, {size / pictures:,.0f} bytes a picture, bad records: {manifest['bad_records']:,}")
    texts = (files.written(output, identity, unit) for unit in every_unit if unit.kind == "texts")  # one at a time
    tokens = np.concatenate([np.zeros(0, int), *(np.diff(cast("Texts", shard).offsets) for shard in texts)])
    full = np.flatnonzero(tokens == encoding.text_encoder.length)
    say_long(len(full), table.captions[full[0]] if len(full) else "", encoding.text_encoder.length, say)
    return True


def open_encoding(config: ConfigDict, per_shard: int) -> "Encoding":
    """The data set of a config with its encoders and all that is known of a cache before anything is encoded."""
    from dit_jax import build
    from dit_jax.data.ahead import THREADS
    from dit_jax.data.cache.gather import Cache
    from dit_jax.data.cache.parts import tabulate
    from dit_jax.data.sources.records import Mixture
    from dit_jax.feed import find_buckets
    from dit_jax.resolve import resolve
    from dit_jax.training.encode import Encoding

    source = build.make_source(config, "all")
    if isinstance(source, Cache):
        raise ConfigError(f"data.source={config.data.source} is encoded already")
    if isinstance(source, Mixture):
        raise ConfigError("a mixture is not cached as one: encode its sources one by one, and mix their caches")
    if config.data.crop == "random":
        raise ConfigError("data.crop=random cannot be cached: a picture that is encoded once is cut once")
    vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    resolve(config, len(source), vae.shape, text_encoder.shape, 1)
    for encoder in (vae, text_encoder):
        say(f"encoder: {encoder.name} sha256 {encoder.sha256[:12]}")
    shapes = build.make_shapes(config, vae.factor)
    table = tabulate(source, find_buckets(source, shapes, config.data.patience, say))
    counts, mirrored = table.counts(len(shapes)), build.choose_flip(config, source)
    identity = build.make_identity(
        config, source.name, source.fingerprint(), counts, shapes, mirrored, vae, text_encoder, per_shard
    )
    how = THREADS, config.data.workers, config.data.patience
    return Encoding(identity, source, table, vae, text_encoder, *how)


def forecast(output: Path, encoding: "Encoding", left: "Sequence[Unit]") -> None:
    """Say how much disk and time the work will take, from encoding a few pictures and captions.

    Raises:
      WorkdirError: there is less room on the disk.
    """
    from dit_jax.data.cache.parts import moments_shape
    from dit_jax.training.encode import encode_units, tokenize_quietly
    from dit_jax.training.progress import duration

    identity, text = encoding.identity, encoding.text_encoder
    shards = {kind: [unit for unit in left if unit.kind == kind] for kind in ("pictures", "texts")}
    counts = {kind: sum(map(len, some)) for kind, some in shards.items()}
    itemsize = np.dtype(identity["storage_dtype"]).itemsize
    of_pictures = sum(int(np.prod(moments_shape(identity, unit))) for unit in shards["pictures"]) * itemsize
    of_texts, tokens = 0, 0.0
    if shards["texts"]:
        some = shards["texts"][:: -(-len(shards["texts"]) // 8)]
        captions = [caption for unit in some for caption in unit.captions(encoding.table)[: COUNTED // len(some)]]
        tokens = float(tokenize_quietly(text, captions)[1].sum(1).mean())
        of_texts = int(counts["texts"] * (2 * tokens * text.width + 2 * text.pooled_width + 8))

    seconds = 0.0
    for some in filter(None, shards.values()):
        for count in TRIED:
            trial = dataclasses.replace(some[0], last=min(some[0].last, some[0].first + count))
            for _ in range(2):  # the first compiles
                begin = time.monotonic()
                list(encode_units(encoding, [trial], lambda unit, count: None))
                taken = time.monotonic() - begin
            if taken > LONG_ENOUGH:
                break
        seconds += taken / len(trial) * sum(map(len, some))
    free = shutil.disk_usage(output).free
    say(
        f"forecast: latents {in_words(of_pictures)}, text {in_words(of_texts)} ({tokens:.1f} tokens a caption),"
        f" {duration(seconds)}; the disk has {in_words(free)} free, of which {in_words(SPARE)} are left free"
    )
    if of_pictures + of_texts + SPARE > free:
        raise WorkdirError(
            f"the disk of {output} has {in_words(free)} free, and the cache needs {in_words(of_pictures + of_texts)}"
            f" and {in_words(SPARE)} to spare; make room, or give another --output"
        )


def inspect(config: ConfigDict, sheet: Path) -> None:
    """Say what ``data.source`` holds, a data set or a cache, and write some of it as a contact sheet.

    Args:
      config: as `dit_jax.config.load_config` returns it; captions are counted in tokens of its text encoder.
      sheet: the PNG file.

    Raises:
      ConfigError: values that cannot be.
      DataError: a data set that cannot be read, or a cache that is damaged; after all has been said.
    """
    from dit_jax import build
    from dit_jax.data.ahead import THREADS
    from dit_jax.data.cache.files import open_cache
    from dit_jax.data.inspection.caches import inspect_cache
    from dit_jax.data.inspection.contact_sheet import contact_sheet, lay_out
    from dit_jax.data.inspection.sources import inspect
    from dit_jax.data.sources.catalogue import parse
    from dit_jax.data.sources.folder import passed_over
    from dit_jax.resolve import check_ranges

    check_ranges(config)
    parts = parse(config.data.source)
    caches = [part.place for part in parts if part.kind == "cache"]
    if caches and len(parts) > 1:
        raise ConfigError(f"--inspect={config.data.source}: look at a cache alone")
    check_sheet(sheet, [path_of(part.place) for part in parts if part.place])
    image, damaged = None, tuple[str, ...]()
    if caches:
        found = inspect_cache(path_of(caches[0]), config.data.max_bad_fraction, say)
        lines, damaged = found.lines(), found.damaged
        if not damaged:
            title = f"cache:{caches[0]}, decoded from its latents"
            image = lay_out(title, decoded(config, open_cache(path_of(caches[0]))), SHEET[0])
    else:
        source, text = cast("Source", build.make_source(config, "all")), build.make_text_encoder(config)
        say(f"tokens are those of {text.name}")
        shapes = build.make_shapes(config, build.describe_encoders(config)[0].factor) if config.data.buckets else ()
        size, bad = config.data.image_size, config.data.max_bad_fraction
        how = THREADS, config.data.patience
        lines = inspect(source, text.tokenizer.count, text.length, size, bad, shapes, OPENED, *how, say).lines()
        unread = filter(None, (passed_over(path_of(part.place)) for part in parts if part.kind == "folder"))
        lines += [f"passed over: {kinds}" for kinds in unread]
        image = contact_sheet(source, *SHEET, *how)
    say("\n".join(lines))
    if image:
        with writable(sheet.parent):
            image.save(sheet, format="PNG")
        say(f"contact sheet: {sheet}")
    if damaged:
        raise DataError(
            f"{config.data.source} is damaged, as said above; files: {len(damaged)}, the first {damaged[0]}"
        )


def check_sheet(sheet: Path, inspected: "Sequence[Path]") -> None:
    """Refuse a place for the contact sheet that is not there, or where it would become part of the data."""
    folder = sheet.parent.resolve()
    if not folder.is_dir():
        raise ConfigError(f"--sheet={sheet}: there is no folder {sheet.parent}")
    for place in inspected:
        if place.is_dir() and folder.is_relative_to(place.resolve()):
            raise ConfigError(
                f"the contact sheet {sheet} would lie in the data of {place}; give another place: --sheet=PATH.png"
            )


def decoded(config: ConfigDict, cache: "Cache") -> "Iterator[Record]":
    """Some records of a cache, their pictures decoded from the latents.

    Raises:
      ConfigError: they were encoded by another VAE than the config's.
    """
    from dit_jax import build
    from dit_jax.data.inspection.contact_sheet import spread
    from dit_jax.data.sources.records import Record

    vae, made_by = build.make_vae(config), cache.identity["vae"]
    if vae.sha256 != made_by["sha256"]:
        raise ConfigError(f"the cache was made with another VAE than {vae.name}: --config.vae={made_by['name']}")
    good = np.flatnonzero(~cache.bad)
    some = cache.select(good[spread(SHEET[0] * SHEET[1], len(good))])
    for i, (id, captions) in enumerate(zip(some.ids(), some.captions(), strict=True)):
        mean = some.gather(np.array([i]), np.zeros(1, np.uint64), np.zeros(1, bool))["mean"].astype(np.float32)
        yield Record(to_pixels(vae.decode(mean))[0], captions, id)


def in_words(size: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("precompute", __doc__, EVERY_KEY, allow_abbrev=False)
    parser.add_argument(
        "--config", help=f"FILE.py, FILE.py:key=value,key=value or a run's config.json; to inspect, {ALL_KEYS}"
    )
    parser.add_argument("--output", type=path_of, help="folder of the cache; default: caches/<config name>")
    parser.add_argument("--shard", type=part_of, help="i/n: the i-th of n parts, i from 0 to n - 1")
    parser.add_argument("--records_per_file", type=count_of, help=f"pictures, or captions, in a file; {PER_FILE}")
    parser.add_argument("--inspect", metavar="SOURCE", help="look at a data set or cache, and encode nothing")
    parser.add_argument("--sheet", type=path_of, help=f"with --inspect: the PNG file; {SHEET_NAME}")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)
    if args.config is None and args.inspect is None:
        parser.error("--config is needed: it says which encoders, and how large the pictures are")
    if args.config is None and not Path(ALL_KEYS).is_file():
        parser.error(f"--inspect needs --config=FILE where there is no {ALL_KEYS}: it says how large the pictures are")
    inspecting = args.inspect is not None
    for flag in ("output", "shard", "records_per_file") if inspecting else ("sheet",):
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} does not go with --inspect" if inspecting else f"--{flag} needs --inspect")

    def run() -> None:
        config = load_config(args.config or ALL_KEYS, overrides)
        set_up(args.allow_cpu, args.verbose)
        if inspecting:
            config.data.source = args.inspect
            inspect(config, args.sheet or Path(SHEET_NAME))
            return
        output = args.output or Path("caches") / name_of(args.config)
        part, parts = args.shard or (0, 1)
        if precompute(config, output, part, parts, args.records_per_file or PER_FILE):
            keys = {**overrides, "data.source": f"cache:{output}"}  # of the same config
            words = [f"--config={args.config}", *(f"--config.{key}={value}" for key, value in keys.items())]
            say(f"train from it: {shlex.join(['python', '-m', 'dit_jax.main', *words])}")

    run_program(run, args.traceback, "JAX_PLATFORMS=cpu encodes it in the host's memory")


def part_of(text: str) -> tuple[int, int]:
    """``i/n`` as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def count_of(text: str) -> int:
    """A number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
