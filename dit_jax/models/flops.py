"""Analytic cost of the network in multiply-adds and in memory, and what a device can do.

Multiply-adds per image, with r = ``mlp_ratio`` and m the modulation vectors of a block (4 or 6); the sum over
matrix products of the network, nothing else:

    MAC = L (4 N D HK + 2 r N D^2 + 2 N^2 HK + m D^2)                    blocks
        + L (2 N D HK + 2 S D HK + 2 N S HK) + S E D                     only with text tokens (``cross``)
        + N p^2 C D + N D p^2 C_out                                      patches in and out
        + P D + F D + D^2 + 2 D^2                                        text, time (F features), final norm     (1)

One MAC is two FLOP; training costs three forward passes. Published "Gflops" of DiT are multiply-adds.

Bytes per image that a block keeps for the backward pass, with M = r D, c the bytes of the compute dtype, and d = 1 + c
with dropout (its mask and its zeros) else 0:

    none   2 N D (8 + 3 c)                   two norms: centred twice in float32; cast, scale, modulated tokens in c
           + 4 N HK c + H N^2 (4 + c)        queries, keys, values, output; the softmax in float32 and in c
           + 4 N M c                         MLP: before SiLU, two arrays inside it, after
           + (2 N D + N M) d                 dropout
           + 4 N D c                         only with gates (``adaln_zero``)
           + N D (8 + 2 c + d) + 2 N HK c + H N S (5 + c) + 3 S HK c         only with text tokens (``cross``)
    dots   N (2 D + 3 HK + M) c + [N D c with gates] + [N (D + HK) c + 3 S HK c with text tokens]
    full   N D c + [3 S HK c with text tokens]                                                                (2)

A step keeps the sum over blocks, what the final norm keeps, N D (8 + 3 c), and for ``cross`` the text states and the
choice between them and the null caption, S E (9 + c). On top of it, it needs room to work in: two of its largest
arrays, and unless remat is ``none`` one block's bytes as under ``none``, which it computes again. All this is for one
slice of the batch (``accumulate``). Where c is not 4, ``none`` keeps parameters in c as well.

Beside it a device holds parameters, gradients, optimizer and moving average, in float32. With ``accumulate`` above 1
there are two sets of gradients: the sum, and those of a slice.

Seen (jax 0.10.2), at a batch of 8: of what the traced step keeps (`dit_jax.training.memory`) the equation gives 0.97 to
1.00; with ``full`` in bfloat16, where little is left, 0.91. Of the total that XLA for CPU sets aside for the small
model in float32, at batches of 2 and 8 and for every policy, the estimate was 0.92 to 1.17. XLA for CPU computes
bfloat16 in float32 and takes more than the estimate. No GPU was seen yet.
"""

from typing import NamedTuple

import jax.numpy as jnp

from dit_jax.models.dit import DiT
from dit_jax.models.embeddings import NUM_FREQUENCIES


class Device(NamedTuple):
    """A device as `python -m dit_jax.main --dry_run --device` names it.

    Attributes:
      kind: a part of jax's device_kind, a key of `PEAK_FLOPS`.
      memory: bytes.
      usable: the share of them that JAX takes by default; XLA_PYTHON_CLIENT_MEM_FRACTION changes it on a GPU.
      dtype: what ``dtype=auto`` is there.
    """

    kind: str
    memory: int
    usable: float
    dtype: str


GIB = 2**30
DEVICES = {
    "4090": Device("RTX 4090", 24 * GIB, 0.75, "bfloat16"),
    "t4": Device("T4", 15 * GIB, 0.75, "float16"),
    "h100": Device("H100", 80 * GIB, 0.75, "bfloat16"),
    "h200": Device("H200", 140 * GIB, 0.75, "bfloat16"),
    "v5e": Device("TPU v5 lite", 16 * GIB, 1.0, "bfloat16"),
}

# Dense peak in FLOP/s at bfloat16 (float16 for the T4 and V100), by a part of jax's device_kind.
PEAK_FLOPS = {
    "RTX 4090": 165e12,
    "T4": 65e12,
    "V100": 125e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v5 lite": 197e12,
}


