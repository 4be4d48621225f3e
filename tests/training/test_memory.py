"""What is said of a step's memory against the traced step and the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dit_jax import build
from dit_jax.config import load_config
from dit_jax.models.dit import DiT
from dit_jax.sharding import batch_sharding, make_mesh, with_sharding
from dit_jax.training.memory import abstract_batch, compiled_bytes, kept_bytes, predict_activations, saved_bytes
from dit_jax.training.state import abstract_state
from dit_jax.trees import count_parameters
from tests.models.options import OPTIONS
from tests.toy import SMALL
from tests.toy_step import make_step


@pytest.mark.parametrize(
    ("name", "remat"), [*((name, "none") for name in OPTIONS), ("registers", "dots"), ("mmdit", "full")]
)
def test_what_small_models_and_batches_keep_says_it_of_large_ones(toy, name, remat):
    """In 16 bits, where parameters are kept too."""
    model = DiT(**{**SMALL, **OPTIONS[name], "num_layers": 3, "remat": remat, "dtype": jnp.bfloat16})
    step = dataclasses.replace(make_step(toy), model=model)
    kept, block = kept_bytes(step, 4, 6)
    assert kept.fixed + 7 * kept.per_image == saved_bytes(step, 7, 4, 6)
    assert 0 < 2 * block.per_image < kept.per_image


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_prediction_is_near_what_the_compiler_sets_aside(remat):
    """Two blocks of the small model in float32, which XLA for CPU computes in; not much less than it needs."""
    config = load_config("configs/small.py", {})
    config.update(batch_size=8)
    config.model.update(text_length=77, text_width=768, pooled_width=768, num_layers=2, remat=remat)
    config.latents.update(shift=(0.0,) * 4, scale=(1.0,) * 4)
    model, mesh = build.make_model(config, jnp.float32), make_mesh(jax.devices()[:1])
    step = build.make_step(config, model, build.make_process(config), *build.make_optimizer(config))
    state = abstract_state(model, step.optimizer, 32, 32, mesh)
    batch = with_sharding(abstract_batch(model, 8, 32, 32, jnp.float32), batch_sharding(mesh))
    needed = compiled_bytes(step.compile(state, batch))["total"]
    found = predict_activations(step, 32, 32)
    said = 5 * 4 * count_parameters(state.params) + found.fixed + 8 * found.per_image
    assert 0.85 < said / needed < 1.25
