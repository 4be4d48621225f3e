"""DiT (Peebles & Xie 2023), with text: the schedule of 1,000 betas, noise as the prediction, a learned variance.

    python -m dit_jax.main --config=configs/recipes/dit.py

Published for class labels; here captions are attended to, as in every recipe of this folder.
"""

from ml_collections import ConfigDict

from configs.recipes import on_the_shapes_world


def recipe(c: ConfigDict) -> ConfigDict:
    """What the paper chose."""
    c.diffusion.schedule = "linear"
    c.diffusion.prediction = "epsilon"
    c.model.out_channels = 2 * c.model.in_channels  # and its variance
    c.model.positions = "sincos"
    c.model.mlp = "gelu"
    c.model.modulation = "adaln_zero"
    c.model.text_mode = "cross"
    c.sample.sampler = "ddpm"
    c.sample.steps = 100  # 250 in the paper
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
