"""Tiles cover what they are cut from, their weights sum to one, and what does not look far does not see them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.encoders import VAE, frozen, load_vae, tiles

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(8, 16, 4), (16, 16, 4), (17, 16, 4), (28, 16, 4), (29, 16, 4), (100, 16, 4), (41, 8, 3), (9, 8, 0)]


@pytest.mark.parametrize("length, tile, overlap", SIZES)
def test_tiles_cover_and_overlap(length: int, tile: int, overlap: int):
    begins = tiles.starts(length, tile, overlap)
    assert begins[0] == 0 and begins[-1] == max(length - tile, 0)
    assert all(1 <= step <= tile - overlap for step in np.diff(begins))
    enough = (len(begins) - 1) * (tile - overlap) + overlap  # what one tile less can cover
    assert len(begins) == 1 or enough < length


@pytest.mark.parametrize("length, tile, overlap", SIZES)
def test_weights_sum_to_one_inside_of_the_tiles(length: int, tile: int, overlap: int):
    tile = min(tile, length)
    begins = tiles.starts(length, tile, overlap)
    found = tiles.weights(begins, tile, length)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)
    assert found.min() >= 0
    for begin, row in zip(begins, found, strict=True):
        assert not row[:begin].any() and not row[begin + tile :].any()
    assert np.abs(np.diff(found, axis=1)).max(initial=0) <= 1 / max(overlap, 1) + 1e-6  # no jump


@pytest.mark.parametrize("in_scale, out_scale", [(1, 4), (4, 1)])
def test_a_function_of_single_places_does_not_see_the_tiles(in_scale: int, out_scale: int):
    array = np.random.default_rng(0).normal(size=(2, 21 * in_scale, 30 * in_scale, 3)).astype(np.float32)
    seen = []

    def run(part):
        seen.append(part.shape)
        part = part.repeat(out_scale, axis=1).repeat(out_scale, axis=2)[:, ::in_scale, ::in_scale]
        return 2 * part + 1, part**2

    found = tiles.blend(run, array, 8, 2, in_scale, out_scale)
    assert set(seen) == {(2, 8 * in_scale, 8 * in_scale, 3)}
    for blended, whole in zip(found, run(array), strict=True):
        np.testing.assert_allclose(blended, whole, atol=1e-5)


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(frozen, "TILE", 64)
    monkeypatch.setattr(frozen, "TILE_OVERLAP", 16)


@pytest.fixture(scope="module")
def tiny() -> VAE:
    """A VAE without norms and attention: an output sees near-by places only."""
    return load_vae(GOLDEN / "vae_tiny")


def test_away_from_seams_a_local_network_gives_the_same(tiny: VAE, monkeypatch):
    """A pixel of this network sees 59 px to each side; 64 px of overlap keep tile edges out of sight elsewhere."""
    latents = np.random.default_rng(0).normal(size=(2, 16, 80, 4)).astype(np.float32) / 0.18215  # 64 x 320 px
    whole = np.asarray(tiny.decode(latents))
    monkeypatch.setattr(frozen, "TILE", 192)
    monkeypatch.setattr(frozen, "TILE_OVERLAP", 64)
    tiled = np.asarray(tiny.decode(latents))
    # Tiles begin at 0 and 128 px and overlap from 128 to 192 px.
    for place in (np.s_[:, :, :128], np.s_[:, :, 192:]):
        np.testing.assert_allclose(tiled[place], whole[place], atol=1e-3)
    assert np.abs(tiled - whole).max() > 1e-2
    assert tiled.shape == whole.shape == (2, 64, 320, 3)


def test_moments_are_blended_too(monkeypatch, small_tiles):
    vae = load_vae("embedded")
    images = np.random.default_rng(0).uniform(-1, 1, (1, 96, 64, 3)).astype(np.float32)
    tiled = vae.encode(images)
    monkeypatch.setattr(frozen, "TILE", 1024)
    whole = vae.encode(images)
    for found, expected in zip(tiled, whole, strict=True):
        assert found.shape == expected.shape == (1, 12, 8, 4)
        assert 1e-4 < np.abs(np.asarray(found - expected)).mean() < 0.3 * np.abs(np.asarray(expected)).mean()


def test_up_to_the_size_of_a_tile_nothing_changes(tiny: VAE, monkeypatch):
    latents = jnp.ones((1, 16, 16, 4))
    before = tiny.decode(latents)
    monkeypatch.setattr(tiles, "blend", None)
    monkeypatch.setattr(frozen, "TILE", 64)
    np.testing.assert_array_equal(tiny.decode(latents), before)
    tiny.encode(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(TypeError):
        tiny.decode(jnp.ones((1, 16, 17, 4)))


def test_no_hidden_transfers(tiny: VAE, small_tiles):
    with jax.transfer_guard("disallow"):
        tiny.decode(tiny.encode(np.zeros((1, 64, 96, 3), np.float32))[0])
