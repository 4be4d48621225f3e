"""What training minimises: at which times the network is asked, and how its answer is judged.

A time t per sample, from a density on (0, 1] that the schedule's resolution shift then moves:

    uniform         t ~ U(0, 1]                                                        (1)
    logit_normal    logit(t) ~ N(mean, std^2)      (Esser et al. 2024, eq. 19)         (2)

The logit-normal spends its time in the middle, where a prediction is neither trivial nor hopeless.

The loss is the squared error of the network's own target, averaged over a sample:

    loss_i = mean over h, w, C of (prediction_i - target_i)^2                          (3)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Process, Targets
from dit_jax.diffusion.schedules import Schedule

Times = Callable[[Array], Array]  # keys [B] -> t float32 [B]; the time of sample i depends on keys[i] alone


def uniform(schedule: Schedule) -> Times:
    """Times of eq. 1, moved by the schedule's shift. Never exactly 0, where there is no noise to find."""

    def times(keys: Array) -> Array:
        return schedule.shift_times(1 - jax.vmap(jax.random.uniform)(keys))

    return times


def logit_normal(schedule: Schedule, mean: float, std: float) -> Times:
    """Times of eq. 2, moved by the schedule's shift. ValueError unless std is above 0."""
    if not std > 0:
        raise ValueError(f"the std of logit-normal times must be above 0, not {std}")

    def times(keys: Array) -> Array:
        return schedule.shift_times(jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys)))

    return times


def loss(process: Process, prediction: Array, targets: Targets, x_t: Array, t: Array) -> Array:
    """Squared error in the space of the process's own prediction, eq. 3.

    Args:
      process: says which target the network predicts.
      prediction: the network's output ``[B, h, w, C]``; variance channels after C are not judged.
      targets: from ``process.corrupt``.
      x_t, t: what the network saw. Every objective is given them; this one weighs all times alike.

    Returns:
      float32 ``[B]``.
    """
    target = getattr(targets, process.prediction)
    prediction, _ = process.split(prediction, target.shape[-1])
    error = prediction.astype(jnp.float32) - target
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
