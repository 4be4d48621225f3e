"""Laws of the objectives: how times are distributed, and what the loss is zero for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dit_jax.diffusion import objectives
from dit_jax.diffusion.mixture import COMPONENTS
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import SCHEDULES, make_schedule
from tests.diffusion.by_hand import coefficients_by_hand

KEYS = jax.random.split(jax.random.key(0), 4000)
PLACES = jnp.arange(4000) / 4000
STRAIGHT = make_schedule("rectified_flow", 1.0)


def test_uniform_times_are_uniform_and_never_zero():
    t = np.asarray(jax.jit(objectives.uniform(STRAIGHT))(KEYS, PLACES))
    assert t.shape == (4000,) and t.dtype == np.float32
    assert t.min() > 0 and t.max() <= 1
    assert stats.kstest(t, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.6)])
def test_logit_normal_times_have_normal_logits(mean, std):
    t = np.asarray(objectives.logit_normal(STRAIGHT, mean, std)(KEYS, PLACES), np.float64)
    assert t.min() > 0 and t.max() < 1
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - mean) < 0.06 * std and abs(logit.std() - std) < 0.05 * std
    assert stats.kstest(logit, "norm", (mean, std)).pvalue > 0.01


@pytest.mark.parametrize("times", [
    objectives.uniform,
    lambda schedule: objectives.stratified(schedule, 4000),
    lambda schedule: objectives.logit_normal(schedule, 0.0, 1.0),
])  # fmt: skip
def test_the_schedule_shifts_training_times(times):
    t = np.asarray(times(STRAIGHT)(KEYS, PLACES), np.float64)
    shifted = times(make_schedule("rectified_flow", 3.0))(KEYS, PLACES)
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), rtol=1e-5)


def test_the_time_of_a_sample_depends_on_its_key_alone():
    times = objectives.logit_normal(STRAIGHT, 0.0, 1.0)
    np.testing.assert_allclose(times(KEYS[7:9], PLACES[7:9]), times(KEYS, PLACES)[7:9], rtol=1e-6)


def test_stratified_times_have_one_sample_in_every_stratum():
    times = objectives.stratified(STRAIGHT, 64)
    t = np.asarray(jax.jit(times)(KEYS, jnp.tile(jnp.arange(64) / 64, 63)[:4000]), np.float64)
    for batch in t[: 62 * 64].reshape(62, 64):
        assert sorted(np.ceil(batch * 64 - 1e-4).astype(int).tolist()) == list(range(1, 65))
    assert stats.kstest(t, "uniform").pvalue > 0.01 and t.min() > 0


@pytest.mark.parametrize("name", ["edm", "cosine", "rectified_flow"])
def test_log_normal_times_have_normal_logarithms_of_the_noise_level(name):
    schedule = make_schedule(name, 1.0)
    t = jax.jit(objectives.log_normal(schedule, -1.2, 1.2))(KEYS, PLACES)
    level = -np.asarray(schedule.log_snr(t), np.float64) / 2
    assert stats.kstest(level, "norm", (-1.2, 1.2)).pvalue > 0.01


@pytest.mark.parametrize("make", [objectives.logit_normal, objectives.log_normal])
def test_a_std_of_zero_is_refused(make):
    with pytest.raises(ValueError, match="above 0, not 0.0"):
        make(STRAIGHT, 0.0, 0.0)


# Hang et al. 2023, section 3.4, and the flow of rectified flow by the same argument.
MIN_SNR = {
    "x0": lambda snr: min(snr, 5.0),
    "epsilon": lambda snr: min(snr, 5.0) / snr,
    "v": lambda snr: min(snr, 5.0) / (snr + 1),
}


@pytest.mark.parametrize("prediction", MIN_SNR)
def test_min_snr_is_the_papers_for_every_target(prediction):
    process = Process(make_schedule("cosine", 1.0), prediction)
    t = jnp.linspace(0.05, 0.95, 19)
    snr = np.exp(np.asarray(process.schedule.log_snr(t), np.float64))
    np.testing.assert_allclose(objectives.min_snr(process, 5.0)(t), [MIN_SNR[prediction](s) for s in snr], rtol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "edm", "rectified_flow"])
@pytest.mark.parametrize("weight", [lambda p: objectives.min_snr(p, 5.0), lambda p: objectives.sigmoid(p, -1.0)])
def test_a_weighted_error_is_the_same_whatever_the_network_predicts(weight, schedule):
    """One wrong x0, said as every target: after weighing, one loss."""
    t = jnp.array([0.2, 0.5, 0.8])
    x0 = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    losses = {}
    for prediction in ("x0", "epsilon", "v", "flow"):
        process = Process(make_schedule(schedule, 1.0), prediction)
        x_t, targets = process.corrupt(KEYS[:3], x0, t)
        wrong = getattr(process.from_x0(x0 + 0.1 * jnp.sin(x0), x_t, t), prediction)
        losses[prediction] = objectives.loss(process, wrong, targets) * weight(process)(t)
    for prediction, loss in losses.items():
        np.testing.assert_allclose(loss, losses["x0"], rtol=2e-3, err_msg=prediction)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "flow"])
@pytest.mark.parametrize("weight", [lambda p: objectives.min_snr(p, 5.0), lambda p: objectives.sigmoid(p, -1.0)])
def test_weights_are_finite_to_the_ends(weight, prediction):
    for schedule in ("edm", "cosine", "rectified_flow"):
        found = weight(Process(make_schedule(schedule, 1.0), prediction))(jnp.array([1e-6, 0.5, 1.0]))
        assert np.isfinite(found).all() and (np.asarray(found) >= 0).all()


def test_sigmoid_weighs_epsilon():
    process = Process(make_schedule("cosine", 1.0), "epsilon")
    t = jnp.linspace(0.05, 0.95, 19)
    log_snr = np.asarray(process.schedule.log_snr(t), np.float64)
    np.testing.assert_allclose(objectives.sigmoid(process, -2.0)(t), 1 / (1 + np.exp(log_snr + 2)), rtol=1e-4)


def test_a_gamma_of_zero_is_refused():
    with pytest.raises(ValueError, match="gamma of min_snr must be above 0, not 0"):
        objectives.min_snr(Process(STRAIGHT, "flow"), 0)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "flow"])
def test_loss_is_the_mean_squared_error_of_the_networks_own_target(prediction):
    process = Process(make_schedule("scaled_linear", 1.0), prediction)
    x0 = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    t = jnp.array([0.1, 0.5, 0.9])
    x_t, targets = process.corrupt(KEYS[:3], x0, t)
    target = getattr(targets, prediction)

    np.testing.assert_array_equal(objectives.loss(process, target, targets), np.zeros(3))
    offset = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(objectives.loss(process, target + offset, targets), [1, 4, 9], rtol=1e-5)
    guess = np.asarray(jax.random.normal(jax.random.key(2), target.shape))
    by_hand = [np.mean((guess[i] - np.asarray(target[i])) ** 2) for i in range(3)]
    np.testing.assert_allclose(objectives.loss(process, guess, targets), by_hand, rtol=1e-5)


def test_loss_is_float32_and_leaves_variance_channels_alone():
    process = Process(make_schedule("linear", 1.0), "epsilon")
    t = jnp.array([0.5])
    x_t, targets = process.corrupt(KEYS[:1], jnp.ones((1, 4, 4, 2)), t)
    with_variance = jnp.concatenate([targets.epsilon + 1, jnp.full_like(x_t, 1e6)], axis=-1)
    np.testing.assert_allclose(objectives.loss(process, with_variance, targets), [1], rtol=1e-5)
    assert objectives.loss(process, x_t.astype(jnp.bfloat16), targets).dtype == jnp.float32


TARGETS = ["x0", "epsilon", "v", "flow"]


def answers(process, t, variance):
    """x_t, the targets of random latents, and a network's answer: a wrong prediction, and ``variance`` for eq. 9."""
    B = len(t)
    x0 = jax.random.normal(jax.random.key(1), (B, 4, 4, 2))
    x_t, targets = process.corrupt(KEYS[:B], x0, t)
    prediction = getattr(targets, process.prediction)
    prediction += 0.3 * jnp.sin(jnp.arange(prediction.size)).reshape(prediction.shape)
    channels = jnp.broadcast_to(2 * variance - 1, x_t.shape)
    return x_t, targets, jnp.concatenate([prediction, channels], -1)


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_variance_is_trained_by_the_kl_of_two_gaussians(schedule, prediction):
    """Posterior and step by their definitions, one after the other in float64: nothing is cancelled by hand."""
    process = Process(make_schedule(schedule, 1.0), prediction)
    t = jnp.array([0.0006, 0.0035, 0.2003, 0.6004, 0.9705])
    v = jax.random.uniform(jax.random.key(4), (5, 4, 4, 2), minval=-0.2, maxval=1.2)
    x_t, targets, answer = answers(process, t, v)
    found = jax.jit(lambda answer: objectives.variance_loss(process, answer, targets, t))(answer)
    assert found.shape == (5,) and found.dtype == np.float32
    for i, s in enumerate([0.0003, 0.0025, 0.1993, 0.5994, 0.9695]):
        a_t, s_t, d_alpha, d_sigma = coefficients_by_hand(schedule, float(t[i]))
        a_s, s_s, _, _ = coefficients_by_hand(schedule, s)
        forward = a_t / a_s  # x_t = forward x_s + noise of variance added
        added = s_t**2 - forward**2 * s_s**2
        least = added * s_s**2 / s_t**2
        log_learned = np.asarray(v[i]) * np.log(added) + (1 - np.asarray(v[i])) * np.log(least)
        true, wrong, x0 = (np.asarray(a[i], np.float64) for a in (getattr(targets, prediction), answer, targets.x0))
        rows = {"x0": (1, 0), "epsilon": (0, 1), "v": (-s_t, a_t), "flow": (d_alpha, d_sigma)}
        to_x0 = np.linalg.inv([(a_t, s_t), rows[prediction]])[0, 1]  # x_t stays
        difference = a_s * added / s_t**2 * to_x0 * (wrong[..., :2] - true)  # of the means
        nats = 0.5 * (log_learned - np.log(least) + (least + difference**2) / np.exp(log_learned) - 1)
        assert float(found[i]) == pytest.approx(1000 * nats.mean() / np.log(2), rel=5e-3), f"t = {t[i]}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_true_prediction_of_the_smallest_variance_costs_nothing(schedule):
    for prediction in TARGETS:
        process = Process(make_schedule(schedule, 1.0), prediction)
        t = jnp.array([1e-6, 0.001, 0.3, 1.0])
        _, targets, answer = answers(process, t, 0.0)
        right = jnp.concatenate([getattr(targets, prediction), answer[..., 2:]], -1)
        np.testing.assert_array_equal(objectives.variance_loss(process, right, targets, t), np.zeros(4))
        assert (np.asarray(objectives.variance_loss(process, answer, targets, t)) > 0).all()


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_of_the_variance_and_its_gradient_are_finite_at_all_times(schedule, prediction):
    process = Process(make_schedule(schedule, 1.0), prediction)
    t = jnp.concatenate([jnp.geomspace(1e-9, 1e-3, 25), jnp.linspace(0, 1, 101)[1:], 1 - jnp.geomspace(1e-7, 1e-3, 9)])
    _, targets, answer = answers(process, t, 0.5)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda answer: objectives.variance_loss(process, answer, targets, t).sum())
    )(answer)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert (np.abs(gradient).sum((1, 2, 3)) > 0).all()


