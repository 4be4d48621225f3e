"""What training minimises: at which times the network is asked, and how its answer is judged.

A time t per sample, from a density on (0, 1] that the schedule's resolution shift then moves:

    uniform         t ~ U(0, 1]                                                        (1)
    stratified      1 - t ~ U([i, i + 1) / B) for sample i of a batch: uniform over all,
                    and every batch has all times  (after Kingma et al. 2021, app. I)  (2)
    logit_normal    logit(t) ~ N(mean, std^2)      (Esser et al. 2024, eq. 19)         (3)

The logit-normal spends its time in the middle, where a prediction is neither trivial nor hopeless. Without a shift:

    log_normal      ln(sigma / alpha) ~ N(mean, std^2)    (Karras et al. 2022)         (4)

The loss is the squared error of the network's own target, averaged over a sample, times a weight:

    loss_i = w(t_i) mean over h, w, C of (prediction_i - target_i)^2                   (5)

At a given x_t a prediction is x0 times a slope, plus what is known, so its error is that of x0 times the slope J:

    x0  J = 1,   epsilon  J = alpha / sigma,   v  J = (alpha^2 + sigma^2) / sigma,
    flow  J = (alpha sigma' - sigma alpha') / sigma                                    (6)

A weight that papers state for one target is by eq. 6 the same training for every other. With SNR = alpha^2 / sigma^2:

    uniform    w = 1, of the network's own target
    min_snr    min(SNR, gamma) of the error of x0      (Hang et al. 2023, section 3.4) (7)
    sigmoid    1 / (1 + exp(ln SNR - bias)) of the error of epsilon
               (Kingma and Gao 2023; Hoogeboom et al. 2024); the density of the times
               stands where they write d ln SNR / dt                                   (8)

A network with 2 C channels also learns the variance of its reverse steps (Nichol and Dhariwal 2021, eqs. 15 and 16).
To eq. 5, which alone trains the mean, a small multiple of the variational bound is added, as the sum over T steps from
t to s = t - 1 / T has it: T KL(q(x_s | x_t, x0) || p(x_s | x_t)), in bits per latent number. Near the picture, where
this s would be 0 and the KL a likelihood of pixels, s = t / 2:

    s = max(t - 1 / T, t / 2)                                                          (9)

Both sides are Gaussians. The means differ by alpha_s q times the error of x0, q has the variance beta~, and p that of
eq. 8 of `dit_jax.diffusion.samplers`, larger by exp(d). As (alpha_s q)^2 / beta~ = SNR(s) - SNR(t), and by eq. 6,

    d = v ln(sigma_t^2 / sigma_s^2)
    2 KL = d + exp(-d) - 1 + exp(-d) (SNR(s) - SNR(t)) / J(t)^2 (prediction - target)^2    (10)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Process, Targets
from dit_jax.diffusion.schedules import Schedule, T

# keys [B], places [B] -> t float32 [B]. places[i] is where in its batch sample i stands, in [0, 1), and with keys[i]
# all that its time depends on. The width of a place is 1 / batch size.
Times = Callable[[Array, Array], Array]
Weight = Callable[[Array], Array]  # t [B] -> w [B] of eq. 5
LEAST = 1e-6  # the smallest time: at 0 there is no noise to find


def uniform(schedule: Schedule) -> Times:
    """Times of eq. 1, moved by the schedule's shift. Never exactly 0, where there is no noise to find."""

    def times(keys: Array, places: Array) -> Array:
        return schedule.shift_times(1 - jax.vmap(jax.random.uniform)(keys))

    return times


def stratified(schedule: Schedule, batch_size: int) -> Times:
    """Times of eq. 2, moved by the schedule's shift, for batches of B samples over all devices and slices."""

    def times(keys: Array, places: Array) -> Array:
        u = places + jax.vmap(jax.random.uniform)(keys) / batch_size
        return schedule.shift_times(jnp.maximum(1 - u, LEAST))

    return times


