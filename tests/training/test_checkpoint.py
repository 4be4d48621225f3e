"""What is saved comes back bit for bit; what is damaged is found and survived; what failed is never called saved."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax import train
from dit_jax.errors import CheckpointError, WorkdirError
from dit_jax.sample import Pipeline
from dit_jax.sharding import make_mesh, replicated, with_sharding
from dit_jax.training import manifest
from dit_jax.training.checkpoint import Best, Checkpoints, restore_trees
from dit_jax.training.loss_scale import LossScale
from dit_jax.training.saved_steps import (
    FORMAT,
    ITEMS,
    find_step,
    newest_whole,
    restore_metadata,
    set_aside,
    steps_of,
    verify,
)
from dit_jax.training.skips import Skips
from dit_jax.training.state import TrainState
from tests.small_disk import small_disk
from tests.test_train import assert_same_run
from tests.tiny_run import tiny_config, tiny_flags

LIMIT = 20  # KiB of a file: less than a checkpoint's arrays, more than logs


def make_state(step: int, width: int = 3) -> TrainState:
    params = {"a": {"kernel": jax.random.normal(jax.random.key(step), (2, width))}}
    optimizer = optax.adam(0.1)
    ema = jax.tree.map(lambda p: p / 3, params)
    scale = LossScale(jnp.float32(2.0**step), jnp.int32(step + 1))
    return TrainState(
        jnp.int32(step), params, ema, optimizer.init(params), scale, Skips(jnp.int32(step + 2), jnp.int32(step + 3))
    )


def save(checkpoints: Checkpoints, state: TrainState):
    """Save and wait; what is called saved is what full verification accepts."""
    checkpoints.save(state, {"data": "pictures"})
    checkpoints.wait()
    commit = checkpoints.committed()
    assert not verify(checkpoints.directory, commit.step, "full", ITEMS).problems
    return commit


def assert_restored(checkpoints: Checkpoints, step: int) -> None:
    restored, expected = checkpoints.restore(step, make_state(99)), make_state(step)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep_latest=2, keep_every=4)
    commits = [save(checkpoints, make_state(step)) for step in range(1, 8)]
    yield folder, checkpoints, commits
    checkpoints.close()


@pytest.fixture
def steps(saved, tmp_path) -> Path:
    """A copy of the checkpoints of steps 4, 6 and 7, for a test to damage."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def test_the_newest_and_the_multiples_are_kept(saved):
    folder, checkpoints, commits = saved
    assert steps_of(folder) == [4, 6, 7]
    assert [commit.step for commit in commits] == list(range(1, 8)) and commits[0].bytes > 0
    assert checkpoints.committed() is None


def test_a_state_comes_back_bit_for_bit(saved):
    for step in (4, 7):
        assert_restored(saved[1], step)


def test_parameters_and_metadata_alone(saved):
    folder, _, _ = saved
    shapes = jax.eval_shape(lambda: make_state(7).params)
    jax.tree.map(np.testing.assert_array_equal, restore_trees(folder, 7, {"ema": shapes})["ema"], make_state(7).ema)
    jax.tree.map(
        np.testing.assert_array_equal, restore_trees(folder, 7, {"params": shapes})["params"], make_state(7).params
    )
    assert restore_metadata(folder, 7) == {"data": "pictures", "format": FORMAT, "step": 7}


def test_a_state_is_restored_onto_the_devices_that_there_are_now(saved):
    """Saved from one device, restored onto two."""
    mesh = make_mesh(jax.devices())
    assert mesh.size == 2 and make_state(7).params["a"]["kernel"].devices() == {jax.devices()[0]}
    wanted = with_sharding(jax.eval_shape(lambda: make_state(7)), replicated(mesh))
    restored = saved[1].restore(7, wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(7))
    assert all(leaf.sharding == replicated(mesh) for leaf in jax.tree.leaves(restored))


def test_what_is_missing_is_an_error(saved, tmp_path):
    folder, checkpoints, _ = saved
    assert [find_step(folder, step, "full", ITEMS)[0].step for step in (None, 4)] == [7, 4]
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 .*there are 4, 6, 7"):
        find_step(folder, 5, "full", ITEMS)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_step(tmp_path, None, "full", ITEMS)
    with pytest.raises(CheckpointError, match="cannot restore .*/5/metadata: "):
        checkpoints.restore(5, make_state(7))


