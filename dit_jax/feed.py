"""What a run is fed with: from ``data`` of a config to encoded batches, a function of the step.

    source --scan--> encode_once --> Cache --gather--> batches                   data.encode=once: dit_jax.encoded
    source --batches--> encode_every_step --> batches                            data.encode=every_step
    cache:FOLDER --> Cache --gather--> batches                                   see dit_jax.precompute

All three give the same batches for the same config and records, but where all records of a shape are bad: its turns
are left out where that is known beforehand, and pictures of other shapes stand in with ``every_step``.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dit_jax import build, processes
from dit_jax.data.ahead import THREADS, gathered, in_threads
from dit_jax.data.bad_records import BadRecords, too_many
from dit_jax.data.buckets import assign, sizes_of
from dit_jax.data.cache.gather import Cache
from dit_jax.data.cache.parts import mismatches
from dit_jax.data.loader import Sample, Samples, batches
from dit_jax.data.order import Order, caption_words, is_mirrored
from dit_jax.data.sources.records import Source
from dit_jax.encoded import Place, Say, encode_once
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.encoders.latents import measure_scale
from dit_jax.errors import ConfigError, DataError
from dit_jax.files import flatten
from dit_jax.training import encode
from dit_jax.training.encode import EncodedBatch

FIRST = 8  # samples that the start check looks at
MEASURED = 2048  # samples whose latents are measured

# Of what a cache says of itself, what a run does not care for.
NOT_ASKED = (
    "format",
    "data.name",
    "data.fingerprint",
    "vae.name",
    "text_encoder.name",
    "records_per_shard",
    "captions_per_shard",
)

# (first step, last step, rows) -> these rows of the encoded batches
Batches = Callable[[int, int, range], Generator[EncodedBatch, None, None]]


class Feed(NamedTuple):
    """The data of a run.

    Attributes:
      batches: (first step, last step, rows of a batch) -> these rows of the encoded batches of the steps between; the
        first step of a run is 0 here. Each of several processes reads its own rows (`processes.own_rows`).
      records: steps -> the ids of the records of each one's whole batch.
      grids: the latent grids ``(h, w)`` that batches have: one per bucket that has records.
    """

    batches: Batches
    records: Callable[[range], dict[int, list[str]]]
    grids: list[tuple[int, int]]


def open_feed(
    config: ConfigDict,
    source: Source | Cache,
    vae: VAE,
    preview: VAE,
    text_encoder: TextEncoder,
    say: Say,
    *,
    listed: Path,
    kept: Place | None,
) -> Feed:
    """Encode the source, or get ready to at every step; fill ``config.latents``; look at the first samples.

    Args:
      config: resolved; ``latents`` is filled in place where it is empty.
      source: the training part of ``data.source``.
      vae, text_encoder: what encodes.
      preview: what decodes the samples of the run.
      say: is given what a person should know, line by line.
      listed: the run's list of bad records.
      kept: where what is encoded as a whole stays for later starts; None keeps it in memory alone.

    Raises:
      ConfigError: a cache that was made in another way than the config says.
      DataError: a data set that cannot be read.
    """
    if isinstance(source, Cache):
        coming = from_cache(config, source, vae, text_encoder, say)
    else:
        coming = from_source(config, listed, kept, source, vae, text_encoder, say)
    if not config.latents.scale:
        fill_latents(config, vae, coming.batches, len(source))
    say_start_check(config, coming.batches, coming.images, vae, preview, say)
    sides = [coming.shapes[bucket] for bucket in coming.order.used]
    grids = [(height // vae.factor, width // vae.factor) for height, width in sides]

    def ids(steps: range) -> dict[int, list[str]]:
        names = list(source.ids())
        return {step: [names[index] for index in coming.records(step - 1)] for step in steps}

    return Feed(coming.batches, ids, grids)


def open_validation(
    config: ConfigDict,
    source: Source | Cache,
    vae: VAE,
    text_encoder: TextEncoder,
    say: Say,
    *,
    listed: Path | None,
    kept: Place | None,
) -> Cache:
    """The records to validate on, encoded as a whole, however the run itself encodes.

    Args:
      config: resolved.
      source: the records.
      vae, text_encoder: what encodes.
      say: as of `open_feed`.
      listed: the run's list of bad records, which do not validate; None lists none.
      kept: as of `open_feed`.

    Raises:
      ConfigError: a cache that was made in another way than the config says.
      DataError: records that cannot be read: all of them, or they do not come.
    """
    if isinstance(source, Cache):
        check_cache(config, source, vae, text_encoder)
        cache = source
    else:
        say("the records to validate on:")
        shapes = build.make_shapes(config, vae.factor)
        bucket = find_buckets(source, shapes, config.data.patience, say)
        bad_records = BadRecords(listed, 1.0, len(source))  # how many are too many is for training to say
        cache = encode_once(config, kept, source, bucket, shapes, False, vae, text_encoder, bad_records, say)
    bad = int(cache.bad.sum())
    if bad == len(cache):
        raise DataError(f"all {bad:,} records of {config.data.source} to validate on are bad")
    say(f"validation: {len(cache) - bad:,} records" + (f", {bad:,} bad ones left out" if bad else ""))
    return cache


# --------------------------------------------------------------------------------------------------- the three ways


class Coming(NamedTuple):
    """What comes of the records of a run, in one of the three ways.

    Attributes:
      order: of the records.
      shapes: height and width of the pictures of each bucket.
      records: step -> the records of its batch, int64 ``[B]``.
      batches: as those of `Feed`.
      images: the first pictures, uint8 ``[F, height, width, 3]``; None where only their latents are there.
    """

    order: Order
    shapes: tuple[tuple[int, int], ...]
    records: Callable[[int], np.ndarray]
    batches: Batches
    images: np.ndarray | None


def from_cache(config: ConfigDict, cache: Cache, vae: VAE, text_encoder: TextEncoder, say: Say) -> Coming:
    """The records of a cache on disk.

    Raises:
      ConfigError: it was made in another way than the config says.
      DataError: too many of its records are bad.
    """
    check_cache(config, cache, vae, text_encoder)
    check_bad(config, cache)
    order = build.make_order(config, cache, cache.bucket).without(cache.bad)
    records = gathered_records(config, cache, order)
    encoded_batches = gathered_batches(config, cache, records, cache.mirrored and config.data.flip != "off")
    say_long(*cache.captions_of_length(text_encoder.length), text_encoder.length, say)
    if cache.bad.any():
        say(f"bad records: {cache.bad.sum():,}, replaced by others, listed in bad_records.jsonl of the cache")
    return Coming(order, cache.shapes, records, encoded_batches, None)


def from_source(
    config: ConfigDict,
    listed: Path,
    kept: Place | None,
    source: Source,
    vae: VAE,
    text_encoder: TextEncoder,
    say: Say,
) -> Coming:
    """Pictures and captions, encoded now or at every step.

    Raises:
      DataError: the data set cannot be read, or too many records are bad.
    """
    bad_records = build.make_bad_records(config, listed, len(source))
    shapes = build.make_shapes(config, vae.factor)
    bucket = find_buckets(source, shapes, config.data.patience, say)
    samples = build.make_samples(config, source, build.make_order(config, source, bucket), shapes)
    if config.data.encode == "once":
        cache = encode_once(config, kept, source, bucket, shapes, samples.flip, vae, text_encoder, bad_records, say)
        # a shape whose pictures are all bad has no turn, and the first pictures are others
        samples = dataclasses.replace(samples, order=samples.order.without(cache.bad))
        first = first_samples(config, samples)
        records = gathered_records(config, cache, samples.order)
        encoded_batches = gathered_batches(config, cache, records, samples.flip)
        say_long(*cache.captions_of_length(text_encoder.length), text_encoder.length, say)
    else:
        first = first_samples(config, samples)
        tokenize = functools.partial(encode.tokenize_quietly, text_encoder)
        full = tokenize([sample.caption for sample in first])[1].all(1)
        longest = first[int(full.argmax())].caption
        say_long(int(full.sum()), longest, text_encoder.length, say, f" of the first {len(first)}")
        records = turns(config, samples.order)
        encoded_batches = batches_of_every_step(config, samples, tokenize, bad_records, vae, text_encoder)
    if bad_records:
        say(f"bad records: {len(bad_records)}, replaced by others, listed in {bad_records.path}")
    images = np.stack([sample.image for sample in first])
    return Coming(samples.order, shapes, records, encoded_batches, images)


def first_samples(config: ConfigDict, samples: Samples) -> list[Sample]:
    """What the start check looks at."""
    some, what = range(min(FIRST, config.batch_size)), f"reading {samples.source.name}"
    return list(in_threads(samples.__getitem__, some, THREADS, FIRST, config.data.patience, what))


def turns(config: ConfigDict, order: Order) -> Callable[[int], np.ndarray]:
    """Step -> the records whose turn it is, int64 ``[B]``; what stands in for bad ones is in their list."""
    B = config.batch_size
    return lambda step: order.indices(np.arange(step * B, (step + 1) * B))


def batches_of_every_step(
    config: ConfigDict,
    samples: Samples,
    tokenize: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
    bad_records: BadRecords,
    vae: VAE,
    text_encoder: TextEncoder,
) -> Batches:
    """Batches that are read and encoded as they are needed."""
    data = config.data

    def encoded_batches(start: int, stop: int, rows: range) -> Generator[EncodedBatch, None, None]:
        how = THREADS, data.workers, data.patience
        raw = batches(samples, tokenize, bad_records, start, stop, rows, *how)
        return encode.encode_every_step(raw, vae, text_encoder, data.storage_dtype)

    return encoded_batches


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


# -------------------------------------------------------------------------------------------------- from a cache


def gathered_records(config: ConfigDict, cache: Cache, order: Order) -> Callable[[int], np.ndarray]:
    """Step -> the records of a cache that its batch is gathered from, int64 ``[B]``."""
    used, turn = order.stand_ins(cache.bad), turns(config, order)
    return lambda step: used[turn(step)]


def gathered_batches(config: ConfigDict, cache: Cache, records: Callable[[int], np.ndarray], flip: bool) -> Batches:
    """Batches of a cache, gathered by threads."""
    B, seed = config.batch_size, config.seed

    def make(rows: range, step: int) -> EncodedBatch:
        k = np.arange(step * B + rows.start, step * B + rows.stop)
        sides = is_mirrored(k, seed) if flip else np.zeros(len(k), bool)
        return cache.gather(records(step)[rows.start : rows.stop], caption_words(k, seed), sides)

    threads = max(1, config.data.workers)
    return lambda start, stop, rows: gathered(functools.partial(make, rows), start, stop, threads)


def say_long(count: int, first: str, length: int, say: Say, of: str = "") -> None:
    """Say how many captions fill all tokens of the text encoder, and the first: most likely they were longer.

    ``of`` says which captions were looked at, where it was not all.
    """
    if count:
        say(
            f"warning: captions that fill all {length} tokens of the text encoder, and may be cut: {count:,}{of}, the"
            f" first {first[:100]!r}"
        )


def check_cache(config: ConfigDict, cache: Cache, vae: VAE, text_encoder: TextEncoder) -> None:
    """Hold a cache to the config of the run.

    Raises:
      ConfigError: it was made with other encoders or in another way; every field is named.
    """
    shapes = build.make_shapes(config, vae.factor)
    mirrored = cache.mirrored or config.data.flip == "on"
    asked = build.make_identity(config, "", "", {}, shapes, mirrored, vae, text_encoder, 0)
    asked["buckets"] = shapes_in_words(shapes)
    expected = {name: value for name, value in flatten(asked).items() if name not in NOT_ASKED}
    wrong = mismatches(cache.identity | {"buckets": shapes_in_words(cache.shapes)}, expected)
    if wrong:
        raise ConfigError(
            f"{config.data.source} was not made for this config: {'; '.join(wrong)}; set the keys to the cache's, or"
            " make another cache: python -m dit_jax.precompute"
        )


def check_bad(config: ConfigDict, cache: Cache) -> None:
    """Raises DataError if more records of a cache are bad than a run bears."""
    bad = int(cache.bad.sum())
    if too_many(bad, config.data.max_bad_fraction, len(cache)):
        raise DataError(
            f"{config.data.source}: {bad:,} of {len(cache):,} records are bad, more than"
            f" data.max_bad_fraction={config.data.max_bad_fraction} allows (bad_records.jsonl in its folder lists them)"
        )


def shapes_in_words(shapes: tuple[tuple[int, int], ...]) -> str:
    """The value of ``data.buckets`` that gives these shapes and, but for squares, the shapes, width x height."""
    each = " ".join(f"{width}x{height}" for height, width in shapes)
    return "0" if len(shapes) == 1 else f"{len(shapes)} ({each})"


# ------------------------------------------------------------------------------------------------ the first samples


def fill_latents(config: ConfigDict, vae: VAE, encoded_batches: Batches, records: int) -> None:
    """Write the shift and scale of latents into the config: the VAE's own, or as measured on the first samples.

    Several processes look at the same samples, and take the figures of the first: another machine may round otherwise.
    """
    scale = vae.latent_scale
    if config.latents.normalize == "measured":
        B = config.batch_size
        some = list(encoded_batches(0, -(-min(MEASURED, records) // B), range(B)))
        with build.config_errors("latents"):
            scale = measure_scale(*(_pixels([batch[key] for batch in some]) for key in ("mean", "std")))
    shift, scale = processes.of_first([scale.shift.tolist(), scale.scale.tolist()])
    config.latents.shift, config.latents.scale = tuple(shift), tuple(scale)


def _pixels(moments: list[np.ndarray]) -> np.ndarray:
    """Moments ``[B, h, w, C]``, perhaps on different grids, as one array ``[P, 1, 1, C]``."""
    return np.concatenate([array.reshape(-1, 1, 1, array.shape[-1]) for array in moments])


def say_start_check(
    config: ConfigDict,
    encoded_batches: Batches,
    images: np.ndarray | None,
    vae: VAE,
    preview: VAE,
    say: Say,
) -> None:
    """Look at the first samples, and say what is found and what is wrong with it."""
    with closing(encoded_batches(0, 1, range(min(FIRST, config.batch_size)))) as stream:
        batch = next(stream)
    check = encode.check_start(batch, images, vae, preview, build.make_latents(config))
    trip = "" if check.psnr is None else f"VAE round trip {check.psnr:.1f} dB, "
    say(
        f"start check: {trip}latents mean {check.latent_mean:.2f} std {check.latent_std:.2f},"
        f" {check.tokens:.1f} tokens a caption"
    )
    if preview is not vae and check.preview_psnr is not None:
        say(f"start check: {preview.name} decodes them for the samples of the run, {check.preview_psnr:.1f} dB")
    for warning in check.warnings():
        say(f"warning: {warning}")
