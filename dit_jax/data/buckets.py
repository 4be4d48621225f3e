"""Aspect-ratio buckets: a bounded list of shapes, and which of them each picture is cut to.

A square loses a third of a 3:2 photo. Here every picture is cut to the shape that is nearest to its own,

    bucket = argmin_b |log(width / height) - log(width_b / height_b)|                                     (1)

and all shapes have about as many pixels, so that a step costs the same in every one of them.
"""

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from dit_jax.data.ahead import in_threads
from dit_jax.data.sources.records import BadRecord, Source

WIDEST = 2.0  # largest ratio of two sides

BLOCK = 64  # records that a thread looks at in one go


def shapes(image_size: int, unit: int, limit: int) -> tuple[tuple[int, int], ...]:
    """The shapes ``(height, width)`` of the buckets, from the tallest to the widest.

    Sides are multiples of ``unit`` and areas as near to ``image_size ** 2`` as that allows. With a shape its transpose
    is there too, and the square always. Where there are more than the limit, those are taken whose aspect ratios are
    most evenly spread, so the number is odd and may be less than the limit.

    Args:
      image_size: side of the square, in pixels; a multiple of ``unit``.
      unit: what sides are multiples of.
      limit: the largest number of shapes, 1 or more.
    """
    wide = []
    for height in range(image_size - unit, 0, -unit):
        width = round(image_size**2 / height / unit) * unit
        if width > image_size and width <= WIDEST * height:
            wide.append((height, width))
    pairs = (limit - 1) // 2
    if len(wide) > pairs:
        ratios = np.log([width / height for height, width in wide])
        even = [np.argmin(np.abs(ratios - ratios[-1] * i / pairs)) for i in range(1, pairs + 1)]
        wide = [wide[i] for i in sorted(set(even))]
    tall = [(width, height) for height, width in reversed(wide)]
    return (*tall, (image_size, image_size), *wide)


def assign(sizes: np.ndarray, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of every picture, by equation (1): a function of its own size alone.

    Args:
      sizes: integers ``[n, 2]``, height and width; (0, 0) of records that cannot be read counts as a square.
      shapes: as `shapes` gives them.

    Returns:
      uint8 ``[n]``, numbers of shapes.
    """
    ratios = np.log(np.maximum(sizes[:, 1], 1) / np.maximum(sizes[:, 0], 1))
    centres = np.array([math.log(width / height) for height, width in shapes])  # ascending
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, ratios).astype(np.uint8)


def sizes_of(source: Source, threads: int, patience: float) -> np.ndarray:
    """Height and width of every picture, int32 ``[n, 2]``; (0, 0) where a record is bad.

    Args:
      source: the records.
      threads: that read; 0 reads here.
      patience: seconds to wait for a few of them, 0 for ever.

    Raises:
      DataError: nothing came.
    """

    def look(block: int) -> np.ndarray:
        found = np.zeros((min(BLOCK, len(source) - block * BLOCK), 2), np.int32)
        for row in range(len(found)):
            with contextlib.suppress(BadRecord):
                found[row] = source.size(block * BLOCK + row)
        return found

    blocks = in_threads(
        look, range(-(-len(source) // BLOCK)), threads, 2 * threads, patience, f"reading sizes of {source.name}"
    )
    return np.concatenate([np.zeros((0, 2), np.int32), *blocks])
