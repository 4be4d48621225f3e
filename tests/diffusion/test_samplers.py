"""Laws of the samplers: order of convergence, the distribution they draw, and how a run is put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import samplers
from dit_jax.diffusion.grids import uniform
from dit_jax.diffusion.mixture import expected_x0, make_denoise
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule
from dit_jax.sharding import batch_sharding, make_mesh


def runge_kutta(y, ratio_from, ratio_to, steps=400):
    """dy / dr = epsilon with y = x / alpha and r = sigma / alpha, which holds on every schedule: RK4, float64."""

    def slope(y, r):
        return (y - expected_x0(np, y, 1.0, r)) / r  # y is x_t where alpha = 1 and sigma = r

    path = np.geomspace(ratio_from, ratio_to, steps + 1)
    for r, r_next in zip(path[:-1], path[1:], strict=True):
        h = r_next - r
        k1 = slope(y, r)
        k2 = slope(y + h / 2 * k1, r + h / 2)
        k3 = slope(y + h / 2 * k2, r + h / 2)
        k4 = slope(y + h * k3, r_next)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def smooth_grid(name, steps):
    """Times from much noise to a little, sigma above 0 at the end."""
    if name == "edm":
        schedule = make_schedule(name, 1.0)
        return np.asarray(schedule.time_of(jnp.asarray(-8 * np.log(np.linspace(8.0**0.25, 0.1**0.25, steps + 1)))))
    if name == "rectified_flow":
        return np.linspace(0.9, 0.1, steps + 1).astype(np.float32)
    ratio = np.linspace(8.0**0.25, 0.1**0.25, steps + 1) ** 4
    table = make_schedule(name, 1.0).ratio
    return np.interp(ratio, table, np.linspace(0, 1, len(table))).astype(np.float32)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "edm", "rectified_flow"])
def test_order_of_convergence(name):
    """Euler's error falls like steps^-1, those of Heun and of dpmpp_2m like steps^-2."""
    process = Process(make_schedule(name, 1.0), "x0")
    denoise = make_denoise(process)
    x_start = np.linspace(-2, 2, 16, dtype=np.float32).reshape(16, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 16)
    ends = smooth_grid(name, 1)
    alpha, sigma = (np.asarray(f(ends), np.float64) for f in (process.schedule.alpha, process.schedule.sigma))
    exact = alpha[1] * runge_kutta(x_start / alpha[0], *(sigma / alpha))

    counts, errors = [20, 40, 80, 160], []
    for steps in counts:
        grid = smooth_grid(name, steps)
        both = jax.jit(
            lambda x, grid=grid, steps=steps: [
                samplers.run(make(process, grid), keys, x, grid, [(0, steps, denoise)])
                for make in (samplers.euler, samplers.heun, samplers.dpmpp_2m)
            ]
        )(x_start)
        errors.append([np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)) for x in both])
    orders = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    np.testing.assert_allclose(orders, [1, 2, 2], atol=0.2, err_msg=f"errors of euler, heun, dpmpp_2m: {errors}")


def gaussian_denoise(process, mean, std):
    def denoise(x_t, t):
        alpha, sigma = process.schedule.alpha(t)[:, None, None, None], process.schedule.sigma(t)[:, None, None, None]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return process.from_x0(mean + gain * (x_t - alpha * mean), x_t, t)

    return denoise


def make_sampler(name, process, grid):
    if name.startswith("ddim"):
        return samplers.ddim(process, grid, float(name[4:]))
    return getattr(samplers, name)(process, grid)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("ddpm", "linear"), ("ddpm", "rectified_flow"), ("ddim0.5", "cosine"), ("heun", "rectified_flow"),
     ("dpmpp_2m", "rectified_flow"), ("dpmpp_2m", "edm"), ("euler_ancestral", "edm")],
)  # fmt: skip
def test_samplers_draw_a_gaussian_from_its_exact_denoiser(name, schedule):
    process = Process(make_schedule(schedule, 1.0), "x0")
    grid = uniform(process.schedule, 250)
    sampler = make_sampler(name, process, grid)
    denoise = gaussian_denoise(process, mean=0.7, std=0.5)
    keys = jax.random.split(jax.random.key(5), 64)
    draw = jax.jit(
        lambda keys: samplers.run(sampler, keys, samplers.draw_prior(keys, (8, 8, 2)), grid, [(0, 250, denoise)])
    )
    x = np.asarray(draw(keys))
    assert abs(x.mean() - 0.7) < 0.02
    assert abs(x.std() - 0.5) < 0.03  # with 250 steps the posterior's variance is a little small


STEPS = 6


def wavy(process):
    """Something in place of a network that treats no two places alike."""

    def denoise(x_t, t):
        wave = jnp.sin(jnp.arange(x_t[0].size, dtype=jnp.float32)).reshape(1, *x_t.shape[1:])
        return process.from_x0(jnp.tanh(1.3 * x_t + wave) * (1 - 0.5 * t[:, None, None, None]), x_t, t)

    return denoise


