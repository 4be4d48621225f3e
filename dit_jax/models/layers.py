"""The transformer block and the final layer, conditioned by adaptive layer norm.

A block maps tokens ``x [B, N, D]`` given a condition ``c [B, D]`` (Peebles & Xie 2023, section 3.2). With
``LN`` a layer norm without learned scale and ``(beta, gamma, alpha) = W silu(c) + b`` per branch:

    modulate(x, beta, gamma) = (1 + gamma) LN(x) + beta                                                  (1)
    x <- x + alpha_1 . Attention(modulate(x, beta_1, gamma_1))                                           (2)
    x <- x + CrossAttention(LN(x), text)               only with text tokens (Chen et al. 2023, PixArt)  (3)
    x <- x + alpha_2 . MLP(modulate(x, beta_2, gamma_2))                                                 (4)

``adaln`` has no gates (alpha = 1, m = 4 vectors a block); ``adaln_zero`` learns them from zero (m = 6).
Parameters, norms, softmax and every sum over tokens are float32 whatever the compute dtype. Matrix products are in the
compute dtype, that of queries and keys too: a result in float32 would make its gradient a float32 product. Queries are
scaled before it, so that scores stay far below float16's 65,504.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import Array
from dit_jax.models.embeddings import XAVIER, Dense, spread

KeysValues = tuple[Array, Array]  # of text tokens, each [B, H, S, K]


def layer_norm(x: Array, dtype: jnp.dtype) -> Array:
    """Layer norm over the last axis without scale or bias, computed in float32; eps 1e-6."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Equation (1): ``x [B, N, D]``, ``shift`` and ``scale`` ``[B, D]``."""
    dtype = shift.dtype
    scaled = layer_norm(x, dtype) * spread(1.0 + scale[:, None], x.shape, dtype)
    return scaled + spread(shift[:, None], x.shape, dtype)


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Softmax attention: ``q [B, H, N, K]``, ``k v [B, H, S, K]``, mask ``[B, S]`` -> ``[B, H, N, K]``."""
    scores = jnp.einsum("bhnk,bhsk->bhns", q * (q.shape[-1] ** -0.5), k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhns,bhsk->bhnk", jax.nn.softmax(scores).astype(v.dtype), v)


def split_heads(x: Array, parts: int, num_heads: int) -> Array:
    """``[B, N, parts * H * K]`` -> ``[parts, B, H, N, K]``."""
    B, N, width = x.shape
    x = x.reshape(B, N, parts, num_heads, width // (parts * num_heads))
    return x.transpose(2, 0, 3, 1, 4)


def join_heads(x: Array) -> Array:
    """``[B, H, N, K]`` -> ``[B, N, H * K]``."""
    B, H, N, K = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, N, H * K)


class SelfAttention(nn.Module):
    """Multi-head self-attention, one kernel for queries, keys and values: ``[B, N, D]`` -> ``[B, N, D]``."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.num_heads * self.head_dim
        qkv = Dense(3 * width, dtype=self.dtype, kernel_init=XAVIER, name="qkv")(x)
        q, k, v = split_heads(qkv, 3, self.num_heads)
        out = join_heads(attend(q, k, v, mask=None))
        return Dense(x.shape[-1], dtype=self.dtype, kernel_init=XAVIER, name="out")(out)


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens. Keys and values do not depend on time: `keys_values` makes them once."""

    num_heads: int
    head_dim: int
    hidden_size: int
    dtype: jnp.dtype

    def setup(self) -> None:
        width = self.num_heads * self.head_dim
        self.q = Dense(width, dtype=self.dtype, kernel_init=XAVIER)
        self.kv = Dense(2 * width, dtype=self.dtype, kernel_init=XAVIER)
        # from zero, so that a fresh block is the one without text (Chen et al. 2023, section 2.3)
        zeros = nn.initializers.zeros_init()
        self.out = Dense(self.hidden_size, dtype=self.dtype, kernel_init=zeros)

    def keys_values(self, tokens: Array) -> KeysValues:
        """Keys and values of text tokens ``[B, S, D]``."""
        k, v = split_heads(self.kv(tokens), 2, self.num_heads)
        return k, v

    def __call__(self, x: Array, keys_values: KeysValues, mask: Array) -> Array:
        """``x [B, N, D]``, `keys_values` and ``mask [B, S]`` of the text -> ``[B, N, D]``."""
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        return self.out(join_heads(attend(q, *keys_values, mask)))


class Mlp(nn.Module):
    """Two layers with SiLU between them; dropout after the activation."""

    mlp_ratio: float
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        D = x.shape[-1]
        x = Dense(int(D * self.mlp_ratio), dtype=self.dtype, kernel_init=XAVIER, name="fc_in")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(x))
        return Dense(D, dtype=self.dtype, kernel_init=XAVIER, name="fc_out")(x)


class Modulation(nn.Module):
    """The vectors of equation (1): ``c [B, D]`` -> ``parts`` arrays ``[B, D]``, all zero at initialisation."""

    parts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c: Array) -> list[Array]:
        zeros = nn.initializers.zeros_init()
        x = Dense(self.parts * c.shape[-1], dtype=self.dtype, kernel_init=zeros, name="proj")(nn.silu(c))
        return jnp.split(x, self.parts, axis=-1)


class DiTBlock(nn.Module):
    """One block, equations (2) to (4)."""

    hidden_size: int
    num_heads: int
    head_dim: int
    mlp_ratio: float
    dropout: float
    modulation: str
    text_mode: str
    dtype: jnp.dtype

    def setup(self) -> None:
        gated = self.modulation == "adaln_zero"
        self.adaln = Modulation(6 if gated else 4, self.dtype)
        self.attention = SelfAttention(self.num_heads, self.head_dim, self.dtype)
        self.mlp = Mlp(self.mlp_ratio, self.dropout, self.dtype)
        self.residual_dropout = nn.Dropout(self.dropout)
        if self.text_mode == "cross":
            self.cross = CrossAttention(self.num_heads, self.head_dim, self.hidden_size, self.dtype)

    def keys_values(self, tokens: Array) -> KeysValues:
        """What this block's cross-attention reads of text tokens ``[B, S, D]``."""
        return self.cross.keys_values(tokens)

    def __call__(
        self, x: Array, c: Array, keys_values: KeysValues | None, text_mask: Array | None, train: bool
    ) -> Array:
        """``x [B, N, D]``, ``c [B, D]`` and the text of `keys_values` -> ``[B, N, D]``."""
        if self.modulation == "adaln_zero":
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaln(c)
        else:
            shift_1, scale_1, shift_2, scale_2 = self.adaln(c)
            gate_1 = gate_2 = None

        def add(x, branch, gate):
            branch = branch if gate is None else branch * spread(gate[:, None], branch.shape, self.dtype)
            return x + self.residual_dropout(branch, deterministic=not train)

        x = add(x, self.attention(modulate(x, shift_1, scale_1)), gate_1)
        if keys_values is not None:
            x = add(x, self.cross(layer_norm(x, self.dtype), keys_values, text_mask), None)
        return add(x, self.mlp(modulate(x, shift_2, scale_2), train), gate_2)


class FinalLayer(nn.Module):
    """Final adaptive norm and linear map to patches: ``[B, N, D]`` -> float32 ``[B, N, p * p * C_out]``."""

    patch_size: int
    out_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        shift, scale = Modulation(2, self.dtype, name="adaln")(c)
        size = self.patch_size**2 * self.out_channels
        zeros = nn.initializers.zeros_init()
        x = Dense(size, dtype=self.dtype, kernel_init=zeros, name="linear")(modulate(x, shift, scale))
        return x.astype(jnp.float32)
