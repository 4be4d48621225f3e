"""What is saved comes back bit for bit, and what is missing or of another model is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.errors import CheckpointError
from dit_jax.training.checkpoint import ITEMS, Checkpoints, find_step, restore_item
from dit_jax.training.loss_scale import LossScale
from dit_jax.training.state import TrainState


def make_state(step: int, width: int = 3) -> TrainState:
    params = {"a": {"kernel": jax.random.normal(jax.random.key(step), (2, width))}}
    optimizer = optax.adam(0.1)
    ema = jax.tree.map(lambda p: p / 3, params)
    scale = LossScale(jnp.float32(2.0**step), jnp.int32(step + 1), jnp.int32(step + 2))
    return TrainState(jnp.int32(step), params, ema, optimizer.init(params), scale)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep_latest=2, keep_every=4)
    commits = []
    for step in range(1, 8):
        checkpoints.save(make_state(step), {"step": step})
        checkpoints.wait()
        commits.append(checkpoints.committed())
    yield folder, checkpoints, commits
    checkpoints.close()


def test_the_newest_and_the_multiples_are_kept(saved):
    folder, checkpoints, commits = saved
    assert sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == [4, 6, 7]
    assert checkpoints.latest_step() == 7
    assert [commit.step for commit in commits] == list(range(1, 8)) and commits[0].bytes > 0
    assert checkpoints.committed() is None


def test_a_state_comes_back_bit_for_bit(saved):
    _, checkpoints, _ = saved
    for step in (4, 7):
        restored = checkpoints.restore(step, make_state(99))
        expected = make_state(step)
        assert jax.tree.structure(restored) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_parameters_alone(saved):
    folder, _, _ = saved
    shapes = jax.eval_shape(lambda: make_state(7).params)
    jax.tree.map(np.testing.assert_array_equal, restore_item(folder, 7, "ema", shapes), make_state(7).ema)
    jax.tree.map(np.testing.assert_array_equal, restore_item(folder, 7, "params", shapes), make_state(7).params)


def test_what_is_missing_or_of_another_model_is_an_error(saved, tmp_path):
    folder, checkpoints, _ = saved
    assert find_step(folder, None, "full", ITEMS)[0].step == 7 and find_step(folder, 4, "full", ITEMS)[0].step == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 .*there are 4, 6, 7"):
        find_step(folder, 5, "full", ITEMS)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_step(tmp_path, None, "full", ITEMS)
    with pytest.raises(CheckpointError, match="cannot restore .*/7: "):
        checkpoints.restore(7, make_state(7, width=5))
    with pytest.raises(CheckpointError, match="cannot restore .*/5: "):
        checkpoints.restore(5, make_state(7))
