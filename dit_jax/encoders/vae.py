"""The VAE: pictures to latents and back, the linen twin of diffusers' ``AutoencoderKL``.

    (1)  moments(x) = encoder(x) = (mean, logvar)                       x in [-1, 1]
    (2)  std        = exp(clip(logvar, -30, 20) / 2)
    (3)  x          ~ decoder(mean + std * noise)

The encoder halves the picture once per level but the last, so the factor is f = 2^(levels - 1): 8 for
every published network. The paper is Rombach et al., "High-Resolution Image Synthesis with Latent
Diffusion Models" (arXiv:2112.10752), section 3.1 and appendix G.

Modules and parameters carry the published names, with ``name.0`` spelt ``name_0``, so that
``weights.py`` needs a single rule to translate. Latents are raw here: no scaling factor is applied.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

NORM_EPSILON = 1e-6
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class GroupNorm(nn.Module):
    """Group normalisation in float32 whatever the compute type: variances of bfloat16 lose the picture."""

    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        groups = x.astype(jnp.float32).reshape(*x.shape[:3], self.num_groups, C // self.num_groups)
        mean = groups.mean(axis=(1, 2, 4), keepdims=True)
        variance = groups.var(axis=(1, 2, 4), keepdims=True)
        x = ((groups - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)).reshape(x.shape)
        return (x * scale[None, None, None] + bias[None, None, None]).astype(self.dtype)


class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection, 1 x 1 where the channel count changes."""

    channels: int
    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        x = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm1")(x))
        x = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv1")(x)
        x = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm2")(x))
        x = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv2")(x)
        if residual.shape[-1] != self.channels:
            residual = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(residual)
        return residual + x


class SpatialAttention(nn.Module):
    """Self-attention of all positions of the grid, one head as wide as the channels."""

    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, h, w, C = x.shape
        tokens = GroupNorm(self.num_groups, self.dtype, name="group_norm")(x).reshape(B, h * w, C)
        q, k, v = (
            nn.Dense(C, dtype=self.dtype, name=name)(tokens)[:, :, None, :]  # [B, h*w, 1, C]
            for name in ("to_q", "to_k", "to_v")
        )
        tokens = jax.nn.dot_product_attention(q, k, v).reshape(B, h * w, C)
        return x + nn.Dense(C, dtype=self.dtype, name="to_out_0")(tokens).reshape(B, h, w, C)


class MidBlock(nn.Module):
    """The middle of encoder and decoder: resnet, attention where the config has it, resnet."""

    channels: int
    num_groups: int
    add_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(self.channels, self.num_groups, self.dtype, name="resnets_0")(x)
        if self.add_attention:
            x = SpatialAttention(self.num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.channels, self.num_groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves the grid with a stride-2 convolution padded at the bottom and right only."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = ((0, 1), (0, 1))
        return nn.Conv(self.channels, (3, 3), strides=2, padding=pad, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles the grid by nearest neighbour, then convolves."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
    """The resnets of one resolution, then a change of resolution (none at the last level)."""

    channels: int
    num_resnets: int
    num_groups: int
    resample: type[Downsample] | type[Upsample] | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_resnets):
            x = ResnetBlock(self.channels, self.num_groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample is not None:
            name = "downsamplers_0" if self.resample is Downsample else "upsamplers_0"
            x = self.resample(self.channels, self.dtype, name=name)(x)
        return x


class Encoder(nn.Module):
    """Pictures ``[B, height, width, 3]`` to ``[B, h, w, 2 C]``."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths, groups = self.block_out_channels, self.norm_num_groups
        x = nn.Conv(widths[0], (3, 3), padding=1, dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            resample = Downsample if i < len(widths) - 1 else None
            x = Level(width, self.layers_per_block, groups, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(widths[-1], groups, self.mid_block_add_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="conv_norm_out")(x))
        return nn.Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents ``[B, h, w, C]`` to pictures; one resnet more per level than the encoder."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths, groups = self.block_out_channels[::-1], self.norm_num_groups
        x = nn.Conv(widths[0], (3, 3), padding=1, dtype=self.dtype, name="conv_in")(x)
        x = MidBlock(widths[0], groups, self.mid_block_add_attention, self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = Upsample if i < len(widths) - 1 else None
            resnets = self.layers_per_block + 1
            x = Level(width, resnets, groups, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="conv_norm_out")(x))
        return nn.Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """A KL autoencoder; fields are named as the keys of the published ``config.json``.

    Attributes:
      in_channels: of the pictures that go in, 3.
      out_channels: of the pictures that come out, 3.
      block_out_channels: one width per level; the picture is halved between levels.
      layers_per_block: resnets per level of the encoder (the decoder has one more).
      latent_channels: C.
      norm_num_groups: groups of every GroupNorm; divides every width.
      use_quant_conv: a 1 x 1 convolution after the encoder (absent in SD3).
      use_post_quant_conv: a 1 x 1 convolution before the decoder (absent in SD3).
      mid_block_add_attention: attention in the middle of encoder and decoder.
      dtype: compute type; parameters, norms, softmax and results are float32.
    """

    in_channels: int
    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool
    dtype: DTypeLike

    @property
    def factor(self) -> int:
        """f, pixels per latent along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self) -> None:
        shape = (self.block_out_channels, self.layers_per_block, self.norm_num_groups)
        self.encoder = Encoder(2 * self.latent_channels, *shape, self.mid_block_add_attention, self.dtype)
        self.decoder = Decoder(self.out_channels, *shape, self.mid_block_add_attention, self.dtype)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Raw moments of the latents, equations (1) and (2).

        Args:
          images: ``[B, height, width, 3]`` in [-1, 1]; both sides are multiples of 2^(levels - 1).

        Returns:
          mean and std, float32 ``[B, h, w, C]``.
        """
        moments = self.encoder(images.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Raw latents ``[B, h, w, C]`` to float32 pictures ``[B, height, width, 3]``, not clipped."""
        latents = latents.astype(self.dtype)
        if self.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes, samples and decodes, equation (3): what training a VAE needs, and what ``init`` traces.

        Returns:
          The reconstruction, mean and std.
        """
        mean, std = self.encode(images)
        return self.decode(mean + std * jax.random.normal(key, mean.shape)), mean, std
