"""The step against its own definition, on a model of a few hundred parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.diffusion.objectives import min_snr, stratified
from dit_jax.sharding import make_mesh, put_batch, replicated
from tests.toy import Toy
from tests.toy_step import B, make_batch, make_state, make_step


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(dropout=0.0)


@pytest.fixture(scope="module")
def batch(toy) -> dict:
    return make_batch(toy)


@pytest.fixture(scope="module")
def plain(toy, batch):
    step = make_step(toy)
    return jax.jit(step)(make_state(toy, step), batch)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


def test_one_step_is_the_written_definition(toy, batch, plain):
    """Loss, update and average, computed again by hand from the same keys."""
    state, metrics = plain
    key_samples, key_dropout = jax.random.split(jax.random.key(3))
    x0, x_t, targets, times, dropped = [], [], [], [], []
    for i in range(B):
        keys = jax.random.split(jax.random.fold_in(key_samples, 100 * B + i), 4)
        shape = batch["mean"][i].shape
        x0.append(2.0 * (batch["mean"][i] + batch["std"][i] * jax.random.normal(keys[0], shape)))
        times.append(1.0 - jax.random.uniform(keys[1]))
        noise = jax.random.normal(keys[2], shape)
        x_t.append((1 - times[i]) * x0[i] + times[i] * noise)
        targets.append(noise - x0[i])
        dropped.append(bool(jax.random.bernoulli(keys[3], 0.5)))
    assert any(dropped) and not all(dropped)

    def loss(params):
        null = toy.model.apply({"params": params}, B, method="null_text")
        pick = np.array(dropped)
        text = type(null)(*(
            jnp.where(pick.reshape(B, *[1] * (n.ndim - 1)), n, jnp.asarray(batch[name]))
            for name, n in null._asdict().items()
        ))  # fmt: skip
        out = toy.apply(params, jnp.stack(x_t), jnp.stack(times), text)
        return jnp.square(out - jnp.stack(targets)).mean()

    value, gradient = jax.value_and_grad(loss)(toy.params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, toy.params, gradient)
    assert_close(state.params, params)
    assert_close(state.ema, jax.tree.map(lambda p: 0.1 * p, params))  # decay 0.9 from an average of zero
    assert int(state.step) == 101
    del key_dropout


def test_accumulation_and_devices_change_nothing(toy, batch, plain):
    step = make_step(toy, accumulate=2)
    assert_close(jax.jit(step)(make_state(toy, step), batch), plain)

    mesh = make_mesh(jax.devices()[:2])
    step = make_step(toy)
    state = jax.device_put(make_state(toy, step), replicated(mesh))
    spread = jax.jit(step)(state, put_batch(batch, mesh))
    assert len(spread[0].params["pos_embed"]["table"].sharding.device_set) == 2
    assert_close(spread, plain)


def test_strata_and_weights_are_of_the_whole_batch(toy, batch, plain):
    """Slices of a batch share its strata; and a weight of the time acts on the loss of its own sample."""
    process = make_step(toy).process
    options = {"sample_times": stratified(process.schedule, B), "weight": min_snr(process, 5.0)}
    whole, cut = (make_step(toy, accumulate=accumulate, **options) for accumulate in (1, 2))
    found = jax.jit(whole)(make_state(toy, whole), batch)
    assert_close(jax.jit(cut)(make_state(toy, cut), batch), found)
    assert abs(float(found[1]["loss"]) - float(plain[1]["loss"])) > 1e-3


def test_a_learned_variance_adds_its_loss_which_no_weight_weighs(batch):
    wide = Toy(dropout=0.0, out_channels=6)
    keys, places = jax.random.split(jax.random.key(0), B), jnp.zeros(B)

    def loss(**changes):
        step = make_step(wide, **changes)
        return float(jax.jit(step.loss)(wide.params, batch, keys, places, jax.random.key(1)))

    bound = loss(variance_weight=1.0, weight=jnp.zeros_like)
    assert bound > 0 and loss(variance_weight=0.5, weight=jnp.zeros_like) == pytest.approx(0.5 * bound, rel=1e-5)
    assert loss(variance_weight=0.25) == pytest.approx(loss(variance_weight=0.0) + 0.25 * bound, rel=1e-5)


def test_randomness_is_of_the_step_and_the_seed(toy, batch, plain):
    for step, at in ((make_step(toy), 101), (make_step(toy, seed=4), 100)):
        _, metrics = jax.jit(step)(make_state(toy, step, at), batch)
        assert abs(float(metrics["loss"]) - float(plain[1]["loss"])) > 1e-3


def test_dropped_captions_are_never_read(toy, batch):
    step = make_step(toy, caption_dropout=1.0)
    function = jax.jit(step)
    other = {**batch, "hidden": batch["hidden"] + 1.0, "pooled": batch["pooled"] - 1.0}
    for a, b in zip(*(jax.tree.leaves(function(make_state(toy, step), x)) for x in (batch, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_average_warms_up(toy, batch):
    """At step 0 the decay is 1 / 10, whatever ema_decay says."""
    step = make_step(toy, ema_decay=0.9999)
    state, _ = jax.jit(step)(make_state(toy, step, at=0), batch)
    assert_close(state.ema, jax.tree.map(lambda p: 0.9 * p, state.params))


def test_masked_tokens_behind_the_longest_caption_can_be_left_out(toy, batch):
    step = make_step(toy)
    short = batch["mask"].shape[1] - 1
    masked = {**batch, "mask": batch["mask"] & (np.arange(short + 1) < short)}
    trimmed = {**masked, "hidden": masked["hidden"][:, :short], "mask": masked["mask"][:, :short]}
    keys, places = jax.random.split(jax.random.key(0), B), jnp.zeros(B)
    losses = [jax.jit(step.loss)(toy.params, b, keys, places, jax.random.key(1)) for b in (masked, trimmed, batch)]
    assert np.isclose(losses[0], losses[1], rtol=1e-6) and not np.isclose(losses[0], losses[2], rtol=1e-6)
