"""Noise schedules: how much of the picture and how much noise is in x_t.

Every schedule mixes a clean latent x0 with standard normal noise eps,

    x_t = alpha(t) x0 + sigma(t) eps,    t in [0, 1],  t = 0 is clean                  (1)
    log_snr(t) = 2 ln(alpha / sigma),    falling in t                                  (2)

**Variance preserving** schedules, alpha^2 + sigma^2 = 1, are given by T = 1000 noise increments beta_k:

    alpha_bar_k = (1 - beta_0) (1 - beta_1) ... (1 - beta_k)                           (3)
    r_k = sigma / alpha = sqrt((1 - alpha_bar_k) / alpha_bar_k)                        (4)

Point k sits at t = (k + 1) / T, and r = 0 at t = 0. Between points r is linear in t, so that a model of
T discrete steps can be sampled on any grid. From r follow, with r' = dr / dt,

    alpha = 1 / sqrt(1 + r^2),    sigma = r / sqrt(1 + r^2)                            (5)
    dalpha / dt = -alpha^2 sigma r',    dsigma / dt = alpha^3 r'                       (6)

The betas:

    linear           beta_k from 1e-4 to 0.02 in equal steps (Ho et al. 2020)          (7)
    scaled_linear    sqrt(beta_k) in equal steps, beta_k from 0.00085 to 0.012
                     (Rombach et al. 2022)                                             (8)
    cosine           beta_k = min(0.999, 1 - f((k + 1) / T) / f(k / T)),
                     f(u) = cos^2(pi / 2 (u + 0.008) / 1.008)
                     (Nichol and Dhariwal 2021, eq. 17)                                (9)

**Rectified flow** (Liu et al. 2022; Lipman et al. 2022) is the straight line from the picture to the noise:

    alpha = 1 - t,    sigma = t                                                        (10)

Large pictures need more noise to hide the same content. The resolution shift s moves the times of training
and of sampling, not the line (Esser et al. 2024, eq. 23):

    t' = s t / (1 + (s - 1) t)                                                         (11)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import Array

T = 1000  # discrete steps of the variance preserving schedules


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

    def shift_times(self, t: Array) -> Array:
        """Moves times drawn or spaced evenly in [0, 1] to where this schedule wants them."""
        return t

    def grid(self, steps: int) -> np.ndarray:
        """Times of a sampling run: float32 ``[steps + 1]`` from 1 to 0, evenly spaced before the shift."""
        return np.asarray(self.shift_times(np.linspace(1.0, 0.0, steps + 1)), np.float32)


@dataclass(frozen=True, eq=False)
class VariancePreserving(Schedule):
    """Eqs. 3 to 6, from a table of r.

    Attributes:
      name: what the schedule is called in a config.
      ratio: r at t = 0, 1 / T, ..., 1: float64 ``[T + 1]``, rising from 0.
    """

    name: str
    ratio: np.ndarray = field(repr=False)
    variance_preserving = True

    def _ratio_and_slope(self, t: Array) -> tuple[Array, Array]:
        """r and dr / dt at t; at a point of the table the slope to its right, at t = 1 to its left."""
        position = t * T
        below = jnp.clip(jnp.floor(position), 0, T - 1).astype(jnp.int32)
        start = jnp.asarray(self.ratio, jnp.float32)[below]
        rise = jnp.asarray(np.diff(self.ratio), jnp.float32)[below]
        return start + (position - below) * rise, T * rise

    def alpha(self, t: Array) -> Array:
        r, _ = self._ratio_and_slope(t)
        return 1 / jnp.sqrt(1 + r**2)  # (5)

    def sigma(self, t: Array) -> Array:
        r, _ = self._ratio_and_slope(t)
        return r / jnp.sqrt(1 + r**2)  # (5)

    def d_alpha(self, t: Array) -> Array:
        _, slope = self._ratio_and_slope(t)
        return -(self.alpha(t) ** 2) * self.sigma(t) * slope  # (6)

    def d_sigma(self, t: Array) -> Array:
        _, slope = self._ratio_and_slope(t)
        return self.alpha(t) ** 3 * slope  # (6)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Eq. 10, with the resolution shift of eq. 11.

    Attributes:
      shift: s of eq. 11; 1 leaves the times where they are.
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

    def shift_times(self, t: Array) -> Array:
        return self.shift * t / (1 + (self.shift - 1) * t)  # (11)


def from_betas(name: str, betas: np.ndarray) -> VariancePreserving:
    """The variance preserving schedule of T noise increments, eqs. 3 and 4."""
    alpha_bar = np.cumprod(1 - betas)
    ratio = np.sqrt((1 - alpha_bar) / alpha_bar)
    return VariancePreserving(name, np.concatenate([[0.0], ratio]))


def linear() -> VariancePreserving:
    """The schedule of DDPM, eq. 7."""
    return from_betas("linear", np.linspace(1e-4, 0.02, T))


def scaled_linear() -> VariancePreserving:
    """The schedule of latent diffusion, eq. 8."""
    return from_betas("scaled_linear", np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2)


def cosine() -> VariancePreserving:
    """The schedule of Improved DDPM, eq. 9."""
    f = np.cos(np.pi / 2 * (np.linspace(0, 1, T + 1) + 0.008) / 1.008) ** 2
    return from_betas("cosine", np.minimum(0.999, 1 - f[1:] / f[:-1]))


def rectified_flow(shift: float) -> RectifiedFlow:
    """The straight line of eq. 10, times moved by eq. 11. ValueError unless shift is above 0."""
    if not shift > 0:
        raise ValueError(f"the shift of rectified_flow must be above 0, not {shift}; 1 leaves times alone")
    return RectifiedFlow(shift)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "rectified_flow": rectified_flow,
}


def make_schedule(name: str, shift: float) -> Schedule:
    """The schedule called name.

    Args:
      name: a key of ``SCHEDULES``.
      shift: resolution shift, eq. 11. Only rectified_flow has one; the others take 1.

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
