"""Noise schedules: how much of the picture and how much noise is in x_t.

Every schedule mixes a clean latent x0 with standard normal noise eps,

    x_t = alpha(t) x0 + sigma(t) eps,    t in [0, 1],  t = 0 is clean                  (1)
    log_snr(t) = 2 ln(alpha / sigma),    falling in t                                  (2)

**Variance preserving** schedules, alpha^2 + sigma^2 = 1, are given by the noise level r = sigma / alpha. From r
follow, with r' = dr / dt,

    alpha = 1 / sqrt(1 + r^2),    sigma = r / sqrt(1 + r^2)                            (3)
    dalpha / dt = -alpha^2 sigma r',    dsigma / dt = alpha^3 r'                       (4)

The discrete ones have T = 1000 noise increments beta_k:

    alpha_bar_k = (1 - beta_0) (1 - beta_1) ... (1 - beta_k)                           (5)
    r_k = sqrt((1 - alpha_bar_k) / alpha_bar_k)                                        (6)

Point k sits at t = (k + 1) / T, and r = 0 at t = 0. Between points r is linear in t, so that a model of
T discrete steps can be sampled on any grid.

Their betas:

    linear           beta_k from 1e-4 to 0.02 in equal steps (Ho et al. 2020)          (7)
    scaled_linear    sqrt(beta_k) in equal steps, beta_k from 0.00085 to 0.012
                     (Rombach et al. 2022)                                             (8)
    cosine           beta_k = min(0.999, 1 - f((k + 1) / T) / f(k / T)),
                     f(u) = cos^2(pi / 2 (u + 0.008) / 1.008)
                     (Nichol and Dhariwal 2021, eq. 17)                                (9)

``edm`` (Karras et al. 2022) spaces noise levels evenly in their logarithm, from r_min = 0.002 to r_max = 80:

    r = r_min (r_max / r_min)^t,    and r = 0 at t = 0 itself                          (10)

**Rectified flow** (Liu et al. 2022; Lipman et al. 2022) is the straight line from the picture to the noise:

    alpha = 1 - t,    sigma = t                                                        (11)

Large pictures need more noise to hide the same content. The resolution shift s moves the times of training
and of sampling, not the line (Esser et al. 2024, eq. 23):

    t' = s t / (1 + (s - 1) t)                                                         (12)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import Array

T = 1000  # steps of the discrete schedules
R_MIN, R_MAX = 0.002, 80.0  # noise levels of edm


class Schedule(ABC):
    """alpha and sigma as functions of t; immutable. All take t of any shape and return that shape."""

    name: str
    variance_preserving: bool

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Weight of x0 in x_t."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Weight of the noise in x_t."""

    @abstractmethod
    def d_alpha(self, t: Array) -> Array:
        """Derivative of alpha by t."""

    @abstractmethod
    def d_sigma(self, t: Array) -> Array:
        """Derivative of sigma by t."""

    def log_snr(self, t: Array) -> Array:
        """Logarithm of the signal-to-noise ratio, eq. 2; infinite where alpha or sigma is 0."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    @abstractmethod
    def time_of(self, log_snr: Array) -> Array:
        """The time at which the logarithm of the signal-to-noise ratio is this, or the nearest end of [0, 1]."""

    def shift_times(self, t: Array) -> Array:
        """Moves times drawn or spaced evenly in [0, 1] to where this schedule wants them."""
        return t


class VariancePreserving(Schedule):
    """Eqs. 3 and 4, from the noise level r.

    Attributes:
      first: the smallest t of which r is a noise level to train or sample at; below it lies only t = 0.
    """

    variance_preserving = True
    first: float

    @abstractmethod
    def ratio_and_slope(self, t: Array) -> tuple[Array, Array]:
        """r and dr / dt at t."""

    def alpha(self, t: Array) -> Array:
        r, _ = self.ratio_and_slope(t)
        return 1 / jnp.sqrt(1 + r**2)  # (3)

    def sigma(self, t: Array) -> Array:
        r, _ = self.ratio_and_slope(t)
        return r / jnp.sqrt(1 + r**2)  # (3)

    def d_alpha(self, t: Array) -> Array:
        _, slope = self.ratio_and_slope(t)
        return -(self.alpha(t) ** 2) * self.sigma(t) * slope  # (4)

    def d_sigma(self, t: Array) -> Array:
        _, slope = self.ratio_and_slope(t)
        return self.alpha(t) ** 3 * slope  # (4)


@dataclass(frozen=True, eq=False)
class Discrete(VariancePreserving):
    """Eqs. 5 and 6, from a table of r.

    Attributes:
      name: what the schedule is called in a config.
      ratio: r at t = 0, 1 / T, ..., 1: float64 ``[T + 1]``, rising from 0.
    """

    name: str
    ratio: np.ndarray = field(repr=False)
    first = 1 / T

    def ratio_and_slope(self, t: Array) -> tuple[Array, Array]:
        """r and dr / dt at t; at a point of the table the slope to its right, at t = 1 to its left."""
        position = t * T
        below = jnp.clip(jnp.floor(position), 0, T - 1).astype(jnp.int32)
        start = jnp.asarray(self.ratio, jnp.float32)[below]
        rise = jnp.asarray(np.diff(self.ratio), jnp.float32)[below]
        return start + (position - below) * rise, T * rise

    def time_of(self, log_snr: Array) -> Array:
        points = jnp.linspace(0.0, 1.0, T + 1)
        return jnp.interp(jnp.exp(-log_snr / 2), jnp.asarray(self.ratio, jnp.float32), points)


@dataclass(frozen=True)
class EDM(VariancePreserving):
    """Eq. 10.

    With latents of unit variance, a network that predicts v, weighed alike at all times that are drawn from a normal
    of ln r, is trained exactly as Karras et al. train theirs: its output is -F of their table 1, and x_t is their
    scaled input.
    """

    name = "edm"
    first = 1e-6  # r is r_min there, to float32

    def ratio_and_slope(self, t: Array) -> tuple[Array, Array]:
        """r and dr / dt at t; at t = 0 the slope to its right, as r jumps there."""
        span = math.log(R_MAX / R_MIN)
        r = R_MIN * jnp.exp(span * t)  # (10)
        return jnp.where(t > 0, r, 0.0), span * r

    def time_of(self, log_snr: Array) -> Array:
        t = (-log_snr / 2 - math.log(R_MIN)) / math.log(R_MAX / R_MIN)
        return jnp.clip(t, 0.0, 1.0)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Eq. 11, with the resolution shift of eq. 12.

    Attributes:
      shift: s of eq. 12; 1 leaves the times where they are.
    """

    shift: float
    name = "rectified_flow"
    variance_preserving = False

    def alpha(self, t: Array) -> Array:
        return 1 - t

    def sigma(self, t: Array) -> Array:
        return t

    def d_alpha(self, t: Array) -> Array:
        return -jnp.ones_like(t)

    def d_sigma(self, t: Array) -> Array:
        return jnp.ones_like(t)

    def time_of(self, log_snr: Array) -> Array:
        return jax.nn.sigmoid(-log_snr / 2)

    def shift_times(self, t: Array) -> Array:
        return shift_times(t, self.shift)


