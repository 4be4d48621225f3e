"""CLIP's two towers: text and pictures to vectors that can be compared, twins of transformers' CLIP.

Both are pre-norm transformers: x + attention(norm(x)), x + mlp(norm(x)). The text tower is causal, so its
state at the end-of-text token has read the whole caption and serves as the caption's vector (``pooled``);
the vision tower puts a class token before the patches and pools that. The paper is Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020), section 2.4.

Modules and parameters carry the published names, with ``layers.0`` spelt ``layers_0`` and without the
prefix ``text_model.`` or ``vision_model.``, so that ``weights.py`` needs a single rule to translate.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dit_jax.arrays import TextStates

# Old configs say 2, whatever the vocabulary; the end of text is the largest id there.
LEGACY_EOS_TOKEN_ID = 2


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, OpenAI's approximation of GELU; weights trained with it need it."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}


class Attention(nn.Module):
    """Multi-head self-attention with biases on all four projections."""

    num_heads: int
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, S, D = x.shape
        H = self.num_heads
        q, k, v = (
            nn.Dense(D, dtype=self.dtype, name=name)(x).reshape(B, S, H, D // H)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(B, S, D)
        return nn.Dense(D, dtype=self.dtype, name="out_proj")(x)


class MLP(nn.Module):
    """Two layers with the activation that the weights were trained with."""

    intermediate_size: int
    hidden_act: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        x = nn.Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(D, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.hidden_act](x))


class EncoderLayer(nn.Module):
    """One pre-norm transformer block."""

    intermediate_size: int
    num_heads: int
    hidden_act: str
    norm_epsilon: float
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, self.norm_epsilon, dtype=jnp.float32)
        attention = Attention(self.num_heads, self.causal, self.dtype, name="self_attn")
        mlp = MLP(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")
        x = x + attention(norm(name="layer_norm1")(x).astype(self.dtype))
        return x + mlp(norm(name="layer_norm2")(x).astype(self.dtype))


class Encoder(nn.Module):
    """The stack of blocks; returns the state before the first and after each."""

    num_layers: int
    intermediate_size: int
    num_heads: int
    hidden_act: str
    norm_epsilon: float
    causal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        states = [x]
        for i in range(self.num_layers):
            layer = EncoderLayer(
                self.intermediate_size,
                self.num_heads,
                self.hidden_act,
                self.norm_epsilon,
                self.causal,
                self.dtype,
                name=f"layers_{i}",
            )
            states.append(layer(states[-1]))
        return states


class TextEmbeddings(nn.Module):
    """Token plus position embedding."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = functools.partial(
            nn.Embed, features=self.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        tokens = table(self.vocab_size, name="token_embedding")(ids)
        positions = table(self.max_position_embeddings, name="position_embedding")(jnp.arange(ids.shape[1]))
        return tokens + positions[None]  # [B, S, E]


class VisionEmbeddings(nn.Module):
    """Patches as tokens after a class token, plus position embedding."""

    hidden_size: int
    image_size: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        B, height, width, _ = images.shape
        if height != self.image_size or width != self.image_size:
            raise ValueError(f"this vision tower reads {self.image_size} px squares, got {height} x {width}")
        D, patch = self.hidden_size, (self.patch_size, self.patch_size)
        patches = nn.Conv(
            D, patch, strides=patch, padding="VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
        )
        tokens = patches(images.astype(self.dtype)).reshape(B, -1, D)
        cls = self.param("class_embedding", nn.initializers.normal(D**-0.5), (D,)).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(cls[None, None], (B, 1, D)), tokens], axis=1)
        N = tokens.shape[1]
        positions = nn.Embed(
            N, D, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02), name="position_embedding"
        )
        return tokens + positions(jnp.arange(N))[None]  # [B, 1 + N, D]


