"""The Diffusion Transformer (Peebles & Xie 2023), conditioned on text.

    latents x_t -> patches -> tokens + positions -> L blocks given (t, text) -> final layer -> prediction

The network never learns what it predicts (noise, velocity, ...) nor under which schedule: that is the business
of `dit_jax.diffusion`, which sees only ``predict(x_t, t, text)``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import Array, TextStates
from dit_jax.models.embeddings import (
    PatchEmbedder,
    PositionEmbedder,
    TextEmbedder,
    TimestepEmbedder,
    spread,
    unpatchify,
)
from dit_jax.models.layers import DiTBlock, FinalLayer, KeysValues

# What the backward pass recomputes instead of keeping; None keeps everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
CHOICES = {
    "text_mode": ("pooled", "cross"),
    "text_pool": ("eos", "mean"),
    "modulation": ("adaln", "adaln_zero"),
    "remat": tuple(REMAT_POLICIES),
}


class PreparedText(NamedTuple):
    """All that the blocks need of the text; does not depend on time. Every leaf begins with B.

    Attributes:
      vector: ``[B, D]``, joins the time embedding.
      keys_values: keys and values ``[B, H, S, K]``, a pair per block with ``text_mode="cross"``, else empty.
      mask: ``[B, S]``.
    """

    vector: Array
    keys_values: tuple[KeysValues, ...]
    mask: Array


class DiT(nn.Module):
    """A text-to-image latent Diffusion Transformer; ``DiT(**config.model)``.

    Attributes:
      hidden_size: D.
      num_layers: L.
      num_heads, attention_head_dim: H and K; projections go from D to H * K and back.
      patch_size: side p of a patch, in latent pixels; must divide the latent grid.
      in_channels: C.
      out_channels: C, or 2 C with learned variance.
      mlp_ratio: width of the MLP over D.
      dropout: rate after the MLP activation and on every residual branch, never on attention weights.
      text_mode: ``pooled`` adds one vector per caption to the time embedding; ``cross`` also lets every block
        attend to the caption's tokens.
      text_pool: where that vector comes from, ``eos`` (the encoder's pooled state) or ``mean`` over tokens.
      modulation: ``adaln`` (shift and scale) or ``adaln_zero`` (and gates that start at zero).
      time_scale: what times in [0, 1] are multiplied by before their sinusoidal embedding.
      text_length, text_width, pooled_width: S, E and P of the text encoder.
      remat: ``none``, ``dots`` (keep matrix products) or ``full``: what the backward pass recomputes.
      dtype: compute dtype; parameters are float32 always.

    Raises:
      ValueError: when a value is not one of those above.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    attention_head_dim: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_ratio: float
    dropout: float
    text_mode: str
    text_pool: str
    modulation: str
    time_scale: float
    text_length: int
    text_width: int
    pooled_width: int
    remat: str
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it can be {', '.join(valid)}")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"model.out_channels is {self.out_channels}; it can be {self.in_channels} (in_channels)"
                f" or {2 * self.in_channels} (with learned variance)"
            )
        for name in ("hidden_size", "num_layers", "num_heads", "attention_head_dim", "patch_size", "in_channels",
                     "text_length", "text_width", "pooled_width"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        super().__post_init__()

    def setup(self) -> None:
        self.x_embedder = PatchEmbedder(self.patch_size, self.hidden_size, self.dtype)
        self.pos_embed = PositionEmbedder(self.hidden_size)
        self.t_embedder = TimestepEmbedder(self.hidden_size, self.time_scale, self.dtype)
        self.y_embedder = TextEmbedder(
            self.hidden_size,
            self.text_mode,
            self.text_pool,
            self.text_length,
            self.text_width,
            self.pooled_width,
            self.dtype,
        )
        policy = REMAT_POLICIES[self.remat]
        # argument 5 is `train`, counted with self; everything is static that decides which code runs
        block = DiTBlock if policy is None else nn.remat(DiTBlock, policy=policy, static_argnums=(5,))
        self.blocks = [
            block(
                self.hidden_size,
                self.num_heads,
                self.attention_head_dim,
                self.mlp_ratio,
                self.dropout,
                self.modulation,
                self.text_mode,
                self.dtype,
            )
            for _ in range(self.num_layers)
        ]
        self.final_layer = FinalLayer(self.patch_size, self.out_channels, self.dtype)

    def null_text(self, B: int) -> TextStates:
        """The learned null caption, B times: what "no text" means in guidance and caption dropout."""
        return self.y_embedder.null(B)

    def prepare_text(self, text: TextStates) -> PreparedText:
        """Do once per prompt what does not depend on time."""
        vector, tokens = self.y_embedder(text)
        keys_values = () if tokens is None else tuple(block.keys_values(tokens) for block in self.blocks)
        return PreparedText(vector, keys_values, text.mask)

    def predict(self, x_t: Array, t: Array, text: PreparedText, train: bool) -> Array:
        """One evaluation: ``x_t [B, h, w, C]``, ``t [B]`` in [0, 1] -> float32 ``[B, h, w, C_out]``.

        With ``train`` dropout is on and draws from the rng stream ``dropout``.
        """
        rows, cols = x_t.shape[1] // self.patch_size, x_t.shape[2] // self.patch_size
        x = self.x_embedder(x_t)  # [B, N, D]
        x = x + spread(self.pos_embed(rows, cols), x.shape, self.dtype)
        c = self.t_embedder(t) + text.vector  # [B, D]
        for i, block in enumerate(self.blocks):
            keys_values = text.keys_values[i] if text.keys_values else None
            x = block(x, c, keys_values, text.mask, train)
        return unpatchify(self.final_layer(x, c), self.patch_size, rows, cols)

    def __call__(self, x_t: Array, t: Array, text: TextStates, train: bool) -> Array:
        """`predict` on text states: ``[B, h, w, C]``, ``[B]``, text -> float32 ``[B, h, w, C_out]``."""
        return self.predict(x_t, t, self.prepare_text(text), train)
