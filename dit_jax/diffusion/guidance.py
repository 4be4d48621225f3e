"""From a network and a text to ``denoise(x_t, t) -> Targets``, the only thing a sampler calls.

Classifier-free guidance (Ho and Salimans 2022) asks the network twice, with the text and without it (or with
a negative text, which the picture should move away from), and goes on from the second answer past the first.
With c and u the two estimates of x0 and g the guidance scale,

    guided = u + g (c - u) = c + (g - 1) (c - u)                                       (1)

in every latent channel. At a given x_t every target is an affine function of x0: guiding x0 guides them all.
Both questions travel in one batch of 2 B, the conditional half first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
        prediction, _ = process.split(predict(x_t, t, text), x_t.shape[-1])
        return process.convert(prediction, x_t, t)

    return denoise


def classifier_free(
    predict: Predict, process: Process, text: Any, negative_text: Any, guidance_scale: float | Array
) -> Denoise:
    """The network's answer, guided by eq. 1.

    Args:
      predict: the network.
      process: what its output means.
      text: any pytree whose leaves begin with B.
      negative_text: the like, for u: the null caption, or a negative prompt.
      guidance_scale: g of eq. 1. A Python 1 is the network's answer as it is, without a second pass; a traced
        scalar always makes two, and then another scale needs no new compilation.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return conditional(predict, process, text)
    both_texts = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), text, negative_text)
    denoise_both = conditional(predict, process, both_texts)

    def denoise(x_t: Array, t: Array) -> Targets:
        both = denoise_both(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]))
        c, u = jnp.split(both.x0, 2)
        return process.from_x0(c + (guidance_scale - 1) * (c - u), x_t, t)  # (1)

    return denoise