class CLIPTextModel(nn.Module):
    """The text tower; fields are named as the keys of the published ``config.json``.

    Attributes:
      vocab_size: rows of the token embedding.
      hidden_size: E.
      intermediate_size: width inside the MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads; divides hidden_size.
      max_position_embeddings: the longest S, 77 for the published networks.
      hidden_act: ``quick_gelu`` or ``gelu``.
      layer_norm_eps: epsilon of every norm.
      eos_token_id: ``pooled`` is taken where it first stands, or with 2 (old configs) at the largest id.
      projection_dim: P of a bias-free projection of ``pooled``; None leaves ``pooled`` as it is (P = E).
      skip_layers: how many of the last blocks ``hidden`` leaves out; 0 for most, 1 for SDXL.
      final_norm: whether the final norm is applied to ``hidden``; to ``pooled`` it always is.
      dtype: compute type; parameters, norms, softmax and results are float32.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int | None
    skip_layers: int
    final_norm: bool
    dtype: DTypeLike

    @property
    def length(self) -> int:
        """S."""
        return self.max_position_embeddings

    @property
    def width(self) -> int:
        """E."""
        return self.hidden_size

    @property
    def pooled_width(self) -> int:
        """P."""
        return self.projection_dim or self.hidden_size

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> TextStates:
        """Token ids to text states.

        Args:
          ids: int32 ``[B, S]``, padded on the right.
          mask: bool ``[B, S]``, true from BOS to EOS.

        Returns:
          float32 states. Attention is causal, so padding on the right cannot reach a real token; the
          padded places of ``hidden`` are zero.
        """
        embeddings = TextEmbeddings(
            self.vocab_size, self.hidden_size, self.max_position_embeddings, self.dtype, name="embeddings"
        )
        encoder = Encoder(
            self.num_hidden_layers,
            self.intermediate_size,
            self.num_attention_heads,
            self.hidden_act,
            self.layer_norm_eps,
            causal=True,
            dtype=self.dtype,
            name="encoder",
        )
        norm = nn.LayerNorm(self.layer_norm_eps, dtype=jnp.float32, name="final_layer_norm")

        states = encoder(embeddings(ids))
        last = norm(states[-1])
        hidden = states[-1 - self.skip_layers]
        hidden = norm(hidden) if self.final_norm else hidden.astype(jnp.float32)

        is_eos = ids if self.eos_token_id == LEGACY_EOS_TOKEN_ID else ids == self.eos_token_id
        eos = jnp.argmax(is_eos, axis=1)[:, None, None]  # the first of equals, as padding may be EOS too
        pooled = jnp.take_along_axis(last, eos, axis=1)[:, 0]  # [B, E]
        if self.projection_dim is not None:
            projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
            pooled = projection(pooled).astype(jnp.float32)
        return TextStates(jnp.where(mask[:, :, None], hidden, 0.0), pooled, mask)


class CLIPVisionModel(nn.Module):
    """The vision tower; fields are named as the keys of the published ``config.json``.

    Attributes:
      hidden_size: D.
      intermediate_size: width inside the MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads; divides hidden_size.
      image_size: side of the square pictures in pixels.
      patch_size: side of a patch in pixels; divides image_size.
      hidden_act: ``quick_gelu`` or ``gelu``.
      layer_norm_eps: epsilon of every norm.
      projection_dim: P of a bias-free projection of ``pooled``; None leaves ``pooled`` as it is.
      dtype: compute type; parameters, norms, softmax and results are float32.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pictures to states.

        Args:
          images: ``[B, image_size, image_size, 3]``, normalised as the network was trained
            (``preprocessor_config.json``).

        Returns:
          hidden float32 ``[B, 1 + N, D]``, class token first, without the final norm as in transformers;
          pooled float32 ``[B, P]``, the class token after the final norm (and the projection).
        """
        embeddings = VisionEmbeddings(self.hidden_size, self.image_size, self.patch_size, self.dtype, name="embeddings")
        encoder = Encoder(
            self.num_hidden_layers,
            self.intermediate_size,
            self.num_attention_heads,
            self.hidden_act,
            self.layer_norm_eps,
            causal=False,
            dtype=self.dtype,
            name="encoder",
        )
        norm = functools.partial(nn.LayerNorm, self.layer_norm_eps, dtype=jnp.float32)

        tokens = norm(name="pre_layrnorm")(embeddings(images)).astype(self.dtype)  # the published spelling
        hidden = encoder(tokens)[-1].astype(jnp.float32)
        pooled = norm(name="post_layernorm")(hidden[:, 0])
        if self.projection_dim is not None:
            projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")
            pooled = projection(pooled).astype(jnp.float32)
        return hidden, pooled
