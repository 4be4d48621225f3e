"""PixArt-alpha (Chen et al. 2023): one modulation for all blocks, which knows the time alone; text by cross-attention.

python -m dit_jax.main --config=configs/recipes/pixart.py
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
    c.model.modulation = "adaln_single"
    c.model.text_mode = "cross"
    c.model.text_pool = "none"
    c.sample.sampler = "dpmpp_2m"
    c.sample.steps = 20
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
