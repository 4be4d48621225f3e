"""Positions: those of the grid of training, the same places on every other grid, and what turning leaves alone."""

import jax
import numpy as np
import pytest

from dit_jax.models.positions import places, rotary_angles, rotate, sincos_positions
from tests.models.options import OPTIONS
from tests.toy import Toy


def test_places_are_rows_and_columns_on_the_grid_of_training():
    row, col = places(3, 3, 3)
    np.testing.assert_allclose(row, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_allclose(col, [0, 1, 2, 0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(("rows", "cols"), [(8, 4), (4, 12)])
def test_a_finer_grid_has_the_same_places_in_between(rows, cols):
    """The middle of the patches that lie in a patch of the coarse grid is the middle of that patch."""
    row, col = (a.reshape(4, rows // 4, 4, cols // 4).mean((1, 3)) for a in places(rows, cols, 4))
    coarse_row, coarse_col = (a.reshape(4, 4) for a in places(4, 4, 4))
    np.testing.assert_allclose(row, coarse_row, atol=1e-12)
    np.testing.assert_allclose(col, coarse_col, atol=1e-12)


def test_sincos_is_its_equation_and_tells_all_patches_apart():
    table = sincos_positions(5, 7, 7, 16)
    assert table.shape == (35, 16) and table.dtype == np.float32
    i, j = 3, 6  # the row is stretched: 5 rows lie where training had 7
    row, w = (i + 0.5) * 7 / 5 - 0.5, 10_000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.sin(row * w), np.cos(row * w), np.sin(j * w), np.cos(j * w)])
    np.testing.assert_allclose(table[i * 7 + j], expected, rtol=1e-5, atol=1e-6)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(35)
    assert distances.min() > 0.1


def test_turned_queries_and_keys_know_only_how_far_apart_they_are():
    q, k = jax.random.normal(jax.random.key(0), (2, 12))
    angles = rotary_angles(6, 6, 6, 12, still=0)
    turned = [np.asarray(rotate(np.broadcast_to(v, (1, 1, 36, 12)), angles))[0, 0].reshape(6, 6, 12) for v in (q, k)]
    np.testing.assert_allclose(np.linalg.norm(turned[0], axis=-1), np.linalg.norm(q), rtol=1e-5)
    scores = np.einsum("ijk,mnk->ijmn", *turned)
    for down, right in ((0, 0), (1, 0), (0, 2), (3, -1)):
        same = [scores[i, j, i + down, j + right] for i in range(3) for j in range(1, 4)]
        np.testing.assert_allclose(same, same[0], rtol=1e-4, atol=1e-4)
    apart = {round(float(scores[1, 1, 1 + down, 1 + right]), 4) for down, right in ((0, 0), (1, 0), (0, 1), (2, 3))}
    assert len(apart) == 4


def test_what_stands_before_the_picture_is_not_turned():
    x = jax.random.normal(jax.random.key(1), (1, 1, 6, 12))
    turned = rotate(x, rotary_angles(2, 2, 2, 12, still=2))
    np.testing.assert_array_equal(turned[:, :, :3], x[:, :, :3])  # two, and the patch at (0, 0)
    assert np.abs(turned[:, :, 3:] - x[:, :, 3:]).max(-1).min() > 1e-3


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_a_model_knows_where_patches_stand(name):
    """Two patches that change places do not just do so in the answer; on another grid there is an answer too."""
    toy = Toy(**OPTIONS[name])
    x = np.asarray(toy.x).copy()
    x[:, :2, :2], x[:, 2:, 4:] = toy.x[:, 2:, 4:], toy.x[:, :2, :2]
    swapped, plain = toy.apply(toy.params, x, toy.t, toy.text), toy()
    assert np.abs(swapped[:, :2, :2] - plain[:, 2:, 4:]).max() > 1e-3
    assert toy.apply(toy.params, x[:, :2], toy.t, toy.text).shape == (2, 2, 6, 3)
