"""What flows through the house: the letters of array axes, the text states, the keys of a batch.

Letters, used in names, shape comments and einsum strings all over the package:

    B  batch             N  image tokens      S  text tokens      L  layers
    D  model width       H  heads             K  head dim
    E  text width        P  pooled text width
    C  latent channels   h, w  latent grid    (pictures spell out height and width)

Arrays are channels-last. Images are ``[B, height, width, 3]``, float32 in [-1, 1] on their way into
and out of the VAE and uint8 in [0, 255] everywhere else; latents are ``[B, h, w, C]``.

A batch is a dict of arrays with fixed keys and shapes:

=============  =========================  ==========================================================
raw batch      made by ``data.loader``    what the frozen encoders read
``image``      uint8 [B, height, width, 3]
``ids``        int32 [B, S]               token ids of the caption, padded
``mask``       bool [B, S]                true from BOS to EOS
``index``      int64 [B]                  which record of the source was used (after any replacement)
encoded batch  made by ``feed``           what the train step reads
``mean`` ``std``   [B, h, w, C]           raw moments of the latents (VAE posterior, unscaled)
``hidden``     bfloat16 [B, S, E]         text states, zero where padded
``pooled``     bfloat16 [B, P]
``mask``       bool [B, S]
=============  =========================  ==========================================================

Moments are float16 or float32, as ``data.storage_dtype`` says. Encoded batches travel as they are stored, and the
train step computes with them in float32. S is the longest caption of a set that is encoded as a whole.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # a jax.Array, or a numpy array with the same shape and dtype


class TextStates(NamedTuple):
    """What a text encoder returns for B captions.

    Attributes:
      hidden: ``[B, S, E]`` one state per token.
      pooled: ``[B, P]`` one state per caption.
      mask: ``[B, S]`` bool, true from BOS to EOS. Padded tokens must never change a result.
    """

    hidden: Array
    pooled: Array
    mask: Array


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """Pictures of uint8 as a VAE takes them: float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_pixels(images: Array) -> np.ndarray:
    """Pictures in [-1, 1], as a VAE gives them back, as uint8."""
    return np.round((np.asarray(images, np.float32) + 1.0) * 127.5).astype(np.uint8)