KEYS = jax.random.split(jax.random.key(8), 3)
CURVED = Process(make_schedule("scaled_linear", 1.0), "v")
STRAIGHT = Process(make_schedule("rectified_flow", 1.0), "flow")


def draw(name, process, keys, segments=None):
    grid = uniform(process.schedule, STEPS)
    sampler = make_sampler(name, process, grid)
    segments = segments or [(0, STEPS, wavy(process))]
    return jax.jit(lambda keys: samplers.run(sampler, keys, samplers.draw_prior(keys, (4, 4, 2)), grid, segments))(keys)


ALL = ["ddpm", "ddim0.5", "dpmpp_2m", "euler", "euler_ancestral", "heun"]


@pytest.mark.parametrize(("name", "process"), list(zip(ALL, 3 * [CURVED, STRAIGHT], strict=True)))
def test_an_image_is_the_same_alone_and_in_a_batch(name, process):
    together = draw(name, process, KEYS)
    np.testing.assert_allclose(draw(name, process, KEYS[1:2])[0], together[1], rtol=1e-5, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_an_image_is_the_same_on_one_device_and_on_two(name):
    keys = jax.random.split(jax.random.key(8), 4)
    mesh = make_mesh(jax.devices()[:2])
    spread = draw(name, CURVED, jax.device_put(keys, batch_sharding(mesh)))
    assert {shard.data.shape[0] for shard in spread.addressable_shards} == {2}  # each device drew its own half
    np.testing.assert_allclose(spread, draw(name, CURVED, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "process"), [("ddpm", STRAIGHT), ("heun", CURVED), ("dpmpp_2m", STRAIGHT)])
def test_segments_are_one_walk(name, process):
    denoise = wavy(process)
    cut = draw(name, process, KEYS, [(0, 2, denoise), (2, 3, denoise), (3, STEPS, denoise)])
    np.testing.assert_allclose(cut, draw(name, process, KEYS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_each_segment_uses_its_own_denoise(name):
    def black(x_t, t):
        return CURVED.from_x0(jnp.zeros_like(x_t), x_t, t)

    x = draw(name, CURVED, KEYS, [(0, STEPS - 1, wavy(CURVED)), (STEPS - 1, STEPS, black)])
    np.testing.assert_array_equal(x, np.zeros_like(x))  # the last step returns x0


def posterior_by_hand(schedule, t, s, x_t, x0):
    """Mean and both bounds of the variance of a reverse step, as Nichol and Dhariwal 2021, eqs. 10 to 15; float64."""
    a_t, a_s, s_t, s_s = (
        float(f(time)) for f in (schedule.alpha, schedule.sigma) for time in (jnp.float32(t), jnp.float32(s))
    )
    forward = a_t / a_s  # x_t = forward x_s + noise of variance added
    added = s_t**2 - forward**2 * s_s**2
    mean = forward * s_s**2 / s_t**2 * x_t + a_s * added / s_t**2 * x0
    return mean, added * s_s**2 / s_t**2, added


@pytest.mark.parametrize("process", [CURVED, STRAIGHT])
def test_step_k_of_image_i_draws_from_its_key_folded_by_k(process):
    """The run by hand: the posterior of DDPM in its own words, and the keys of the contract."""
    schedule, denoise, grid = process.schedule, wavy(process), uniform(process.schedule, STEPS)
    x = np.asarray(samplers.draw_prior(KEYS, (4, 4, 2)), np.float64)
    for k in range(STEPS):
        t, s = grid[k], grid[k + 1]
        x0 = np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(3, t)).x0, np.float64)
        z = np.stack([jax.random.normal(jax.random.fold_in(key, k), (4, 4, 2)) for key in KEYS])
        mean, variance, _ = posterior_by_hand(schedule, t, s, x, x0)
        x = mean + np.sqrt(variance) * z
    np.testing.assert_allclose(draw("ddpm", process, KEYS), x, rtol=1e-4, atol=1e-4)


def with_variance(process, variance):
    def denoise(x_t, t):
        return wavy(process)(x_t, t)._replace(variance=variance(x_t))

    return [(0, STEPS, denoise)]


@pytest.mark.parametrize("process", [CURVED, STRAIGHT])
def test_ddpm_draws_with_the_variance_between_its_bounds(process):
    grid, sampler = uniform(process.schedule, STEPS), samplers.ddpm(process, uniform(process.schedule, STEPS))
    ((_, _, denoise),) = with_variance(process, jnp.sin)
    x = jax.random.normal(jax.random.key(3), (3, 4, 4, 2))
    z = np.stack([jax.random.normal(key, (4, 4, 2)) for key in KEYS])
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x_next, _ = sampler.step(denoise, KEYS, x, jnp.float32(t), jnp.float32(s), ())
        mean, least, most = posterior_by_hand(process.schedule, t, s, x, denoise(x, jnp.full(3, t)).x0)
        v = np.sin(np.asarray(x, np.float64))
        std = np.sqrt(most**v * least ** (1 - v)) if s > 0 else 0.0
        np.testing.assert_allclose(x_next, mean + std * z, rtol=1e-4, atol=1e-4, err_msg=f"{t} to {s}")


@pytest.mark.parametrize("process", [CURVED, STRAIGHT])
def test_the_smallest_variance_is_that_of_ancestral_sampling_bit_for_bit(process):
    smallest, largest = (
        draw("ddpm", process, KEYS, with_variance(process, f)) for f in (jnp.zeros_like, jnp.ones_like)
    )
    np.testing.assert_array_equal(smallest, draw("euler_ancestral", process, KEYS))
    np.testing.assert_array_equal(smallest, draw("ddpm", process, KEYS))
    assert np.abs(largest - smallest).max() > 0.01


@pytest.mark.parametrize("name", ["ddim0.0", "ddim0.5", "dpmpp_2m", "euler", "euler_ancestral", "heun"])
def test_samplers_but_ddpm_do_not_ask_for_the_variance(name):
    np.testing.assert_array_equal(
        draw(name, STRAIGHT, KEYS, with_variance(STRAIGHT, jnp.cos)), draw(name, STRAIGHT, KEYS)
    )


@pytest.mark.parametrize(("name", "evaluations"), [("ddim0.5", 1), ("dpmpp_2m", 1), ("euler", 1), ("heun", 2)])
def test_evaluations_a_step(name, evaluations):
    calls = []

    def counted(x_t, t):
        jax.debug.callback(lambda: calls.append(1))
        return wavy(STRAIGHT)(x_t, t)

    jax.block_until_ready(draw(name, STRAIGHT, KEYS, [(0, STEPS, counted)]))
    jax.effects_barrier()
    assert len(calls) == STEPS * evaluations


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("name", ["ddim0.5", "dpmpp_2m", "heun"])
def test_runs_from_pure_noise_are_finite_for_every_prediction_but_epsilon(name, schedule):
    for prediction in ["x0", "v", "flow"]:
        process = Process(make_schedule(schedule, 1.0), prediction)

        def denoise(x_t, t, process=process):
            return process.convert(0.5 * jnp.tanh(x_t), x_t, t)

        assert np.all(np.isfinite(draw(name, process, KEYS, [(0, STEPS, denoise)])))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
def test_epsilon_is_refused_where_it_cannot_see_x0(name, schedule):
    process = Process(make_schedule(schedule, 1.0), "epsilon")
    with pytest.raises(ValueError, match=r"predicts epsilon cannot start at t = 1 .*prediction v or flow.*smaller t"):
        make_sampler(name, process, uniform(process.schedule, 10))
    make_sampler(name, process, uniform(process.schedule, 10)[1:])  # starting later is possible
    jax.jit(lambda: make_sampler(name, process, uniform(process.schedule, 10)[1:]) and 0)()  # inside a jit too


def test_epsilon_starts_at_one_where_the_schedule_leaves_some_picture():
    for schedule in ["linear", "scaled_linear"]:
        process = Process(make_schedule(schedule, 1.0), "epsilon")
        samplers.euler(process, uniform(process.schedule, 10))


def test_eta_outside_its_range_is_refused():
    process = Process(make_schedule("linear", 1.0), "v")
    with pytest.raises(ValueError, match="between 0 and 1, not 1.5"):
        samplers.ddim(process, uniform(process.schedule, 10), 1.5)


@pytest.mark.parametrize("bounds", [[(0, 5)], [(0, 3), (4, 6)], [(0, 4), (3, 6)], [(3, 6), (0, 3)]])
def test_segments_that_do_not_cover_the_steps_are_refused(bounds):
    with pytest.raises(ValueError, match="must cover each of the grid's 6 steps once, in order"):
        draw("euler", CURVED, KEYS, [(first, last, wavy(CURVED)) for first, last in bounds])


def test_the_prior_is_standard_normal_and_no_step_draws_it_again():
    many = jax.random.split(jax.random.key(9), 64)
    prior = np.asarray(samplers.draw_prior(many, (8, 8, 4)))
    assert abs(prior.mean()) < 0.02 and abs(prior.std() - 1) < 0.02
    np.testing.assert_array_equal(samplers.draw_prior(many[3:4], (8, 8, 4))[0], prior[3])
    steps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(many[3], k), (8, 8, 4)))(jnp.arange(50))
    for step in np.asarray(steps):
        assert abs(np.corrcoef(prior[3].ravel(), step.ravel())[0, 1]) < 0.3
