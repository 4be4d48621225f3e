"""Samplers: from noise to a latent along a falling grid of times, by many calls of ``denoise``.

**One step of DDIM** (Song et al. 2021, eqs. 12 and 16) goes from t to an earlier time s. It keeps the
estimate of x0 and replaces part of the estimated noise by fresh noise z, in all as much noise as x_s holds:

    x_s = alpha_s x0 + sigma_s (sqrt(1 - eta^2 q) epsilon + eta sqrt(q) z)             (1)
    q = 1 - SNR(t) / SNR(s)                                                            (2)

q is the share of the noise of x_s that, in the forward process, was not yet decided by x_t. On a variance
preserving schedule sigma_s sqrt(q) is the standard deviation of eq. 16. Two values of eta have names:

*eta = 1 is euler_ancestral, and ddpm without a learned variance.* Put epsilon = (x_t - alpha_t x0) / sigma_t into (1),
and the mean and variance are those of the true posterior of x_s given x_t and x0 (Ho et al. 2020, eqs. 6 and 7). The
ancestral Euler of Karras' coordinates (3) steps to u = u_s^2 / u_t and adds noise up to u_s, which is the same:
sqrt(1 - q) = u_s / u_t.

*eta = 0 is euler.* Without fresh noise, x_t follows an ordinary differential equation, which is simplest in
coordinates y and u:

    variance preserving    y = x / alpha,  u = sigma / alpha,  dy / du = epsilon       (3)
    rectified flow         y = x,          u = t,              dx / dt = flow          (4)

Euler's step y + (u_s - u_t) dy / du, with y = x0 + u epsilon in (3) and x = (1 - t) x0 + t epsilon in (4), is
x_s = alpha_s x0 + sigma_s epsilon both times: eq. 1 without noise. Written that way it divides by nothing.

**heun** goes on from Euler's point: it asks for the slope there too and steps with the mean of both
(Karras et al. 2022, algorithm 1), an error of second order for two evaluations a step:

    y_s = euler + (u_s - u_t) / 2 (slope_s - slope_t)                                  (5)

**dpmpp_2m** (Lu et al. 2022b, algorithm 2) solves the same equation in lambda = ln(alpha / sigma), where its linear
part is known exactly and x0 is extrapolated from this step and the one before, h and h' long:

    D = x0 + h / (2 h') (x0 - x0')                                                     (6)
    x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) D,
    exp(-h) = alpha_t sigma_s / (alpha_s sigma_t)                                      (7)

an error of second order for one evaluation a step. The first step and the one to sigma = 0 take D = x0: Euler's.

**ddpm** with a learned variance (Nichol and Dhariwal 2021, eq. 15) keeps the mean of eq. 1 at eta = 1. The variance
there, beta~, is right where x_t leaves no doubt about x0. If x0 is standard normal, x_s given x_t has the variance beta
on a variance preserving schedule. The network says where between the two, on a scale of logarithms, the truth lies:

    beta~ = sigma_s^2 q,    beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 = sigma_t^2 q,
    Sigma = beta^v beta~^(1 - v) = (sigma_t / sigma_s)^(2 v) beta~                     (8)

so that z of eq. 1 is stretched by (sigma_t / sigma_s)^v. The other samplers do not ask for the variance.

Every grid that ends at sigma = 0 ends with x0 itself, as eqs. 1 and 7 do there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Denoise, Process, Targets, normal_per_sample

MIN_ALPHA = 1e-3  # below it, x0 from epsilon (a division by alpha) is rounding noise
PRIOR = np.uint32(2**32 - 1)  # the prior draws from fold_in(key, PRIOR): no step has this number


class Sampler(NamedTuple):
    """A method of walking down a grid.

    Attributes:
      init: ``x_start -> history``, a pytree that multistep methods carry from step to step; ``()`` elsewhere.
      step: ``(denoise, keys [B], x [B, h, w, C], t, t_next, history) -> (x_next, history)``; t and t_next are
        float32 scalars.
    """

    init: Callable[[Array], Any]
    step: Callable[[Denoise, Array, Array, Array, Array, Any], tuple[Array, Any]]


def ddim(process: Process, grid: np.ndarray, eta: float) -> Sampler:
    """Eq. 1, one evaluation a step.

    Args:
      process: of the network.
      grid: the times of the run, ``[steps + 1]``, falling.
      eta: share of fresh noise, from 0 (none, deterministic) to 1 (ancestral sampling).

    Raises:
      ValueError: eta is outside [0, 1], or the network cannot see x0 where the grid starts.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta of ddim must be between 0 and 1, not {eta}")
    _refuse_blind_start(process, grid)
    schedule = process.schedule

    def step(denoise, keys, x, t, t_next, history):
        targets = denoise(x, _batch(t, x))
        noise = targets.epsilon
        if eta > 0:
            q = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(t_next))  # (2)
            z = normal_per_sample(keys, x.shape[1:])
            noise = jnp.sqrt(1 - eta**2 * q) * noise + eta * jnp.sqrt(q) * z
        return schedule.alpha(t_next) * targets.x0 + schedule.sigma(t_next) * noise, history  # (1)

    return Sampler(_no_history, step)


