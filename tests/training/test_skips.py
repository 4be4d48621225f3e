"""A step that is not finite moves on the run and nothing else, and is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.training.loss_scale import FLOOR, LossScale
from dit_jax.training.skips import Skips
from tests.toy import Toy
from tests.toy_step import CALM, make_batch, make_state, make_step

BAD = float("inf")


@pytest.fixture(scope="module", params=[jnp.float32, jnp.float16], ids=["float32", "float16"])
def adam(request):
    """A toy, a step whose optimizer and schedule remember and move, its compiled form, and a batch."""
    toy = Toy(seed=5, dropout=0.0, dtype=request.param)
    step = make_step(toy, optimizer=optax.adam(1.0), learning_rate=lambda n: 0.01 * n)
    return toy, step, jax.jit(step), make_batch(toy)


def state_with(toy, step, scale: float = CALM, in_a_row: int = 0):
    loss_scale, skips = LossScale(jnp.float32(scale), jnp.int32(5)), Skips(jnp.int32(7), jnp.int32(in_a_row))
    return make_state(toy, step).replace(loss_scale=loss_scale, skips=skips)


@pytest.mark.parametrize("key", ["mean", "hidden"])
def test_the_run_after_a_bad_step_is_the_run_that_was_told_to_leave_it_out(adam, key):
    """But for the global step, what is counted, and the loss scale."""
    toy, step, function, batch = adam
    state = state_with(toy, step)
    after, metrics = function(state, {**batch, key: batch[key] + BAD})
    assert int(after.step) == int(state.step) + 1 and int(after.skips.total) == int(metrics["skipped"]) == 8
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))

    good, metrics = function(after, batch)
    told = state.replace(step=state.step + 1, loss_scale=after.loss_scale, skips=after.skips)
    jax.tree.map(np.testing.assert_array_equal, good, function(told, batch)[0])
    assert float(metrics["learning_rate"]) == pytest.approx(0.01 * (100 + 1))  # of the global step
    assert int(good.opt_state[0].count) == 1  # of the updates made
    assert int(good.skips.total) == int(metrics["skipped"]) == 8 and int(good.skips.in_a_row) == 0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), good.params, after.params)
    assert max(jax.tree.leaves(moved)) > 0.1


def test_bad_steps_in_a_row_are_counted_and_overflows_are_not(adam):
    toy, step, function, batch = adam
    bad = {**batch, "mean": batch["mean"] + BAD}
    float16 = toy.model.dtype == jnp.float16
    for scale, in_a_row, expected in ((CALM, 3, 3 if float16 else 4), (FLOOR, 3, 4), (CALM, 0, 0 if float16 else 1)):
        after, metrics = function(state_with(toy, step, scale, in_a_row), bad)
        assert int(after.skips.in_a_row) == int(metrics["skipped_in_a_row"]) == expected
