"""Laws of the process: noising by its definition, and one conversion table for every pair of targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import SCHEDULES, make_schedule
from tests.diffusion.by_hand import coefficients_by_hand

TARGETS = ["x0", "epsilon", "v", "flow"]
SHAPE = (8, 8, 4)  # h w C
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


def corrupted(name, t):
    """x_t and the true targets of random latents at the times t ``[B]``."""
    x0 = jax.random.normal(jax.random.key(1), (len(t), *SHAPE))
    keys = jax.random.split(jax.random.key(2), len(t))
    return jax.jit(Process(make_schedule(name, 1.0), "x0").corrupt)(keys, x0, jnp.asarray(t, jnp.float32))


def convert(name, prediction, value, x_t, t):
    process = Process(make_schedule(name, 1.0), prediction)
    return jax.jit(process.convert)(value, x_t, jnp.asarray(t, jnp.float32))


def relative_error(a, b):
    """max |a - b| / max |b| of each sample."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b), axis=(1, 2, 3)) / np.max(np.abs(b), axis=(1, 2, 3))


@each_schedule
def test_every_target_to_every_other_and_back(name):
    """At even times to 1e-4; and over log-SNR from -15 to 15, where float32 holds the smaller part of x_t less well."""
    schedule = make_schedule(name, 1.0)
    even = np.linspace(0.001, 0.995, 64, dtype=np.float32)
    extreme = np.asarray(schedule.time_of(jnp.linspace(-15, 15, 61)))
    t = np.concatenate([even, extreme[extreme > 0]])  # edm has no log-SNR above 12.4
    tolerance = np.where(np.arange(len(t)) < len(even), 1e-4, 5e-4)
    x_t, truth = corrupted(name, t)
    process = {target: Process(schedule, target) for target in TARGETS}

    # compiled as it is for users: without fused multiply-add, 1.3e-4 at t = 0.001
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def cycles(truth, x_t, t):
        there = {start: process[start].convert(getattr(truth, start), x_t, t) for start in TARGETS}
        return {
            f"{start} to {other} and back": getattr(process[other].convert(getattr(there[start], other), x_t, t), start)
            for start in TARGETS
            for other in TARGETS
        }

    for cycle, value in cycles(truth, x_t, t).items():
        error = relative_error(value, getattr(truth, cycle.split()[0]))
        worst = np.argmax(error / tolerance)
        assert error[worst] <= tolerance[worst], f"{cycle} at t = {t[worst]}: {error[worst]:.1e}"


@each_schedule
def test_conversion_solves_the_two_equations(name):
    """x_t = alpha x0 + sigma epsilon and the target's own definition, solved by LAPACK in float64."""
    schedule = make_schedule(name, 1.0)
    t = np.linspace(0.00075, 0.99925, 34, dtype=np.float32)
    log_snr = np.asarray(schedule.log_snr(t))
    x_t, truth = corrupted(name, t)

    @jax.jit
    def all_conversions(truth, x_t, t):
        return {p: Process(schedule, p).convert(getattr(truth, p), x_t, t) for p in TARGETS}

    for prediction, ours in all_conversions(truth, x_t, t).items():
        p = getattr(truth, prediction)
        for i in np.flatnonzero(np.abs(log_snr) <= 15):
            alpha, sigma, d_alpha, d_sigma = coefficients_by_hand(name, float(t[i]))
            rows = {"x0": (1, 0), "epsilon": (0, 1), "v": (-sigma, alpha), "flow": (d_alpha, d_sigma)}
            known = np.stack([np.asarray(x_t[i], np.float64).ravel(), np.asarray(p[i], np.float64).ravel()])
            x0_epsilon = np.linalg.solve(np.array([(alpha, sigma), rows[prediction]]), known)
            for target in TARGETS:
                expected = (np.array(rows[target]) @ x0_epsilon).reshape(1, *SHAPE)
                error = relative_error(getattr(ours, target)[i : i + 1], expected).item()
                assert error <= 5e-4, f"{prediction} to {target} at t = {t[i]}: {error:.1e}"


@each_schedule
def test_v_and_flow_know_x0_and_epsilon_at_both_ends(name):
    t = np.array([0, 0, 1, 1], np.float32)
    x_t, truth = corrupted(name, t)
    for prediction in ["v", "flow"]:
        ours = convert(name, prediction, getattr(truth, prediction), x_t, t)
        assert relative_error(ours.x0, truth.x0).max() < 1e-5
        assert relative_error(ours.epsilon, truth.epsilon).max() < 1e-5


@pytest.mark.parametrize("log_snr", [-15.0, 15.0])
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_v_and_flow_are_exact_at_extreme_log_snr(prediction, log_snr):
    t = np.array([1 / (1 + np.exp(log_snr / 2))], np.float32)  # rectified flow: sigma / alpha = t / (1 - t)
    x_t, truth = corrupted("rectified_flow", t)
    ours = convert("rectified_flow", prediction, getattr(truth, prediction), x_t, t)
    assert relative_error(ours.x0, truth.x0).max() < 1e-6
    assert relative_error(ours.epsilon, truth.epsilon).max() < 1e-6


