"""LightningDiT (Yao & Wang 2025), with text: a block of language models on rectified flow.

    python -m dit_jax.main --config=configs/recipes/lightningdit.py

Without its loss on the direction of the velocity, and without its VAE.
"""

from ml_collections import ConfigDict

from configs.recipes import on_the_shapes_world


def recipe(c: ConfigDict) -> ConfigDict:
    """What the paper chose."""
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.prediction = "flow"
    c.diffusion.times = "logit_normal"
    c.model.positions = "sincos"
    c.model.rope = True
    c.model.mlp = "swiglu"
    c.model.norm = "rms"
    c.model.modulation = "adaln_zero"
    c.model.text_mode = "cross"
    c.sample.sampler = "euler"
    c.sample.steps = 100  # 250 in the paper
    c.sample.grid = "shifted"
    c.sample.grid_shift = 3.3
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
