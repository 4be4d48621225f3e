"""Patches are cut and put back exactly, their embedding is a convolution, and times and positions embed as written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.embeddings import (
    PatchEmbedder,
    patchify,
    timestep_features,
    unpatchify,
)
from dit_jax.models.positions import PositionEmbedder


@pytest.mark.parametrize(("h", "w", "p"), [(4, 6, 2), (8, 4, 4), (3, 5, 1)])
def test_unpatchify_inverts_patchify_on_rectangles(h, w, p):
    x = jnp.arange(2 * h * w * 3, dtype=jnp.float32).reshape(2, h, w, 3)
    np.testing.assert_array_equal(unpatchify(patchify(x, p), p, h // p, w // p), x)


def test_a_patch_is_a_square_of_neighbours_row_by_row():
    x = jnp.arange(4 * 6, dtype=jnp.float32).reshape(1, 4, 6, 1)
    patches = patchify(x, 2)
    assert patches.shape == (1, 6, 4)
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 8, 9])  # second patch of the first row
    np.testing.assert_array_equal(patches[0, 3], [12, 13, 18, 19])  # first patch of the second row


def test_a_patch_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="patch_size 2 does not divide the latent grid 4 x 5"):
        patchify(jnp.zeros((1, 4, 5, 3)), 2)


def test_patch_embedding_equals_a_convolution_with_the_same_kernel():
    p, C, D = 2, 3, 8
    module = PatchEmbedder(p, D, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, C))
    params = module.init(jax.random.key(1), x)["params"]
    params = {"proj": {**params["proj"], "bias": jnp.arange(D, dtype=jnp.float32)}}
    kernel = params["proj"]["kernel"].reshape(p, p, C, D)  # HWIO
    convolved = jax.lax.conv_general_dilated(x, kernel, (p, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    expected = convolved.reshape(2, 6, D) + params["proj"]["bias"][None, None]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_timestep_features_are_cosines_then_sines_of_scaled_time():
    t = jnp.array([0.0, 0.25])
    features = timestep_features(t, 1000.0)
    assert features.shape == (2, 256)
    np.testing.assert_allclose(features[0], [1.0] * 128 + [0.0] * 128)
    frequency = 10000 ** (-3 / 128)
    np.testing.assert_allclose(features[1, 3], np.cos(250 * frequency), atol=1e-4)
    np.testing.assert_allclose(features[1, 128 + 3], np.sin(250 * frequency), atol=1e-4)


def test_positions_are_exact_on_their_own_grid_and_resampled_on_another():
    module = PositionEmbedder(4)
    params = module.init(jax.random.key(0), 3, 2)
    table = params["params"]["table"]
    assert table.shape == (3, 2, 4)
    np.testing.assert_array_equal(module.apply(params, 3, 2), table.reshape(6, 4))
    up, across = jnp.meshgrid(jnp.arange(8.0), jnp.arange(6.0), indexing="ij")
    ramps = {"params": {"table": jnp.stack([up, across, 3 + 0 * up, up - across], -1)}}
    resampled = module.apply(ramps, 16, 12).reshape(16, 12, 4)
    rows, columns = (np.arange(n) / 2 - 0.25 for n in (16, 12))  # where the middles of patches half as large are
    inside = np.s_[4:-4, 4:-4]  # away from the edges a cubic keeps what is straight
    np.testing.assert_allclose(resampled[..., 0][inside], np.broadcast_to(rows[:, None], (16, 12))[inside], atol=1e-5)
    np.testing.assert_allclose(resampled[..., 1][inside], np.broadcast_to(columns, (16, 12))[inside], atol=1e-5)
    np.testing.assert_allclose(resampled[..., 2], 3.0, atol=1e-5)
