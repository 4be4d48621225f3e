"""Laws of the objectives: how times are distributed, and what the loss is zero for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_jax.diffusion import objectives
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule

KEYS = jax.random.split(jax.random.key(0), 4000)
STRAIGHT = make_schedule("rectified_flow", 1.0)


def test_uniform_times_are_uniform_and_never_zero():
    t = np.asarray(jax.jit(objectives.uniform(STRAIGHT))(KEYS))
    assert t.shape == (4000,) and t.dtype == np.float32
    assert t.min() > 0 and t.max() <= 1
    assert stats.kstest(t, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.6)])
def test_logit_normal_times_have_normal_logits(mean, std):
    t = np.asarray(objectives.logit_normal(STRAIGHT, mean, std)(KEYS), np.float64)
    assert t.min() > 0 and t.max() < 1
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - mean) < 0.06 * std and abs(logit.std() - std) < 0.05 * std
    assert stats.kstest(logit, "norm", (mean, std)).pvalue > 0.01


@pytest.mark.parametrize("times", [objectives.uniform, lambda schedule: objectives.logit_normal(schedule, 0.0, 1.0)])
def test_the_schedule_shifts_training_times(times):
    t = np.asarray(times(STRAIGHT)(KEYS), np.float64)
    shifted = times(make_schedule("rectified_flow", 3.0))(KEYS)
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), rtol=1e-5)


def test_the_time_of_a_sample_depends_on_its_key_alone():
    times = objectives.logit_normal(STRAIGHT, 0.0, 1.0)
    np.testing.assert_allclose(times(KEYS[7:9]), times(KEYS)[7:9], rtol=1e-6)


def test_logit_normal_refuses_a_std_of_zero():
    with pytest.raises(ValueError, match="above 0, not 0.0"):
        objectives.logit_normal(STRAIGHT, 0.0, 0.0)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "flow"])
def test_loss_is_the_mean_squared_error_of_the_networks_own_target(prediction):
    process = Process(make_schedule("scaled_linear", 1.0), prediction)
    x0 = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    t = jnp.array([0.1, 0.5, 0.9])
    x_t, targets = process.corrupt(KEYS[:3], x0, t)
    target = getattr(targets, prediction)

    np.testing.assert_array_equal(objectives.loss(process, target, targets, x_t, t), np.zeros(3))
    offset = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(objectives.loss(process, target + offset, targets, x_t, t), [1, 4, 9], rtol=1e-5)
    guess = np.asarray(jax.random.normal(jax.random.key(2), target.shape))
    by_hand = [np.mean((guess[i] - np.asarray(target[i])) ** 2) for i in range(3)]
    np.testing.assert_allclose(objectives.loss(process, guess, targets, x_t, t), by_hand, rtol=1e-5)


def test_loss_is_float32_and_leaves_variance_channels_alone():
    process = Process(make_schedule("linear", 1.0), "epsilon")
    t = jnp.array([0.5])
    x_t, targets = process.corrupt(KEYS[:1], jnp.ones((1, 4, 4, 2)), t)
    with_variance = jnp.concatenate([targets.epsilon + 1, jnp.full_like(x_t, 1e6)], axis=-1)
    np.testing.assert_allclose(objectives.loss(process, with_variance, targets, x_t, t), [1], rtol=1e-5)
    assert objectives.loss(process, x_t.astype(jnp.bfloat16), targets, x_t, t).dtype == jnp.float32