def forward_macs(model: DiT, h: int, w: int) -> int:
    """Multiply-adds of one forward pass on one image with an ``h x w`` latent grid, equation (1)."""
    D, L, p = model.hidden_size, model.num_layers, model.patch_size
    HK = model.num_heads * model.attention_head_dim
    S, E, P = model.text_length, model.text_width, model.pooled_width
    N = (h // p) * (w // p)
    m = {"adaln": 4, "adaln_zero": 6}[model.modulation]
    pooled = P if model.text_pool == "eos" else E
    blocks = L * (4 * N * D * HK + 2 * N * D * int(D * model.mlp_ratio) + 2 * N * N * HK + m * D * D)
    cross = L * (2 * N * D * HK + 2 * S * D * HK + 2 * N * S * HK) + S * E * D if model.text_mode == "cross" else 0
    patches = N * p * p * (model.in_channels + model.out_channels) * D
    return blocks + cross + patches + pooled * D + NUM_FREQUENCIES * D + 3 * D * D


def block_bytes(model: DiT, N: int, remat: str) -> int:
    """Bytes per image that one block keeps for the backward pass of N tokens, equation (2)."""
    D, H, HK = model.hidden_size, model.num_heads, model.num_heads * model.attention_head_dim
    M, S = int(D * model.mlp_ratio), model.text_length
    c = jnp.dtype(model.dtype).itemsize
    d = 1 + c if model.dropout else 0
    gates, cross = model.modulation == "adaln_zero", model.text_mode == "cross"
    if remat == "full":
        return N * D * c + cross * 3 * S * HK * c
    if remat == "dots":
        return (N * (2 * D + 3 * HK + M) + gates * N * D + cross * (N * (D + HK) + 3 * S * HK)) * c
    norms = 2 * N * D * (8 + 3 * c)
    attention = 4 * N * HK * c + H * N * N * (4 + c)
    mlp = 4 * N * M * c
    dropout = (2 * N * D + N * M) * d
    text = N * D * (8 + 2 * c + d) + 2 * N * HK * c + H * N * S * (5 + c) + 3 * S * HK * c
    return norms + attention + mlp + dropout + gates * 4 * N * D * c + cross * text


def kept_bytes(model: DiT, h: int, w: int) -> int:
    """Bytes per image that a training step keeps from its forward to its backward pass, equation (2)."""
    N = (h // model.patch_size) * (w // model.patch_size)
    c = jnp.dtype(model.dtype).itemsize
    final = N * model.hidden_size * (8 + 3 * c)
    text = model.text_length * model.text_width * (9 + c) if model.text_mode == "cross" else 0
    return model.num_layers * block_bytes(model, N, model.remat) + final + text


def copied_bytes(model: DiT, parameters: int) -> int:
    """Bytes of the parameters that a step keeps in its compute dtype, however large the batch is."""
    c = jnp.dtype(model.dtype).itemsize
    if c == 4:
        return 0
    if model.remat == "none":
        return parameters * c
    if model.text_mode == "pooled":
        return 0
    D, HK = model.hidden_size, model.num_heads * model.attention_head_dim
    return (model.num_layers * 2 * D * HK + model.text_width * D) * c  # of text tokens: they are not recomputed


def activation_bytes(model: DiT, h: int, w: int) -> int:
    """Bytes per image of a training step beside its state: what it keeps, and room to work in."""
    N = (h // model.patch_size) * (w // model.patch_size)
    c = jnp.dtype(model.dtype).itemsize
    room = 2 * N * max(4 * model.num_heads * N, c * int(model.hidden_size * model.mlp_ratio))
    again = block_bytes(model, N, "none") if model.remat != "none" else 0
    return kept_bytes(model, h, w) + room + again


def training_flops(model: DiT, h: int, w: int) -> int:
    """FLOP of one training step per image: forward and twice that for the backward pass, 2 FLOP a MAC."""
    return 3 * 2 * forward_macs(model, h, w)


def peak_flops(device_kind: str) -> float | None:
    """The device's dense peak in FLOP/s, or None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