def ddpm(process: Process, grid: np.ndarray) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), one evaluation a step. Arguments and errors as for `ddim`.

    A step draws from the posterior of x_s given x_t and the estimate of x0, eq. 1 with eta = 1; its variance is that of
    eq. 8 where the network says which.
    """
    _refuse_blind_start(process, grid)
    schedule = process.schedule

    def step(denoise, keys, x, t, t_next, history):
        targets = denoise(x, _batch(t, x))
        sigma, sigma_next = schedule.sigma(t), schedule.sigma(t_next)
        q = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(t_next))  # (2)
        z = normal_per_sample(keys, x.shape[1:])
        if targets.variance is not None:
            # no noise is left at sigma = 0, whatever stretches it
            z = z * jnp.where(sigma_next > 0, sigma / sigma_next, 1.0) ** targets.variance  # (8)
        noise = jnp.sqrt(1 - q) * targets.epsilon + jnp.sqrt(q) * z
        return schedule.alpha(t_next) * targets.x0 + sigma_next * noise, history  # (1)

    return Sampler(_no_history, step)


def euler(process: Process, grid: np.ndarray) -> Sampler:
    """Euler's method on eq. 3 or 4, which is eq. 1 with eta = 0. Arguments and errors as for `ddim`."""
    return ddim(process, grid, eta=0.0)


def heun(process: Process, grid: np.ndarray) -> Sampler:
    """Heun's method on eq. 3 or 4, two evaluations a step. Arguments and errors as for `ddim`.

    A step to sigma = 0 is Euler's, since no slope is defined there. The scan holds one step for all, so its
    second evaluation is made (at t, where it is finite) and left out.
    """
    _refuse_blind_start(process, grid)
    schedule = process.schedule

    def width(t: Array, t_next: Array) -> Array:  # u_s - u_t, on the scale of x_s
        if schedule.variance_preserving:
            return schedule.sigma(t_next) - schedule.alpha(t_next) * schedule.sigma(t) / schedule.alpha(t)
        return t_next - t

    def slope(targets: Targets) -> Array:
        return targets.epsilon if schedule.variance_preserving else targets.flow

    def step(denoise, keys, x, t, t_next, history):
        here = denoise(x, _batch(t, x))
        x_euler = schedule.alpha(t_next) * here.x0 + schedule.sigma(t_next) * here.epsilon  # (1), eta = 0
        last = schedule.sigma(t_next) == 0
        there = denoise(x_euler, _batch(jnp.where(last, t, t_next), x))
        correction = width(t, t_next) / 2 * (slope(there) - slope(here))  # (5)
        return jnp.where(last, x_euler, x_euler + correction), history

    return Sampler(_no_history, step)


def euler_ancestral(process: Process, grid: np.ndarray) -> Sampler:
    """Euler's method with fresh noise at every step: eq. 1 with eta = 1. Arguments and errors as for `ddim`."""
    return ddim(process, grid, eta=1.0)