def test_a_checkpoint_of_another_model_is_an_error_that_names_every_leaf(saved):
    checkpoints = saved[1]
    with pytest.raises(CheckpointError, match=r"another model\n  misshapen a/kernel \(2, 3\), expected \(2, 5\)$"):
        checkpoints.restore(7, make_state(7, width=5))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_state(7).params)
    with pytest.raises(CheckpointError, match=r"another model\n  a/kernel is float32, expected bfloat16$"):
        checkpoints.restore(7, make_state(7).replace(params=half))
    with pytest.raises(CheckpointError, match=r"another model\n  missing b\n  extra a/kernel$"):
        checkpoints.restore(7, make_state(7).replace(params={"b": jnp.zeros(3)}))


def test_a_checkpoint_of_a_later_release_is_refused_by_its_name(steps):
    path = steps / "7" / "metadata" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1, "versions": {"dit_jax": "9.1"}}))
    with pytest.raises(
        CheckpointError, match=rf"has format {FORMAT + 1}, this release reads {FORMAT} and older: .*\(9\.1\)"
    ):
        restore_metadata(steps, 7)


def test_a_checkpoint_can_be_checked_without_this_package(steps):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    check = ["sha256sum", "--check", "--strict", "--quiet", manifest.NAME]
    assert subprocess.run(check, cwd=steps / "7", check=False).returncode == 0
    path = steps / "7" / "ema" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    done = subprocess.run(check, cwd=steps / "7", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "ema/_METADATA: FAILED\n"


# ------------------------------------------------------------------------------------------------------------- damage


def needed_files(step: Path) -> list[Path]:
    """All that is read of a step: what is in its items, and the manifest."""
    return [
        step / manifest.NAME,
        *sorted(file for item in ITEMS for file in (step / item).rglob("*") if file.is_file()),
    ]


@contextlib.contextmanager
def damaged(path: Path):
    """Whatever happens to the file is undone."""
    before = path.read_bytes()
    yield before
    path.write_bytes(before)


def assert_found(steps: Path, path: Path, how: str) -> None:
    """The damage is named, and the step before is used."""
    whole, passed_over = newest_whole(steps, how, ITEMS)
    assert whole.step == 6 and [report.step for report in passed_over] == [7], path
    name = path.relative_to(steps / "7").as_posix()
    assert any(problem.startswith(name) for problem in passed_over[0].problems), (name, passed_over)
    assert str(passed_over[0]).startswith(f"step 7 is damaged: {passed_over[0].problems[0]}")


def test_every_flipped_bit_is_found(steps):
    """At least one in every file that is read, 40 or more in all."""
    choose, files = random.Random(0), needed_files(steps / "7")
    flips = files + choose.choices(files, k=max(0, 40 - len(files)))
    for path in flips:
        with damaged(path) as before:
            assert before, path
            bit = choose.randrange(8 * len(before))
            flipped = bytearray(before)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert_found(steps, path, "full")
    assert len(flips) >= 40
    assert newest_whole(steps, "full", ITEMS)[0].step == 7


def test_no_flipped_bit_of_the_manifest_passes(steps):
    path = steps / "7" / manifest.NAME
    before = path.read_bytes()
    for bit in random.Random(1).sample(range(8 * len(before)), 300):
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert verify(steps, 7, "fast", ("ema",)).problems, bit


@pytest.mark.parametrize("how", ["fast", "full"])
def test_every_file_that_is_cut_or_lost_is_found(steps, how):
    """Ten of each, and a manifest that ends between two files is no shorter manifest."""
    choose = random.Random(2)
    for path in choose.sample(needed_files(steps / "7"), 10):
        with damaged(path) as before:
            path.write_bytes(before[: choose.randrange(len(before))])
            assert_found(steps, path, how)
    for path in choose.sample(needed_files(steps / "7"), 10):
        with damaged(path):
            path.unlink()
            assert_found(steps, path, how)


def test_an_empty_step_and_one_without_metadata_are_damaged(steps):
    shutil.rmtree(steps / "7" / "metadata")
    whole, passed_over = newest_whole(steps, "fast", ITEMS)
    assert whole.step == 6 and "metadata/metadata is missing" in passed_over[0].problems
    (steps / "8").mkdir()
    assert [report.step for report in newest_whole(steps, "full", ITEMS)[1]] == [8, 7]


def test_a_damaged_step_is_set_aside_and_the_one_before_goes_on(steps):
    (steps / "7" / "params" / "_METADATA").unlink()
    (steps / "7.corrupt").mkdir()  # of the time before
    assert set_aside(steps, 7) == steps / "7.corrupt" and (steps / "7.corrupt" / "ema").is_dir()
    assert steps_of(steps) == [4, 6]
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)) as checkpoints:
        assert_restored(checkpoints, 6)
        save(checkpoints, make_state(7))
        assert_restored(checkpoints, 7)
    assert {path.name for path in steps.iterdir()} == {"4", "6", "7", "7.corrupt"}


