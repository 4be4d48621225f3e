"""The tiny VAE for quick previews, the linen twin of diffusers' ``AutoencoderTiny``.

    (1)  encoder((x + 1) / 2)                 = z                       x in [-1, 1]
    (2)  2 decoder(3 tanh(z / 3)) - 1         ~ x
    (3)  z = 0.18215 raw

It is distilled from Stable Diffusion's VAE, in 2.4 million parameters: convolutions and ReLU, no norms, no
attention and no posterior. Its latents z are those that Stable Diffusion's denoiser sees; here (3) makes them raw
ones, so that it takes and gives what the big VAE does. The network is Ollin Boer Bohan's TAESD.

Modules and parameters carry the published names, with ``layers.0`` spelt ``layers_0``. The numbers are places in a
sequence that counts layers without parameters too, so that some are left out.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

# Of Stable Diffusion 1 and 2. The config of this class does not say it: there the z of (1) count as raw.
SCALING_FACTOR = 0.18215
CLAMP = 3.0


def _places() -> Iterator[str]:
    """Names of the layers of one published sequence."""
    return (f"layers_{i}" for i in itertools.count())


class Block(nn.Module):
    """Three 3 x 3 convolutions with a residual connection."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        for place in (0, 2, 4):
            x = nn.relu(x) if place else x
            x = nn.Conv(x.shape[-1], (3, 3), padding=1, dtype=self.dtype, name=f"conv_{place}")(x)
        return nn.relu(residual + x)


class Encoder(nn.Module):
    """Pictures in [0, 1] to latents; every level but the first halves the grid."""

    out_channels: int
    block_out_channels: Sequence[int]
    num_blocks: Sequence[int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = _places()
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        for i, (width, count) in enumerate(zip(self.block_out_channels, self.num_blocks, strict=True)):
            x = conv(width, strides=2 if i else 1, use_bias=i == 0, name=next(names))(x)
            for _ in range(count):
                x = Block(self.dtype, name=next(names))(x)
        return conv(self.out_channels, name=next(names))(x)


class Decoder(nn.Module):
    """Latents to pictures in [0, 1]; every level but the last doubles the grid by nearest neighbour."""

    out_channels: int
    block_out_channels: Sequence[int]
    num_blocks: Sequence[int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = _places()
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        x = nn.relu(conv(self.block_out_channels[0], name=next(names))(x))
        next(names)  # the activation
        levels = len(self.num_blocks)
        for i, (width, count) in enumerate(zip(self.block_out_channels, self.num_blocks, strict=True)):
            for _ in range(count):
                x = Block(self.dtype, name=next(names))(x)
            last = i == levels - 1
            if not last:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                next(names)  # the upsampling
            x = conv(self.out_channels if last else width, use_bias=last, name=next(names))(x)
        return x


class AutoencoderTiny(nn.Module):
    """A tiny autoencoder; fields are named as the keys of the published ``config.json``.

    Attributes:
      in_channels: of the pictures that go in, 3.
      out_channels: of the pictures that come out, 3.
      encoder_block_out_channels: the width of every level, the same for all.
      decoder_block_out_channels: likewise.
      latent_channels: C.
      num_encoder_blocks: residual blocks of each level.
      num_decoder_blocks: likewise.
      dtype: compute type; parameters and results are float32.
    """

    in_channels: int
    out_channels: int
    encoder_block_out_channels: Sequence[int]
    decoder_block_out_channels: Sequence[int]
    latent_channels: int
    num_encoder_blocks: Sequence[int]
    num_decoder_blocks: Sequence[int]
    dtype: DTypeLike

    @property
    def factor(self) -> int:
        """f, pixels per latent along a side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    def setup(self) -> None:
        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        self.encoder = Encoder(self.latent_channels, encoder, self.num_encoder_blocks, self.dtype)
        self.decoder = Decoder(self.out_channels, decoder, self.num_decoder_blocks, self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Raw latents of pictures, equations (1) and (3).

        Args:
          images: ``[B, height, width, 3]`` in [-1, 1]; both sides are multiples of f.

        Returns:
          mean and std, float32 ``[B, h, w, C]``; std is zero, as the network knows no posterior.
        """
        mean = self.encoder(((images + 1) / 2).astype(self.dtype)).astype(jnp.float32) / SCALING_FACTOR
        return mean, jnp.zeros_like(mean)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Raw latents ``[B, h, w, C]`` to float32 pictures ``[B, height, width, 3]``, equations (3) and (2)."""
        z = CLAMP * jnp.tanh(latents * SCALING_FACTOR / CLAMP)
        return 2 * self.decoder(z.astype(self.dtype)).astype(jnp.float32) - 1

    def __call__(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes and decodes, what ``init`` traces; ``key`` is what a VAE with a posterior needs.

        Returns:
          The reconstruction, mean and std.
        """
        mean, std = self.encode(images)
        return self.decode(mean), mean, std
