"""The diffusion process: noising a latent, and reading a network's output in every parameterisation.

A network that sees x_t may be asked for any of four targets, each a mix of the picture and the noise:

    x0                                                                                 (1)
    epsilon                                                                            (2)
    v = alpha epsilon - sigma x0                (Salimans and Ho 2022)                 (3)
    flow = dx_t / dt = alpha' x0 + sigma' epsilon   (Lipman et al. 2022)               (4)

Together with x_t = alpha x0 + sigma epsilon, each makes two linear equations in x0 and epsilon. Solved:

    from x0         epsilon = (x_t - alpha x0) / sigma                                 (5)
    from epsilon    x0 = (x_t - sigma epsilon) / alpha                                 (6)
    from v          x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2),
                    epsilon = (sigma x_t + alpha v) / (alpha^2 + sigma^2)              (7)
    from flow       x0 = (sigma' x_t - sigma flow) / (alpha sigma' - sigma alpha'),
                    epsilon = (alpha flow - alpha' x_t) / (alpha sigma' - sigma alpha')  (8)

The denominators of (7) and (8) never vanish: v and flow determine x0 and epsilon at every t, pure noise and
pure picture included. (5) has no answer at sigma = 0 and (6) none at alpha = 0: there x_t says nothing about
the other. All of it is float32, whatever the network computes in.

A network may also say how sure it is (Nichol and Dhariwal 2021). C more channels then tell where between its bounds the
log-variance of a reverse step lies, 0 the smaller and 1 the larger one; the bounds are eq. 8 of
`dit_jax.diffusion.samplers`, as only a sampler knows where its step ends:

    variance = (channels + 1) / 2                                                      (9)

This is the only place with algebra between parameterisations; objectives, guidance and samplers use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.arrays import Array
from dit_jax.diffusion.schedules import Schedule


class Targets(NamedTuple):
    """Four views of one prediction (or of the truth), each float32 ``[B, h, w, C]``.

    Attributes:
      x0: the clean latent.
      epsilon: the noise.
      v: eq. 3.
      flow: eq. 4.
      variance: eq. 9; None where the network does not say.
    """

    x0: Array
    epsilon: Array
    v: Array
    flow: Array
    variance: Array | None = None


Denoise = Callable[[Array, Array], Targets]  # (x_t [B, h, w, C], t [B]) -> Targets


class Coefficients(NamedTuple):
    """The schedule at the times of a batch, each ``[B, 1, 1, 1]``: d_ is the derivative by t."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array


def _from_x0(c: Coefficients, x_t: Array, x0: Array) -> tuple[Array, Array]:
    return x0, (x_t - c.alpha * x0) / c.sigma  # (5)


def _from_epsilon(c: Coefficients, x_t: Array, epsilon: Array) -> tuple[Array, Array]:
    return (x_t - c.sigma * epsilon) / c.alpha, epsilon  # (6)


def _from_v(c: Coefficients, x_t: Array, v: Array) -> tuple[Array, Array]:
    norm = c.alpha**2 + c.sigma**2
    return (c.alpha * x_t - c.sigma * v) / norm, (c.sigma * x_t + c.alpha * v) / norm  # (7)


def _from_flow(c: Coefficients, x_t: Array, flow: Array) -> tuple[Array, Array]:
    norm = c.alpha * c.d_sigma - c.sigma * c.d_alpha
    return (c.d_sigma * x_t - c.sigma * flow) / norm, (c.alpha * flow - c.d_alpha * x_t) / norm  # (8)


# The conversion table: prediction -> (x0, epsilon).
CONVERSIONS = {
    "x0": _from_x0,
    "epsilon": _from_epsilon,
    "v": _from_v,
    "flow": _from_flow,
}


