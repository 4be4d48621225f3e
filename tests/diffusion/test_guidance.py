"""Laws of guidance: one pass or two, the formula in every channel, and what the second text is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.guidance import NO_CORRECTION, Correction, classifier_free, conditional, guide, segments
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule

B, C = 3, 4
X_T = jax.random.normal(jax.random.key(0), (B, 2, 2, C))
T = jnp.array([0.2, 0.5, 0.8])
TEXT = {"pooled": jax.random.normal(jax.random.key(1), (B, C)), "mask": jnp.ones((B, 5), bool)}
NULL = {"pooled": jax.random.normal(jax.random.key(2), (B, C)), "mask": jnp.zeros((B, 5), bool)}


class Network:
    """Predicts from text, time and x_t, differently in every channel; notes the batch of every call."""

    def __init__(self, out_channels=C):
        self.batches = []
        self.weight = jax.random.normal(jax.random.key(3), (C, out_channels))

    def __call__(self, x_t, t, text):
        self.batches.append(x_t.shape[0])
        assert {leaf.shape[0] for leaf in jax.tree.leaves((x_t, t, text))} == {x_t.shape[0]}
        masked = text["pooled"] * (1 + text["mask"].sum(1))[:, None]
        return jnp.tanh((x_t + (masked + t[:, None])[:, None, None]) @ self.weight)


def process_of(prediction, schedule="rectified_flow"):
    return Process(make_schedule(schedule, 1.0), prediction)


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_is_the_conditional_network_bit_for_bit_in_one_pass(scale):
    process, network = process_of("flow"), Network()
    guided = jax.jit(classifier_free(network, process, TEXT, NULL, scale))(X_T, T)
    assert network.batches == [B]
    plain = jax.jit(conditional(network, process, TEXT))(X_T, T)
    for a, b in zip(guided[:4], plain[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_scales_ask_once_with_both_halves():
    network = Network()
    jax.jit(classifier_free(network, process_of("flow"), TEXT, NULL, 4.0))(X_T, T)
    assert network.batches == [2 * B]


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("x0", "scaled_linear"), ("epsilon", "linear"), ("v", "rectified_flow"), ("flow", "rectified_flow")],
)
def test_guided_targets_are_the_formula_in_all_channels(prediction, schedule):
    process, network = process_of(prediction, schedule), Network()
    guided = jax.jit(classifier_free(network, process, TEXT, NULL, 3.5))(X_T, T)
    c = jax.jit(conditional(network, process, TEXT))(X_T, T)
    u = jax.jit(conditional(network, process, NULL))(X_T, T)
    for target in ["x0", "epsilon", "v", "flow"]:
        g, with_text, without = (np.asarray(getattr(each, target)) for each in (guided, c, u))
        for channel in range(C):
            expected = without[..., channel] + 3.5 * (with_text[..., channel] - without[..., channel])
            np.testing.assert_allclose(g[..., channel], expected, rtol=1e-3, atol=1e-4)
            assert np.abs(g[..., channel] - with_text[..., channel]).max() > 0.01


def test_a_negative_text_equal_to_the_text_changes_nothing():
    process, network = process_of("v"), Network()
    guided = jax.jit(classifier_free(network, process, TEXT, TEXT, 7.0))(X_T, T)
    plain = jax.jit(conditional(network, process, TEXT))(X_T, T)
    np.testing.assert_allclose(guided.x0, plain.x0, rtol=1e-5, atol=1e-5)


def test_a_traced_scale_guides_like_a_static_one_without_compiling_again():
    process, network = process_of("flow"), Network()
    denoise = jax.jit(lambda scale: classifier_free(network, process, TEXT, NULL, scale)(X_T, T).x0)
    for scale in [0.0, 1.0, 4.0]:
        static = jax.jit(classifier_free(Network(), process, TEXT, NULL, scale))(X_T, T).x0
        np.testing.assert_allclose(denoise(scale), static, rtol=1e-5, atol=1e-5)
    assert network.batches == [2 * B]


def guided_by_hand(c, u, g, rescale, parallel, norm):
    """Sadat et al. 2024, algorithm 1 without momentum, then Lin et al. 2023, eqs. 15 and 16; one sample, float64."""
    d = c - u
    if norm:
        d = d * min(1, norm / np.linalg.norm(d))
    unit = c / np.linalg.norm(c)
    along = np.sum(d * unit) * unit
    x = c + (g - 1) * (d - along + parallel * along)
    return rescale * x * c.std() / x.std() + (1 - rescale) * x


@pytest.mark.parametrize(
    ("rescale", "parallel", "norm"), [(0.7, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.8), (0.4, 0.3, 1.1)]
)
def test_corrections_are_their_papers_and_combine(rescale, parallel, norm):
    process, network = process_of("v"), Network()
    c, u = (np.asarray(jax.jit(conditional(network, process, text))(X_T, T).x0, np.float64) for text in (TEXT, NULL))
    correction = Correction(rescale, parallel, norm)
    guided = jax.jit(classifier_free(network, process, TEXT, NULL, 5.0, correction))(X_T, T)
    expected = np.stack([guided_by_hand(a, b, 5.0, rescale, parallel, norm) for a, b in zip(c, u, strict=True)])
    np.testing.assert_allclose(guided.x0, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(guided.x0 - guide(c, u, 5.0, NO_CORRECTION)).max() > 0.01


def test_a_corrected_scale_of_one_is_still_the_conditional_network():
    c, u = jax.random.normal(jax.random.key(4), (2, B, 2, 2, C))
    np.testing.assert_allclose(guide(c, u, 1.0, Correction(0.5, 0.2, 0.1)), c, rtol=1e-6)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.0, 1.0), [(0, 4, "guided")]),
        ((0.5, 0.75), [(0, 1, "plain"), (1, 3, "guided"), (3, 4, "plain")]),
        ((0.6, 1.0), [(0, 2, "guided"), (2, 4, "plain")]),
        ((0.8, 0.9), [(0, 4, "plain")]),
    ],
)
def test_the_interval_cuts_the_steps_into_segments(interval, expected):
    grid = np.array([1, 0.75, 0.5, 0.25, 0], np.float32)
    assert segments(grid, interval, "guided", "plain") == expected


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_variance_channels_are_off_before_guidance(scale):
    process, wide = process_of("epsilon"), Network(out_channels=2 * C)

    def narrow(x_t, t, text):
        return wide(x_t, t, text)[..., :C]

    a = jax.jit(classifier_free(wide, process, TEXT, NULL, scale))(X_T, T)
    b = jax.jit(classifier_free(narrow, process, TEXT, NULL, scale))(X_T, T)
    np.testing.assert_allclose(a.x0, b.x0, rtol=1e-6, atol=1e-6)
    assert b.variance is None


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_learned_variance_is_that_of_the_text(scale):
    network = Network(out_channels=2 * C)
    found = jax.jit(classifier_free(network, process_of("v"), TEXT, NULL, scale))(X_T, T)
    np.testing.assert_allclose(found.variance, (network(X_T, T, TEXT)[..., C:] + 1) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(found.variance - (network(X_T, T, NULL)[..., C:] + 1) / 2).max() > 0.01
