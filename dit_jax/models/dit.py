"""The Diffusion Transformer (Peebles & Xie 2023), conditioned on text.

    latents x_t -> patches -> tokens + positions -> L blocks given (t, text) -> final layer -> prediction

The network never learns what it predicts (noise, velocity, ...) nor under which schedule: that is the business
of `dit_jax.diffusion`, which sees only ``predict(x_t, t, text)``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from dit_jax.arrays import Array, TextStates
from dit_jax.models.blocks import VECTORS, DiTBlock, FinalLayer, SharedModulation
from dit_jax.models.embeddings import PatchEmbedder, TextEmbedder, TimestepEmbedder, spread, unpatchify
from dit_jax.models.layers import BlockSpec, KeysValues
from dit_jax.models.positions import Angles, PositionEmbedder, rotary_angles, sincos_positions
from dit_jax.sharding import gather_block, spread_batch

# What the backward pass recomputes instead of keeping; None keeps everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
CHOICES = {
    "mlp": ("silu", "gelu", "swiglu"),
    "norm": ("layer", "rms"),
    "positions": ("learned", "sincos", "none"),
    "text_mode": ("pooled", "cross", "joint"),
    "text_pool": ("eos", "mean", "none"),
    "modulation": tuple(VECTORS),
    "remat": tuple(REMAT_POLICIES),
}


# Above what anybody trains: the config of a stranger's model must not keep a machine busy before its weights are read.
MOST_LAYERS, WIDEST = 1000, 2**20


class PreparedText(NamedTuple):
    """All that the blocks need of the text; does not depend on time. Every leaf begins with B.

    Attributes:
      vector: ``[B, D]``, joins the time embedding; None with ``text_pool="none"``.
      keys_values: keys and values ``[B, H, S, K]``, a pair per block with ``text_mode="cross"``, else empty.
      tokens: ``[B, S, D]`` as the first block takes them, with ``text_mode="joint"``, else None.
      mask: ``[B, S]``.
    """

    vector: Array | None
    keys_values: tuple[KeysValues, ...]
    tokens: Array | None
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
      mlp: ``silu``, ``gelu`` or ``swiglu``, which is two thirds as wide.
      norm: ``layer`` or ``rms``.
      qk_norm: whether queries and keys are normalised.
      positions: of patches, added to them: ``learned``, ``sincos`` or ``none``.
      rope: whether rotary positions turn queries and keys of patches.
      base_grid: G of `dit_jax.models.positions`, read by ``sincos`` and ``rope``.
      num_registers: learned tokens beside those of the picture, R (Darcet et al. 2024).
      dropout: rate after the MLP activation and on every residual branch, never on attention weights.
      text_mode: ``pooled`` adds one vector per caption to the time embedding; ``cross`` also lets every block
        attend to the caption's tokens; with ``joint`` they go through the blocks beside those of the picture.
      text_pool: where that vector comes from, ``eos`` (the encoder's pooled state) or ``mean`` over tokens; ``none``
        leaves it out, where tokens are attended to.
      modulation: ``adaln`` (shift and scale), ``adaln_zero`` (and gates that start at zero) or ``adaln_single`` (made
        once for all blocks).
      time_scale: what times in [0, 1] are multiplied by before their sinusoidal embedding.
      text_length, text_width, pooled_width: S, E and P of the text encoder.
      remat: ``none``, ``dots`` (keep matrix products) or ``full``: what the backward pass recomputes.
      dtype: compute dtype; parameters are float32 always.
      mesh: of devices that share the work (`dit_jax.sharding`); None leaves what lies where to the compiler.

    Raises:
      ValueError: when a value is not one of those above, or two do not go together.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    attention_head_dim: int
    patch_size: int
    in_channels: int
    out_channels: int
    mlp_ratio: float
    mlp: str
    norm: str
    qk_norm: bool
    positions: str
    rope: bool
    base_grid: int
    num_registers: int
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
    mesh: Mesh | None = None

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
            if getattr(self, name) > (most := MOST_LAYERS if name == "num_layers" else WIDEST):
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be {most} or less")
        if self.num_registers < 0:
            raise ValueError(f"model.num_registers is {self.num_registers}; it must be 0 or more")
        sincos = self.positions == "sincos"
        for wrong, key, why in (
            (sincos and self.hidden_size % 4, "hidden_size", "a multiple of 4 with positions=sincos"),
            (self.rope and self.attention_head_dim % 4, "attention_head_dim", "a multiple of 4 with rope"),
            ((self.rope or sincos) and self.base_grid < 1, "base_grid", "1 or more with rope or positions=sincos"),
            (self.positions == "none" and not self.rope, "positions", "learned or sincos, or rope=true beside it"),
            (self.spec.mlp_width < 1, "mlp_ratio", "large enough for an MLP of width 1"),
            (self.text_mode == "pooled" and self.text_pool == "none", "text_pool", "eos or mean with text_mode=pooled"),
        ):
            if wrong:
                raise ValueError(f"model.{key} is {getattr(self, key)!r}; it must be {why}")
        super().__post_init__()

    @property
    def spec(self) -> BlockSpec:
        """What all blocks have in common."""
        return BlockSpec(**{name: getattr(self, name) for name in BlockSpec._fields})

    def setup(self) -> None:
        self.x_embedder = PatchEmbedder(self.patch_size, self.hidden_size, self.dtype)
        if self.positions == "learned":
            self.pos_embed = PositionEmbedder(self.hidden_size)
        if self.num_registers:
            init = nn.initializers.normal(0.02)
            self.registers = self.param("registers", init, (self.num_registers, self.hidden_size), jnp.float32)
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
        if self.modulation == "adaln_single":
            self.adaln_single = SharedModulation(self.dtype)
        policy, block = REMAT_POLICIES[self.remat], DiTBlock
        if self.mesh is not None and self.mesh.shape["fsdp"] > 1:
            gather = functools.partial(gather_block, mesh=self.mesh, dtype=self.dtype)
            block = nn.map_variables(block, "params", gather)
        if policy is not None:  # also of what was gathered
            # argument 6 is `train`, counted with self; everything is static that decides which code runs
            block = nn.remat(block, policy=policy, static_argnums=(6,))
        self.blocks = [block(self.spec, last=i == self.num_layers - 1) for i in range(self.num_layers)]
        self.final_layer = FinalLayer(self.spec, self.patch_size, self.out_channels)

    def null_text(self, B: int) -> TextStates:
        """The learned null caption, B times: what "no text" means in guidance and caption dropout."""
        return self.y_embedder.null(B)

    def prepare_text(self, text: TextStates) -> PreparedText:
        """Do once per prompt what does not depend on time."""
        vector, tokens = self.y_embedder(text)
        if self.text_mode == "cross":
            return PreparedText(vector, tuple(block.keys_values(tokens) for block in self.blocks), None, text.mask)
        return PreparedText(vector, (), tokens, text.mask)

    def predict(self, x_t: Array, t: Array, text: PreparedText, train: bool) -> Array:
        """One evaluation: ``x_t [B, h, w, C]``, ``t [B]`` in [0, 1] -> float32 ``[B, h, w, C_out]``.

        With ``train`` dropout is on and draws from the rng stream ``dropout``.
        """
        rows, cols = x_t.shape[1] // self.patch_size, x_t.shape[2] // self.patch_size
        x, angles = self._place(self.x_embedder(x_t), rows, cols)
        c = self.t_embedder(t)  # [B, D]
        if text.vector is not None:
            c = c + text.vector
        shared = self.adaln_single(c) if self.modulation == "adaln_single" else c
        x, tokens = spread_batch((x, text.tokens), self.mesh)
        for i, block in enumerate(self.blocks):
            read = text.keys_values[i] if text.keys_values else tokens
            x, tokens = spread_batch(block(x, read, shared, text.mask, angles, train), self.mesh)
        x = self.final_layer(x[:, self.num_registers :], c)
        return unpatchify(x, self.patch_size, rows, cols)

    def _place(self, x: Array, rows: int, cols: int) -> tuple[Array, Angles | None]:
        """Patches ``[B, N, D]`` that know where they stand, behind R registers: ``[B, R + N, D]``, and their angles."""
        positions = None
        if self.positions == "learned":
            positions = self.pos_embed(rows, cols)
        elif self.positions == "sincos":
            positions = sincos_positions(rows, cols, self.base_grid, self.hidden_size)
        if positions is not None:
            x = x + spread(positions[None], x.shape, self.dtype)
        if self.num_registers:
            registers = spread(self.registers[None], (len(x), self.num_registers, self.hidden_size), self.dtype)
            x = jnp.concatenate([registers, x], axis=1)
        K = self.attention_head_dim
        return x, rotary_angles(rows, cols, self.base_grid, K, self.num_registers) if self.rope else None

    def __call__(self, x_t: Array, t: Array, text: TextStates, train: bool) -> Array:
        """`predict` on text states: ``[B, h, w, C]``, ``[B]``, text -> float32 ``[B, h, w, C_out]``."""
        return self.predict(x_t, t, self.prepare_text(text), train)
