"""The tiny VAE returns what the published class returns, in the raw latents of the big one."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dit_jax.encoders import VAE, describe_vae, load_vae, weights
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def check(vae: VAE, expected: dict[str, np.ndarray]) -> None:
    """Compares latents and pictures; pictures before the clip that ``vae.decode`` adds."""
    mean, std = vae.encode(expected["images"])
    assert relative_error(mean, expected["mean"]) < 1e-4
    assert std.shape == mean.shape and not np.asarray(std).any()
    decode = jax.jit(functools.partial(vae.network.apply, method="decode"))
    assert relative_error(decode({"params": vae.params}, expected["latents"]), expected["decoded"]) < 1e-4


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae(GOLDEN / golden.TINY_VAE)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"{golden.TINY_VAE}.expected.safetensors")


def test_golden_values(vae: VAE, expected):
    check(vae, expected)


def test_the_torch_class_agrees(tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    expected = golden.build_tiny_vae(tmp_path)
    check(load_vae(tmp_path), expected)
    params = load_vae(tmp_path).params
    for dtype in (np.float16, ml_dtypes.bfloat16):
        golden.in_type(tmp_path, np.dtype(dtype))
        jax.tree.map(np.testing.assert_array_equal, load_vae(tmp_path).params, params)


def test_names_and_shapes_are_those_of_the_published_network():
    """The full size of madebyollin/taesd: 2,445,063 parameters, numbered with the layers that have none."""
    diffusers = pytest.importorskip("diffusers")
    from dit_jax.encoders import networks

    network = networks.vae_network({"_class_name": "AutoencoderTiny"}, dtype=jnp.float32)
    key, image = jax.random.key(0), jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(network.init, key, image, key)["params"]
    ours = weights.to_published(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), shapes), "")
    theirs = {name: tuple(tensor.shape) for name, tensor in diffusers.AutoencoderTiny().state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == theirs


def test_it_speaks_the_raw_latents_of_stable_diffusion(vae: VAE, expected):
    np.testing.assert_allclose(vae.latent_scale.scale, np.full(4, 0.18215), rtol=1e-6)
    assert not vae.latent_scale.shift.any()
    assert describe_vae(GOLDEN / golden.TINY_VAE) == (vae.factor, 4) == (4, 4)
    far = 1e3 * np.sign(expected["latents"])  # beyond the clamp nothing changes
    np.testing.assert_array_equal(vae.decode(far), vae.decode(2 * far))


def test_bfloat16_is_near_and_returns_float32(vae: VAE, expected):
    half = load_vae(GOLDEN / golden.TINY_VAE, jnp.bfloat16)
    mean, _ = half.encode(expected["images"])
    assert mean.dtype == half.decode(expected["latents"]).dtype == jnp.float32
    assert 1e-4 < relative_error(mean, expected["mean"]) < 0.05


def test_training_call_encodes_and_decodes(vae: VAE, expected):
    pictures, mean, _ = vae.network.apply({"params": vae.params}, expected["images"], jax.random.key(0))
    np.testing.assert_allclose(jnp.clip(pictures, -1, 1), vae.decode(mean), atol=1e-2)  # before the clip they reach 100