def logit_normal(schedule: Schedule, mean: float, std: float) -> Times:
    """Times of eq. 3, moved by the schedule's shift. ValueError unless std is above 0."""
    if not std > 0:
        raise ValueError(f"the std of logit-normal times must be above 0, not {std}")

    def times(keys: Array, places: Array) -> Array:
        return schedule.shift_times(jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys)))

    return times


def log_normal(schedule: Schedule, mean: float, std: float) -> Times:
    """Times of eq. 4. ValueError unless std is above 0."""
    if not std > 0:
        raise ValueError(f"the std of log-normal noise levels must be above 0, not {std}")

    def times(keys: Array, places: Array) -> Array:
        log_ratio = mean + std * jax.vmap(jax.random.normal)(keys)
        return jnp.maximum(schedule.time_of(-2 * log_ratio), LEAST)

    return times


def min_snr(process: Process, gamma: float) -> Weight:
    """Eq. 7 for what the network predicts. ValueError unless gamma is above 0."""
    if not gamma > 0:
        raise ValueError(f"gamma of min_snr must be above 0, not {gamma}")

    def weight(t: Array) -> Array:
        t = _inside(t)
        return jnp.minimum(jnp.exp(process.schedule.log_snr(t)), gamma) / process.slope(t) ** 2

    return weight


def sigmoid(process: Process, bias: float) -> Weight:
    """Eq. 8 for what the network predicts."""

    def weight(t: Array) -> Array:
        t = _inside(t)
        log_snr = process.schedule.log_snr(t)
        return jax.nn.sigmoid(bias - log_snr) * jnp.exp(log_snr) / process.slope(t) ** 2  # of epsilon, J^2 = SNR

    return weight


def _inside(t: Array) -> Array:
    """Times a little away from both ends, where signal or noise is 0 and its ratio to a slope undetermined."""
    return jnp.clip(t, LEAST, 1 - LEAST)


def loss(process: Process, prediction: Array, targets: Targets) -> Array:
    """Squared error in the space of the process's own prediction, eq. 5 with w = 1.

    Args:
      process: says which target the network predicts.
      prediction: the network's output ``[B, h, w, C]``; variance channels after C are not judged.
      targets: from ``process.corrupt``.

    Returns:
      float32 ``[B]``.
    """
    target = getattr(targets, process.prediction)
    prediction, _ = process.split(prediction, target.shape[-1])
    error = prediction.astype(jnp.float32) - target
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def variance_loss(process: Process, prediction: Array, targets: Targets, t: Array) -> Array:
    """T KL of eq. 10, which trains the variance channels and no others: the mean of p is taken as it is.

    Args:
      process: says which target the network predicts.
      prediction: the network's output ``[B, h, w, 2 C]``.
      targets: from ``process.corrupt``.
      t: ``[B]``, in (0, 1].

    Returns:
      float32 ``[B]``, in bits per latent number.
    """
    target = getattr(targets, process.prediction)
    mean, variance = process.split(prediction, target.shape[-1])
    assert variance is not None, "the network has no channels for a variance"
    t = _inside(t)
    s = jnp.maximum(t - 1 / T, t / 2)  # (9)
    schedule, rows = process.schedule, (-1,) + (1,) * (target.ndim - 1)
    q = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
    log_scale = schedule.log_snr(s) + jnp.log(q) - 2 * jnp.log(process.slope(t))
    scale = jnp.exp(log_scale).reshape(rows)  # of the squared error in (10)
    error = jax.lax.stop_gradient(mean).astype(jnp.float32) - target
    d = variance * 2 * (jnp.log(schedule.sigma(t)) - jnp.log(schedule.sigma(s))).reshape(rows)
    nats = (d + jnp.expm1(-d) + jnp.exp(-d) * scale * error**2) / 2  # (10)
    return T * jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / jnp.log(2.0)
