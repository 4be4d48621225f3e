"""Stable Diffusion 3 (Esser et al. 2024): text and picture as two streams that attend to each other.

python -m dit_jax.main --config=configs/recipes/mmdit.py
"""

from ml_collections import ConfigDict

from configs.recipes import on_the_shapes_world


def recipe(c: ConfigDict) -> ConfigDict:
    """What the paper chose."""
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.prediction = "flow"
    c.diffusion.times = "logit_normal"
    c.model.positions = "sincos"
    c.model.mlp = "gelu"
    c.model.qk_norm = True
    c.model.modulation = "adaln_zero"
    c.model.text_mode = "joint"
    c.sample.sampler = "euler"
    c.sample.steps = 28
    c.sample.grid = "shifted"
    c.sample.grid_shift = 3.0
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