def test_the_prediction_itself_comes_back_bit_for_bit():
    t = np.linspace(0.1, 0.9, 5, dtype=np.float32)
    x_t, truth = corrupted("rectified_flow", t)
    for prediction in TARGETS:
        value = getattr(truth, prediction)
        ours = convert("rectified_flow", prediction, value, x_t, t)
        np.testing.assert_array_equal(getattr(ours, prediction), value)


def test_predictions_of_a_bfloat16_network_are_converted_in_float32():
    t = np.array([0.3], np.float32)
    x_t, truth = corrupted("scaled_linear", t)
    v = truth.v.astype(jnp.bfloat16)
    ours = convert("scaled_linear", "v", v, x_t.astype(jnp.bfloat16), t)
    in_float32 = convert("scaled_linear", "v", v.astype(jnp.float32), x_t.astype(jnp.bfloat16).astype(jnp.float32), t)
    for target in TARGETS:
        assert getattr(ours, target).dtype == jnp.float32
        np.testing.assert_array_equal(getattr(ours, target), getattr(in_float32, target))


def test_from_x0_gives_the_targets_of_another_x0():
    """They describe the same x_t: alpha x0 + sigma epsilon is x_t again, and v and flow follow."""
    t = np.array([0.2003, 0.7003], np.float32)  # inside segments of the table
    process = Process(make_schedule("cosine", 1.0), "v")
    x_t, truth = corrupted("cosine", t)
    other = process.from_x0(truth.x0 + 0.5, x_t, jnp.asarray(t))
    for i, time in enumerate(t.astype(np.float64)):
        alpha, sigma, d_alpha, d_sigma = coefficients_by_hand("cosine", time)
        x0 = np.asarray(truth.x0[i], np.float64) + 0.5
        epsilon = (np.asarray(x_t[i], np.float64) - alpha * x0) / sigma
        np.testing.assert_allclose(other.epsilon[i], epsilon, atol=2e-5)
        np.testing.assert_allclose(other.v[i], alpha * epsilon - sigma * x0, atol=2e-5)
        np.testing.assert_allclose(other.flow[i], d_alpha * x0 + d_sigma * epsilon, atol=2e-4)


@each_schedule
def test_corrupt_is_the_definition(name):
    t = np.linspace(0, 1, 11, dtype=np.float32)
    x_t, targets = corrupted(name, t)
    for i, time in enumerate(t.astype(np.float64)):
        alpha, sigma, _, _ = coefficients_by_hand(name, time)
        x0, epsilon = np.asarray(targets.x0[i], np.float64), np.asarray(targets.epsilon[i], np.float64)
        np.testing.assert_allclose(x_t[i], alpha * x0 + sigma * epsilon, atol=2e-6)
        np.testing.assert_allclose(targets.v[i], alpha * epsilon - sigma * x0, atol=2e-6)


@each_schedule
def test_flow_is_the_velocity_of_x_t(name):
    t = np.array([0.0505, 0.3005, 0.5005, 0.9005], np.float32)  # inside segments of the table
    h = np.float32(4e-4 if name != "edm" else 2e-3)  # x_t hardly moves where edm has little noise
    before, _ = corrupted(name, t - h)
    after, _ = corrupted(name, t + h)  # the same keys: the same noise
    _, targets = corrupted(name, t)
    velocity = (np.asarray(after, np.float64) - before) / (2 * float(h))
    assert relative_error(targets.flow, velocity).max() < 3e-3


def test_noise_is_standard_normal_and_each_sample_has_its_own():
    process = Process(make_schedule("linear", 1.0), "epsilon")
    keys = jax.random.split(jax.random.key(3), 16)
    x0 = jax.random.normal(jax.random.key(4), (16, 16, 16, 4))
    t = jnp.linspace(0.1, 0.9, 16)
    x_t, targets = process.corrupt(keys, x0, t)
    epsilon = np.asarray(targets.epsilon)
    assert abs(epsilon.mean()) < 0.02 and abs(epsilon.std() - 1) < 0.02
    assert abs(np.corrcoef(epsilon.reshape(16, -1)) - np.eye(16)).max() < 0.15

    alone, _ = process.corrupt(keys[5:6], x0[5:6], t[5:6])
    np.testing.assert_allclose(alone[0], x_t[5], rtol=1e-6, atol=1e-6)
    shuffled, _ = process.corrupt(keys[::-1], x0[::-1], t[::-1])
    np.testing.assert_allclose(shuffled[::-1], x_t, rtol=1e-6, atol=1e-6)


def test_split_takes_the_variance_channels_off_and_reads_them_from_0_to_1():
    process = Process(make_schedule("linear", 1.0), "epsilon")
    both = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    prediction, variance = process.split(both, 4)
    np.testing.assert_array_equal(prediction, both[..., :4])
    np.testing.assert_array_equal(variance, (np.asarray(both[..., 4:]) + 1) / 2)
    _, ends = process.split(jnp.array([7.0, 7.0, -1.0, 1.0], jnp.bfloat16), 2)
    np.testing.assert_array_equal(ends, np.array([0, 1], np.float32), strict=True)
    prediction, variance = process.split(both, 8)
    np.testing.assert_array_equal(prediction, both)
    assert variance is None
    with pytest.raises(ValueError, match="returned 8 channels for latents of 3; it must return 3, or 6"):
        process.split(both, 3)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'noise'.*x0, epsilon, v, flow"):
        Process(make_schedule("linear", 1.0), "noise")
