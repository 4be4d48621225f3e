"""From pictures and captions to encoded batches: where the frozen encoders run.

They are frozen, so a record gives the same moments and text states at every epoch. `encode_once` runs them over the
whole source and keeps what they return in memory; `encode_every_step` runs them on each batch, for sources that do
not fit. Both give the same batches, each a function of its step alone; only the masked tokens behind the longest
caption of the source are left out where it is known, which saves the work that they cost and changes no result.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dit_jax.data.loader import RawBatch, is_mirrored, position_to_index
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.encoders.latents import LatentScale

EncodedBatch = dict[str, np.ndarray]  # its keys: see dit_jax.arrays

# What text states are kept as. Both ways round to it, so that both train on the same numbers.
TEXT_DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Encoded:
    """A source of n records, encoded.

    Attributes:
      mean, std: float32 ``[n, F, h, w, C]`` raw moments; F is 2 where mirrored pictures are kept too, else 1.
      hidden, pooled, mask: of the distinct captions, ``[m, S, E]``, ``[m, P]`` and ``[m, S]``, S the longest of them.
      caption: int32 ``[n]``, which of the m captions a record has.
      seed: of the data order.
    """

    mean: np.ndarray
    std: np.ndarray
    hidden: np.ndarray
    pooled: np.ndarray
    mask: np.ndarray
    caption: np.ndarray
    seed: int

    def batch(self, step: int, batch_size: int) -> EncodedBatch:
        """The batch of a step: the samples that `dit_jax.data.loader.batches` takes with the same seed."""
        n, F = self.mean.shape[:2]
        k = np.arange(step * batch_size, (step + 1) * batch_size)
        row = position_to_index(k, n, self.seed)
        side = np.array([is_mirrored(int(i), self.seed) for i in k], np.int64) if F == 2 else np.zeros_like(k)
        text = self.caption[row]
        return {
            "mean": self.mean[row, side],
            "std": self.std[row, side],
            "hidden": self.hidden[text].astype(np.float32),
            "pooled": self.pooled[text].astype(np.float32),
            "mask": self.mask[text],
        }


def encode_once(chunks: Iterable[RawBatch], vae: VAE, text_encoder: TextEncoder, flip: bool, seed: int) -> Encoded:
    """Encode every record of a source, given the raw batches of `dit_jax.data.loader.scan`.

    Captions repeat, so each distinct one is encoded and kept once.
    """
    means, stds, texts, caption = [], [], [], []
    number: dict[bytes, int] = {}
    for raw in chunks:
        images = to_signed(raw["image"])
        moments = [vae.encode(side) for side in ([images, images[:, :, ::-1]] if flip else [images])]
        means.append(np.stack([np.asarray(mean) for mean, _ in moments], axis=1))
        stds.append(np.stack([np.asarray(std) for _, std in moments], axis=1))
        new = []
        for i, ids in enumerate(raw["ids"]):
            if ids.tobytes() not in number:
                number[ids.tobytes()] = len(number)
                new.append(i)
            caption.append(number[ids.tobytes()])
        if new:
            texts.append(_encode_text(text_encoder, raw["ids"][new], raw["mask"][new]))
    hidden, pooled, mask = (np.concatenate(parts) for parts in zip(*texts, strict=True))
    S = int(mask.sum(1).max())
    return Encoded(
        np.concatenate(means),
        np.concatenate(stds),
        np.ascontiguousarray(hidden[:, :S]),
        pooled,
        mask[:, :S],
        np.asarray(caption, np.int32),
        seed,
    )


def encode_every_step(raw_batches: Iterable[RawBatch], vae: VAE, text_encoder: TextEncoder) -> Iterator[EncodedBatch]:
    """Encode raw batches as they come."""
    for raw in raw_batches:
        mean, std = vae.encode(to_signed(raw["image"]))
        hidden, pooled, mask = _encode_text(text_encoder, raw["ids"], raw["mask"])
        yield {
            "mean": np.asarray(mean),
            "std": np.asarray(std),
            "hidden": hidden.astype(np.float32),
            "pooled": pooled.astype(np.float32),
            "mask": mask,
        }


def to_signed(image: np.ndarray) -> np.ndarray:
    """uint8 pictures to float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1.0


def _encode_text(
    text_encoder: TextEncoder, ids: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    states = text_encoder.encode_ids(ids, mask)
    return np.asarray(states.hidden).astype(TEXT_DTYPE), np.asarray(states.pooled).astype(TEXT_DTYPE), mask


@dataclass(frozen=True)
class StartCheck:
    """What the first pictures look like to the encoders.

    Attributes:
      psnr: of pictures that went through the VAE, in dB.
      preview_psnr: of the same latents as the previews' decoder returns them.
      latent_mean, latent_std: of model latents; about 0 and 1 when scale and shift fit the VAE and the data.
      tokens: mean number of tokens per caption, BOS and EOS included.
    """

    psnr: float
    preview_psnr: float
    latent_mean: float
    latent_std: float
    tokens: float

    def warnings(self) -> list[str]:
        """What is out of range, with the likely cause."""
        found = []
        if self.psnr < 18.0:
            found.append(f"the VAE returns these pictures at {self.psnr:.1f} dB: is it made for such pictures?")
        elif self.preview_psnr < 15.0:
            found.append(f"preview_vae returns them at {self.preview_psnr:.1f} dB: is it made for latents of this VAE?")
        if not (abs(self.latent_mean) < 0.5 and 0.5 < self.latent_std < 2.0):
            found.append(
                f"latents have mean {self.latent_mean:.2f} and std {self.latent_std:.2f}, not about 0 and 1:"
                " wrong scaling_factor? latents.normalize=measured finds scale and shift from the data"
            )
        return found


def check_start(raw: RawBatch, vae: VAE, preview: VAE, latents: LatentScale) -> StartCheck:
    """Send the pictures of one raw batch through the VAE and back, and look at latents and captions."""
    images = to_signed(raw["image"])
    mean, _ = vae.encode(images)
    model = np.asarray(latents.to_model(mean))

    def psnr(decoder: VAE) -> float:
        error = float(np.mean(np.square(np.asarray(decoder.decode(mean)) - images)))
        return 10 * np.log10(4.0 / max(error, 1e-10))  # pictures span 2, from -1 to 1

    return StartCheck(
        psnr=(own := psnr(vae)),
        preview_psnr=own if preview is vae else psnr(preview),
        latent_mean=float(model.mean()),
        latent_std=float(model.std()),
        tokens=float(raw["mask"].sum(1).mean()),
    )
