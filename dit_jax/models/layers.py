"""What blocks are made of: norms, attention and the MLP.

Parameters, norms, softmax and every sum over tokens are float32 whatever the compute dtype. Matrix products are in the
compute dtype, that of queries and keys too: a result in float32 would make its gradient a float32 product. Queries are
scaled before it, so that scores stay far below float16's 65,504.

Norms have no scale of their own, since what follows them scales; eps is 1e-6:

    layer    (x - mean(x)) / sqrt(var(x) + eps)                            (Ba et al. 2016)               (1)
    rms      x / sqrt(mean(x^2) + eps)                                     (Zhang & Sennrich 2019)        (2)

With y the layer norm of x, r = 1 / sqrt(var(x) + eps) and g the gradient by y, that by x is

    r (g - mean(g) - y mean(g y))                                                                         (1')

With ``qk_norm`` every query and key is divided by its own rms over the head and scaled by a learned vector, so that
scores cannot grow without bound (Dehghani et al. 2023; Esser et al. 2024).

    MLP(x) = W_2 f(W_1 x + b_1) + b_2                   f = ``silu`` or ``gelu`` (tanh form)              (3)
    MLP(x) = W_2 (silu(W_1 x + b_1) * (W_3 x + b_3)) + b_2        ``swiglu`` (Shazeer 2020)               (4)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import Array
from dit_jax.models.embeddings import XAVIER, Dense, FusedDense
from dit_jax.models.positions import Angles, rotate

EPS = 1e-6  # of the norms
KeysValues = tuple[Array, Array]  # of text tokens, each [B, H, S, K]


class BlockSpec(NamedTuple):
    """What all blocks of a model have in common; the fields of `dit_jax.models.dit.DiT` by the same names."""

    hidden_size: int
    num_heads: int
    attention_head_dim: int
    mlp_ratio: float
    mlp: str
    norm: str
    qk_norm: bool
    dropout: float
    modulation: str
    text_mode: str
    dtype: Any

    @property
    def attention_width(self) -> int:
        """H K."""
        return self.num_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Numbers between the two layers of the MLP; two thirds of it, in steps of 8, with ``swiglu``'s three."""
        width = int(self.hidden_size * self.mlp_ratio)
        return -(-2 * width // 3 // 8) * 8 if self.mlp == "swiglu" else width


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def layer_norm(x: Array, dtype: jnp.dtype) -> Array:
    """Equation (1) over the last axis, computed in float32."""
    return _layer_norm_forward(x, dtype)[0]


def _layer_norm_forward(x: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    r = jax.lax.rsqrt(variance + EPS)
    return ((wide - mean) * r).astype(dtype), (x, mean, r)


def _layer_norm_backward(dtype: jnp.dtype, kept: tuple[Array, Array, Array], g: Array) -> tuple[Array]:
    """Equation (1'); of the forward pass it keeps its input, which is kept anyway, and two numbers a token."""
    x, mean, r = kept
    y, g = (x.astype(jnp.float32) - mean) * r, g.astype(jnp.float32)
    along = (g * y).mean(-1, keepdims=True)
    return ((r * (g - g.mean(-1, keepdims=True) - y * along)).astype(x.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm(x: Array, dtype: jnp.dtype) -> Array:
    """Equation (2) over the last axis, computed in float32."""
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)).astype(dtype)


def normalise(x: Array, norm: str, dtype: jnp.dtype) -> Array:
    """The norm called ``layer`` or ``rms``."""
    return rms_norm(x, dtype) if norm == "rms" else layer_norm(x, dtype)


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Softmax attention: ``q [B, H, N, K]``, ``k v [B, H, S, K]``, mask ``[B, S]`` -> ``[B, H, N, K]``."""
    scores = jnp.einsum("bhnk,bhsk->bhns", q * (q.shape[-1] ** -0.5), k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhns,bhsk->bhnk", jax.nn.softmax(scores).astype(v.dtype), v)


def split_heads(x: Array, num_heads: int) -> Array:
    """``[B, N, H * K]`` -> ``[B, H, N, K]``."""
    B, N, width = x.shape
    return x.reshape(B, N, num_heads, width // num_heads).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """``[B, H, N, K]`` -> ``[B, N, H * K]``."""
    B, H, N, K = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, N, H * K)


class HeadNorm(nn.Module):
    """The norm of ``qk_norm``, on ``[B, H, N, K]``: equation (2) and a learned scale ``[K]``."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        return (rms_norm(x, jnp.float32) * scale[None, None, None]).astype(self.dtype)


class SelfAttention(nn.Module):
    """The two ends of multi-head self-attention, `attend` being between them; one kernel for queries, keys, values."""

    spec: BlockSpec

    def setup(self) -> None:
        s = self.spec
        self.qkv = FusedDense(3, s.attention_width, dtype=s.dtype, kernel_init=XAVIER)
        self.out = Dense(s.hidden_size, dtype=s.dtype, kernel_init=XAVIER)
        if s.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(s.dtype), HeadNorm(s.dtype)

    def read(self, x: Array, angles: Angles | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values of tokens ``[B, N, D]``, each ``[B, H, N, K]``; turned by ``angles``."""
        q, k, v = (split_heads(part, self.spec.num_heads) for part in self.qkv(x))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def write(self, heads: Array) -> Array:
        """What heads ``[B, H, N, K]`` found, as ``[B, N, D]``."""
        return self.out(join_heads(heads))


class TextKeysValues(nn.Module):
    """Keys and values of text tokens ``[B, S, D]``."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, tokens: Array) -> KeysValues:
        s = self.spec
        kv = FusedDense(2, s.attention_width, dtype=s.dtype, kernel_init=XAVIER, name="kv")(tokens)
        k, v = (split_heads(part, s.num_heads) for part in kv)
        return (HeadNorm(s.dtype, name="k_norm")(k) if s.qk_norm else k), v


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens. Keys and values do not depend on time: `keys_values` makes them once."""

    spec: BlockSpec

    def setup(self) -> None:
        s = self.spec
        self.q = Dense(s.attention_width, dtype=s.dtype, kernel_init=XAVIER)
        self.text = TextKeysValues(s)
        nn.share_scope(self, self.text)
        # from zero, so that a fresh block is the one without text (Chen et al. 2023, section 2.3)
        self.out = Dense(s.hidden_size, dtype=s.dtype, kernel_init=nn.initializers.zeros_init())
        if s.qk_norm:
            self.q_norm = HeadNorm(s.dtype)

    def keys_values(self, tokens: Array) -> KeysValues:
        """Keys and values of text tokens ``[B, S, D]``."""
        return self.text(tokens)

    def __call__(self, x: Array, keys_values: KeysValues, mask: Array) -> Array:
        """``x [B, N, D]``, `keys_values` and ``mask [B, S]`` of the text -> ``[B, N, D]``."""
        q = split_heads(self.q(x), self.spec.num_heads)
        if self.spec.qk_norm:
            q = self.q_norm(q)
        return self.out(join_heads(attend(q, *keys_values, mask)))


class Mlp(nn.Module):
    """Equation (3) or (4), ``[B, N, D]`` -> ``[B, N, D]``; dropout before the last layer."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        s = self.spec
        if s.mlp == "swiglu":
            gate, x = FusedDense(2, s.mlp_width, dtype=s.dtype, kernel_init=XAVIER, name="fc_in")(x)
            x = nn.silu(gate) * x  # (4)
        else:
            x = Dense(s.mlp_width, dtype=s.dtype, kernel_init=XAVIER, name="fc_in")(x)
            # the cube of gelu does not fit into float16
            x = nn.gelu(x.astype(jnp.float32)).astype(s.dtype) if s.mlp == "gelu" else nn.silu(x)
        x = nn.Dropout(s.dropout, deterministic=not train)(x)
        return Dense(s.hidden_size, dtype=s.dtype, kernel_init=XAVIER, name="fc_out")(x)
