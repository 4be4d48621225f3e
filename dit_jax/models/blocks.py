"""The transformer block and the final layer, conditioned by adaptive layer norm.

A block maps tokens ``x [B, N, D]`` given a condition ``c [B, D]`` (Peebles & Xie 2023, section 3.2). With ``norm``
from `dit_jax.models.layers` and vectors beta, gamma, alpha for each of its two branches:

    modulate(x, beta, gamma) = (1 + gamma) norm(x) + beta                                                 (1)
    x <- x + alpha_1 . Attention(modulate(x, beta_1, gamma_1))                                            (2)
    x <- x + CrossAttention(norm(x), text)       only with ``cross`` (Chen et al. 2023, PixArt-alpha)     (3)
    x <- x + alpha_2 . MLP(modulate(x, beta_2, gamma_2))                                                  (4)

Where the vectors come from is the ``modulation``:

    adaln          W silu(c) + b, a W of every block; no gates (alpha = 1): m = 4 vectors a block         (5)
    adaln_zero     the same with gates, all of it from zero: m = 6, and a fresh block is the identity
    adaln_single   (W silu(c) + b) of the model + a table of the block: m = 6, a hundredth of the
                   parameters (Chen et al. 2023, section 2.3)                                             (6)

With ``joint`` text tokens are a second stream through the blocks, with attention projections, MLP and modulation of
their own. Both streams attend to the tokens of both (Esser et al. 2024, MM-DiT):

    Attention(x, y) = softmax([q_x q_y] [k_x k_y]^T / sqrt(K)) [v_x v_y]                                  (7)

What the last block makes of the text nobody reads: there it has keys and values only.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import Array
from dit_jax.models.embeddings import Dense, spread
from dit_jax.models.layers import (
    BlockSpec,
    CrossAttention,
    KeysValues,
    Mlp,
    SelfAttention,
    TextKeysValues,
    attend,
    normalise,
)
from dit_jax.models.positions import Angles

# Vectors a block needs of its modulation.
VECTORS = {"adaln": 4, "adaln_zero": 6, "adaln_single": 6}


def modulate(x: Array, shift: Array, scale: Array, norm: str) -> Array:
    """Equation (1): ``x [B, N, D]``, ``shift`` and ``scale`` ``[B, D]``."""
    dtype = shift.dtype
    scaled = normalise(x, norm, dtype) * spread(1.0 + scale[:, None], x.shape, dtype)
    return scaled + spread(shift[:, None], x.shape, dtype)


class Modulation(nn.Module):
    """Equation (5): ``c [B, D]`` -> ``parts`` arrays ``[B, D]``, all zero at initialisation."""

    parts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c: Array) -> list[Array]:
        zeros = nn.initializers.zeros_init()
        x = Dense(self.parts * c.shape[-1], dtype=self.dtype, kernel_init=zeros, name="proj")(nn.silu(c))
        return jnp.split(x, self.parts, axis=-1)


class SharedModulation(nn.Module):
    """What all blocks share of equation (6): ``c [B, D]`` -> ``[B, 6, D]``."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c: Array) -> Array:
        B, D = c.shape
        init = nn.initializers.normal(0.02)
        return Dense(6 * D, dtype=self.dtype, kernel_init=init, name="proj")(nn.silu(c)).reshape(B, 6, D)


class TableModulation(nn.Module):
    """What a block adds to equation (6): shared vectors ``[B, parts or more, D]`` -> ``parts`` arrays ``[B, D]``."""

    parts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, shared: Array) -> list[Array]:
        D = shared.shape[-1]
        table = self.param("table", nn.initializers.normal(D**-0.5), (self.parts, D), jnp.float32)
        shared = shared[:, : self.parts]
        x = shared + spread(table[None], shared.shape, self.dtype)
        return [x[:, part] for part in range(self.parts)]


def make_modulation(spec: BlockSpec, parts: int) -> nn.Module:
    """Of a block: from what `dit_jax.models.dit.DiT` gives all blocks to ``parts`` arrays ``[B, D]``."""
    return (TableModulation if spec.modulation == "adaln_single" else Modulation)(parts, spec.dtype)


class Vectors(NamedTuple):
    """The vectors of equations (2) and (4), each ``[B, D]``; no gates (None) with ``adaln``."""

    shift_1: Array
    scale_1: Array
    gate_1: Array | None
    shift_2: Array
    scale_2: Array
    gate_2: Array | None


