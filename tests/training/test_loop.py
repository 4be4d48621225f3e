"""The loop of real runs: stopped anywhere it leaves what an uninterrupted run leaves, and gives up a lost cause."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import train
from dit_jax.errors import DivergedError, PreemptedError
from dit_jax.training.loop import Loop
from dit_jax.training.step import TrainStep
from dit_jax.training.watchdog import Watchdog
from tests.test_train import assert_same_run, leaves
from tests.tiny_run import tiny_config, train_tiny


def steps_in(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def status_of(workdir: Path) -> dict:
    return json.loads((workdir / "STATUS.json").read_text())


def test_fifty_steps_compile_the_step_once_and_nothing_after_the_first(tmp_path, monkeypatch):
    """An argument of another shape or type, or a function made anew, would be compiled again, and silently."""
    compilations, compiled, seen = [], [], []
    compile_step, take = TrainStep.compile, Loop._step

    def listen(event, seconds, **_):
        compilations.extend([seconds] if event == "/jax/core/compile/backend_compile_duration" else [])

    def count(self, state, step):
        state = take(self, state, step)
        seen.append(len(compilations))
        return state

    monkeypatch.setattr(TrainStep, "compile", lambda *args: compiled.append(1) or compile_step(*args))
    monkeypatch.setattr(Loop, "_step", count)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train_tiny(tmp_path, total_steps="50", save_every="0", sample_every="0")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1 and seen[0] > 0
    assert seen == seen[:1] * 50


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_run_at_a_saved_step_from_which_it_goes_on(tiny_run, tmp_path, monkeypatch, number, error):
    """It comes while step 7, which is not due to be saved, is on its way."""
    take = Loop._step

    def told(self, state, step):
        if step == 7:
            signal.raise_signal(number)
        return take(self, state, step)

    with monkeypatch.context() as patched, pytest.raises(error, match="step 7 is saved; the same command goes on"):
        patched.setattr(Loop, "_step", told)
        train_tiny(tmp_path)
    assert steps_in(tmp_path) == [5, 7]
    status = status_of(tmp_path)
    assert status["state"] == ("preempted" if error is PreemptedError else "interrupted") and status["step"] == 7
    train_tiny(tmp_path)
    assert_same_run(tiny_run, tmp_path, 20)
    status = status_of(tmp_path)
    assert (status["state"], status["step"], status["restarts"]) == ("done", 20, 1)
    assert 0 < status["productive_seconds"] < status["wall_seconds"]


@pytest.mark.parametrize("step", [10, 20])
def test_samples_that_a_signal_breaks_off_are_drawn_when_the_run_goes_on(tiny_run, tmp_path, monkeypatch, step):
    """Also those of the last step, after which there is nothing left to train."""
    draw = train.draw_samples

    def told(*args):
        if args[-1] == step:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args)

    grid = Path("samples") / f"{step:08d}.png"
    for _ in range(2):  # the second signal comes while what the first broke off is made good
        with monkeypatch.context() as patched:
            patched.setattr(train, "draw_samples", told)
            with pytest.raises(PreemptedError, match=f"SIGTERM: step {step} is saved"):
                train_tiny(tmp_path)
        assert not (tmp_path / grid).exists() and max(steps_in(tmp_path)) == step
    train_tiny(tmp_path)
    assert (tmp_path / grid).read_bytes() == (tiny_run / grid).read_bytes()
    assert_same_run(tiny_run, tmp_path, 20)
    assert train.run(tiny_config(), tmp_path) is None


def test_a_run_whose_time_is_up_saves_what_it_has_and_always_comes_further(tiny_run, tmp_path):
    for step in (1, 2):
        with pytest.raises(PreemptedError, match=f"max_hours: step {step} is saved"):
            train_tiny(tmp_path, max_hours="1e-9")
    train_tiny(tmp_path)
    assert_same_run(tiny_run, tmp_path, 20)


def test_a_run_that_diverges_keeps_what_is_good_and_says_what_came(tmp_path, capsys):
    """Of a learning rate without bounds, which makes the second step's loss infinite, and all that follow."""
    wild = {"learning_rate": "1e30", "clip_norm": "1e30", "warmup_steps": "0", "log_every": "1", "save_every": "2"}
    with pytest.raises(
        DivergedError, match=r"the (loss|gradient's norm) is (nan|inf) at step \d+, and 3 steps in a row"
    ):
        train_tiny(tmp_path, **wild, max_skipped_in_a_row="3")
    (report,) = (tmp_path / "diverged").iterdir()
    found = json.loads(report.read_text())
    last = found["step"]
    assert report.name == f"{last:08d}.json" and found["skipped_in_a_row"] == found["skipped"] == 3
    assert list(found["records"]) == [str(step) for step in range(last - 2, last + 1)]
    assert all(len(ids) == 8 and all(isinstance(one, str) for one in ids) for ids in found["records"].values())
    assert found["norms"].keys() >= {"x_embedder", "blocks_0", "final_layer"}
    for row in found["norms"].values():
        assert row.keys() == {"params", "ema", "gradient", "gradient_not_finite"}
    assert any(row["gradient_not_finite"] for row in found["norms"].values())
    assert max(steps_in(tmp_path), default=0) <= last - 3
    out = capsys.readouterr().out
    assert f"warning: step {last} is skipped" in out and out.count("was skipped and is not saved") == 1
    assert status_of(tmp_path)["state"] == "diverged"
    for step in steps_in(tmp_path):
        assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path, step).values())


def test_a_step_that_does_not_end_is_found_and_what_is_done_beside_the_steps_may_take_its_time(tmp_path, monkeypatch):
    found, take, save = [], Loop._step, Loop._save

    def hangs(self, state, step):
        state = take(self, state, step)
        time.sleep(3 if step == 3 else 0)
        return state

    def takes_its_time(self, state, step):
        with self._aside():
            time.sleep(3)
        save(self, state, step)

    monkeypatch.setattr(Watchdog, "_end", lambda self, seconds, limit: found.append(self._step))
    monkeypatch.setattr(Loop, "_step", hangs)
    monkeypatch.setattr(Loop, "_save", takes_its_time)
    train_tiny(tmp_path, total_steps="4", save_every="2", sample_every="0", stall_patience="2")
    assert set(found) == {3}
