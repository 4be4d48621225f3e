"""A disk that is full ends a run loudly, and as often as there is room again the run goes on from what it has."""

import shutil

import pytest

from dit_jax.training.saved_steps import ITEMS, steps_of, verify
from tests.small_disk import small_disk
from tests.soak.program import Plan
from tests.soak.survival import Survivor
from tests.test_train import assert_same_run

PLAN = Plan(total=120, save=5, sample=25, validate=0)
LARGE = {"model.hidden_size": "128", "keep_latest": "99"}  # checkpoints of a few megabytes, and none is deleted


@pytest.mark.soak
def test_a_run_that_fills_its_disk_goes_on_when_there_is_room(tmp_path, capsys):
    """All but the newest checkpoint are taken away whenever it is full."""
    whole = Survivor(tmp_path / "whole", PLAN, LARGE, {}).ends()
    with small_disk(tmp_path / "disk", "size=20m") as disk:
        run, checkpoints, full = Survivor(disk / "run", PLAN, LARGE, {}), disk / "run" / "checkpoints", 0
        while (program := run.start()).end() != 0:
            full += 1
            assert program.end() == 8, program
            line = program.lines[-1]
            with capsys.disabled():
                print(f"\n{line}")
            assert line.startswith("workdir error: ") and "No space left on device; make room in " in line, program
            steps = steps_of(checkpoints)
            assert line.endswith(f"the run goes on from step {steps[-1]}, the last that is saved")
            assert program.saved == steps[-1] > program.resumed, program
            assert not any(verify(checkpoints, step, "full", ITEMS).problems for step in steps)
            for step in steps[:-1]:
                shutil.rmtree(checkpoints / str(step))
        assert full >= 2
        assert_same_run(whole, disk / "run", PLAN.total)
