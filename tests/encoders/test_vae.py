"""The VAE returns what the published class returns, whatever its config."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dit_jax.encoders import VAE, load_vae
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def check(vae: VAE, expected: dict[str, np.ndarray]) -> None:
    """Compares moments and pictures; pictures before the clip that ``vae.decode`` adds."""
    mean, std = vae.encode(expected["images"])
    assert relative_error(mean, expected["mean"]) < 1e-4
    assert relative_error(std, expected["std"]) < 1e-4
    decode = jax.jit(functools.partial(vae.network.apply, method="decode"))
    assert relative_error(decode({"params": vae.params}, expected["latents"]), expected["decoded"]) < 1e-4


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae(GOLDEN / "vae_sd")


@pytest.mark.parametrize("case", [*golden.VAES, "flax_vae"])
def test_golden_values(case: str):
    check(load_vae(GOLDEN / case), load_file(GOLDEN / f"{case}.expected.safetensors"))


@pytest.mark.parametrize("case", golden.VAES)
def test_the_torch_class_agrees_in_every_layout(case: str, tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    expected = golden.build(case, tmp_path)
    today = load_vae(tmp_path)
    check(today, expected)
    for rewrite in (
        golden.as_published,
        golden.with_convolution_attention,
        functools.partial(golden.in_type, dtype=np.dtype(np.float16)),
        functools.partial(golden.in_type, dtype=np.dtype(ml_dtypes.bfloat16)),
    ):
        rewrite(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, load_vae(tmp_path).params, today.params)


def test_std_comes_from_a_clipped_logvar(vae: VAE):
    C = vae.network.latent_channels
    for bias, expected in ((1e4, np.exp(10.0)), (-1e4, np.exp(-15.0))):
        shifted = jnp.concatenate([jnp.zeros(C), jnp.full(C, bias)])
        params = {**vae.params, "quant_conv": {**vae.params["quant_conv"], "bias": shifted}}
        _, std = vae.network.apply({"params": params}, jnp.zeros((1, 8, 8, 3)), method="encode")
        np.testing.assert_allclose(std, expected, rtol=1e-5)


def test_bfloat16_is_near_and_returns_float32(vae: VAE):
    half = load_vae(GOLDEN / "vae_sd", jnp.bfloat16)
    expected = load_file(GOLDEN / "vae_sd.expected.safetensors")
    mean, std = half.encode(expected["images"])
    assert mean.dtype == std.dtype == half.decode(expected["mean"]).dtype == jnp.float32
    assert 1e-4 < relative_error(mean, expected["mean"]) < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.params))


def test_training_call_samples_the_posterior(vae: VAE):
    images = load_file(GOLDEN / "vae_sd.expected.safetensors")["images"]
    key = jax.random.key(1)
    pictures, mean, std = vae.network.apply({"params": vae.params}, images, key)
    latents = mean + std * jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(jnp.clip(pictures, -1, 1), vae.decode(latents), atol=1e-5)


@pytest.mark.slow
def test_the_torch_class_agrees_at_full_size(tmp_path: Path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()
    network.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = golden.run_vae(network, 32, 32)  # 256 px
    check(load_vae(tmp_path), expected)
