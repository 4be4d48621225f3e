"""Choices of the model that tests go through: each of its options at least once, in the company that papers give it."""

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "tutorial": {"text_mode": "pooled", "modulation": "adaln"},
    "cross": {"text_mode": "cross", "text_pool": "mean"},
    "dit": {"text_mode": "pooled", "text_pool": "mean", "mlp": "gelu", "positions": "sincos", "base_grid": 2},
    "pixart": {"text_mode": "cross", "text_pool": "none", "mlp": "gelu", "modulation": "adaln_single"},
    "lightning": {"text_mode": "pooled", "mlp": "swiglu", "norm": "rms", "qk_norm": True, "rope": True,
                  "positions": "sincos", "base_grid": 2},
    "mmdit": {"text_mode": "joint", "qk_norm": True, "rope": True, "positions": "none", "base_grid": 2},
    "joint": {"text_mode": "joint", "text_pool": "none", "modulation": "adaln_single", "mlp": "swiglu", "norm": "rms"},
    "joint_adaln": {"text_mode": "joint", "modulation": "adaln"},
    "registers": {"text_mode": "cross", "qk_norm": True, "rope": True, "base_grid": 2, "num_registers": 3},
}  # fmt: skip