def test_what_orbax_keeps_for_itself_is_not_needed(steps):
    for name, content in (("_CHECKPOINT_METADATA", b'{"x\xff'), ("commit_success.txt", None)):
        (steps / "7" / name).unlink() if content is None else (steps / "7" / name).write_bytes(content)
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)) as checkpoints:
        assert not verify(steps, 7, "full", ITEMS).problems
        assert_restored(checkpoints, 7)
        save(checkpoints, make_state(8))


def test_where_all_are_damaged_all_are_named_and_none_is_touched(steps):
    for step in (4, 6, 7):
        shutil.rmtree(steps / str(step) / "ema")
    with pytest.raises(CheckpointError, match=r"can be used: step 7 is .*; step 6 is .*; step 4 is .*Put one back"):
        newest_whole(steps, "full", ITEMS)
    assert steps_of(steps) == [4, 6, 7]


def test_a_step_that_was_asked_for_is_never_another_one(steps):
    (steps / "6" / "ema" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="step 6 is damaged: ema/_METADATA is missing; there are 4, 6, 7"):
        find_step(steps, 6, "full", ("ema", "metadata"))
    assert find_step(steps, 6, "full", ("params", "metadata"))[0].step == 6  # which is all that is read then


def test_a_checkpoint_of_before_there_were_manifests_is_not_damaged(steps):
    (steps / "7" / manifest.NAME).unlink()
    assert newest_whole(steps, "full", ITEMS)[0].step == 6  # it says that it had one
    path = steps / "7" / "metadata" / "metadata"
    path.write_text('{"data": "pictures"}')
    report, _ = newest_whole(steps, "full", ITEMS)
    assert report.step == 7 and not report.verifiable and "cannot be verified" in str(report)
    shutil.rmtree(steps / "7" / "optimizer")
    assert newest_whole(steps, "full", ITEMS)[0].step == 6


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_a_run_goes_on_from_the_step_before_the_damaged_one_and_ends_the_same(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoints = run / "checkpoints"
    flip(checkpoints / "20" / "params" / "manifest.ocdbt")
    with pytest.warns(UserWarning, match="step 20 is damaged: params/manifest.ocdbt has another .*; step 15 is used"):
        assert Pipeline.load(run, "raw").trained.step == 15
    with pytest.raises(CheckpointError, match="step 20 is damaged"):
        Pipeline.load(run, "raw", 20)
    assert Pipeline.load(run, "ema").trained.step == 20  # of which nothing is damaged
    assert steps_of(checkpoints) == [5, 10, 15, 20]  # only training sets aside

    train.run(tiny_config(), run)
    out = capsys.readouterr().out
    assert "step 20 is damaged: params/manifest.ocdbt has another sha256" in out
    assert f"set aside as {checkpoints / '20.corrupt'}" in out and "resuming from step 15" in out
    assert_same_run(tiny_run, run, 20)
    said = restore_metadata(checkpoints, 20)
    assert said["config"]["learning_rate"] == 0.02 and "jax" in said["versions"]
    assert said["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}


# ------------------------------------------------------------------------------------------------- saves that fail


def test_what_an_earlier_process_did_not_finish_is_removed(steps):
    for name in ("8.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1234"):
        (steps / name / "ema").mkdir(parents=True)
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)) as checkpoints:
        assert {path.name for path in steps.iterdir()} == {"4", "6", "7"}
        save(checkpoints, make_state(8))


