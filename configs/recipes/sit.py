"""SiT (Ma et al. 2024), with text: DiT's block on the straight line from the picture to the noise.

python -m dit_jax.main --config=configs/recipes/sit.py
"""

from ml_collections import ConfigDict

from configs.recipes import on_the_shapes_world


def recipe(c: ConfigDict) -> ConfigDict:
    """What the paper chose."""
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.prediction = "flow"
    c.model.positions = "sincos"
    c.model.mlp = "gelu"
    c.model.modulation = "adaln_zero"
    c.model.text_mode = "cross"
    c.sample.sampler = "ddpm"  # with fresh noise, as its stochastic sampler, which the paper finds the best
    c.sample.steps = 100  # 250 in the paper
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