def shift_times(t: Array, shift: float) -> Array:
    """The resolution shift of eq. 12: it multiplies sigma / alpha of rectified flow by ``shift``."""
    return shift * t / (1 + (shift - 1) * t)  # (12)


def from_betas(name: str, betas: np.ndarray) -> Discrete:
    """The variance preserving schedule of T noise increments, eqs. 5 and 6."""
    alpha_bar = np.cumprod(1 - betas)
    ratio = np.sqrt((1 - alpha_bar) / alpha_bar)
    return Discrete(name, np.concatenate([[0.0], ratio]))


def linear() -> Discrete:
    """The schedule of DDPM, eq. 7."""
    return from_betas("linear", np.linspace(1e-4, 0.02, T))


def scaled_linear() -> Discrete:
    """The schedule of latent diffusion, eq. 8."""
    return from_betas("scaled_linear", np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2)


def cosine() -> Discrete:
    """The schedule of Improved DDPM, eq. 9."""
    f = np.cos(np.pi / 2 * (np.linspace(0, 1, T + 1) + 0.008) / 1.008) ** 2
    return from_betas("cosine", np.minimum(0.999, 1 - f[1:] / f[:-1]))


def rectified_flow(shift: float) -> RectifiedFlow:
    """The straight line of eq. 11, times moved by eq. 12. ValueError unless shift is above 0."""
    if not shift > 0:
        raise ValueError(f"the shift of rectified_flow must be above 0, not {shift}; 1 leaves times alone")
    return RectifiedFlow(shift)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "edm": EDM,
    "rectified_flow": rectified_flow,
}


def make_schedule(name: str, shift: float) -> Schedule:
    """The schedule called name.

    Args:
      name: a key of ``SCHEDULES``.
      shift: resolution shift, eq. 12. Only rectified_flow has one; the others take 1.

    Raises:
      ValueError: name is unknown, or shift is not 1 where there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if name == "rectified_flow":
        return rectified_flow(shift)
    if shift != 1:
        raise ValueError(f"schedule {name!r} has no shift, but shift={shift}; set 1 or use rectified_flow")
    return SCHEDULES[name]()
