"""The Diffusion Transformer of dit_jax in PyTorch: this one file, which needs torch and the standard library alone.

    from dit import load

    model = load("config.json", "model.safetensors").eval().to("cuda")
    prediction = model(x_t, t, hidden, pooled, mask)      # [B, C_out, h, w], float32

It computes what `dit_jax.models.dit.DiT` does, from the same parameters and the same ``config.model``. A parameter has
the name that it has there, with "." for "/"; only a ``kernel [in, out]`` is a ``weight [out, in]`` here. `load` reads
either kind of names. Latents are ``[B, C, h, w]`` here and ``[B, h, w, C]`` there.

Letters: B batch, N picture tokens, S text tokens, R registers, D width, H heads, K head dim, E and P widths of the
states of text tokens and of the pooled one.

Times are in [0, 1], whatever the schedule is. What is predicted (noise, velocity, ...) is the business of the caller,
and in the run's config under ``diffusion``. Compute in a lower precision under ``torch.autocast``, or
``model.to(torch.bfloat16)``: norms stay float32. A fresh model has PyTorch's own initial values, not those of dit_jax.

References: Peebles & Xie 2023 (DiT, adaLN-Zero), Chen et al. 2023 (PixArt-alpha: ``cross``, ``adaln_single``), Esser et
al. 2024 (MM-DiT: ``joint``, ``qk_norm``), Shazeer 2020 (``swiglu``), Su et al. 2021 (``rope``), Darcet et al. 2024
(registers).
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

EPS = 1e-6  # of all norms
NUM_FREQUENCIES, MAX_PERIOD = 256, 10_000.0
VECTORS = {"adaln": 4, "adaln_zero": 6, "adaln_single": 6}  # that a block needs of its modulation
CHOICES = {  # what is computed here
    "mlp": ("silu", "gelu", "swiglu"),
    "norm": ("layer", "rms"),
    "positions": ("learned", "sincos", "none"),
    "text_mode": ("pooled", "cross", "joint"),
    "text_pool": ("eos", "mean", "none"),
    "modulation": ("adaln", "adaln_zero", "adaln_single"),
    "remat": ("none", "dots", "full"),
}
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # what remat=dots keeps


@dataclass(frozen=True)
class Config:
    """``config.model`` of a run; `dit_jax.models.dit.DiT` says what the fields mean and which values they can have."""

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

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}; this file computes {', '.join(known)}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """The fields among the values of a mapping, which may hold others."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def attention_width(self) -> int:
        """H K."""
        return self.num_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Two thirds of it, in steps of 8, with the three matrices of ``swiglu``."""
        width = int(self.hidden_size * self.mlp_ratio)
        return -(-2 * width // 3 // 8) * 8 if self.mlp == "swiglu" else width


# ------------------------------------------------------------------------------------------------------ layers


def normalise(x: Tensor, norm: str) -> Tensor:
    """``layer`` or ``rms`` norm over the last axis, without a scale, in float32."""
    shape = x.shape[-1:]
    y = F.rms_norm(x.float(), shape, eps=EPS) if norm == "rms" else F.layer_norm(x.float(), shape, eps=EPS)
    return y.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
    """Adaptive norm: ``x [B, N, D]``, ``shift`` and ``scale`` ``[B, 1, D]``."""
    return normalise(x, norm) * (1 + scale) + shift


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """``[B, N, parts * H * K]`` -> ``parts`` tensors ``[B, H, N, K]``."""
    B, N, _ = x.shape
    return x.view(B, N, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: Tensor) -> Tensor:
    """``[B, H, N, K]`` -> ``[B, N, H * K]``."""
    return x.transpose(1, 2).flatten(2)


def frequencies(count: int, device: torch.device) -> Tensor:
    """Falling from 1 to nearly 1 / `MAX_PERIOD`, rounded once: times reach 1000, where a rounded power would show."""
    return torch.tensor([MAX_PERIOD ** (-k / count) for k in range(count)], device=device)


def places(rows: int, cols: int, base_grid: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Phases of the rows and columns of all patches, each ``[N, width]``.

    Places are those on a grid of ``base_grid`` patches a side, which the model was trained on.
    """
    w = frequencies(width, device)
    row, col = ((torch.arange(n, device=device) + 0.5) * (base_grid / n) - 0.5 for n in (rows, cols))
    return row.repeat_interleave(cols)[:, None] * w, col.repeat(rows)[:, None] * w


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (a, b) of ``x [B, H, N, K]`` by ``angles [N, K / 2]``; the halves of K hold the a and the b."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm of every query or key, ``[B, H, N, K]``, with a learned scale."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), EPS).to(x.dtype)


