"""Analytic cost of the network in multiply-adds, and what a device can do.

Multiply-adds per image, the sum over matrix products of the network, nothing else. With M the width of the MLP and
f its matrices (2; 3 with ``swiglu``), m the modulation vectors of a block, N tokens of the picture and R registers:

    MAC = L ((N + R) (4 D HK + f D M) + 2 (N + R)^2 HK + m D^2)          blocks
        + L (2 (N + R) D HK + 2 S D HK + 2 (N + R) S HK)                 only with ``cross``
        + (L - 1) (S (4 D HK + f D M) + (4 (N + R) S + 2 S^2) HK + m D^2)
          + 2 S D HK + 2 (N + R) S HK + 2 D^2                            only with ``joint``
        + S E D                                                          where tokens are attended to
        + N p^2 C D + N D p^2 C_out                                      patches in and out
        + P D + F D + D^2 + 2 D^2                                        text, time (F features), final norm     (1)

With ``text_pool=mean`` the text's P D are E D, and none with ``none``. With ``adaln_single`` the model has 6 D^2 of
modulation, and neither blocks nor the final norm have any.

One MAC is two FLOP; training costs three forward passes. Published "Gflops" of DiT are multiply-adds.
"""

from typing import NamedTuple

from dit_jax.models.blocks import VECTORS
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
    D, L, p, HK = model.hidden_size, model.num_layers, model.patch_size, model.spec.attention_width
    S, E, P, R = model.text_length, model.text_width, model.pooled_width, model.num_registers
    N = (h // p) * (w // p)
    single = model.modulation == "adaln_single"
    m = 0 if single else VECTORS[model.modulation]
    of_token = 4 * D * HK + (3 if model.mlp == "swiglu" else 2) * D * model.spec.mlp_width
    total = L * ((N + R) * of_token + 2 * (N + R) ** 2 * HK + m * D * D)
    if model.text_mode == "cross":
        total += L * (2 * (N + R) * D * HK + 2 * S * D * HK + 2 * (N + R) * S * HK)
    if model.text_mode == "joint":
        total += (L - 1) * (S * of_token + (4 * (N + R) * S + 2 * S * S) * HK + m * D * D)
        total += 2 * S * D * HK + 2 * (N + R) * S * HK + (0 if single else 2 * D * D)
    if model.text_mode != "pooled":
        total += S * E * D
    total += N * p * p * (model.in_channels + model.out_channels) * D
    total += {"eos": P, "mean": E, "none": 0}[model.text_pool] * D + NUM_FREQUENCIES * D + D * D
    return total + (6 if single else 2) * D * D


def training_flops(model: DiT, h: int, w: int) -> int:
    """FLOP of one training step per image: forward and twice that for the backward pass, 2 FLOP a MAC."""
    return 3 * 2 * forward_macs(model, h, w)


def peak_flops(device_kind: str) -> float | None:
    """The device's dense peak in FLOP/s, or None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
