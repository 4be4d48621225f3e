"""Laws of the schedules: what the tables hold, what lies between their points, and where times are moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import SCHEDULES, make_schedule
from tools import make_golden_diffusion as reference

DISCRETE = ["linear", "scaled_linear", "cosine"]
POINTS = ((np.arange(1000) + 1) / 1000).astype(np.float32)  # t of the discrete steps


def betas_by_hand(name):
    if name == "linear":
        return [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    if name == "scaled_linear":
        low, high = 0.00085**0.5, 0.012**0.5
        return [(low + (high - low) * k / 999) ** 2 for k in range(1000)]
    f = [np.cos((k / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(1001)]
    return [min(1 - f[k + 1] / f[k], 0.999) for k in range(1000)]


@pytest.mark.parametrize("name", DISCRETE)
def test_points_are_the_discrete_steps(name):
    schedule = make_schedule(name, 1.0)
    alpha_bar, product = [], 1.0
    for beta in betas_by_hand(name):
        product *= 1 - beta
        alpha_bar.append(product)
    np.testing.assert_allclose(schedule.alpha(POINTS) ** 2, alpha_bar, rtol=2e-6)
    np.testing.assert_allclose(schedule.sigma(POINTS) ** 2, 1 - np.array(alpha_bar), rtol=2e-5)


@pytest.mark.parametrize("name", DISCRETE)
def test_points_are_those_of_diffusers(name):
    theirs = np.load(reference.GOLDEN)[f"{name}/alpha_bars"]
    alpha = make_schedule(name, 1.0).alpha(POINTS[::37])
    np.testing.assert_allclose(alpha**2, theirs, rtol=2e-5)  # theirs is a product in float32


@pytest.mark.parametrize("name", DISCRETE)
def test_points_are_those_of_diffusers_live(name):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    alpha = make_schedule(name, 1.0).alpha(POINTS)
    np.testing.assert_allclose(alpha**2, reference.alpha_bars(name), rtol=2e-5)


@pytest.mark.parametrize("name", DISCRETE)
def test_between_points_sigma_over_alpha_is_linear(name):
    schedule = make_schedule(name, 1.0)

    def ratio(t):
        return np.asarray(schedule.sigma(t) / schedule.alpha(t), np.float64)

    quarter = ratio((POINTS[:-1].astype(np.float64) + 0.25e-3).astype(np.float32))
    expected = 0.75 * ratio(POINTS[:-1]) + 0.25 * ratio(POINTS[1:])
    # One unit in the last place of t is 6e-5 of the way to the next point; cosine's last steps are long.
    np.testing.assert_allclose(quarter, expected, rtol=2e-6 if name != "cosine" else 5e-4)
    np.testing.assert_allclose(ratio(np.float32(0.00025)), 0.25 * ratio(POINTS[0]), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_are_clean_and_noise(name):
    schedule = make_schedule(name, 1.0)
    assert schedule.alpha(jnp.float32(0)) == 1 and schedule.sigma(jnp.float32(0)) == 0
    assert schedule.alpha(jnp.float32(1)) < 0.07 and schedule.sigma(jnp.float32(1)) > 0.997


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls_and_is_what_it_says(name):
    schedule = make_schedule(name, 1.0)
    t = np.linspace(0, 1, 2001, dtype=np.float32)
    log_snr = np.asarray(jax.jit(schedule.log_snr)(t))
    assert log_snr[0] == np.inf
    assert np.all(np.diff(log_snr) < 0)
    inside = slice(1, -1)
    alpha, sigma = (np.asarray(f(t[inside]), np.float64) for f in (schedule.alpha, schedule.sigma))
    np.testing.assert_allclose(log_snr[inside], np.log(alpha**2 / sigma**2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_where_a_schedule_says_so(name):
    schedule = make_schedule(name, 1.0)
    t = np.linspace(0, 1, 101, dtype=np.float32)
    variance = np.asarray(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)
    assert schedule.variance_preserving == np.allclose(variance, 1, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_are_derivatives(name):
    schedule = make_schedule(name, 1.0)
    t = (POINTS[:-1] + np.float32(0.0005)).astype(np.float32)  # inside a segment of the table
    for value, derivative in [(schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)]:
        low, high = (t - np.float32(4e-4)).astype(np.float32), (t + np.float32(4e-4)).astype(np.float32)
        secant = (np.asarray(value(high), np.float64) - value(low)) / (high.astype(np.float64) - low)
        np.testing.assert_allclose(derivative(t)[:990], secant[:990], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_undoes_log_snr(name):
    schedule = make_schedule(name, 1.0)
    t = np.linspace(0.002, 0.998, 499, dtype=np.float32)
    log_snr = jax.jit(schedule.log_snr)(t)
    np.testing.assert_allclose(jax.jit(schedule.time_of)(log_snr), t, rtol=1e-4, atol=1e-5)
    ends = np.asarray(schedule.time_of(jnp.array([100.0, -100.0])))
    assert 0 <= ends[0] < 1e-6 and ends[1] == 1


def test_v_on_edm_is_the_preconditioning_of_edm():
    """Karras et al. 2022, table 1 and eq. 8, in their words: D = c_skip y + c_out F(c_in y), y = x + n of level s.

    With sigma_data = 1, F = -v at x_t = c_in y, and their weighted loss is the squared error of F.
    """
    process = Process(make_schedule("edm", 1.0), "v")
    s = np.geomspace(0.003, 70, 40)
    t = np.asarray(process.schedule.time_of(jnp.asarray(-2 * np.log(s))))
    rng = np.random.default_rng(0)
    x, n, F = rng.normal(size=(3, 40, 1, 1, 1))
    column = s.reshape(-1, 1, 1, 1)
    y = x + column * n
    c_in, c_skip, c_out = 1 / np.sqrt(1 + column**2), 1 / (1 + column**2), column / np.sqrt(1 + column**2)
    denoised = process.convert(jnp.asarray(-F), jnp.asarray(c_in * y), jnp.asarray(t)).x0
    np.testing.assert_allclose(denoised, c_skip * y + c_out * F, rtol=1e-4, atol=1e-4)
    weight = (column**2 + 1) / column**2  # their lambda
    theirs = weight * (c_skip * y + c_out * F - x) ** 2
    v = c_in * n - c_in * column * x
    np.testing.assert_allclose((-F - v) ** 2, theirs, rtol=1e-6)


def test_shift_multiplies_the_noise_ratio():
    """Eq. 11 solves sigma / alpha (t') = s sigma / alpha (t), the reason it has that form."""
    schedule = make_schedule("rectified_flow", 3.0)
    t = np.linspace(0.05, 0.95, 19, dtype=np.float32)
    moved = schedule.shift_times(t)
    ratio = schedule.sigma(moved) / schedule.alpha(moved)
    np.testing.assert_allclose(ratio, 3 * schedule.sigma(t) / schedule.alpha(t), rtol=1e-5)


def test_unknown_names_and_shifts_are_refused():
    with pytest.raises(ValueError, match="'sine'.*linear, scaled_linear, cosine, edm, rectified_flow"):
        make_schedule("sine", 1.0)
    with pytest.raises(ValueError, match="'linear' has no shift, but shift=3.0"):
        make_schedule("linear", 3.0)
    with pytest.raises(ValueError, match="above 0, not -1.0"):
        make_schedule("rectified_flow", -1.0)
