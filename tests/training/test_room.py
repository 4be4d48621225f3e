"""A run that does not fit on its disk is told before it begins, with what it needs and what there is."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dit_jax import train
from dit_jax.errors import WorkdirError
from dit_jax.metrics.report import PAGE
from dit_jax.training.room import check_room, most_at_once
from tests.small_disk import small_disk
from tests.tiny_run import tiny_config, tiny_flags

STATE = {"a": jax.ShapeDtypeStruct((2**28,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)}  # 1 GiB


@pytest.fixture
def disk(monkeypatch):
    """Sets the free space, in GiB."""

    def set_free(gib: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(gib * 2**30)))

    return set_free


@pytest.mark.parametrize(
    ("there", "saves", "keep_every", "most"),
    [
        ([], range(5, 25, 5), 0, 3),  # two that stay and one that is being written
        ([], [5], 0, 1),
        ([], [], 0, 0),
        ([5, 10], [15, 20], 0, 1),  # one is written, then one goes
        ([5], [10, 15, 20], 0, 2),
        ([], range(1, 11), 2, 6),  # at step 10: 2, 4, 6 for good, 8 and 9 the latest, and 10; 8 becomes one for good
        ([1, 2, 4, 5], [6, 7], 2, 1),
    ],
)
def test_as_many_lie_there_at_once_as_the_policy_says(there, saves, keep_every, most):
    assert most_at_once(there, saves, 2, keep_every) == most


def test_less_than_one_checkpoint_ends_the_run_and_less_than_all_is_a_warning(disk, tmp_path):
    def check(saves) -> list[str]:
        return check_room(tmp_path, STATE, saves, keep_latest=2, keep_every=0, keep_best=0)

    disk(0.9)
    with pytest.raises(WorkdirError, match="takes 1.000 GiB, and 0.900 GiB are free in .*: make room"):
        check([5, 10])
    assert check([]) == []
    disk(2.5)
    assert check([5, 10]) == []
    (warning,) = check([5, 10, 15, 20])
    assert (
        warning.startswith("up to 3 more checkpoints will lie in ") and "3.000 GiB, and 2.500 GiB are free" in warning
    )


def test_a_run_without_room_ends_before_it_writes_anything(disk, tmp_path, capsys):
    disk(0.00001)
    with pytest.raises(WorkdirError, match=r"takes 0\.000 GiB|takes 0\.001 GiB"):
        train.run(tiny_config(), tmp_path / "run")
    assert "encoding" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "LOCK", "STATUS.json", PAGE}
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["state"] == "failed"


def test_a_workdir_that_cannot_be_written_to_is_told_before_anything_is_done(tmp_path):
    """A file system that is mounted for reading only, as root may write everywhere else."""
    with small_disk(tmp_path / "run", "ro,size=1m") as run:
        command = [sys.executable, "-m", "dit_jax.main", *tiny_flags(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 8 and "encoding" not in done.stdout
    assert done.stderr == f"workdir error: cannot write to {run}: Read-only file system; give another folder\n"
