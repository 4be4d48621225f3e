"""From pictures and captions to encoded batches: where the frozen encoders run.

They are frozen, so a record gives the same moments and text states at every epoch. `encode_units` runs them over a
whole source, one shard after the other, and what it yields is kept for a run (`dit_jax.encoded`) or for many
(`dit_jax.precompute`): either way a `dit_jax.data.cache.gather.Cache`. `encode_every_step` runs them on each batch, for
sources that are kept nowhere. All round to the same dtypes, so all train on the same numbers.
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import to_signed
from dit_jax.data.cache.parts import Identity, Pictures, Table, Texts, Unit
from dit_jax.data.loader import RawBatch, Scanned, scan
from dit_jax.data.sources.records import Source
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.encoders.latents import LatentScale
from dit_jax.errors import DataError

EncodedBatch = dict[str, np.ndarray]  # its keys: see dit_jax.arrays
Told = Callable[[Unit, int], None]

TEXT_DTYPE = jnp.bfloat16  # what text states are kept as
CHUNK_PIXELS = 2**20  # of the pictures that are in memory at a time: 256 of 64 px, 16 of 256 px
CHUNK_CAPTIONS = 256


@dataclass(frozen=True)
class Encoding:
    """A source, and how it is encoded.

    Attributes:
      identity: what its cache says of itself (`dit_jax.data.cache.parts`).
      source: the records.
      table: their names, captions and buckets.
      vae, text_encoder: what encodes them.
      threads, workers: that read pictures.
      patience: seconds to wait for one, 0 for ever.
    """

    identity: Identity
    source: Source
    table: Table
    vae: VAE
    text_encoder: TextEncoder
    threads: int
    workers: int
    patience: float


def encode_units(encoding: Encoding, wanted: Sequence[Unit], told: Told) -> Iterator[tuple[Unit, Pictures | Texts]]:
    """Encode some of the shards that a source is cut into, in the order of ``wanted``.

    What a shard holds depends on the shard alone: neither on the others nor on how often the work was interrupted.
    ``told`` is called with a shard and the number of its captions or pictures that have just been encoded.
    """
    for (kind, bucket), group in itertools.groupby(wanted, lambda unit: (unit.kind, unit.bucket)):
        together = list(group)
        if kind == "texts":
            yield from ((unit, _encode_texts(encoding, unit, told)) for unit in together)
            continue
        # One stream of pictures for all shards of a bucket: what reads ahead starts once. No chunk lies in two shards.
        height, width = encoding.identity["buckets"][bucket]
        most = 1 << max(1, CHUNK_PIXELS // (height * width)).bit_length() - 1  # a power of two
        sizes = [min(most, len(unit) - first) for unit in together for first in range(0, len(unit), most)]
        records = np.flatnonzero(encoding.table.bucket == bucket)  # once: a set can have thousands of shards
        indices = np.concatenate([records[unit.first : unit.last] for unit in together])
        how = encoding.threads, encoding.workers, encoding.patience
        stream = scan(encoding.source, indices, height, width, sizes, *how)
        with contextlib.closing(stream):
            yield from ((unit, _encode_pictures(encoding, unit, stream, told)) for unit in together)


def _encode_texts(encoding: Encoding, unit: Unit, told: Told) -> Texts:
    """The states of a shard's captions."""
    hidden, lengths, pooled = [], [0], []
    all_captions = unit.captions(encoding.table)
    for first in range(0, len(all_captions), CHUNK_CAPTIONS):
        captions = all_captions[first : first + CHUNK_CAPTIONS]
        ids, mask = tokenize_quietly(encoding.text_encoder, captions)
        states = encoding.text_encoder.encode_ids(ids, mask)
        hidden.append(np.asarray(states.hidden)[mask].astype(TEXT_DTYPE))  # [tokens, E]
        pooled.append(np.asarray(states.pooled).astype(TEXT_DTYPE))
        lengths += mask.sum(1).tolist()
        told(unit, len(captions))
    return Texts(np.concatenate(hidden), np.cumsum(lengths, dtype=np.int64), np.concatenate(pooled))


