"""A DiT small enough to look at, with random parameters: a fresh one returns zero whatever it is given."""

from typing import Any

import jax
import jax.numpy as jnp

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
    """The same tree with every leaf normal: nothing is zero, so nothing is ignored."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


class Toy:
    """A model with random parameters and inputs on a 4 x 6 latent grid."""

    def __init__(self, **changes: Any):
        self.model = DiT(**{**SMALL, **changes})
        m = self.model
        self.params = randomise(jax.jit(lambda key: init_params(m, key, 4, 6))(jax.random.key(0)), 1)
        k = jax.random.split(jax.random.key(2), 4)
        self.x = jax.random.normal(k[0], (2, 4, 6, m.in_channels))
        self.t = jax.random.uniform(k[1], (2,))
        mask = jnp.arange(m.text_length)[None] < jnp.array([3, 4])[:, None]
        hidden = jax.random.normal(k[2], (2, m.text_length, m.text_width))
        self.text = TextStates(hidden, jax.random.normal(k[3], (2, m.pooled_width)), mask)
        self.apply = jax.jit(lambda params, x, t, text: m.apply({"params": params}, x, t, text, train=False))

    def __call__(self, text: TextStates | None = None) -> jax.Array:
        return self.apply(self.params, self.x, self.t, text or self.text)
