"""A train step of the toy model, its state and a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.diffusion.objectives import uniform
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule
from dit_jax.training.loss_scale import LossScale
from dit_jax.training.skips import Skips
from dit_jax.training.state import TrainState
from dit_jax.training.step import Batch, TrainStep
from tests.toy import Toy

B = 4
CALM = 2.0**8  # a loss scale at which the toy of seed 5 does not overflow in float16, nor at four times as much


def make_step(toy: Toy, kind: type[TrainStep] = TrainStep, **changes: Any) -> TrainStep:
    """Plain gradient descent on rectified flow; ``changes`` are fields of the step."""
    process = Process(make_schedule("rectified_flow", 1.0), "flow")
    options = {
        "model": toy.model,
        "process": process,
        "sample_times": uniform(process.schedule),
        "weight": None,
        "variance_weight": 0.001,
        "to_model_latents": lambda raw: raw * 2.0,
        "optimizer": optax.sgd(1.0),
        "learning_rate": optax.constant_schedule(0.1),
        "caption_dropout": 0.5,
        "ema_decay": 0.9,
        "accumulate": 1,
        "seed": 3,
    }
    return kind(**{**options, **changes})


def make_state(toy: Toy, step: TrainStep, at: int = 100) -> TrainState:
    """A state in the middle of a run, with an average of zero."""
    params = jax.tree.map(jnp.copy, toy.params)
    ema, opt_state = jax.tree.map(jnp.zeros_like, params), step.optimizer.init(params)
    return TrainState(jnp.int32(at), params, ema, opt_state, LossScale.fresh(), Skips.none())


def make_batch(toy: Toy, seed: int = 7) -> Batch:
    """B random samples on a 4 x 6 latent grid."""
    k = jax.random.split(jax.random.key(seed), 4)
    m = toy.model
    return {
        "mean": np.asarray(jax.random.normal(k[0], (B, 4, 6, m.in_channels))),
        "std": np.asarray(jax.random.uniform(k[1], (B, 4, 6, m.in_channels))),
        "hidden": np.asarray(jax.random.normal(k[2], (B, m.text_length, m.text_width))),
        "pooled": np.asarray(jax.random.normal(k[3], (B, m.pooled_width))),
        "mask": np.ones((B, m.text_length), bool),
    }
