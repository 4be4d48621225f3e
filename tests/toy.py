"""A DiT small enough to look at, with random parameters: a fresh one returns zero whatever it is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import TextStates
from dit_jax.models.dit import DiT
from dit_jax.training.state import init_params

SMALL = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_head_dim": 12,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "mlp_ratio": 2.0,
    "mlp": "silu",
    "norm": "layer",
    "qk_norm": False,
    "positions": "learned",
    "rope": False,
    "base_grid": 0,
    "num_registers": 0,
    "dropout": 0.1,
    "text_mode": "cross",
    "text_pool": "eos",
    "modulation": "adaln_zero",
    "time_scale": 1000.0,
    "text_length": 5,
    "text_width": 7,
    "pooled_width": 6,
    "remat": "none",
}


def randomise(params: Any, seed: int) -> Any:
    """The same tree with every leaf normal: nothing is zero, so nothing is ignored. Of ``params`` only shapes count."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape, np.float32)), params)


class Toy:
    """A model with random parameters and inputs on a 4 x 6 latent grid."""

    def __init__(self, seed: int = 1, **changes: Any):
        self.model = DiT(**{**SMALL, **changes})
        m = self.model
        self.params = randomise(jax.eval_shape(lambda key: init_params(m, key, 4, 6), jax.random.key(0)), seed)
        draw = np.random.default_rng(2)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(draw.standard_normal(shape, np.float32))

        self.x = normal(2, 4, 6, m.in_channels)
        self.t = jnp.asarray(draw.random(2, np.float32))
        mask = jnp.asarray(np.arange(m.text_length)[None] < np.array([3, 4])[:, None])
        self.text = TextStates(normal(2, m.text_length, m.text_width), normal(2, m.pooled_width), mask)
        self.apply = jax.jit(lambda params, x, t, text: m.apply({"params": params}, x, t, text, train=False))

    def __call__(self, text: TextStates | None = None) -> jax.Array:
        return self.apply(self.params, self.x, self.t, text or self.text)
