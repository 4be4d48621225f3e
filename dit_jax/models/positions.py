"""Where a patch stands: what is added to tokens, and how queries and keys are turned.

A patch in row i of a grid of n rows stands at

    p = (i + 1/2) G / n - 1/2                                                                             (1)

with G the rows of the grid that was trained on (``base_grid``): i itself there, and on any other grid the same place
of the picture. Columns likewise. With frequencies w_k = 10000^(-k / F), k = 0 .. F - 1:

*Fixed* (``sincos``; Vaswani et al. 2017, in two dimensions as in He et al. 2022), F = D / 4:

    sin(p_row w), cos(p_row w), sin(p_col w), cos(p_col w)                                                (2)

*Rotary* (``rope``; Su et al. 2021, in two dimensions as in Heo et al. 2024), F = K / 4. A head of queries or keys is
K / 2 pairs of numbers; half of them are turned by the angles p_row w, half by p_col w, so that a product of a query
and a key depends on how far apart they are:

    (a, b) -> (a cos - b sin, a sin + b cos)                                                              (3)

*Learned* is a table of the square grid of training (``data.image_size``), resampled (bicubic) on another.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dit_jax.arrays import Array
from dit_jax.models.embeddings import MAX_PERIOD

Angles = tuple[Array, Array]  # cosines and sines, each [N, K / 2]


def places(rows: int, cols: int, base_grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Equation (1) for every patch, row by row: rows ``[N]`` and columns ``[N]``."""
    row, col = ((np.arange(n) + 0.5) * base_grid / n - 0.5 for n in (rows, cols))
    return np.repeat(row, cols), np.tile(col, rows)


def phases(rows: int, cols: int, base_grid: int, F: int) -> tuple[np.ndarray, np.ndarray]:
    """p w of rows and of columns, each ``[N, F]``."""
    w = MAX_PERIOD ** (-np.arange(F) / F)
    row, col = places(rows, cols, base_grid)
    return row[:, None] * w, col[:, None] * w


def sincos_positions(rows: int, cols: int, base_grid: int, width: int) -> np.ndarray:
    """Equation (2): float32 ``[N, width]``; width is a multiple of 4."""
    row, col = phases(rows, cols, base_grid, width // 4)
    return np.concatenate([np.sin(row), np.cos(row), np.sin(col), np.cos(col)], axis=1).astype(np.float32)


def rotary_angles(rows: int, cols: int, base_grid: int, head_dim: int, still: int) -> Angles:
    """The turns of equation (3); ``head_dim`` is a multiple of 4.

    The first ``still`` tokens, before those of the picture, are not turned.
    """
    angles = np.concatenate(phases(rows, cols, base_grid, head_dim // 4), axis=1)
    angles = np.concatenate([np.zeros((still, head_dim // 2)), angles])
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Array, angles: Angles) -> Array:
    """Equation (3) on ``[B, H, N, K]``, in float32; the halves of K hold the a and the b."""
    cos, sin = (part[None, None] for part in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class PositionEmbedder(nn.Module):
    """Learned positions of a grid of patches, float32 ``[N, D]``; resampled (bicubic) where training saw another grid.

    They start as large as the tokens, so that attention can tell patches apart from the first step.
    """

    hidden_size: int

    @nn.compact
    def __call__(self, rows: int, cols: int) -> Array:
        # asked for by hand: `self.param` refuses a table of another grid
        if not self.has_variable("params", "table"):
            self.param("table", nn.initializers.normal(1.0), (rows, cols, self.hidden_size), jnp.float32)
        table = jnp.asarray(self.get_variable("params", "table"))
        if table.shape[:2] != (rows, cols):
            table = jax.image.resize(table, (rows, cols, self.hidden_size), method="bicubic")
        return table.reshape(rows * cols, self.hidden_size)
