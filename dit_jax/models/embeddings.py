"""How latents, times and captions enter the transformer.

Patches.  A latent grid ``[B, h, w, C]`` is cut into ``N = (h / p) (w / p)`` patches of ``p x p x C`` numbers,
row by row. A linear map of the flattened patch equals a convolution with kernel = stride = p.

Time.  Sinusoidal features of ``time_scale * t`` (Vaswani et al. 2017, section 3.5), then a two-layer MLP
(Peebles & Xie 2023, appendix A):

    f_k(t) = cos(s t w_k), sin(s t w_k),    w_k = 10000^(-k / (F / 2)),    k = 0 .. F / 2 - 1             (1)

Text.  One vector per caption (``text_pool``) is projected to the model width and joins the time embedding; unless
``text_mode`` is ``pooled`` the tokens are projected as well, and every block attends to them. The null caption,
which stands for "no text" in classifier-free guidance (Ho & Salimans 2022), is learned.
"""

import math

import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import Array, TextStates

NUM_FREQUENCIES = 256  # F of equation (1), as in the reference DiT
MAX_PERIOD = 10_000.0
XAVIER = nn.initializers.xavier_uniform()


def spread(x: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Broadcast to a shape in a dtype such that the gradient, a sum over the new axes, is summed in float32."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(dtype)


def project(x: Array, kernel: Array) -> Array:
    """Linear maps: ``[..., D]`` and ``[D, features]``, or ``[D, parts, features]``, -> ``[..., (parts,) features]``."""
    # XLA for CPU is several times slower at the weight gradient of [B, N, D] than at that of [B * N, D]
    flat = jnp.tensordot(x.reshape(-1, x.shape[-1]), kernel, 1)
    return flat.reshape(*x.shape[:-1], *kernel.shape[1:])


class Dense(nn.Module):
    """A linear map with bias, ``[..., D]`` -> ``[..., features]``, computed in ``dtype`` from float32 parameters."""

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        y = project(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + spread(bias, y.shape, self.dtype)


class FusedDense(nn.Module):
    """Several linear maps of one input as one matrix product: ``[..., D]`` -> ``parts`` arrays ``[..., features]``.

    The maps have an axis of their own in the kernel, ``[D, parts, features]``: devices that share out ``features``
    then hold the same columns of every map. They are initialised as one map of ``parts * features`` columns.
    """

    parts: int
    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return self.kernel_init(key, (shape[0], math.prod(shape[1:])), dtype).reshape(shape)

        columns = (self.parts, self.features)
        kernel = self.param("kernel", init, (x.shape[-1], *columns), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), columns, jnp.float32)
        y = project(x.astype(self.dtype), kernel.astype(self.dtype))
        y = y + spread(bias, y.shape, self.dtype)
        return [part.squeeze(-2) for part in jnp.split(y, self.parts, axis=-2)]


def patchify(latents: Array, patch_size: int) -> Array:
    """Cut latents into flattened patches: ``[B, h, w, C]`` -> ``[B, N, p * p * C]``, row by row.

    Raises:
      ValueError: if the patch does not divide the grid.
    """
    B, h, w, C = latents.shape
    p = patch_size
    if h % p or w % p:
        raise ValueError(f"patch_size {p} does not divide the latent grid {h} x {w}")
    x = latents.reshape(B, h // p, p, w // p, p, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, (h // p) * (w // p), p * p * C)


def unpatchify(patches: Array, patch_size: int, rows: int, cols: int) -> Array:
    """Inverse of `patchify`: ``[B, rows * cols, p * p * C]`` -> ``[B, rows * p, cols * p, C]``."""
    B, _, size = patches.shape
    p = patch_size
    x = patches.reshape(B, rows, cols, p, p, size // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * p, cols * p, size // (p * p))


def timestep_features(t: Array, time_scale: float) -> Array:
    """Sinusoidal features of times, equation (1): ``[B]`` in [0, 1] -> float32 ``[B, F]``."""
    k = jnp.arange(NUM_FREQUENCIES // 2, dtype=jnp.float32)
    frequencies = MAX_PERIOD ** (-k / (NUM_FREQUENCIES // 2))
    angles = time_scale * t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class PatchEmbedder(nn.Module):
    """Linear embedding of patches: ``[B, h, w, C]`` -> ``[B, N, D]``."""

    patch_size: int
    hidden_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        patches = patchify(latents, self.patch_size)
        return Dense(self.hidden_size, dtype=self.dtype, kernel_init=XAVIER, name="proj")(patches)


class TimestepEmbedder(nn.Module):
    """Times to vectors: ``[B]`` in [0, 1] -> ``[B, D]``."""

    hidden_size: int
    time_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: Array) -> Array:
        init = nn.initializers.normal(0.02)
        x = timestep_features(t, self.time_scale).astype(self.dtype)
        x = Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, name="mlp_in")(x)
        return Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, name="mlp_out")(nn.silu(x))


class TextEmbedder(nn.Module):
    """Text states to what the blocks use: one vector per caption and, unless ``pooled``, one per token.

    Attributes:
      text_length, text_width, pooled_width: S, E and P of the text encoder.
      text_pool: ``eos`` takes the pooled state, ``mean`` the mean over unmasked tokens, ``none`` makes no vector.
    """

    hidden_size: int
    text_mode: str
    text_pool: str
    text_length: int
    text_width: int
    pooled_width: int
    dtype: jnp.dtype

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        if self.text_pool != "none":
            self.proj = Dense(self.hidden_size, dtype=self.dtype, kernel_init=init)
        if self.text_pool == "eos":
            self.null_pooled = self.param("null_pooled", init, (self.pooled_width,), jnp.float32)
        if self.reads_tokens:
            self.null_token = self.param("null_token", init, (self.text_width,), jnp.float32)
        if self.text_mode != "pooled":
            self.token_proj = Dense(self.hidden_size, dtype=self.dtype, kernel_init=XAVIER)

    @property
    def reads_tokens(self) -> bool:
        """Whether ``hidden`` is read at all."""
        return self.text_pool == "mean" or self.text_mode != "pooled"

    def null(self, B: int) -> TextStates:
        """B learned null captions: one token, one pooled state, everything else masked."""
        hidden = jnp.zeros((B, self.text_length, self.text_width), jnp.float32)
        pooled = jnp.zeros((B, self.pooled_width), jnp.float32)
        if self.reads_tokens:
            hidden = hidden.at[:, 0].set(jnp.broadcast_to(self.null_token, (B, self.text_width)))
        if self.text_pool == "eos":
            pooled = jnp.broadcast_to(self.null_pooled, (B, self.pooled_width))
        mask = jnp.broadcast_to(jnp.arange(self.text_length) == 0, (B, self.text_length))
        return TextStates(hidden, pooled, mask)

    def __call__(self, text: TextStates) -> tuple[Array | None, Array | None]:
        """``TextStates`` -> vector ``[B, D]`` (None with ``none``) and tokens ``[B, S, D]`` (None with ``pooled``)."""
        vector = text.pooled
        if self.text_pool == "mean":
            weight = text.mask.astype(jnp.float32)[:, :, None]
            vector = (text.hidden * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        vector = None if self.text_pool == "none" else self.proj(vector.astype(self.dtype))
        tokens = None if self.text_mode == "pooled" else self.token_proj(text.hidden.astype(self.dtype))
        return vector, tokens