def _encode_pictures(encoding: Encoding, unit: Unit, stream: Iterator[Scanned], told: Told) -> Pictures:
    """The next records of the stream, as many as the shard holds."""
    shard = Pictures.zeros(encoding.identity, unit)
    row = 0
    while row < len(unit):
        chunk = next(stream)
        images = to_signed(chunk["image"])
        rows = slice(row, row + len(images))
        for side in range(shard.mean.shape[1]):
            mean, std = encoding.vae.encode(images[:, :, ::-1] if side else images)
            with np.errstate(over="ignore"):  # looked at below
                shard.mean[rows, side], shard.std[rows, side] = np.asarray(mean), np.asarray(std)
        finite = np.isfinite(shard.moments[rows]).all(axis=(1, 2, 3, 4, 5))
        if not finite.all():
            record = encoding.table.ids[int(chunk["index"][np.argmin(finite)])]
            raise DataError(
                f"latents of {record} are not finite as {shard.moments.dtype}: data.storage_dtype=float32 holds larger"
                " ones; if that is what is used, the VAE returns such numbers"
            )
        shard.problems.update((row + i, bad.reason) for i, bad in enumerate(chunk["problems"]) if bad is not None)
        row += len(images)
        told(unit, len(images))
    for bad in shard.problems:
        shard.bad[bad], shard.moments[bad] = True, 0
    return shard


def encode_every_step(
    raw_batches: Iterable[RawBatch], vae: VAE, text_encoder: TextEncoder, dtype: str
) -> Generator[EncodedBatch, None, None]:
    """Encode raw batches as they come; moments are kept in ``dtype``."""
    for raw in raw_batches:
        mean, std = vae.encode(to_signed(raw["image"]))
        states = text_encoder.encode_ids(raw["ids"], raw["mask"])
        yield {
            "mean": np.asarray(mean).astype(dtype),
            "std": np.asarray(std).astype(dtype),
            "hidden": np.asarray(states.hidden).astype(TEXT_DTYPE),
            "pooled": np.asarray(states.pooled).astype(TEXT_DTYPE),
            "mask": raw["mask"],
        }


def tokenize_quietly(text_encoder: TextEncoder, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of captions; those that are too long are cut without a word, as they are told all at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return text_encoder.tokenize(captions)


@dataclass(frozen=True)
class StartCheck:
    """What the first samples look like to the encoders.

    Attributes:
      psnr: of pictures that went through the VAE, in dB; None where there are no pictures, as in a cache.
      preview_psnr: of the same latents as the previews' decoder returns them; likewise.
      latent_mean, latent_std: of model latents; about 0 and 1 when scale and shift fit the VAE and the data.
      tokens: mean number of tokens per caption, BOS and EOS included.
    """

    psnr: float | None
    preview_psnr: float | None
    latent_mean: float
    latent_std: float
    tokens: float

    def warnings(self) -> list[str]:
        """What is out of range, with the likely cause."""
        found = []
        if self.psnr is not None and self.psnr < 18.0:
            found.append(f"the VAE returns these pictures at {self.psnr:.1f} dB: is it made for such pictures?")
        elif self.preview_psnr is not None and self.preview_psnr < 15.0:
            found.append(f"preview_vae returns them at {self.preview_psnr:.1f} dB: is it made for latents of this VAE?")
        if not (abs(self.latent_mean) < 0.5 and 0.5 < self.latent_std < 2.0):
            found.append(
                f"latents have mean {self.latent_mean:.2f} and std {self.latent_std:.2f}, not about 0 and 1:"
                " wrong scaling_factor? latents.normalize=measured finds scale and shift from the data"
            )
        return found


def check_start(
    batch: EncodedBatch, images: np.ndarray | None, vae: VAE, preview: VAE, latents: LatentScale
) -> StartCheck:
    """Look at the first samples: their latents and captions and, where pictures are given, their way through the VAE.

    Args:
      batch: encoded.
      images: uint8 ``[B, height, width, 3]`` of the same samples.
      vae: what encoded them.
      preview: what decodes the samples of the run.
      latents: the scale of the run.
    """
    mean = batch["mean"].astype(np.float32)
    model = np.asarray(latents.to_model(mean))

    def psnr(decoder: VAE) -> float | None:
        if images is None:
            return None
        error = float(np.mean(np.square(np.asarray(decoder.decode(mean)) - to_signed(images))))
        return 10 * math.log10(4.0 / max(error, 1e-10))  # pictures span 2, from -1 to 1

    return StartCheck(
        psnr=(own := psnr(vae)),
        preview_psnr=own if preview is vae else psnr(preview),
        latent_mean=float(model.mean()),
        latent_std=float(model.std()),
        tokens=float(batch["mask"].sum(1).mean()),
    )