def test_the_loss_of_the_variance_does_not_move_the_mean():
    process = Process(make_schedule("scaled_linear", 1.0), "epsilon")
    t = jnp.array([0.0004, 0.2, 0.9])
    x_t, targets, answer = answers(process, t, 0.4)

    def simple(answer):
        return objectives.loss(process, answer, targets).sum()

    def hybrid(answer):
        return simple(answer) + 0.001 * objectives.variance_loss(process, answer, targets, t).sum()

    one, both = (np.asarray(jax.jit(jax.grad(f))(answer)) for f in (simple, hybrid))
    np.testing.assert_array_equal(both[..., :2], one[..., :2])
    assert (one[..., 2:] == 0).all() and (both[..., 2:] != 0).all()


@pytest.mark.parametrize(("schedule", "t"), [("linear", 0.05), ("scaled_linear", 0.03), ("cosine", 0.2), ("edm", 0.4)])
def test_what_is_learned_is_the_variance_of_the_data_and_lies_between_the_bounds(schedule, t):
    """A mixture of unit variance with its exact mean: the true variance of a step is the smallest one, plus what is
    not known of x0, here by quadrature; and there the loss is least."""
    weight, mean, std = COMPONENTS.T
    scale = np.sqrt(weight @ (mean**2 + std**2) - (weight @ mean) ** 2)
    mean, std = (mean - weight @ mean) / scale, std / scale

    a_t, s_t, _, _ = coefficients_by_hand(schedule, t)
    a_s, s_s, _, _ = coefficients_by_hand(schedule, t - 0.001)
    added = s_t**2 - (a_t / a_s) ** 2 * s_s**2
    least = added * s_s**2 / s_t**2

    x = np.linspace(-7, 7, 4001)[:, None]
    variance = a_t**2 * std**2 + s_t**2
    density = weight * np.exp(-((x - a_t * mean) ** 2) / (2 * variance)) / np.sqrt(variance)
    gain, left = a_t * std**2 / variance, std**2 * s_t**2 / variance
    share, each = density / density.sum(1, keepdims=True), mean + gain * (x - a_t * mean)
    expected = (share * each).sum(1)
    unknown = (share * (left + each**2)).sum(1) - expected**2
    unknown = (density.sum(1) * unknown).sum() / density.sum()
    true = least + (a_s * added / s_t**2) ** 2 * unknown
    v_true = np.log(true / least) / np.log(added / least)
    assert 0 < v_true < 0.95

    n = 200_000
    rng = np.random.default_rng(0)
    component = rng.choice(3, n, p=weight)
    x0 = jnp.asarray(mean[component] + std[component] * rng.normal(size=n), jnp.float32).reshape(1, n, 1, 1)
    process, time = Process(make_schedule(schedule, 1.0), "x0"), jnp.full(1, t)
    x_t, targets = process.corrupt(KEYS[:1], x0, time)
    guess = jnp.asarray(np.interp(x_t, x[:, 0], expected), jnp.float32)

    def loss(v):
        answer = jnp.concatenate([guess, jnp.full_like(guess, 2 * v - 1)], -1)
        return objectives.variance_loss(process, answer, targets, time)[0]

    slope = jax.jit(jax.grad(loss))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    assert low == pytest.approx(v_true, abs=0.02)
