"""What a pipeline promises of edits, long prompts and seeds, and that it compiles no more than it must."""

import logging
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.data.given import fit_mask
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.errors import ConfigError, DataError

RED, BLUE = "a large red circle", "a small blue square"
LONG = " ".join(["a large red circle above a small blue square"] * 8)  # two pieces and a bit


@pytest.fixture(scope="module")
def pipe(tiny_run) -> Pipeline:
    return Pipeline.load(tiny_run)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Something that no model of 20 steps draws."""
    pixels = np.full((64, 64, 3), (250, 250, 250), np.uint8)
    pixels[16:48, 16:48] = (220, 40, 40)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def right_half() -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    return mask


def arrays(images):
    return np.stack([np.asarray(image, np.int32) for image in images])


def round_trip(pipe, picture):
    pixels = np.asarray(picture, np.float32)[None] / 127.5 - 1
    return np.round((np.asarray(pipe.vae.decode(pipe.vae.encode(pixels)[0])) + 1) * 127.5).astype(np.int32)


@pytest.mark.parametrize(("dtype", "decoded_in"), [("bfloat16", jnp.bfloat16), ("float16", jnp.float32)])
def test_pictures_are_decoded_in_the_type_of_the_model_but_never_in_float16(pipe, dtype, decoded_in, monkeypatch):
    config = pipe.config.copy_and_resolve_references()
    config.dtype = dtype
    types, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents, dtype: types.append(dtype) or decode(latents, dtype))
    found = Pipeline(config, pipe.vae, pipe.text_encoder, pipe.params, pipe.trained).draw([RED], [5], steps=2)
    assert types == [decoded_in]
    error = found.astype(np.float32) - pipe.draw([RED], [5], steps=2)
    assert np.sqrt(np.mean(error**2)) < 3  # levels of 255


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_strength_one_is_the_picture_without_init_image_and_zero_the_round_trip(pipe, picture, sampler):
    settings = {"steps": 4, "seed": 5, "sampler": sampler}
    plain = arrays(pipe([RED, BLUE], **settings))
    np.testing.assert_array_equal(arrays(pipe([RED, BLUE], init_image=picture, strength=1.0, **settings)), plain)
    nothing = arrays(pipe([RED, BLUE], init_image=picture, strength=0.0, **settings))
    assert np.abs(nothing - round_trip(pipe, picture)).max() <= 1  # one level of 255
    distances = [
        np.abs(arrays(pipe([RED], init_image=picture, strength=s, **settings)) - nothing[:1]).mean()
        for s in (0.25, 0.5, 1.0)
    ]
    assert 1 < distances[0] < distances[1] < distances[2]


def test_the_runs_own_strength_is_used_where_none_is_given(pipe, picture):
    told = arrays(pipe([RED], init_image=picture, strength=pipe.config.sample.strength, steps=4))
    np.testing.assert_array_equal(arrays(pipe([RED], init_image=picture, steps=4)), told)
    assert pipe.config.sample.strength not in (0.0, 1.0)


def test_kept_latents_reach_the_vae_as_they_were(pipe, picture, right_half, monkeypatch):
    """Exactly, in every batch, with guidance, in an interval too; the others are drawn."""
    seen = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda x, dtype: seen.append(np.asarray(x)) or decode(x, dtype))
    for settings in ({}, {"sampler": "heun", "guidance_interval": (0.3, 0.8)}, {"strength": 0.5}):
        pipe([RED, BLUE], init_image=picture, mask=right_half, steps=4, guidance_scale=3.0, **settings)
    mean = pipe.vae.encode(np.asarray(picture, np.float32)[None] / 127.5 - 1)[0]
    known = np.asarray(jax.jit(lambda mean: pipe._latents.to_raw(pipe._latents.to_model(mean)))(mean))[0]
    assert len(seen) == 3
    for latents in seen:
        for one in latents:
            np.testing.assert_allclose(one[:, :4], known[:, :4], atol=1e-5)
            assert np.abs(one[:, 4:] - known[:, 4:]).mean() > 0.1
        np.testing.assert_array_equal(latents[0, :, :4], latents[1, :, :4])
        assert np.abs(latents[0, :, 4:] - latents[1, :, 4:]).max() > 0.1


def test_the_thinnest_stroke_of_a_large_mask_is_drawn_anew():
    mask = np.zeros((1024, 1024), bool)
    mask[500:503] = True
    assert fit_mask(mask, 64, 64).any(1).nonzero()[0].tolist() == [31]


def test_a_mask_that_keeps_all_is_told(pipe, picture):
    with pytest.warns(UserWarning, match="the mask is black all over"):
        pipe([RED], init_image=picture, mask=np.zeros((64, 64), bool), steps=2)


def test_a_mask_alone_draws_at_strength_one(pipe, picture, right_half):
    told = arrays(pipe([RED], init_image=picture, mask=right_half, strength=1.0, steps=4))
    np.testing.assert_array_equal(arrays(pipe([RED], init_image=picture, mask=right_half, steps=4)), told)
    milder = arrays(pipe([RED], init_image=picture, mask=right_half, strength=0.5, steps=4))
    assert np.abs(milder - told).max() > 1


def test_a_path_a_picture_and_an_array_are_the_same(pipe, picture, right_half, tmp_path):
    picture.save(tmp_path / "picture.png")
    grey = np.where(right_half, 128, 127).astype(np.uint8)  # the least white, the brightest black
    Image.fromarray(grey).save(tmp_path / "mask.png")
    drawn = [
        arrays(pipe([RED], init_image=image, mask=mask, steps=2))
        for image, mask in (
            (picture, Image.fromarray(grey)),
            (str(tmp_path / "picture.png"), tmp_path / "mask.png"),
            (np.asarray(picture), right_half),
        )
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_a_picture_of_another_size_is_cut_like_one_of_the_training_set(pipe, picture, right_half):
    wide = np.zeros((128, 192, 3), np.uint8)
    wide[:, 32:160] = np.asarray(picture).repeat(2, 0).repeat(2, 1)
    mask = np.zeros((128, 192), bool)
    mask[:, 32:160] = right_half.repeat(2, 0).repeat(2, 1)
    found = arrays(pipe([RED], init_image=wide, mask=mask, steps=2))
    expected = arrays(pipe([RED], init_image=picture, mask=right_half, steps=2))
    assert np.abs(found - expected)[:, :, :28].mean() < 4  # but for what resizing does to edges
    assert pipe([RED], init_image=wide, steps=2, height=32, width=48)[0].size == (48, 32)


def test_what_cannot_be_edited_is_said_in_one_line(pipe, picture, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for error, says, given in (
        (ConfigError, "a mask without a picture", {"mask": picture}),
        (ConfigError, "init_image: a picture is a path, a PIL image or a numpy array, not list", {"init_image": [[0]]}),
        (ConfigError, "strength 0.5 is of a picture to start from", {"strength": 0.5}),
        (ConfigError, "sample.strength is 1.5; it must be in", {"init_image": picture, "strength": 1.5}),
        (ConfigError, "init_image: no picture nowhere.png", {"init_image": "nowhere.png"}),
        (ConfigError, "the mask is 8 x 4 pixels and init_image 64 x 64",
         {"init_image": picture, "mask": np.zeros((4, 8), bool)}),
        (ConfigError, r"init_image: a picture is uint8 .*, not float32 \[4, 4, 3\]",
         {"init_image": np.zeros((4, 4, 3), np.float32)}),
        (DataError, "init_image: .*broken.png: not a picture", {"init_image": tmp_path / "broken.png"}),
        (DataError, "mask: .*broken.png: not a picture", {"init_image": picture, "mask": tmp_path / "broken.png"}),
    ):  # fmt: skip
        with pytest.raises(error, match=says) as caught:
            pipe([RED], **given)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(pipe, picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="init_image: .*picture.png: too many pixels"):
        pipe([RED], init_image=tmp_path / "picture.png")


def test_a_run_is_loaded_in_python_without_a_word(tiny_run):
    """In a process that called no program of ours: nobody has muted what libraries say there."""
    code = "import sys; from dit_jax.sample import Pipeline; Pipeline.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tiny_run)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_seeds_one_by_one(pipe):
    settings = {"steps": 2, "num_images": 2}
    images = pipe([RED, BLUE], seed=[5, 17, 99, 5], **settings)
    assert [image.info["seed"] for image in images] == ["5", "17", "99", "5"]
    alone = arrays([pipe([prompt], seed=s, steps=2)[0] for prompt, s in ((RED, 5), (RED, 17), (BLUE, 99), (BLUE, 5))])
    assert np.abs(arrays(images) - alone).max() <= 1
    with pytest.raises(ConfigError, match="3 seeds for 4 pictures; give one, or as many as pictures"):
        pipe([RED, BLUE], seed=[1, 2, 3], **settings)


@pytest.mark.filterwarnings("default:.*longer than:UserWarning")
def test_a_long_prompt_in_pieces_is_read_to_its_end(pipe):
    settings = {"steps": 2, "guidance_scale": 3.0}
    truncated = arrays(pipe([LONG], **settings))
    np.testing.assert_array_equal(truncated, arrays(pipe([LONG + " green star"], **settings)))
    with pytest.warns(UserWarning, match="1 of 1 captions are longer than 32 tokens: read in pieces, up to 3"):
        chunked = arrays(pipe([LONG], long_prompt="chunk", **settings))
    assert np.abs(chunked - truncated).max() > 1
    changed = arrays(pipe([LONG + " green star"], long_prompt="chunk", **settings))
    assert np.abs(chunked - changed).max() > 1


@pytest.mark.filterwarnings("default:.*longer than:UserWarning")
def test_a_short_prompt_in_pieces_is_what_it_always_was(pipe):
    settings = {"steps": 2, "guidance_scale": 3.0}
    expected = arrays(pipe([RED], **settings))
    np.testing.assert_array_equal(arrays(pipe([RED], long_prompt="chunk", **settings)), expected)
    beside = arrays(pipe([RED, LONG], long_prompt="chunk", **settings))[:1]  # padded: the null caption too
    assert np.abs(beside - expected).max() <= 1
    negative = arrays(pipe([RED], long_prompt="chunk", negative_prompt=LONG, **settings))
    assert np.abs(negative - expected).max() > 1


@pytest.fixture
def compilations(caplog):
    """What JAX compiles, by name."""
    caplog.set_level(logging.WARNING, logger="jax")
    with jax.log_compiles():
        yield lambda: re.findall(r"Finished XLA compilation of (\S+) in", "\n".join(caplog.messages))


def test_another_prompt_seed_scale_strength_picture_or_mask_compiles_nothing(
    tiny_run, picture, right_half, compilations
):
    pipe = Pipeline.load(tiny_run)
    settings = {"steps": 5, "guidance_scale": 2.0}
    edit = {"init_image": picture, "mask": right_half, "strength": 0.6}
    pipe([RED], **settings)
    pipe([RED], **settings, init_image=picture, strength=0.6)
    pipe([RED], **settings, **edit)
    samplers = [name for name in compilations() if "jit(draw)" in name]
    assert len(samplers) == 3, compilations()
    before = len(compilations())
    other = Image.fromarray(255 - np.asarray(picture))
    pipe([BLUE], **settings | {"guidance_scale": 7.0}, seed=9)
    pipe([BLUE], **settings | {"guidance_scale": 7.0}, init_image=other, strength=0.62, seed=9)
    pipe([BLUE], **settings, **edit | {"init_image": other, "mask": ~right_half, "strength": 0.58})
    pipe([BLUE], **settings, init_image=picture, strength=1.0)
    assert compilations()[before:] == []
    pipe([RED, BLUE], **settings)
    pipe([RED, BLUE, RED], **settings)
    assert len([name for name in compilations() if "jit(draw)" in name]) == 4  # 2 and 3 share the batch of 4
