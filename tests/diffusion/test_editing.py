"""Laws of editing: where a run that starts from a picture begins, and that what is kept is kept to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import editing, guidance, samplers
from dit_jax.diffusion.grids import uniform
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule
from tests.diffusion.test_samplers import CURVED, KEYS, STEPS, STRAIGHT, make_sampler, wavy

SHAPE = (4, 4, 2)
KNOWN = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SHAPE)), jnp.float32)
KEEP = jnp.asarray(np.random.default_rng(1).random((1, 4, 4, 1)) < 0.5)
EVERY_SAMPLER = ["ddpm", "ddim0.5", "dpmpp_2m", "euler", "euler_ancestral", "heun"]


def edit(name, process, first, denoise, keep=None, segments=None, known=KNOWN):
    """A whole edited run from step ``first``."""
    grid = uniform(process.schedule, STEPS)
    sampler = make_sampler(name, process, grid[first:])
    segments = editing.from_step(segments or [(0, STEPS, denoise)], first)

    def run(keys):
        x = editing.start(process, known, samplers.draw_prior(keys, SHAPE), grid, first)
        if keep is None:
            return samplers.run(sampler, keys, x, grid, segments)
        kept = [(a, b, editing.keep_known(denoise, process, known, keep)) for a, b, denoise in segments]
        return editing.paste(samplers.run(sampler, keys, x, grid, kept), known, keep)

    return np.asarray(jax.jit(run)(KEYS))


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(50, 1.0, 0), (50, 0.0, 50), (50, 0.6, 20), (10, 0.25, 7), (10, 0.24, 8), (1, 0.5, 0), (1, 0.49, 1)],
)
def test_the_grid_is_entered_after_the_share_of_steps_that_strength_leaves_out(steps, strength, first):
    assert editing.first_step(steps, strength) == first


@pytest.mark.parametrize("process", [CURVED, STRAIGHT], ids=["scaled_linear", "rectified_flow"])
def test_a_run_starts_from_the_picture_with_the_noise_of_its_step(process):
    grid, prior = uniform(process.schedule, STEPS), samplers.draw_prior(KEYS, SHAPE)
    for first in range(1, STEPS + 1):
        x = np.asarray(editing.start(process, KNOWN, prior, grid, first))
        t = jnp.full(len(KEYS), grid[first])
        alpha, sigma = (np.asarray(f(t)).reshape(-1, 1, 1, 1) for f in (process.schedule.alpha, process.schedule.sigma))
        np.testing.assert_allclose(x, alpha * np.asarray(KNOWN) + sigma * np.asarray(prior), atol=1e-6)


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_strength_one_knows_nothing_of_the_picture_and_zero_asks_nothing_of_the_network(name):
    full = edit(name, CURVED, 0, wavy(CURVED))
    np.testing.assert_array_equal(full, edit(name, CURVED, 0, wavy(CURVED), known=KNOWN + 1))
    grid = uniform(CURVED.schedule, STEPS)
    plain = samplers.run(make_sampler(name, CURVED, grid), KEYS, samplers.draw_prior(KEYS, SHAPE), grid,
                         [(0, STEPS, wavy(CURVED))])  # fmt: skip
    np.testing.assert_allclose(full, plain, atol=1e-5)

    def unasked(x_t, t):
        raise AssertionError("the network was asked")

    nothing = edit(name, CURVED, STEPS, unasked)
    np.testing.assert_array_equal(nothing, np.broadcast_to(KNOWN, nothing.shape))


@pytest.mark.parametrize("name", [name for name in EVERY_SAMPLER if name != "dpmpp_2m"])  # which remembers a step
def test_a_late_start_on_the_way_of_a_whole_run_goes_on_like_it(name):
    """Steps keep their numbers, and so their fresh noise."""
    grid = uniform(CURVED.schedule, STEPS)
    sampler = make_sampler(name, CURVED, grid)
    x = samplers.draw_prior(KEYS, SHAPE)
    half = samplers.run(sampler, KEYS, x, grid[:3], [(0, 2, wavy(CURVED))])
    whole = samplers.run(sampler, KEYS, x, grid, [(0, STEPS, wavy(CURVED))])
    rest = samplers.run(sampler, KEYS, half, grid, editing.from_step([(0, STEPS, wavy(CURVED))], 2))
    np.testing.assert_allclose(rest, whole, atol=1e-5)


def test_what_is_left_of_segments():
    a, b, c = wavy(CURVED), wavy(STRAIGHT), wavy(CURVED)
    whole = [(0, 2, a), (2, 5, b), (5, 6, c)]
    assert editing.from_step(whole, 0) == whole
    assert editing.from_step(whole, 2) == whole[1:]
    assert editing.from_step(whole, 3) == [(3, 5, b), (5, 6, c)]
    assert editing.from_step(whole, 6) == []


@pytest.mark.parametrize("process", [CURVED, STRAIGHT], ids=["scaled_linear", "rectified_flow"])
@pytest.mark.parametrize("name", EVERY_SAMPLER)
@pytest.mark.parametrize("first", [0, 3])
def test_kept_latents_are_the_known_ones_bit_for_bit_and_the_others_are_drawn(name, process, first):
    x = edit(name, process, first, wavy(process), KEEP)
    known, keep = np.broadcast_to(KNOWN, x.shape), np.broadcast_to(KEEP, x.shape)
    np.testing.assert_array_equal(x[keep], known[keep])
    assert (x[~keep] != known[~keep]).all()


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_kept_latents_are_exact_with_guidance_in_an_interval(name):
    def predict(x_t, t, text):
        return jnp.tanh(1.3 * x_t + text)

    texts = [jnp.full((len(KEYS), 1, 1, 1), value) for value in (0.4, -0.2)]
    guided = guidance.classifier_free(predict, CURVED, *texts, jnp.float32(5.0))
    plain = guidance.conditional(predict, CURVED, texts[0])
    grid = uniform(CURVED.schedule, STEPS)
    segments = guidance.segments(grid, (0.3, 0.8), guided, plain)
    assert len(segments) == 3
    x = edit(name, CURVED, 0, None, KEEP, segments)
    known, keep = np.broadcast_to(KNOWN, x.shape), np.broadcast_to(KEEP, x.shape)
    np.testing.assert_array_equal(x[keep], known[keep])
    unguided = edit(name, CURVED, 0, plain, KEEP)
    assert np.abs(x - unguided)[~keep].max() > 0.01


@pytest.mark.parametrize("process", [CURVED, STRAIGHT], ids=["scaled_linear", "rectified_flow"])
def test_all_targets_follow_the_known_picture_where_it_is_kept(process):
    """Derived again: at x_t = alpha x0 + sigma epsilon of the known x0, the answer there is the truth."""
    t = jnp.asarray([0.2, 0.5, 0.9])
    known = jnp.broadcast_to(KNOWN, (3, *SHAPE))
    x_t, truth = process.corrupt(KEYS, known, t)
    base = wavy(process)
    found = editing.keep_known(base, process, known, KEEP)(x_t, t)
    keep = np.broadcast_to(KEEP, x_t.shape)
    for name in ("x0", "epsilon", "v", "flow"):
        value, true, before = (np.asarray(getattr(one, name)) for one in (found, truth, base(x_t, t)))
        np.testing.assert_allclose(value[keep], true[keep], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(value[~keep], before[~keep], atol=1e-4, err_msg=name)


def test_a_predicted_variance_counts_only_where_it_is_drawn():
    def denoise(x_t, t):
        return wavy(CURVED)(x_t, t)._replace(variance=x_t)

    x = samplers.draw_prior(KEYS, SHAPE)
    found = editing.keep_known(denoise, CURVED, KNOWN, KEEP)(x, jnp.full(3, 0.5))
    np.testing.assert_array_equal(found.variance, np.where(KEEP, 0.0, x))


def test_the_network_sees_the_kept_part_beside_the_one_it_draws():
    def mean_of_all(x_t, t):
        return CURVED.from_x0(jnp.broadcast_to(x_t.mean((1, 2, 3), keepdims=True), x_t.shape), x_t, t)

    drawn = [edit("euler", CURVED, 0, mean_of_all, KEEP, known=known) for known in (KNOWN, KNOWN + 3)]
    keep = np.broadcast_to(KEEP, drawn[0].shape)
    assert (drawn[1][~keep] > drawn[0][~keep] + 0.1).all()


def test_a_latent_is_kept_only_if_none_of_its_pixels_is_drawn_anew():
    redraw = np.zeros((4, 8), bool)
    redraw[1, 2] = redraw[3, 7] = True
    assert editing.kept_latents(redraw, 2).tolist() == [[True, False, True, True], [True, True, True, False]]


def test_a_model_that_predicts_epsilon_may_start_where_there_is_picture():
    """cosine has none at t = 1, where such a model is refused."""
    process = Process(make_schedule("cosine", 1.0), "epsilon")
    grid = uniform(process.schedule, STEPS)
    with pytest.raises(ValueError, match="cannot start at t = 1 of"):
        samplers.euler(process, grid)
    assert np.isfinite(edit("euler", process, editing.first_step(STEPS, 0.6), wavy(process))).all()
