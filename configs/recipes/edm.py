"""EDM (Karras et al. 2022) on a transformer, with text: noise levels log-normal in training, Heun on Karras' grid.

    python -m dit_jax.main --config=configs/recipes/edm.py

With latents of unit variance, v as the prediction is its preconditioning.
"""

from ml_collections import ConfigDict

from configs.recipes import on_the_shapes_world


def recipe(c: ConfigDict) -> ConfigDict:
    """What the paper chose."""
    c.diffusion.schedule = "edm"
    c.diffusion.prediction = "v"
    c.diffusion.times = "log_normal"
    c.model.positions = "sincos"
    c.model.mlp = "gelu"
    c.model.modulation = "adaln_zero"
    c.model.text_mode = "cross"
    c.sample.sampler = "heun"
    c.sample.grid = "karras"
    c.sample.steps = 18
    return c


def get_config() -> ConfigDict:
    return on_the_shapes_world(recipe)