class Stream(nn.Module):
    """What a block does with the tokens of one kind, in the three pieces around whatever lies between them."""

    spec: BlockSpec

    def setup(self) -> None:
        s = self.spec
        self.adaln = make_modulation(s, VECTORS[s.modulation])
        self.attention = SelfAttention(s)
        self.mlp = Mlp(s)
        self.residual_dropout = nn.Dropout(s.dropout)

    def vectors(self, c: Array) -> Vectors:
        """Those of the block's two branches."""
        if self.spec.modulation == "adaln":
            shift_1, scale_1, shift_2, scale_2 = self.adaln(c)
            return Vectors(shift_1, scale_1, None, shift_2, scale_2, None)
        return Vectors(*self.adaln(c))

    def read(self, x: Array, vectors: Vectors, angles: Angles | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values of equation (2), each ``[B, H, N, K]``."""
        return self.attention.read(modulate(x, vectors.shift_1, vectors.scale_1, self.spec.norm), angles)

    def add(self, x: Array, branch: Array, gate: Array | None, train: bool) -> Array:
        """``x + gate . branch``, with dropout of the branch."""
        if gate is not None:
            branch = branch * spread(gate[:, None], branch.shape, self.spec.dtype)
        return x + self.residual_dropout(branch, deterministic=not train)

    def add_mlp(self, x: Array, vectors: Vectors, train: bool) -> Array:
        """Equation (4)."""
        branch = self.mlp(modulate(x, vectors.shift_2, vectors.scale_2, self.spec.norm), train)
        return self.add(x, branch, vectors.gate_2, train)


class LastText(nn.Module):
    """Text in the last ``joint`` block: modulated keys and values, and nothing after them."""

    spec: BlockSpec

    def setup(self) -> None:
        self.adaln = make_modulation(self.spec, 2)
        self.attention = TextKeysValues(self.spec)

    def __call__(self, tokens: Array, c: Array) -> KeysValues:
        shift, scale = self.adaln(c)
        return self.attention(modulate(tokens, shift, scale, self.spec.norm))


class DiTBlock(Stream):
    """One block on the tokens of the picture, equations (2) to (4), and with ``joint`` on those of the text.

    Attributes:
      last: whether no block follows.
    """

    last: bool

    def setup(self) -> None:
        super().setup()
        if self.spec.text_mode == "cross":
            self.cross = CrossAttention(self.spec)
        if self.spec.text_mode == "joint":
            self.text = LastText(self.spec) if self.last else Stream(self.spec)

    def keys_values(self, tokens: Array) -> KeysValues:
        """What this block's cross-attention reads of text tokens ``[B, S, D]``."""
        return self.cross.keys_values(tokens)

    def __call__(
        self, x: Array, text: Any, c: Array, mask: Array, angles: Angles | None, train: bool
    ) -> tuple[Array, Array | None]:
        """One block.

        Args:
          x: tokens of the picture, ``[B, N, D]``.
          text: what is read of the text: nothing (``pooled``), its `keys_values` (``cross``), or what the block before
            made of its tokens, ``[B, S, D]`` (``joint``).
          c: the condition, as the modulation takes it.
          mask: ``[B, S]`` of the text.
          angles: of rotary positions.
          train: whether dropout is on.

        Returns:
          Both kinds of tokens; of the text None but for ``joint`` before the last block.
        """
        vectors = self.vectors(c)
        if self.spec.text_mode == "joint":
            x, tokens = self._attend_jointly(x, text, vectors, c, mask, angles, train)
        else:
            heads = attend(*self.read(x, vectors, angles), mask=None)
            x, tokens = self.add(x, self.attention.write(heads), vectors.gate_1, train), None
        if self.spec.text_mode == "cross":
            branch = self.cross(normalise(x, self.spec.norm, self.spec.dtype), text, mask)
            x = self.add(x, branch, None, train)
        return self.add_mlp(x, vectors, train), tokens

    def _attend_jointly(
        self, x: Array, text: Array, vectors: Vectors, c: Array, mask: Array, angles: Angles | None, train: bool
    ) -> tuple[Array, Array | None]:
        """Equation (7), and equation (4) for the text."""
        q, k, v = self.read(x, vectors, angles)
        B, _, N, _ = q.shape
        if self.last:
            k_text, v_text = self.text(text, c)
        else:
            of_text = self.text.vectors(c)
            q_text, k_text, v_text = self.text.read(text, of_text, None)
            q = jnp.concatenate([q, q_text], axis=2)
        k, v = jnp.concatenate([k, k_text], axis=2), jnp.concatenate([v, v_text], axis=2)  # [B, H, N + S, K]
        seen = jnp.concatenate([jnp.ones((B, N), bool), mask], axis=1)
        heads = attend(q, k, v, seen)
        x = self.add(x, self.attention.write(heads[:, :, :N]), vectors.gate_1, train)
        if self.last:
            return x, None
        text = self.text.add(text, self.text.attention.write(heads[:, :, N:]), of_text.gate_1, train)
        return x, self.text.add_mlp(text, of_text, train)


class FinalLayer(nn.Module):
    """Final adaptive norm and linear map to patches: ``[B, N, D]`` -> float32 ``[B, N, p * p * C_out]``."""

    spec: BlockSpec
    patch_size: int
    out_channels: int

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        dtype = self.spec.dtype
        if self.spec.modulation == "adaln_single":
            shift, scale = TableModulation(2, dtype, name="adaln")(jnp.stack([c, c], axis=1))
        else:
            shift, scale = Modulation(2, dtype, name="adaln")(c)
        size = self.patch_size**2 * self.out_channels
        zeros = nn.initializers.zeros_init()
        x = Dense(size, dtype=dtype, kernel_init=zeros, name="linear")(modulate(x, shift, scale, self.spec.norm))
        return x.astype(jnp.float32)
