"""Loading by name, batches of any size in few programs, and one clear line for what cannot be loaded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.encoders import frozen, load_text_encoder, load_vae
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def vae() -> frozen.VAE:
    return load_vae(GOLDEN / "vae_sd3")


@pytest.fixture(scope="module")
def text() -> frozen.TextEncoder:
    return load_text_encoder(GOLDEN / "text_sdxl2")


def pictures(B: int) -> np.ndarray:
    return np.random.default_rng(B).uniform(-1, 1, (B, 8, 12, 3)).astype(np.float32)


def test_what_a_vae_says_of_itself(vae: frozen.VAE):
    assert (vae.factor, vae.network.latent_channels) == (2, 16)
    np.testing.assert_allclose(vae.latent_scale.shift, np.full(16, 0.0609), rtol=1e-6)
    np.testing.assert_allclose(vae.latent_scale.scale, np.full(16, 1.5305), rtol=1e-6)
    assert vae.name == str(GOLDEN / "vae_sd3")


def test_rows_do_not_depend_on_chunks_and_few_programs_are_compiled(vae: frozen.VAE, monkeypatch):
    images = pictures(11)
    mean, std = vae.encode(images)
    decoded = vae.decode(mean)
    assert mean.shape == std.shape == (11, 4, 6, 16) and decoded.shape == images.shape
    monkeypatch.setattr(frozen, "CHUNK_PIXELS", 5 * 8 * 12)  # chunks of 4, 4 and 3
    for found, expected in zip((*vae.encode(images), vae.decode(mean)), (mean, std, decoded), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    before = frozen._encode._cache_size()
    for B in range(1, 12):
        assert vae.encode(images[:B])[0].shape[0] == B
    assert frozen._encode._cache_size() <= before + 2  # of 1 and 2 rows; 4 was there


def test_decoded_pictures_stay_in_range(vae: frozen.VAE):
    decoded = vae.decode(100 * np.random.default_rng(0).normal(size=(1, 4, 4, 16)).astype(np.float32))
    assert np.abs(np.asarray(decoded)).max() <= 1.0


def test_captions_in_states_out(text: frozen.TextEncoder):
    captions = ["a cat", "", "b c d"]
    states = text(captions)
    assert states.hidden.shape == (3, text.length, text.width) and states.pooled.shape == (
        3,
        text.pooled_width,
    )
    np.testing.assert_array_equal(states.mask, text.tokenize(captions)[1])
    alone = text(["b c d"])
    np.testing.assert_allclose(alone.hidden[0], states.hidden[2], atol=1e-5)
    np.testing.assert_allclose(alone.pooled[0], states.pooled[2], atol=1e-5)


@pytest.mark.filterwarnings("default:.*longer than:UserWarning")
@pytest.mark.parametrize("folder", ["text_sdxl2", golden.JOINED])
def test_captions_in_pieces_are_their_pieces_side_by_side(folder: str):
    text = load_text_encoder(GOLDEN / folder)
    S = text.length
    words = ["a", "b", "cat", "d"] * 7  # 28: two whole pieces of 10 tokens and one of 8
    states = text(["b c d", " ".join(words)], "chunk")
    assert states.hidden.shape == (2, 3 * S, text.width) and states.mask.shape == (2, 3 * S)
    short = text(["b c d", "a"])  # in a batch of as many
    np.testing.assert_array_equal(states.hidden[0, :S], short.hidden[0])
    np.testing.assert_array_equal(states.pooled[0], short.pooled[0])
    assert not np.asarray(states.mask)[0, S:].any() and not np.asarray(states.hidden)[0, S:].any()
    pieces = text([" ".join(words[k : k + 10]) for k in (0, 10, 20)])
    np.testing.assert_allclose(states.hidden[1], np.concatenate(list(pieces.hidden)), atol=1e-5)
    np.testing.assert_array_equal(states.mask[1], np.concatenate(list(pieces.mask)))
    np.testing.assert_allclose(states.pooled[1], np.mean(pieces.pooled, 0), atol=1e-5)


@pytest.mark.filterwarnings("default:.*longer than:UserWarning")
def test_no_hidden_transfers(vae: frozen.VAE, text: frozen.TextEncoder):
    with jax.transfer_guard("disallow"):
        vae.decode(vae.encode(pictures(3))[0])
        text(["a", "cat", "b"])
        text(["a", "cat " * 30], "chunk")


def test_the_tokenizer_may_lie_beside_the_encoder(tmp_path: Path, text: frozen.TextEncoder):
    folder = Path(shutil.copytree(GOLDEN / "text_sdxl2", tmp_path / "text_encoder_2"))
    (tmp_path / "tokenizer_2").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / "tokenizer_2" / name)
    beside = load_text_encoder(folder)
    np.testing.assert_array_equal(beside(["a cat"]).pooled, text(["a cat"]).pooled)
    assert beside.sha256 == text.sha256


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("config.json", '"quick_gelu"', '"gelu"'),
        ("merges.txt", "\nca t</w>", ""),
        ("tokenizer_config.json", "{", "{ "),
    ],
)
def test_the_hash_changes_with_all_that_changes_what_captions_become(tmp_path: Path, name: str, old: str, new: str):
    folder = Path(shutil.copytree(GOLDEN / "text_sd1", tmp_path / "clip"))
    before = load_text_encoder(folder).sha256
    (folder / "README.md").write_text("another page")
    (folder / "preprocessor_config.json").write_text("{}")
    assert load_text_encoder(folder).sha256 == before
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    assert load_text_encoder(folder).sha256 != before


def test_the_hash_of_a_vae_changes_with_its_config(tmp_path: Path, vae: frozen.VAE):
    folder = Path(shutil.copytree(GOLDEN / "vae_sd3", tmp_path / "vae"))
    assert load_vae(folder).sha256 == vae.sha256
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    assert load_vae(folder).sha256 != vae.sha256


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "text_sd1", tmp_path / "clip"))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "zz": len(vocabulary)}))
    with pytest.raises(ValueError, match="the tokenizer has 57 tokens, the network 56; they do not belong"):
        load_text_encoder(folder)


def test_the_wrong_network_is_refused():
    with pytest.raises(ValueError, match="text_sd1/config.json: the class is CLIPTextModel; expected AutoencoderKL or"):
        load_vae(GOLDEN / "text_sd1")
    with pytest.raises(ValueError, match="vae_sd/config.json: the class is AutoencoderKL; expected CLIPTextModel or"):
        load_text_encoder(GOLDEN / "vae_sd")


@pytest.mark.parametrize("load, case", [(load_vae, "vae_sd"), (load_text_encoder, "text_sd2")])
def test_a_copy_is_the_same_encoder(load, case: str, tmp_path: Path):
    original = load(GOLDEN / case)
    original.copy_to(tmp_path / "copy")
    copy = load(tmp_path / "copy")
    assert copy.sha256 == original.sha256
    jax.tree.map(np.testing.assert_array_equal, copy.params, original.params)


def test_a_vae_may_decode_in_another_type_than_it_encodes_in(vae: frozen.VAE):
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 16)).astype(np.float32)
    half = vae.decode(latents, jnp.bfloat16)
    np.testing.assert_array_equal(half, load_vae(GOLDEN / "vae_sd3", jnp.bfloat16).decode(latents))
    error = np.abs(half - vae.decode(latents)).max()
    assert half.dtype == jnp.float32 and 0 < error < 0.05


def test_float16_is_refused_for_the_vae(vae: frozen.VAE):
    for use in (
        lambda: load_vae(GOLDEN / "vae_sd", jnp.float16),
        lambda: vae.decode(np.zeros((1, 4, 4, 16)), "float16"),
    ):
        with pytest.raises(ValueError, match="valid: bfloat16, float32"):
            use()


def test_arrays_that_do_not_fit_are_refused(vae: frozen.VAE, text: frozen.TextEncoder):
    with pytest.raises(ValueError, match="9 x 12 px: the VAE needs multiples of 2"):
        vae.encode(np.zeros((1, 9, 12, 3), np.float32))
    with pytest.raises(ValueError, match=r"pictures of shape \[B, height, width, 3\], got \(8, 12, 3\)"):
        vae.encode(np.zeros((8, 12, 3), np.float32))
    with pytest.raises(ValueError, match=r"latents of shape \[B, height, width, 16\], got \(1, 4, 4, 4\)"):
        vae.decode(np.zeros((1, 4, 4, 4), np.float32))
    with pytest.raises(ValueError, match=f"ids and mask .B, {golden.TEXT_LENGTH}. .* got .1, 77. and .1, 77."):
        text.encode_ids(np.zeros((1, 77), np.int32), np.ones((1, 77), bool))
