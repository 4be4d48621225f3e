"""A run in a bucket is the run on a disk: through a kill in the middle of a save, through damage, for every program."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax import doctor, stores, train
from dit_jax.errors import ConfigError, FetchError
from dit_jax.sample import Pipeline
from dit_jax.stores import folder_of
from dit_jax.training.checkpoint import Checkpoints
from dit_jax.training.saved_steps import newest_whole, set_aside, steps_of, unfinished
from tests.bucket import serve
from tests.test_train import assert_same_run
from tests.tiny_run import tiny_config, tiny_flags
from tests.training.test_checkpoint import make_state, save

if importlib.util.find_spec("gcsfs") is None:  # not by importing it: it reads the environment of `served` then
    pytest.skip("there is no gcsfs", allow_module_level=True)

RUN = "gs://bucket/runs/one"
CHECKPOINTS = folder_of(RUN) / "checkpoints"
KILLED = "runs/one/checkpoints/15/manifest.sha256"  # the last but one object of a save


@pytest.fixture(scope="module")
def served():
    """An empty bucket, which this process and those it starts find."""
    with serve() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket, environment


@pytest.fixture(scope="module")
def finished(served):
    """A run that was killed in the middle of its third save, and went on in this process."""
    bucket, _ = served
    seen = {}

    def before_put(name: str) -> None:
        if name.endswith("/10/commit_success.txt"):
            seen["with step 10"] = dict(bucket.objects)
        if name == KILLED:
            os.kill(process.pid, signal.SIGKILL)
            raise ConnectionAbortedError

    flags = [flag for flag in tiny_flags(Path("nowhere")) if not flag.startswith("--workdir")]
    bucket.before_put = before_put
    command = [sys.executable, "-m", "dit_jax.main", *flags, f"--workdir={RUN}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and "saved step=10" in said, said
    bucket.before_put = lambda name: None
    seen["killed"] = dict(bucket.objects)
    assert steps_of(CHECKPOINTS) == [5, 10] and unfinished(CHECKPOINTS) == [CHECKPOINTS / "15"]
    train.run(tiny_config(), RUN)
    return seen


@pytest.fixture
def bucket(served, finished):
    """The bucket with the finished run, for a test to change."""
    bucket, _ = served
    before = dict(bucket.objects)
    yield bucket
    bucket.objects.clear()
    bucket.objects.update(before)


def on_disk(bucket, folder: Path) -> Path:
    return bucket.copy_to(folder) / "runs" / "one"


def test_a_run_that_was_killed_in_a_save_is_the_run_that_was_not(tiny_run, bucket, tmp_path):
    run = on_disk(bucket, tmp_path)
    assert_same_run(tiny_run, run, 20)
    assert steps_of(CHECKPOINTS) == [5, 10, 15, 20] and not unfinished(CHECKPOINTS)
    names = {path.relative_to(tiny_run).as_posix() for path in tiny_run.rglob("*") if path.is_file()}
    kept = {name for name in names if not name.startswith(("checkpoints/", "tb/", "encoded/", "LOCK"))}
    assert kept <= {path.relative_to(run).as_posix() for path in run.rglob("*")} and len(kept) > 4
    assert len(list((run / "tb").glob("events.*"))) == 2  # one of each process
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="grid"') == 2  # that of step 10 lies in the bucket alone


def test_what_belongs_to_a_checkpoint_is_there_before_it_counts(finished):
    there = finished["with step 10"]
    rows = there["runs/one/metrics.jsonl"].decode().splitlines()
    assert '"step": 9' in rows[3] and "runs/one/config.json" in there
    assert "runs/one/checkpoints/10/manifest.sha256" in there
    assert KILLED not in finished["killed"] and "runs/one/checkpoints/15/ema/_METADATA" in finished["killed"]


def test_damage_is_found_by_every_program_and_set_aside(bucket, capsys):
    doctor.main([f"--verify={RUN}"])
    assert capsys.readouterr().out.count(" is what was written: sha256 of ") == 4
    name = "runs/one/checkpoints/20/ema/_METADATA"
    bucket.objects[name] = bucket.objects[name][:-1] + b" "
    with pytest.raises(SystemExit) as end:
        doctor.main([f"--verify={RUN}"])
    assert end.value.code == 5 and "step 20: ema/_METADATA has another sha256" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="step 20 is damaged: ema/_METADATA .*; step 15 is used"):
        assert Pipeline.load(RUN).trained.step == 15

    assert set_aside(CHECKPOINTS, 20) == CHECKPOINTS / "20.corrupt" and steps_of(CHECKPOINTS) == [5, 10, 15]
    doctor.main([f"--list={RUN}"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["step", "5", "10", "15", "20.corrupt", "compared"]
    assert [row[-2:] for row in rows[1:4]] == [["all", "there"]] * 3 and "-" not in rows[1][2:3]
    assert Pipeline.load(RUN).trained.step == 15


def test_a_lost_object_is_found_by_its_name(bucket):
    del bucket.objects["runs/one/checkpoints/20/optimizer/manifest.ocdbt"]
    whole, damaged = newest_whole(CHECKPOINTS, "fast", ("optimizer",))
    assert whole.step == 15 and damaged[0].problems == ("optimizer/manifest.ocdbt is missing",)


def test_a_run_that_is_refused_leaves_the_bucket_alone(bucket):
    before = dict(bucket.objects)
    with pytest.raises(ConfigError, match="learning_rate: 0.02 -> 0.5"):
        train.run(tiny_config(learning_rate="0.5"), RUN)
    assert bucket.objects == before


@pytest.mark.parametrize("refused", ["manifest.sha256", "params/"])
def test_a_save_that_the_bucket_refuses_is_told_and_never_called_saved(served, refused):
    bucket, _ = served

    def before_put(name: str) -> None:
        if f"/2/{refused}" in name:
            raise PermissionError("this bucket is full")

    directory = folder_of("gs://bucket/runs/refused") / refused.strip("/")
    checkpoints = Checkpoints(directory, keep_latest=2, keep_every=0)
    save(checkpoints, make_state(1))
    bucket.before_put = before_put
    with pytest.raises(FetchError, match="the save of step 2 failed: .* the run goes on from step 1"):
        checkpoints.save(make_state(2), {})
        checkpoints.wait()
    bucket.before_put = lambda name: None
    assert checkpoints.committed() is None and steps_of(directory) == [1]
    with contextlib.closing(Checkpoints(directory, keep_latest=2, keep_every=0)):
        assert not unfinished(directory) and steps_of(directory) == [1]


def test_a_bucket_that_cannot_be_reached_ends_in_one_line(served, monkeypatch):
    with pytest.raises(FetchError, match="cannot reach gs://nobody/run: .*are you logged in"):
        Pipeline.load("gs://nobody/run")
    with pytest.raises(ConfigError, match="s3://bucket/run is neither gs://bucket/folder nor a folder"):
        folder_of("s3://bucket/run")
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gcsfs: pip install 'dit_jax\[gcs\]'"):
        train.run(tiny_config(), RUN)
