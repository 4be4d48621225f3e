"""Pictures that are too large for one pass of a VAE, piece by piece.

    (1)  out(p) = sum_i w_i(p) out_i(p)
    (2)  w_i = u_i - u_(i+1),     u_i(p) from 0 to 1 over the overlap of tiles i - 1 and i, u_0 = 1, u_n = 0

Tiles i = 0 .. n - 1 of one size cover the array and overlap. The weights are linear where two tiles overlap, one
elsewhere, and sum to one by (2); those of a picture are products over its two sides. What an output sees of
near-by places is the same as without tiles, except in the overlaps, where a tile misses what lies beyond its edge.
What it sees of the whole array, a tile replaces by itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dit_jax.arrays import Array


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover ``length`` and overlap by ``overlap`` or more, evenly spread."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def weights(begins: list[int], tile: int, length: int) -> np.ndarray:
    """The weights (2) along one side.

    Args:
      begins: of every tile.
      tile: the size of each.
      length: of the side.

    Returns:
      float32 ``[n, length]``.
    """
    places = np.arange(length) + 0.5
    overlaps = zip(begins[1:], begins[:-1], strict=True)
    rising = [np.clip((places - begin) / (before + tile - begin), 0, 1) for begin, before in overlaps]
    u = np.stack([np.ones(length), *rising, np.zeros(length)])
    return (u[:-1] - u[1:]).astype(np.float32)


def blend(run: Callable[[Array], Any], array: Array, tile: int, overlap: int, in_scale: int, out_scale: int) -> Any:
    """``run(array)`` from its values on tiles, equation (1); only one tile at a time is on the device.

    Args:
      run: ``[B, y * in_scale, x * in_scale, channels]`` to a tree of ``[B, y * out_scale, x * out_scale, channels]``.
      array: its argument.
      tile: the largest y and x that it is given.
      overlap: of neighbouring tiles, at least; in the same units.
      in_scale: places of the argument per unit.
      out_scale: places of the results per unit.

    Returns:
      A tree of numpy arrays.
    """
    array = jax.device_get(array)
    sizes = [side // in_scale for side in array.shape[1:3]]
    tiles = [min(tile, size) for size in sizes]
    begins = [starts(size, part, overlap) for size, part in zip(sizes, tiles, strict=True)]
    rows, columns = (
        weights([begin * out_scale for begin in some], part * out_scale, size * out_scale)
        for some, part, size in zip(begins, tiles, sizes, strict=True)
    )
    shape = [size * out_scale for size in sizes]
    total: Any = None
    for y, row in zip(begins[0], rows, strict=True):
        for x, column in zip(begins[1], columns, strict=True):
            inside = _window(y, x, tiles, in_scale)
            found = jax.device_get(run(array[inside]))
            if total is None:
                total = jax.tree.map(lambda part: np.zeros((len(part), *shape, part.shape[-1]), part.dtype), found)
            place = _window(y, x, tiles, out_scale)
            weight = (row[place[1]][:, None] * column[place[2]])[None, :, :, None]
            for whole, part in zip(jax.tree.leaves(total), jax.tree.leaves(found), strict=True):
                whole[place] += weight * part
    return total


def _window(y: int, x: int, tiles: list[int], scale: int) -> tuple[slice, slice, slice]:
    """The tile that begins at (y, x), as an index of ``[B, y, x, channels]``."""
    height, width = tiles
    return slice(None), slice(y * scale, (y + height) * scale), slice(x * scale, (x + width) * scale)
