"""Does a picture drawn for a training caption look like that caption's own picture?

For every drawn picture the nearest training picture is found, by squared distance of pixels after both are averaged
down to 32 px; it is a hit when that picture has the caption that was drawn among its own. On a set that a model has
learnt by heart the share of hits is near 1, for a model that ignores its text near 1 / (number of captions).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 32


def small_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 ``[height, width, 3]`` -> float32 ``[SIDE * SIDE * 3]`` in [0, 1]."""
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255.0


def nearest_index(drawn: np.ndarray, training: np.ndarray) -> np.ndarray:
    """For every row of ``drawn [n, F]`` the index of the nearest row of ``training [m, F]``: int64 ``[n]``."""
    distance = np.square(training).sum(1)[None] - 2.0 * drawn @ training.T  # less |drawn|^2, the same for a row
    return distance.argmin(1)


def hits(
    drawn: Sequence[np.ndarray], prompts: Sequence[str], training: np.ndarray, captions: Sequence[Sequence[str]]
) -> np.ndarray:
    """Whether the nearest training picture of every drawn one has its prompt as caption.

    Args:
      drawn: uint8 pictures, one per prompt.
      prompts: the captions that they were drawn for.
      training: `small_pixels` of the training pictures, ``[m, F]``.
      captions: all captions of each of them.

    Returns:
      bool ``[len(prompts)]``.
    """
    nearest = nearest_index(np.stack([small_pixels(image) for image in drawn]), training)
    return np.array([prompt in captions[i] for i, prompt in zip(nearest, prompts, strict=True)])