def normal_per_sample(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise ``[B, *shape]`` from keys ``[B]``; that of sample i depends on keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@dataclass(frozen=True)
class Process:
    """A schedule, and what the network is asked to predict.

    Attributes:
      schedule: alpha and sigma over t.
      prediction: ``x0``, ``epsilon``, ``v`` or ``flow``; anything else is a ValueError.
    """

    schedule: Schedule
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in CONVERSIONS:
            valid = ", ".join(CONVERSIONS)
            raise ValueError(f"unknown prediction {self.prediction!r}; choose one of {valid}")

    def corrupt(self, keys: Array, x0: Array, t: Array) -> tuple[Array, Targets]:
        """Noises clean latents.

        Args:
          keys: one random key per sample, ``[B]``.
          x0: clean latents ``[B, h, w, C]``.
          t: times ``[B]`` in [0, 1].

        Returns:
          x_t, float32 ``[B, h, w, C]``, and the targets that made it.
        """
        c = self._coefficients(t, x0.ndim)
        x0 = x0.astype(jnp.float32)
        epsilon = normal_per_sample(keys, x0.shape[1:])
        return c.alpha * x0 + c.sigma * epsilon, _targets(c, x0, epsilon)

    def split(self, prediction: Array, channels: int) -> tuple[Array, Array | None]:
        """Takes the variance channels off a network's output, and reads them.

        Args:
          prediction: ``[B, h, w, C]``, or ``[B, h, w, 2 C]`` from a network that learns its variance.
          channels: C.

        Returns:
          The prediction proper, ``[B, h, w, C]``, and eq. 9 in float32, ``[B, h, w, C]`` or None.

        Raises:
          ValueError: the network's output has neither C nor 2 C channels.
        """
        if prediction.shape[-1] == channels:
            return prediction, None
        if prediction.shape[-1] == 2 * channels:
            return prediction[..., :channels], (prediction[..., channels:].astype(jnp.float32) + 1) / 2  # (9)
        raise ValueError(
            f"the network returned {prediction.shape[-1]} channels for latents of {channels}; "
            f"it must return {channels}, or {2 * channels} with a learned variance"
        )

    def slope(self, t: Array) -> Array:
        """How much the network's own target changes with x0 at a given x_t, without its sign: ``[B]`` -> ``[B]``.

        Eqs. 5 to 8, solved for the target; infinite at sigma = 0 but for x0.
        """
        c = self._coefficients(t, 1)
        slopes = {
            "x0": jnp.ones_like(c.alpha),
            "epsilon": c.alpha / c.sigma,
            "v": (c.alpha**2 + c.sigma**2) / c.sigma,
            "flow": (c.alpha * c.d_sigma - c.sigma * c.d_alpha) / c.sigma,
        }
        return slopes[self.prediction]

    def convert(self, prediction: Array, x_t: Array, t: Array) -> Targets:
        """Reads a prediction ``[B, h, w, C]``, made at x_t and t ``[B]``, as every target. Eqs. 5 to 8."""
        return self._complete(self.prediction, prediction, x_t, t)

    def from_x0(self, x0: Array, x_t: Array, t: Array) -> Targets:
        """The targets of another x0 at the same x_t and t, as guidance needs them. Eq. 5."""
        return self._complete("x0", x0, x_t, t)

    def _complete(self, known: str, value: Array, x_t: Array, t: Array) -> Targets:
        c = self._coefficients(t, x_t.ndim)
        value = value.astype(jnp.float32)
        x0, epsilon = CONVERSIONS[known](c, x_t.astype(jnp.float32), value)
        return _targets(c, x0, epsilon)._replace(**{known: value})

    def _coefficients(self, t: Array, ndim: int) -> Coefficients:
        t = t.astype(jnp.float32).reshape(t.shape + (1,) * (ndim - t.ndim))  # [B, 1, 1, 1]
        s = self.schedule
        return Coefficients(s.alpha(t), s.sigma(t), s.d_alpha(t), s.d_sigma(t))


def _targets(c: Coefficients, x0: Array, epsilon: Array) -> Targets:
    v = c.alpha * epsilon - c.sigma * x0  # (3)
    flow = c.d_alpha * x0 + c.d_sigma * epsilon  # (4)
    return Targets(x0, epsilon, v, flow)
