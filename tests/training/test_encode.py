"""Encoding once and at every step are the same thing; captions are kept once; the start check sees trouble."""

import jax
import numpy as np
import pytest

from dit_jax.data.bad_records import BadRecords
from dit_jax.data.loader import Samples, batches, scan
from dit_jax.data.shapes_world import ShapesWorld
from dit_jax.encoders import load_text_encoder, load_vae
from dit_jax.encoders.latents import LatentScale
from dit_jax.training import encode

N, B, SEED = 11, 4, 5


@pytest.fixture(scope="module")
def frozen():
    return load_vae("embedded"), load_text_encoder("embedded")


@pytest.fixture(scope="module")
def source():
    return ShapesWorld(seed=1, num_pictures=N, objects=(1, 2), combinations="seen")


@pytest.mark.parametrize("flip", [False, True])
def test_both_ways_give_the_same_batches_also_across_epochs(frozen, source, flip):
    vae, text = frozen
    ok = BadRecords(None, 0.0, N)
    chunks = scan(source, text.tokenize, ok, 4, SEED, 64, 0, 0)
    encoded = encode.encode_once(chunks, vae, text, flip, SEED)
    assert encoded.mean.shape == (N, 1 + flip, 8, 8, 4)
    samples = Samples(source, SEED, 64, random_crop=False, flip=flip)
    every = encode.encode_every_step(batches(samples, text.tokenize, ok, B, 0, 6, 0, 0), vae, text)
    seen = []
    for step, batch in enumerate(every):
        once = encoded.batch(step, B)
        assert once.keys() == batch.keys()
        S = once["mask"].shape[1]  # of the longest caption; what is left out behind it is masked
        assert S == encoded.mask.sum(1).max() < batch["mask"].shape[1] and not batch["mask"][:, S:].any()
        batch = {**batch, "hidden": batch["hidden"][:, :S], "mask": batch["mask"][:, :S]}
        for key, value in once.items():
            assert value.dtype == batch[key].dtype and value.shape == batch[key].shape, key
            np.testing.assert_allclose(value, batch[key], rtol=1e-4, atol=1e-4, err_msg=key)
        seen.append(once["mean"])
    assert len(seen) == 6 and np.concatenate(seen).std(0).max() > 0.1


def test_a_caption_is_kept_once(frozen):
    vae, text = frozen
    captions = ["a red circle", "a blue square", "a red circle", "a red circle"]
    ids, mask = text.tokenize(captions)
    images = np.zeros((4, 64, 64, 3), np.uint8)
    raw = [
        {"image": images[rows], "ids": ids[rows], "mask": mask[rows], "index": np.arange(2)}
        for rows in (slice(0, 2), slice(2, 4))
    ]
    encoded = encode.encode_once(raw, vae, text, flip=False, seed=0)
    assert encoded.caption.tolist() == [0, 1, 0, 0] and len(encoded.hidden) == 2
    expected = np.asarray(text(["a blue square"]).hidden)[0, : encoded.mask.shape[1]]
    np.testing.assert_allclose(encoded.hidden[1].astype(np.float32), expected, atol=0.05)


def test_the_start_check_is_quiet_when_all_is_well_and_names_what_is_not(frozen, source):
    vae, text = frozen
    [raw] = scan(source, text.tokenize, BadRecords(None, 0.0, N), N, SEED, 64, 0, 0)
    good = encode.check_start(raw, vae, vae, vae.latent_scale)
    assert good.warnings() == [] and good.psnr > 25 and 8 < good.tokens < 25
    off = LatentScale(vae.latent_scale.shift, vae.latent_scale.scale * 30)
    assert "latents.normalize=measured" in encode.check_start(raw, vae, vae, off).warnings()[0]
    noise = {**raw, "image": np.random.default_rng(0).integers(0, 255, raw["image"].shape).astype(np.uint8)}
    assert "dB: is it made for such pictures?" in encode.check_start(noise, vae, vae, vae.latent_scale).warnings()[0]
    stranger = load_vae("embedded")
    stranger.params = jax.tree.map(lambda leaf: -leaf, stranger.params)
    found = encode.check_start(raw, vae, stranger, vae.latent_scale)
    assert found.psnr == good.psnr and "is it made for latents of this VAE?" in found.warnings()[0]
