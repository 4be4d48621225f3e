"""Published recipes on the shapes world: same data, size, optimizer and budget; what a paper chose is all that differs.

Each file has `recipe(c)`, which sets what the paper sets, on any config that begins as `configs/default.py` does:

    from configs import base
    from configs.recipes import sit

    def get_config():
        return sit.recipe(base.get_config())

docs/recipes.md compares them. The papers' own optimizers and learning rates are not part of it.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import default


def on_the_shapes_world(recipe: Callable[[ConfigDict], ConfigDict]) -> ConfigDict:
    """A recipe at the size, and for half the steps, of configs/quickstart.py."""
    c = default.get_config()
    c.total_steps = 2_000
    c.batch_size = 64
    c.optimizer = "muon"
    c.learning_rate = 5e-3
    c.warmup_steps = 100
    c.adam_b2 = 0.99
    c.weight_decay = 0.0
    c.ema_decay = 0.998
    c.log_every = 50
    c.save_every = 1_000
    c.sample_every = 0
    c.validate_every = 500
    c.data.image_size = 64
    c.data.storage_dtype = "float32"
    c.data.validation_fraction = 0.02
    c.latents.normalize = "measured"
    c.model.hidden_size = 128
    c.model.num_layers = 6
    c.model.num_heads = 4
    c.model.attention_head_dim = 32
    c.model.dropout = 0.0
    c.sample.guidance_scale = 2.0
    return recipe(c)