class SelfAttention(nn.Module):
    """The two ends of self-attention; between them tokens of two kinds may be joined."""

    def __init__(self, c: Config):
        super().__init__()
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.attention_width)
        self.out = nn.Linear(c.attention_width, c.hidden_size)
        self.q_norm, self.k_norm = ((HeadNorm(c.attention_head_dim) if c.qk_norm else nn.Identity()) for _ in range(2))

    def read(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x [B, N, D]``, each ``[B, H, N, K]``."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q, k, v

    def write(self, heads: Tensor) -> Tensor:
        """What heads ``[B, H, N, K]`` found, as ``[B, N, D]``."""
        return self.out(join_heads(heads))


class TextKeysValues(nn.Module):
    """Keys and values ``[B, H, S, K]`` of text tokens ``[B, S, D]``."""

    def __init__(self, c: Config):
        super().__init__()
        self.num_heads = c.num_heads
        self.kv = nn.Linear(c.hidden_size, 2 * c.attention_width)
        self.k_norm = HeadNorm(c.attention_head_dim) if c.qk_norm else nn.Identity()

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = split_heads(self.kv(tokens), 2, self.num_heads)
        return self.k_norm(k), v


class CrossAttention(TextKeysValues):
    """Picture tokens ``[B, N, D]`` attend to text tokens ``[B, S, D]``; ``mask [B, S]`` is true where there is text."""

    def __init__(self, c: Config):
        super().__init__(c)
        self.q = nn.Linear(c.hidden_size, c.attention_width)
        self.out = nn.Linear(c.attention_width, c.hidden_size)
        self.q_norm = HeadNorm(c.attention_head_dim) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        heads = F.scaled_dot_product_attention(self.q_norm(q), *self.keys_values(tokens), mask[:, None, None])
        return self.out(join_heads(heads))


class Mlp(nn.Module):
    """Two layers with ``silu`` or ``gelu`` (tanh form) between them, or ``swiglu``; dropout before the last."""

    def __init__(self, c: Config):
        super().__init__()
        self.kind = c.mlp
        self.fc_in = nn.Linear(c.hidden_size, c.mlp_width * (2 if c.mlp == "swiglu" else 1))
        self.dropout = nn.Dropout(c.dropout)
        self.fc_out = nn.Linear(c.mlp_width, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc_in(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh") if self.kind == "gelu" else F.silu(x)
        return self.fc_out(self.dropout(x))


# -------------------------------------------------------------------------------------------------- modulation


class Modulation(nn.Module):
    """``c [B, D]`` -> ``parts`` tensors ``[B, 1, D]``."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__()
        self.parts = parts
        self.proj = nn.Linear(hidden_size, parts * hidden_size)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.proj(F.silu(c))[:, None].chunk(self.parts, dim=-1)


class SharedModulation(nn.Module):
    """What all blocks share with ``adaln_single``: ``c [B, D]`` -> ``[B, 6, D]``."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, c: Tensor) -> Tensor:
        return self.proj(F.silu(c)).unflatten(-1, (6, -1))


class TableModulation(nn.Module):
    """And what a block adds to that: ``[B, parts or more, D]`` -> ``parts`` tensors ``[B, 1, D]``."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(parts, hidden_size) / math.sqrt(hidden_size))

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        parts = len(self.table)
        return (shared[:, :parts] + self.table.to(shared.dtype)).chunk(parts, dim=1)


def make_modulation(c: Config, parts: int) -> nn.Module:
    """Of a block, or with two parts of the final norm."""
    return (TableModulation if c.modulation == "adaln_single" else Modulation)(c.hidden_size, parts)


# ------------------------------------------------------------------------------------------------------ blocks


class Stream(nn.Module):
    """What a block does with the tokens of one kind, in pieces."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.gated = c.norm, c.modulation != "adaln"
        self.adaln = make_modulation(c, VECTORS[c.modulation])
        self.attention = SelfAttention(c)
        self.mlp = Mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def vectors(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """Shift, scale and gate (None with ``adaln``) of attention, and of the MLP."""
        if self.gated:
            return self.adaln(c)
        shift_1, scale_1, shift_2, scale_2 = self.adaln(c)
        return shift_1, scale_1, None, shift_2, scale_2, None

    def add(self, x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        return x + self.dropout(branch if gate is None else gate * branch)

    def add_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
        return self.add(x, self.mlp(modulate(x, shift, scale, self.norm)), gate)


class LastText(nn.Module):
    """Text in the last ``joint`` block: keys and values, since nobody reads more of it."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm = c.norm
        self.adaln = make_modulation(c, 2)
        self.attention = TextKeysValues(c)

    def forward(self, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.adaln(c)
        return self.attention.keys_values(modulate(tokens, shift, scale, self.norm))


class Block(Stream):
    """Attention, cross-attention with ``cross``, and the MLP; with ``joint`` text tokens go through it as well."""

    def __init__(self, c: Config, last: bool):
        super().__init__(c)
        self.text_mode, self.last = c.text_mode, last
        if c.text_mode == "cross":
            self.cross = CrossAttention(c)
        if c.text_mode == "joint":
            self.text = LastText(c) if last else Stream(c)

    def forward(
        self, x: Tensor, tokens: Tensor | None, c: Tensor, mask: Tensor, angles: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``x [B, N, D]``, text ``tokens [B, S, D]``, the condition ``c``, ``mask [B, S]`` -> both kinds of tokens."""
        shift_1, scale_1, gate_1, *of_mlp = self.vectors(c)
        q, k, v = self.attention.read(modulate(x, shift_1, scale_1, self.norm), angles)
        if self.text_mode == "joint":
            heads, tokens = self.attend_jointly(q, k, v, tokens, c, mask)
        else:
            heads = F.scaled_dot_product_attention(q, k, v)
        x = self.add(x, self.attention.write(heads), gate_1)
        if self.text_mode == "cross":
            x = self.add(x, self.cross(normalise(x, self.norm), tokens, mask), None)
        return self.add_mlp(x, *of_mlp), tokens

    def attend_jointly(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, c: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of both kinds attend to those of both: what those of the picture found, and the text after it."""
        N = q.shape[2]
        if self.last:
            k_text, v_text = self.text(tokens, c)
        else:
            shift_1, scale_1, gate_1, *of_mlp = self.text.vectors(c)
            read = self.text.attention.read(modulate(tokens, shift_1, scale_1, self.norm), None)
            q_text, k_text, v_text = read
            q = torch.cat([q, q_text], dim=2)
        k, v = torch.cat([k, k_text], dim=2), torch.cat([v, v_text], dim=2)  # [B, H, N + S, K]
        seen = F.pad(mask, (N, 0), value=True)[:, None, None]
        heads = F.scaled_dot_product_attention(q, k, v, seen)
        if self.last:
            return heads, None
        tokens = self.text.add(tokens, self.text.attention.write(heads[:, :, N:]), gate_1)
        return heads[:, :, :N], self.text.add_mlp(tokens, *of_mlp)


class FinalLayer(nn.Module):
    """Final adaptive norm and linear map: ``[B, N, D]`` -> ``[B, N, p * p * C_out]``."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.single = c.norm, c.modulation == "adaln_single"
        self.adaln = make_modulation(c, 2)
        self.linear = nn.Linear(c.hidden_size, c.patch_size**2 * c.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(torch.stack([c, c], dim=1) if self.single else c)
        return self.linear(modulate(x, shift, scale, self.norm))


# ---------------------------------------------------------------------------------------------------- the ends


class PatchEmbedder(nn.Module):
    """``[B, C, h, w]`` -> ``[B, N, D]``: a linear map of flattened patches, which run row by row, channels last."""

    def __init__(self, c: Config):
        super().__init__()
        self.patch_size = c.patch_size
        self.proj = nn.Linear(c.patch_size**2 * c.in_channels, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, rows, p, cols, p]
        return self.proj(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))


def unpatchify(x: Tensor, patch_size: int, rows: int, cols: int) -> Tensor:
    """``[B, N, p * p * C]`` -> ``[B, C, h, w]``."""
    x = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, cols))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PositionEmbedder(nn.Module):
    """A learned table of positions, ``[N, D]``; resampled on another grid than that of training."""

    def __init__(self, grid: tuple[int, int], hidden_size: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(*grid, hidden_size))

    def forward(self, rows: int, cols: int) -> Tensor:
        table = self.table
        if table.shape[:2] != (rows, cols):
            image = table.permute(2, 0, 1)[None].float()
            image = F.interpolate(image, (rows, cols), mode="bicubic", antialias=True)
            table = image[0].permute(1, 2, 0).to(table.dtype)
        return table.flatten(0, 1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of times ``[B]`` in [0, 1] and a two-layer MLP: ``[B, D]``."""

    def __init__(self, c: Config):
        super().__init__()
        self.time_scale = c.time_scale
        self.mlp_in = nn.Linear(NUM_FREQUENCIES, c.hidden_size)
        self.mlp_out = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        angles = self.time_scale * t.float()[:, None] * frequencies(NUM_FREQUENCIES // 2, t.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp_in.weight.dtype)
        return self.mlp_out(F.silu(self.mlp_in(features)))


class TextEmbedder(nn.Module):
    """Text states to one vector per caption (None with ``text_pool=none``) and tokens (None with ``pooled``)."""

    def __init__(self, c: Config):
        super().__init__()
        self.text_length, self.text_width, self.pooled_width = c.text_length, c.text_width, c.pooled_width
        self.text_pool, self.text_mode = c.text_pool, c.text_mode
        if c.text_pool != "none":
            self.proj = nn.Linear(c.text_width if c.text_pool == "mean" else c.pooled_width, c.hidden_size)
        if c.text_pool == "eos":
            self.null_pooled = nn.Parameter(0.02 * torch.randn(c.pooled_width))
        if c.text_pool == "mean" or c.text_mode != "pooled":
            self.null_token = nn.Parameter(0.02 * torch.randn(c.text_width))
        if c.text_mode != "pooled":
            self.token_proj = nn.Linear(c.text_width, c.hidden_size)

    def null(self, B: int) -> tuple[Tensor, Tensor, Tensor]:
        """The learned null caption, B times: one token, everything else masked."""
        like = next(self.parameters())
        hidden = like.new_zeros(B, self.text_length, self.text_width)
        pooled = like.new_zeros(B, self.pooled_width)
        if hasattr(self, "null_token"):
            hidden = torch.cat([self.null_token.expand(B, 1, -1), hidden[:, 1:]], dim=1)
        if hasattr(self, "null_pooled"):
            pooled = self.null_pooled.expand(B, -1)
        mask = torch.arange(self.text_length, device=like.device) == 0
        return hidden, pooled, mask.expand(B, -1)

    def forward(self, hidden: Tensor, pooled: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dtype = next(self.parameters()).dtype
        vector = tokens = None
        if self.text_pool == "mean":
            weight = mask.float()[:, :, None]
            pooled = (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.text_pool != "none":
            vector = self.proj(pooled.to(dtype))
        if self.text_mode != "pooled":
            tokens = self.token_proj(hidden.to(dtype))
        return vector, tokens


# ------------------------------------------------------------------------------------------------------- model


class DiT(nn.Module):
    """The network.

    Args:
      config: of the model.
      grid: rows and columns of patches that the table of learned positions is for; read with ``positions=learned``.
    """

    def __init__(self, config: Config, grid: tuple[int, int]):
        super().__init__()
        c = self.config = config
        self.x_embedder = PatchEmbedder(c)
        if c.positions == "learned":
            self.pos_embed = PositionEmbedder(grid, c.hidden_size)
        if c.num_registers:
            self.registers = nn.Parameter(0.02 * torch.randn(c.num_registers, c.hidden_size))
        self.t_embedder = TimestepEmbedder(c)
        self.y_embedder = TextEmbedder(c)
        if c.modulation == "adaln_single":
            self.adaln_single = SharedModulation(c.hidden_size)
        for i in range(c.num_layers):
            self.add_module(f"blocks_{i}", Block(c, last=i == c.num_layers - 1))
        self.final_layer = FinalLayer(c)

    @property
    def blocks(self) -> Iterable[Block]:
        """In order."""
        return [self.get_submodule(f"blocks_{i}") for i in range(self.config.num_layers)]

    def null_text(self, B: int) -> tuple[Tensor, Tensor, Tensor]:
        """``hidden``, ``pooled`` and ``mask`` of B learned null captions: what "no text" means in guidance."""
        return self.y_embedder.null(B)

    def forward(self, x_t: Tensor, t: Tensor, hidden: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """One evaluation.

        Args:
          x_t: noised latents ``[B, C, h, w]``.
          t: times ``[B]`` in [0, 1].
          hidden, pooled, mask: states of the text encoder ``[B, S, E]``, ``[B, P]``, and bool ``[B, S]``, true from
            the first token to the end of the text.

        Returns:
          float32 ``[B, C_out, h, w]``.
        """
        c = self.config
        rows, cols = x_t.shape[2] // c.patch_size, x_t.shape[3] // c.patch_size
        x, angles = self.place(self.x_embedder(x_t.to(self.x_embedder.proj.weight.dtype)), rows, cols)
        vector, tokens = self.y_embedder(hidden, pooled, mask)
        condition = self.t_embedder(t)
        if vector is not None:
            condition = condition + vector
        shared = self.adaln_single(condition) if c.modulation == "adaln_single" else condition
        for block in self.blocks:
            x, text = self.remat(block)(x, tokens, shared, mask, angles)
            tokens = text if c.text_mode == "joint" else tokens
        x = self.final_layer(x[:, c.num_registers :], condition)
        return unpatchify(x, c.patch_size, rows, cols).float()

    def place(self, x: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
        """Patches that know where they stand, behind the registers, and the angles of rotary positions."""
        c = self.config
        if c.positions == "learned":
            x = x + self.pos_embed(rows, cols).to(x.dtype)
        elif c.positions == "sincos":
            parts = places(rows, cols, c.base_grid, c.hidden_size // 4, x.device)
            x = x + torch.cat([wave for phase in parts for wave in (phase.sin(), phase.cos())], dim=1).to(x.dtype)
        if c.num_registers:
            x = torch.cat([self.registers.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if not c.rope:
            return x, None
        angles = torch.cat(places(rows, cols, c.base_grid, c.attention_head_dim // 4, x.device), dim=1)
        return x, F.pad(angles, (0, 0, c.num_registers, 0))  # registers are not turned

    def remat(self, block: Block) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """A block that keeps for its backward pass what ``remat`` says; in training only."""
        if self.config.remat == "none" or not torch.is_grad_enabled():
            return block
        if self.config.remat == "full":
            return functools.partial(checkpoint, block, use_reentrant=False)
        keep = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
        return functools.partial(checkpoint, block, use_reentrant=False, context_fn=keep)


# ----------------------------------------------------------------------------------------------------- on disk

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: eight bytes with the length of a header, the header in JSON, and the numbers."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: torch.frombuffer(
            data, dtype=TYPES[entry["dtype"]], count=math.prod(entry["shape"]), offset=start + entry["data_offsets"][0]
        ).view(entry["shape"])
        for name, entry in header.items()
    }


def from_leaves(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of parameters as an export of dit_jax has them, ``blocks_0/attention/qkv/kernel``; or of our own."""
    state = {}
    for name, leaf in leaves.items():
        path = name.replace("/", ".")
        if path.endswith(".kernel"):
            path, leaf = path.removesuffix("kernel") + "weight", leaf.T
        state[path] = leaf.contiguous()
    return state


def load(config: str | Path, weights: str | Path) -> DiT:
    """A trained model, on the CPU and in the type of its file.

    Args:
      config: ``config.json`` of an export, with the fields of `Config` in its section ``model`` or at its top.
      weights: ``model.safetensors`` of an export.
    """
    values = json.loads(Path(config).read_text(encoding="utf-8"))
    state = from_leaves(read_safetensors(weights))
    table = state.get("pos_embed.table")
    with torch.device("meta"):  # no numbers are drawn only to be replaced
        model = DiT(Config.of(values.get("model", values)), (1, 1) if table is None else tuple(table.shape[:2]))
    model.load_state_dict(state, assign=True)
    return model
