"""Between raw and model latents there is an affine map per channel, and a way back."""

import numpy as np
import pytest

from dit_jax.encoders import latents


def moments(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means whose channels differ in centre and spread, and stds of their own."""
    rng = np.random.default_rng(seed)
    mean = rng.normal([3.0, -2.0, 0.5], [4.0, 0.2, 1.0], (64, 8, 8, 3))
    std = rng.uniform([0.1, 0.1, 2.0], [0.2, 0.3, 3.0], (64, 8, 8, 3))
    return mean.astype(np.float32), std.astype(np.float32)


def test_factors_shift_first_then_scale():
    scale = latents.scale_from_factors(1.5, 0.25, 3)
    raw, _ = moments(0)
    np.testing.assert_allclose(scale.to_model(raw), (raw - 0.25) * 1.5, rtol=1e-6)
    unshifted = latents.scale_from_factors(0.18215, None, 3)
    np.testing.assert_allclose(unshifted.to_model(raw), raw * 0.18215, rtol=1e-6)


@pytest.mark.parametrize("measured", [False, True])
def test_to_raw_inverts_to_model(measured: bool):
    mean, std = moments(1)
    scale = latents.measure_scale(mean, std) if measured else latents.scale_from_factors(1.5305, 0.0609, 3)
    np.testing.assert_allclose(scale.to_raw(scale.to_model(mean)), mean, rtol=1e-5, atol=1e-5)


def test_measured_samples_have_zero_mean_and_unit_variance():
    mean, std = moments(2)
    scale = latents.measure_scale(mean, std)
    noise = np.random.default_rng(0).normal(size=mean.shape)
    model = np.asarray(scale.to_model(mean + std * noise))
    np.testing.assert_allclose(model.mean(axis=(0, 1, 2)), 0.0, atol=0.05)
    np.testing.assert_allclose(model.std(axis=(0, 1, 2)), 1.0, atol=0.05)


def test_a_channel_that_does_not_vary_is_refused():
    mean, std = moments(3)
    mean[..., 1], std[..., 1] = 7.0, 0.0
    with pytest.raises(ValueError, match=r"channels \[1\] do not vary"):
        latents.measure_scale(mean, std)
