"""From what a VAE returns to what the denoiser sees, and back.

    (1)  raw    = mean + std * noise                     a sample of the posterior
    (2)  model  = (raw - shift) * scale                  about zero mean and unit variance
    (3)  raw    = model / scale + shift

``(mean, std)``, the raw moments, are what is stored; (1) and (2) happen inside the train step, so that
every epoch draws another sample, and the VAE's decoder takes (3). Scale and shift are either the numbers
that came with the VAE (``scaling_factor``, ``shift_factor``; Rombach et al., arXiv:2112.10752, appendix G,
divide by the standard deviation of all latents) or measured per channel on the data.
"""

from typing import NamedTuple

import jax
import numpy as np


class LatentScale(NamedTuple):
    """The affine map (2) between raw and model latents, per channel; a pytree.

    Attributes:
      shift: float32 ``[C]``.
      scale: float32 ``[C]``.
    """

    shift: np.ndarray
    scale: np.ndarray

    def to_model(self, raw: jax.Array) -> jax.Array:
        """Raw latents ``[B, h, w, C]`` to model latents, equation (2)."""
        return (raw - self.shift[None, None, None]) * self.scale[None, None, None]

    def to_raw(self, latents: jax.Array) -> jax.Array:
        """Model latents ``[B, h, w, C]`` to raw latents, equation (3)."""
        return latents / self.scale[None, None, None] + self.shift[None, None, None]


def scale_from_factors(scaling_factor: float, shift_factor: float | None, channels: int) -> LatentScale:
    """The scale that a VAE's config states, the same for every channel; no shift factor is a shift of 0."""
    shift = 0.0 if shift_factor is None else shift_factor
    return LatentScale(
        np.full(channels, shift, np.float32),
        np.full(channels, scaling_factor, np.float32),
    )


def measure_scale(mean: np.ndarray, std: np.ndarray) -> LatentScale:
    """The scale that gives every channel of these latents zero mean and unit variance.

    A raw sample (1) has the variance of the means plus the mean of ``std ** 2`` (law of total variance).

    Args:
      mean: ``[B, h, w, C]`` of as many pictures as are at hand.
      std: likewise.

    Raises:
      ValueError: a channel does not vary.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    axes = (0, 1, 2)
    variance = mean.var(axis=axes) + np.square(std).mean(axis=axes)
    if not (variance > 0).all():
        raise ValueError(f"latent channels {np.flatnonzero(~(variance > 0)).tolist()} do not vary")
    return LatentScale(mean.mean(axis=axes).astype(np.float32), (variance**-0.5).astype(np.float32))
