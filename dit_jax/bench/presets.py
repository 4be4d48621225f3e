"""What is measured: the small model and the published sizes of DiT, with the real train step, on made-up latents.

Random parameters that are nowhere zero, a random batch, 32 x 32 x 4 latents and the text of CLIP-L: neither data nor
encoders are needed, and no gate that starts at zero hides what lies behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dit_jax import build
from dit_jax.config import default_file, load_config
from dit_jax.errors import ConfigError
from dit_jax.models.dit import DiT
from dit_jax.training.state import TrainState, init_state
from dit_jax.training.step import Batch, TrainStep

SIDE = 32  # of the latents: pictures of 256 px
TEXT = {"text_length": 77, "text_width": 768, "pooled_width": 768}
LATENT_SCALE = 0.18215  # of the published VAE
KEY = 0


class Preset(NamedTuple):
    """A size, and how many pictures a step of it takes unless told otherwise."""

    model: dict[str, Any]
    batch: int


def _published(D: int, L: int, H: int, batch: int) -> Preset:
    """As published, with text in place of classes: gates, fixed positions, GELU, a learned variance."""
    model = {"hidden_size": D, "num_layers": L, "num_heads": H, "attention_head_dim": D // H, "mlp": "gelu",
             "positions": "sincos", "base_grid": SIDE // 2, "modulation": "adaln_zero", "out_channels": 8}  # fmt: skip
    return Preset(model, batch)


PRESETS = {
    "small": Preset({}, 128),  # the default config: 8 layers of width 384
    "s2": _published(384, 12, 6, 128),
    "b2": _published(768, 12, 12, 64),
    "l2": _published(1024, 24, 16, 32),
    "xl2": _published(1152, 28, 16, 32),
}


@dataclass(frozen=True)
class Bench:
    """A train step and what it is called with.

    Attributes:
      config: whose choices it has.
      step: the real one.
      batch: encoded, on the host; its moments are float32.
    """

    config: ConfigDict
    step: TrainStep
    batch: Batch

    @property
    def model(self) -> DiT:
        """The network."""
        return self.step.model

    def state(self, mesh: jax.sharding.Mesh) -> TrainState:
        """A fresh one with random parameters; the average has the same values."""
        state = init_state(self.model, self.step.optimizer, jax.random.key(KEY), SIDE, SIDE, mesh)

        def move(leaf: jax.Array, key: jax.Array) -> jax.Array:
            return leaf + 0.02 * jax.random.normal(key, leaf.shape)

        @jax.jit
        def randomise(params: Any) -> Any:
            leaves, structure = jax.tree.flatten(params)
            keys = jax.random.split(jax.random.key(KEY + 1), len(leaves))
            return structure.unflatten(map(move, leaves, keys))

        params = randomise(state.params)
        return replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


def make_bench(
    preset: str, batch: int, dtype: str, dropout: float, changes: Mapping[str, Any] = MappingProxyType({})
) -> Bench:
    """One of `PRESETS` with so many pictures a step, and changes of the config by dotted key.

    Raises:
      ConfigError: the package lies without its configs.
    """
    if (path := default_file()) is None:
        raise ConfigError("sizes are measured in a clone of the repository: here configs/default.py is not to be had")
    config = load_config(str(path), {})
    config.batch_size, config.dtype = batch, dtype
    config.model.update(PRESETS[preset].model | TEXT | {"dropout": dropout})
    config.update_from_flattened_dict(changes)
    model = build.make_model(config, build.compute_dtype(dtype, jax.devices()[0]))
    process = build.make_process(config)
    # the latents of a config need the packages of the encoders
    step = build.make_step(config, model, process, *build.make_optimizer(config), lambda raw: raw * LATENT_SCALE)
    return Bench(config, step, random_batch(model, batch))


def random_batch(model: DiT, B: int) -> Batch:
    """An encoded batch of B captions that are all as long as the encoder allows."""
    random = np.random.default_rng(KEY)
    S, E, P, C = model.text_length, model.text_width, model.pooled_width, model.in_channels

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    return {
        "mean": normal(B, SIDE, SIDE, C) / LATENT_SCALE,
        "std": np.full((B, SIDE, SIDE, C), 0.1, np.float32),
        "hidden": normal(B, S, E).astype(jnp.bfloat16),
        "pooled": normal(B, P).astype(jnp.bfloat16),
        "mask": np.ones((B, S), bool),
    }