def dpmpp_2m(process: Process, grid: np.ndarray) -> Sampler:
    """Eqs. 6 and 7, one evaluation a step. Arguments and errors as for `ddim`.

    The history is x0 of the step before and its length h', at first infinite: nothing is extrapolated then, as after
    a start at alpha = 0.
    """
    _refuse_blind_start(process, grid)
    schedule = process.schedule

    def init(x_start: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x_start), jnp.float32(jnp.inf)

    def step(denoise, keys, x, t, t_next, history):
        x0_before, h_before = history
        x0 = denoise(x, _batch(t, x)).x0
        alpha, sigma, alpha_next, sigma_next = (f(s) for s in (t, t_next) for f in (schedule.alpha, schedule.sigma))
        h = (schedule.log_snr(t_next) - schedule.log_snr(t)) / 2
        share = jnp.where(jnp.isfinite(h), h / (2 * h_before), 0.0)
        ahead = x0 + share * (x0 - x0_before)  # (6)
        kept = sigma_next / sigma
        return kept * x + (alpha_next - alpha * kept) * ahead, (x0, h)  # (7)

    return Sampler(init, step)


def draw_prior(keys: Array, shape: tuple[int, ...]) -> Array:
    """Where a run starts: standard normal noise, float32 ``[B, *shape]``, image i's from keys[i] alone."""
    return normal_per_sample(jax.vmap(lambda key: jax.random.fold_in(key, PRIOR))(keys), shape)


def run(
    sampler: Sampler,
    keys: Array,
    x_start: Array,
    grid: Array,
    segments: Sequence[tuple[int, int, Denoise]],
) -> Array:
    """Walks down the grid; meant to be called inside one ``jax.jit``.

    Args:
      sampler: one step of the method.
      keys: one random key per image, ``[B]``; step k of image i draws from ``fold_in(keys[i], k)``.
      x_start: x where the first segment begins, usually at ``grid[0]``, ``[B, h, w, C]``.
      grid: falling times ``[steps + 1]``.
      segments: ``(first, last, denoise)``: steps first <= k < last use this denoise. Static; together they
        cover the steps in order, from where the first begins: a run may enter its grid late, and without segments
        it is at the end. Each becomes one scan, so that what one segment leaves out costs nothing.

    Returns:
      x at the end of the grid, float32 ``[B, h, w, C]``.

    Raises:
      ValueError: the segments do not cover the steps in order.
    """
    steps = len(grid) - 1
    begin = segments[0][0] if segments else steps
    if [k for first, last, _ in segments for k in range(first, last)] != list(range(begin, steps)):
        bounds = [(first, last) for first, last, _ in segments]
        raise ValueError(f"segments {bounds} must cover each of the grid's {steps} steps once, in order")

    grid = jnp.asarray(grid, jnp.float32)
    x = x_start.astype(jnp.float32)
    carry = (x, sampler.init(x))
    for first, last, denoise in segments:

        def body(carry, now, denoise=denoise):
            k, t, t_next = now
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
            return sampler.step(denoise, step_keys, carry[0], t, t_next, carry[1]), None

        times = (jnp.arange(first, last), grid[first:last], grid[first + 1 : last + 1])
        carry, _ = jax.lax.scan(body, carry, times)
    return carry[0]


def _no_history(x_start: Array) -> tuple[()]:
    return ()


def _batch(t: Array, x: Array) -> Array:
    return jnp.broadcast_to(t, x.shape[:1])  # [B]


def _refuse_blind_start(process: Process, grid: np.ndarray) -> None:
    """ValueError if an epsilon-predicting network starts where x_t holds next to nothing of x0."""
    with jax.ensure_compile_time_eval():  # the grid is known; a sampler may be built inside a jit
        alpha = float(process.schedule.alpha(jnp.float32(grid[0])))
    if process.prediction == "epsilon" and alpha < MIN_ALPHA:
        raise ValueError(
            f"a model that predicts epsilon cannot start at t = {float(grid[0]):g} of schedule "
            f"{process.schedule.name!r}: alpha is {alpha:.1e} there, and x0, found by dividing by it, needs "
            f"{MIN_ALPHA:g} or more; train with prediction v or flow, or start the grid at a smaller t"
        )
