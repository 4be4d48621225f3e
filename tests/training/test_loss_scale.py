"""Float16: an overflow halves the scale. That the step is skipped is in test_skips."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.training.checkpoint import Checkpoints
from dit_jax.training.loss_scale import CEILING, FLOOR, GROW_EVERY, START, LossScale
from dit_jax.training.progress import Progress
from dit_jax.training.writer import Writer
from tests.toy import Toy
from tests.toy_step import CALM, make_batch, make_state, make_step

BAD = float("inf")


def scale_of(scale: float, finite_steps: int = 0) -> LossScale:
    return LossScale(jnp.float32(scale), jnp.int32(finite_steps))


def values(scale: LossScale) -> tuple[float, int]:
    return float(scale.scale), int(scale.finite_steps)


@pytest.mark.parametrize(
    ("before", "finite", "after"),
    [
        ((1024.0, 7), True, (1024.0, 8)),
        ((1024.0, 7), False, (512.0, 0)),
        ((1024.0, GROW_EVERY - 1), True, (2048.0, 0)),
        ((1024.0, GROW_EVERY - 1), False, (512.0, 0)),
        ((FLOOR, 0), False, (FLOOR, 0)),
        ((CEILING, GROW_EVERY - 1), True, (CEILING, 0)),
    ],
)
def test_the_scale_falls_at_an_overflow_and_grows_after_many_finite_steps(before, finite, after):
    assert values(scale_of(*before).adjust(jnp.asarray(finite))) == after


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(seed=5, dropout=0.0, dtype=jnp.float16)


@pytest.fixture(scope="module")
def batch(toy) -> dict:
    return make_batch(toy)


def test_the_scale_of_the_loss_is_not_seen_in_loss_and_update(toy, batch):
    """A power of two rounds nothing, as long as no gradient is too small or too large."""
    step = make_step(toy)
    function = jax.jit(step)
    a, b = (function(make_state(toy, step).replace(loss_scale=scale_of(s)), batch) for s in (CALM, 4 * CALM))
    for name in ("loss", "grad_norm"):
        assert float(a[1][name]) == pytest.approx(float(b[1][name]), rel=1e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a[0].params, b[0].params)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_slices_of_a_step_share_one_scale_that_is_adjusted_once(toy, batch, accumulate):
    step = make_step(toy, accumulate=accumulate)
    one_bad = {**batch, "mean": batch["mean"] + np.array([BAD, 0, 0, 0]).reshape(4, 1, 1, 1)}
    function = jax.jit(step)
    state = make_state(toy, step).replace(loss_scale=scale_of(CALM))
    assert values(function(state, one_bad)[0].loss_scale) == (CALM / 2, 0)
    assert values(function(state, batch)[0].loss_scale) == (CALM, 1)


@pytest.mark.slow
def test_a_state_of_one_dtype_is_restored_under_any_other(toy, batch, tmp_path):
    """The scale is saved always, and rests where it is not used."""
    step = make_step(toy)
    state = make_state(toy, step).replace(loss_scale=scale_of(START / 4, 11))
    checkpoints = Checkpoints(tmp_path, keep_latest=1, keep_every=0)
    checkpoints.save(state, {})
    checkpoints.wait()
    for dtype in (jnp.float32, jnp.bfloat16):
        other = make_step(Toy(dropout=0.0, dtype=dtype))
        restored = checkpoints.restore(100, jax.eval_shape(lambda step=other: make_state(toy, step)))
        after, metrics = jax.jit(other)(restored, batch)
        assert values(after.loss_scale) == (START / 4, 11)
        assert "loss_scale" not in metrics
    checkpoints.close()


def test_a_row_with_an_overflow_is_json_and_the_line_says_the_scale(tmp_path, capsys):
    writer = Writer(tmp_path, 0, "", {}, None)
    progress = Progress(writer, log_every=1, start=0, total_steps=2, batch_size=2, flops=1, peak=None)
    row = {"loss": 0.5, "learning_rate": 1e-4, "loss_scale": 65536.0, "skipped": jnp.int32(1), "skipped_in_a_row": 0}
    progress.step(1, {**row, "grad_norm": jnp.float32(BAD)})
    progress.step(2, {**row, "grad_norm": jnp.float32(2.0)})
    progress.close()
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["grad_norm"] for row in rows] == [None, 2.0]
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["loss_scale"] == 65536
    out = capsys.readouterr().out
    assert " loss_scale=65536 skipped=1 " in out and "warning" not in out
