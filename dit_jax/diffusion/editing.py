"""Editing: a sampler that starts from a picture, or keeps a part of it. The network is the same.

*img2img* (SDEdit, Meng et al. 2022, algorithm 1). A grid of n steps is entered at step m, from the known picture with
as much noise as belongs there. The noise is the prior draw that would start the whole run:

    m = n - round(n strength)                                                          (1)
    x = alpha(t_m) x0_known + sigma(t_m) epsilon,    m > 0                             (2)
    x = epsilon,                                     m = 0                             (3)

Strength 1 is (3), a run that knows nothing of the picture; strength 0 is (2) at t_n = 0, the picture itself. Steps keep
their numbers m .. n - 1, and so the fresh noise that each of them draws.

*Inpainting*. Wherever k, 1 or 0 per latent, keeps the picture, the estimate of x0 is the truth (Song et al. 2021,
appendix I.2, and Lugmayr et al. 2022, eq. 8, replace x_t instead, by a fresh noising of the picture):

    x0 <- k x0_known + (1 - k) x0                                                      (4)

No doubt is left there, and so a learned variance is its lower bound. All other targets follow from x0 at the same x_t,
so that every sampler walks towards the known latents there, and the network sees them beside those that it draws. At
the end the known latents are pasted: they are kept bit for bit.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Denoise, Process, Targets

Segment = tuple[int, int, Denoise]


def first_step(steps: int, strength: float) -> int:
    """m of eq. 1, halves rounded up to more steps: 0 at strength 1, ``steps`` at strength 0."""
    return steps - int(steps * strength + 0.5)


def start(process: Process, known: Array, prior: Array, grid: np.ndarray, first: int) -> Array:
    """x at ``grid[first]``, float32 ``[B, h, w, C]``.

    Args:
      process: of the network.
      known: latents of the picture ``[B, h, w, C]``.
      prior: the prior draws of these images, likewise.
      grid: falling times ``[steps + 1]``.
      first: m.
    """
    if first == 0:
        return prior  # (3)
    t = jnp.float32(grid[first])
    return process.schedule.alpha(t) * known + process.schedule.sigma(t) * prior  # (2)


def from_step(segments: Sequence[Segment], first: int) -> list[Segment]:
    """What is left of the segments of a whole run (see `dit_jax.diffusion.samplers.run`) from step ``first`` on."""
    return [(max(begin, first), end, denoise) for begin, end, denoise in segments if end > first]


def keep_known(denoise: Denoise, process: Process, known: Array, keep: Array) -> Denoise:
    """Eq. 4 after a denoise, which may be guided.

    Args:
      denoise: what estimates x0.
      process: of the network.
      known: latents of the picture ``[B, h, w, C]``.
      keep: bool ``[B, h, w, 1]``, true where it is kept.
    """

    def inpaint(x_t: Array, t: Array) -> Targets:
        targets = denoise(x_t, t)
        x0 = paste(targets.x0, known, keep)
        variance = None if targets.variance is None else jnp.where(keep, 0.0, targets.variance)
        return process.from_x0(x0, x_t, t)._replace(variance=variance)

    return inpaint


def paste(x: Array, known: Array, keep: Array) -> Array:
    """Eq. 4: ``known`` where ``keep``, else ``x``; shapes as of `keep_known`."""
    return jnp.where(keep, known, x)  # (4)


def kept_latents(redraw: np.ndarray, factor: int) -> np.ndarray:
    """Which latents are kept: those none of whose pixels is to be drawn anew.

    Args:
      redraw: bool ``[height, width]``.
      factor: f, pixels per latent along a side, which divides both sides.

    Returns:
      bool ``[h, w]``.
    """
    height, width = redraw.shape
    return ~np.any(redraw.reshape(height // factor, factor, width // factor, factor), (1, 3))
