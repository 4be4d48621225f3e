"""From a network and a text to ``denoise(x_t, t) -> Targets``, the only thing a sampler calls.

Classifier-free guidance (Ho and Salimans 2022) asks the network twice, with the text and without it (or with
a negative text, which the picture should move away from), and goes on from the second answer past the first.
With c and u the two estimates of x0 and g the guidance scale,

    guided = u + g (c - u) = c + (g - 1) (c - u)                                       (1)

in every latent channel. At a given x_t every target is an affine function of x0: guiding x0 guides them all. A learned
variance is that of the conditional answer.
Both questions travel in one batch of 2 B, the conditional half first.

Large g burns colours out. Two remedies go together, norms and deviations being those of a whole sample:

*Adaptive projected guidance* (Sadat et al. 2024, eqs. 5 to 7, without its momentum, which needs a memory). The step
d = c - u is no longer than r, and its part along c, which is what saturates, counts eta times:

    d <- d min(1, r / |d|),    d = d_par + d_orth,    guided = c + (g - 1) (d_orth + eta d_par)      (2)

*Rescale* (Lin et al. 2023, eqs. 15 and 16) gives back some of the deviation of c:

    guided <- phi guided std(c) / std(guided) + (1 - phi) guided                       (3)

*An interval* (Kynkaanniemi et al. 2024): early and late steps gain nothing from guidance. `segments` leaves it out
there, and with it the second half of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Denoise, Process, Targets

Predict = Callable[[Array, Array, Any], Array]  # (x_t [B, h, w, C], t [B], text) -> [B, h, w, C or 2 C]


def conditional(predict: Predict, process: Process, text: Any) -> Denoise:
    """The network's answer as it is.

    Args:
      predict: the network.
      process: what its output means.
      text: any pytree whose leaves begin with B.
    """

    def denoise(x_t: Array, t: Array) -> Targets:
        prediction, variance = process.split(predict(x_t, t, text), x_t.shape[-1])
        return process.convert(prediction, x_t, t)._replace(variance=variance)

    return denoise


class Correction(NamedTuple):
    """What tames a large scale; `NO_CORRECTION` is eq. 1 as it stands.

    Attributes:
      rescale: phi of eq. 3, from 0 (off) to 1.
      parallel: eta of eq. 2; 1 is off, 0 leaves the part along c out.
      norm: r of eq. 2, over a whole sample; 0 is off.
    """

    rescale: float
    parallel: float
    norm: float


NO_CORRECTION = Correction(rescale=0.0, parallel=1.0, norm=0.0)


def guide(c: Array, u: Array, guidance_scale: float | Array, correction: Correction) -> Array:
    """Eqs. 1 to 3 on x0: ``c`` and ``u`` ``[B, h, w, C]`` -> guided ``[B, h, w, C]``."""
    axes = tuple(range(1, c.ndim))
    step = c - u
    if correction.norm > 0:
        length = jnp.sqrt(jnp.sum(step**2, axes, keepdims=True))
        step = step * jnp.minimum(1.0, correction.norm / jnp.maximum(length, 1e-12))
    if correction.parallel != 1:
        along = jnp.sum(step * c, axes, keepdims=True) / jnp.maximum(jnp.sum(c**2, axes, keepdims=True), 1e-12) * c
        step = step + (correction.parallel - 1) * along  # (2)
    guided = c + (guidance_scale - 1) * step  # (1)
    if correction.rescale > 0:
        ratio = jnp.std(c, axes, keepdims=True) / jnp.maximum(jnp.std(guided, axes, keepdims=True), 1e-12)
        guided = guided * (1 + correction.rescale * (ratio - 1))  # (3)
    return guided


def segments(
    grid: np.ndarray, interval: tuple[float, float], guided: Denoise, plain: Denoise
) -> list[tuple[int, int, Denoise]]:
    """The segments of `dit_jax.diffusion.samplers.run` that guide only inside an interval.

    Args:
      grid: falling times ``[steps + 1]``.
      interval: the lowest and the highest t at which a step that begins there is guided.
      guided, plain: with and without guidance.
    """
    low, high = interval
    inside = [bool(low <= t <= high) for t in grid[:-1].tolist()]
    cuts = [0, *(k for k in range(1, len(inside)) if inside[k] != inside[k - 1]), len(inside)]
    return [(a, b, guided if inside[a] else plain) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def classifier_free(
    predict: Predict,
    process: Process,
    text: Any,
    negative_text: Any,
    guidance_scale: float | Array,
    correction: Correction = NO_CORRECTION,
) -> Denoise:
    """The network's answer, guided by eqs. 1 to 3.

    Args:
      predict: the network.
      process: what its output means.
      text: any pytree whose leaves begin with B.
      negative_text: the like, for u: the null caption, or a negative prompt.
      guidance_scale: g of eq. 1. A Python 1 is the network's answer as it is, without a second pass; a traced
        scalar always makes two, and then another scale needs no new compilation.
      correction: what tames a large scale.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return conditional(predict, process, text)
    both_texts = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), text, negative_text)
    denoise_both = conditional(predict, process, both_texts)

    def denoise(x_t: Array, t: Array) -> Targets:
        both = denoise_both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
        c, u = jnp.split(both.x0, 2)
        variance = None if both.variance is None else jnp.split(both.variance, 2)[0]
        return process.from_x0(guide(c, u, guidance_scale, correction), x_t, t)._replace(variance=variance)

    return denoise