def test_a_step_whose_deletion_was_not_finished_is_removed_and_what_is_kept_is_not(steps):
    for step in ("5", "7"):
        shutil.copytree(steps / "6", steps / step, dirs_exist_ok=True)
        (steps / step / "ema" / "_METADATA").unlink()
    shutil.copytree(steps / "6", steps / "3")
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)):
        assert steps_of(steps) == [3, 4, 6, 7]  # 3 is whole: not ours to judge; 7 is damaged, and one of the newest
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)) as checkpoints:
        save(checkpoints, make_state(8))


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("broken", "told"),
    [(fail, "the save of step 8 failed: No space left"), (lambda *_: 0.0, "step 8 did not arrive: manifest.sha256 is")],
)
def test_a_save_without_its_manifest_is_no_save(steps, monkeypatch, broken, told):
    with contextlib.closing(Checkpoints(steps, keep_latest=2, keep_every=4)) as checkpoints:
        monkeypatch.setattr(manifest, "write", broken)
        checkpoints.save(make_state(8), {})
        with pytest.raises(WorkdirError, match=f"{told}.*make room in .* from step 7, the last that is saved"):
            checkpoints.wait()
            checkpoints.committed()
    assert newest_whole(steps, "full", ITEMS)[0].step == 7


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        folder, filler = disk / "checkpoints", disk / "filler"
        with contextlib.closing(Checkpoints(folder, keep_latest=2, keep_every=0)) as checkpoints:
            save(checkpoints, make_state(1, 10_000))
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
            checkpoints.save(make_state(2, 10_000), {})
            with pytest.raises(WorkdirError, match=r"step 2 failed: No space left .*make room in .* from step 1"):
                checkpoints.wait()
            assert checkpoints.committed() is None and steps_of(folder) == [1]
        with pytest.raises(WorkdirError, match="No space left .* from step 1"), checkpoints.room():
            (disk / "metrics.jsonl").write_bytes(bytes(2_000_000))
        (disk / "metrics.jsonl").unlink()
        filler.unlink()
        assert newest_whole(folder, "full", ITEMS)[0].step == 1
        with contextlib.closing(Checkpoints(folder, keep_latest=2, keep_every=0)) as checkpoints:
            assert save(checkpoints, make_state(2, 10_000)).step == 2


def test_a_run_that_may_not_write_large_files_ends_in_one_line_and_goes_on_later(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "20")
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {LIMIT} && exec "$@"', "-", sys.executable, "-m", "dit_jax.main", *tiny_flags(run)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 8 and "saving step=20" in done.stdout and "saved" not in done.stdout, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    line = done.stderr.rstrip()
    assert line.startswith("workdir error: the save of step 20 failed: File too large; make room in ")
    assert line.endswith("the run goes on from step 15, the last that is saved")
    train.run(tiny_config(), run)
    assert_same_run(tiny_run, run, 20)


def test_the_best_by_validation_stay_also_when_the_run_is_resumed(tmp_path):
    """A better one takes the place of the worst, and a step that was not validated is none of them."""
    errors = {1: 0.5, 2: 0.3, 3: 0.4, 5: 0.2, 6: 0.9}
    kept = []
    for steps in (range(1, 5), range(5, 8)):  # two processes
        best = Best(2, lambda: errors)
        with contextlib.closing(Checkpoints(tmp_path, keep_latest=1, keep_every=0, best=best)) as checkpoints:
            for step in steps:
                save(checkpoints, make_state(step))
                kept.append(steps_of(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 5], [2, 5, 6], [2, 5, 7]]


def test_a_run_whose_checkpoints_are_gone_is_no_new_run(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="is a run that has saved step 20, and .*checkpoints has no checkpoint"):
        train.run(tiny_config(), run)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["", None])
def test_a_config_that_is_lost_or_damaged_is_written_again_from_the_checkpoint(tiny_run, tmp_path, capsys, left):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    path = run / "config.json"
    path.unlink() if left is None else path.write_text(left)
    assert train.run(tiny_config(), run) is None
    assert "it is written again from the checkpoint" in capsys.readouterr().out
    assert path.read_bytes() == (tiny_run / "config.json").read_bytes()
