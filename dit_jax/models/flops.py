"""Analytic cost of one forward pass, and what a device can do.

Multiply-adds per image, with r = ``mlp_ratio`` and m the modulation vectors of a block (4 or 6); the sum over
matrix products of the network, nothing else:

    MAC = L (4 N D HK + 2 r N D^2 + 2 N^2 HK + m D^2)                    blocks
        + L (2 N D HK + 2 S D HK + 2 N S HK) + S E D                     only with text tokens (``cross``)
        + N p^2 C D + N D p^2 C_out                                      patches in and out
        + P D + F D + D^2 + 2 D^2                                        text, time (F features), final norm     (1)

One MAC is two FLOP; training costs three forward passes. Published "Gflops" of DiT are multiply-adds.
"""

from dit_jax.models.dit import DiT
from dit_jax.models.embeddings import NUM_FREQUENCIES

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


def training_flops(model: DiT, h: int, w: int) -> int:
    """FLOP of one training step per image: forward and twice that for the backward pass, 2 FLOP a MAC."""
    return 3 * 2 * forward_macs(model, h, w)


def peak_flops(device_kind: str) -> float | None:
    """The device's dense peak in FLOP/s, or None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
